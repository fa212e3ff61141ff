"""Rows with the same prompt, wherever they are in a file or folder, are one group, in every verb that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from ncalign.cli.app import main
from ncalign.data.formats import PUBLIC, joined
from ncalign.data.groups import Candidate, DataError, Group, ReadReport, convert, read_groups, write_groups
from ncalign.online.config import OnlineConfig
from ncalign.online.state import load_prompts

WriteJsonl = Callable[..., Path]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def scored(group: Group) -> list[tuple[Any, float | None]]:
    return [(candidate.completion, candidate.reward) for candidate in group.candidates]


# Three rows of two prompts, the second between the first one's: a > b, c > d, b > e.
STRINGS = [("P", "a", "b"), ("Q", "c", "d"), ("P", "b", "e")]
ROWS: dict[str, list[dict[str, Any]]] = {
    "trl_preference": [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in STRINGS],
    "trl_preference, conversations": [{"prompt": [user(p)], "chosen": answer(a), "rejected": answer(b)} for p, a, b in STRINGS],
    "trl_preference, implicit": [{"chosen": [user(p), *answer(a)], "rejected": [user(p), *answer(b)]} for p, a, b in STRINGS],
    "trl_unpaired": [
        {"prompt": p, "completion": text, "label": label} for p, a, b in STRINGS for text, label in ((a, True), (b, False))
    ],
    "hh": [
        {"chosen": f"\n\nHuman: {p}\n\nAssistant: {a}", "rejected": f"\n\nHuman: {p}\n\nAssistant: {b}"} for p, a, b in STRINGS
    ],
    "alpaca": [{"instruction": p, "input": "", "chosen": a, "rejected": b, "system": "S"} for p, a, b in STRINGS],
    "sharegpt": [
        {"conversations": [turn("human", p)], "chosen": turn("gpt", a), "rejected": turn("gpt", b)} for p, a, b in STRINGS
    ],
    "openai": [
        {"input": {"messages": [user(p)], "tools": []}, "preferred_output": answer(a), "non_preferred_output": answer(b)}
        for p, a, b in STRINGS
    ],
    "nemo_aligner": [{"prompt": p, "chosen_response": a, "rejected_response": b} for p, a, b in STRINGS],
}


def test_every_schema_of_pairs_or_single_completions_joins() -> None:
    assert {schema.name for schema in PUBLIC if schema.joins} == {name.partition(",")[0] for name in ROWS}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_prompt_are_one_group(
    name: str, kind: str, tmp_path: Path, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = ROWS[name], tmp_path / "out.jsonl"
    data = write_jsonl(rows)
    if kind == "parquet":
        data = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), data)
    if kind == "saved":
        data, table = tmp_path / "saved", pa.Table.from_pylist(rows)
        data.mkdir()
        # Two files, as `datasets` saves a large data set: the prompt's rows lie in both.
        for number, part in enumerate((table.slice(0, 2), table.slice(2))):
            path = str(data / f"data-{number:05}-of-00002.arrow")
            with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(part)
    assert main(["convert", str(data), str(output)]) == 0
    first, second = read_groups(output)
    texts = [text if isinstance(text, str) else text[0]["content"] for text, _ in scored(first)]
    assert dict(zip(texts, [reward for _, reward in scored(first)], strict=True)) == {"a": 1.0, "b": 0.5, "e": 0.0}
    assert texts == ["a", "b", "e"]
    assert [reward for _, reward in scored(second)] == [1.0, 0.0]
    said = "6 rows joined into 2 groups" if name == "trl_unpaired" else "2 rows joined into 1 groups"
    assert f"{said} by their prompt (join_rows: false keeps them apart)" in capsys.readouterr().out
    assert main(["convert", str(data), str(output), "--no_join_rows", "--json", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == len(rows) == len(list(read_groups(output)))


def test_ids_and_metadata_of_all_rows_are_kept(write_jsonl: WriteJsonl) -> None:
    rows = [
        {"prompt": "p", "completion": "a", "label": True, "topic": "t", "rater": 1},
        {"prompt": "p", "completion": "b", "label": "?"},
        {"prompt": "q", "completion": "d", "label": False, "id": "own"},
        {"prompt": "p", "completion": "c", "label": False, "topic": "t", "rater": 2},
        {"prompt": "q", "completion": "e", "label": True, "id": 7, "note": None},
    ]
    report = ReadReport()
    first, second = read_groups(write_jsonl(rows), on_bad_row="skip", report=report)
    assert (first.id, first.origin, first.metadata) == ("1", "groups.jsonl:1", {"topic": "t", "rater": [1, 2]})
    assert (second.id, second.metadata) == ("own", {"note": None, "row_ids": ["own", "7"]})
    assert (report.rows, report.groups, report.skipped, report.joined, report.joined_groups) == (5, 2, 1, 2, 2)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("tools", [[{"name": "x"}], [{"name": "y"}]]),
        ("functions", [[{"name": "x"}], [{"name": "y"}]]),
        ("images", [["x"], ["y"]]),
        ("system", ["x", "y"]),
        ("history", [[["x", "y"]], [["x", "z"]]]),
    ],
)
def test_what_belongs_to_the_prompt_keeps_rows_apart(column: str, values: list[Any], write_jsonl: WriteJsonl) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", column: value} for value in (*values, values[0])]
    report = ReadReport()
    assert [len(group.candidates) for group in read_groups(write_jsonl(rows), report=report)] == [2, 2]
    assert report.joined == 1
    # An empty list says the same as none.
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", column: value} for value in ([], None)]
    assert len(list(read_groups(write_jsonl(rows)))) == 1


def test_a_system_message_or_another_kind_of_text_is_another_prompt(write_jsonl: WriteJsonl) -> None:
    prompts = ["p", [user("p")], [{"role": "system", "content": "s"}, user("p")], [user("p ")]]
    rows = [
        {"prompt": p, "chosen": "a" if p == "p" else answer("a"), "rejected": "b" if p == "p" else answer("b")} for p in prompts
    ]
    assert [group.prompt for group in read_groups(write_jsonl([*rows, *rows]))] == prompts


def test_rows_of_our_own_schema_stay_as_they_are(write_jsonl: WriteJsonl) -> None:
    rows = [{"prompt": "p", "candidates": [{"completion": "a", "reward": 1}]}] * 2
    assert [group.id for group in read_groups(write_jsonl(rows))] == ["1", "2"]


def test_a_repeated_id_counts_all_rows_of_its_group(write_jsonl: WriteJsonl) -> None:
    rows = [{"id": "x", "prompt": prompt, "completion": "a", "label": True} for prompt in ("p", "q", "p", "q")]
    report = ReadReport()
    path = write_jsonl(rows)
    assert [group.prompt for group in read_groups(path, on_bad_row="skip", report=report)] == ["p"]
    assert (report.skipped, report.joined, dict(report.reasons)) == (2, 1, {"duplicate id": 2})
    with pytest.raises(DataError, match=r"groups\.jsonl:2: group 'x': the id was used before, at line 1"):
        list(read_groups(path))


@given(st.lists(st.none() | st.floats(-1e15, 1e15), min_size=1, max_size=5))
def test_a_candidate_of_several_rows_has_the_mean_of_its_known_rewards(rewards: list[float | None]) -> None:
    rows = [
        joined.ReadRow("", "", False, Group(str(k), "p", [Candidate("a", reward=reward)])) for k, reward in enumerate(rewards)
    ]
    (candidate,) = joined.merge(rows).candidates
    known = [reward for reward in rewards if reward is not None]
    if not known:
        assert candidate.reward is None
    elif len(set(known)) == 1:
        assert candidate.reward == known[0]
    else:
        assert candidate.reward is not None
        # A float has 53 bits, and the sum may cancel: some units in the last place of the largest, or of the smallest float.
        room = Fraction(max(map(abs, known))) * 8 / 2**53 + Fraction(1e-320)
        assert abs(Fraction(candidate.reward) - sum(map(Fraction, known)) / len(known)) <= room


def test_values_too_deep_for_a_list_of_them_name_the_rows(write_jsonl: WriteJsonl) -> None:
    def deep(value: str) -> Any:
        found: Any = value
        for _ in range(99):
            found = [found]
        return found

    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "label": deep(value)} for value in "xy"]
    with pytest.raises(DataError, match=r"groups.jsonl:1: group .*metadata.label.* is nested more than 100 levels deep"):
        list(read_groups(write_jsonl(rows)))
    report = ReadReport()
    assert list(read_groups(write_jsonl(rows), on_bad_row="skip", report=report)) == []
    assert report.skipped == 2


def test_pairs_of_a_group_give_the_group_back(tmp_path: Path) -> None:
    answers = [Candidate(text, reward=reward) for text, reward in (("a", 0.1), ("b", 0.7), ("c", 0.3), ("d", 0.1))]
    groups = [Group(f"g{k}", f"p{k}", answers, {"topic": k}) for k in range(3)]
    write_groups(groups, tmp_path / "groups.jsonl")
    convert(tmp_path / "groups.jsonl", tmp_path / "pairs.parquet", target="all_pairs")
    for group, found in zip(groups, read_groups(tmp_path / "pairs.parquet"), strict=True):
        assert {(c.completion, c.reward) for c in found.candidates} == {(c.completion, c.reward) for c in answers}
        assert (found.prompt, found.metadata["topic"]) == (group.prompt, group.metadata["topic"])


def test_reading_may_end_early(write_jsonl: WriteJsonl) -> None:
    groups = read_groups(write_jsonl(ROWS["trl_preference"]))
    assert next(groups).prompt == "P"
    groups.close()


# --- Folders ----------------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, *shards: list[dict[str, Any]]) -> Path:
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(shards):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prompts_of(folder: Path) -> dict[str, list[tuple[Any, int]]]:
    return {
        path.name: [(group.prompt, len(group.candidates)) for group in read_groups(path)]
        for path in sorted(folder.glob("*.jsonl"))
    }


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_in_several_files_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(
        tmp_path, [pair("P", "a", "b"), pair("Q", "c", "d")], [pair("Q", "c", "e")], [pair("R", "f", "g"), pair("P", "a", "h")]
    )
    out = tmp_path / "out"
    words = ["convert", str(folder), str(out)]
    assert main(words) == 0
    assert "4 rows joined into 2 groups" in capsys.readouterr().out
    assert prompts_of(out) == {"0.jsonl": [("P", 3), ("Q", 3)], "2.jsonl": [("R", 2)]}
    assert list(read_groups(out)) == list(read_groups(folder))
    # Nothing is done again while nothing changed.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    assert main(words) == 0
    assert "4 rows joined into 2 groups" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.jsonl")} == before
    # Other settings make all files again, and these ones a second time.
    again = [*words, "--overwrite"]
    apart = {"0.jsonl": [("P", 2), ("Q", 2)], "1.jsonl": [("Q", 2)], "2.jsonl": [("R", 2), ("P", 2)]}
    assert main([*again, "--no_join_rows"]) == 0
    assert prompts_of(out) == apart
    assert main(again) == 0
    assert prompts_of(out) == {"0.jsonl": [("P", 3), ("Q", 3)], "2.jsonl": [("R", 2)]}
    assert main([*again, "--no_join_rows"]) == 0
    assert prompts_of(out) == apart
    # A file that changes, or is gone, is noticed.
    assert main(again) == 0
    folder_of(tmp_path, [pair("P", "a", "b")])
    assert main(again) == 0
    assert prompts_of(out) == {"0.jsonl": [("P", 3)], "1.jsonl": [("Q", 2)], "2.jsonl": [("R", 2)]}
    (out / "1.jsonl").unlink()
    assert main(again) == 0
    assert (out / "1.jsonl").exists()


def test_pairs_of_a_folder_are_made_of_the_joined_groups(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [pair("P", "a", "b")], [pair("P", "c", "b")])
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "best_vs_worst"]) == 0
    (found,) = read_groups(tmp_path / "out")
    assert scored(found)[1] == ("b", 0.0)
    assert not (tmp_path / "out" / "1.jsonl").exists()


# --- Other verbs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(write_jsonl: WriteJsonl) -> Path:
    """Twelve rows of four prompts, which return after four rows."""
    rows = [pair(f"What is {k % 4}?", f"It is {k}.", f"No idea about {k}.") for k in range(12)]
    return write_jsonl(rows, "pairs.jsonl")


SAID = "12 rows joined into 4 groups by their prompt (join_rows: false keeps them apart)"


@pytest.mark.parametrize("verb", ["train", "check", "audit", "score", "adjust"])
@pytest.mark.parametrize("apart", [False, True])
def test_verbs_read_joined_groups(
    verb: str, apart: bool, pairs: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text("def length(prompt, completions):\n    return [len(text) for text in completions]\n")
    words = {
        "train": ["--data", str(pairs), "--model", str(tiny_model_dir), "--output_dir", str(tmp_path / "run"), "--dry-run"],
        "check": ["--data", str(pairs), "--model", str(tiny_model_dir), "--max_length", "256"],
        "audit": ["--data", str(pairs), "--output_dir", str(tmp_path / "audit")],
        "score": ["--data", str(pairs), "--output", str(tmp_path / "o.jsonl"), "--reward", f"{tmp_path}/rewards.py:length"],
        "adjust": [str(pairs), str(tmp_path / "o.jsonl"), "--steps", "rank"],
    }[verb]
    assert main([verb, *words, "--json", *(["--no_join_rows"] if apart else [])]) in (0, 1)
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    numbers = {"train": "groups_used", "audit": "numbers"}.get(verb, "groups")
    groups = found[numbers]["groups"] if verb == "audit" else found[numbers]
    assert groups == (12 if apart else 4)
    notes = found["notes"] if verb == "check" else shown.err
    assert (SAID in notes) == (not apart)


def test_online_reads_joined_groups(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given_config = {"model": "m", "data": pairs, "output_dir": tmp_path / "run", "reward": "math_verify"}
    prompts, _ = load_prompts(OnlineConfig.model_validate(given_config), Accelerator(cpu=True))
    assert [len(group.candidates) for group in prompts] == [6] * 4
    assert SAID in capsys.readouterr().err
    prompts, _ = load_prompts(OnlineConfig.model_validate({**given_config, "join_rows": False}), Accelerator(cpu=True))
    assert len(prompts) == 12

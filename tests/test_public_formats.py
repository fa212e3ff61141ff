"""Public preference sets are read as they are, from files, folders, saved datasets and the hub, and written back as pairs."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncalign.cli.app import main
from ncalign.core.errors import DataError
from ncalign.data.config import ConvertConfig, PublicSchema
from ncalign.data.formats import PUBLIC
from ncalign.data.formats.pairs import pairs_of
from ncalign.data.formats.ranked import rewards_from_ranks
from ncalign.data.groups import Candidate, Group, ReadReport, convert, read_groups

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
Expected = tuple[Any, list[tuple[Any, float | None]]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CASES: dict[str, tuple[str, dict[str, Any], Expected]] = {
    "ultrafeedback": (
        "ultrafeedback",
        {
            "source": "evol",
            "instruction": "Q",
            "models": ["m1", "m2"],
            "completions": [
                {"model": "m1", "response": "a", "overall_score": 7.5, "annotations": {"honesty": {"Rating": "5"}}},
                {"model": "m2", "response": "b", "overall_score": "N/A", "annotations": {"honesty": {"Rating": "N/A"}}},
            ],
        },
        ([user("Q")], [(answer("a"), 7.5), (answer("b"), None)]),
    ),
    "ultrafeedback, several annotations": (
        "ultrafeedback",
        {
            "instruction": "Q",
            "completions": [
                {"response": "a", "fine-grained_score": 4, "annotations": {"truth": [{"Rating": "4"}, {"Rating": "2"}]}},
            ],
        },
        ([user("Q")], [(answer("a"), 4.0)]),
    ),
    "ultrafeedback, a system prompt": (
        "ultrafeedback",
        {"instruction": "Q", "custom_system_prompt": "S", "completions": [{"response": "a", "overall_score": 4}]},
        ([{"role": "system", "content": "S"}, user("Q")], [(answer("a"), 4.0)]),
    ),
    "nectar, no transcript": (
        "nectar",
        {"prompt": "Q", "answers": [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2.0}]},
        ([user("Q")], [(answer("a"), 1.0), (answer("b"), 0.0)]),
    ),
    "distilabel": (
        "distilabel",
        {
            "instruction": "Q",
            "generations": ["a", "b", "c"],
            "generation_models": ["m1", "m2", "m3"],
            "ratings": [4, None, 2],
            "rationales": ["good", None, "bad"],
            "model_name": "judge",
            "distilabel_metadata": {"raw_output_ultra_feedback_0": "..."},
        },
        ([user("Q")], [(answer("a"), 4.0), (answer("b"), None), (answer("c"), 2.0)]),
    ),
    "argilla, one question": (
        "argilla",
        {
            "prompt": "Q",
            "response-1": "a",
            "response-2": "b",
            "preference": [
                {
                    "user_id": "u1",
                    "value": {"rank": [2, 1], "value": ["response-1", "response-2"]},
                    "status": "submitted",
                }
            ],
            "preference-suggestion": None,
            "external_id": None,
        },
        ([user("Q")], [(answer("a"), 0.0), (answer("b"), 1.0)]),
    ),
    "nectar": (
        "nectar",
        {
            "prompt": "\n\nHuman: Q\n\nAssistant: ",
            "answers": [
                {"answer": "a", "model": "m1", "rank": 2.0},
                {"answer": "b", "rank": 1.0},
                {"answer": "c", "rank": 3.0},
            ],
            "num_responses": 3,
        },
        ([user("Q")], [(answer("a"), 0.5), (answer("b"), 1.0), (answer("c"), 0.0)]),
    ),
    "hh": (
        "hh",
        {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
        ([user("Q")], [(answer("a"), 1.0), (answer("b"), 0.0)]),
    ),
    "hh, several turns": (
        "hh",
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: x\n\ny",
            "rejected": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: z",
        },
        ([user("Q"), *answer("a"), user("R")], [(answer("x\n\ny"), 1.0), (answer("z"), 0.0)]),
    ),
    "hh, parting before the last answer": (
        "hh",
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: x",
            "rejected": "\n\nHuman: Q\n\nAssistant: b",
        },
        ([user("Q")], [([*answer("a"), user("R"), *answer("x")], 1.0), (answer("b"), 0.0)]),
    ),
    "simpo": (
        "simpo",
        {"prompt": "Q", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.5, -1], "chosen": "a", "rejected": "b"},
        ([user("Q")], [(answer("a"), 0.5), (answer("b"), -1.0)]),
    ),
    "ampo": (
        "simpo",
        {"prompt": "Q", "all_generated_responses": ["a"], "all_reward_scores": [2]},
        ([user("Q")], [(answer("a"), 2.0)]),
    ),
    "nemo_rl": (
        "nemo_rl",
        {
            "context": [user("Q")],
            "completions": [{"rank": 0, "completion": answer("a")}, {"rank": 1, "completion": answer("b")}],
        },
        ([user("Q")], [(answer("a"), 1.0), (answer("b"), 0.0)]),
    ),
    "nemo_aligner": (
        "nemo_aligner",
        {"prompt": "Q", "chosen_response": "a", "rejected_response": "b", "chosen_reward": 3, "rejected_reward": 1},
        ("Q", [("a", 3.0), ("b", 1.0)]),
    ),
    "lmflow": (
        "lmflow",
        {"input": "Q", "output": [{"score": 1.0, "text": "a"}, {"score": 0.5, "text": "b"}]},
        ("Q", [("a", 1.0), ("b", 0.5)]),
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Do", "input": "this", "system": "S", "history": [["P", "p"]], "chosen": "a", "rejected": "b"},
        (
            [{"role": "system", "content": "S"}, user("P"), *answer("p"), user("Do\nthis")],
            [(answer("a"), 1.0), (answer("b"), 0.0)],
        ),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        ([user("Q")], [(answer("a"), 1.0), (answer("b"), 0.0)]),
    ),
    "openai": (
        "openai",
        {
            "input": {"messages": [user("Q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": answer("a"),
            "non_preferred_output": answer("b"),
        },
        ([user("Q")], [(answer("a"), 1.0), (answer("b"), 0.0)]),
    ),
    "openai, a chat": (
        "openai",
        {"messages": [user("P"), *answer("p"), user("Q"), *answer("a")], "category": "c"},
        ([user("P"), *answer("p"), user("Q")], [(answer("a"), None)]),
    ),
    "alpaca_eval": (
        "alpaca_eval",
        {"instruction": "Q", "output_1": "a", "output_2": "b", "generator_1": "m1", "generator_2": "m2", "preference": 1.75},
        ([user("Q")], [(answer("a"), 0.25), (answer("b"), 0.75)]),
    ),
    "alpaca_eval, a tie": (
        "alpaca_eval",
        {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 0},
        ([user("Q")], [(answer("a"), 0.5), (answer("b"), 0.5)]),
    ),
    "alpaca_eval, no preference": (
        "alpaca_eval",
        {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": None},
        ([user("Q")], [(answer("a"), None), (answer("b"), None)]),
    ),
    "solutions": (
        "solutions",
        {
            "question": "Q",
            "ground_truth": "2 + 2 = 4\nA: 4",
            "m1": {"is_correct": True, "solution": "A: 4"},
            "m2": {"is_correct": False, "solution": "A: 5"},
        },
        ("Q", [("A: 4", 1.0), ("A: 5", 0.0)]),
    ),
}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_its_group(name: str, forced: bool, write_jsonl: Callable[..., Path]) -> None:
    schema, row, (prompt, candidates) = CASES[name]
    [group] = read_groups(write_jsonl([row]), schema=schema if forced else "auto")  # type: ignore[arg-type]
    assert group.prompt == prompt
    assert [(candidate.completion, candidate.reward) for candidate in group.candidates] == candidates


@pytest.mark.parametrize("name", CASES)
def test_a_parquet_row_becomes_the_same_group(name: str, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    if name.startswith("ultrafeedback"):
        return  # ratings of several types in one column: JSON alone holds them
    _, row, _ = CASES[name]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    if name == "alpaca_eval, no preference":
        return  # a column without a value has no type
    [group] = read_groups(tmp_path / "rows.parquet")
    [expected] = read_groups(write_jsonl([row]))
    assert (group.prompt, group.candidates) == (expected.prompt, expected.candidates)


def test_what_is_not_read_is_carried_along(write_jsonl: Callable[..., Path]) -> None:
    [group] = read_groups(write_jsonl([CASES["ultrafeedback"][1]]))
    assert group.metadata == {"source": "evol", "aspects": {"honesty": [5.0, None]}}
    assert [candidate.source for candidate in group.candidates] == ["m1", "m2"]
    [group] = read_groups(write_jsonl([CASES["solutions"][1]]))
    assert group.metadata["answer"] == "4"


@pytest.mark.parametrize(
    ("schema", "row", "message"),
    [
        ("ultrafeedback", {"instruction": "Q", "completions": []}, "completions is a list of 0"),
        ("ultrafeedback", {"instruction": "Q", "completions": [{"text": "a"}]}, "completions[0] lacks `response`"),
        ("ultrafeedback", {"instruction": "Q", "completions": [{"response": "a", "overall_score": "good"}]}, "'good'"),
        ("nectar", {"prompt": "Q", "answers": [{"answer": "a", "rank": "first"}]}, "answers[].rank is 'first'"),
        ("nectar", {"prompt": "Q", "answers": [1]}, "answers[0] is 1"),
        ("hh", {"chosen": "a", "rejected": "b"}, "chosen is 'a'"),
        (
            "hh",
            {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: R\n\nAssistant: a"},
            "must part at an answer of the assistant's",
        ),
        ("simpo", {"prompt": "Q", "all_generated_responses": ["a"], "all_rm_scores": [1, 2]}, "1 responses and 2 scores"),
        ("sharegpt", {"conversations": [{"from": "me", "value": "Q"}], "chosen": {}, "rejected": {}}, "conversations[0].from"),
        ("alpaca_eval", {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 3}, "preference is 3"),
        ("alpaca", {"instruction": 1, "chosen": "a", "rejected": "b"}, "instruction is 1"),
        ("alpaca", {"instruction": "Q", "history": ["x"], "chosen": "a", "rejected": "b"}, "history is a list of 1"),
        ("solutions", {"question": "Q", "ground_truth": "", "m": {"is_correct": 1, "solution": ""}}, "m.is_correct is 1"),
    ],
)
def test_a_row_that_can_not_be_used_is_named(schema: Any, row: Any, message: str, write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as caught:
        list(read_groups(write_jsonl([row]), schema=schema))
    assert message in str(caught.value)
    assert "groups.jsonl:1" in str(caught.value)


@given(st.lists(st.none() | st.integers(0, 5), min_size=1, max_size=8))
def test_ranks_become_shares_of_the_others_beaten(ranks: list[int | None]) -> None:
    rewards = rewards_from_ranks(ranks, "rank")
    known = [(rank, reward) for rank, reward in zip(ranks, rewards, strict=True) if rank is not None]
    assert [reward is None for reward in rewards] == [rank is None for rank in ranks]
    assert all(0 <= (reward or 0) <= 1 for _, reward in known)
    assert all((a < b) == (x > y) and (a == b) == (x == y) for a, x in known for b, y in known)
    if len(known) > 1:
        assert sum(reward or 0 for _, reward in known) == pytest.approx(len(known) / 2)


def test_the_configuration_knows_every_schema() -> None:
    assert set(get_args(ConvertConfig.model_fields["schema_name"].annotation)) == set(get_args(PublicSchema))
    assert set(get_args(PublicSchema)) == {"auto", "ncalign", "trl_prompts"} | {schema.name for schema in PUBLIC}


# --- Where rows come from ---------------------------------------------------------------------------------------------


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Q{number}", "candidates": [{"completion": "a", "reward": 1}, {"completion": "b", "reward": 0}], **more}


def test_a_folder_of_shards(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / "deep").mkdir(parents=True)
    (folder / "1.jsonl").write_text("".join(json.dumps(row(k)) + "\n" for k in range(2)))
    (folder / "0.jsonl.gz").write_bytes(gzip.compress((json.dumps(row(5)) + "\n").encode()))
    pq.write_table(pa.Table.from_pylist([row(7)]), folder / "deep" / "2.parquet")
    (folder / "README.md").write_text("not data")
    report = ReadReport()
    groups = list(read_groups(folder, report=report))
    assert [group.prompt for group in groups] == ["Q5", "Q0", "Q1", "Q7"]
    assert [group.id for group in groups] == ["0.jsonl.gz:1", "1.jsonl:1", "1.jsonl:2", "deep/2.parquet:1"]
    assert (report.rows, report.groups) == (4, 4)
    (folder / "3.jsonl").write_text(json.dumps(row(1, id="0.jsonl.gz:1")) + "\n")
    with pytest.raises(DataError, match=r"3\.jsonl:1: .*used before, at 0\.jsonl\.gz, line 1"):
        list(read_groups(folder))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder without"):
        list(read_groups(tmp_path))


@pytest.mark.parametrize("as_file", [False, True])
def test_a_saved_dataset(tmp_path: Path, as_file: bool) -> None:
    table = pa.Table.from_pylist([row(1), row(2)])
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file:
        new = pa.ipc.new_file if as_file else pa.ipc.new_stream
        with new(file, table.schema) as writer:
            writer.write_table(table)
    assert [group.prompt for group in read_groups(folder)] == ["Q1", "Q2"]


def test_a_document_of_lmflow(tmp_path: Path) -> None:
    rows = [CASES["lmflow"][1], {**CASES["lmflow"][1], "input": "R"}]
    document = {"type": "text_to_scored_textlist", "instances": rows}
    for indent in (None, 2):
        (tmp_path / "data.json").write_text(json.dumps(document, indent=indent))
        assert [group.prompt for group in read_groups(tmp_path / "data.json")] == ["Q", "R"]
    (tmp_path / "data.json").write_text('[{"input": 1,\n}]')
    with pytest.raises(DataError, match=r"data\.json:2: malformed JSON"):
        list(read_groups(tmp_path / "data.json"))


def test_what_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncalign.data.formats.jsonl.MAX_LINE", 1 << 20)
    monkeypatch.setattr("ncalign.data.formats.document.MAX_LINE", 1 << 20)
    bomb = gzip.compress(b'{"prompt": "' + b"a" * (1 << 22))
    (tmp_path / "bomb.jsonl.gz").write_bytes(bomb)
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz:1: a line of more than 1 MiB"):
        list(read_groups(tmp_path / "bomb.jsonl.gz", on_bad_row="skip"))
    for inner in (b'[{"prompt": "' + b"a" * (1 << 22), b"[" + b"[" * (1 << 22), b'[{"a": ' + b"[]," * (1 << 22)):
        (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(inner))
        with pytest.raises(
            DataError, match=r"bomb\.json\.gz:1: malformed JSON: (a value of more than|nested too deep|Expecting)"
        ):
            list(read_groups(tmp_path / "bomb.json.gz"))


def test_a_row_of_millions_of_values_is_refused(tmp_path: Path) -> None:
    line = b'{"prompt": "p", "candidates": [' + b"[]," * 5_000_000 + b"1]}\n"
    (tmp_path / "bomb.jsonl").write_bytes(line + json.dumps(row(1)).encode() + b"\n")
    report = ReadReport()
    assert len(list(read_groups(tmp_path / "bomb.jsonl", on_bad_row="skip", report=report))) == 1
    assert (report.rows, report.skipped, report.reasons) == (2, 1, {"too large": 1})


def test_json_lines_by_another_name_are_still_read_by_the_line(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2)) + "\n")
    assert len(list(read_groups(tmp_path / "rows.json"))) == 2


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    module = ModuleType("datasets")

    def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Couldn't find no/such\nmore")
        return iter([row(1)])

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    assert [group.prompt for group in read_groups("owner/name:test_prefs")] == ["Q1"]
    assert [group.prompt for group in read_groups(Path("owner/name"))] == ["Q1"]
    assert asked == [("owner/name", "test_prefs", True), ("owner/name", "train", True)]
    with pytest.raises(DataError, match=r"as a hub id: Couldn't find no/such$"):
        list(read_groups("no/such"))
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"data 'no/such': there is no such folder .* as a hub id: .* HF_HUB_OFFLINE forbids"):
        read_groups("no/such")


def test_prompts_alone_are_converted_and_nothing_else_passes_for_them(tmp_path: Path) -> None:
    prompts = [{"prompt": "Q1"}, {"prompt": [user("Q2")], "metadata": {"answer": "4"}}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    assert convert(tmp_path / "p.jsonl", tmp_path / "out.jsonl").groups == 2
    found = list(read_groups(tmp_path / "out.jsonl", allow_empty=True))
    assert [(group.prompt, group.candidates) for group in found] == [("Q1", []), ([user("Q2")], [])]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Q", "chossen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match="`trl_preference`, lacks `chosen`; did you mean `chosen` by `chossen`"):
        convert(tmp_path / "p.jsonl", tmp_path / "out.jsonl")
    assert convert(tmp_path / "p.jsonl", tmp_path / "out.jsonl", schema="trl_prompts").groups == 1
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Q", "candidates": []}) + "\n")
    with pytest.raises(DataError, match="candidates is empty"):
        convert(tmp_path / "p.jsonl", tmp_path / "out.jsonl")


def test_an_adapter_of_one_s_own(tmp_path: Path, write_jsonl: Callable[..., Path], capsys: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "def read(row):\n"
        "    if row['q'] == 'skip':\n"
        "        return None\n"
        "    return {'prompt': row['q'], 'candidates': [{'completion': c, 'reward': s} for c, s in row['answers'].items()]}\n"
    )
    rows = [{"q": "Q", "answers": {"a": 1, "b": 0}}, {"q": "skip"}, {"q": "R", "answers": {"a": 2}}]
    output = tmp_path / "out.jsonl"
    words = ["convert", str(write_jsonl(rows)), str(output), "--adapter", f"{tmp_path / 'mine.py'}:read"]
    assert main(words) == 0
    assert [group.prompt for group in read_groups(output)] == ["Q", "R"]
    (tmp_path / "mine.py").write_text("def read(row):\n    return row['no']\n")
    assert main([*words, "--overwrite"]) == 1
    assert "groups.jsonl:1: the adapter raised KeyError: 'no'" in capsys.readouterr().err


# --- Pairs ------------------------------------------------------------------------------------------------------------


def scored(*rewards: float | None) -> Group:
    return Group(id="g", prompt="P", candidates=[Candidate(str(k), reward=reward) for k, reward in enumerate(rewards)])


@given(st.lists(st.none() | st.integers(0, 3).map(float), min_size=1, max_size=6), st.integers(0, 3))
def test_pairs(rewards: list[float | None], seed: int) -> None:
    group = scored(*rewards)
    known = [reward for reward in rewards if reward is not None]
    spread = len(set(known)) > 1
    every = pairs_of(group, "all_pairs", seed)
    assert len(every) == sum(a > b for a in known for b in known)
    for target in ("best_vs_random", "best_vs_worst"):
        pairs = pairs_of(group, target, seed)  # type: ignore[arg-type]
        assert len(pairs) == spread
        for chosen, rejected in pairs:
            assert (chosen, rejected) in every
            assert chosen.reward == max(known)
            assert target == "best_vs_random" or rejected.reward == min(known)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_pairs_are_read_back(name: str, groups_file: Path, tmp_path: Path) -> None:
    output = tmp_path / name
    assert main(["convert", str(groups_file), str(output), "--to", "all_pairs", "--from", "ncalign"]) == 0
    groups = {group.id: group for group in read_groups(groups_file)}
    pairs = list(read_groups(output, join_rows=False))
    assert len(pairs) == 4 * (1 + 3 + 6)
    for pair in pairs:
        origin = groups[pair.id.rpartition("-")[0]]
        assert pair.prompt == origin.prompt
        chosen, rejected = pair.candidates
        assert chosen in origin.candidates
        assert rejected in origin.candidates
        assert (chosen.reward or 0.0) > (rejected.reward or 0.0)


def test_no_pairs_no_file(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": "P", "candidates": [{"completion": "a", "reward": 1}, {"completion": "b", "reward": 1}]}]
    with pytest.raises(DataError, match="no pair to write"):
        convert(write_jsonl(rows), tmp_path / "out.jsonl", target="best_vs_worst")
    assert not (tmp_path / "out.jsonl").exists()


# --- Real sets --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here")
def test_real_sets_convert_whole(tmp_path: Path) -> None:
    solutions = convert(SHARED / "gsm8k-model-solutions" / "example_model_solutions.jsonl", tmp_path / "gsm8k.jsonl")
    assert (solutions.rows, solutions.groups, solutions.skipped) == (1319, 1319, 0)
    assert {len(group.candidates) for group in read_groups(tmp_path / "gsm8k.jsonl")} == {4}
    soft = convert(SHARED / "alpaca-eval-candidates" / "candidates.jsonl.gz", tmp_path / "soft.parquet")
    assert (soft.groups, soft.skipped) == (598, 0)
    annotations = convert(SHARED / "alpaca-eval-candidates" / "annotations_alpaca-7b.json.gz", tmp_path / "annotations.jsonl")
    assert (annotations.groups, annotations.skipped) == (805, 0)

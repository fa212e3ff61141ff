"""Public schemas read as they are: recognised by their columns, and turned into the groups worked out by hand here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncalign.data.formats.parsing import implicit_prompt
from ncalign.data.groups import DataError, Group, convert, read_groups

WriteJsonl = Callable[..., Path]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def content(group: Group) -> tuple[Any, list[tuple[Any, float | None]]]:
    return group.prompt, [(candidate.completion, candidate.reward) for candidate in group.candidates]


SYSTEM = {"role": "system", "content": "s"}
ROWS: list[tuple[str, str, dict[str, Any], tuple[Any, list[tuple[Any, float | None]]]]] = [
    ("strings", "trl_preference", {"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", [("a", 1.0), ("b", 0.0)])),
    (
        "conversations",
        "trl_preference",
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ([user("p")], [([assistant("a")], 1.0), ([assistant("b")], 0.0)]),
    ),
    (
        "conversations that repeat the prompt",
        "trl_preference",
        {"prompt": [user("p")], "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        ([user("p")], [([assistant("a")], 1.0), ([assistant("b")], 0.0)]),
    ),
    (
        "a string prompt that opens the conversations",
        "trl_preference",
        {"prompt": "p ", "chosen": [SYSTEM, user("p"), assistant("a")], "rejected": [SYSTEM, user("p"), assistant("b")]},
        ([SYSTEM, user("p")], [([assistant("a")], 1.0), ([assistant("b")], 0.0)]),
    ),
    (
        "a string prompt and answers alone",
        "trl_preference",
        {"prompt": "p", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ([user("p")], [([assistant("a")], 1.0), ([assistant("b")], 0.0)]),
    ),
    (
        "implicit, strings",
        "trl_preference",
        {"chosen": "Human: hi Assistant: yes please", "rejected": "Human: hi Assistant: yet more"},
        ("Human: hi Assistant:", [(" yes please", 1.0), (" yet more", 0.0)]),
    ),
    (
        "implicit, conversations",
        "trl_preference",
        {"chosen": [SYSTEM, user("p"), assistant("a")], "rejected": [SYSTEM, user("p"), assistant("b"), user("c")]},
        ([SYSTEM, user("p")], [([assistant("a")], 1.0), ([assistant("b"), user("c")], 0.0)]),
    ),
    (
        "implicit, a null prompt column",
        "trl_preference",
        {"prompt": None, "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("a")]},
        ([user("p")], [([assistant("a")], 1.0), ([assistant("a")], 0.0)]),
    ),
    (
        "rewards, one way",
        "trl_preference",
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_reward": 4.5, "rejected_reward": None},
        ("p", [("a", 4.5), ("b", None)]),
    ),
    (
        "rewards, the other way",
        "trl_preference",
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 8, "score_rejected": 8},
        ("p", [("a", 8.0), ("b", 8.0)]),
    ),
    (
        "several rejected",
        "trl_preference",
        {"prompt": "p", "chosen": "a", "rejected": ["b", "c", "b"]},
        ("p", [("a", 1.0), ("b", 0.0), ("c", 0.0), ("b", 0.0)]),
    ),
    (
        "several of both, with rewards",
        "trl_preference",
        {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"], "chosen_reward": [3], "rejected_reward": [0.5, None]},
        ("p", [("a", 3.0), ("b", 0.5), ("c", None)]),
    ),
    (
        "one chosen and several rejected, with scores",
        "trl_preference",
        {"prompt": "p", "chosen": "a", "rejected": ["b", "c"], "score_chosen": 3.5, "score_rejected": [1.0, 2.0]},
        ("p", [("a", 3.5), ("b", 1.0), ("c", 2.0)]),
    ),
    (
        "several rejected conversations",
        "trl_preference",
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [[assistant("b")], [user("p"), assistant("c")]]},
        ([user("p")], [([assistant("a")], 1.0), ([assistant("b")], 0.0), ([assistant("c")], 0.0)]),
    ),
    (
        "implicit, several strings",
        "trl_preference",
        {"chosen": "Q: one two x", "rejected": ["Q: one two y", "Q: one three", "Q: one two"]},
        ("Q: one", [(" two x", 1.0), (" two y", 0.0), (" three", 0.0), (" two", 0.0)]),
    ),
    (
        "implicit, several conversations",
        "trl_preference",
        {
            "chosen": [SYSTEM, user("p"), assistant("a")],
            "rejected": [[SYSTEM, user("p"), assistant("a"), user("q")], [SYSTEM, user("p"), assistant("c")]],
        },
        ([SYSTEM, user("p")], [([assistant("a")], 1.0), ([assistant("a"), user("q")], 0.0), ([assistant("c")], 0.0)]),
    ),
    ("wanted", "trl_unpaired", {"prompt": "p", "completion": "a", "label": True}, ("p", [("a", 1.0)])),
    ("unwanted", "trl_unpaired", {"prompt": "p", "completion": "a", "label": 0}, ("p", [("a", 0.0)])),
    (
        "wanted conversation",
        "trl_unpaired",
        {"prompt": [user("p")], "completion": [assistant("a")], "label": True},
        ([user("p")], [([assistant("a")], 1.0)]),
    ),
    (
        "four answers",
        "nca",
        {"prompt": "p", **{f"A{i}": f"a{i}" for i in range(4)}, **{f"score_A{i}": i / 4 for i in range(4)}},
        ([user("p")], [([assistant(f"a{i}")], i / 4) for i in range(4)]),
    ),
    (
        "answers are ordered by number",
        "nca",
        {"prompt": "p", "A10": "j", "A2": "b", "score_A10": 10, "score_A2": 2},
        ([user("p")], [([assistant("b")], 2.0), ([assistant("j")], 10.0)]),
    ),
    (
        "answers that repeat the prompt",
        "nca",
        {"prompt": "p", "A0": [user("p"), assistant("a")], "A1": [user("p"), assistant("a")], "score_A0": 1, "score_A1": None},
        ([user("p")], [([assistant("a")], 1.0), ([assistant("a")], None)]),
    ),
    (
        "an answer that is not there",
        "nca",
        {"prompt": "p", "A0": "a", "A1": None, "score_A0": 1, "score_A1": None},
        ([user("p")], [([assistant("a")], 1.0)]),
    ),
]


@pytest.mark.parametrize("forced", [False, True], ids=["auto", "forced"])
@pytest.mark.parametrize(("schema", "row", "expected"), [case[1:] for case in ROWS], ids=[case[0] for case in ROWS])
def test_a_row_becomes_the_group_it_says(write_jsonl: WriteJsonl, schema: Any, row: Any, expected: Any, forced: bool) -> None:
    path = write_jsonl([{**row, "id": 12, "topic": "t"}])
    (group,) = read_groups(path, schema=schema if forced else "auto")
    assert content(group) == expected
    # Completions of strings that are split in two go on in the middle of the text.
    recorded = {"string_prompts": "raw"} if "prompt" not in row and isinstance(group.prompt, str) else {}
    assert (group.id, group.metadata, group.origin) == ("12", {**recorded, "topic": "t"}, "groups.jsonl:1")


@pytest.mark.parametrize(("row", "expected"), [case[2:] for case in ROWS], ids=[case[0] for case in ROWS])
def test_a_parquet_row_becomes_the_same_group(tmp_path: Path, row: Any, expected: Any) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (group,) = read_groups(tmp_path / "rows.parquet")
    assert content(group) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: a\n\nyes", "Q: a\n\nno", "Q: a"),
        ("Q: one two", "Q: one\ttwo", "Q: one"),
        ("Q: yes", "Q: yes sir", "Q:"),
        ("Q: a", "Q: ab", "Q:"),
        ("a b c", "a b c", "a b"),
    ],
)
def test_an_implicit_string_prompt_ends_with_a_word(chosen: str, rejected: str, prompt: str) -> None:
    cut = len(prompt)
    assert implicit_prompt({"chosen": chosen, "rejected": rejected}) == (prompt, [chosen[cut:], rejected[cut:]])
    assert implicit_prompt({"rejected": rejected, "chosen": chosen}) == (prompt, [rejected[cut:], chosen[cut:]])
    texts = {"a": chosen, "b": rejected, "c": chosen + " and more", "d": rejected}
    assert implicit_prompt(texts) == (prompt, [text[cut:] for text in texts.values()])


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"chosen": "yes", "rejected": "no"}, "share no beginning that could be the prompt"),
    ({"chosen": "yes", "rejected": "yet"}, "share no beginning"),
    ({"chosen": "", "rejected": ""}, "share no beginning"),
    ({"chosen": [user("a")], "rejected": [user("b")]}, "share no beginning"),
    ({"chosen": "a b", "rejected": [user("b")]}, "all must be strings or all conversations"),
    ({"prompt": "p", "chosen": "a", "rejected": [assistant("b")]}, "all must be strings or all conversations"),
    ({"prompt": "p", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "neither open with"),
    (
        {"prompt": [user("p")], "chosen": [user("p")], "rejected": [assistant("b")]},
        "chosen repeats the prompt and adds nothing",
    ),
    ({"prompt": "p", "chosen": None, "rejected": "b"}, "chosen is null"),
    ({"prompt": "p", "chosen": "a", "rejected": []}, "rejected is an empty list: at least one completion is needed"),
    ({"chosen": [], "rejected": ["b"]}, "chosen is an empty list: at least one completion is needed"),
    ({"prompt": "p", "chosen": "a", "rejected": ["b", None]}, "rejected[1] is null"),
    ({"prompt": "p", "chosen": "a", "rejected": ["b", 2]}, "rejected[1] is 2"),
    ({"prompt": "p", "chosen": "a", "rejected": ["b", [assistant("c")]]}, "all must be strings or all conversations"),
    ({"prompt": "p", "chosen": "a", "rejected": [[assistant("c")]]}, "all must be strings or all conversations"),
    ({"chosen": "a b", "rejected": ["a c", [user("a")]]}, "all must be strings or all conversations"),
    ({"prompt": "p", "chosen": "a", "rejected": ["b", [{"role": "assistant"}]]}, "rejected[1][0] lacks `content`"),
    (
        {"prompt": "p", "chosen": "a", "rejected": ["b", "c"], "chosen_reward": 1, "rejected_reward": [0]},
        "rejected_reward has 1 rewards for 2 completions",
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": ["b", "c"], "score_chosen": 1, "score_rejected": 0.5},
        "score_rejected is 0.5 (a number): a list of 2 rewards",
    ),
    ({"prompt": "p", "chosen": "a", "rejected": ["b"], "score_chosen": [1], "score_rejected": [0]}, "chosen: reward is a list"),
    (
        {"prompt": "p", "chosen": "a", "rejected": ["b", "c"], "score_chosen": 1, "score_rejected": [0, "x"]},
        "rejected[1]: reward is 'x'",
    ),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_reward": 1.0}, "`chosen_reward` alone"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": "nine", "score_rejected": 1}, "chosen: reward is 'nine'"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rewards": 1}, "`chosen_rewards` alone"),
    ({"prompt": "p", "completion": "a", "label": "good"}, "label is 'good' (a string): true or false"),
    ({"prompt": "p", "completion": "a", "label": 2}, "label is 2 (a number)"),
    ({"prompt": "p", "A0": None, "score_A0": None}, "at least one answer"),
    ({"prompt": "p", "A0": None, "score_A0": 1.0}, "A0 is null"),
    ({"prompt": "p", "A0": "a", "score_A0": float("inf")}, "A0: reward is infinite"),
    ({"prompt": 7, "A0": "a", "score_A0": 1.0}, "prompt is 7 (a number)"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[case[1][:30] for case in BAD_ROWS])
def test_a_row_that_does_not_fit_its_schema(write_jsonl: WriteJsonl, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        list(read_groups(write_jsonl([row])))
    assert "groups.jsonl:1: " in str(caught.value)


@pytest.mark.parametrize(
    ("row", "schema", "message"),
    [
        ({"a": 1, "b": 2}, "auto", "found `a`, `b`; the nearest schema"),
        ({}, "auto", "found none"),
        ({"prompt": "p", "candidate": []}, "auto", "`ncalign`, lacks `candidates`; did you mean `candidates` by `candidate`?"),
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, "auto", "`trl_preference`, lacks `chosen`"),
        ({"prompt": "p", "completion": "a"}, "auto", "`trl_unpaired`, lacks `label`"),
        ({"prompt": "p", "A0": "a", "A1": "b", "score_A0": 1}, "auto", "`nca`, lacks `score_A1`"),
        ({"prompt": "p", "A0": "a", "score_A0": 1, "score_A1": 1}, "auto", "`nca`, lacks `A1`"),
        (
            {"prompt": "p", "candidates": []},
            "nca",
            "schema `nca` needs `prompt`, `A0`, `score_A0`, found `prompt`, `candidates`",
        ),
        ({"prompt": "p", "chosen": "a"}, "trl_preference", "lacks `rejected`"),
    ],
)
def test_no_schema_matches(write_jsonl: WriteJsonl, row: dict[str, Any], schema: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        list(read_groups(write_jsonl([row]), schema=schema))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_convert_writes_our_schema(write_jsonl: WriteJsonl, tmp_path: Path, name: str) -> None:
    source = write_jsonl(
        [{"prompt": "p", "chosen": "a", "rejected": "b"}, "{", {"prompt": "q", "chosen": "c", "rejected": "d"}]
    )
    report = convert(source, tmp_path / name, schema="trl_preference", on_bad_row="skip")
    assert (report.rows, report.groups, report.skipped) == (3, 2, 1)
    assert list(read_groups(tmp_path / name, schema="ncalign")) == list(read_groups(source, on_bad_row="skip"))


def test_convert_leaves_the_output_alone_when_the_input_is_bad(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="malformed JSON"):
        convert(write_jsonl([row, "{"]), output)
    with pytest.raises(DataError, match=r"no group to write: 1 rows read, 0 groups, 1 rows skipped \(malformed JSON: 1\)"):
        convert(write_jsonl(["{"]), output, on_bad_row="skip")
    with pytest.raises(DataError, match="no group to write: 0 rows read"):
        convert(write_jsonl([]), output)
    assert output.read_text() == "old"


def test_convert_in_place(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    convert(path, path)
    assert json.loads(path.read_text()) == {
        "id": "1",
        "prompt": "p",
        "candidates": [{"completion": "a", "reward": 1.0}, {"completion": "b", "reward": 0.0}],
    }

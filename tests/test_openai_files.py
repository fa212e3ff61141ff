"""OpenAI's fine-tuning files, pairs and chats, are read through the command line as their authors meant them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncalign.cli.app import main
from ncalign.data.groups import DataError, Group, read_groups

WriteJsonl = Callable[..., Path]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def pair(question: str, better: str, worse: str, **more: Any) -> dict[str, Any]:
    given = {"messages": [SYSTEM, user(question)], "tools": [], "parallel_tool_calls": True, **more}
    return {"input": given, "preferred_output": [assistant(better)], "non_preferred_output": [assistant(worse)]}


def converted(data: Path, *words: str) -> list[Group]:
    output = data.parent / "converted.jsonl"
    assert main(["convert", str(data), str(output), "--overwrite", *words]) == 0
    return list(read_groups(output))


def scored(group: Group) -> list[tuple[Any, float | None]]:
    return [(candidate.completion, candidate.reward) for candidate in group.candidates]


@pytest.mark.parametrize("words", [[], ["--from", "openai"]])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs(kind: str, words: list[str], write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    rows = [pair("Q", "a", "b"), pair("R", "c", "d"), pair("Q", "e", "b")]
    path = write_jsonl(rows)
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = converted(path, *words)
    assert first.prompt == [SYSTEM, user("Q")]
    assert scored(first) == [([assistant("a")], 1.0), ([assistant("b")], 0.0), ([assistant("e")], 1.0)]
    assert scored(second) == [([assistant("c")], 1.0), ([assistant("d")], 0.0)]
    assert first.metadata == {"parallel_tool_calls": True}


def test_tools_are_kept_and_part_of_the_prompt(write_jsonl: WriteJsonl) -> None:
    groups = converted(write_jsonl([pair("Q", "a", "b", tools=[TOOL]), pair("Q", "c", "d"), pair("Q", "e", "f", tools=[TOOL])]))
    assert [(len(group.candidates), group.metadata.get("tools")) for group in groups] == [(4, [TOOL]), (2, None)]
    groups = converted(write_jsonl([{"messages": [user("Q"), assistant("a")], "functions": [TOOL]}]))
    assert groups[0].metadata == {"tools": [TOOL]}


def test_chats(write_jsonl: WriteJsonl) -> None:
    opening = [{"role": "developer", "content": "Be brief."}, user("Q"), assistant("x", weight=0), user("R")]
    rows = [
        {"messages": [*opening, assistant("a", weight=1)], "prompt_id": "one"},
        {"messages": [user([{"type": "text", "text": "S"}]), assistant("b")], "prompt_id": "two"},  # type: ignore[arg-type]
        {"messages": [*opening, assistant("c")], "prompt_id": "three"},
    ]
    first, second = converted(write_jsonl(rows))
    assert first.prompt == [SYSTEM, user("Q"), assistant("x"), user("R")]
    assert scored(first) == [([assistant("a")], None), ([assistant("c")], None)]
    assert first.metadata == {"prompt_id": ["one", "three"]}
    assert (second.prompt, scored(second)) == ([user("S")], [([assistant("b")], None)])


def test_chats_of_a_parquet_file_whose_messages_all_have_all_keys(tmp_path: Path) -> None:
    keys = {"name": None, "tool_calls": None, "tool_call_id": None, "weight": None}
    rows = [{"messages": [{**keys, **user("Q")}, {**keys, **assistant("a", weight=1)}], "tools": None, "category": "c"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    (group,) = converted(tmp_path / "chats.parquet")
    assert (group.prompt, scored(group)) == ([user("Q")], [([assistant("a")], None)])
    assert group.metadata["category"] == "c"


def test_a_chat_that_ends_with_the_user_is_a_prompt(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"messages": [SYSTEM, user("Q")]}])
    (group,) = read_groups(path, allow_empty=True)
    assert (group.prompt, group.candidates) == ([SYSTEM, user("Q")], [])
    with pytest.raises(DataError, match=r"groups\.jsonl:1: group '1': candidates is empty: at least one completion is needed"):
        list(read_groups(path))


def test_other_schemas_with_messages_beside_are_not_taken_for_chats(write_jsonl: WriteJsonl) -> None:
    row = {"prompt": "Q", "chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]}
    (group,) = read_groups(write_jsonl([{**row, "messages": row["chosen"], "score_chosen": 8.0, "score_rejected": 2.0}]))
    assert scored(group) == [([assistant("a")], 8.0), ([assistant("b")], 2.0)]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages is a list of 0: a list of messages, not empty, is needed"),
    (
        {"messages": [user("Q"), assistant("a")], "rejected_response": "b"},
        "`rejected_response` beside `messages` makes a pair, which is not OpenAI's: name the answers `chosen` and `rejected`",
    ),
    ({"messages": [assistant("a")]}, "messages has nothing before the answer: a prompt is needed"),
    ({"messages": [user("Q"), assistant("a", weight=0)]}, "messages[1].weight is 0 (a number): only answers of weight 1"),
    ({"messages": [user("Q"), {"role": "assistant", "content": None}]}, "messages[1].content is null: a text is needed"),
    (
        {"messages": [user("Q"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "messages[1].tool_calls[0] is an object with keys `id`: an object with the function's `name` and `arguments` is needed",
    ),
    ({"messages": [{**user("Q"), "contents": "no"}, {"role": "assistant", "contents": "a"}]}, "messages[1] has an unknown key"),
    (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "u"}}]), assistant("a")]},  # type: ignore[arg-type]
        "messages[0].content[0] is 'image_url' (a string): only parts of the type `text` can be used",
    ),
    ({**pair("Q", "a", "b"), "input": {"messages": []}}, "input.messages is a list of 0"),
    ({**pair("Q", "a", "b"), "preferred_output": []}, "preferred_output is a list of 0"),
    ({**pair("Q", "a", "b"), "non_preferred_output": "b"}, "non_preferred_output is 'b' (a string): a list of messages"),
    ({**pair("Q", "a", "b"), "preferred_output": [user("a")]}, "preferred_output ends with a message of 'user'"),
    ({**pair("Q", "a", "b"), "tools": [TOOL], "input": pair("Q", "a", "b", tools=[TOOL])["input"]}, "are called `tools`"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_can_not_be_used_is_refused_by_name(
    row: dict[str, Any], message: str, write_jsonl: WriteJsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(write_jsonl([row, pair("R", "a", "b")])), str(tmp_path / "out.jsonl"), "--from", "openai"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "groups.jsonl:1" in error
    assert main([*words, "--on_bad_row", "skip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 1


def test_check_and_train_read_pairs(write_jsonl: WriteJsonl, tiny_model_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl([pair(f"What is {k}?", f"It is {k}.", "I do not know.") for k in range(6)])
    assert main(["check", str(data), "--model", str(tiny_model_dir), "--max_length", "256"]) == 0
    words = ["--data", str(data), "--model", str(tiny_model_dir), "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    assert main(["train", *words, "--objective", "dpo"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["data"]["groups_used"], results["data"]["candidates_used"]) == (6, 12)
    assert results["reward_steps"][0]["steps"] == ["openai: preferred 1, not preferred 0"]

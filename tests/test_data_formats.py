"""The tables of docs/data-formats.md: every row of a table is read, and becomes what the table says."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncalign.core.errors import DataError
from ncalign.data.formats.group import STRING_PROMPTS, Text
from ncalign.data.groups import Candidate, Group, ReadReport, convert, read_groups, write_groups

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data-formats.md"
LITERALS = {
    "null": None,
    "true": True,
    "false": False,
    "NaN": math.nan,
    "Infinity": math.inf,
    "Decimal": decimal.Decimal,
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
    "timedelta": datetime.timedelta,
}
"""What a row's cell may use besides JSON: the names of Parquet's types as Python has them."""


class Line(NamedTuple):
    """A line of a table: rows of a file, what they become, and what of them is in the metadata."""

    kind: str
    rows: str
    read: str
    metadata: str


def lines() -> list[Any]:
    """The lines of the page's tables, named by their number in the page."""
    found, kind = [], ""
    for number, text in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), start=1):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", text.strip().strip("|"))]
        if not text.startswith("|") or set(text) <= set("|-: "):
            continue
        if cells[0].startswith("Row"):
            kind = "parquet" if "Parquet" in cells[0] else "jsonl"
        elif cells[0].startswith("`") and len(cells) == len(Line._fields) - 1:
            found.append(pytest.param(Line(kind, *cells), id=f"line {number}"))
    return found


def written(line: Line, folder: Path) -> Path:
    """The file that a line's rows make."""
    rows = eval(f"[{line.rows.strip('`')}]", {"__builtins__": {}}, LITERALS)
    path = folder / f"rows.{line.kind}"
    if line.kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def described(text: Text) -> str:
    """A prompt or a completion as the tables write it: a string in quotes, turns with their roles."""
    if isinstance(text, str):
        return f'"{text}"'
    more = [", ".join(key for key in turn if key not in ("role", "content")) for turn in text]
    return " / ".join(
        f"{turn['role']}: {turn['content']}{f' ({names})' if names else ''}" for turn, names in zip(text, more, strict=True)
    )


def as_line(group: Group) -> str:
    """A group as the tables write it."""
    candidates = [described(one.completion) + ("" if one.reward is None else f" = {one.reward:g}") for one in group.candidates]
    line = f"{described(group.prompt)} → {', '.join(candidates)}" if candidates else described(group.prompt)
    return line.replace("\n", "⏎")


@pytest.mark.parametrize("line", lines())
def test_a_row_is_read_as_its_line_says(line: Line, tmp_path: Path) -> None:
    report, path = ReadReport(), written(line, tmp_path)
    if line.read.startswith("refused: "):
        with pytest.raises(DataError) as caught:
            list(read_groups(path, report=report, allow_empty=True))
        assert line.read.removeprefix("refused: ") in str(caught.value)
        return
    groups = list(read_groups(path, report=report, allow_empty=True))
    assert "; ".join(map(as_line, groups)) == line.read.strip("`")
    kept = sorted({name for group in groups for name in group.metadata} - {STRING_PROMPTS})
    assert kept == sorted(re.findall(r"`([^`]+)`", line.metadata))
    told = [name for name in kept if any(f"`{name}`" in note for note in report.counted_notes())]
    assert told == sorted(re.findall(r"`([^`]+)` \(told\)", line.metadata))


# --- What is kept of messages and tools survives every file -------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_calls_and_tools_are_written_and_read_back(kind: str, tmp_path: Path) -> None:
    group = Group(
        id="w",
        prompt=[
            {"role": "user", "content": "Weather?", "name": "ann"},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Look"},
            {"role": "tool", "content": "3 C", "tool_call_id": "1"},
        ],
        candidates=[
            Candidate([{"role": "assistant", "content": "3."}], 1.0),
            Candidate([{"role": "assistant", "content": "4."}]),
        ],
        metadata={"tools": [TOOL]},
    )
    write_groups([group], tmp_path / f"groups.{kind}")
    assert list(read_groups(tmp_path / f"groups.{kind}")) == [group]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs_have_the_tools_in_their_own_column(kind: str, tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "tools": [TOOL], "topic": "t"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    convert(tmp_path / "rows.jsonl", tmp_path / f"pairs.{kind}", target="best_vs_worst")
    [group] = read_groups(tmp_path / f"pairs.{kind}")
    assert group.metadata == {"tools": [TOOL], "topic": "t"}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        TOOL,
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{**TOOL, "strict": None, "function": {**TOOL["function"], "returns": None}}],
    ],
    ids=["list", "object", "JSON", "JSON each", "without a type", "null keys"],
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_are_the_same_in_every_spelling(tools: Any, column: str, tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", column: tools}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    [group] = read_groups(tmp_path / "rows.jsonl")
    assert group.metadata == {"tools": [TOOL]}


def test_parquet_fills_arguments_with_nulls_that_are_left_out(tmp_path: Path) -> None:
    def said(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        call = {"function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]

    rows = [{"prompt": said(arguments), "completion": "a", "label": True} for arguments in ({"x": 1}, {"y": {"z": 2}})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    calls = [group.prompt[1]["tool_calls"][0]["function"] for group in read_groups(tmp_path / "rows.parquet")]  # type: ignore[index]
    assert calls == [{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"y": {"z": 2}}}]


def test_a_parquet_file_has_the_keys_of_its_first_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncalign.data.formats.parquet.BATCH_ROWS", 1)
    plain: list[dict[str, Any]] = [{"role": "user", "content": "Q"}]
    groups = [Group("a", plain, []), Group("b", [{**plain[0], "name": "ann"}], [])]
    with pytest.raises(DataError, match=r"group 'b': a message of prompt has `name`.*use JSONL"):
        write_groups(groups, tmp_path / "groups.parquet")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "weather"}, "tools is 'weather' (a string): tools are a list of objects, or JSON that holds one"),
        ({"tools": [TOOL], "functions": [{"name": "other"}]}, "`tools`, `functions` differ"),
        ({"system": "S", "system_prompt": "T"}, "`system`, `system_prompt` differ"),
        ({"history": ["P", "p"]}, "history is a list of 2: a list of [question, answer], or of messages, is needed"),
    ],
)
def test_what_can_not_be_told_to_the_model_is_refused_by_name(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b", **row}))
    with pytest.raises(DataError, match=re.escape(message)):
        list(read_groups(tmp_path / "rows.jsonl"))


def test_one_notice_names_what_no_model_sees(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{k}", "chosen": "a", "rejected": "b", "context": "Some words." if k else None, "margin": 1.0}
        for k in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ReadReport()
    assert len(list(read_groups(tmp_path / "rows.jsonl", report=report))) == 3
    [notice] = report.counted_notes()
    assert notice.startswith("no model sees `margin` (3 rows), `context` (2 rows): kept in the metadata")


def test_a_table_of_cells_says_the_same_as_json(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        'system,query,history,chosen,rejected,chosen_rating,rejected_rating,margin\nS,[1],"[[""P"", ""p""]]",a,b,5,N/A,1.5\n'
    )
    report = ReadReport()
    [group] = read_groups(tmp_path / "rows.csv", report=report)
    assert as_line(group) == "system: S / user: P / assistant: p / user: [1] → assistant: a = 5, assistant: b"
    assert report.unread == {"margin": 1}


@pytest.mark.parametrize("name", ["groups.jsonl", "groups.parquet"])
def test_what_convert_wrote_has_nothing_left_to_tell(name: str, tmp_path: Path) -> None:
    row = {"system": "S", "question": "Q", "context": "Some words.", "chosen": "a", "rejected": "b", "margin": 2}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    first = convert(tmp_path / "rows.jsonl", tmp_path / name)
    assert first.unread == {"context": 1, "margin": 1}
    report = ReadReport()
    [group] = read_groups(tmp_path / name, report=report)
    assert report.counted_notes() == []
    assert group.metadata == {"context": "Some words.", "margin": 2}

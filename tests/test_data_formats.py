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
from ncalign.data.groups import Group, ReadReport, read_groups

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
        elif cells[0].startswith("`"):
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
    return f"{described(group.prompt)} → {', '.join(candidates)}" if candidates else described(group.prompt)


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
    told = [name for name in kept if any(f"`{name}`" in note for note in report.notes)]
    assert told == sorted(re.findall(r"`([^`]+)` \(told\)", line.metadata))

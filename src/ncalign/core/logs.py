"""Logs of JSON lines that are appended to: a line that was cut by a kill or damaged since costs itself alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ncalign.core.progress import say


def read_log(path: Path, *, key: str) -> list[dict[str, Any]]:
    """The rows of a log; a note tells how many lines hold none.

    Args:
        path: the file.
        key: what every row has a number under.

    Raises:
        OSError: the file can't be read.
    """
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        row = _row(line)
        if row is not None and isinstance(row.get(key), int | float):
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    if damaged:
        say(f"note: {path}: {len(damaged)} damaged lines are left out (first: line {damaged[0]})")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None

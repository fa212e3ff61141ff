"""Rows of JSON Lines files, plain or compressed."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import BinaryIO

from ncalign.core.errors import DataError, shown
from ncalign.data.formats.opened import opened
from ncalign.data.formats.parsing import Row

_BOM = b"\xef\xbb\xbf"
MAX_LINE = 256 << 20
"""A longer line is a damaged file, or one made to fill the memory."""
MAX_VALUES = 4_000_000
"""A row with more values is made to fill the memory: each empty list takes thirty times the room of its two brackets."""


def read_rows(path: Path) -> Generator[tuple[int, Row | DataError], None, None]:
    """Yield each line's number and its object, or the error that says why it has none; blank lines are passed over.

    Raises:
        ValueError: The file can't be read on, as when it is cut short.
    """
    with opened(path) as file:
        # Lines end at "\n" alone: JSON strings may hold the other characters that Python counts as line ends.
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                raise DataError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB: no row is that long")
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, _parsed(line, number)


def too_many_values(text: bytes) -> bool:
    """Whether JSON has brackets and commas for more values than a row can have; short texts are not looked through."""
    return len(text) > MAX_VALUES and sum(map(text.count, (b"[", b"{", b","))) > MAX_VALUES


def _parsed(line: bytes, number: int) -> Row | DataError:
    if too_many_values(line):
        return DataError(f"a row of more than {MAX_VALUES} values: no row is that large", reason="too large")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8"
        return DataError(f"{found}: save the file as UTF-8", reason="invalid UTF-8")
    except json.JSONDecodeError as error:
        return DataError(
            f"malformed JSON at column {error.colno}: {error.msg}{_array_hint(line, number)}", reason="malformed JSON"
        )
    except RecursionError:
        return DataError("JSON nested too deep to read", reason="nested too deep")
    except ValueError:
        # Python refuses to make a number of thousands of digits.
        return DataError("a number has too many digits to read", reason="not finite")
    if not isinstance(value, dict):
        hint = _array_hint(line, number)
        return DataError(f"the line is {shown(value)}: a JSON object is needed{hint}", reason="not an object")
    return value


def _array_hint(line: bytes, number: int) -> str:
    if number == 1 and line.lstrip().startswith(b"["):
        return "; the file looks like one JSON array: write one object a line instead (`jq -c '.[]'` does)"
    return ""


def write_rows(rows: Iterable[Row], path: Path, *, compressed: bool) -> int:
    """Write an object a line and return how many; the caller renames the file into place."""
    count = 0
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(path.open("wb"))
        file: BinaryIO | gzip.GzipFile = plain
        if compressed:
            # No name and no time inside: the same groups make the same bytes.
            file = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=plain, compresslevel=6, mtime=0))
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
            count += 1
    return count

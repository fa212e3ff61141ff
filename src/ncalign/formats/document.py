"""Rows of one JSON document: a list of objects, or an object that holds such a list, as LMFlow and AlpacaEval write them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from ncalign.errors import DataError, shown
from ncalign.formats.parsing import Row

_HOLDERS = ("instances", "data")
MAX_BYTES = 1 << 30
"""A document is read whole, decompressed; larger data belong into JSON Lines, which are read a line at a time."""


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def is_document(path: Path) -> bool:
    """Whether a .json file is one document and not an object a line."""
    try:
        with _opened(path) as file:
            head = file.read(1 << 16)
    except (OSError, EOFError, zlib.error):
        return False  # the reader of lines says what is wrong
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"["):
        return True
    line, newline, rest = head.partition(b"\n")
    if not line.startswith(b"{"):
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        # An object that does not end on its line, or a line longer than what was read.
        return bool(newline)
    return not rest.strip() and isinstance(value, dict) and any(isinstance(value.get(name), list) for name in _HOLDERS)


def read_rows(path: Path) -> Generator[tuple[int, Row | DataError], None, None]:
    """Yield each element's number, from 1, and its object, or the error that says why it is none.

    Raises:
        ValueError: The file is no such document.
    """
    try:
        with _opened(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DataError(f"{path} is a JSON document above 1 GiB, which is read whole: write one object a line, as .jsonl")
        value = json.loads(data.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't read the file to its end: {error}; copy or make it anew") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}; copy or make it anew"
        ) from error
    except DataError:
        raise
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: nested too deep, or a number of too many digits, to read") from error
    rows = value
    if isinstance(value, dict):
        rows = next((value[name] for name in _HOLDERS if isinstance(value.get(name), list)), [value])
    if not isinstance(rows, list):
        raise DataError(f"{path} is {shown(value)}: a list of objects, or an object with `instances` or `data`, is needed")
    for number, row in enumerate(rows, start=1):
        yield (
            number,
            row if isinstance(row, dict) else DataError(f"it is {shown(row)}: an object is needed", reason="not an object"),
        )

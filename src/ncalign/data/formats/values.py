"""Values as JSON holds them: what Arrow, Parquet, pandas and JSON's readers give besides is read as what it means.

NaN is a missing value and becomes null; times become ISO 8601, decimals numbers, maps objects, bytes that are UTF-8 text. What
has no such meaning stays where a column is read, so that its reader says what it needs, and is null where nobody reads it.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from ncalign.core.errors import DataError
from ncalign.data.formats.group import MAX_DEPTH, MAX_INT_BITS, number_or_none

MISSING = frozenset({"", "nan", "-nan", "na", "n/a", "#n/a", "none", "null", "<na>", "\\n"})
"""What pandas, R and databases write, in whatever case, for a missing number."""
TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WHOLE = re.compile(r"[+-]?\d{1,15}")
_NAN = "are NaN and were read as null"


def json_row(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """A row in JSON's types, what is to be said of it, and the columns that still hold what JSON has no value for."""
    read: dict[str, Any] = {}
    notes: dict[str, int] = {}
    odd: list[str] = []
    for column, value in row.items():
        seen: list[str] = []
        read[str(column)] = _read(value, seen, _depth(column), keep=True)
        if seen:
            missing = seen.count(_NAN)
            if missing:
                notes[f"values of `{column}` {_NAN}"] = missing
            if missing < len(seen):
                odd.append(str(column))
    return read, notes, odd


def without_odd(row: dict[str, Any], odd: Collection[str], read: Collection[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """The row with null for what JSON has no value for, in those of the columns that nobody reads; how often, and where.

    Raises:
        ValueError: a column that is read could not be had from its file.
    """
    plain, notes = dict(row), Counter[str]()
    for column in odd:
        if column not in read or column == "metadata":
            seen: list[str] = []
            plain[column] = _read(row[column], seen, _depth(column), keep=False)
            notes.update(f"values of `{column}` {what}" for what in seen)
        elif isinstance(row[column], DataError):
            raise row[column]
    return plain, dict(notes)


def _depth(column: str) -> int:
    """How deep a column's values lie in the metadata, where those of the column of that name are beside the others."""
    return 0 if column == "metadata" else 1


def as_number(text: str) -> int | float | None:
    """The number that a text is; None where it is none, or a word for a missing one."""
    stripped = text.strip()
    if not _NUMBER.fullmatch(stripped):
        return None
    return int(stripped) if _WHOLE.fullmatch(stripped) else float(stripped)


def read_number(value: Any, where: str) -> float | None:
    """A number, which may be written as text; None where it is missing.

    Raises:
        ValueError: it is neither, or not finite.

    >>> read_number("4.5", "score"), read_number("N/A", "score")
    (4.5, None)
    """
    if isinstance(value, str):
        if value.strip().lower() in MISSING:
            return None
        found = as_number(value)
        value = value if found is None else found
    return number_or_none(value, where)


def read_flag(value: Any) -> Any:
    """True or false where the value is one, as a number or as text; else the value itself.

    >>> read_flag("True"), read_flag(0.0), read_flag("maybe")
    (True, False, 'maybe')
    """
    if isinstance(value, str | int | float):
        return TRUTH.get(str(value).strip().lower(), value)
    return value


def _read(value: Any, seen: list[str], depth: int, *, keep: bool) -> Any:
    """A value in JSON's types; ``seen`` gets what is to be said of it and of what it holds.

    What JSON has no value for stays as it is with ``keep``, and is null without.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return _text(str(value), seen, keep=keep)
    if isinstance(value, int):
        return int(value) if value.bit_length() <= MAX_INT_BITS else _odd(value, "are too large to store", seen, keep=keep)
    if isinstance(value, float):
        return _float(float(value), seen, keep=keep)
    if isinstance(value, Mapping) or _is_map(value):
        items = value.items() if isinstance(value, Mapping) else value
        if depth >= MAX_DEPTH:
            return _odd(value, "are nested too deep", seen, keep=keep)
        return {_key(key, keep=keep): _read(item, seen, depth + 1, keep=keep) for key, item in items}
    if isinstance(value, list | tuple):
        if depth >= MAX_DEPTH:
            return _odd(value, "are nested too deep", seen, keep=keep)
        return [_read(item, seen, depth + 1, keep=keep) for item in value]
    return _of_other_type(value, seen, depth, keep=keep)


def _of_other_type(value: Any, seen: list[str], depth: int, *, keep: bool) -> Any:
    if isinstance(value, decimal.Decimal):
        return _decimal(value, seen, keep=keep)
    if isinstance(value, datetime.date | datetime.time):
        # A missing time of pandas is not equal to itself either.
        return value.isoformat() if value == value else _float(math.nan, seen, keep=keep)
    if isinstance(value, datetime.timedelta):
        return _duration(value) if value == value else _float(math.nan, seen, keep=keep)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            return _odd(value, "are bytes that are no text", seen, keep=keep)
    if isinstance(value, DataError):
        return _odd(value, "can't be read", seen, keep=keep)
    if hasattr(value, "tolist"):  # arrays and numbers of NumPy, which is not imported for them
        return _read(value.tolist(), seen, depth + 1, keep=keep)
    return _odd(value, f"are of the type {type(value).__name__}", seen, keep=keep)


def _odd(value: Any, what: str, seen: list[str], *, keep: bool) -> Any:
    seen.append(f"{what} and were left out, as null")
    return value if keep else None


def _text(value: str, seen: list[str], *, keep: bool) -> str:
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        seen.append("hold half of a surrogate pair, which was replaced")
        return value if keep else value.encode("utf-8", "replace").decode()
    return value


def _float(value: float, seen: list[str], *, keep: bool) -> float | None:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        seen.append(_NAN)
        return None
    seen.append("are infinite and were left out, as null")
    return value if keep else None


def _decimal(value: decimal.Decimal, seen: list[str], *, keep: bool) -> Any:
    if value.is_finite() and value == value.to_integral_value() and value.adjusted() < 300:
        return int(value)
    # A signalling NaN has no float.
    return _float(math.nan if value.is_nan() else float(value), seen, keep=keep)


def _duration(value: datetime.timedelta) -> str:
    """ISO 8601, in seconds.

    >>> _duration(datetime.timedelta(minutes=2, milliseconds=-500))
    'PT119.5S'
    """
    micros = value // datetime.timedelta(microseconds=1)
    seconds = decimal.Decimal(abs(micros)).scaleb(-6).normalize()
    return f"{'-' if micros < 0 else ''}PT{seconds:f}S"


def _is_map(value: object) -> bool:
    """Whether a value is an Arrow map, which Python sees as a list of pairs; one with a key twice stays a list."""
    if not isinstance(value, list) or not value or not all(type(item) is tuple and len(item) == 2 for item in value):
        return False
    return len({_key(key, keep=True) for key, _ in value}) == len(value)


def _key(key: object, *, keep: bool) -> str:
    text = key if isinstance(key, str) else str(_read(key, [], MAX_DEPTH, keep=True))
    return text if keep or text.isascii() else text.encode("utf-8", "replace").decode()

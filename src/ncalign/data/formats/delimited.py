"""Rows of CSV and TSV files: text cells become the values that the same row has in JSON.

A file names its columns in its first row. What a cell holds follows from its column's name and from its text: numbers, truth
values, lists and objects (in JSON, or as Python prints them, which is what pandas writes), or text.
"""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
import re
import tokenize
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from ncalign.core.errors import DataError, names
from ncalign.data.formats.jsonl import MAX_LINE, too_many_values
from ncalign.data.formats.opened import opened
from ncalign.data.formats.parsing import Row
from ncalign.data.formats.values import MISSING, TRUTH, as_number

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

_NUMBERS = frozenset(
    "reward rewards score scores rank ranks rating ratings preference logprob".split()  # words of the names of such columns
)
_FLAGS = frozenset({"label", "kto_tag", "finished", "is_correct"})
_TEXT = re.compile(
    r"prompt|chosen|rejected|completion|instruction|input|output|question|answer|response|context|query|problem"
    r"|system|system_prompt|system_message|custom_system_prompt"
    r"|chosen_response|rejected_response|ground_truth|reference|id"
    r"|(A|completion|response|generation|generations|reply|answer|output|candidate|option)[-_ ]?\d+"
)
_BRACKETS = {"[": "]", "{": "}"}
_CONVERSATION = re.compile(r"""[\[{]\s*\{?\s*(['"])(role|content|from|value)\1\s*:""")


def is_delimited(path: Path) -> bool:
    """Whether a file's name is that of a CSV or TSV file."""
    return path.name.lower().endswith(SUFFIXES)


def read_rows(path: Path) -> Generator[tuple[int, Row | DataError], None, None]:
    """Yield the number of each row's first line, and its values or the error that says why it has none.

    Blank lines are passed over.

    Raises:
        ValueError: The file has no usable header, is not CSV from some line on, or can't be read to its end.
    """
    name = path.name.lower()
    with opened(path) as file:
        # Bytes that are not UTF-8 are kept as surrogates: they make their row unusable, and not the file.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield from _rows(text, path, "\t" if ".tsv" in name[-7:] else ",")


def _rows(text: io.TextIOWrapper, path: Path, delimiter: str) -> Iterator[tuple[int, Row | DataError]]:
    header: list[str] | None = None
    for line, cells in _records(text, path, delimiter):
        if header is None:
            header = _header(cells, f"{path}:{line}", delimiter)
        else:
            yield line, _row(header, cells)
    if header is None:
        raise DataError(f"{path} is empty: a first row with the columns' names is needed", reason="no header")


def _records(text: io.TextIOWrapper, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that has any, with the number of its first line."""
    # The limit is the process's, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    reader = csv.reader(_lines(text, path), delimiter=delimiter, strict=True)
    first = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}:{first}: the row that begins here is not CSV: {error}; a cell with a line break, a quote or the "
                'delimiter stands in quotes, and a quote inside it is written twice ("")',
                reason="malformed CSV",
            ) from None
        if cells is None:
            return
        if cells:
            yield first, cells
        first = reader.line_num + 1


def _lines(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE), ""), start=1):
        if len(line) == MAX_LINE:
            raise DataError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB: no row is that long")
        if "\0" in line:
            kind = "UTF-16: save it as UTF-8" if number == 1 else "damaged: copy it again"
            raise DataError(f"{path}:{number} holds a NUL byte: the file is {kind}", reason="invalid UTF-8")
        yield line


def _header(cells: list[str], where: str, delimiter: str) -> list[str]:
    """The columns' names; the first one may be empty, as that of the index that pandas writes."""
    header = [cell.strip() for cell in cells]
    if not all(_is_utf8(name) for name in header):
        raise DataError(f"{where}: the header is not UTF-8: save the file as UTF-8", reason="invalid UTF-8")
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: the header has {names(repeated)} more than once: rename one", reason="bad header")
    if "" in header[1:]:
        raise DataError(
            f"{where}: column {header.index('', 1) + 1} of the header has no name: name every column", reason="bad header"
        )
    others = [mark for mark in ";\t,|" if mark != delimiter and mark in header[0]]
    if len(header) == 1 and others:
        raise DataError(
            f"{where}: the header is one cell, {header[0]!r:.80}: commas separate the columns of a .csv file, and tabs those "
            "of a .tsv file; rename the file, or save it with the right delimiter",
            reason="bad header",
        )
    return header


def _row(header: list[str], cells: list[str]) -> Row | DataError:
    if len(cells) != len(header):
        return DataError(
            f"the row has {len(cells)} cells and the header {len(header)}: put cells that hold the delimiter, a quote or a "
            "line break in quotes",
            reason="wrong number of cells",
        )
    bad = [name for name, cell in zip(header, cells, strict=True) if not _is_utf8(cell)]
    if bad:
        return DataError(f"{names(bad)} is not UTF-8: save the file as UTF-8", reason="invalid UTF-8")
    try:
        row = {name: _value(name, cell) for name, cell in zip(header, cells, strict=True) if name}
    except DataError as error:
        return error
    # Where the chosen answer is JSON too, the rejected one is no list of answers.
    if _is_texts(row.get("rejected")) and _structure(str(row.get("chosen", "")).strip()) is not None:
        row["rejected"] = cells[header.index("rejected")]
    return row


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_utf8(text: str) -> bool:
    # Decoding leaves no other surrogates than the escaped bytes.
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _value(column: str, cell: str) -> Any:
    """A cell's value; an empty one is null."""
    if not cell:
        return None
    stripped = cell.strip()
    if column in _FLAGS:
        return None if stripped.lower() in MISSING else TRUTH.get(stripped.lower(), cell)
    if _TEXT.fullmatch(column):
        return _text(column, cell, stripped)
    if _NUMBERS & set(re.split(r"[\W_]+", column.lower())):
        if stripped.lower() in MISSING:
            return None
        if (number := as_number(stripped)) is not None:
            return number
    found = _structure(stripped)
    return cell if found is None else found


def _text(column: str, cell: str, stripped: str) -> Any:
    """Text, unless it is a conversation or what else a schema has in a column of this name."""
    found = _structure(stripped)
    if _is_conversation(found):
        return found
    if (
        column == "rejected"
        and isinstance(found, list)
        and all(isinstance(item, str) or _is_conversation(item) for item in found)
    ):
        return found
    if column == "output" and isinstance(found, list) and all(isinstance(item, dict) and "text" in item for item in found):
        return found
    if found is None and _CONVERSATION.match(stripped):
        raise DataError(
            f"{column} looks like a conversation, {stripped[:60]!r}..., but is neither JSON nor a Python list: write it with "
            "json.dumps (of a numpy array, .tolist() first)",
            reason="bad conversation",
        )
    return cell


def _is_conversation(value: object) -> bool:
    """Whether a value is a message, or a list of such."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, dict) and _is_conversation(item) for item in value)
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def _structure(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text writes down, in JSON or as Python does; None where it writes down none."""
    if _BRACKETS.get(text[:1]) != text[-1:] or too_many_values(text.encode()):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _literal(text)
    return value if isinstance(value, list | dict) else None


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        return None if _joins_strings(text) else value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return None


def _joins_strings(text: str) -> bool:
    """Whether two strings stand side by side, as numpy prints an array's: Python would read them as one."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    return any(pair == (tokenize.STRING, tokenize.STRING) for pair in itertools.pairwise(kinds))

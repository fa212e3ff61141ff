"""Rows of JSON documents: a list of objects, an object that holds such a list, as LMFlow and AlpacaEval write them, or objects.

A list is read an element at a time, so that it may be larger than memory; an object's other fields are passed over.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from ncalign.core.errors import DataError, shown
from ncalign.data.formats.jsonl import MAX_LINE, MAX_VALUES, too_many_values
from ncalign.data.formats.opened import opened
from ncalign.data.formats.parsing import Row

_HOLDERS = ("instances", "data")
_CHUNK = 1 << 16
_NEAR = 64
"""Characters from the buffer's end within which a literal, an escape or a delimiter may be cut."""
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def is_document(path: Path) -> bool:
    """Whether a .json file is one document and not an object a line."""
    try:
        with opened(path) as file:
            head = file.read(_CHUNK)
    except DataError:
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
        # An object that does not end on its line, or a line longer than what was read: then one that begins with a list.
        return bool(newline) or re.match(rb'\{\s*"[^"]*"\s*:\s*("[^"]*"\s*,\s*"[^"]*"\s*:\s*)?\[\s*\{', line) is not None
    return not rest.strip() and isinstance(value, dict) and any(isinstance(value.get(name), list) for name in _HOLDERS)


def read_rows(path: Path) -> Generator[tuple[int, Row | DataError], None, None]:
    """Yield each element's number, from 1, and its object, or an error where it is not an object.

    Raises:
        ValueError: The file is no such document, or can't be read to its end.
    """
    with opened(path) as file:
        yield from _rows(_Text(file, path))


class _Text:
    """A document's text, of which only what is being looked at is in memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self.path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._at, self._ended = "", 0, False
        self._line = 1

    def more(self) -> None:
        """Read on; at the end, ``_ended`` says so."""
        # As much again as is there: a long element is looked at a logarithmic number of times.
        data = self._file.read(max(_CHUNK, len(self._buffer) - self._at))
        self._ended = not data
        self._line += self._buffer.count("\n", 0, self._at)
        self._buffer, self._at = self._buffer[self._at :], 0
        try:
            self._buffer += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x} after line {self._line + self._buffer.count(chr(10))}"
            raise DataError(f"{self.path}: {found} is not UTF-8: save the file as UTF-8", reason="invalid UTF-8") from None

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            found = _SPACE.match(self._buffer, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self.more()

    def take(self, wanted: str) -> None:
        """Pass over a character that must come next."""
        found = self.peek()
        if found != wanted:
            raise self.damaged(f"{shown(found) if found else 'the end'} where {wanted!r} is needed")
        self._at += 1

    def next_of(self, end: str) -> None:
        """Pass over the comma between two elements; nothing is passed over before the list's end."""
        if self.peek() == end:
            return
        self.take(",")
        if self.peek() == end:
            raise self.damaged(f"a comma before {end!r}")

    def value(self) -> object:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._cut(error):
                    raise self.damaged(error.msg, error.pos) from None
            except RecursionError:
                raise self.damaged("nested too deep to read") from None
            except ValueError:
                raise self.damaged("a number has too many digits to read") from None
            else:
                # A number that ends where the buffer does may go on.
                if end < len(self._buffer) or self._ended:
                    self._at = end
                    return value
            self._bound()
            self.more()

    def _cut(self, error: json.JSONDecodeError) -> bool:
        """Whether what can't be read may be what the buffer's end has cut: an open string, or something near the end."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - _NEAR

    def _bound(self) -> None:
        held = self._buffer[self._at :]
        if len(held) > MAX_LINE or too_many_values(held.encode("utf-8", "surrogatepass")):
            raise self.damaged(f"a value of more than {MAX_LINE >> 20} MiB or {MAX_VALUES} parts; no row is that large")

    def damaged(self, what: str, position: int | None = None) -> DataError:
        """The error for what is found at a position, or at the current one."""
        line = self._line + self._buffer.count("\n", 0, self._at if position is None else position)
        return DataError(
            f"{self.path}:{line}: malformed JSON: {what}; copy it again, or make a new one", reason="malformed JSON"
        )


def _rows(text: _Text) -> Generator[tuple[int, Row | DataError], None, None]:
    first = text.peek()
    if first == "[":
        yield from _elements(text)
    elif first == "{":
        # Objects one after another, each over several lines.
        number = 0
        while text.peek() == "{":
            for number, row in _held(text, number):  # noqa: B020 - goes on counting
                yield number, row
    else:
        raise DataError(
            f"{text.path} is no JSON document: a list of objects, or an object with `instances` or `data`, is needed"
        )
    if text.peek():
        raise text.damaged("something follows the document's end")


def _held(text: _Text, number: int) -> Generator[tuple[int, Row | DataError], None, None]:
    """The elements of the list that an object holds; an object that holds none is a row itself."""
    whole: Row = {}
    found = False
    text.take("{")
    while text.peek() != "}":
        name = text.value()
        text.take(":")
        if name in _HOLDERS and text.peek() == "[" and not found:
            found = True
            yield from _elements(text, number)
        else:
            whole[str(name)] = text.value()
        text.next_of("}")
    text.take("}")
    if not found:
        yield number + 1, whole


def _elements(text: _Text, number: int = 0) -> Generator[tuple[int, Row | DataError], None, None]:
    text.take("[")
    while text.peek() != "]":
        number += 1
        value = text.value()
        row = value if isinstance(value, dict) else None
        yield (
            number,
            row if row is not None else DataError(f"it is {shown(value)}: an object is needed", reason="not an object"),
        )
        text.next_of("]")
    text.take("]")

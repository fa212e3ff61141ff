"""What is printed: text from elsewhere (data, models, servers, file names) is seen, and never steers the terminal."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import TextIO

# All of C0 but tab and newline; C1, whose \x9b begins a command as ESC [ does; what reorders letters or breaks lines; lone
# surrogates, which can't be written at all.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Text with each character that steers a terminal written out.

    >>> print(visible("\x1b[2J, \x9b31m and \u202egnp.exe"))
    \x1b[2J, \x9b31m and \u202egnp.exe
    """
    return _STEERING.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 0x100 else f"\\u{ord(found[0]):04x}", text)


def visible_json(text: str) -> str:
    r"""JSON with the same characters as escapes of JSON's own: it reads back to what it was.

    >>> print(visible_json('["\x9b31m"]'))
    ["\u009b31m"]
    """
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def visible_trace(error: BaseException) -> str:
    """A traceback as Python prints it; the messages in it may be foreign."""
    return visible("".join(traceback.format_exception(error)))


class VisibleStream:
    """A text stream that writes everything out on another one, for ``redirect_stdout``.

    Args:
        stream: where it goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding, self.errors = stream.encoding, stream.errors

    def write(self, text: str) -> int:
        """Write text; returns its length, as streams do."""
        self._stream.write(visible(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write lines."""
        self._stream.writelines(map(visible, lines))

    def flush(self) -> None:
        """Flush the other stream."""
        self._stream.flush()

    def fileno(self) -> int:
        """The other stream's descriptor: programs that are started write there."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """No: colours would be written out."""
        return False

    def writable(self) -> bool:
        """Yes."""
        return True


class ReaderGoneError(BrokenPipeError):
    """The program that reads what is printed has closed it, as ``head`` does."""


_talk: list[TextIO] = []


class TalkStream:
    """Where a verb that talks writes while it works: what standard output is to its user. Nothing in it steers the terminal."""

    def __init__(self) -> None:
        self.stream = _talk[-1] if _talk else sys.stdout

    def write(self, text: str) -> None:
        """Write text at once.

        Raises:
            ReaderGoneError: nobody reads it any more.
        """
        try:
            self.stream.write(visible(text))
            self.stream.flush()
        except BrokenPipeError as error:
            raise ReaderGoneError(*error.args) from error


class _VisibleRecord(logging.LogRecord):
    def getMessage(self) -> str:
        if self.exc_info and self.exc_info[1] is not None and not self.exc_text:
            self.exc_text = visible_trace(self.exc_info[1]).rstrip("\n")
        return visible(super().getMessage())


@contextlib.contextmanager
def visible_output(stdout_to: TextIO, talk_to: TextIO | None = None) -> Iterator[None]:
    """Let nothing that libraries and the user's functions print, log or warn of steer the terminal.

    Args:
        stdout_to: where their standard output goes. Their standard error is left alone: progress bars move the cursor.
        talk_to: where :class:`TalkStream` writes; default: to standard output as it is now.
    """
    before = logging.getLogRecordFactory(), warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        return visible(before[1](message, category, filename, lineno, line))

    logging.setLogRecordFactory(_VisibleRecord)
    warnings.formatwarning = formatted
    _talk.append(sys.stdout if talk_to is None else talk_to)
    try:
        with contextlib.redirect_stdout(VisibleStream(stdout_to)):
            yield
    finally:
        _talk.pop()
        logging.setLogRecordFactory(before[0])
        warnings.formatwarning = before[1]

"""Files of text opened as what they hold, plain or compressed, whatever their names say."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO

from ncalign.core.errors import DataError

_PACKED: dict[bytes, tuple[str, Callable[[BinaryIO], Any]]] = {
    b"\x1f\x8b": ("gzip file", gzip.open),
    b"BZh": ("bzip2 file", bz2.open),
    b"\xfd7zXZ\x00": ("xz file", lzma.open),
}
_OTHERS = {
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
    b"version https://git-lfs": "is a pointer of Git LFS and not the data: fetch the file itself (git lfs pull)",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it first (unzstd)",
    b"PK\x03\x04": "is a zip archive: unpack it first (unzip)",
}
_PAGES = (b"<!doctype html", b"<html")
_HEAD = 64


@contextlib.contextmanager
def opened(path: Path) -> Generator[BinaryIO, None, None]:
    """A file's bytes, unpacked.

    Raises:
        ValueError: it holds something else than text in UTF-8, or can't be read to its end.
    """
    kind = "file"
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(path.open("rb"))
            head = file.peek(_HEAD)
            for mark, (name, unpack) in _PACKED.items():
                if head.startswith(mark):
                    kind, file = name, stack.enter_context(unpack(file))
                    head = file.peek(_HEAD)
                    break
            refuse_others(path, head)
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: can't read the {kind} to its end: {error}; copy it again, or make a new one") from error


def refuse_others(path: Path, head: bytes) -> None:
    """Raise where a file's first bytes are those of something that no reader of text reads."""
    what = next((what for mark, what in _OTHERS.items() if head.startswith(mark)), None)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:_HEAD].lower().startswith(_PAGES):
        what = "is a web page and not the data: download the file itself"
    if what is None and b"\0" in head[:2] and head[:2] != b"\0\0":
        what = "is UTF-16: save it as UTF-8"
    if what is not None:
        raise DataError(f"{path} {what}", reason="no text in UTF-8")

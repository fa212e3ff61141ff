"""Files appear whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

# Rust libraries (safetensors, tokenizers) raise classes of their own and give the system's number in the text.
_RUST_OS_ERROR = re.compile(r"(?P<cause>[^:]*) \(os error (?P<number>\d+)\)")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Give a temporary path to write one file to; on success it takes the target's place in a single step.

    On any exception, Ctrl-C included, the temporary file is removed and whatever the target held stays as it was. Folders
    above the target are made when missing. A target that is a link is followed.

    Args:
        target: The file to write.

    Yields:
        A path in the target's folder; the caller creates the file there and closes it.

    Raises:
        OSError: The file can't be written: a full disk, no permission, a target that is not an ordinary file. The message
            names the target.
    """
    final = Path(os.path.realpath(target))
    # Renaming onto a device or a pipe would replace it.
    if final.exists() and not final.is_file():
        kind = "a folder" if final.is_dir() else "not an ordinary file"
        raise OSError(errno.EINVAL, f"can't write {target}: it is {kind}; give the path of a file")
    temporary = final.parent / f".{final.name[:80]}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _is_about(error, temporary):
            raise explained(error, target) from error
        raise
    _flush_folder(final.parent)


@contextlib.contextmanager
def removed_on_error(temporary: Path, target: str | Path) -> Iterator[None]:
    """Remove a temporary folder when what fills it fails or is interrupted; the caller makes it and renames it into place.

    Raises:
        OSError: The folder can't be written. The message names the target, also where a library raised a class of its own.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        found = _system_error(error)
        if found is not None:
            raise explained(found, target) from error
        raise


def check_writable(target: str | Path) -> None:
    """Raise the error that writing a file would end in, before hours of work go into what it is to hold.

    Raises:
        OSError: The file can't be written there.
    """
    missing = [folder for folder in Path(os.path.realpath(target)).parents if not folder.exists()]
    try:
        with atomic_path(target) as temporary:
            temporary.touch()
            raise _Checked
    except _Checked:
        # Nothing was written, so no folder is left either.
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


class _Checked(Exception):
    """Leaves ``atomic_path`` before its rename."""


def write_text_atomic(text: str, path: str | Path) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json_atomic(obj: object, path: str | Path) -> None:
    """Write an object as indented JSON, whole or not at all.

    Raises:
        ValueError: The object holds NaN or an infinity, which JSON can't express.
    """
    write_text_atomic(json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def write_jsonl_atomic(rows: Iterable[object], path: str | Path) -> None:
    """Write an object a line, whole or not at all; NaN and infinities are refused as in :func:`write_json_atomic`."""
    write_text_atomic("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows), path)


def _is_about(error: OSError, temporary: Path) -> bool:
    """Whether the error came from writing the temporary file, not from something else the caller was doing."""
    if error.filename is None:
        return error.errno in _NO_ROOM
    return Path(os.fsdecode(error.filename)) in (temporary, temporary.parent, *temporary.parents)


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's error behind an exception of any class, or None."""
    if isinstance(error, OSError):
        return error
    found = _RUST_OS_ERROR.search(str(error))
    return OSError(int(found["number"]), found["cause"].strip()) if found and isinstance(error, Exception) else None


def explained(error: OSError, target: str | Path, *, left: str = "No partial file was left") -> OSError:
    """A write error that names the file or folder, says what remains of it, and suggests a remedy."""
    if error.errno in _NO_ROOM:
        remedy = "free some space or write to another disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "choose a folder you may write to"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        remedy = "a file stands where a folder is needed: check the path"
    else:
        remedy = "check the path"
    cause = error.strerror or str(error)
    # OSError turns the number back into the right subclass (PermissionError and the like).
    return OSError(error.errno or errno.EIO, f"can't write {target}: {cause}; {remedy}. {left}")


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    # Makes the rename itself durable; some file systems don't offer it, and the file is complete either way.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

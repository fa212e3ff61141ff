"""Files and folders appear whole or not at all: written under a temporary name in the same folder, then renamed.

They are on disk, in the order of a power loss too: first the contents, then the name, then whatever the caller writes next.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# Rust libraries (safetensors, tokenizers) raise classes of their own and give the system's number in the text.
_RUST_OS_ERROR = re.compile(r"(?P<cause>[^:]*) \(os error (?P<number>\d+)\)")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_TAG = 12
"""Hexadecimal digits that tell temporary files of one target apart."""


@contextlib.contextmanager
def atomic_path(target: str | Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Give a temporary path to write one file to; on success it takes the target's place in a single step.

    On any exception, Ctrl-C included, the temporary file is removed and whatever the target held stays as it was. Folders
    above the target are made when missing. A target that is a link is followed. What a process that was killed left of an
    earlier attempt is deleted; another that is writing the same target is left alone.

    Args:
        target: The file to write.
        mode: Who may read and write it, of whom the umask takes away: 0o600 for its user alone.

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
    temporary = final.parent / f"{_stem(final)}{uuid.uuid4().hex[:_TAG]}.tmp"
    held: int | None = None
    try:
        make_folder(final.parent)
        delete_abandoned(final)
        held = _held(temporary, mode)
        yield temporary
        _flush(temporary)
        os.replace(temporary, final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _is_about(error, temporary):
            raise explained(error, target) from error
        raise
    finally:
        if held is not None:
            os.close(held)
    _flush_name(final)


@contextlib.contextmanager
def atomic_folder(target: Path, *, first: bool = True) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the target's place, all that is in it on disk before.

    On any exception the temporary folder is removed and the target stays as it was. A target that is a link is replaced, not
    followed. One process or one run writes a target at a time: see :mod:`ncalign.core.locks`.

    Args:
        target: The folder to write.
        first: Whether this process makes the temporary folder and puts it in place. Others of the same run write into it
            between the moment when the first has entered and the moment when it leaves.

    Yields:
        The temporary folder, beside the target.

    Raises:
        OSError: The folder can't be written. The message names the target, also where a library raised a class of its own.
    """
    temporary, replaced = (target.with_name(f".{target.name}{suffix}.tmp") for suffix in ("", ".old"))
    try:
        if first:
            for left in (temporary, replaced):
                shutil.rmtree(left, ignore_errors=True)
            make_folder(temporary)
        yield temporary
        if first:
            for inner, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _flush(Path(inner, name))
                _flush(Path(inner))
            if target.is_symlink():
                target.unlink()
            elif target.is_dir():
                target.rename(replaced)
            temporary.rename(target)
            _flush_name(target)
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        found = _system_error(error)
        if found is not None:
            raise explained(found, target) from error
        raise


def delete_folder(folder: Path) -> None:
    """Delete a folder, if it is there, its name before anything in it: half of one is never taken for the whole."""
    doomed = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)  # by a process that was killed
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and have their names on disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _flush_name(path)


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


def _held(temporary: Path, mode: int) -> int:
    """Create a temporary file, with a lock that says until this process ends that someone is writing it."""
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, mode)
        if sys.platform == "win32":
            return descriptor
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before it was locked, another process may have taken it for abandoned.
        if temporary.exists():
            return descriptor
        os.close(descriptor)


def _stem(target: Path) -> str:
    """How the names of a target's temporary files begin."""
    return f".{target.name[:80]}."


def delete_abandoned(target: Path) -> None:
    """Delete the temporary files of a target that no process is writing."""
    folder, stem = target.parent, _stem(target)
    if sys.platform == "win32":
        return
    for left in folder.glob(glob.escape(stem) + "[0-9a-f]" * _TAG + ".tmp"):
        with contextlib.suppress(OSError):  # it is being written, or gone, or another user's
            descriptor = os.open(left, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(descriptor)


def _flush(path: Path) -> None:
    """Have a file's contents, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_name(path: Path) -> None:
    # Some file systems don't offer it for folders, and the file is complete either way.
    with contextlib.suppress(OSError):
        _flush(path.parent)

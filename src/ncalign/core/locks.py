"""Folders that one process at a time writes in."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ncalign.core.atomic import make_folder

if sys.platform != "win32":
    import fcntl

_locks: set[int] = set()


def _leave_locks() -> None:
    """In a process that was forked: a lock that it shared would outlive the process that took it."""
    while _locks:
        os.close(_locks.pop())


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_leave_locks)


@contextlib.contextmanager
def held(folder: Path, *, busy: str) -> Iterator[None]:
    """Make a folder and keep other processes out of it; folders that were made for it and stay empty are removed again.

    Args:
        folder: in which to write.
        busy: what to say where another process holds it.

    Raises:
        ValueError: another process holds it.
        OSError: it can't be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        with locked(folder, busy=busy):
            yield
    finally:
        # What fails before its first file leaves no trace; rmdir takes empty folders alone.
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def locked(folder: Path, *, busy: str | None) -> Iterator[None]:
    """Hold a folder's lock, which the system takes back however the process ends; without ``busy`` wait for it.

    Raises:
        ValueError: another process holds it; the message is ``busy``.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(busy) from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)

"""Who is asking what now: a question that costs time or money is asked once, also by threads and processes at the same time.

A claim is a lock on one byte of an empty file beside the answers; the question's key says on which. The system takes it back
however its process ends, so that no claim outlives its owner and nothing is left to be cleaned up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# A file's offsets have 63 bits; two of even a billion keys hardly share one of 60.
_DIGITS = 15
_HELD_BY_ANOTHER = frozenset({errno.EACCES, errno.EAGAIN})


class Claims:
    """The claims on the questions of one store; threads and processes share them.

    Args:
        path: of the lock file; None where the store is this process's alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._guard = path, threading.Lock()
        self._held: set[str] = set()
        self._descriptor: int | None = None

    def take(self, key: str) -> bool:
        """Claim a question; false where another thread or process has it. The key is a hexadecimal digest."""
        with self._guard:
            if key in self._held or not self._locked(key):
                return False
            self._held.add(key)
            return True

    def give_back(self, key: str) -> None:
        """End a claim."""
        with self._guard:
            self._held.discard(key)
            if self._descriptor is not None:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, int(key[:_DIGITS], 16))

    def delete(self) -> None:
        """Delete the lock file."""
        with self._guard:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def _locked(self, key: str) -> bool:
        if self._path is None or sys.platform == "win32":
            return True
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:_DIGITS], 16))
        except OSError as error:
            # Some network file systems have no locks: there, processes may ask the same at the same time.
            return error.errno not in _HELD_BY_ANOTHER
        return True


_shared: dict[Path, Claims] = {}
_sharing = threading.Lock()


def claims_of(path: Path) -> Claims:
    """The claims on the questions of a store's file: one object in a process, since the system's locks are the process's."""
    if str(path) == ":memory:":
        return Claims(None)
    place = Path(os.path.realpath(path))
    with _sharing:
        return _shared.setdefault(place, Claims(place.with_name(f"{place.name}-claims")))

"""Foreign code in this thread that has to end: stopped from outside, in any thread and any worker process."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
_TICK_SECONDS = 0.25


class _OverdueError(BaseException):
    """Raised in the thread that is late; no ``except Exception`` on the way takes it."""


class _Watch:
    """Counts down for the threads that are at work; its own thread lives while there are any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ticks_left: dict[int, int] = {}
        self.thread: threading.Thread | None = None

    def enter(self, ticks: int) -> None:
        with self.lock:
            self.ticks_left[threading.get_ident()] = ticks
            if self.thread is None:
                self.thread = threading.Thread(target=self._count, name="deadline", daemon=True)
                self.thread.start()

    def leave(self) -> bool:
        """Whether this thread was in time."""
        with self.lock:
            return self.ticks_left.pop(threading.get_ident(), None) is not None

    def _count(self) -> None:
        while True:
            # Ticks, not a clock: a process that was stopped for an hour is not late by one.
            time.sleep(_TICK_SECONDS)
            with self.lock:
                for thread in list(self.ticks_left):
                    self.ticks_left[thread] -= 1
                    if self.ticks_left[thread] <= 0:
                        del self.ticks_left[thread]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_OverdueError))
                if not self.ticks_left:
                    self.thread = None
                    return


_watch = _Watch()


def _renew() -> None:
    # A forked process has no thread that counts, and another thread may have held the lock.
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_renew)


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """Call a function that runs Python code for at most so many seconds; one call within another has no deadline of its own.

    A single call into compiled code, such as the making of a huge string, ends before it is stopped.

    Raises:
        TimeoutError: the time was up.
    """
    if threading.get_ident() in _watch.ticks_left:
        return function()
    try:
        try:
            _watch.enter(max(1, round(seconds / _TICK_SECONDS)))
            return function()
        finally:
            if not _watch.leave() and not isinstance(sys.exc_info()[1], _OverdueError):
                # It is under way, and must not arrive elsewhere.
                while True:
                    time.sleep(_TICK_SECONDS)
    except _OverdueError:
        raise TimeoutError(f"it took more than {seconds:g} s") from None

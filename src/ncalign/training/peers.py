"""Processes that train together end together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextlib.contextmanager
def another_process_named() -> Iterator[None]:
    """Report a failure caused by another process's end as such: that process's message holds the cause.

    Raises:
        ValueError: in place of the communication library's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise ValueError("another process of this run has stopped; its own message says why") from error

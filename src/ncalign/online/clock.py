"""Where a round's wall time goes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping


class Clock:
    """Seconds in each phase; phases of several threads may overlap."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside."""
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def shares(seconds: Mapping[str, float]) -> str:
    """One line: each phase's seconds, and its share of their sum.

    >>> shares({"generate": 3.0, "train": 1.0})
    'generate 3 s (75 %), train 1 s (25 %)'
    """
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{name} {value:.0f} s ({value / total:.0%})".replace("%", " %") for name, value in seconds.items())

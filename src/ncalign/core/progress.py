"""Progress on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ncalign.core.terminal import visible

_LINE_EVERY_SECONDS = 15.0


def say(text: str) -> None:
    """A line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(visible(text), markup=False)


class Bar:
    """Counts units of work done (``completed`` of them by an earlier run), with a note beside the count and the time left."""

    def __init__(self, description: str, total: int | None, *, completed: int = 0, shown: bool = True) -> None:
        description = visible(description)
        self._description, self._total, self._done, self._shown = description, total, completed, shown
        self._skipped = completed
        self._started = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._live = shown and console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(description, total=total, completed=completed, note="")

    def __enter__(self) -> Bar:
        """Show it."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the last state standing."""
        self._bar.stop()
        if self._shown and not self._live and kind is None:
            say(f"{self._description}: {self._count()} in {time.monotonic() - self._started:.0f} s")

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Count work done."""
        self._done += amount
        self._bar.update(self._task, advance=amount, note=visible(note))
        now = time.monotonic()
        if not self._shown or self._live or now - self._last_line <= _LINE_EVERY_SECONDS or self._done == self._total:
            return
        self._last_line = now
        rate = (self._done - self._skipped) / max(now - self._started, 1e-9)
        left = "" if self._total is None else f"ETA {(self._total - self._done) / max(rate, 1e-9):.0f} s"
        say(f"{self._description}: {self._count()} {note} {left}".rstrip())

    def _count(self) -> str:
        return str(self._done) if self._total is None else f"{self._done}/{self._total}"

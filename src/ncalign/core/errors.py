"""Errors about the user's data and configuration, and the words that they are written in."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


class DataError(ValueError):
    """Data that can't be used: the message says what was found, where, what is needed and what to do.

    Args:
        message: The text for the user.
        reason: The kind of problem in a few words; reports count rows by it.
    """

    def __init__(self, message: str, *, reason: str = "invalid value") -> None:
        """Keep the message and the kind of problem."""
        super().__init__(message)
        self.reason = reason

    def within(self, where: str) -> DataError:
        """Return the same error with its place (file, line) in front of the message."""
        return DataError(f"{where}: {self}", reason=self.reason)


class ConfigError(ValueError):
    """A configuration that can't be used; ``problems`` holds one line for each mistake found."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Keep the list of problems; the message is all of them."""
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class MissingPackageError(ValueError):
    """An optional package is not installed: the message names it, and the extra of ncalign that brings it."""


def shown(value: object) -> str:
    """Return a value and its kind as JSON calls it, cut to a length that fits an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"{_REPR.repr(value)} (a string)"
    if isinstance(value, int | float):
        # A huge int has more digits than Python agrees to print.
        text = f"of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 256 else repr(value)
        return f"{text} (a number)"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with keys {names(value)}" if value else "an empty object"
    return f"a Python {type(value).__name__}"


def names(keys: Iterable[object], limit: int = 12) -> str:
    """Return names in back-quotes, separated by commas, the first ``limit`` of them."""
    listed = [str(key)[:60] for key in keys]
    # What can't be printed is escaped: a name stands on one line.
    text = ", ".join(f"`{name if name.isprintable() else repr(name)[1:-1]}`" for name in listed[:limit])
    return f"{text} and {len(listed) - limit} more" if len(listed) > limit else text


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that ``name`` most likely stands for, or None.

    >>> nearest("rewards", ["completion", "reward"])
    'reward'
    >>> nearest("dataset", ["completion", "reward"])
    """
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return found[0] if found else None

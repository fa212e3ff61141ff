"""JSON files that a verb wrote and reads again: whoever damages or edits one is told what is wrong in it, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

Kept = TypeVar("Kept")


def read_kept(path: Path, form: TypeAdapter[Kept], *, remedy: str) -> Kept:
    """The contents of a file, if they have the form in which they were written.

    Args:
        path: the file.
        form: what is in it.
        remedy: what to do where it is damaged.

    Raises:
        ValueError: it can't be read, or something else is in it.
    """
    try:
        return form.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_first(error)}): {remedy}") from error


def _first(error: Exception) -> str:
    """The first thing that is wrong, with its place in the file."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, found["loc"]))
    return f"{place}: {found['msg']}" if place else found["msg"]

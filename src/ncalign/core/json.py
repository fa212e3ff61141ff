"""Results as JSON takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class _Array(Protocol):
    """A NumPy array or number; NumPy itself is not imported, since the command line starts with this module."""

    def tolist(self) -> Any: ...


def json_ready(result: object) -> Any:
    """A result, or a list or mapping of results, as JSON values: objects by field name, and null for NaN and infinities.

    Raises:
        TypeError: it holds something that JSON has no form for.

    >>> json_ready({"loss": float("nan"), "interval": (0.5, float("inf"))})
    {'loss': None, 'interval': [0.5, None]}
    """
    if is_dataclass(result) and not isinstance(result, type):
        return {field.name: json_ready(getattr(result, field.name)) for field in fields(result)}
    if isinstance(result, Mapping):
        return {str(key): json_ready(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [json_ready(value) for value in result]
    if isinstance(result, float):
        return float(result) if math.isfinite(result) else None
    if result is None or isinstance(result, str | int):
        return result
    if isinstance(result, _Array):
        return json_ready(result.tolist())
    raise TypeError(f"{type(result).__name__} has no form in JSON")


def read_results(path: Path) -> dict[str, Any]:
    """The results that a verb wrote to a file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and rerun the verb that wrote it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no object): delete it, and rerun the verb that wrote it")
    return found

"""Names of a package that are imported when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importer(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` (PEP 562): the command line must answer before torch is loaded.

    Args:
        package: The package's name.
        homes: The module in which each name lies, and the name there where it differs: ``module`` or ``module:name``.

    Example:
        >>> importer("package", {"sqrt": "math"})("sqrt")(4.0)
        2.0
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, other = homes[name].partition(":")
        return getattr(import_module(module), other or name)

    return find

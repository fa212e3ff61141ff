"""Names of a package that are imported when they are first used: the command line must answer before torch is loaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def importer(package: str, **modules: str) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` (PEP 562).

    Args:
        package: The package's name.
        modules: The names that lie in each of its modules, separated by spaces; ``name:other`` where it is called other there.

    Example:
        >>> importer("os", path="join split")("join")("a", "b")
        'a/b'
    """
    entries = [(module, *entry.partition(":")[::2]) for module, names in modules.items() for entry in names.split()]
    homes = {name: (module, other or name) for module, name, other in entries}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        return getattr(import_module(f"{package}.{module}"), attribute)

    return find

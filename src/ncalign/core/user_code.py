"""The user's own functions, loaded by name; loading runs their code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def load_named(name: str, *, what: str, others: str = "") -> Callable[..., object]:
    """The function named by ``package.module:function`` or ``path/file.py:function``.

    Messages say ``what`` it is for, and which ``others`` names the caller takes besides.

    Raises:
        ValueError: the name has another form, or the module or the function in it can't be had.
    """
    module_name, colon, function_name = name.rpartition(":")
    if not colon or not module_name or not function_name.isidentifier():
        forms = ", ".join(["'package.module:function'", "'file.py:function'"]) + (f" or {others}" if others else "")
        raise ValueError(f"{what} is {name!r}; {forms} is needed")
    module = _load_file(Path(module_name), name, what) if module_name.endswith(".py") else _load_module(module_name, name, what)
    function = getattr(module, function_name, None)
    if not callable(function):
        found = ", ".join(sorted(key for key, value in vars(module).items() if inspect.isfunction(value))) or "none"
        raise ValueError(f"{what} {name!r}: {module_name} has no function {function_name!r}; its functions are: {found}")
    return function  # type: ignore[no-any-return]


def _load_module(module_name: str, name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise ValueError(f"{what} {name!r}: {module_name} can't be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path, name: str, what: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{what} {name!r}: there is no file {path}; relative paths start at {Path.cwd()}")
    module_name = f"ncalign_{what}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    # Python has a loader for every name that ends in .py.
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickled workers look their module up by its name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything while it runs
        raise ValueError(f"{what} {name!r}: {path} can't be run: {type(error).__name__}: {error}") from error
    return module

"""Digests of the user's own code, by which a run that goes on notices that it changed."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType

_INSTALLED = tuple(Path(path) for name, path in sysconfig.get_paths().items() if name.endswith(("lib", "stdlib")))
_OUR_PACKAGE = Path(__file__).parents[1]
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_digest(name: str | None) -> str:
    """A digest of the code that a function's name stands for, to notice changes.

    It covers the file and, as its imports lead there, the user's other modules; not installed packages, nor what the code
    reads when it runs.

    Args:
        name: ``path/file.py:function`` or ``package.module:function``; None for no function.

    Returns:
        The digest; empty for a function of an installed package, or for none.
    """
    module = (name or "").rpartition(":")[0]
    start = Path(module) if module.endswith(".py") else _file_of(module)
    if start is None or not _is_own_file(start):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    waiting, seen = [(start, module.rpartition(".")[0])], {start.resolve()}
    while waiting:
        path, package = waiting.pop(0)
        data = path.read_bytes()
        digest.update(hashlib.blake2b(data).digest())
        for imported in _imported(data, package):
            found = _file_of(imported)
            if found is not None and found.resolve() not in seen and not _is_installed(found):
                seen.add(found.resolve())
                waiting.append((found, imported.rpartition(".")[0]))
    return digest.hexdigest()


def value_digest(value: object) -> str:
    """A digest of a value that is composed of functions, such as a method of the user's own, to notice changes.

    Of the user's functions it covers the compiled code, defaults, what they close over, and the globals that they name; of
    installed packages' the name and what they close over.
    """
    return hashlib.blake2b(repr(_described(value, {})).encode(), digest_size=16).hexdigest()


def _file_of(module: str) -> Path | None:
    """The file of a module, which is not imported, though the packages that it lies in are."""
    # They may raise anything, and whoever imports the module says so.
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec(module) if module else None
        if spec is not None and spec.origin is not None and spec.has_location:
            return Path(spec.origin)
    return None


def _is_installed(path: Path) -> bool:
    place = path.resolve()
    inside = any(place.is_relative_to(folder.resolve()) for folder in (*_INSTALLED, _OUR_PACKAGE))
    return inside or "site-packages" in place.parts


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not _is_installed(path)


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Names of the modules that a source imports, in their order; some may be names of what is in a module."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):
                name = "." * node.level + (node.module or "")
                base = importlib.util.resolve_name(name, package) if node.level else name
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _described(value: object, seen: dict[int, object]) -> object:
    """A value as one whose text is the same in every process: no addresses, no order of sets."""
    if isinstance(value, _PLAIN):
        return value
    if id(value) in seen:
        return "again"
    seen[id(value)] = value  # held, so that nothing else gets its id

    def inside(part: object) -> object:
        return _described(part, seen)

    if isinstance(value, Mapping):
        return [(inside(key), inside(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [inside(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(inside(item)) for item in value)
    if isinstance(value, partial):
        return ["partial", inside(value.func), inside(value.args), inside(value.keywords)]
    if isinstance(value, MethodType):
        return ["method", inside(value.__self__), inside(value.__func__)]
    if isinstance(value, staticmethod | classmethod):
        return inside(value.__func__)
    if isinstance(value, property):
        return inside(value.fget)
    if isinstance(value, FunctionType):
        return _described_function(value, seen)
    if isinstance(value, ModuleType):
        return f"{value.__name__} {code_digest(f'{value.__name__}:')}"
    return _described_class(value, seen) if isinstance(value, type) else _described_object(value, seen)


def _described_object(value: object, seen: dict[int, object]) -> object:
    if hasattr(value, "__wrapped__"):  # a function with a cache
        return _described(value.__wrapped__, seen)
    kind = _described(type(value), seen)
    if is_dataclass(value):
        return [kind, [(field.name, _described(getattr(value, field.name), seen)) for field in fields(value)]]
    numbers = getattr(value, "tolist", None)
    if callable(numbers):  # an array or a tensor
        return [kind, _described(numbers(), seen)]
    # Of other objects of installed packages the class is all that is known.
    return [kind, _described(vars(value), seen)] if hasattr(value, "__dict__") and not _is_of_installed(type(value)) else kind


def _described_function(function: FunctionType, seen: dict[int, object]) -> object:
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and not _is_own_file(Path(function.__code__.co_filename)):
        # Of a library's decorator, such as a check of types, which may hold what differs from call to call.
        return _described(wrapped, seen)
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    closed = _described([*cells, function.__defaults__, function.__kwdefaults__], seen)
    if _is_of_installed(function):
        return [function.__module__, function.__qualname__, closed]
    named = sorted(set(_names(function.__code__)) & function.__globals__.keys())
    return [
        _described_code(function.__code__, seen),
        closed,
        [(one, _described(function.__globals__[one], seen)) for one in named],
    ]


def _described_class(kind: type, seen: dict[int, object]) -> object:
    if _is_of_installed(kind):
        return f"{kind.__module__}.{kind.__qualname__}"
    own = {name: part for name, part in vars(kind).items() if not (name.startswith("__") and not callable(part))}
    return [kind.__qualname__, [(name, _described(own[name], seen)) for name in sorted(own)]]


def _described_code(code: CodeType, seen: dict[int, object]) -> list[object]:
    constants = [_described_code(one, seen) if isinstance(one, CodeType) else _described(one, seen) for one in code.co_consts]
    return [code.co_code, constants, code.co_names, code.co_varnames]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _names(one)


def _is_filled(cell: object) -> bool:
    try:
        cell.cell_contents  # type: ignore[attr-defined]  # noqa: B018
    except ValueError:
        return False
    return True


def _is_of_installed(value: FunctionType | type) -> bool:
    if value.__module__ == "builtins":
        return True
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    return file is not None and _is_installed(Path(file))

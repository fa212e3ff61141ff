"""YAML from elsewhere, read within bounds: of a few lines of aliases nothing else can be expected to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**18
MOST_VALUES = 100_000
MOST_DEPTH = 50


class BoundsError(ValueError):
    """YAML that is larger, deeper or fuller than what is read; the message says how, and names no file."""


def read_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        BoundsError: it is larger than `MOST_BYTES`.
        OSError: it can't be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise BoundsError(f"it is larger than {MOST_BYTES >> 10} KiB, which is the most that is read: is it the right file?")
    return data.decode("utf-8")


def compose(text: str) -> yaml.Node | None:
    """The tree of a document, in which an alias is the node that it stands for; None where the document is empty.

    Raises:
        BoundsError: it holds too many values once its aliases are written out, or is nested too deeply.
        yaml.YAMLError: it is not well-formed.
    """
    deep = f"it is nested more than {MOST_DEPTH} levels deep, which is the most that is read"
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values, depth = (0, 0) if node is None else _extent(node, {})
    except RecursionError:
        raise BoundsError(deep) from None
    if values > MOST_VALUES:
        count = f"{values:,}" if values < 10**12 else "more than 10^12"
        raise BoundsError(
            f"it holds {count} values once its aliases are written out; {MOST_VALUES:,} are the most that are read"
        )
    if depth > MOST_DEPTH:
        raise BoundsError(deep)
    return node


def load(text: str) -> Any:
    """The values of a document, as ``yaml.safe_load`` reads them.

    Raises:
        BoundsError: see :func:`compose`.
        yaml.YAMLError: it is not well-formed.
    """
    compose(text)
    return yaml.safe_load(text)


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values in a node with its aliases written out, and how deep they are nested."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) not in known:
        # Until it is known: an alias within its own anchor adds nothing.
        known[id(node)] = (0, 0)
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        values, depth = 1, 0
        for part in inner:
            more, below = _extent(part, known)
            values, depth = values + more, max(depth, below)
        known[id(node)] = (values, depth + 1)
    return known[id(node)]

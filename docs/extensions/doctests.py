"""Draws the doctests of docstrings as code; Markdown would take their ``>>>`` for nested quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts a fence around every doctest before the docstring is read as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Text in which a doctest, from its first ``>>>`` to the next blank or less indented line, is a fenced block."""
    lines: list[str] = []
    fence: str | None = None
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if fence is not None and (not line.strip() or not line.startswith(fence.rstrip("`"))):
            lines.append(fence)
            fence = None
        if fence is None and line.startswith(f"{indent}>>> "):
            fence = indent + "`" * max([3, *(1 + len(run) for run in re.findall("`+", text))])
            lines.append(f"{fence}pycon")
        lines.append(line)
    return "\n".join([*lines, *([fence] if fence is not None else [])])

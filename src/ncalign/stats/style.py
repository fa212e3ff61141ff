"""An answer's length and markdown, which influence judges whatever the answer says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

FEATURES = ("length", "headers", "lists", "bold")

_CODE = re.compile(r"```[^`]*```")
# Keyed by Arena-Hard-Auto's names.
_MARKDOWN = {
    "header_count": {f"h{level}": re.compile(rf"^#{{{level}}}\s", re.MULTILINE) for level in range(1, 7)},
    "list_count": {
        "ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE),
        "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE),
    },
    "bold_count": {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")},
}


@dataclass(frozen=True)
class Style:
    """The counts by which an answer's style is measured; headers of any level, list items numbered and bulleted."""

    num_tokens: int
    num_headers: int
    num_list_items: int
    num_bold: int


def style_of(text: str, num_tokens: int) -> Style:
    r"""Count an answer's markdown outside fenced code.

    >>> style_of("# Title\n- one\n2. **two**", num_tokens=12)
    Style(num_tokens=12, num_headers=1, num_list_items=2, num_bold=1)
    """
    return Style(num_tokens, *(sum(counts.values()) for counts in markdown_counts(text).values()))


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    r"""Counts of markdown outside fenced code, in the form in which Arena-Hard-Auto stores them.

    >>> markdown_counts("# A\n**b** and __c__")["bold_count"]
    {'**': 1, '__': 1}
    """
    prose = _CODE.sub("", text)
    return {name: {kind: len(pattern.findall(prose)) for kind, pattern in kinds.items()} for name, kinds in _MARKDOWN.items()}


def style_differences(ours: Sequence[Style], theirs: Sequence[Style]) -> Float[NDArray[np.float64], "N 4"]:
    """Normalised differences of length, headers, lists and bold spans, each in [-1, 1]; 0 where neither answer has any.

    Length: ``(a - b) / (a + b)`` in tokens. The others: ``(r_a - r_b) / (r_a + r_b + 1)`` of the counts for each token,
    ``r = count / (tokens + 1)``.

    Source: Arena-Hard-Auto, ``show_result.py``.
    """
    first, second = _counts(ours), _counts(theirs)
    total = first[:, 0] + second[:, 0]
    length = np.divide(first[:, 0] - second[:, 0], total, out=np.zeros_like(total), where=total != 0)
    first_rate, second_rate = first[:, 1:] / (first[:, :1] + 1), second[:, 1:] / (second[:, :1] + 1)
    return np.column_stack([length, (first_rate - second_rate) / (first_rate + second_rate + 1)])


def _counts(styles: Sequence[Style]) -> NDArray[np.float64]:
    return np.array([astuple(style) for style in styles], dtype=np.float64).reshape(-1, len(FEATURES))

"""Answers that several runs gave to the same held-out prompts while they trained, from their samples.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ncalign.data.rendering import transcript

_PROMPTS = 40


def last_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A run's answers at the last step at which it gave any, by prompt.

    >>> last_answers([{"step": 0, "prompt": "2 + 2 =", "completion": "5"}, {"step": 9, "prompt": "2 + 2 =", "completion": "4"}])
    {'2 + 2 =': '4'}
    """
    last = max((row["step"] for row in rows), default=None)
    return {shown_text(row["prompt"]): row["completion"] for row in rows if row["step"] == last}


def side_by_side(runs: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str | None]]]:
    """Prompts that several runs answered, with each run's answer in the runs' order; None of one that gave none.

    >>> side_by_side([{"a": "1", "b": "2"}, {"b": "3"}, {}])
    [('b', ['2', '3', None])]
    """
    prompts = dict.fromkeys(prompt for answers in runs for prompt in answers)
    rows = [(prompt, [answers.get(prompt) for answers in runs]) for prompt in prompts]
    return [row for row in rows if sum(answer is not None for answer in row[1]) > 1][:_PROMPTS]


def shown_text(value: str | list[dict[str, Any]]) -> str:
    """A prompt or completion as a page shows it: a text, or messages under their roles."""
    return value if isinstance(value, str) else transcript(value)

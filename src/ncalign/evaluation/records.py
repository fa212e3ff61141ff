"""What evaluation is about: questions, models' answers, and what judges said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LABELS: Mapping[str, float] = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
"""Arena-Hard's verdicts, with the preference for A that each stands for."""
STRONG_WEIGHT = 3
"""How many times a verdict of ``>>`` counts in Arena-Hard's score."""


def model_name(spec: str) -> str:
    """What tables call a model: its folder's or file's name; the run's where the folder is a run's ``model/``.

    >>> model_name("HuggingFaceTB/SmolLM2-135M"), model_name("answers/new.jsonl")
    ('SmolLM2-135M', 'new')
    """
    path = Path(spec).resolve()
    if path.is_dir() and path.name == "model" and path.parent.name:
        return path.parent.name
    return path.name.removesuffix(".jsonl").removesuffix(".json") or spec


def verdict_weight(label: str) -> int:
    """How many times a verdict counts."""
    return STRONG_WEIGHT if ">>" in label else 1


@dataclass(frozen=True)
class Question:
    """One question of a set.

    Attributes:
        id: names it within its set.
        turns: what the user says; MT-Bench has two turns, the other sets one.
        category: MT-Bench's category, AlpacaEval's dataset, Arena-Hard's category; empty where there is none.
        references: a right answer to each turn, where the set has them.
        metadata: whatever else is known, such as a checkable instruction's names and arguments.
    """

    id: str
    turns: tuple[str, ...]
    category: str = ""
    references: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question, a text for each of its turns.

    Attributes:
        question: the question's id.
        model: who answered.
        turns: the answers.
        num_tokens: tokens of each; empty where they were not counted.
    """

    question: str
    model: str
    turns: tuple[str, ...]
    num_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Game:
    """One judgement of two answers, shown in one order.

    Attributes:
        question: the question's id.
        model: whose answer is measured.
        baseline: whose it is measured against.
        model_first: whether the model's answer was shown first.
        preference: 1 where the model's answer is better, 0 where the baseline's is, between them in part; None where there is
            no verdict, which is neither a loss nor a tie.
        weight: how many times it counts: 3 for Arena-Hard's strong verdicts, else 1.
        verdict: the judge's own label, such as ``A>>B``; empty where log-probs were read.
    """

    question: str
    model: str
    baseline: str
    model_first: bool
    preference: float | None
    weight: int = 1
    verdict: str = ""


@dataclass(frozen=True)
class Rating:
    """One judgement of one answer on its own.

    Attributes:
        question: the question's id.
        model: who answered.
        turn: which of its answers, from 1.
        category: the question's.
        score: the rating; None where there is none, which is no 0.
    """

    question: str
    model: str
    turn: int
    category: str
    score: float | None

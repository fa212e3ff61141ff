"""Verdicts of judges: comparisons of two answers, and ratings of one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Game:
    """One judgement of two answers, shown in one order.

    Attributes:
        question: the question's id.
        model: whose answer is measured.
        baseline: whose answer it is measured against.
        model_first: whether the model's answer was shown first.
        preference: from 0 (the baseline's answer is better) to 1 (the model's is); None where there is no verdict, which is
            neither a loss nor a tie.
        weight: how many times it counts: 3 for Arena-Hard's strong verdicts, else 1.
        verdict: the judge's own label, such as ``A>>B``; empty where log-probs were read.

    Raises:
        ValueError: the preference is outside [0, 1].
    """

    question: str
    model: str
    baseline: str
    model_first: bool
    preference: float | None
    weight: int = 1
    verdict: str = ""

    def __post_init__(self) -> None:
        """Refuse a preference outside [0, 1]."""
        if self.preference is not None and not 0 <= self.preference <= 1:
            raise ValueError(
                f"question {self.question!r}, {self.model} against {self.baseline}: the preference is {self.preference}; "
                "a number from 0 (the baseline is better) to 1 (the model is) is needed"
            )


@dataclass(frozen=True)
class Rating:
    """One judgement of one answer on its own.

    Attributes:
        question: the question's id.
        model: who answered.
        turn: which of its answers, from 1.
        category: the question's.
        score: the rating; None where there is none, which is not a rating of 0.
    """

    question: str
    model: str
    turn: int
    category: str
    score: float | None

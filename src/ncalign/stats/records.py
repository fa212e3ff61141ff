"""What judges said of answers: comparisons of two, and ratings."""

from __future__ import annotations

from dataclasses import dataclass


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

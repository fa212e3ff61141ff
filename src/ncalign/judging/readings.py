"""Pairs of answers to read, with what judges said of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ncalign.judging.records import Answer, Answers, Question
from ncalign.stats.preferences import order_preferences
from ncalign.stats.records import Game, Rating


def pairs_to_read(
    questions: Sequence[Question],
    answers: Mapping[str, Answers],
    games: Iterable[Game],
    *,
    other_judge: Iterable[Game] | None = None,
    ordered: bool,
) -> list[dict[str, Any]]:
    """A row for each question and pair of models: both answers, the preference, and what each order and each judge said.

    Args:
        questions: of the set.
        answers: by model.
        games: judged.
        other_judge: games of a second judge.
        ordered: whether the orders were judged one by one, and are worth telling.

    Returns:
        Rows with ``preference`` from 0 (the baseline's answer) to 1 (the model's), ``shown_first`` and ``shown_second`` (the
        same where the model's answer was shown first and second) and ``other_judge``; null where there is no verdict.
    """
    asked = {question.id: question for question in questions}
    others = {} if other_judge is None else order_preferences(other_judge)
    rows = []
    for (name, model, baseline), (first, second) in order_preferences(games).items():
        question = asked[name]
        row = _pair(question, answers[model][name], answers[baseline][name])
        row["preference"] = _mean(first, second)
        if ordered:
            row |= {"shown_first": _known(first), "shown_second": _known(second)}
        if other_judge is not None:
            row["other_judge"] = _mean(*others.get((name, model, baseline), (math.nan, math.nan)))
        rows.append(row)
    return rows


def ratings_to_read(
    questions: Sequence[Question], answers: Mapping[str, Answers], ratings: Sequence[Rating]
) -> list[dict[str, Any]]:
    """A row for each question and model but the first: its answer beside the first one's, with their mean ratings."""
    scores: dict[tuple[str, str], list[float]] = {}
    for rating in ratings:
        if rating.score is not None:
            scores.setdefault((rating.question, rating.model), []).append(rating.score)
    first, *others = answers
    rows = []
    for question in questions:
        for other in others:
            if question.id in answers[first] and question.id in answers[other]:
                row = _pair(question, answers[first][question.id], answers[other][question.id])
                for field, model in (("rating", first), ("baseline_rating", other)):
                    known = scores.get((question.id, model), [])
                    row[field] = math.fsum(known) / len(known) if known else None
                rows.append(row)
    return rows


def _pair(question: Question, ours: Answer, theirs: Answer) -> dict[str, Any]:
    return {
        "question": question.id,
        "category": question.category,
        "prompt": "\n\n".join(question.turns),
        "model": ours.model,
        "baseline": theirs.model,
        "answer": "\n\n".join(ours.turns),
        "baseline_answer": "\n\n".join(theirs.turns),
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(first: float, second: float) -> float | None:
    """The mean of both orders; None where one has no verdict, since such a question counts nowhere."""
    return _known((first + second) / 2)

"""MT-Bench: mean ratings by turn and by category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ncalign.stats.intervals import Interval, mean_interval
from ncalign.stats.records import Rating

# MT-Bench asks for 1 to 10; some judges give 0, and FastChat counts it.
LOWEST, HIGHEST = 0.0, 10.0


@dataclass(frozen=True)
class MeanScore:
    """Mean of some ratings.

    Attributes:
        mean: NaN where none has a score.
        ci: 95 % interval of ``mean``; a question's turns stay together. NaN for one question.
        num_counted: ratings with a score.
        num_missing: ratings without, which are left out.
    """

    mean: float
    ci: Interval
    num_counted: int
    num_missing: int


@dataclass(frozen=True)
class MTBench:
    """One model's scores.

    Attributes:
        overall: of all ratings, both turns together.
        turns: by turn, from 1.
        categories: both turns together, in the order of their names.
    """

    model: str
    overall: MeanScore
    turns: Mapping[int, MeanScore]
    categories: Mapping[str, MeanScore]


def mt_bench(ratings: Iterable[Rating]) -> tuple[MTBench, ...]:
    """Plain means of ratings: every rating with a score counts once. Best model first.

    Raises:
        ValueError: there are no ratings, a score is outside 0 to 10 (FastChat's -1 is None here), or an answer was rated twice.

    Source: FastChat, ``llm_judge/show_result.py``, mode ``single``.

    >>> made = [Rating("81", "new", 1, "writing", 9.0), Rating("81", "new", 2, "writing", 6.0),
    ...         Rating("101", "new", 1, "reasoning", 3.0), Rating("101", "new", 2, "reasoning", None)]
    >>> (new,) = mt_bench(made)
    >>> new.overall.mean, new.turns[1].mean, new.turns[2].mean, new.categories["writing"].mean, new.overall.num_missing
    (6.0, 6.0, 6.0, 7.5, 1)
    """
    by_model: dict[str, list[Rating]] = {}
    for rating in _checked(ratings):
        by_model.setdefault(rating.model, []).append(rating)
    if not by_model:
        raise ValueError("there are no ratings: a score needs judged answers")
    scores = []
    for model, group in by_model.items():
        scores.append(
            MTBench(
                model=model,
                overall=_mean_score(group),
                turns={turn: _mean_score([r for r in group if r.turn == turn]) for turn in sorted({r.turn for r in group})},
                categories={
                    name: _mean_score([r for r in group if r.category == name]) for name in sorted({r.category for r in group})
                },
            )
        )
    # A model whose ratings are all missing comes last.
    return tuple(sorted(scores, key=lambda score: -score.overall.mean if score.overall.num_counted else 1.0))


def question_scores(ratings: Iterable[Rating], model: str) -> dict[str, float]:
    """One model's mean rating of each question over its rated turns; NaN where none has a score.

    Raises:
        ValueError: as :func:`mt_bench`.
    """
    by_question = _scores_by_question(rating for rating in _checked(ratings) if rating.model == model)
    return {question: float(np.mean(scores)) if scores else float("nan") for question, scores in by_question.items()}


def _checked(ratings: Iterable[Rating]) -> list[Rating]:
    every = list(ratings)
    seen = set()
    for rating in every:
        place = (rating.model, rating.question, rating.turn)
        if place in seen:
            raise ValueError(f"question {rating.question!r}, turn {rating.turn}: {rating.model}'s answer is rated twice")
        seen.add(place)
        if rating.score is not None and not LOWEST <= rating.score <= HIGHEST:
            raise ValueError(
                f"question {rating.question!r}, turn {rating.turn}: {rating.model} is rated {rating.score}; a number from "
                f"{LOWEST:g} to {HIGHEST:g}, or None where there is none, is needed"
            )
    return every


def _scores_by_question(ratings: Iterable[Rating]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = defaultdict(list)
    for rating in ratings:
        scores[rating.question] += [] if rating.score is None else [rating.score]
    return scores


def _mean_score(ratings: Sequence[Rating]) -> MeanScore:
    by_question = [scores for scores in _scores_by_question(ratings).values() if scores]
    num_counted = sum(map(len, by_question))
    totals = np.array([sum(scores) for scores in by_question])
    sizes = np.array([len(scores) for scores in by_question], dtype=np.float64)
    return MeanScore(
        mean=float(totals.sum() / num_counted) if num_counted else float("nan"),
        ci=mean_interval(totals, sizes=sizes, bounds=(LOWEST, HIGHEST)),
        num_counted=num_counted,
        num_missing=len(ratings) - num_counted,
    )

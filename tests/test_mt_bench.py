"""MT-Bench's means by hand, over recorded judgments, with missing ones left out; wins from ratings."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from ncalign.stats.mt_bench import mt_bench, question_scores
from ncalign.stats.paired import paired_values
from ncalign.stats.records import Rating

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
# Recorded by hand: (question, category, first turn, second turn); None where the judge gave no rating.
JUDGED = (
    ("81", "writing", 9, 8),
    ("82", "writing", 10, None),
    ("101", "reasoning", 3, 2),
    ("102", "reasoning", 7.5, 1),
    ("111", "math", None, None),
)


def recorded(model: str = "new", shift: float = 0) -> list[Rating]:
    return [
        Rating(question, model, turn, category, None if score is None else float(score) + shift)
        for question, category, *scores in JUDGED
        for turn, score in enumerate(scores, start=1)
    ]


def test_equals_a_hand_computation_on_recorded_judgments() -> None:
    (found,) = mt_bench(recorded())
    assert found.overall.mean == pytest.approx(float(Fraction(81, 2) / 7), abs=1e-12)  # 9+8+10+3+2+7.5+1 = 40.5
    assert found.turns[1].mean == pytest.approx(29.5 / 4, abs=1e-12)
    assert found.turns[2].mean == pytest.approx(11 / 3, abs=1e-12)
    assert found.categories["writing"].mean == 9
    assert found.categories["reasoning"].mean == pytest.approx(13.5 / 4, abs=1e-12)
    assert math.isnan(found.categories["math"].mean)
    assert (found.overall.num_counted, found.overall.num_missing) == (7, 3)
    assert (found.turns[2].num_counted, found.turns[2].num_missing) == (3, 2)
    assert (found.categories["math"].num_counted, found.categories["math"].num_missing) == (0, 2)


def test_a_missing_rating_changes_nothing_but_its_count() -> None:
    whole = mt_bench(recorded())[0]
    known = mt_bench([rating for rating in recorded() if rating.score is not None])[0]
    assert whole.overall.mean == known.overall.mean
    assert whole.overall.ci == known.overall.ci
    assert known.overall.num_missing == 0


def test_models_are_sorted_and_one_without_ratings_comes_last() -> None:
    silent = [Rating("81", "silent", 1, "writing", None)]
    found = mt_bench(silent + recorded("low", -0.5) + recorded("high"))
    assert [score.model for score in found] == ["high", "low", "silent"]
    assert found[0].overall.mean - found[1].overall.mean == pytest.approx(0.5, abs=1e-12)


def test_intervals_resample_questions_with_their_turns() -> None:
    # Both turns of a question have one score: 80 questions are 80 observations, not 160.
    rng = np.random.default_rng(0)
    scores = rng.integers(1, 11, size=80).astype(float)
    ratings = [
        Rating(f"{i}", "new", turn, CATEGORIES[i % 8], score)
        for (i, score), turn in itertools.product(enumerate(scores), (1, 2))
    ]
    low, high = mt_bench(ratings)[0].overall.ci
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / math.sqrt(80), rel=0.08)
    assert low < scores.mean() < high


def test_one_question_has_no_interval() -> None:
    (found,) = mt_bench([Rating("81", "new", 1, "writing", 5.0)])
    assert all(math.isnan(bound) for bound in found.overall.ci)


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ([], "no ratings"),
        ([Rating("81", "new", 1, "w", 11.0)], "question '81', turn 1: new is rated 11"),
        ([Rating("81", "new", 1, "w", -1.0)], "is rated -1"),
        ([Rating("81", "new", 1, "w", math.nan)], "is rated nan"),
        ([Rating("81", "new", 2, "w", 5.0)] * 2, "turn 2: new's answer is rated twice"),
    ],
)
def test_refuses_what_is_no_rating(ratings: list[Rating], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mt_bench(ratings)


def test_two_models_are_paired_by_question() -> None:
    ratings = recorded("old") + recorded("new", -0.5) + [Rating("999", "new", 1, "math", 5.0)]
    old, new = question_scores(ratings, "old"), question_scores(ratings, "new")
    assert old["82"] == 10  # its second turn has no rating
    assert math.isnan(old["111"])
    before, after, left_out = paired_values(old, new)
    assert before.tolist() == [8.5, 10, 2.5, 4.25]
    assert after == pytest.approx(before - 0.5, abs=1e-12)
    assert left_out == 2

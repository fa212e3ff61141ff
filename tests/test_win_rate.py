"""Win rates: alpaca-eval's numbers, both orders put together, missing verdicts, the matrix of many models."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_oracle import alpaca_metrics, annotations
from ncalign.stats.preferences import complete_games, from_alpaca_eval, question_preferences
from ncalign.stats.records import Game
from ncalign.stats.win_rate import WinRate, win_matrix, win_rate

NAMES = {"win_rate": "win_rate", "standard_error": "standard_error", "discrete_win_rate": "discrete_win_rate"} | {
    "num_wins": "n_wins",
    "num_losses": "n_wins_base",
    "num_ties": "n_draws",
    "num_counted": "n_total",
}


def game(question: str, first: bool, preference: float | None, model: str = "new", baseline: str = "old") -> Game:
    return Game(question, model, baseline, model_first=first, preference=preference)


def assert_equals_alpaca_eval(values: list[float | None]) -> WinRate:
    expected = alpaca_metrics().get_winrate([{"preference": value} for value in values])
    found = win_rate(from_alpaca_eval(values))
    for ours, theirs in NAMES.items():
        assert getattr(found, ours) == pytest.approx(expected[theirs], abs=1e-9, nan_ok=True), ours
    assert found.num_missing == len(values) - found.num_counted
    return found


@pytest.mark.parametrize("model", ["alpaca-7b", "gemma-2b-it"])
def test_equals_alpaca_eval_on_public_annotations(model: str) -> None:
    found = assert_equals_alpaca_eval([row["preference"] for row in annotations(model)])
    assert found.num_counted == 805


def test_equals_the_public_leaderboard() -> None:
    # The leaderboard's file lies in the package, computed by its authors.
    folder = Path(alpaca_metrics().__file__).parents[1] / "leaderboards" / "data_AlpacaEval_2"
    with (folder / "weighted_alpaca_eval_gpt4_turbo_leaderboard.csv").open(encoding="utf-8", newline="") as file:
        board = {row[""]: row for row in csv.DictReader(file)}
    for model in ("alpaca-7b", "gemma-2b-it"):
        found = win_rate(from_alpaca_eval([row["preference"] for row in annotations(model)]))
        for name in ("win_rate", "standard_error", "discrete_win_rate"):
            assert getattr(found, name) == pytest.approx(float(board[model][name]), abs=1e-6), name


@pytest.mark.parametrize("seed", range(5))
def test_equals_alpaca_eval_on_random_preferences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values: list[float | None] = [float(value) for value in rng.uniform(1, 2, size=300)]
    for i in rng.integers(300, size=90):
        values[i] = [None, 0.0, 1.0, 1.5, 2.0, float("nan")][rng.integers(6)]
    assert_equals_alpaca_eval(values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, None]), min_size=2, max_size=30).filter(any))
def test_missing_verdicts_change_nothing_but_their_own_count(values: list[float | None]) -> None:
    array = np.array([math.nan if value is None else value for value in values])
    known = array[~np.isnan(array)]
    result = win_rate(array)
    assert result == win_rate_or_nan_equal(result, win_rate(known), len(array) - len(known))
    assert result.win_rate == pytest.approx(100 * known.mean(), abs=1e-12)
    assert result.num_wins + result.num_losses + result.num_ties == result.num_counted == len(known)


def win_rate_or_nan_equal(result: WinRate, bare: WinRate, missing: int) -> WinRate:
    """``bare`` with the missing counted; ``result`` itself where NaN forbids comparing."""
    if bare.num_counted == 1:
        return result
    return WinRate(**(vars(bare) | {"num_missing": missing}))


def test_interval_covers_what_the_standard_error_says() -> None:
    result = win_rate(np.array([0.0, 1.0] * 200))
    assert result.standard_error == pytest.approx(100 * math.sqrt(0.25 * 400 / 399 / 400), abs=1e-12)
    assert result.ci == pytest.approx((50 - 1.96 * 2.5, 50 + 1.96 * 2.5), abs=0.4)


def test_one_verdict_has_no_error() -> None:
    result = win_rate(np.array([1.0, np.nan]))
    assert (result.win_rate, result.num_counted, result.num_missing) == (100.0, 1, 1)
    assert math.isnan(result.standard_error)
    assert all(math.isnan(bound) for bound in result.ci)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0.5, 1.5]), "preference 2 is 1.5"),
        (np.array([np.nan, np.nan]), "none of 2 questions"),
        (np.array([]), "none of 0 questions"),
        (np.zeros((2, 2)), r"shape \(2, 2\)"),
    ],
)
def test_refuses_what_is_no_preference(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        win_rate(values)


def test_refuses_a_foreign_scale_by_row() -> None:
    with pytest.raises(ValueError, match="row 3 has the preference"):
        from_alpaca_eval([1.0, 2.0, 0.5])


def test_a_judge_who_always_picks_the_first_gives_half() -> None:
    games = [game(f"q{i}", first, 1.0 if first else 0.0) for i in range(20) for first in (True, False)]
    found = win_rate(question_preferences(games).preferences)
    assert (found.win_rate, found.num_ties, found.num_counted) == (50.0, 20, 20)


def test_orders_are_averaged_before_they_meet_and_missing_ones_are_named() -> None:
    games = [
        # Judged twice in one order: 1 and 0 make 1/2; with 1 in the other order 3/4.
        *(game("twice", True, p) for p in (1.0, 0.0)),
        game("twice", False, 1.0),
        game("half", True, 1.0),
        game("half", False, None),
        game("none", True, None),
    ]
    strict = question_preferences(games)
    assert strict.questions == ("twice", "half", "none")
    assert strict.one_order == ("half",)
    assert strict.missing == ("none",)
    np.testing.assert_array_equal(strict.preferences, [0.75, np.nan, np.nan])
    assert strict.by_question["twice"] == 0.75
    loose = question_preferences(games, both_orders=False)
    assert loose.one_order == ()
    np.testing.assert_array_equal(loose.preferences, [0.75, 1.0, np.nan])


def test_refuses_games_of_two_pairs_and_of_none() -> None:
    with pytest.raises(ValueError, match="there are 2 pairs"):
        question_preferences([game("a", True, 1.0), game("a", True, 1.0, model="other")])
    with pytest.raises(ValueError, match="there are 0 pairs"):
        question_preferences([])


def test_complete_games_drop_a_question_for_one_pair_alone() -> None:
    whole = [game("a", True, 1.0), game("a", False, 0.0)]
    part = [game("a", True, 1.0, model="other"), game("a", False, None, model="other")]
    assert complete_games(whole + part) == (whole, 1)


def test_matrix_holds_the_pairs_rates_whichever_way_they_were_asked() -> None:
    rng = np.random.default_rng(0)
    games, truth = [], {}
    for one, two in (("a", "b"), ("c", "a"), ("b", "c")):
        values = rng.integers(0, 5, size=(30, 2)) / 4
        truth[one, two] = 100 * values.mean()
        games += [game(f"q{i}", first, float(values[i, int(first)]), one, two) for i in range(30) for first in (True, False)]
    # The same judgement told of the other model must not change anything.
    turned = [Game(g.question, g.baseline, g.model, not g.model_first, 1 - (g.preference or 0.0)) for g in games]
    for told in (games, turned):
        matrix = win_matrix(told)
        place = {name: i for i, name in enumerate(matrix.models)}
        for (one, two), rate in truth.items():
            assert matrix.rates[place[one], place[two]] == pytest.approx(rate, abs=1e-9)
            assert matrix.rates[place[two], place[one]] == pytest.approx(100 - rate, abs=1e-9)
        means = np.nanmean(matrix.rates, axis=1)
        assert list(means) == sorted(means, reverse=True)
        assert np.isnan(matrix.rates.diagonal()).all()


def test_matrix_shows_who_never_met_and_what_is_missing() -> None:
    games = [game("q", first, 1.0, "a", "b") for first in (True, False)]
    games += [game("q", True, None, "c", "b"), game("r", True, None, "c", "b")]
    matrix = win_matrix(games)
    assert matrix.models == ("a", "b", "c")
    np.testing.assert_array_equal(matrix.rates, [[np.nan, 100, np.nan], [0, np.nan, np.nan], [np.nan] * 3])
    assert matrix.num_missing[1, 2] == 2
    with pytest.raises(ValueError, match="compared with itself"):
        win_matrix([game("q", True, 1.0, "a", "a")])
    with pytest.raises(ValueError, match="no games"):
        win_matrix([])

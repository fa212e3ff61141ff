"""Judges: position bias, length bias, agreement; and what a set's size can show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from ncalign.stats.agreement import judge_agreement, length_bias, position_bias
from ncalign.stats.power import detectable_difference
from ncalign.stats.preferences import question_preferences
from ncalign.stats.records import Game
from ncalign.stats.win_rate import win_rate


def both_orders(verdicts: list[tuple[float | None, float | None]]) -> list[Game]:
    """Preferences for the model, shown first and shown second."""
    return [
        Game(f"q{i}", "new", "old", first, preference)
        for i, pair in enumerate(verdicts)
        for first, preference in zip((True, False), pair, strict=True)
    ]


@pytest.mark.parametrize("n", [3, 10, 100])
def test_a_judge_who_always_picks_the_first_is_flagged_and_decides_nothing(n: int) -> None:
    games = both_orders([(1.0, 0.0)] * n)
    found = position_bias(games)
    assert found.biased
    assert (found.first_place, found.contradictions, found.half_contradictions) == (100, 100, 0)
    assert found.p_value <= 2 * 0.25**n or found.p_value < 0.001
    assert "strongly position-biased" in found.summary
    assert "shown first" in found.summary
    assert win_rate(question_preferences(games).preferences).win_rate == 50


def test_a_judge_who_always_picks_the_second_is_flagged_too() -> None:
    found = position_bias(both_orders([(0.0, 1.0)] * 8))
    assert found.biased
    assert found.first_place == 0
    assert "prefers the answer shown second" in found.summary


def test_a_judge_of_the_answers_alone_is_not_flagged_however_good_one_model_is() -> None:
    found = position_bias(both_orders([(1.0, 1.0)] * 30 + [(0.25, 0.25)] * 5 + [(0.5, 0.5)]))
    assert (found.first_place, found.contradictions, found.half_contradictions) == (50, 0, 0)
    assert not found.biased
    assert found.p_value == 1


def test_noise_without_bias_is_flagged_in_one_of_twenty() -> None:
    rng = np.random.default_rng(0)
    flagged = 0
    for _ in range(200):
        values = rng.integers(0, 2, size=(40, 2)).astype(float)
        flagged += position_bias(both_orders([(a, b) for a, b in values]), num_resamples=300).biased
    # 200 draws of chance .05 at most: 5 standard errors are 15.
    assert flagged <= 200 * 0.05 + 15


def test_shares_and_missing_orders_are_counted() -> None:
    verdicts: list[tuple[float | None, float | None]] = [(1.0, 0.0), (0.5, 1.0), (0.5, 0.5), (0.75, 0.625)]
    found = position_bias(both_orders([*verdicts, (1.0, None), (None, None)]))
    assert (found.num_pairs, found.num_incomplete) == (4, 2)
    assert (found.contradictions, found.half_contradictions) == (25, 25)
    # (1 + 1) / 2, (.5 + 0) / 2, (.5 + .5) / 2, (.75 + .375) / 2
    assert found.first_place == pytest.approx(100 * (1 + 0.25 + 0.5 + 0.5625) / 4, abs=1e-9)


def test_one_order_alone_cannot_tell() -> None:
    found = position_bias(both_orders([(1.0, None)] * 9))
    assert math.isnan(found.first_place)
    assert not found.biased
    assert "can't be told" in found.summary
    with pytest.raises(ValueError, match="no games"):
        position_bias([])


def test_length_bias_equals_scipy_and_counts_the_longer() -> None:
    rng = np.random.default_rng(1)
    n = 60
    ours, theirs, preferences = rng.integers(1, 500, size=n), rng.integers(1, 500, size=n), rng.uniform(size=n)
    lengths = {(f"q{i}", "new"): int(ours[i]) for i in range(n)} | {(f"q{i}", "old"): int(theirs[i]) for i in range(n)}
    games = [*both_orders([(p, p) for p in preferences]), Game("q0", "new", "old", True, None)]
    found = length_bias(games, lengths)
    assert found.correlation == pytest.approx(np.corrcoef(ours - theirs, preferences)[0, 1], abs=1e-12)
    expected = stats.spearmanr(ours - theirs, preferences)
    assert (found.rank_correlation, found.rank_p_value) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-12)
    assert found.p_value == pytest.approx(min(1, 2 * min(found.rank_p_value, found.longer_p_value)), abs=1e-12)
    agree = np.mean([(a > b) == (p > 0.5) for a, b, p in zip(ours, theirs, preferences, strict=True) if a != b])
    assert found.longer_preferred == pytest.approx(100 * agree, abs=1e-9)
    assert (found.num_counted, found.num_missing) == (n, 0)


def test_a_judge_of_length_always_prefers_the_longer() -> None:
    lengths = {("q0", "new"): 9, ("q0", "old"): 5, ("q1", "new"): 2, ("q1", "old"): 7, ("q2", "new"): 3, ("q2", "old"): 3}
    games = both_orders([(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
    found = length_bias(games, lengths)
    assert found.longer_preferred == 100
    assert found.rank_correlation == pytest.approx(1, abs=1e-12)
    assert found.related
    with pytest.raises(ValueError, match="'q3': the length of new's answer"):
        length_bias([Game("q3", "new", "old", True, 1.0)], lengths)
    nothing = length_bias([Game("q0", "new", "old", True, None)], lengths)
    assert (nothing.num_counted, nothing.num_missing) == (0, 1)
    assert math.isnan(nothing.longer_preferred)
    assert "can't be told" in nothing.summary


@pytest.mark.parametrize(("share", "related"), [(0.9, True), (0.1, True), (0.5, False)])
def test_verdicts_that_go_with_length_are_said_to(share: float, related: bool) -> None:
    # The model is always 10 characters longer: only the share of its wins can tell.
    lengths = {(f"q{i}", name): 10 * (name == "new") + 5 for i in range(20) for name in ("new", "old")}
    found = length_bias(both_orders([(1.0, 1.0) if i < 20 * share else (0.0, 0.0) for i in range(20)]), lengths)
    assert math.isnan(found.correlation)
    assert found.longer_preferred == pytest.approx(100 * share, abs=1e-12)
    tail = sum(math.comb(20, k) for k in range(round(20 * min(share, 1 - share)) + 1)) / 2**20
    # Without a correlation it is the only test.
    assert found.longer_p_value == found.p_value == pytest.approx(min(1, 2 * tail), abs=1e-12)
    assert found.related == related
    assert ("don't go" in found.summary) == (not related)


def test_verdicts_without_regard_to_length_are_called_related_in_one_of_twenty() -> None:
    # Ties, wins and losses by chance. Either test alone at 5 % would flag about 8 % of these.
    rng, flagged = np.random.default_rng(0), 0
    for _ in range(400):
        pairs = rng.integers(1, 500, size=(40, 2))
        lengths = {(f"q{i}", name): int(pairs[i, j]) for i in range(40) for j, name in enumerate(("new", "old"))}
        verdicts = rng.choice([0.0, 0.5, 1.0], size=40).tolist()
        flagged += length_bias([Game(f"q{i}", "new", "old", True, p) for i, p in enumerate(verdicts)], lengths).related
    # 3 standard errors of 400 draws.
    assert flagged <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


@pytest.mark.parametrize("seed", range(3))
def test_agreement_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one = rng.choice([0, 0.5, 1], size=80)
    other = np.where(rng.random(80) < 0.6, one, rng.choice([0, 0.5, 1], size=80))
    found = judge_agreement(
        [Game(f"q{i}", "a", "b", bool(i % 2), p) for i, p in enumerate(one)],
        [Game(f"q{i}", "a", "b", bool(i % 2), p) for i, p in enumerate(other)],
    )
    assert found.kappa == pytest.approx(cohen_kappa_score((one * 2).astype(int), (other * 2).astype(int)), abs=1e-12)
    assert found.agreement == pytest.approx(100 * np.mean(one == other), abs=1e-9)
    decided = (one != 0.5) & (other != 0.5)
    assert found.agreement_without_ties == pytest.approx(100 * np.mean(one[decided] == other[decided]), abs=1e-9)
    assert found.correlation == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-12)


def test_agreement_counts_what_it_cannot_compare() -> None:
    one = [Game("a", "x", "y", True, 1.0), Game("b", "x", "y", True, None), Game("c", "x", "y", True, 1.0)]
    other = [Game("a", "x", "y", True, 0.9), Game("b", "x", "y", True, 1.0), Game("c", "x", "y", False, 1.0)]
    found = judge_agreement(one, other)
    assert (found.num_counted, found.num_missing, found.num_unmatched) == (1, 1, 2)
    assert found.agreement == 100
    assert math.isnan(found.kappa)
    with pytest.raises(ValueError, match="0 games in common"):
        judge_agreement(one[:1], other[2:])


def test_the_detectable_difference_is_found_at_the_stated_power() -> None:
    # Simulated: samples whose mean is that difference away are found by a two-sided z test in 80 % of cases.
    rng = np.random.default_rng(0)
    n, sd = 200, 40.0
    difference = detectable_difference(sd / math.sqrt(n))
    draws = rng.normal(difference, sd, size=(20_000, n))
    found = np.abs(draws.mean(axis=1)) > 1.959964 * sd / math.sqrt(n)
    assert found.mean() == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / 20_000))


def test_difference_from_a_win_rates_error_is_that_from_its_spread() -> None:
    preferences = np.random.default_rng(0).uniform(size=50)
    expected = detectable_difference(100 * preferences.std(ddof=1) / math.sqrt(50))
    assert detectable_difference(win_rate(preferences).standard_error) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("error", [-1.0, math.nan])
def test_a_standard_error_out_of_range_is_refused(error: float) -> None:
    with pytest.raises(ValueError, match=f"standard error is {error}"):
        detectable_difference(error)

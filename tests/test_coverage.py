"""Printed 95 % intervals cover the truth in 92 % of samples or more, or say that it can't be told: by simulation.

Samples of 20, 38, 100 and 400 questions, true rates of .5, .8 and .95 of the decided verdicts, and 0, 30 and 70 % of ties. Each
coverage is a share of some hundred samples and may be three of its standard errors, sqrt(.92 * .08 / samples), below .92:
if it is truly .92, it is seen lower in about one of a thousand tries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit

from ncalign.stats import length_control
from ncalign.stats.agreement import position_bias
from ncalign.stats.arena_hard import arena_hard_scores
from ncalign.stats.bradley_terry import bradley_terry
from ncalign.stats.intervals import Interval, mean_interval
from ncalign.stats.length_control import length_controlled_win_rate
from ncalign.stats.mt_bench import mt_bench
from ncalign.stats.paired import paired_comparison
from ncalign.stats.preferences import question_preferences
from ncalign.stats.records import Game, Rating
from ncalign.stats.win_rate import win_rate

Array = NDArray[np.float64]

SIZES, RATES, TIES = (20, 38, 100, 400), (0.5, 0.8, 0.95), (0.0, 0.3, 0.7)
LEAST = 0.92


def assert_covers(found: list[Interval], truth: float, *, told: bool = False) -> None:
    """At least 92 % of the intervals hold the truth; where ``told``, NaN, which is printed as missing, counts as well."""
    low, high = np.array(found).T
    # A bound that is the truth itself may be off by a rounding error.
    held = (low <= truth + 1e-9) & (truth - 1e-9 <= high) | (told & np.isnan(low))
    least = LEAST - 3 * math.sqrt(LEAST * (1 - LEAST) / len(found))
    assert held.mean() >= least, f"{held.mean():.3f} of {len(found)}; true value {truth:.3f}"


def verdicts(rng: np.random.Generator, shape: tuple[int, ...], rate: float, ties: float) -> Array:
    """Wins, losses and ties."""
    return np.where(rng.random(shape) < ties, 0.5, rng.random(shape) < rate)


def two_orders(rng: np.random.Generator, num: int, rate: float, ties: float) -> Array:
    """Verdicts in both orders ``[Q, 2]``, of which half are the same for reasons of the question."""
    shared = verdicts(rng, (num, 1), rate, ties)
    return np.where(rng.random((num, 2)) < 0.5, shared, verdicts(rng, (num, 2), rate, ties))


def mean_of(rate: float, ties: float) -> float:
    return ties / 2 + (1 - ties) * rate


def games_of(values: Array, model: str = "new", baseline: str = "old") -> list[Game]:
    return [
        Game(f"q{i}", model, baseline, first, float(p))
        for i, row in enumerate(values)
        for first, p in zip((True, False), row, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_win_rates_and_shares_of_single_verdicts(num: int) -> None:
    # Also shares solved, and a judge's pass over one order: .98 and 95 % ties are further out than what is promised.
    rng = np.random.default_rng(num)
    for rate, ties in itertools.product((*RATES, 0.98), (*TIES, 0.95)):
        drawn = verdicts(rng, (1000, num), rate, ties)
        assert_covers([win_rate(values).ci for values in drawn], 100 * mean_of(rate, ties))


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_win_rates_and_arena_scores_of_games_in_both_orders(num: int) -> None:
    rng, repeats = np.random.default_rng(num), 400 if num < 400 else 100
    for rate, ties in itertools.product(RATES, TIES):
        games = [games_of(two_orders(rng, num, rate, ties)) for _ in range(repeats)]
        truth = 100 * mean_of(rate, ties)
        assert_covers([win_rate(question_preferences(some).preferences).ci for some in games], truth)
        assert_covers([arena_hard_scores(some)[0].ci for some in games], truth)


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_arena_scores_with_strong_verdicts_that_count_three_times(num: int) -> None:
    # Wins are strong in half of the cases, losses in a fifth: the score is sum(w p) / sum(w).
    rng, repeats = np.random.default_rng(num), 400 if num < 400 else 100
    for rate, ties in itertools.product(RATES, TIES):
        found = []
        for _ in range(repeats):
            values = two_orders(rng, num, rate, ties)
            weights = np.where(rng.random(values.shape) < np.select([values == 1, values == 0], [0.5, 0.2], 0.0), 3, 1)
            games = [
                Game(f"q{i}", "new", "old", bool(j), float(values[i, j]), weight=int(weights[i, j]))
                for i, j in np.ndindex(values.shape)
            ]
            found.append(arena_hard_scores(games)[0].ci)
        won, lost = (1 - ties) * rate * (1 + 0.5 * 2), (1 - ties) * (1 - rate) * (1 + 0.2 * 2)
        assert_covers(found, 100 * (won + ties / 2) / (won + ties + lost))


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_paired_differences(num: int) -> None:
    # The same prompts solved before and after, as in the demo: what was solved stays so in nine of ten cases.
    rng, repeats = np.random.default_rng(num), 400
    for before, after in ((0.05, 0.05), (0.05, 0.5), (0.5, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 0.95)):
        for ties in TIES:
            found = []
            for _ in range(repeats):
                first, anew = (verdicts(rng, (num,), rate, ties) for rate in (before, after))
                kept = rng.random(num) < 0.7
                second = np.where(kept, np.maximum(first, anew) if after > before else first, anew)
                found.append(paired_comparison(first, second, bounds=(0.0, 1.0), seed=0, num_resamples=9))
            truth_before = mean_of(before, ties)
            assert_covers([one.ci_before for one in found], truth_before)
            if after > before:
                # P(max >= 1/2) and P(max = 1) of independent draws.
                none = (1 - ties) ** 2 * (1 - before) * (1 - after)
                one = 1 - (1 - (1 - ties) * before) * (1 - (1 - ties) * after)
                truth_after = 0.7 * ((1 - none) + one) / 2 + 0.3 * mean_of(after, ties)
            else:
                truth_after = truth_before
            assert_covers([one.ci_after for one in found], truth_after)
            assert_covers([one.ci_difference for one in found], truth_after - truth_before)


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_length_controlled_win_rates(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interval is the fit's without penalty: which penalty the estimate has does not matter to it.
    monkeypatch.setattr(length_control, "_chosen_inverse_penalty", lambda *_: 1.0)
    rng, repeats = np.random.default_rng(num), 300 if num < 400 else 200
    tasted = [(rate, 0.0, 1.0) for rate in RATES]
    for rate, ties, taste in [*itertools.product((*RATES, 0.69), TIES, (0.0,)), *tasted]:
        chance = np.log(rate / (1 - rate))
        found = []
        for _ in range(repeats):
            longer = rng.normal(size=num)
            shown = expit(chance + taste * np.tanh(longer))
            values = np.where(rng.random(num) < ties, 0.5, rng.random(num) < shown)
            found.append(length_controlled_win_rate(values, (5000 + 1000 * longer).astype(int), np.full(num, 5000)).ci)
        assert_covers(found, even_rate(chance, taste, ties), told=True)


def even_rate(chance: float, taste: float, ties: float) -> float:
    """What the fit finds of endless samples, in percent: with ties the logistic curve is not quite the truth's."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    length = np.tanh(nodes)
    expected = ties / 2 + (1 - ties) * expit(chance + taste * length)

    def slope(model: float) -> float:
        def moment(effect: float) -> float:
            return float(weights @ (length * (expected - expit(model + effect * length))))

        return brentq(moment, -20, 20)

    def balance(model: float) -> float:
        return float(weights @ (expected - expit(model + slope(model) * length)))

    return 100 * float(expit(brentq(balance, -10, 10)))


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_bradley_terry_strengths_of_two_models(num: int) -> None:
    rng, repeats = np.random.default_rng(num), 400 if num < 400 else 100
    for rate, ties in itertools.product(RATES, TIES):
        assert_covers(
            [strength_of(games_of(two_orders(rng, num, rate, ties)), "new", "old") for _ in range(repeats)],
            100 * mean_of(rate, ties),
            told=True,
        )


def strength_of(games: list[Game], model: str, anchor: str) -> Interval:
    """The interval of the expected win rate, and NaN where the table says that there are no finite strengths."""
    try:
        return next(s.win_rate_ci for s in bradley_terry(games, anchor=anchor).strengths if s.model == model)
    except ValueError:
        return (math.nan, math.nan)


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES[:3])
def test_bradley_terry_strengths_of_a_tournament(num: int) -> None:
    # Five models, all pairs, both orders, log-odds from 0 to 2.9 (rates of .5, .8 and .95 are 0, 1.4 and 2.9).
    rng, theta = np.random.default_rng(num), np.array([0.0, 0.4, 0.9, 1.4, 2.9])
    pairs = list(itertools.combinations(range(5), 2))
    found: dict[int, list[Interval]] = {model: [] for model in range(1, 5)}
    for _ in range(200 if num < 100 else 100):
        games = [
            game
            for i, j in pairs
            for game in games_of(two_orders(rng, num, float(expit(theta[j] - theta[i])), 0.0), f"m{j}", f"m{i}")
        ]
        try:
            ratings = {s.model: s.rating_ci for s in bradley_terry(games, anchor="m0").strengths}
        except ValueError:
            continue
        for model, some in found.items():
            some.append(ratings[f"m{model}"])
    for model, some in found.items():
        assert_covers(some, 1000 + 400 / math.log(10) * theta[model])


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_mean_ratings_of_two_turns(num: int) -> None:
    # A judge who mostly gives 9 and now and then 1, a second turn that goes half with the first, a tenth unrated.
    rng, repeats = np.random.default_rng(num), 500 if num < 400 else 100
    for rate in (*RATES, 0.98):
        found = []
        for _ in range(repeats):
            scores = 1 + 8 * two_orders(rng, num, rate, 0.0)
            rated = rng.random(scores.shape) < 0.9
            ratings = [
                Rating(f"{i}", "new", j + 1, "w", float(scores[i, j]) if rated[i, j] else None)
                for i, j in np.ndindex(scores.shape)
            ]
            found.append(mt_bench(ratings)[0].overall.ci)
        assert_covers(found, 1 + 8 * rate)


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_position_bias(num: int) -> None:
    # The first answer shown gets so many of the decided verdicts, in either order.
    rng, repeats = np.random.default_rng(num), 300 if num < 400 else 100
    for rate, ties in itertools.product(RATES, TIES):
        found = []
        for _ in range(repeats):
            first, second = verdicts(rng, (2, num), rate, ties)
            found.append(position_bias(games_of(np.column_stack([first, 1 - second])), num_resamples=9).ci)
        assert_covers(found, 100 * mean_of(rate, ties))


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_rewards_without_bounds(num: int) -> None:
    # A reward model's, near to normal, before and after; and a rule's, whose bounds are not known either.
    rng, repeats = np.random.default_rng(num), 1000
    models = [(rng.normal(size=num), rng.normal(size=num)) for _ in range(repeats)]
    found = [paired_comparison(level, level + 0.3 + 0.5 * noise, seed=0, num_resamples=9) for level, noise in models]
    assert_covers([one.ci_before for one in found], 0.0)
    assert_covers([one.ci_difference for one in found], 0.3)
    for rate in RATES:
        drawn = [verdicts(rng, (2, num), rate, 0.0) for _ in range(repeats)]
        found = [paired_comparison(1 - first, second, seed=0, num_resamples=9) for first, second in drawn]
        assert_covers([one.ci_after for one in found], rate, told=True)
        assert_covers([one.ci_difference for one in found], 2 * rate - 1, told=True)


@pytest.mark.slow
@pytest.mark.parametrize("num", SIZES)
def test_means_of_rare_and_of_crowded_values(num: int) -> None:
    # Values between the bounds that are all near one another, and a rare kind that most small samples don't hold.
    rng, repeats = np.random.default_rng(num), 1000
    kinds: dict[float, Callable[[], Array]] = {
        0.8: lambda: rng.beta(16, 4, size=num),
        0.86: lambda: np.where(rng.random(num) < 0.05, 0.1, 0.9),
        0.4: lambda: rng.beta(0.4, 0.6, size=num),
    }
    for truth, draw in kinds.items():
        assert_covers([mean_interval(draw(), bounds=(0.0, 1.0)) for _ in range(repeats)], truth)


def test_the_check_itself_finds_the_percentile_bootstrap_wanting() -> None:
    # What was printed before: all wins, and 100 to 100, in .95^20 = 36 % of the samples.
    rng = np.random.default_rng(0)
    drawn = verdicts(rng, (300, 20), 0.95, 0.0)
    found = []
    for values in drawn:
        rounds = rng.choice(values, size=(300, 20)).mean(axis=1)
        found.append((float(np.quantile(rounds, 0.025)), float(np.quantile(rounds, 0.975))))
    with pytest.raises(AssertionError, match="of 300"):
        assert_covers(found, 0.95)


@pytest.mark.parametrize("won", range(11))
def test_of_wins_and_losses_alone_it_is_wilsons_interval(won: int) -> None:
    expected = stats.binomtest(won, 10).proportion_ci(method="wilson")
    found = mean_interval(np.array([1.0] * won + [0.0] * (10 - won)), bounds=(0.0, 1.0))
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)

"""The paired comparison against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ncalign.stats.paired import paired_comparison


@pytest.mark.parametrize("n", [2, 5, 10])
def test_p_value_enumerates_all_sign_patterns_of_few_items(n: int) -> None:
    # All differences are +1: of 2^n patterns only all-plus and all-minus are as extreme.
    result = paired_comparison(np.zeros(n), np.ones(n), seed=0)
    assert result.p_value == pytest.approx(2 / 2**n, abs=1e-15)
    assert result.difference == 1.0


def test_p_value_of_one_dissenting_item() -> None:
    # Differences 1,1,1,1,-1 sum to 3; sums >= 3 have at most one minus: 1 + 5 patterns a tail.
    before = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    assert paired_comparison(before, 1.0 - before, seed=0).p_value == pytest.approx(2 * 6 / 32, abs=1e-15)


def test_sampled_p_value_agrees_with_the_binomial_tail_and_is_never_zero() -> None:
    # 60 items differ, 38 up and 22 down; flips of equal sizes make the statistic binomial.
    before = np.array([0.0] * 38 + [1.0] * 22 + [0.5] * 40)
    after = np.array([1.0] * 38 + [0.0] * 22 + [0.5] * 40)
    exact = 2 * sum(math.comb(60, k) for k in range(38, 61)) / 2**60
    found = paired_comparison(before, after, seed=1, num_resamples=20_000).p_value
    # Two tails of 20000 draws: standard error 2 * sqrt(p/2 / n).
    assert found == pytest.approx(exact, abs=5 * 2 * math.sqrt(exact / 2 / 20_000))
    sure = paired_comparison(np.zeros(100), np.ones(100), seed=0, num_resamples=999)
    assert sure.p_value == pytest.approx(2 / 1000, abs=1e-15)


def test_no_difference_gives_p_one_and_what_so_few_items_leave_open() -> None:
    # A share of q = z^2 / (n + z^2) may have changed: as much as 30 / q values of -1 or 1 tell, half of them 1.
    solved = np.array([0.0] * 20 + [1.0] * 10)
    result = paired_comparison(solved, solved, bounds=(0.0, 1.0), seed=0)
    assert result.p_value == 1.0
    z = stats.norm.ppf(0.975)
    arm = z / math.sqrt(30 * (30 + z**2) / z**2 + z**2)
    assert result.ci_difference == pytest.approx((-arm, arm), abs=1e-9)


def test_values_that_are_all_one_tell_an_interval_only_between_bounds() -> None:
    same = np.full(30, 0.25)
    unknown = paired_comparison(same, same, seed=0)
    assert all(math.isnan(bound) for bound in (*unknown.ci_before, *unknown.ci_after, *unknown.ci_difference))
    low, high = paired_comparison(same, same, bounds=(0.0, 1.0), seed=0).ci_after
    assert 0 < low < 0.25 < high < 1


def test_interval_has_the_normal_width_of_a_mean() -> None:
    values = np.array([0.0, 1.0] * 200)  # standard error of the mean .5 / sqrt(400) = .025
    low, high = paired_comparison(values, values, seed=3).ci_before
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_interval_of_the_difference_keeps_pairs_together() -> None:
    before = np.arange(64) / 64
    # Some an eighth more and some an eighth less: the interval is that of these differences, whose deviation is 1/8.
    change = np.where(np.arange(64) % 2, 0.125, -0.125)
    result = paired_comparison(before, before + change, seed=0)
    arm = stats.t.ppf(0.975, 63) * 0.125 * math.sqrt(64 / 63) / 8
    assert result.ci_difference == pytest.approx((-arm, arm), rel=0.01)
    assert result.ci_before[1] - result.ci_before[0] > 4 * arm


def test_order_of_arguments_decides_the_sign_alone() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(8), rng.random(8)
    forth, back = paired_comparison(a, b, seed=0), paired_comparison(b, a, seed=0)
    assert forth.difference == pytest.approx(-back.difference, abs=1e-15)
    assert forth.p_value == pytest.approx(back.p_value, abs=1e-15)


def test_same_seed_same_numbers() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.random(50)
    assert paired_comparison(a, b, seed=4) == paired_comparison(a, b, seed=4)
    assert paired_comparison(a, b, seed=4).p_value != paired_comparison(a, b, seed=5).p_value


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([0.0, 1.0], [0.0, 1.0, 0.0], "before has 2 values and after 3"),
        ([0.0], [1.0], "at least 2"),
        ([0.0, math.nan], [0.0, 1.0], r"before\[1\] is nan"),
        ([0.0, 1.0], [math.inf, 1.0], r"after\[0\] is inf"),
        ([[0.0, 1.0]], [0.0, 1.0], r"before has the shape \(1, 2\)"),
    ],
)
def test_bad_input_is_named(before: list[float], after: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_comparison(np.array(before), np.array(after), seed=0)

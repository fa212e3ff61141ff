"""Means over seeds and prompts: hand-made tables, the intervals' coverage, and what is decided of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ncalign.stats.crossed import MOST_SEEDS, CrossedMean, crossed_mean, seeds_needed, verdict


def table(seed: int, num_seeds: int, num_prompts: int, *, mean: float, of_seeds: float, of_prompts: float, noise: float):
    """Values with effects of seeds and prompts of these standard deviations."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.normal(0, of_seeds, (num_seeds, 1)), rng.normal(0, of_prompts, (1, num_prompts))
    return mean + rows + columns + rng.normal(0, noise, (num_seeds, num_prompts))


def test_mean_squares_of_a_table_made_by_hand() -> None:
    # Rows differ by ±1, columns by ±2, and one cell in each corner by ±.5 more.
    found = crossed_mean(np.array([[3.5, -1.5], [0.5, -2.5]]) + 1.0)
    # Rest: ±.5 in each cell: sum of squares 1, of one degree of freedom. Rows: 2 (1^2 + 1^2) = 4. Columns: 2 (2^2 + 2^2) = 16.
    assert found.mean == pytest.approx(1.0)
    assert found.of_noise == pytest.approx(1.0)
    assert found.of_seeds == pytest.approx((4 - 1) / 2)
    assert found.of_prompts == pytest.approx((16 - 1) / 2)
    total = 4 + 16 - 1
    freedom = total**2 / (4**2 + 16**2 + 1**2)
    arm = stats.t.ppf(0.975, freedom) * math.sqrt(total / 4)
    assert found.ci == pytest.approx((1.0 - arm, 1.0 + arm))
    assert found.p_value == pytest.approx(2 * stats.t.sf(1.0 / math.sqrt(total / 4), freedom))


def test_one_value_a_seed_is_students_interval() -> None:
    values = np.array([0.3, 0.1, 0.7, 0.4])
    found = crossed_mean(values[:, None])
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=values.std(ddof=1) / 2)
    assert found.ci == pytest.approx(expected)
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    # Of 16 sign patterns, those with all signs alike are as extreme.
    assert found.p_sign_flip == pytest.approx(2 / 16)


def test_order_of_seeds_and_prompts_means_nothing() -> None:
    values = table(0, 4, 9, mean=0.1, of_seeds=0.2, of_prompts=0.3, noise=0.4)
    rng = np.random.default_rng(1)
    again = crossed_mean(values[rng.permutation(4)][:, rng.permutation(9)])
    assert again.ci == pytest.approx(crossed_mean(values).ci, abs=1e-12)


def test_one_seed_has_no_interval_and_equal_runs_have_no_width() -> None:
    alone = crossed_mean(np.ones((1, 5)))
    assert math.isnan(alone.ci[0])
    assert math.isnan(alone.p_value)
    assert verdict(alone, p_value=0.0) == "undecided"
    same = crossed_mean(np.zeros((3, 5)))
    assert (same.ci, same.p_value) == ((0.0, 0.0), 1.0)
    assert verdict(same, p_value=1.0) == "undecided"
    assert seeds_needed(same) is None


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros((2, 0)), np.array([[1.0, np.nan]]), np.zeros(3)])
def test_what_is_no_table_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite values of at least one seed and prompt"):
        crossed_mean(values)


class TestVerdict:
    def decided(self, mean: float, low: float, high: float, p_value: float) -> str:
        found = CrossedMean(mean, (low, high), p_value, 0.5, 0.1, 0.1, 0.1, 5, 50)
        return verdict(found, p_value=p_value)

    def test_sign_and_level(self) -> None:
        assert self.decided(0.2, 0.1, 0.3, 0.01) == "holds"
        assert self.decided(-0.2, -0.3, -0.1, 0.01) == "opposite"
        assert self.decided(0.2, 0.1, 0.3, 0.06) == "undecided"
        assert self.decided(0.2, -0.1, 0.5, 0.01) == "undecided"
        assert self.decided(0.2, 0.1, 0.3, math.nan) == "undecided"
        assert self.decided(0.2, math.nan, math.nan, 0.01) == "undecided"

    def test_seeds_that_would_tell(self) -> None:
        # Without noise of prompts n seeds have the variance .04 / n: (1.96 + .842) sqrt(.04 / n) <= .1 from 31.4 on.
        found = CrossedMean(0.1, (-0.1, 0.3), 0.3, 0.3, 0.04, 0.0, 0.0, 4, 10**6)
        assert seeds_needed(found) == 32
        # Between few prompts so much differs that no number of seeds would do.
        assert seeds_needed(CrossedMean(0.01, (-1, 1), 0.9, 0.9, 0.0, 1.0, 0.0, 4, 10)) is None
        assert MOST_SEEDS == 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_seeds", "num_prompts", "of_seeds", "of_prompts", "noise"),
    [(10, 128, 0.02, 0.3, 0.5), (10, 64, 0.05, 0.0, 0.5), (5, 64, 0.1, 0.1, 0.3), (20, 32, 0.0, 0.3, 0.5), (10, 1, 0.2, 0, 0)],
)
def test_intervals_cover_and_verdicts_seldom_err(
    num_seeds: int, num_prompts: int, of_seeds: float, of_prompts: float, noise: float
) -> None:
    number, covered, wrong = 3000, 0, 0
    for seed in range(number):
        effects = {"of_seeds": of_seeds, "of_prompts": of_prompts, "noise": noise}
        low, high = crossed_mean(table(seed, num_seeds, num_prompts, mean=0.05, **effects)).ci
        covered += low <= 0.05 <= high
        none = crossed_mean(table(number + seed, num_seeds, num_prompts, mean=0.0, **effects))
        wrong += verdict(none, p_value=none.p_value) != "undecided"
    # Three standard errors of a share of .95 of 3000 are .012.
    assert 0.93 <= covered / number <= 0.975
    assert wrong / number <= 0.05 + 0.012

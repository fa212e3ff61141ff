"""Percentile bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05

Interval = tuple[float, float]
NO_INTERVAL: Interval = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Bootstrap:
    """How the rounds of a bootstrap over games are drawn.

    Attributes:
        resample: what a round draws with replacement: questions, whose games stay together, or single games as Arena-Hard does.
        num_rounds: how many; 0 for no intervals (NaN).
        quantiles: of the rounds, which bound the intervals. Arena-Hard takes 5 % and 95 %.
        seed: of the draws.
    """

    resample: Literal["questions", "games"] = "questions"
    num_rounds: int = 100
    quantiles: tuple[float, float] = (0.05, 0.95)
    seed: int = 0


DEFAULT_BOOTSTRAP = Bootstrap()


def mean_interval(values: Float[NDArray[np.float64], " n"], num_resamples: int, rng: np.random.Generator) -> Interval:
    """95 % percentile bootstrap interval of a mean: defined, unlike BCa, where all values are equal; NaN of fewer than 2."""
    return _percentile_interval((values,), np.mean, num_resamples, rng)


def ratio_interval(
    totals: Float[NDArray[np.float64], " n"],
    sizes: Float[NDArray[np.float64], " n"],
    num_resamples: int,
    rng: np.random.Generator,
) -> Interval:
    """95 % percentile bootstrap interval of ``sum(totals) / sum(sizes)``: a mean of values that come in clusters.

    Args:
        totals: each cluster's sum; the interval of fewer than 2 clusters is NaN.
        sizes: how many values each cluster has, above 0.
        num_resamples: of clusters.
        rng: for the draws.
    """

    def ratio(top: NDArray[np.float64], bottom: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(top.sum(axis=axis) / bottom.sum(axis=axis))

    return _percentile_interval((totals, sizes), ratio, num_resamples, rng)


def _percentile_interval(
    samples: tuple[NDArray[np.float64], ...], statistic: Callable[..., object], num_resamples: int, rng: np.random.Generator
) -> Interval:
    if len(samples[0]) < 2:
        return NO_INTERVAL
    result = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        n_resamples=num_resamples,
        # In batches, so that memory does not grow with the number of resamples.
        batch=max(1, 1_000_000 // len(samples[0])),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=rng,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def quantile_interval(rounds: Sequence[float] | NDArray[np.float64], quantiles: tuple[float, float]) -> Interval:
    """Two quantiles of bootstrap rounds; NaN where there are none."""
    if not len(rounds):
        return NO_INTERVAL
    low, high = np.quantile(rounds, quantiles)
    return float(low), float(high)


def resampled_counts(
    units: Int[NDArray[np.int64], " N"], num_rounds: int, seed: int
) -> Iterator[Float[NDArray[np.float64], " N"]]:
    """For each bootstrap round, how often each row is drawn.

    ``units`` numbers each row's unit, from 0. As many units are drawn with replacement as there are, each with all its rows.
    """
    rng = np.random.default_rng(seed)
    num_units = int(units.max()) + 1
    for _ in range(num_rounds):
        drawn = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)
        yield drawn[units].astype(np.float64)

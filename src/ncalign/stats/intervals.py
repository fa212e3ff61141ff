"""Percentile bootstrap intervals of means."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95

Interval = tuple[float, float]
Resample = Literal["questions", "games"]


def mean_interval(values: Float[NDArray[np.float64], " n"], num_resamples: int, rng: np.random.Generator) -> Interval:
    """95 % percentile bootstrap interval of a mean: defined, unlike BCa, where all values are equal.

    Args:
        values: finite, at least 2.
        num_resamples: how often they are drawn anew.
        rng: for the draws.
    """
    # In batches, so that memory does not grow with the number of resamples.
    batch = max(1, 1_000_000 // len(values))
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=num_resamples, batch=batch, confidence_level=CONFIDENCE, method="percentile", rng=rng
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def ratio_interval(
    totals: Float[NDArray[np.float64], " n"],
    sizes: Float[NDArray[np.float64], " n"],
    num_resamples: int,
    rng: np.random.Generator,
) -> Interval:
    """95 % percentile bootstrap interval of ``sum(totals) / sum(sizes)``: a mean of values that come in clusters.

    Args:
        totals: each cluster's sum.
        sizes: how many values each cluster has, above 0.
        num_resamples: how often clusters are drawn anew.
        rng: for the draws.
    """

    def ratio(top: NDArray[np.float64], bottom: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(top.sum(axis=axis) / bottom.sum(axis=axis))

    result = stats.bootstrap(
        (totals, sizes),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        batch=max(1, 1_000_000 // len(totals)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=rng,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def quantile_interval(values: Float[NDArray[np.float64], " R"], quantiles: tuple[float, float]) -> Interval:
    """Two quantiles of bootstrap rounds."""
    low, high = np.quantile(values, quantiles)
    return float(low), float(high)


def resampled_counts(num_items: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each item is drawn when as many are drawn with replacement as there are."""
    return np.bincount(rng.integers(num_items, size=num_items), minlength=num_items)

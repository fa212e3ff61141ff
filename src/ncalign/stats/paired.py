"""Before against after on the same prompts: means, intervals and a paired permutation test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ncalign.stats.intervals import Bounds, Interval, mean_interval


@dataclass(frozen=True)
class PairedComparison:
    """What a treatment changed, measured on the same n items before and after.

    Each ``ci`` is a 95 % interval by :func:`ncalign.stats.intervals.mean_interval`, that of the difference from the items' own
    differences; NaN where it can't be told.

    Attributes:
        difference: ``mean_after - mean_before``.
        p_value: two-sided, of a sign-flip permutation test of the paired differences.
    """

    mean_before: float
    mean_after: float
    ci_before: Interval
    ci_after: Interval
    difference: float
    ci_difference: Interval
    p_value: float


def paired_comparison(
    before: Float[NDArray[np.float64], " n"],
    after: Float[NDArray[np.float64], " n"],
    *,
    bounds: Bounds | None = None,
    seed: int,
    num_resamples: int = 10_000,
) -> PairedComparison:
    """Compare two measurements of the same items.

    The p-value is that of the permutation test in which each item's difference keeps or flips its sign with equal chance; with
    few items all ``2^n`` sign patterns are enumerated, else ``num_resamples`` are drawn and the observed one counted among
    them, so it is never 0. Where several comparisons are made, it is not corrected for their number.

    Args:
        before: one value an item.
        after: likewise.
        bounds: between which a value may lie; None for the range of all that were seen, before and after.
        seed: of the drawn sign patterns.
        num_resamples: sign patterns.

    Raises:
        ValueError: the arrays are not of one length n ≥ 2, or hold NaN or infinities.

    >>> result = paired_comparison(np.zeros(4), np.ones(4), seed=0)
    >>> result.difference, result.p_value  # two of the 16 sign patterns are as extreme
    (1.0, 0.125)
    """
    first, second = _checked(before, "before"), _checked(after, "after")
    if len(first) != len(second):
        raise ValueError(f"before has {len(first)} values and after {len(second)}: one pair of values per item is needed")
    if len(first) < 2:
        raise ValueError(f"there are {len(first)} items; at least 2 are needed for intervals")
    differences = second - first
    low, high = bounds or (float(min(first.min(), second.min())), float(max(first.max(), second.max())))
    return PairedComparison(
        mean_before=float(first.mean()),
        mean_after=float(second.mean()),
        ci_before=mean_interval(first, bounds=(low, high)),
        ci_after=mean_interval(second, bounds=(low, high)),
        difference=float(differences.mean()),
        ci_difference=mean_interval(differences, bounds=(low - high, high - low)),
        p_value=_sign_flip_p_value(first, second, num_resamples, np.random.default_rng(seed)),
    )


def paired_values(
    before: Mapping[str, float], after: Mapping[str, float]
) -> tuple[Float[NDArray[np.float64], " n"], Float[NDArray[np.float64], " n"], int]:
    """The values of items that both have, in ``before``'s order, and how many items lack a value, or have NaN, on either side.

    >>> first, second, left_out = paired_values({"a": 0.5, "b": 1.0}, {"b": 0.0, "a": float("nan"), "c": 1.0})
    >>> first.tolist(), second.tolist(), left_out
    ([1.0], [0.0], 2)
    """
    common = [key for key, value in before.items() if not (np.isnan(value) or np.isnan(after.get(key, np.nan)))]
    left_out = len(before.keys() | after.keys()) - len(common)
    return np.array([before[key] for key in common]), np.array([after[key] for key in common]), left_out


def _checked(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has the shape {array.shape}; one value per item is needed")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]}: finite values are needed; leave out items without a value")
    return array


def _sign_flip_p_value(
    before: NDArray[np.float64], after: NDArray[np.float64], num_resamples: int, rng: np.random.Generator
) -> float:
    def mean_difference(second: NDArray[np.float64], first: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(np.mean(second - first, axis=axis))

    result = stats.permutation_test(
        (after, before),
        mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=num_resamples,
        batch=max(1, 1_000_000 // len(before)),
        rng=rng,
    )
    # Twice the smaller tail may exceed 1.
    return min(1.0, float(result.pvalue))

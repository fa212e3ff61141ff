"""95 % intervals of means, by Wilson's score interval for values of any kind; p-values of several tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05

Interval = tuple[float, float]
NO_INTERVAL: Interval = (float("nan"), float("nan"))
Bounds = tuple[float, float]

Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
# Of the values' range: below this, differences are rounding errors.
_ROUNDING = 1e-12


def mean_interval(
    values: Float[NDArray[np.float64], " n"],
    *,
    sizes: Float[NDArray[np.float64], " n"] | None = None,
    bounds: Bounds | None = None,
) -> Interval:
    """95 % interval of ``sum(values) / sum(sizes)``: Wilson's, of as many wins and losses as :func:`effective_size` says.

    Of wins and losses alone it is Wilson's interval itself; values between them, such as ties, make it narrower.

    Args:
        values: of independent units, such as questions: one value each, or the sum of several that belong together.
        sizes: how many values each sum has, above 0; None for one each.
        bounds: between which a value may lie, seen or not; None for the range of those seen.

    Returns:
        NaN where it can't be told: of fewer than 2 units, and where all values are equal and no bounds are given.

    Source: Wilson, 1927; with an estimated effective size, Kott and Carr, 1997.

    >>> [round(bound, 3) for bound in mean_interval(np.ones(10), bounds=(0, 1))]  # 10 of 10
    [0.722, 1.0]
    """
    weights = np.ones(len(values)) if sizes is None else sizes
    low, high = _bounds(values / weights, bounds)
    size = effective_size(values, sizes=sizes, bounds=(low, high))
    if math.isnan(size):
        return NO_INTERVAL
    ends = _wilson(_place(values, weights, (low, high)), size)
    return low + (high - low) * ends[0], low + (high - low) * ends[1]


def share_interval(share: float, num: int, *, standard_error: float | None = None) -> Interval:
    """Wilson's 95 % interval of a share, or of a mean from 0 to 1, of which no more is known; NaN of fewer than 2 values.

    Args:
        share: from 0 to 1; NaN for another.
        num: of how many.
        standard_error: of the share where it is known; a larger one than that of shares, as of values in clusters, counts.
    """
    if num < 2 or not 0 <= share <= 1:
        return NO_INTERVAL
    even = share * (1 - share)
    return _wilson(share, min(num, even / standard_error**2) if standard_error and even > 0 else num)


def _wilson(place: float, size: float) -> Interval:
    centre = (place + Z**2 / (2 * size)) / (1 + Z**2 / size)
    arm = Z / (1 + Z**2 / size) * math.sqrt(place * (1 - place) / size + Z**2 / (4 * size**2))
    # Bounded, so that rounding puts no bound on the wrong side of the mean.
    return min(place, max(0.0, centre - arm)), max(place, min(1.0, centre + arm))


def effective_size(
    values: Float[NDArray[np.float64], " n"],
    *,
    sizes: Float[NDArray[np.float64], " n"] | None = None,
    bounds: Bounds,
) -> float:
    """How many values at the bounds alone, such as wins and losses, would tell as much about the mean.

    NaN of fewer than 2 units, and where the bounds are one.

    With s² the units' variance and m their mean as a place between the bounds, ``n m (1 - m) / s²``. The variance is taken
    as larger by ``(t / z)²``, Student's quantile over the normal one; and as no smaller than that of values of which a share
    of :func:`unseen_share` lies as far out as the outermost one seen, or at a bound where all are equal.

    Args:
        values: as in :func:`mean_interval`.
        sizes: likewise.
        bounds: likewise.
    """
    num = len(values)
    weights = np.ones(num) if sizes is None else sizes
    if num < 2 or not bounds[1] > bounds[0]:
        return float("nan")
    place = _place(values, weights, bounds)
    shares = weights / weights.mean()
    off = (values - weights * bounds[0]) / (bounds[1] - bounds[0]) / weights.mean() - place * shares
    farthest = float(np.abs(off).max())
    if farthest < _ROUNDING:
        farthest = max(place, 1 - place) * float(shares.max())
    spread = max(float(off @ off) / (num - 1) * student_factor(num) ** 2, unseen_share(num) * farthest**2)
    # Units of unequal sizes tell less than as many equal ones (Kish); no values spread more than those at the bounds.
    most = float((shares**2).mean())
    even = place * (1 - place)
    return num / (min(spread / even, most) if even > _ROUNDING else most)


def unseen_share(num: int) -> float:
    """``z² / (n + z²)``: the largest share of values that n of them, none of that kind, don't rule out (Wilson's bound)."""
    return Z**2 / (num + Z**2)


def student_factor(num: int) -> float:
    """Student's quantile for n - 1 degrees of freedom over the normal one: what a spread estimated from n values costs."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 1)) / Z


def normal_arm(standard_error: float, *, least: float, num: int) -> float:
    """Half of a 95 % interval of a quantity whose error was estimated from n units; NaN of fewer than 2.

    Args:
        standard_error: estimated.
        least: the standard error if all units were as far from their expectation as they can be; a share of
            :func:`unseen_share` of them is taken to be.
        num: units.
    """
    if num < 2:
        return float("nan")
    return Z * float(np.maximum(standard_error * student_factor(num), least * math.sqrt(unseen_share(num))))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests corrected for their number; NaN is no test and stays.

    >>> holm([0.5, 0.01, float("nan"), 0.02])
    [0.5, 0.03, nan, 0.04]

    Source: Holm, 1979.
    """
    order = [place for place in np.argsort(p_values).tolist() if not math.isnan(p_values[place])]
    found, largest = list(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        found[place] = largest
    return found


def _bounds(values: NDArray[np.float64], bounds: Bounds | None) -> Bounds:
    if bounds is not None:
        return bounds
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)


def _place(values: NDArray[np.float64], sizes: NDArray[np.float64], bounds: Bounds) -> float:
    """The mean's place between the bounds, from 0 to 1."""
    return min(1.0, max(0.0, (float(values.sum() / sizes.sum()) - bounds[0]) / (bounds[1] - bounds[0])))

"""Differences measured on the same prompts after several seeds: both are samples, and an interval has to allow for both."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from ncalign.stats.intervals import CONFIDENCE, NO_INTERVAL, SIGNIFICANCE, Interval, Z
from ncalign.stats.power import POWER

Verdict: TypeAlias = Literal["holds", "opposite", "undecided"]
_ENUMERATED = 12
_ROUNDING = 1e-12
MOST_SEEDS = 1000
"""Above this, more seeds are no advice."""


@dataclass(frozen=True)
class CrossedMean:
    """The mean of values ``[S, P]`` of S seeds and P prompts, for seeds and prompts like these.

    Attributes:
        mean: over all.
        ci: 95 % interval; NaN of one seed.
        p_value: two-sided, of a mean of 0, from the same t distribution as the interval; NaN of one seed.
        p_sign_flip: two-sided, of the permutation test in which each seed's mean keeps or flips its sign; it asks about
            these prompts alone, and of S seeds it can't be below ``2 / 2^S``. NaN of one seed.
        of_seeds: variance between seeds, beyond what prompts and noise explain.
        of_prompts: likewise between prompts.
        of_noise: of what is left.
        num_seeds: S.
        num_prompts: P.
    """

    mean: float
    ci: Interval
    p_value: float
    p_sign_flip: float
    of_seeds: float
    of_prompts: float
    of_noise: float
    num_seeds: int
    num_prompts: int


def crossed_mean(values: Float[NDArray[np.float64], "S P"]) -> CrossedMean:
    r"""The mean of a table of seeds and prompts, with an interval that allows for both being samples.

    With $d_{sp} = \mu + a_s + b_p + e_{sp}$, of variances $\sigma_a^2, \sigma_b^2, \sigma_e^2$,

    $$\operatorname{Var}(\bar d) = \frac{\sigma_a^2}{S} + \frac{\sigma_b^2}{P} + \frac{\sigma_e^2}{SP}
    \approx \frac{M_a + M_b - M_e}{SP},$$

    with the mean squares of rows, columns and the rest, where $M_a$ and $M_b$ count as no less than $M_e$. The interval is
    $\bar d \pm t\,\sqrt{\operatorname{Var}}$ with Satterthwaite's degrees of freedom. Of one prompt, or a value for each run,
    it is Student's interval over seeds. A bootstrap of few seeds and many prompts misses it either way: the variance of
    seeds becomes $(S - 1)/S$ of what it is, and noise counts three times.

    Args:
        values: a row for each seed, a column for each prompt; finite.

    Raises:
        ValueError: there is no value, or one is not finite.

    >>> found = crossed_mean(np.array([[1.0], [3.0]]))
    >>> found.mean, round(found.ci[1] - 2.0, 2)  # t of one degree of freedom, 12.71, times a standard error of 1
    (2.0, 12.71)

    Source: Satterthwaite, 1946; on two crossed factors Cornfield and Tukey, 1956.
    """
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values have the shape {values.shape}: finite values of at least one seed and prompt are needed")
    num_seeds, num_prompts = values.shape
    mean, size = float(values.mean()), values.size
    rows, columns = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - rows[:, None] - columns[None, :]
    of_rows = _square(num_prompts * rows @ rows, num_seeds - 1)
    of_columns = _square(num_seeds * columns @ columns, num_prompts - 1)
    of_rest = _square(float((rest**2).sum()), (num_seeds - 1) * (num_prompts - 1))
    variances = {
        "of_seeds": max(0.0, (of_rows - of_rest) / num_prompts),
        "of_prompts": max(0.0, (of_columns - of_rest) / num_seeds),
        "of_noise": of_rest,
        "num_seeds": num_seeds,
        "num_prompts": num_prompts,
    }
    if num_seeds < 2:
        return CrossedMean(mean, NO_INTERVAL, math.nan, math.nan, **variances)
    total = max(of_rows, of_rest) + max(of_columns, of_rest) - of_rest
    flips = _sign_flips(values.mean(axis=1))
    if total <= 0:
        # Every run differs by the same: there is nothing that an interval could allow for.
        return CrossedMean(mean, (mean, mean), 1.0 if mean == 0 else 0.0, flips, **variances)
    parts = [(of_rows, num_seeds - 1), (of_columns, num_prompts - 1), (of_rest, (num_seeds - 1) * (num_prompts - 1))]
    freedom = total**2 / sum(part**2 / degrees for part, degrees in parts if degrees)
    error = math.sqrt(total / size)
    arm = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return CrossedMean(mean, (mean - arm, mean + arm), p_value, flips, **variances)


def verdict(found: CrossedMean, *, p_value: float) -> Verdict:
    """Whether a difference is above 0, below 0, or not told apart from it.

    ``p_value`` is that of the mean, corrected for the number of comparisons; without one, or without an interval, or where that
    holds 0, nothing is decided.
    """
    low, high = found.ci
    if not p_value < SIGNIFICANCE or low <= 0 <= high or math.isnan(low):
        return "undecided"
    return "holds" if found.mean > 0 else "opposite"


def seeds_needed(found: CrossedMean) -> int | None:
    """How many seeds would tell a true difference as large as this mean from 0 with 80 % chance, on as many prompts.

    None where no number up to ``MOST_SEEDS`` would: the prompts are too few, or there is no difference.
    """
    factor = float(stats.norm.ppf(POWER)) + Z
    if found.mean == 0 or found.num_seeds < 2:
        return None
    for number in range(2, MOST_SEEDS + 1):
        variance = found.of_seeds / number + (found.of_prompts + found.of_noise / number) / found.num_prompts
        if factor * math.sqrt(variance) <= abs(found.mean):
            return max(number, found.num_seeds + 1)
    return None


def _square(total: float, degrees: int) -> float:
    return float(total) / degrees if degrees else 0.0


def _sign_flips(means: NDArray[np.float64]) -> float:
    """Share of sign patterns whose mean is as far from 0: of all of them, or of many seeds of some that are drawn."""
    if len(means) <= _ENUMERATED:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(means))))
    else:
        drawn = np.random.default_rng(0).choice((1.0, -1.0), (2**_ENUMERATED, len(means)))
        signs = np.concatenate([np.ones((1, len(means))), drawn])  # the observed one is among them
    totals = np.abs(signs @ means)
    return float((totals >= totals[0] * (1 - _ROUNDING)).mean())

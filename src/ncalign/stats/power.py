"""How small a difference a set of questions can show, and how many questions a difference needs."""

from __future__ import annotations

import math

from scipy import stats

from ncalign.stats.intervals import SIGNIFICANCE

POWER = 0.8


def detectable_difference(standard_error: float, *, significance: float = SIGNIFICANCE, power: float = POWER) -> float:
    """``(z_{1 - a/2} + z_{power}) * standard_error``: the true difference that a two-sided test finds with the given power.

    The standard error of a mean over n questions is ``sd / sqrt(n)``. For a win rate in points, sd is the preferences' standard
    deviation times 100 and the difference is that from 50. For two models on the same questions it is the standard deviation of
    their paired differences. The normal approximation holds from a few dozen questions on.

    Args:
        standard_error: of the mean.
        significance: a, of the test.
        power: probability of finding the difference.

    Raises:
        ValueError: a number is out of range.

    >>> round(detectable_difference(50.0 / math.sqrt(805)), 2)  # a win rate of wins and losses on AlpacaEval's set
    4.94
    """
    return _checked_factor(standard_error, significance, power) * standard_error


def questions_needed(
    standard_deviation: float, difference: float, *, significance: float = SIGNIFICANCE, power: float = POWER
) -> int:
    """``((z_{1 - a/2} + z_{power}) * sd / difference)^2``, rounded up: the questions that a difference needs.

    Raises:
        ValueError: a number is out of range.

    >>> questions_needed(50.0, 5.0)
    785
    """
    factor = _checked_factor(standard_deviation, significance, power)
    if not difference > 0:
        raise ValueError(f"the difference is {difference}; a number above 0 is needed")
    return max(1, math.ceil((factor * standard_deviation / difference) ** 2))


def _checked_factor(standard_deviation: float, significance: float, power: float) -> float:
    if not (standard_deviation >= 0 and math.isfinite(standard_deviation)):
        raise ValueError(f"the standard deviation or error is {standard_deviation}; a finite number from 0 on is needed")
    if not 0 < significance < 1 or not significance / 2 < power < 1:
        raise ValueError(
            f"significance is {significance} and power {power}: significance between 0 and 1, and power above half of it and "
            "below 1, are needed"
        )
    return float(stats.norm.ppf(1 - significance / 2) + stats.norm.ppf(power))

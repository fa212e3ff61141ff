"""How small a difference a set of questions can show."""

from __future__ import annotations

import math

from scipy import stats

from ncalign.stats.intervals import SIGNIFICANCE

POWER = 0.8


def detectable_difference(standard_error: float) -> float:
    """``(z_{1 - a/2} + z_{power}) * standard_error``: the true difference that a two-sided test at 5 % finds with 80 % chance.

    The standard error of a mean over n questions is ``sd / sqrt(n)``. For a win rate in points, sd is the preferences' standard
    deviation times 100 and the difference is that from 50. For two models on the same questions it is the standard deviation of
    their paired differences. The normal approximation holds from a few dozen questions on.

    Raises:
        ValueError: the standard error is negative or not finite.

    >>> round(detectable_difference(50.0 / math.sqrt(805)), 2)  # a win rate of wins and losses on AlpacaEval's set
    4.94
    """
    if not 0 <= standard_error < math.inf:
        raise ValueError(f"the standard error is {standard_error}; a finite number from 0 on is needed")
    return float(stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(POWER)) * standard_error

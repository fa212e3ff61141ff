"""Temperatures that suit a data set: of the rewards (alpha) and of the kernel's weights (beta)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

FEW, MOST = 1.3, 0.8
"""Effective targets of a group: more than one-hot, and less than this share of its candidates."""
KERNEL_FEW, KERNEL_MOST = 1.5, 0.95
BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def effective_number(scores: Sequence[float], temperature: float) -> float:
    """``exp(entropy(softmax(scores / temperature)))``: how many candidates share the weight.

    >>> round(effective_number([0.0, 0.0, 0.0], 1.0), 6), round(effective_number([1.0, 0.0], 1e-3), 6)
    (3.0, 1.0)
    """
    logits = np.asarray(scores, dtype=np.float64) / temperature
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    kept = weights[weights > 0]
    return float(np.exp(-(kept * np.log(kept)).sum()))


def alpha_range(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The alphas between which the targets ``softmax(reward / alpha)`` are neither one-hot nor flat.

    Their effective number, that of the median group in which rewards differ, lies between 1.3 (or what the ties for the best
    give) and 0.8 of the candidates there.

    Returns:
        The lowest and the highest such alpha; None where no rewards differ or no alpha does.
    """
    usable = [rewards for rewards in groups if len(set(rewards)) > 1]
    if not usable:
        return None
    size = float(np.median([len(rewards) for rewards in usable]))
    scale = float(np.mean([np.std(rewards) for rewards in usable]))

    def number(alpha: float) -> float:
        return float(np.median([effective_number(rewards, alpha) for rewards in usable]))

    flattest = number(1e-6 * scale)
    low, high = max(FEW, flattest + 0.05 * (size - flattest)), MOST * size
    if low >= high:
        low = flattest + 0.25 * (size - flattest)
        high = flattest + 0.75 * (size - flattest)
    return _where(number, low, scale), _where(number, high, scale)


def beta_range(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The betas between which the kernel's weights ``softmax(beta * score)`` are neither one-hot nor uniform.

    Their effective sample size, that of the median group with two lower-scored candidates or more, lies between 1.5 and 0.95 of
    those.

    Returns:
        The lowest and the highest such beta; None where no such group has two scores that differ.
    """
    usable = [scores for scores in groups if len(scores) > 1 and max(scores) > min(scores)]
    if not usable:
        return None
    size = float(np.median([len(scores) for scores in usable]))
    scale = float(np.mean([np.std(scores) for scores in usable]))

    def number(temperature: float) -> float:
        return float(np.median([sample_size(scores, 1 / temperature) for scores in usable]))

    few = min(KERNEL_FEW, 0.75 * size)
    return 1 / _where(number, KERNEL_MOST * size, scale), 1 / _where(number, few, scale)


def sample_size(scores: Sequence[float], beta: float) -> float:
    """Effective sample size ``1 / sum(w^2)`` of the weights ``softmax(beta * score)``."""
    return float(1 / np.square(kernel_weights(scores, beta)).sum())


def kernel_weights(scores: Sequence[float], beta: float) -> NDArray[np.float64]:
    """``softmax(beta * score)``."""
    logits = beta * np.asarray(scores, dtype=np.float64)
    weights = np.exp(logits - logits.max())
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def _where(rising: Callable[[float], float], wanted: float, scale: float) -> float:
    """The temperature at which a rising function of it has a value, by bisection on a log scale of twelve decades."""
    low, high = np.log(scale) - 6 * np.log(10), np.log(scale) + 6 * np.log(10)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(float(np.exp(middle))) < wanted else (low, middle)
    return float(np.exp((low + high) / 2))

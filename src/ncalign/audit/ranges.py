"""Temperatures that suit a data set: of the rewards (alpha) and of the kernel's weights (beta)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ncalign.objectives.kernels import effective_sample_size, kernel_entropy
from ncalign.objectives.targets import target_weights, temperature_where

FEW, MOST = 1.3, 0.8
"""Effective targets of a group: more than one-hot, and less than this share of its candidates."""
KERNEL_FEW, KERNEL_MOST = 1.5, 0.95
BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def padded(rows: Sequence[Sequence[float]]) -> tuple[Float[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """Rows of different lengths as one tensor, and where they have numbers."""
    mask = torch.tensor([len(row) for row in rows]).unsqueeze(1) > torch.arange(max(map(len, rows), default=1))
    values = torch.zeros(mask.shape, dtype=torch.float64)
    values[mask] = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    return values, mask


def effective_numbers(rewards: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], alpha: float) -> Float[Tensor, " N"]:
    """``exp(entropy(softmax(rewards / alpha)))``: how many candidates share the weight.

    >>> effective_numbers(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool), 1e-3)
    tensor([2., 1.])
    """
    return kernel_entropy(target_weights(rewards, mask, alpha=alpha)).exp()


def sample_sizes(scores: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], beta: float) -> Float[Tensor, " N"]:
    """Effective sample size ``1 / sum(w^2)`` of the kernel's weights ``softmax(beta * score)``."""
    return effective_sample_size(target_weights(scores, mask, alpha=1 / beta))


def alpha_range(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The alphas between which the targets ``softmax(reward / alpha)`` are neither one-hot nor flat.

    Their effective number, that of the median group in which rewards differ, lies between 1.3 (or what the ties for the best
    give) and 0.8 of the candidates there.

    Returns:
        The lowest and the highest such alpha; None where no rewards differ or no alpha does.
    """
    usable = [row for row in groups if len(set(row)) > 1]
    if not usable:
        return None
    size = float(np.median([len(row) for row in usable]))
    scale = float(np.mean([np.std(row) for row in usable]))

    rewards, mask = padded(usable)

    def number(alpha: float) -> float:
        return float(np.median(effective_numbers(rewards, mask, alpha).numpy()))

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
    usable = [row for row in groups if len(set(row)) > 1]
    if not usable:
        return None
    size = float(np.median([len(row) for row in usable]))
    scale = float(np.mean([np.std(row) for row in usable]))

    scores, mask = padded(usable)

    def number(temperature: float) -> float:
        return float(np.median(sample_sizes(scores, mask, 1 / temperature).numpy()))

    few = min(KERNEL_FEW, 0.75 * size)
    return 1 / _where(number, KERNEL_MOST * size, scale), 1 / _where(number, few, scale)


def _where(rising: Callable[[float], float], wanted: float, scale: float) -> float:
    """The temperature at which a rising function of it has a value, within six decades of a scale."""
    decades = 6 * math.log(10)
    return temperature_where(rising, wanted, math.log(scale) - decades, math.log(scale) + decades)

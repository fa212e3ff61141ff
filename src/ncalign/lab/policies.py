"""Policies small enough to enumerate, and exact expectations over everything that could be drawn from them.

All of it is float64. A policy is a table with a logit, or an implicit reward, for each completion of the alphabet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncalign.objectives import info_nca_loss, nca_loss

Loss = Callable[[Tensor], Tensor]
GroupLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(implicit rewards [B, K], positive [B], mask [B, K]) -> [B]``, such as `rnce_loss`."""
RewardLoss = Callable[[Tensor, Tensor], Tensor]
"""``(implicit rewards [N, K], rewards [N, K]) -> [N]``."""


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers that are the same at every call."""
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def every(values: Tensor) -> Tensor:
    """A mask in which everything is real."""
    return torch.ones_like(values, dtype=torch.bool)


def firsts(values: Tensor) -> Tensor:
    """Column 0 as each group's positive."""
    return torch.zeros(values.shape[0], dtype=torch.long)


def total_variation(left: Tensor, right: Tensor) -> Tensor:
    """Total variation distance of distributions over the last axis.

    Example:
        >>> total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75]))
        tensor(0.7500)
    """
    return (left - right).abs().sum(dim=-1) / 2


def info_nca(alpha: float) -> RewardLoss:
    """InfoNCA of whole groups at one alpha."""
    return lambda r, rewards: info_nca_loss(r, rewards, every(r), alpha=alpha)


def nca(alpha: float) -> RewardLoss:
    """NCA of whole groups at one alpha."""
    return lambda r, rewards: nca_loss(r, rewards, every(r), alpha=alpha)


def value_and_gradient(loss: Loss, at: Tensor) -> tuple[Tensor, Tensor]:
    """Values of a loss, and the gradient of their sum."""
    point = at.detach().clone().requires_grad_()
    value = loss(point)
    (gradient,) = torch.autograd.grad(value.sum(), point)
    return value.detach(), gradient


def minimum(loss: Loss, start: Float[Tensor, " V"], *, num_steps: int = 200) -> Float[Tensor, " V"]:
    """Where a smooth convex loss of a few numbers is smallest: Newton's method, halving steps that don't lower the loss.

    Directions in which the loss is flat, such as a constant added to all, are left as they are.

    Example:
        >>> minimum(lambda x: (x - 3.0).square().sum(), torch.zeros(1, dtype=torch.float64))
        tensor([3.], dtype=torch.float64)
    """
    point = start.detach().clone()
    for _ in range(num_steps):
        value, gradient = value_and_gradient(loss, point)
        if float(gradient.abs().max()) < 1e-15:
            break
        curvature = torch.autograd.functional.hessian(loss, point)
        step = torch.linalg.pinv(curvature, rtol=1e-13, hermitian=True) @ gradient
        size = 1.0
        while size > 1e-9 and not float(loss(point - size * step)) <= float(value):
            size /= 2
        if size <= 1e-9:
            break
        point = point - size * step
    return point


def tuples(size: int, length: int) -> Int[Tensor, "N length"]:
    """Every sequence of this length over an alphabet.

    Example:
        >>> tuples(2, 2).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    return torch.tensor(list(itertools.product(range(size), repeat=length)))


def multisets(size: int, length: int) -> tuple[Int[Tensor, "N length"], Int[Tensor, "N size"], Float[Tensor, " N"]]:
    """Every sequence of this length up to its order, with how often each letter occurs and the log of its number of orders.

    Example:
        >>> columns, counts, log_orders = multisets(2, 2)
        >>> columns.tolist(), counts.tolist(), log_orders.exp().round().tolist()
        ([[0, 0], [0, 1], [1, 1]], [[2, 0], [1, 1], [0, 2]], [1.0, 2.0, 1.0])
    """
    columns = torch.tensor(list(itertools.combinations_with_replacement(range(size), length)))
    counts = torch.nn.functional.one_hot(columns, size).sum(dim=1)
    log_orders = torch.lgamma(torch.tensor(length + 1.0, dtype=torch.float64)) - torch.lgamma(counts.double() + 1).sum(dim=1)
    return columns, counts, log_orders


def multiset_probabilities(
    counts: Int[Tensor, "N V"], log_orders: Float[Tensor, " N"], probabilities: Float[Tensor, "*R V"]
) -> Float[Tensor, "*R N"]:
    """Probability of each multiset when its letters are drawn independently, for each distribution."""
    return (log_orders + torch.xlogy(counts.double(), probabilities.unsqueeze(-2)).sum(dim=-1)).exp()


def sequence_probabilities(columns: Int[Tensor, "N L"], probabilities: Float[Tensor, " V"]) -> Float[Tensor, " N"]:
    """Probability of each sequence when its letters are drawn independently."""
    return probabilities[columns].prod(dim=1)


def group_gradients(
    loss: GroupLoss, r: Float[Tensor, " V"], columns: Int[Tensor, "N S"], log_weights: Float[Tensor, "N S"] | None = None
) -> Float[Tensor, "N V"]:
    """Gradient of each group's loss by the implicit rewards of the alphabet; the group's first completion is its positive."""
    added = torch.zeros(columns.shape, dtype=r.dtype) if log_weights is None else log_weights
    _, gradients = value_and_gradient(lambda values: loss(values, firsts(values), every(values)), r[columns] + added)
    return torch.zeros(columns.shape[0], r.shape[0], dtype=r.dtype).scatter_add(1, columns, gradients)


def mean_gradient(
    loss: GroupLoss, r: Float[Tensor, " V"], positives: Float[Tensor, " V"], negatives: Float[Tensor, " V"], num_negatives: int
) -> Float[Tensor, " V"]:
    """Expected gradient of a loss whose positive and M negatives are drawn independently from two distributions."""
    columns = tuples(r.shape[0], num_negatives + 1)
    weights = positives[columns[:, 0]] * sequence_probabilities(columns[:, 1:], negatives)
    return (weights.unsqueeze(1) * group_gradients(loss, r, columns)).sum(dim=0)


def spread(values: Float[Tensor, " V"]) -> float:
    """Distance of the largest and the smallest: 0 for a constant."""
    return float(values.max() - values.min())

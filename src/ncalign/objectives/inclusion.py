"""Sampling a fixed number of a group's candidates with unequal probabilities: inclusion probabilities and systematic draws.

A sum over a group, of exponentials or of gradients, is estimated without bias from some of its terms when each that is drawn is
divided by the expected number of its draws (Horvitz and Thompson, 1952).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["inclusion_probabilities", "systematic", "systematic_from"]

_WHOLE = 1e-9
"""Expected numbers of draws that add up to a whole number but for rounding."""


@torch.no_grad()
def inclusion_probabilities(weights: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], size: int) -> Float[Tensor, "B K"]:
    r"""Probabilities $\pi_i = \min(1, c\, w_i)$ with which candidates enter a sample of ``size`` without replacement.

    $c$ is such that they add up to the size. Candidates whose share would be above 1 enter surely, and the others share
    the rest in proportion to their weights.

    Args:
        weights: $w_i \ge 0$, finite, in any unit: kernel probabilities, sizes of gradient coefficients. Masked entries may
            hold anything.
        mask: True for the candidates that may be drawn.
        size: Candidates in a sample, at least 1.

    Returns:
        Float64. They add up to the size, or to the number of candidates with a weight above 0 where that is smaller: each of
        those then has 1. A weight of 0 has 0.

    Raises:
        ValueError: The size is below 1.

    Example:
        >>> weights, mask = torch.tensor([[6.0, 1.0, 2.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool)
        >>> inclusion_probabilities(weights, mask, 2)  # 2 * 6 / 10 is above 1: one place is left for 1 : 2 : 1
        tensor([[1.0000, 0.2500, 0.5000, 0.2500]], dtype=torch.float64)

    Source:
        Probability-proportional-to-size sampling; Särndal, Swensson and Wretman, Model Assisted Survey Sampling, section 3.6.
    """
    if size < 1:
        raise ValueError(f"size is {size}: a sample has a whole number of candidates of at least 1")
    if weights.shape[1] == 0:
        return weights.double()
    values = torch.where(mask, weights, 0.0).double()
    # In units of the largest, so that sums neither overflow nor vanish.
    values = values / values.amax(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    ordered, order = values.sort(dim=1, descending=True)
    places = (values > 0).sum(dim=1, keepdim=True).clamp(max=size)
    surely = torch.arange(values.shape[1], device=values.device)
    # The rest's weight where the first 0, 1, 2, ... enter surely.
    rest = ordered.flip(1).cumsum(dim=1).flip(1)
    left = (places - surely).clamp(min=0)
    fits = (left * ordered <= rest).to(torch.uint8).argmax(dim=1, keepdim=True)
    scale = left.gather(1, fits) / rest.gather(1, fits).clamp(min=torch.finfo(values.dtype).tiny)
    probabilities = torch.where(surely < fits, 1.0, (ordered * scale).clamp(max=1.0))
    return torch.zeros_like(values).scatter(1, order, probabilities)


@torch.no_grad()
def systematic(
    probabilities: Float[Tensor, "B K"], generator: torch.Generator, *, sides: Bool[Tensor, "B K"] | None = None
) -> Int[Tensor, "B K"]:
    """How often each candidate is drawn by systematic sampling in a random order.

    Args:
        probabilities: Expected number of draws of each, at least 0: inclusion probabilities, or for draws with replacement
            their number times the probability of one.
        generator: Source of randomness; numbers are drawn on its device.
        sides: Two kinds of candidates, one laid out before the other, each in a random order: of either kind as many are drawn
            as are expected, rounded down or up. None: all are of one kind.

    Returns:
        Whole numbers with these expectations, each the whole number below its expectation or the one above. They add up to
        the sum of the expectations where that is a whole number, and differ from it by less than 1 elsewhere.

    Example:
        >>> halves = torch.tensor([[0.5, 1.0, 0.5, 0.0]])
        >>> counts = systematic(halves, torch.Generator().manual_seed(0))
        >>> counts[0, 1:].tolist() in ([1, 1, 0], [1, 0, 0]), counts.sum().item()
        (True, 2)

    Source:
        Madow, On the theory of systematic sampling II (1949); with replacement, systematic resampling of particle filters.
    """
    device = generator.device
    places = torch.rand(probabilities.shape, generator=generator, device=device, dtype=torch.float64)
    order = (places if sides is None else places + sides.to(device)).argsort(dim=1)
    start = torch.rand(probabilities.shape[:1], generator=generator, device=device, dtype=torch.float64)
    order, start = order.to(probabilities.device), start.to(probabilities.device)
    counts = systematic_from(probabilities.gather(1, order), start)
    return torch.zeros_like(counts).scatter(1, order, counts)


@torch.no_grad()
def systematic_from(probabilities: Float[Tensor, "B K"], start: Float[Tensor, " B"]) -> Int[Tensor, "B K"]:
    r"""`systematic` in the candidates' own order with a given start: what is random there is an argument here.

    The expectations' fractions are laid out one after the other on a line, and a candidate is drawn once more than the whole
    number in its expectation where one of the points $u, u + 1, u + 2, \dots$ falls on its stretch.

    Args:
        probabilities: As `systematic`'s.
        start: $u$, in [0, 1).

    Returns:
        As `systematic`.

    Example:
        >>> expected = torch.tensor([[0.5, 1.0, 0.25, 0.25]])
        >>> [systematic_from(expected, torch.tensor([u])).tolist()[0] for u in (0.4, 0.6, 0.8)]
        [[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    """
    expected = probabilities.double()
    whole = expected.floor()
    ends = (expected - whole).cumsum(dim=1)
    # The last point must not be lost, nor one gained, by the rounding of the sums.
    last = ends[:, -1:].round()
    ends = torch.where((ends - last).abs() < _WHOLE, last, ends)
    # Points below each end; a difference to the start would round.
    passed = ends.floor() + (ends - ends.floor() > start.double().unsqueeze(1))
    return (whole + passed.diff(dim=1, prepend=torch.zeros_like(passed[:, :1]))).long()

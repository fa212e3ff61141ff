"""The temperature of a kernel: given, or found for each group so that its draws are as spread as asked."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ncalign.objectives.draws import finite
from ncalign.objectives.targets import working_precision

__all__ = ["temperature_for_ess"]

_LEAST = 1.05
"""Effective sample size that can be asked for, over the number of tied best candidates, which is where temperature 0 leads."""
_SHARPEST, _FLATTEST = math.log(40.0), 18.0
"""Logarithms: the best's lead over the next in temperatures at most; the temperature over the scores' range at most."""
_POINTS, _ROUNDS, _NEWTON = 64, 3, 3


@torch.no_grad()
def temperature_for_ess(scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], share: float) -> Float[Tensor, " B"]:
    r"""Temperature $T$ at which $\mathrm{softmax}(s / T)$ has an effective sample size of a share of the L candidates.

    $$\frac{1}{\sum_i p_i^2} = \text{share} \cdot L, \qquad p = \mathrm{softmax}(s / T)$$

    The left side rises with the temperature, from the number of candidates tied for the highest score to L. The share is held
    wherever it lies at least 5 % above that number; where it does not, the temperature is the one that leads 5 % above (at
    most to L), so that every candidate can still be drawn.

    Args:
        scores: What the kernel weighs by, $s$. Infinite ones count as the largest finite number; masked entries may hold
            anything.
        mask: True for the L candidates that may be drawn.
        share: Of the candidates, in (0, 1].

    Returns:
        Float64, one a group; 1 where it changes nothing: for a single candidate, or none, and where all scores are equal.

    Raises:
        ValueError: The share is not in (0, 1].

    Example:
        >>> import math
        >>> scores, mask = torch.tensor([[math.log(3.0), 0.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> temperature_for_ess(scores, mask, 0.8)  # 3 : 1 has the effective sample size 16 / 10, which is 0.8 * 2
        tensor([1.0000], dtype=torch.float64)

    Source:
        Ours. Importance samplers temper their targets to hold the effective sample size in the same way.
    """
    if not 0 < share <= 1:
        raise ValueError(f"target_ess is {share}: it is a share of the candidates, above 0 and at most 1")
    if mask.shape[1] == 0:
        return scores.new_ones(len(scores), dtype=torch.float64)
    values, count = finite(scores.double(), mask), mask.sum(dim=1).double()
    best = values.amax(dim=1, keepdim=True)
    # Below the best, so that nothing overflows.
    behind = torch.where(mask, values - best, -torch.inf)
    lowest = torch.where(mask, behind, 0.0).amin(dim=1)
    varied = lowest < 0
    lead = torch.where(behind < 0, behind, -torch.inf).amax(dim=1)
    wanted = torch.maximum(share * count, _LEAST * (behind == 0).sum(dim=1).double()).minimum(count).clamp(min=1).log()
    low = torch.where(varied, (-lead).clamp(max=torch.finfo(values.dtype).max).log() - _SHARPEST, 0.0)
    high = torch.where(varied, (-lowest).log() + _FLATTEST, 0.0).clamp(max=math.log(torch.finfo(values.dtype).max))
    behind = torch.where(varied.unsqueeze(1), behind, 0.0)
    steps = torch.linspace(0, 1, _POINTS + 1, dtype=torch.float64, device=values.device)
    for _ in range(_ROUNDS):
        points = low.unsqueeze(1) + (high - low).unsqueeze(1) * steps
        below = (_log_ess(behind, points)[0] < wanted.unsqueeze(1)).sum(dim=1, keepdim=True).clamp(min=1, max=_POINTS)
        low, high = points.gather(1, below - 1).squeeze(1), points.gather(1, below).squeeze(1)
    middle = (low + high) / 2
    for _ in range(_NEWTON):
        found, slope = (value.squeeze(1) for value in _log_ess(behind, middle.unsqueeze(1)))
        step = torch.where(slope > 0, (wanted - found) / torch.where(slope > 0, slope, 1.0), 0.0)
        middle = torch.minimum(torch.maximum(middle + step, low), high)
    return torch.where(varied, middle.exp(), 1.0)


def _log_ess(behind: Float[Tensor, "B K"], points: Float[Tensor, "B P"]) -> tuple[Float[Tensor, "B P"], Float[Tensor, "B P"]]:
    """Log of the effective sample size at these logarithms of the temperature, and its derivative by them."""
    logits = behind.unsqueeze(1) / points.exp().unsqueeze(2)
    once, twice = logits.logsumexp(dim=2), (2 * logits).logsumexp(dim=2)
    # Of the scores in temperatures, under p and under p squared; a candidate without probability adds nothing.
    real = logits.isfinite()
    means = [torch.where(real, weights * logits, 0.0).sum(dim=2) for weights in (logits.softmax(2), (2 * logits).softmax(2))]
    return 2 * once - twice, 2 * (means[1] - means[0])


def tempered(
    scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], temperature: float, target_ess: float | None
) -> Float[Tensor, "B K"]:
    """Keys whose softmax over the mask a kernel draws from, finite for all candidates in it and -inf elsewhere."""
    if target_ess is None:
        return finite(working_precision(scores) / temperature, mask)
    found = temperature_for_ess(scores, mask, target_ess).unsqueeze(1)
    return finite(finite(scores.double(), mask) / found, mask)

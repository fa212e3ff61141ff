"""How candidates are drawn or taken: the strategies' keys, and draws from the softmax of keys.

Below the kernels, which check settings and leave out candidates; nothing here knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncalign.objectives.targets import working_precision


def near_sweet_spot(scores: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """The nearer a reward to two standard deviations below the group's mean, the higher the key."""
    rated = mask & rewards.isfinite()
    values = torch.where(rated, working_precision(rewards), 0.0)
    # In units of the largest reward, so that squares don't overflow.
    values = values / values.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    count = rated.sum(dim=1, keepdim=True).clamp(min=1)
    mean = values.sum(dim=1, keepdim=True) / count
    deviation = (torch.where(rated, values - mean, 0.0).square().sum(dim=1, keepdim=True) / count).sqrt()
    return -(values - (mean - 2 * deviation)).abs()


def softmax(keys: Tensor, available: Tensor) -> Float[Tensor, "B K"]:
    """Probabilities over the available candidates; all 0 where there is none."""
    return torch.where(available, keys.softmax(dim=1), 0.0)


def one_hot(keys: Tensor, available: Tensor) -> Float[Tensor, "B K"]:
    """All the probability on the candidate with the highest key."""
    return (torch.arange(keys.shape[1], device=keys.device) == top(keys, available, 1)).to(keys.dtype)


class Rule(NamedTuple):
    """What distinguishes a strategy: a new one is an entry of `RULES`, and a name in `Strategy`.

    Attributes:
        keys: ``(scores, rewards, mask) -> [B, K]``, by which candidates are drawn or taken; the scores are tempered.
        share: ``(keys, available) -> [B, K]``, the probabilities of the first draw.
        is_random: whether candidates are drawn from the softmax of the keys; otherwise the highest keys are taken.
        reads: what the keys are made of.
    """

    keys: Callable[[Tensor, Tensor, Tensor], Tensor]
    share: Callable[[Tensor, Tensor], Tensor]
    is_random: bool
    reads: Literal["scores", "rewards", "nothing"]


RULES: Mapping[str, Rule] = {
    "mc": Rule(lambda scores, rewards, mask: scores, softmax, True, "scores"),
    "max": Rule(lambda scores, rewards, mask: scores, one_hot, False, "scores"),
    "min": Rule(lambda scores, rewards, mask: -scores, one_hot, False, "scores"),
    "uniform": Rule(lambda scores, rewards, mask: torch.zeros_like(scores), softmax, True, "nothing"),
    "sweet_spot": Rule(near_sweet_spot, one_hot, False, "rewards"),
    # Each candidate in turn: as probabilities, every one is as likely as another.
    "all": Rule(lambda scores, rewards, mask: torch.zeros_like(scores), softmax, False, "nothing"),
}


def finite(values: Tensor, available: Tensor) -> Tensor:
    """Keys to sort by: real candidates keep a finite key, so that even one scored -inf stays above those left out."""
    values = working_precision(values)
    bound = torch.finfo(values.dtype).max / 4
    return torch.where(available, values.clamp(min=-bound, max=bound), -torch.inf)


def without(mask: Tensor, column: Tensor) -> Tensor:
    """The mask with one column a group switched off; a column of -1 switches off none."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) != column.unsqueeze(1))


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent uniform numbers in [0, 1) in this tensor's shape."""
    return torch.rand(like.shape, generator=generator, device=generator.device).to(like.device)


def gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise in this tensor's shape and type: minus the log of exponential numbers."""
    noise = torch.empty(like.shape, dtype=like.dtype, device=generator.device).exponential_(generator=generator)
    return -noise.clamp_(min=torch.finfo(like.dtype).tiny).log_().to(like.device)


def first_true(keys: Tensor, allowed: Tensor) -> Tensor:
    """Column of the highest key along the last dimension (the first of tied ones); -1 where nothing is allowed."""
    return torch.where(allowed.any(dim=-1), torch.where(allowed, keys, -torch.inf).argmax(dim=-1), -1)


def top(keys: Tensor, available: Tensor, num: int) -> Tensor:
    """Columns of the ``num`` highest keys, highest first, the first of tied ones first; -1 past the available ones."""
    order = keys.argsort(dim=1, descending=True, stable=True)[:, :num]
    order = torch.nn.functional.pad(order, (0, num - order.shape[1]), value=-1)
    places = torch.arange(num, device=keys.device)
    return torch.where(places < available.sum(dim=1, keepdim=True), order, -1)


def independent(logits: Tensor, available: Tensor, generator: torch.Generator, *, num: int) -> Int[Tensor, "B M"]:
    """M independent draws from the softmax over the available candidates."""
    noise = gumbel(logits.unsqueeze(1).expand(-1, num, -1), generator)
    return first_true(logits.unsqueeze(1) + noise, available.unsqueeze(1).expand_as(noise))


def gumbel_top(logits: Tensor, available: Tensor, generator: torch.Generator, *, num: int) -> Int[Tensor, "B M"]:
    """M draws from the softmax over the available candidates without replacement: the Gumbel top M."""
    return top(finite(logits + gumbel(logits, generator), available), available, num)


def as_often(counts: Int[Tensor, "B K"], num: int) -> Int[Tensor, "B M"]:
    """Columns in which each candidate is as often as it is counted, in the group's order; -1 past the last."""
    ends = counts.cumsum(dim=1)
    places = torch.arange(num, device=counts.device).expand(len(counts), -1).contiguous()
    columns = torch.searchsorted(ends, places, right=True)
    return torch.where(columns < counts.shape[1], columns, -1)


def chains(
    logits: Tensor,
    start: Tensor,
    available: Tensor,
    generator: torch.Generator,
    *,
    num: int,
    replacement: bool,
    chain_steps: int,
    num_proposals: int,
) -> Int[Tensor, "B M"]:
    """Last states of M chains of conditional importance sampling that propose some of the candidates at each step.

    A chain without a state (its start is not available, or an earlier chain ended there) draws its first one from the proposals
    alone. Without replacement the chains run one after the other, each on the candidates where none before it ended.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    drawn = []
    for _ in range(num):
        reachable = available.gather(1, start.clamp(min=0).unsqueeze(1)).squeeze(1)
        state = torch.where(reachable, start, -1)
        for _ in range(chain_steps):
            others = without(available, state)
            order = top(torch.where(others, uniform(logits, generator), -1.0), others, num_proposals)
            proposed = (columns == order.unsqueeze(2)).any(dim=1) | (columns == state.unsqueeze(1))
            state = first_true(logits + gumbel(logits, generator), proposed)
        drawn.append(state)
        available = available if replacement else without(available, state)
    return torch.stack(drawn, dim=1)

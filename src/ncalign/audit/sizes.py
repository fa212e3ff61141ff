r"""How many candidates pay: the noise of a group's gradient against its cost, by M, S and K.

The gradient of a loss of a whole group is $\sum_i c_i \nabla r_i$ with $c_i = \partial \ell / \partial r_i$ known from the
scores. If the $\nabla r_i$ are orthogonal and equally long, its square is $\sum_i c_i^2$. That of the same sum over candidates
drawn with probabilities $\pi_i$, each divided by its own, is $\sum_i c_i^2 / \pi_i$ on average, however they are drawn
together. Over all groups the second divided by the first is the variance of a step relative to one with all candidates, which
has that of the differences between groups alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ncalign.audit.ranges import padded
from ncalign.objectives.binary import nca_loss
from ncalign.objectives.estimators import coefficients
from ncalign.objectives.inclusion import inclusion_probabilities
from ncalign.objectives.kernels import eligible_negatives, pick_positive
from ncalign.objectives.ranking import info_nca_loss, rnce_loss

ENOUGH = 0.02
"""Where the variance is within this share of that with all candidates, nothing is gained beyond."""
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
HEADINGS = {
    "negatives": "mc_po, rnce: M negatives, drawn by the kernel",
    "drawn_info_nca": "info_nca: S of the candidates, drawn by the sizes of their coefficients",
    "drawn_nca": "nca: S of the candidates, drawn by the sizes of their coefficients",
    "candidates": "nca: K candidates a group, all with gradients",
}
_SUBSETS, _MOST_NUMBERS = 64, 2_000_000

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(implicit rewards [B, K], rewards [B, K], mask [B, K]) -> [B]``."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ScoredGroup:
    """What a model's pass over a group leaves.

    Attributes:
        scores: of each candidate: its log-ratio or, without a reference, its log-prob, in nats.
        prompt: tokens of the prompt.
        completions: tokens of each completion.
    """

    scores: tuple[float, ...]
    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """Tokens of the groups, as the cost of a step counts them: 1 for each token through the layers, forward.

    Attributes:
        prompt: tokens of each prompt.
        lengths: tokens of each completion; 0 where masked.
        head: cost of a completion's token, ``1 + V d / N``: the vocabulary's head is computed for it too.
        dpo: cost of a step of DPO on the best and one random candidate below it, the prompt computed once.
    """

    prompt: Float[Tensor, " N"]
    lengths: Float[Tensor, "N K"]
    head: float
    dpo: float

    def with_all(self, share: float = 1.0) -> float:
        """Cost of a step with gradients through this share of all candidates, in steps of DPO."""
        return float(3 * self.prompt.sum() + 3 * self.head * share * self.lengths.sum()) / self.dpo

    def drawn(self, scored: Bool[Tensor, "N K"], probabilities: Float[Tensor, "N K"]) -> float:
        """Cost of a step that scores some candidates and computes gradients of those drawn, in steps of DPO.

        The prompts are computed once, for both.
        """
        tokens = (self.lengths * scored).sum() + 3 * (probabilities * self.lengths).sum()
        return float(3 * self.prompt.sum() + self.head * tokens) / self.dpo


def audit_sizes(
    groups: Sequence[ScoredGroup],
    rewards: Sequence[Sequence[float]],
    *,
    beta: float | None,
    alpha: float,
    head: float,
    seed: int,
) -> tuple[dict[str, float], dict[str, Rows]]:
    """How the variance of a step and its cost change with M, S and K.

    Args:
        groups: what the model's pass left, of candidates with a reward alone, in groups in which rewards differ.
        rewards: of the same candidates.
        beta: of the implicit rewards, ``beta * score``; None: all are 0, as in the first step of training.
        alpha: of the targets of InfoNCA and NCA.
        head: cost of a completion's token, in those of a prompt's.
        seed: of the subsets by which K is judged, where a group has too many to take all.

    Returns:
        Numbers: ``pays/NAME``, the size with the least noise for its compute, and ``pays/NAME_enough``, the smallest whose
        variance is within 2 % of that with all. And tables: ``negatives`` (M of RNCE, drawn by the kernel), ``drawn_info_nca``
        and ``drawn_nca`` (S of K), and ``candidates`` (K of NCA). A row holds the size, the variance relative to all
        candidates, the cost in steps of DPO, and the efficiency: the compute that all candidates with gradients take for the
        same noise, over its own.
    """
    r, mask = padded([group.scores for group in groups])
    r = torch.zeros_like(r) if beta is None else beta * r
    outside, _ = padded(rewards)
    positive = pick_positive(outside, mask, generator=None)
    below = eligible_negatives(outside, positive, mask)
    entered = below.scatter(1, positive.unsqueeze(1), True)
    contrast = coefficients(lambda values: rnce_loss(values, positive, entered), r)
    by_kernel, costs = torch.where(below, contrast, 0.0), _costs(groups, positive, below, head)

    def negatives(size: int) -> Float[Tensor, "N K"]:
        return inclusion_probabilities(by_kernel, below, size).scatter(1, positive.unsqueeze(1), 1.0)

    def drawn(loss: Loss) -> Rows:
        of = coefficients(lambda values: loss(values, outside, mask), r)
        return _by_size("S", of, lambda size: inclusion_probabilities(of.abs(), mask, size), range(2, most + 1), mask, costs)

    most = int(mask.sum(dim=1).max())
    of_pairs = replace(costs, lengths=costs.lengths * entered)
    tables = {
        "negatives": _by_size("M", contrast, negatives, range(1, int(below.sum(dim=1).max()) + 1), below, of_pairs),
        "drawn_info_nca": drawn(lambda *given: info_nca_loss(*given, alpha=alpha)),
        "drawn_nca": drawn(lambda *given: nca_loss(*given, alpha=alpha)),
        "candidates": _by_candidates(r, outside, mask, alpha, costs, seed),
    }
    numbers: dict[str, float] = {}
    for name, rows in tables.items():
        numbers |= _verdict(name, rows)
    return numbers, {f"pays_{name}": rows for name, rows in tables.items()}


def step_variance(coefficients: Float[Tensor, "N K"], probabilities: Float[Tensor, "N K"]) -> float:
    r"""Mean square of the gradient of drawn candidates over that with all: $\sum c^2 / \pi$ over $\sum c^2$, over all groups.

    Example:
        >>> step_variance(torch.tensor([[-1.0, 0.5, 0.5]]), torch.tensor([[1.0, 0.5, 0.5]]))  # (1 + 1) / 1.5
        1.3333333730697632
    """
    squares = coefficients.square()
    drawn = torch.where(squares > 0, squares / probabilities.clamp(min=torch.finfo(squares.dtype).tiny), 0.0)
    return float(drawn.sum() / squares.sum())


def _costs(groups: Sequence[ScoredGroup], positive: Int[Tensor, " N"], below: Bool[Tensor, "N K"], head: float) -> Costs:
    prompt = torch.tensor([group.prompt for group in groups], dtype=torch.float64)
    lengths, _ = padded([[float(length) for length in group.completions] for group in groups])
    random = (lengths * below).sum(dim=1) / below.sum(dim=1)
    pairs = lengths.gather(1, positive.unsqueeze(1)).squeeze(1) + random
    return Costs(prompt, lengths, head, float((3 * prompt + 3 * head * pairs).sum()))


def _row(letter: str, size: int, variance: float, cost: float, whole: float) -> dict[str, Any]:
    return {letter: size, "variance": variance, "cost": cost, "efficiency": whole / (variance * cost)}


def _by_size(
    letter: str,
    of: Float[Tensor, "N K"],
    probabilities: Callable[[int], Tensor],
    sizes: range,
    scored: Bool[Tensor, "N K"],
    costs: Costs,
) -> Rows:
    """Rows of an estimator that draws candidates; with the last size all enter, and nothing is scored before."""
    whole, rows = costs.with_all(), []
    for size in sizes:
        if size in SIZES or size == sizes[-1]:
            chosen = probabilities(size)
            cost = whole if size == sizes[-1] else costs.drawn(scored, chosen)
            rows.append(_row(letter, size, step_variance(of, chosen), cost, whole))
    return rows


def _by_candidates(r: Tensor, rewards: Tensor, mask: Tensor, alpha: float, costs: Costs, seed: int) -> Rows:
    """Rows of NCA on K of the candidates, drawn at random, as if no more had been sampled.

    Its gradient is another one than with all of them: what counts is how much of it lies along that, and how much across.
    """
    numbers = mask.sum(dim=1)
    whole, most, rows = costs.with_all(), int(numbers.max()), []
    chance = torch.Generator().manual_seed(seed)
    for size in [size for size in range(2, most + 1) if size in SIZES or size == most]:
        along = squares = of_all = 0.0
        for number in sorted(set(numbers.tolist())):
            few = numbers == number
            found = _subset_sums(r[few, :number], rewards[few, :number], min(size, number), alpha, chance)
            along, squares, of_all = (total + one for total, one in zip((along, squares, of_all), found, strict=True))
        share = float((numbers.clamp(max=size).double() / numbers * costs.lengths.sum(dim=1)).sum() / costs.lengths.sum())
        rows.append(_row("K", size, squares * of_all / along**2 if along > 0 else math.inf, costs.with_all(share), whole))
    return rows


def _subset_sums(
    r: Float[Tensor, "N K"], rewards: Float[Tensor, "N K"], size: int, alpha: float, chance: torch.Generator
) -> tuple[float, float, float]:
    """Sums over groups of one size, of the mean over subsets: product with the whole gradient, square, and its own square."""

    def gradient(values: Tensor, outside: Tensor) -> Tensor:
        mask = torch.ones_like(values, dtype=torch.bool)
        return coefficients(lambda at: nca_loss(at, outside, mask, alpha=alpha), values)

    subsets = _subsets(r.shape[1], size, max(8, _MOST_NUMBERS // (r.shape[0] * size)), chance)
    whole = gradient(r, rewards)
    part = gradient(r[:, subsets].flatten(0, 1), rewards[:, subsets].flatten(0, 1)).view(len(r), *subsets.shape)
    along = (part * whole[:, subsets]).sum() / len(subsets)
    return float(along), float(part.square().sum() / len(subsets)), float(whole.square().sum())


def _subsets(number: int, size: int, most: int, chance: torch.Generator) -> Int[Tensor, "N size"]:
    """All subsets of a size, or some at random where there are many."""
    if math.comb(number, size) <= min(most, 2 * _SUBSETS):
        return torch.tensor(list(combinations(range(number), size)))
    return torch.rand(min(most, _SUBSETS), number, generator=chance).argsort(dim=1)[:, :size]


def _verdict(name: str, rows: Rows) -> dict[str, float]:
    """The size with the least noise for its compute, and the smallest beyond which the variance hardly falls."""
    letter = next(iter(rows[0])) if rows else ""
    usable = [row for row in rows if math.isfinite(row["efficiency"])]
    if not usable:
        return {}
    best = max(usable, key=lambda row: row["efficiency"])
    enough = next((row for row in usable if row["variance"] <= 1 + ENOUGH), usable[-1])
    return {
        f"pays/{name}": float(best[letter]),
        f"pays/{name}_variance": best["variance"],
        f"pays/{name}_efficiency": best["efficiency"],
        f"pays/{name}_enough": float(enough[letter]),
        f"pays/{name}_most": float(usable[-1][letter]),
    }


def sizes_text(tables: Mapping[str, Rows]) -> list[str]:
    r"""The tables as lines of text.

    Example:
        >>> rows = [{"M": 1, "variance": 1.75, "cost": 0.9, "efficiency": 1.6}]
        >>> print("\n".join(sizes_text({"pays_negatives": rows})[:-1]))
        mc_po, rnce: M negatives, drawn by the kernel
               M  variance to all  cost in DPO steps  efficiency to all
               1             1.75               0.90               1.60
    """
    lines = []
    for name, heading in HEADINGS.items():
        if rows := tables.get(f"pays_{name}"):
            letter = next(iter(rows[0]))
            lines += [heading, f"{letter:>8}  variance to all  cost in DPO steps  efficiency to all"]
            lines += [
                f"{row[letter]:>8}  {row['variance']:>15.2f}  {row['cost']:>17.2f}  {row['efficiency']:>17.2f}" for row in rows
            ]
            lines.append("")
    return lines

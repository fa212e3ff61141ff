"""Which candidates enter the loss: the Monte Carlo kernel of MC-PO, its baselines, and the choice of the positive.

All of it is selection, so nothing here carries a gradient. Whatever is random takes an explicit ``torch.Generator``; random
numbers are drawn on the generator's device, so that a CPU generator gives the same draws wherever the scores are.
``docs/kernels.md`` explains the kernels and what a chain of them means on a fixed set of candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ncalign.objectives.config import Strategy
from ncalign.objectives.draws import (
    RULES,
    as_often,
    chains,
    first_true,
    gumbel_top,
    independent,
    softmax,
    top,
    uniform,
    without,
)
from ncalign.objectives.inclusion import inclusion_probabilities, systematic
from ncalign.objectives.targets import working_precision
from ncalign.objectives.tempering import temperature_for_ess, tempered

__all__ = ["pick_positive", "eligible_negatives", "sample_negatives", "kernel_probabilities", "importance_log_weights"]
__all__ += ["kernel_entropy", "effective_sample_size", "transition_matrix", "build_kernel", "Kernel", "KernelSettings"]


def pick_positive(
    rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, generator: torch.Generator | None
) -> Int[Tensor, " B"]:
    """Column of a candidate with the group's highest reward.

    Args:
        rewards: Rewards. Masked entries may hold anything, and a NaN never wins.
        mask: True for the candidates that exist.
        generator: Breaks ties at random; without one the first of the tied candidates is taken.

    Returns:
        One column a group; -1 where no candidate has a reward.

    Example:
        >>> rewards = torch.tensor([[0.1, 0.9, 0.9], [1.0, 2.0, 3.0]])
        >>> pick_positive(rewards, torch.tensor([[True, True, True], [True, True, False]]), generator=None)
        tensor([1, 1])
    """
    rated = mask & ~rewards.isnan()
    values = torch.where(rated, rewards, -torch.inf)
    best = rated & (values == values.amax(dim=1, keepdim=True))
    order = torch.ones_like(values, dtype=torch.float32) if generator is None else uniform(values, generator)
    return first_true(torch.where(best, order, -1.0), best)


def eligible_negatives(
    rewards: Float[Tensor, "B K"], positive: Int[Tensor, " B"], mask: Bool[Tensor, "B K"]
) -> Bool[Tensor, "B K"]:
    """Candidates whose reward is strictly below the positive's.

    Args:
        rewards: Rewards. Masked entries may hold anything; a NaN is never below anything.
        positive: Column of each group's positive; -1 where there is none.
        mask: True for the candidates that exist.

    Returns:
        True for each negative. Candidates tied with the positive are none.

    Example:
        >>> rewards = torch.tensor([[0.9, 0.9, 0.1, 0.2]])
        >>> eligible_negatives(rewards, torch.tensor([0]), torch.tensor([[True, True, True, False]]))
        tensor([[False, False,  True, False]])
    """
    column = positive.clamp(min=0).unsqueeze(1)
    present = (positive >= 0).unsqueeze(1) & mask.gather(1, column)
    return mask & present & (rewards < rewards.gather(1, column))


@dataclass(frozen=True)
class KernelSettings:
    """How negatives are chosen: everything that `build_kernel` needs to know.

    Attributes:
        strategy: ``mc`` draws from the softmax of the scores, ``uniform`` draws blindly, ``max`` and ``min`` take the
            highest and the lowest scores, ``sweet_spot`` the rewards nearest to two standard deviations below the mean (the
            first of tied ones each), and ``all`` takes the candidates in the group's order.
        num_negatives: M.
        include_positive: Whether the positive is itself a state of the kernel. Drawn, it makes a pair without gradient.
        replacement: Whether ``mc`` and ``uniform`` may draw a candidate more than once. The others never do. Several draws are
            `systematic`: each candidate comes $M p_i$ times, rounded down or up at random.
        temperature: Divides the scores of ``mc``.
        target_ess: Share of its L candidates at which each group's kernel holds its effective sample size, by the temperature
            that `temperature_for_ess` finds; in place of `temperature`.
        proportional: Whether several draws of ``mc`` without replacement are `systematic` with `inclusion_probabilities`,
            which are then known; otherwise each next one is drawn from the softmax over those that remain.
        chain_steps: Steps k of the ``mc`` chain; its last state is the draw. More than one needs `num_proposals`.
        num_proposals: L, the fresh candidates that a step of the ``mc`` chain chooses among beside its own state; None: all.

    Raises:
        ValueError: A number out of range, an unknown strategy, or settings where they would do nothing.
    """

    strategy: Strategy
    num_negatives: int = 1
    include_positive: bool = False
    replacement: bool = False
    temperature: float = 1.0
    chain_steps: int = 1
    num_proposals: int | None = None
    target_ess: float | None = None
    proportional: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range, saying what is needed."""
        for name in ("num_negatives", "chain_steps", "num_proposals"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give a whole number of at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it divides the scores and must be above 0")
        if self.strategy not in RULES:
            raise ValueError(f"strategy is {self.strategy!r}: choose one of {', '.join(RULES)}")
        if self.strategy != "mc" and (self.chain_steps > 1 or self.num_proposals is not None):
            raise ValueError(f"strategy {self.strategy!r} has no chain: leave out chain_steps and num_proposals, or take mc")
        if self.chain_steps > 1 and self.num_proposals is None:
            raise ValueError(
                f"chain_steps is {self.chain_steps} without num_proposals: one step proposes all candidates and draws from the "
                "softmax itself, as more steps do: give num_proposals, or leave chain_steps out"
            )
        self._check_tempering()
        if self.proportional and (self.strategy != "mc" or self.replacement or self.num_proposals is not None):
            raise ValueError("proportional is for draws of strategy mc without replacement and num_proposals")

    def _check_tempering(self) -> None:
        """Refuse a temperature that nothing reads, and two ways to set one."""
        if self.strategy != "mc" and (self.temperature != 1 or self.target_ess is not None):
            name = "temperature" if self.temperature != 1 else "target_ess"
            raise ValueError(
                f"{name} does nothing with strategy {self.strategy!r}, which draws from no softmax of the scores: leave it "
                "out, or take mc"
            )
        if self.target_ess is None:
            return
        if not 0 < self.target_ess <= 1:
            raise ValueError(f"target_ess is {self.target_ess}: it is a share of the candidates, above 0 and at most 1")
        if self.temperature != 1:
            raise ValueError(
                f"temperature is {self.temperature} and target_ess {self.target_ess}: target_ess finds the temperature of each "
                "group, which leaves nothing to set: give one of them"
            )
        if self.num_proposals is not None:
            raise ValueError(
                "target_ess is for kernels that propose every candidate: with num_proposals a draw is spread otherwise than "
                "the softmax whose effective sample size is held: leave one of them out"
            )


@torch.no_grad()
def sample_negatives(
    scores: Float[Tensor, "B K"],
    positive: Int[Tensor, " B"],
    mask: Bool[Tensor, "B K"],
    *,
    num_negatives: int,
    strategy: Strategy,
    include_positive: bool = False,
    replacement: bool = False,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B M"]:
    r"""Columns of the M candidates that estimate the normalising constant.

    With ``strategy="mc"`` the draw is $z \sim \mathrm{softmax}(r)$ over the eligible candidates. `build_kernel` has the
    strategy that reads rewards, a temperature, and chains of several steps.

    Args:
        scores: Implicit rewards $r$ under the current policy. Masked entries may hold anything, NaN and inf too.
        positive: Column of each group's positive; -1 where there is none.
        mask: True for the candidates that the kernel may see; the positive is excluded unless `include_positive` is set.
        num_negatives: M; this and the next three are as in `KernelSettings`.
        strategy: How they are chosen.
        include_positive: Whether the positive can be drawn.
        replacement: Whether a candidate can be drawn more than once.
        generator: Source of randomness; ``mc`` and ``uniform`` need it.

    Returns:
        M columns a group; -1 in the last ones of a group with fewer eligible candidates than M (with replacement: without
        any). The loss masks those.

    Raises:
        ValueError: A number out of range, a random strategy without a generator, or ``sweet_spot``, which needs rewards.

    Example:
        >>> scores, mask = torch.tensor([[9.0, 1.0, 3.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
        >>> sample_negatives(scores, torch.tensor([0]), mask, num_negatives=2, strategy="max")
        tensor([[2, 3]])
        >>> sample_negatives(scores, torch.tensor([0]), mask, num_negatives=4, strategy="min")
        tensor([[ 1,  3,  2, -1]])

    Source:
        MC-PO, arXiv 2502.04567, Algorithm 1 (``mc``, one step). Draws without replacement use the Gumbel top-M trick.
    """
    settings = KernelSettings(strategy, num_negatives, include_positive, replacement)
    if strategy == "sweet_spot":
        raise ValueError("strategy 'sweet_spot' reads the rewards: draw with build_kernel(KernelSettings(...)).draw")
    return build_kernel(settings).draw(scores, torch.zeros_like(scores), positive, mask, mask, generator)


def kernel_probabilities(
    scores: Float[Tensor, "B K"],
    positive: Int[Tensor, " B"],
    mask: Bool[Tensor, "B K"],
    *,
    strategy: Strategy,
    include_positive: bool = False,
    temperature: float = 1.0,
    rewards: Float[Tensor, "B K"] | None = None,
    target_ess: float | None = None,
) -> Float[Tensor, "B K"]:
    """Distribution of the first draw of `sample_negatives` when every candidate is proposed.

    Args:
        scores: Implicit rewards under the current policy.
        positive: Column of each group's positive; -1 where there is none.
        mask: True for the candidates that the kernel may see.
        strategy: As in `KernelSettings`; ``max``, ``min`` and ``sweet_spot`` give all the probability to one candidate, and
            ``all`` gives each the same.
        include_positive: As in `KernelSettings`.
        temperature: As in `KernelSettings`.
        rewards: Rewards, which ``sweet_spot`` needs and the others don't read.
        target_ess: As in `KernelSettings`.

    Returns:
        Probabilities that sum to 1 over a group; all 0 in a group without eligible candidates.

    Raises:
        ValueError: Settings that `KernelSettings` refuses, or ``sweet_spot`` without rewards.

    Example:
        >>> import math
        >>> scores, mask = torch.tensor([[5.0, math.log(3.0), 0.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> kernel_probabilities(scores, torch.tensor([0]), mask, strategy="mc")
        tensor([[0.0000, 0.7500, 0.2500]])
    """
    if strategy == "sweet_spot" and rewards is None:
        raise ValueError("strategy 'sweet_spot' reads the rewards and got none: pass rewards=")
    settings = KernelSettings(strategy, include_positive=include_positive, temperature=temperature, target_ess=target_ess)
    kernel = build_kernel(settings)
    return kernel.probabilities(scores, torch.zeros_like(scores) if rewards is None else rewards, positive, mask, mask)


@dataclass(frozen=True)
class Kernel:
    """A way of choosing negatives, made by `build_kernel`.

    Attributes:
        draw: ``(scores, rewards, positive, visible, mask, generator) -> columns [B, M]``. ``visible`` is True for the positive
            and the candidates that may be drawn, ``mask`` for all of the group's. Only ``sweet_spot`` reads the rewards: it
            takes their mean and standard deviation (the population's) over the mask and chooses no candidate without a finite
            one. ``mc`` and ``uniform`` raise ValueError without a generator. Columns are -1 as in `sample_negatives`.
        probabilities: ``(scores, rewards, positive, visible, mask) -> [B, K]``, as `kernel_probabilities`.
        reads_scores: whether the scores decide the draw.
        expected: ``(scores, rewards, positive, visible, mask) -> [B, K]``, how often each candidate is among the M draws on
            average; None where that is not known: of chains, and of several draws from the softmax over those that remain.
        temperature: ``(scores, rewards, positive, visible, mask) -> [B]``, the one found for each group, NaN for a group
            without candidates; None without `target_ess`.
    """

    draw: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, torch.Generator | None], Tensor]
    probabilities: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    reads_scores: bool
    expected: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    temperature: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


def build_kernel(settings: KernelSettings) -> Kernel:
    """The kernel with these settings.

    Example:
        >>> kernel = build_kernel(KernelSettings("max", num_negatives=2))
        >>> scores, mask = torch.tensor([[9.0, 1.0, 3.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
        >>> kernel.draw(scores, scores, torch.tensor([0]), mask, mask, None)
        tensor([[2, 3]])

    Source:
        ``mc``: MC-PO, arXiv 2502.04567, Algorithm 1. ``sweet_spot``: arXiv 2502.16825, the rejected completion at the mean
        minus two standard deviations.
    """
    rule, num = RULES[settings.strategy], settings.num_negatives

    def available_of(rewards: Tensor, positive: Tensor, visible: Tensor, mask: Tensor) -> Bool[Tensor, "B K"]:
        available = visible if settings.include_positive else without(visible, positive)
        return available & mask & rewards.isfinite() if rule.reads == "rewards" else available

    def prepared(
        scores: Tensor, rewards: Tensor, positive: Tensor, visible: Tensor, mask: Tensor
    ) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
        available = available_of(rewards, positive, visible, mask)
        keys = rule.keys(working_precision(scores.detach()), rewards, mask)
        return tempered(keys, available, settings.temperature, settings.target_ess), available

    def draw(
        scores: Tensor, rewards: Tensor, positive: Tensor, visible: Tensor, mask: Tensor, generator: torch.Generator | None
    ) -> Int[Tensor, "B M"]:
        keys, available = prepared(scores, rewards, positive, visible, mask)
        if not rule.is_random:
            return top(keys, available, num)
        if generator is None:
            raise ValueError(
                f"strategy {settings.strategy!r} draws at random and no generator was given: pass a torch.Generator"
            )
        return _random_draws(settings, keys, positive, available, generator)

    def probabilities(scores: Tensor, rewards: Tensor, positive: Tensor, visible: Tensor, mask: Tensor) -> Float[Tensor, "B K"]:
        return rule.share(*prepared(scores, rewards, positive, visible, mask))

    def expected(scores: Tensor, rewards: Tensor, positive: Tensor, visible: Tensor, mask: Tensor) -> Float[Tensor, "B K"]:
        return _expected_counts(settings, *prepared(scores, rewards, positive, visible, mask))

    def temperature(scores: Tensor, rewards: Tensor, positive: Tensor, visible: Tensor, mask: Tensor) -> Float[Tensor, " B"]:
        assert settings.target_ess is not None
        available = available_of(rewards, positive, visible, mask)
        found = temperature_for_ess(scores.detach(), available, settings.target_ess)
        return found.masked_fill(~available.any(dim=1), math.nan)

    known = rule.is_random and settings.num_proposals is None and (_counted(settings) or num == 1)
    return Kernel(
        draw,
        probabilities,
        rule.reads == "scores",
        expected if known else None,
        None if settings.target_ess is None else temperature,
    )


def _counted(settings: KernelSettings) -> bool:
    """Whether the draws are systematic."""
    return settings.num_negatives > 1 and settings.num_proposals is None and (settings.replacement or settings.proportional)


def _expected_counts(settings: KernelSettings, keys: Tensor, available: Tensor) -> Float[Tensor, "B K"]:
    """How often each candidate is among the draws on average; float64, so that they add up to a whole number."""
    shares = softmax(keys.double(), available)
    if settings.replacement or settings.num_negatives == 1:
        return settings.num_negatives * shares
    # One whose share vanishes in rounding can still be drawn, and fills a place that no other can.
    return inclusion_probabilities(shares.clamp(min=torch.finfo(shares.dtype).tiny), available, settings.num_negatives)


def _random_draws(
    settings: KernelSettings, keys: Tensor, start: Tensor, available: Tensor, generator: torch.Generator
) -> Int[Tensor, "B M"]:
    """M draws from the softmax of the keys over the available candidates."""
    num = settings.num_negatives
    if settings.num_proposals is not None:
        return chains(
            keys,
            start,
            available,
            generator,
            num=num,
            replacement=settings.replacement,
            chain_steps=settings.chain_steps,
            num_proposals=settings.num_proposals,
        )
    if _counted(settings):
        return as_often(systematic(_expected_counts(settings, keys, available), generator), num)
    return (independent if settings.replacement else gumbel_top)(keys, available, generator, num=num)


@torch.no_grad()
def importance_log_weights(probabilities: Float[Tensor, "B K"], negatives: Int[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    r"""Log q correction $-\log(M q_z)$ of each negative $z$ drawn with probability $q_z$; M counts the group's draws.

    Added to the negatives' implicit rewards it makes their sum $\sum_z e^{r_z} / (M q_z)$, an unbiased estimate of
    $\sum_i e^{r_i}$ over the candidates that the kernel may draw.

    Args:
        probabilities: Rows from `kernel_probabilities`, with the arguments of the draw.
        negatives: Columns from `sample_negatives`, one a group or with replacement.

    Returns:
        One number a draw; 0 where the column is -1.

    Example:
        >>> probabilities = torch.tensor([[0.0, 0.5, 0.25, 0.25]])
        >>> importance_log_weights(probabilities, torch.tensor([[1, 2, -1]]))  # -log(2 / 2) and -log(2 / 4)
        tensor([[-0.0000, 0.6931, 0.0000]])

    Source:
        Importance sampling of the normalising constant; arXiv 2502.04567 draws from the kernel without it.
    """
    drawn = negatives >= 0
    q = working_precision(probabilities).gather(1, negatives.clamp(min=0))
    # A draw whose probability underflows still has a finite logarithm.
    logs = q.clamp(min=torch.finfo(q.dtype).tiny).log() + drawn.sum(dim=1, keepdim=True).clamp(min=1).to(q.dtype).log()
    return torch.where(drawn, -logs, 0.0)


def kernel_entropy(probabilities: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    r"""Entropy $-\sum_i p_i \log p_i$ of each row, in nats; 0 for a row of zeros.

    Args:
        probabilities: Rows from `kernel_probabilities`.

    Returns:
        One entropy a group.

    Example:
        >>> kernel_entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))  # log 2 and 0
        tensor([0.6931, 0.0000])
    """
    surprise: Tensor = torch.special.entr(probabilities)
    return surprise.sum(dim=1)


def effective_sample_size(probabilities: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    r"""Number of equally likely candidates $1 / \sum_i p_i^2$ that each row amounts to; 0 for a row of zeros.

    Args:
        probabilities: Rows from `kernel_probabilities`.

    Returns:
        Between 1 and K for each group with candidates.

    Example:
        >>> effective_sample_size(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
        tensor([2., 1.])
    """
    squares = probabilities.square().sum(dim=1)
    return torch.where(squares > 0, 1 / torch.where(squares > 0, squares, 1.0), 0.0)


def transition_matrix(
    scores: Float[Tensor, " K"], *, num_proposals: int | None = None, temperature: float = 1.0
) -> Float[Tensor, "K K"]:
    r"""One step of the ``mc`` chain with the positive as a state, written out over all K candidates.

    From state $i$, L of the other candidates are proposed, each set of them equally likely, and the next state is drawn from
    the softmax of the scores over these and $i$. The softmax over all candidates is invariant and the step is reversible with
    respect to it, for every L. Cost grows with the number of sets: this is for tests and for looking at small groups.

    Args:
        scores: Implicit rewards of one group.
        num_proposals: L; None or any number from K - 1 up: every other candidate, and all rows equal the softmax.
        temperature: Divides the scores.

    Returns:
        Probability of each next state (column) from each state (row). k steps are its k-th power.

    Raises:
        ValueError: A number out of range.

    Example:
        >>> import math
        >>> transition_matrix(torch.tensor([math.log(3.0), 0.0, 0.0]), num_proposals=1)
        tensor([[0.7500, 0.1250, 0.1250],
                [0.3750, 0.3750, 0.2500],
                [0.3750, 0.2500, 0.3750]])

    Source:
        Conditional importance sampling: the kernel of MC-PO's Algorithm 1 with the current state among its proposals.
    """
    KernelSettings("mc", temperature=temperature, num_proposals=num_proposals)  # refuses numbers out of range
    size = scores.shape[0]
    logits = working_precision(scores.detach()) / temperature
    proposed = size - 1 if num_proposals is None else min(num_proposals, size - 1)
    matrix = logits.new_zeros(size, size)
    for state in range(size):
        sets = list(combinations([other for other in range(size) if other != state], proposed))
        for chosen in sets:
            columns = torch.tensor([state, *chosen], device=scores.device)
            matrix[state, columns] += logits[columns].softmax(dim=0) / len(sets)
    return matrix

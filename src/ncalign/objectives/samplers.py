"""Samplers: which candidates of a group enter the loss, the positive first, and what a training loop needs to apply them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ncalign.objectives.draws import without
from ncalign.objectives.kernels import Kernel, KernelSettings, build_kernel, eligible_negatives, pick_positive
from ncalign.objectives.tempering import tempered

__all__ = ["mc_sampler", "some_below", "one_below", "worst_below", "all_below", "best_alone", "everyone", "Sampler"]

Select = Callable[[Tensor | None, Tensor, Tensor, torch.Generator], Tensor]
Probabilities = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LogQ = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Scores = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A choice of candidates.

    Attributes:
        select: ``(scores, rewards, mask, generator) -> columns [B, S]``; -1 for none, column 0 for the positive. Scores are
            None where ``scores`` is.
        scores: ``(logprobs, reference_logprobs) -> [B, K]``, what `select` reads, times the method's beta; from a pass without
            gradients. None: `select` reads no scores, and that pass is skipped.
        kernel: ``(scores, positive, rewards, mask) -> [B, K]``, the probabilities behind the draws; for metrics.
        log_q: ``(scores, rewards, mask, columns) -> [B, S]``, the log q correction of each score; None: no correction.
        size: most candidates that enter, the positive included, where that is known before the draw; None: it may be all.
        reads: ``(rewards, mask) -> [B, K]``, the candidates whose scores decide the draw; None: all.
        blocks: equally wide blocks that the columns consist of, the positive first in each: those of a mix's parts.
        temperature: ``(scores, positive, rewards, mask) -> [B]``, the kernel's where it is found for each group; for metrics.
        accepts: whether column 1 is a proposal, which the loss weighs with the probability that it is accepted; for metrics.
        last_visit: whether `select` and `log_q` read, in training, each candidate's score as it was when the candidate last
            entered the loss (before that, the starting one), so that nothing is scored for them.
    """

    select: Select
    scores: Scores | None = None
    kernel: Probabilities | None = None
    log_q: LogQ | None = None
    size: int | None = None
    reads: Callable[[Tensor, Tensor], Tensor] | None = None
    blocks: int = 1
    temperature: Probabilities | None = None
    accepts: bool = False
    last_visit: bool = False


def by_log_ratio(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Log-ratio of policy and reference: times beta, the implicit reward."""
    return logprobs - reference


def by_logprob(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Log-prob of the policy alone: times beta, a tempered policy."""
    return logprobs


def mc_sampler(
    settings: KernelSettings,
    *,
    scores: Scores = by_log_ratio,
    log_q_correction: bool = False,
    acceptance: bool = False,
    last_visit: bool = False,
) -> Sampler:
    """The positive, and M negatives that a kernel chooses among the candidates below it.

    Args:
        settings: The kernel's.
        scores: What the kernel weighs by, before beta.
        log_q_correction: Whether each negative's score is corrected for the probability with which it was drawn.
        acceptance: Whether the draw is a proposal that moves on from the positive, and its score is corrected by
            `proposal_log_ratio`: a logistic loss then weighs it with the probability that it is accepted.
        last_visit: Whether the kernel draws by the scores of each candidate's last visit, which one of the corrections must
            make up for.

    Raises:
        ValueError: A correction is asked for where the draw's probability is not known, or both are, or none is where outdated
            scores are drawn by.
    """
    built, correct = _with_correction(settings, log_q_correction, acceptance, last_visit)

    def select(
        scores: Float[Tensor, "B K"] | None,
        rewards: Float[Tensor, "B K"],
        mask: Bool[Tensor, "B K"],
        generator: torch.Generator,
    ) -> Int[Tensor, "B S"]:
        positive = pick_positive(rewards, mask, generator=generator)
        known = torch.zeros_like(rewards) if scores is None else scores
        negatives = built.draw(known, rewards, positive, _visible(rewards, positive, mask), mask, generator)
        return torch.cat([positive.unsqueeze(1), negatives], dim=1)

    def kernel(
        scores: Float[Tensor, "B K"], positive: Int[Tensor, " B"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B K"]:
        return built.probabilities(scores, rewards, positive, _visible(rewards, positive, mask), mask)

    def temperature(
        scores: Float[Tensor, "B K"], positive: Int[Tensor, " B"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
    ) -> Float[Tensor, " B"]:
        assert built.temperature is not None
        return built.temperature(scores, rewards, positive, _visible(rewards, positive, mask), mask)

    return Sampler(
        select,
        scores if built.reads_scores else None,
        kernel,
        correct,
        1 + settings.num_negatives,
        None if settings.include_positive or acceptance else _below_best,
        temperature=None if built.temperature is None else temperature,
        accepts=acceptance,
        last_visit=last_visit,
    )


def _with_correction(settings: KernelSettings, log_q: bool, acceptance: bool, last_visit: bool) -> tuple[Kernel, LogQ | None]:
    """The kernel, and the correction of its scores where there is one; refuses what can't be corrected."""
    if log_q:
        _check_correction(settings)
    if acceptance:
        _check_acceptance(settings, log_q)
    if last_visit:
        _check_last_visit(settings, corrected=acceptance or log_q)
    kernel = build_kernel(replace(settings, proportional=not settings.replacement) if log_q else settings)
    if acceptance:
        # Blind proposals are as likely there as back, whatever the scores are: the log-ratio of the two is 0.
        return kernel, accepting(settings.temperature, settings.target_ess) if settings.strategy == "mc" else None
    return kernel, dividing(kernel) if log_q else None


def dividing(kernel: Kernel) -> LogQ:
    """The log q correction by which each negative is divided by the number of times that it is drawn on average."""
    assert kernel.expected is not None
    expected = kernel.expected

    def log_q(
        scores: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], columns: Int[Tensor, "B S"]
    ) -> Float[Tensor, "B S"]:
        positive, negatives = columns[:, 0], columns[:, 1:]
        counts = expected(scores, rewards, positive, _visible(rewards, positive, mask), mask)
        # A draw whose probability underflows still has a finite logarithm.
        logs = counts.gather(1, negatives.clamp(min=0)).clamp(min=torch.finfo(counts.dtype).tiny).log()
        return F.pad(torch.where(negatives >= 0, logs, 0.0), (1, 0))

    return log_q


def accepting(temperature: float, target_ess: float | None = None) -> LogQ:
    """The correction by which a logistic loss weighs a proposal of the ``mc`` kernel with its probability of acceptance."""

    def log_q(
        scores: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], columns: Int[Tensor, "B S"]
    ) -> Float[Tensor, "B S"]:
        positive, proposals = columns[:, 0], columns[:, 1:]
        visible = _visible(rewards, positive, mask)
        ratio = proposal_log_ratio(scores, positive, proposals, visible, temperature=temperature, target_ess=target_ess)
        return F.pad(ratio, (1, 0))

    return log_q


@torch.no_grad()
def proposal_log_ratio(
    scores: Float[Tensor, "B K"],
    positive: Int[Tensor, " B"],
    negatives: Int[Tensor, "B M"],
    mask: Bool[Tensor, "B K"],
    *,
    temperature: float = 1.0,
    target_ess: float | None = None,
) -> Float[Tensor, "B M"]:
    r"""Log-ratio $\log q(z|0) - \log q(0|z)$ of proposing the negative from the positive, and of the way back.

    From state $i$ another state $j$ is proposed with $q(j|i) = e^{s_j/T_i} / \sum_{k \ne i} e^{s_k/T_i}$. Accepted with the
    probability $a = \sigma(r_z - r_0 - \text{log-ratio})$, it makes a step that leaves $\mathrm{softmax}(r)$ invariant whatever
    the scores $s$ are: rounded, stale, tempered. $a$ is the factor of $\nabla(r_z - r_0)$ in the gradient of `rnce_loss` with
    one negative whose implicit reward is $r_z - \text{log-ratio}$.

    Args:
        scores: What proposals are drawn by, $s$.
        positive: Column of each group's positive.
        negatives: Columns of the proposals; -1 for none.
        mask: True for the states, the positive's included.
        temperature: $T_i$ of every state.
        target_ess: In its place, the share of the other states that the effective sample size of each state's proposals is
            held at: $T_i$ is then `temperature_for_ess` of the scores without $s_i$, there and on the way back.

    Returns:
        One number a proposal; 0 where the column is -1 or the positive's, and where all scores are equal.

    Example:
        >>> import math
        >>> scores, mask = torch.tensor([[0.0, math.log(3.0), 0.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> proposal_log_ratio(scores, torch.tensor([0]), torch.tensor([[1]]), mask).exp()  # (3 / 4) / (1 / 2)
        tensor([[1.5000]])

    Source:
        Barker's acceptance (1965) for independence proposals that leave out the current state.
    """

    def proposed(state: Int[Tensor, " B"]) -> Float[Tensor, "B K"]:
        others = without(mask, state)
        return tempered(scores, others, temperature, target_ess).log_softmax(dim=1)

    drawn = (negatives >= 0) & (positive >= 0).unsqueeze(1) & (negatives != positive.unsqueeze(1))
    there = proposed(positive).gather(1, negatives.clamp(min=0))
    home = positive.clamp(min=0).unsqueeze(1)
    back = [proposed(column).gather(1, home) for column in negatives.unbind(dim=1)]
    # A state without others is never read.
    return torch.where(drawn, there - torch.cat(back, dim=1), 0.0) if back else there


def _check_acceptance(settings: KernelSettings, log_q_correction: bool) -> None:
    """Refuse settings in which a draw is not one proposal from the positive."""
    several = settings.num_negatives > 1 or settings.chain_steps > 1 or settings.num_proposals is not None
    if settings.strategy not in ("mc", "uniform") or several or settings.include_positive or log_q_correction:
        raise ValueError(
            "acceptance needs one proposal of another candidate: strategy mc or uniform, num_negatives and chain_steps 1, "
            "without include_positive, num_proposals and log_q_correction"
        )


def _check_correction(settings: KernelSettings) -> None:
    """Refuse the log q correction for draws whose probability is not the kernel's."""
    if settings.strategy != "mc" or settings.include_positive or settings.num_proposals is not None:
        raise ValueError(
            "log_q_correction needs negatives whose probability is known: strategy mc without include_positive and "
            "num_proposals"
        )


def _check_last_visit(settings: KernelSettings, *, corrected: bool) -> None:
    """Refuse outdated scores where none are read, or where nothing makes up for them."""
    if settings.strategy != "mc":
        raise ValueError(
            f"proposals: last_visit is for strategy mc: {settings.strategy!r} does not draw from a softmax of scores, whose "
            "age could be made up for; leave proposals out, or take mc"
        )
    if not corrected:
        raise ValueError(
            "proposals: last_visit draws by outdated scores, and nothing here makes up for that: add acceptance: true (the "
            "pair that the loss computes decides by exact scores), or log_q_correction: true (each negative is divided by the "
            "probability with which the outdated scores drew it)"
        )


def _below_best(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
    """The candidates below the best: the same ones whichever of tied best ones is the positive."""
    return eligible_negatives(rewards, pick_positive(rewards, mask, generator=None), mask)


def _visible(rewards: Float[Tensor, "B K"], positive: Int[Tensor, " B"], mask: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
    """The positive and the candidates below it; nothing in a group without candidates below the positive."""
    below = eligible_negatives(rewards, positive, mask)
    columns = torch.arange(mask.shape[1], device=mask.device)
    return below | ((columns == positive.unsqueeze(1)) & below.any(dim=1, keepdim=True))


def some_below(num_negatives: int) -> Sampler:
    """The positive and M random candidates below it."""
    return mc_sampler(KernelSettings("uniform", num_negatives))


def one_below() -> Sampler:
    """The positive and one random candidate below it."""
    return some_below(1)


def worst_below() -> Sampler:
    """The positive and the candidate with the lowest reward."""
    return replace(
        _below(lambda rewards, below: torch.where(below, rewards, torch.inf).argsort(dim=1, stable=True)[:, :1]), size=2
    )


def all_below() -> Sampler:
    """The positive and every candidate below it, in the group's order."""
    # At least one column for negatives: K may be 1.
    return _below(lambda rewards, below: (~below).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(below.shape[1] - 1, 1)])


def best_alone() -> Sampler:
    """The positive, without a negative."""
    return Sampler(
        lambda scores, rewards, mask, generator: pick_positive(rewards, mask, generator=generator).unsqueeze(1), size=1
    )


def everyone() -> Sampler:
    """The positive and every other candidate, tied ones too, in the group's order."""

    def select(
        scores: Float[Tensor, "B K"] | None,
        rewards: Float[Tensor, "B K"],
        mask: Bool[Tensor, "B K"],
        generator: torch.Generator,
    ) -> Int[Tensor, "B K"]:
        positive = pick_positive(rewards, mask, generator=generator).unsqueeze(1)
        columns = torch.arange(mask.shape[1], device=mask.device)
        order = torch.where(columns == positive, 0, torch.where(mask, 1, 2)).argsort(dim=1, stable=True)
        return torch.where(mask.gather(1, order), order, -1)

    return Sampler(select)


def _below(order: Callable[[Tensor, Tensor], Tensor]) -> Sampler:
    """The positive and the first columns of an order that are candidates below it."""

    def select(
        scores: Float[Tensor, "B K"] | None,
        rewards: Float[Tensor, "B K"],
        mask: Bool[Tensor, "B K"],
        generator: torch.Generator,
    ) -> Int[Tensor, "B S"]:
        positive = pick_positive(rewards, mask, generator=generator)
        below = eligible_negatives(rewards, positive, mask)
        columns = order(rewards, below)
        negatives = torch.where(below.gather(1, columns), columns, -1)
        return torch.cat([positive.unsqueeze(1), negatives], dim=1)[:, : max(mask.shape[1], 1)]

    return Sampler(select)


PAIRINGS: Mapping[str, Sampler | None] = {
    "best_vs_one": one_below(),
    "best_vs_each": all_below(),
    "best_vs_worst": worst_below(),
    "best_vs_hard": mc_sampler(KernelSettings("mc")),
    "best_vs_sweet_spot": mc_sampler(KernelSettings("sweet_spot")),
    "all_pairs": None,
}
"""The sampler of each pairing; with None all candidates enter, and the loss forms the pairs."""

"""A method as data: beta x score x sampler x log q correction x loss x anchors, composed of small functions.

`compose` puts the parts together; `Method` is all that a training loop needs of the result. A configuration class in the file
of its loss names the parts that a published method consists of, and a user's own method is a call of `compose` from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ncalign.objectives.config import Pairing, WholeGroup
from ncalign.objectives.samplers import PAIRINGS, Sampler
from ncalign.objectives.targets import working_precision

__all__ = ["log_ratio", "mean_log_ratio", "policy_logprob", "mean_logprob"]
__all__ += ["compose", "mean_over_negatives", "mean_over_pairs", "chosen_nll", "needs_candidates", "needs_preference"]
__all__ += ["LossInputs", "Baseline", "Hooks", "Estimator", "Method", "PairConfig"]


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from: S selected candidates a group, in the sampler's order.

    Attributes:
        log_ratios: ``log policy - log reference`` of each completion, summed over its tokens, in nats; 0 where masked.
        logprobs: of the policy, summed, in nats.
        rewards: outside rewards; NaN where masked.
        lengths: scored tokens.
        mask: True for real entries. With a sampler column 0 is the positive.
        log_q: log q correction subtracted from each score, 0 for the positive; None for methods without one.
        baseline: subtracted from every score; 0 for methods without one.
    """

    log_ratios: Float[Tensor, "B S"]
    logprobs: Float[Tensor, "B S"]
    rewards: Float[Tensor, "B S"]
    lengths: Float[Tensor, "B S"]
    mask: Bool[Tensor, "B S"]
    log_q: Float[Tensor, "B S"] | None = None
    baseline: float = 0.0


Score = Callable[[LossInputs], Tensor]
"""What a loss compares, before beta, ``[B, S]``."""
GroupLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(values [B, S], rewards [B, S], mask [B, S]) -> [B]``."""
PairLoss = Callable[[Tensor, Tensor], Tensor]
"""``(chosen [B], rejected [B]) -> [B]``."""
RewardedPairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(chosen [B], rejected [B], chosen rewards [B], rejected rewards [B]) -> [B]``."""
Anchor = Callable[[LossInputs], Tensor]
"""A term added to the loss, ``[B]``."""
Weights = Callable[[Tensor, Tensor], Tensor]
Refuse = Callable[[Sequence[float]], str | None]
Rewards = Callable[[Sequence[float], Mapping[str, Any]], list[float]]


@dataclass(frozen=True)
class Baseline:
    """The level that is subtracted from all scores of a step.

    Attributes:
        level: ``(mean implicit reward of mismatched completions, that of all steps so far) -> baseline``, in proportion to
            beta: a mix scales it to each part's.
        mismatched: whether `level` reads the first, for which each prompt is scored with another prompt's completion.
    """

    level: Callable[[float, float], float]
    mismatched: bool


@dataclass(frozen=True)
class Hooks:
    """What a training loop does for a method outside its loss.

    Attributes:
        target_weights: ``(rewards, mask) -> [B, K]``, what the loss aims at; for metrics and the check of alpha.
        baseline: Level subtracted from the scores.
        rewards_from: ``(rewards, metadata) -> rewards`` of a group, applied as it is loaded.
        fit: Makes the method again from the rewards ``[N, K]`` of the whole training set and their mask.
        shares: ``inputs -> {part: [B]}``, what each part of a mix adds to the loss; for metrics. They sum to the loss.
        notice: What the rewards ``[N, K]`` of the whole training set and their mask give reason to tell; None for nothing.
    """

    target_weights: Weights | None = None
    baseline: Baseline | None = None
    rewards_from: Rewards | None = None
    fit: Callable[[Tensor, Tensor], Method] | None = None
    shares: Callable[[LossInputs], dict[str, Tensor]] | None = None
    notice: Callable[[Tensor, Tensor], str | None] | None = None


NO_HOOKS = Hooks()
Proposals = Literal["current", "last_visit", "uniform"]


@dataclass(frozen=True)
class Estimator:
    """An estimate of a group's gradient from a few of its candidates, as :mod:`ncalign.objectives.estimators` draws them.

    Attributes:
        candidates: S, how many of a group enter; None: to be found from the training set.
        proposals: what they are drawn by: the coefficients of the ``current`` scores, those of each candidate's
            ``last_visit``, or, ``uniform``, nothing.
    """

    candidates: int | None
    proposals: Proposals = "current"

    @property
    def number(self) -> int:
        """S, once it is known."""
        assert self.candidates is not None
        return self.candidates


@dataclass(frozen=True)
class Method:
    """What a training loop needs to know of a method.

    Attributes:
        name: Name in the configuration.
        beta: Scale of the log-ratio.
        loss: The loss of the candidates that enter, one number a group.
        sampler: Chooses the candidates that enter; None: all of them, in the group's order.
        refuse: A group's rewards -> why it can't be used, or None.
        hooks: What the loop does besides.
        estimator: How the gradient is estimated in training; None: it is computed in full.
        separable: Whether the loss is a sum over candidates, so that each one's coefficient in the gradient depends on its own
            log-prob alone.
    """

    name: str
    beta: float
    loss: Callable[[LossInputs], Tensor]
    sampler: Sampler | None
    refuse: Refuse
    hooks: Hooks = NO_HOOKS
    estimator: Estimator | None = None
    separable: bool = False

    @property
    def reads_scores(self) -> bool:
        """Whether candidates are scored without gradients before those that enter are known."""
        sampler = self.sampler
        # Scores of the last visit come from training itself.
        drawn = sampler is not None and sampler.scores is not None and not sampler.last_visit
        return drawn or (self.estimator is not None and self.estimator.proposals == "current")

    @property
    def reads_last_visits(self) -> bool:
        """Whether candidates are drawn by what they were when each last passed through the model with gradients."""
        estimated = self.estimator is not None and self.estimator.proposals == "last_visit"
        return estimated or (self.sampler is not None and self.sampler.last_visit)

    def estimated(self, candidates: int | None, proposals: Proposals = "current") -> Method:
        """The same method with its gradient estimated in training.

        Args:
            candidates: S, how many candidates of a group enter; None: as many as pay, found from the training set.
            proposals: What they are drawn by.

        Returns:
            The method. Its loss, and evaluation, stay those of the whole group.

        Raises:
            ValueError: The method's sampler chooses a few candidates already, or its coefficients need all current scores.

        Example:
            >>> from ncalign.objectives.binary import NCA
            >>> NCA().method().estimated(2).estimator
            Estimator(candidates=2, proposals='current')
        """
        if self.sampler is not None and (self.sampler.scores is not None or self.sampler.size is not None):
            chosen = "draws by their scores" if self.sampler.scores is not None else "chooses"
            raise ValueError(
                f"{self.name}: an estimator replaces the gradients of a whole group's candidates, and this method {chosen} "
                "a few of them already: leave estimator out, or take a loss of the whole group (rnce without num_negatives, "
                "info_nca, nca, pairing best_vs_each or all_pairs)"
            )
        if proposals != "current":
            self._check_without_scores(candidates, proposals)
        return replace(self, estimator=Estimator(candidates, proposals))

    def _check_without_scores(self, candidates: int | None, proposals: Proposals) -> None:
        """Refuse draws without a scoring pass where a coefficient needs more than its candidate's own log-prob."""
        start, level = f"{self.name}: estimator.proposals: {proposals}", self.hooks.baseline
        if not self.separable:
            raise ValueError(
                f"{start} knows the current scores of those drawn alone, and this loss compares each candidate with the "
                "others: take proposals: current, or a loss of each candidate by itself (nca, kto, qrpo)"
            )
        if level is not None and not level.mismatched:
            raise ValueError(
                f"{start} leaves the mean of all implicit rewards unknown, which scores are measured from: take "
                "proposals: current"
            )
        if candidates is None:
            raise ValueError(
                f"{start} needs a number of candidates: auto weighs up the pass that scores for proposals: current"
            )

    def kernel_scores(self, logprobs: Float[Tensor, "B K"], reference: Float[Tensor, "B K"]) -> Float[Tensor, "B K"] | None:
        """What the sampler reads, beta included; None where it reads no scores."""
        if self.sampler is None or self.sampler.scores is None:
            return None
        return self.beta * self.sampler.scores(logprobs, reference)


def log_ratio(inputs: LossInputs) -> Float[Tensor, "B S"]:
    """Log-ratio summed over the completion's tokens: times beta, the implicit reward."""
    return inputs.log_ratios


def mean_log_ratio(inputs: LossInputs) -> Float[Tensor, "B S"]:
    """``log-ratio / length``: a token's mean."""
    return inputs.log_ratios / inputs.lengths.clamp(min=1)


def policy_logprob(inputs: LossInputs) -> Float[Tensor, "B S"]:
    """``log policy``, without a reference."""
    return inputs.logprobs


def mean_logprob(inputs: LossInputs) -> Float[Tensor, "B S"]:
    """``log policy / length``, without a reference: SimPO's."""
    return inputs.logprobs / inputs.lengths.clamp(min=1)


def compose(
    name: str,
    *,
    beta: float,
    loss: GroupLoss,
    refuse: Refuse,
    score: Score = log_ratio,
    sampler: Sampler | None = None,
    anchors: Sequence[Anchor] = (),
    hooks: Hooks = NO_HOOKS,
) -> Method:
    r"""A method from its parts: $\ell(\beta s_i - \log q_i - b,\, R,\, \text{mask}) + \sum \text{anchors}$.

    Args:
        name: For messages and results.
        beta: Scale of the score, of what the kernel weighs by, and of the metrics' implicit rewards.
        loss: Loss of a group; `mean_over_negatives` and `mean_over_pairs` make one of a loss of pairs.
        refuse: Why a group can't be used: `needs_preference`, `needs_candidates`, or your own function.
        score: What the loss compares, before beta: `log_ratio`, `mean_log_ratio`, `policy_logprob` or `mean_logprob`.
        sampler: Which candidates enter; None: all, in the group's order.
        anchors: Terms added to the loss, such as `chosen_nll(1.0)`; they need a sampler, which puts the positive first.
        hooks: What the training loop does besides.

    Returns:
        The method.

    Raises:
        ValueError: There are anchors and no sampler.

    Example:
        >>> from ncalign.objectives.pairs import dpo_loss
        >>> from ncalign.objectives.samplers import one_below
        >>> method = compose(
        ...     "mine", beta=0.1, loss=mean_over_negatives(dpo_loss), sampler=one_below(), refuse=needs_preference
        ... )
        >>> method.refuse([1.0, 1.0])
        'all rewards equal'
    """
    if anchors and sampler is None:
        raise ValueError(f"{name}: an anchor reads the positive in column 0: give a sampler, which puts it there")

    def whole(inputs: LossInputs) -> Tensor:
        values = working_precision(beta * score(inputs)) - inputs.baseline
        if inputs.log_q is not None:
            values = values - inputs.log_q
        total = loss(values, inputs.rewards, inputs.mask)
        for anchor in anchors:
            total = total + anchor(inputs)
        return total

    return Method(name, beta, whole, sampler, refuse, hooks)


# --- Lifts and anchors ------------------------------------------------------------------------------------------------


def mean_over_negatives(pair_loss: PairLoss) -> GroupLoss:
    """A loss of pairs as the mean over the pairs (column 0, each other column); 0 for a group without a pair.

    Example:
        >>> import math
        >>> from ncalign.objectives.pairs import dpo_loss
        >>> loss = mean_over_negatives(dpo_loss)
        >>> r, mask = torch.tensor([[0.0, math.log(2.0), math.log(4.0)]]), torch.ones(1, 3, dtype=torch.bool)
        >>> loss(r, r, mask)  # (log 3 + log 5) / 2
        tensor([1.3540])
    """
    return mean_over_rewarded_negatives(lambda chosen, rejected, chosen_rewards, rejected_rewards: pair_loss(chosen, rejected))


def mean_over_rewarded_negatives(pair_loss: RewardedPairLoss) -> GroupLoss:
    """As `mean_over_negatives`, for a loss that reads the pair's rewards too."""

    def loss(values: Float[Tensor, "B S"], rewards: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, " B"]:
        pairs = mask[:, 1:] & mask[:, :1]
        return _mean(pair_loss, pairs, [(values[:, :1], values[:, 1:]), (rewards[:, :1], rewards[:, 1:])])

    return loss


def mean_over_pairs(pair_loss: PairLoss) -> GroupLoss:
    """A loss of pairs as the mean over all pairs of a group whose rewards differ, the higher one chosen; 0 without any.

    Example:
        >>> import math
        >>> from ncalign.objectives.pairs import dpo_loss
        >>> loss = mean_over_pairs(dpo_loss)
        >>> r, rewards = torch.tensor([[0.0, math.log(2.0), 0.0]]), torch.tensor([[2.0, 1.0, 1.0]])
        >>> loss(r, rewards, torch.ones(1, 3, dtype=torch.bool))  # two pairs: (log 3 + log 2) / 2
        tensor([0.8959])
    """
    return mean_over_rewarded_pairs(lambda chosen, rejected, chosen_rewards, rejected_rewards: pair_loss(chosen, rejected))


def mean_over_rewarded_pairs(pair_loss: RewardedPairLoss) -> GroupLoss:
    """As `mean_over_pairs`, for a loss that reads the pair's rewards too."""

    def loss(values: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
        order = torch.where(mask, rewards, 0.0)
        pairs = mask.unsqueeze(2) & mask.unsqueeze(1) & (order.unsqueeze(2) > order.unsqueeze(1))
        return _mean(pair_loss, pairs, [(t.unsqueeze(2), t.unsqueeze(1)) for t in (values, rewards)])

    return loss


def chosen_nll(weight: float) -> Anchor:
    r"""Anchor $-\frac{w}{|y_0|} \log \pi_\theta(y_0|x)$ that keeps the positive likely: its mean NLL a token, times a weight.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.bool)
        >>> ratio, logprob, length = torch.zeros(1, 1), torch.tensor([[-6.0]]), torch.tensor([[3.0]])
        >>> chosen_nll(0.5)(LossInputs(ratio, logprob, ratio, length, one))  # 0.5 * 6 / 3
        tensor([1.])
    """

    def anchor(inputs: LossInputs) -> Tensor:
        logprobs = torch.where(inputs.mask[:, 0], inputs.logprobs[:, 0], 0.0)
        return -weight * working_precision(logprobs) / inputs.lengths[:, 0].clamp(min=1)

    return anchor


def _mean(pair_loss: RewardedPairLoss, pairs: Bool[Tensor, "B ..."], sides: list[tuple[Tensor, Tensor]]) -> Float[Tensor, " B"]:
    """Mean of a loss over the real pairs; the values of the others reach neither the mean nor its gradient."""
    (chosen, rejected), (better, worse) = (
        [torch.where(pairs, side.expand(pairs.shape), 0.0).flatten() for side in both] for both in sides
    )
    losses = pair_loss(chosen, rejected, better, worse).view(pairs.shape)
    return torch.where(pairs, losses, 0.0).flatten(1).sum(dim=1) / pairs.flatten(1).sum(dim=1).clamp(min=1)


# --- Baselines --------------------------------------------------------------------------------------------------------


MISMATCHED_KL = Baseline(lambda mismatched, seen: max(mismatched, 0.0), mismatched=True)
"""KTO's reference point: the mean implicit reward of each prompt with another prompt's completion, at least 0."""
RUNNING_MEAN = Baseline(lambda mismatched, seen: seen, mismatched=False)
"""BCO's reward shift: the mean implicit reward of all steps before this one."""


# --- Groups that a method refuses -------------------------------------------------------------------------------------------


def needs_candidates(rewards: Sequence[float]) -> str | None:
    """Refuse a group with fewer than two candidates."""
    return "only one candidate" if len(rewards) < 2 else None


def needs_preference(rewards: Sequence[float]) -> str | None:
    """Refuse a group in which no candidate is better than another."""
    return needs_candidates(rewards) or ("all rewards equal" if len(set(rewards)) == 1 else None)


MOST_PAIRED = 2000
"""Candidates of a group whose pairs enter a loss all at once: memory grows with their square."""


def too_many_to_pair(rewards: Sequence[float]) -> str | None:
    """Refuse a group whose pairs, all at once, would take gigabytes."""
    if len(rewards) <= MOST_PAIRED:
        return None
    return f"more than {MOST_PAIRED} candidates, whose pairs are too many: leave some out, or use pairing best_vs_each"


def needs_few_to_pair(rewards: Sequence[float]) -> str | None:
    """Refuse a group in which no candidate is better than another, or that has too many of them."""
    return needs_preference(rewards) or too_many_to_pair(rewards)


# --- Methods of pairs -------------------------------------------------------------------------------------------------


class PairConfig(WholeGroup):
    """Fields that all methods of pairs share."""

    pairing: Pairing = "best_vs_one"

    def pairs(self, loss: PairLoss, *, score: Score = log_ratio, anchors: Sequence[Anchor] = ()) -> Method:
        """The method of this loss on the pairs that `pairing` makes of a group."""
        lift = mean_over_pairs(loss) if self.pairing == "all_pairs" else mean_over_negatives(loss)
        return self.grouped(lift, score=score, anchors=anchors)

    def rewarded(self, loss: RewardedPairLoss) -> Method:
        """As `pairs`, for a loss that reads the pair's rewards too."""
        return self.grouped(
            mean_over_rewarded_pairs(loss) if self.pairing == "all_pairs" else mean_over_rewarded_negatives(loss)
        )

    def grouped(self, loss: GroupLoss, *, score: Score = log_ratio, anchors: Sequence[Anchor] = ()) -> Method:
        """The method of this loss of a group whose first column is the positive."""
        if self.pairing == "all_pairs" and anchors:
            raise ValueError(f"{self.name}: pairing all_pairs has no single chosen completion to anchor: use best_vs_each")
        return compose(
            self.name,
            beta=self.beta,
            score=score,
            loss=loss,
            refuse=needs_few_to_pair if self.pairing == "all_pairs" else needs_preference,
            sampler=PAIRINGS[self.pairing],
            anchors=anchors,
        )

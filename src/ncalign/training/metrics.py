"""Training metrics: pure functions of ``[B, K]`` tensors, one value per group.

A value that a group does not define (no second reward, no kernel) is NaN and left out of the means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ncalign.objectives.kernels import effective_sample_size, kernel_entropy

NAN = float("nan")
_ROUNDING = 1e-5
"""Nats; at the first step log-ratios differ from 0 by rounding alone."""
_PAIRS_AT_A_TIME = 2**24
_SCATTERS = 5.0
"""Standard errors of the difference of two windows: high, since the alarm looks at every logged step of a run."""


@dataclass(frozen=True)
class PassResult:
    """Results of one pass over B groups.

    Attributes:
        loss: per group.
        log_ratios: policy over reference, nats; NaN where the candidate was not computed.
        logprobs: of the policy; NaN where not computed.
        rewards: NaN where missing.
        lengths: scored tokens.
        mask: True where there is a candidate with a reward.
        positive: index of the preferred candidate.
        negatives: indices of the others that entered the loss; -1 for none.
        kernel: probabilities of the kernel, where one was used.
        target_weights: of the objective, where it has them.
        beta: scale of the log-ratio.
        aux_loss: that balances the routers, over all that entered the loss in this pass; None without one.
        shares: what each part of a mix adds to the loss, weighted; None for other methods.
        temperature: of the kernel, where it is found for each group.
        acceptance: probability that each group's proposal is accepted, where the method proposes; NaN without a proposal.
        score_age: steps since the scores that the kernel drew by were computed, a mean over each group's candidates.
        estimate: how each group's gradient was estimated, where it was: how many candidates passed with gradients, and the
            variance that drawing them adds over the squared length of the group's gradient, as far as coefficients tell it.
    """

    loss: Float[Tensor, " B"]
    log_ratios: Float[Tensor, "B K"]
    logprobs: Float[Tensor, "B K"]
    rewards: Float[Tensor, "B K"]
    lengths: Int[Tensor, "B K"]
    mask: Bool[Tensor, "B K"]
    positive: Int[Tensor, " B"]
    negatives: Int[Tensor, "B M"]
    kernel: Float[Tensor, "B K"] | None
    target_weights: Float[Tensor, "B K"] | None
    beta: float
    aux_loss: Float[Tensor, ""] | None = None
    shares: dict[str, Tensor] | None = None
    temperature: Float[Tensor, " B"] | None = None
    acceptance: Float[Tensor, " B"] | None = None
    score_age: Float[Tensor, " B"] | None = None
    estimate: dict[str, Tensor] | None = None


def group_metrics(result: PassResult) -> dict[str, Float[Tensor, " B"]]:
    """The metrics of each group, under the names users of TRL know, and ours."""
    implicit = result.beta * result.log_ratios
    chosen = _pick(implicit, result.positive)
    rejected = _mean_picked(implicit, result.negatives)
    drawn = _picked(implicit, result.negatives)
    order = result.rewards.masked_fill(~result.mask, -torch.inf)
    # How many are higher: those behind the last one that is not, in order.
    ordered = order.sort(dim=1).values
    ranks = 1 + order.shape[1] - torch.searchsorted(ordered, order.contiguous(), right=True)
    metrics = {
        "loss": result.loss,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": pair_accuracy(implicit, result.rewards, result.mask),
        "logps/chosen": _pick(result.logprobs, result.positive),
        "logps/rejected": _mean_picked(result.logprobs, result.negatives),
        "logps/chosen_change": _pick(result.log_ratios, result.positive),
        "logps/rejected_change": _mean_picked(result.log_ratios, result.negatives),
        "negatives/reward": _mean_picked(result.rewards, result.negatives),
        "negatives/rank": _mean_picked(ranks.to(implicit.dtype), result.negatives),
        "negatives/above_positive": _nanmean((drawn > chosen.unsqueeze(1)).to(implicit.dtype).masked_fill(drawn.isnan(), NAN)),
        "length_correlation": correlation(implicit, result.lengths.to(implicit.dtype), result.mask),
    }
    if result.kernel is not None:
        metrics["kernel/entropy"] = kernel_entropy(result.kernel)
        metrics["kernel/effective_sample_size"] = effective_sample_size(result.kernel)
    if result.temperature is not None:
        metrics["kernel/temperature"] = result.temperature
    if result.acceptance is not None:
        metrics["kernel/acceptance"] = result.acceptance
    if result.score_age is not None:
        metrics["kernel/score_age"] = result.score_age
    if result.target_weights is not None:
        metrics["targets/entropy"] = kernel_entropy(result.target_weights)
    metrics |= {f"loss/{part}": share for part, share in (result.shares or {}).items()}
    metrics |= {f"estimator/{name}": value for name, value in (result.estimate or {}).items()}
    if result.aux_loss is not None:
        metrics["aux_loss"] = result.aux_loss.to(result.loss.dtype).expand_as(result.loss)
    return metrics


def mean_implicit_reward(result: PassResult) -> Float[Tensor, 2]:
    """Sum over groups of the mean implicit reward of their computed candidates, and the number of groups; float64."""
    means = _nanmean((result.beta * result.log_ratios).double().masked_fill(~result.mask, NAN))
    return torch.stack([means.nansum(), means.isfinite().sum().double()])


def pair_accuracy(
    implicit_rewards: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Share of the pairs with different rewards that the implicit rewards put in the same order; a tie counts half."""
    known = mask & ~implicit_rewards.isnan()
    right, pairs = implicit_rewards.new_zeros(2, len(known), dtype=torch.float64)
    # A few rows of the square at a time: of many candidates it would not fit into memory.
    for some in torch.arange(known.shape[1], device=known.device).split(max(1, _PAIRS_AT_A_TIME // max(1, known.numel()))):
        gap = implicit_rewards[:, some].unsqueeze(2) - implicit_rewards.unsqueeze(1)
        better = rewards[:, some].unsqueeze(2) > rewards.unsqueeze(1)
        pair = known[:, some].unsqueeze(2) & known.unsqueeze(1) & better
        pairs += pair.sum(dim=(1, 2))
        right += (pair & (gap > 0)).sum(dim=(1, 2)) + 0.5 * (pair & (gap == 0)).sum(dim=(1, 2))
    return torch.where(pairs > 0, right / pairs, NAN).to(implicit_rewards.dtype)


def correlation(x: Float[Tensor, "B K"], y: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Pearson correlation within each group; NaN where one side does not vary by more than rounding."""
    known = mask & ~x.isnan() & ~y.isnan()
    count = known.sum(dim=1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = values.masked_fill(~known, 0.0)
        return (values - values.sum(dim=1, keepdim=True) / count).masked_fill(~known, 0.0)

    dx, dy = centred(x), centred(y)
    sizes = dx.square().sum(dim=1).sqrt(), dy.square().sum(dim=1).sqrt()
    varies = (sizes[0] > _ROUNDING) & (sizes[1] > _ROUNDING)
    return torch.where(varies, (dx * dy).sum(dim=1) / (sizes[0] * sizes[1]), NAN)


def sums_and_counts(metrics: dict[str, Float[Tensor, " B"]]) -> Float[Tensor, "2 M"]:
    """Of each metric, the sum over the groups that define it, and their number; float64, where the metrics are."""
    values = torch.stack([found.detach().double() for found in metrics.values()])
    defined = values.isfinite()
    return torch.stack([values.masked_fill(~defined, 0.0).sum(dim=1), defined.sum(dim=1).double()])


class MetricMeans:
    """Sums of per-group metrics over passes; means over the groups that define each."""

    def __init__(self, sums: dict[str, float] | None = None, counts: dict[str, float] | None = None) -> None:
        self._sums, self._counts = dict(sums or {}), dict(counts or {})

    def add(self, names: Iterable[str], found: Sequence[Sequence[float]]) -> None:
        """Add a pass: of each metric, by its name, what :func:`sums_and_counts` gives."""
        for name, total, count in zip(names, *found, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        """The mean of each metric that some group defined."""
        return {name: self._sums[name] / self._counts[name] for name in self._sums if self._counts[name]}

    def parts(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts, to send to other processes."""
        return self._sums, self._counts


def merged(parts: list[tuple[dict[str, float], dict[str, float]]]) -> tuple[dict[str, float], dict[str, float]]:
    """Sums and counts of several processes added up."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for some_sums, some_counts in parts:
        for name in some_sums:
            sums[name] = sums.get(name, 0.0) + some_sums[name]
            counts[name] = counts.get(name, 0.0) + some_counts[name]
    return sums, counts


@dataclass
class ChosenAlarm:
    """Tells when the chosen completions' log-prob keeps falling, which DPO-like losses allow and users rarely see.

    It rings once, when the mean change since the start fell over three consecutive windows by more than the steps scatter, and
    stands below ``threshold``. The windows grow to a sixth of what was seen, so that a slow fall stands out in time.

    Attributes:
        window: logged steps in a window, at least.
        threshold: nats.
    """

    window: int = 5
    threshold: float = -1.0
    history: list[float] = field(default_factory=list)
    rung: bool = False

    def observe(self, chosen_change: float) -> str | None:
        """Take the mean change at one logged step; returns the warning when it is due."""
        self.history.append(chosen_change)
        size = max(self.window, len(self.history) // 6)
        if self.rung or len(self.history) < 3 * size:
            return None
        windows = torch.tensor(self.history[-3 * size :], dtype=torch.float64).view(3, size)
        first, second, third = windows.mean(dim=1).tolist()
        scatter = math.sqrt(float(windows.var(dim=1, correction=0).mean()) * 2 / size)
        if not (first > second > third and first - third > _SCATTERS * scatter and third < self.threshold):
            return None
        self.rung = True
        return (
            f"the chosen completions' log-prob keeps falling ({first:+.1f} -> {second:+.1f} -> {third:+.1f} nats since the "
            "start): the policy moves mass away from preferred and other completions alike. Remedies: objective nca (it "
            "holds the chosen likelihood up at its optimum), a smaller learning_rate, a larger objective.beta, fewer epochs"
        )


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index.unsqueeze(1)).squeeze(1)


def _picked(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index.clamp(min=0)).masked_fill(index < 0, NAN)


def _mean_picked(values: Tensor, index: Tensor) -> Tensor:
    return _nanmean(_picked(values, index))


def _nanmean(values: Tensor) -> Tensor:
    return values.nanmean(dim=1) if values.shape[1] else values.new_full(values.shape[:1], NAN)

"""Losses that classify each candidate by itself as data or noise, as good or bad: NCA, KTO and BCO.

They fix the level of the implicit rewards and not only their differences, which is what keeps the likelihood of good candidates
from falling along with that of the bad ones. One number a group; the caller reduces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from ncalign.objectives.config import Beta, WholeGroup
from ncalign.objectives.method import (
    MISMATCHED_KL,
    RUNNING_MEAN,
    Hooks,
    Method,
    PairConfig,
    compose,
    needs_candidates,
)
from ncalign.objectives.targets import TRANSFORMS, TargetConfig, Weights, target_weights, working_precision

__all__ = ["nca_loss", "nca_weighted_loss", "nca_pair_loss", "biased_nca_loss", "kto_loss", "bco_loss"]
__all__ += ["log_normalizer", "normalized_weights"]
__all__ += ["NCA", "NCAPair", "BiasedNCA", "KTO", "BCO"]

LARGEST_EXPONENT = 80.0
"""e^80 and its products with implicit rewards still fit float32."""


def nca_loss(
    implicit_rewards: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, alpha: float
) -> Float[Tensor, " B"]:
    r"""Binary noise-contrastive loss of all candidates of a group.

    $$\ell = -\sum_i \left[ w_i \log \sigma(r_i) + \frac{1}{K} \log \sigma(-r_i) \right],
    \qquad w = \mathrm{softmax}(R / \alpha)$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless. Masked entries may hold anything, NaN and inf too.
        rewards: Rewards $R$, in their own unit.
        mask: True for the candidates that exist and have a reward; K counts these.
        alpha: Reward temperature, in the reward's unit.

    Returns:
        Loss of each group, in nats; $2 \ln 2$ where all implicit rewards are 0, 0 for a group without candidates. The optimum
        is $r_i = \log(K w_i)$.

    Raises:
        ValueError: alpha is not above 0.

    Example:
        >>> r, rewards = torch.zeros(1, 4), torch.tensor([[1.0, 0.5, 0.0, 0.2]])
        >>> nca_loss(r, rewards, torch.ones(1, 4, dtype=torch.bool), alpha=0.1)  # 2 log 2
        tensor([1.3863])

    Source:
        NCA, arXiv 2402.05369, section 4.
    """
    return nca_weighted_loss(implicit_rewards, target_weights(rewards, mask, alpha=alpha), mask)


def nca_weighted_loss(
    implicit_rewards: Float[Tensor, "B K"], weights: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    r"""NCA loss for given weights, whether or not they sum to 1 over a group.

    $$\ell = -\sum_i \left[ w_i \log \sigma(r_i) + \frac{1}{K} \log \sigma(-r_i) \right]$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless. Masked entries may hold anything, NaN and inf too.
        weights: Weights $w$ at or above 0, such as those of `target_weights` or `normalized_weights`.
        mask: True for the candidates that count; K is their number.

    Returns:
        Loss of each group, in nats; 0 for a group without candidates. The optimum is $r_i = \log(K w_i)$.

    Example:
        >>> r, weights = torch.zeros(1, 2), torch.tensor([[0.75, 0.25]])
        >>> nca_weighted_loss(r, weights, torch.ones(1, 2, dtype=torch.bool))  # 2 log 2
        tensor([1.3863])

    Source:
        NCA, arXiv 2402.05369, section 4.
    """
    values = torch.where(mask, working_precision(implicit_rewards), 0.0)
    shares = torch.where(mask, weights, 0.0).to(values.dtype)
    noise = mask.to(values.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return -(shares * F.logsigmoid(values) + noise * F.logsigmoid(-values)).sum(dim=1)


def log_normalizer(rewards: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], *, alpha: float) -> float:
    r"""Logarithm of the normaliser of the rewards, estimated over a whole data set.

    $$\log Z = \log \frac{1}{|D|} \sum_{(n,i) \in D} e^{R_{ni}/\alpha}$$

    Args:
        rewards: Rewards $R$ of the data set. Masked entries may hold anything, NaN and inf too.
        mask: True for the candidates that exist and have a reward; they make up $D$, each counting alike.
        alpha: Reward temperature, in the reward's unit.

    Returns:
        $\log Z$, for all prompts together.

    Raises:
        ValueError: alpha is not above 0, or there is no candidate.

    Example:
        >>> import math
        >>> rewards = torch.tensor([[math.log(3.0), 0.0]])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> round(log_normalizer(rewards, mask, alpha=1.0), 6)  # log((3 + 1) / 2)
        0.693147

    Source:
        $Z(x) = E_{\mu} e^{R/\alpha}$ of arXiv 2402.05369, pooled over the prompts (our choice).
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}, and the normaliser of e^(reward / alpha) needs a number above 0")
    if not mask.any():
        raise ValueError("no candidate has a reward, so there is nothing to estimate the normaliser from: score the data first")
    exponents = rewards[mask].double() / alpha
    return float(exponents.logsumexp(dim=0)) - float(mask.sum().double().log())


def normalized_weights(
    rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, alpha: float, log_normalizer: float
) -> Float[Tensor, "B K"]:
    r"""Weights of the NCA loss whose normaliser is known, rather than the sum over the group.

    $$w_i = \frac{e^{R_i/\alpha}}{K Z}$$

    Args:
        rewards: Rewards $R$, in their own unit. Masked entries may hold anything, NaN and inf too.
        mask: True for the candidates that exist and have a reward; K counts these.
        alpha: Reward temperature, in the reward's unit.
        log_normalizer: $\log Z$, as `log_normalizer` estimates it.

    Returns:
        Weights at or above 0, 0 where masked; they need not sum to 1 over a group. $R/\alpha - \log Z$ is cut at 80, far above
        what a candidate that the normaliser was estimated from can have.

    Raises:
        ValueError: alpha is not above 0.

    Example:
        >>> import math
        >>> rewards, mask = torch.tensor([[math.log(3.0), 0.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> normalized_weights(rewards, mask, alpha=1.0, log_normalizer=math.log(4.0))  # 3 / (2 * 4) and 1 / (2 * 4)
        tensor([[0.3750, 0.1250]])

    Source:
        NCA before its normaliser is replaced by the group's own, arXiv 2402.05369, section 4.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}, and the weights e^(reward / alpha) need a number above 0")
    # The difference first, in the reward's unit: a small alpha makes both terms large.
    exponents = (torch.where(mask, working_precision(rewards), 0.0) - alpha * log_normalizer) / alpha
    weights = exponents.clamp(max=LARGEST_EXPONENT).exp() / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mask, weights, 0.0)


def nca_pair_loss(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    r"""NCA loss of a pair.

    $$\ell = -\log \sigma(r_w) - \tfrac12 \log \sigma(-r_w) - \tfrac12 \log \sigma(-r_l)$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.

    Returns:
        Loss of each pair, in nats; $2 \ln 2$ where both are 0. The optimum has $r_w = \ln 2$: the chosen one's implicit reward
        is drawn there from above too.

    Example:
        >>> nca_pair_loss(torch.zeros(1), torch.zeros(1))  # 2 log 2
        tensor([1.3863])

    Source:
        NCA for preference data, arXiv 2402.05369, section 4 (K = 2, alpha towards 0).
    """
    preferred, other = working_precision(chosen), working_precision(rejected)
    return -F.logsigmoid(preferred) - 0.5 * F.logsigmoid(-preferred) - 0.5 * F.logsigmoid(-other)


def biased_nca_loss(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    r"""NCA loss of a pair in which the chosen one is not taken for noise too.

    $$\ell = -\log \sigma(r_w) - \log \sigma(-r_l)$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.

    Returns:
        Loss of each pair, in nats; $2 \ln 2$ where both are 0. It has no finite optimum: more is better for $r_w$ without end.

    Example:
        >>> biased_nca_loss(torch.zeros(1), torch.zeros(1))  # 2 log 2
        tensor([1.3863])

    Source:
        The loss named biasedNCA in the release of arXiv 2402.05369; TRL's bco_pair is the same function.
    """
    return -F.logsigmoid(working_precision(chosen)) - F.logsigmoid(-working_precision(rejected))


def kto_loss(
    implicit_rewards: Float[Tensor, "B K"],
    labels: Bool[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
    *,
    baseline: float | Float[Tensor, ""],
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    r"""KTO loss: how far each candidate is from being a gain, or a loss, as its label wants.

    $$\ell = \frac1K \sum_i \begin{cases} \lambda_D\, (1 - \sigma(r_i - z_0)) & \text{desirable} \\
    \lambda_U\, (1 - \sigma(z_0 - r_i)) & \text{undesirable} \end{cases}$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless. Masked entries may hold anything, NaN and inf too.
        labels: True for the desirable candidates.
        mask: True for the candidates that exist and have a label; K counts these, and one is enough.
        baseline: Reference point $z_0$, the implicit reward that is neither gain nor loss.
        desirable_weight: $\lambda_D$.
        undesirable_weight: $\lambda_U$.

    Returns:
        Loss of each group, dimensionless, between 0 and the larger weight; half the mean weight where all implicit rewards are
        at the baseline, 0 for a group without candidates.

    Example:
        >>> import math
        >>> r, labels = torch.tensor([[math.log(3.0), math.log(3.0)]]), torch.tensor([[True, False]])
        >>> kto_loss(r, labels, torch.ones(1, 2, dtype=torch.bool), baseline=0.0)  # (1/4 + 3/4) / 2
        tensor([0.5000])

    Source:
        KTO, arXiv 2402.01306, equations 7 and 8.
    """
    values = torch.where(mask, working_precision(implicit_rewards) - baseline, 0.0)
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where it is small.
    losses = torch.where(labels, desirable_weight * torch.sigmoid(-values), undesirable_weight * torch.sigmoid(values))
    return torch.where(mask, losses, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def bco_loss(
    implicit_rewards: Float[Tensor, "B K"],
    labels: Bool[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
    *,
    shift: float | Float[Tensor, ""],
) -> Float[Tensor, " B"]:
    r"""BCO loss: binary cross-entropy of a classifier whose logit is the implicit reward.

    $$\ell = -\frac{1}{|D|} \sum_{i \in D} \log \sigma(r_i - \delta) - \frac{1}{|U|} \sum_{i \in U} \log \sigma(\delta - r_i)$$

    over the group's desirable candidates $D$ and its undesirable ones $U$; a sum over none is 0.

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless. Masked entries may hold anything, NaN and inf too.
        labels: True for the desirable candidates.
        mask: True for the candidates that exist and have a label; one is enough.
        shift: Reward shift $\delta$.

    Returns:
        Loss of each group, in nats; where all implicit rewards are at the shift, $2 \ln 2$ for a group with both labels and
        $\ln 2$ with one; 0 for a group without candidates.

    Example:
        >>> import math
        >>> r, labels = torch.tensor([[math.log(3.0), 0.0, math.log(7.0)]]), torch.tensor([[True, False, False]])
        >>> bco_loss(r, labels, torch.ones(1, 3, dtype=torch.bool), shift=0.0)  # log 4/3 + (log 2 + log 8) / 2
        tensor([1.6740])

    Source:
        BCO, arXiv 2404.04656: binary cross-entropy with reward shift.
    """
    values = torch.where(mask, working_precision(implicit_rewards) - shift, 0.0)
    losses = -F.logsigmoid(torch.where(labels, values, -values))
    total = torch.zeros_like(losses[:, 0])
    for side in (mask & labels, mask & ~labels):
        total = total + torch.where(side, losses, 0.0).sum(dim=1) / side.sum(dim=1).clamp(min=1)
    return total


# --- Configuration ----------------------------------------------------------------------------------------------------


class NCA(TargetConfig):
    """NCA: each candidate classified against noise, weighted by its reward (arXiv 2402.05369)."""

    name: Literal["nca"] = "nca"
    beta: Beta = 0.1
    normalizer: Literal["group", "data"] = Field(
        "group",
        description="What e^(reward / alpha) is divided by: its sum over the group, or K times its mean over the training set.",
    )

    @model_validator(mode="after")
    def _something_to_normalize(self) -> NCA:
        if self.normalizer == "data" and self.transform == "one_hot":
            raise ValueError(
                "normalizer data divides e^(reward / alpha), and transform one_hot makes none: leave out one of them"
            )
        return self

    def method(self) -> Method:
        if self.normalizer == "data":
            return self._composed(_unfitted, self._fit)
        return self._composed(self.weights(), self._fit if self.target_entropy is not None else None)

    def _fit(self, rewards: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> Method:
        """The method with alpha and the normaliser from these rewards, as far as they are asked for."""
        config = self.fitted(rewards, mask)
        if config.normalizer == "group":
            return config.method()
        transform, alpha = TRANSFORMS[config.transform], config.alpha
        log_z = log_normalizer(transform(rewards, mask), mask, alpha=alpha)
        return config._composed(
            lambda rewards, mask: normalized_weights(transform(rewards, mask), mask, alpha=alpha, log_normalizer=log_z), None
        )

    def _composed(self, weights: Weights, fit: Callable[[Tensor, Tensor], Method] | None) -> Method:
        made = compose(
            self.name,
            beta=self.beta,
            loss=lambda values, rewards, mask: nca_weighted_loss(values, weights(rewards, mask), mask),
            refuse=needs_candidates,
            # Shares of the group either way: the sharpness of the targets does not depend on the normaliser.
            hooks=Hooks(target_weights=self.weights(), fit=fit),
        )
        return replace(made, separable=True)


class NCAPair(PairConfig):
    """NCA, pair: the chosen completion classified against noise, and both as noise (arXiv 2402.05369)."""

    name: Literal["nca_pair"] = "nca_pair"

    def method(self) -> Method:
        return replace(self.pairs(nca_pair_loss), separable=True)


class BiasedNCA(PairConfig):
    """Biased NCA: the chosen completion against noise, the rejected one alone as noise (release of arXiv 2402.05369)."""

    name: Literal["biased_nca"] = "biased_nca"

    def method(self) -> Method:
        return replace(self.pairs(biased_nca_loss), separable=True)


class LabelConfig(WholeGroup):
    """Fields of the methods that read whether each candidate is desirable."""

    threshold: float | None = Field(
        None, description="A candidate with a reward above this is desirable; none: rewards are labels, 1 desirable and 0 not."
    )

    def labels(self, rewards: Float[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
        """Which candidates are desirable."""
        return rewards > (0.5 if self.threshold is None else self.threshold)

    def refuse(self, rewards: Sequence[float]) -> str | None:
        """Refuse a group without a candidate, and rewards that are not labels where there is no threshold."""
        if not rewards:
            return "no candidate has a reward"
        odd = [] if self.threshold is not None else [reward for reward in rewards if reward not in (0.0, 1.0)]
        if odd:
            return f"reward {odd[0]} is no label: give 1 for desirable and 0 for undesirable, or set the objective's threshold"
        return None


_KTO_BALANCE = (1.0, 1.5)
"""Of the weighted numbers of desirable to undesirable candidates, as the paper advises."""


class KTO(LabelConfig):
    """KTO: each candidate a gain or a loss against the policy's mean drift, one a group is enough (arXiv 2402.01306)."""

    name: Literal["kto"] = "kto"
    desirable_weight: float = Field(1.0, gt=0, description="Weight of desirable candidates.")
    undesirable_weight: float = Field(1.0, gt=0, description="Weight of undesirable candidates.")

    def method(self) -> Method:
        # The score arrives with the baseline taken off.
        loss = partial(
            kto_loss, baseline=0.0, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
        )
        made = compose(
            self.name,
            beta=self.beta,
            loss=lambda values, rewards, mask: loss(values, self.labels(rewards), mask),
            refuse=self.refuse,
            hooks=Hooks(baseline=MISMATCHED_KL, notice=self.notice),
        )
        return replace(made, separable=True)

    def notice(self, rewards: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> str | None:
        r"""Says where the labels are out of balance: $\lambda_D n_D / (\lambda_U n_U)$ is to lie between 1 and 3/2.

        Args:
            rewards: Of the whole training set.
            mask: True where there is a candidate.

        Returns:
            The advice where the ratio is below half of that or above twice as much, or either label is missing; else None.

        Example:
            >>> rewards, real = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]), torch.ones(1, 5, dtype=torch.bool)
            >>> KTO().notice(rewards, real)[:76]
            'KTO has 1 desirable and 4 undesirable candidates, which count as 0.25 to 1: '
            >>> KTO(desirable_weight=5.0).notice(rewards, real) is None
            True
        """
        desirable = int((self.labels(rewards) & mask).sum())
        undesirable = int(mask.sum()) - desirable
        told = f"KTO has {desirable} desirable and {undesirable} undesirable candidates"
        if not desirable or not undesirable:
            return f"{told}: it learns from both; see objective.threshold"
        ratio = self.desirable_weight * desirable / (self.undesirable_weight * undesirable)
        least, most = _KTO_BALANCE
        if least / 2 <= ratio <= 2 * most:
            return None
        weights = " to ".join(f"{self.desirable_weight * end / ratio:.3g}" for end in _KTO_BALANCE)
        side = "lowers nearly all completions" if ratio < least else "raises nearly all completions"
        return f"{told}, which count as {ratio:.2g} to 1: training {side}; set objective.desirable_weight to {weights}"


class BCO(LabelConfig):
    """BCO: a classifier of desirable completions whose logit is the implicit reward less its mean (arXiv 2404.04656)."""

    name: Literal["bco"] = "bco"

    def method(self) -> Method:
        made = compose(
            self.name,
            beta=self.beta,
            loss=lambda values, rewards, mask: bco_loss(values, self.labels(rewards), mask, shift=0.0),
            refuse=self.refuse,
            hooks=Hooks(baseline=RUNNING_MEAN),
        )
        return replace(made, separable=True)


def _unfitted(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    raise ValueError(
        "normalizer data leaves the weights to the data: call the method's fit with the training set's rewards first"
    )


Config = NCA | NCAPair | BiasedNCA | KTO | BCO

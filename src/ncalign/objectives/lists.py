r"""Losses of whole lists of scored candidates: EXO, LiPO-λ, HPS and SWEPO.

Each takes `[B, K]` implicit rewards $r_i$, rewards $R_i$ and a mask, and returns one number a group; the caller reduces.
They depend on differences of implicit rewards only. Masked entries may hold anything and reach neither value nor gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from ncalign.objectives.config import Alpha, Beta, WholeGroup
from ncalign.objectives.method import Hooks, Method, compose, needs_candidates, needs_few_to_pair, needs_preference
from ncalign.objectives.samplers import all_below
from ncalign.objectives.targets import target_weights, working_precision

__all__ = ["exo_loss", "lipo_lambda_loss", "hps_loss", "swepo_loss", "EXO", "LiPOLambda", "HPS", "SWEPO"]

LOWEST = -1e30
"""Least exponent: a weight of 0 whose logarithm can still be multiplied by a probability of 0."""
MOST_LIPO_REWARD = 60
"""Above it the gains 2^R of LiPO leave no float32 gradient worth having."""


def exo_loss(
    implicit_rewards: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, alpha: float
) -> Float[Tensor, " B"]:
    r"""Reverse KL divergence, from the softmax of the implicit rewards to that of the rewards.

    $$\ell = \sum_i p_i \log \frac{p_i}{w_i}, \qquad p = \mathrm{softmax}(r), \quad w = \mathrm{softmax}(R / \alpha)$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless.
        rewards: Rewards $R$, in their own unit.
        mask: True for the candidates that exist and have a reward.
        alpha: Reward temperature, in the reward's unit.

    Returns:
        Loss of each group, in nats: 0 at the optimum $r_i = R_i / \alpha + C$, and for a group of one candidate or none.

    Raises:
        ValueError: alpha is not above 0.

    Example:
        >>> import math
        >>> r, rewards = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> exo_loss(r, rewards, torch.ones(1, 2, dtype=torch.bool), alpha=1.0)  # log(1/2) - (log(3/4) + log(1/4)) / 2
        tensor([0.1438])

    Source:
        EXO with rewards, arXiv 2402.00856.
    """
    if not alpha > 0:
        raise ValueError(
            f"alpha is {alpha}, and the target softmax(reward / alpha) needs a number above 0: a small one aims at the best"
        )
    centred = working_precision(rewards) - _best(rewards, mask)
    target = _log_softmax(torch.where(mask, centred, 0.0) / alpha, mask)
    log_probabilities = _log_softmax(working_precision(implicit_rewards), mask)
    return (torch.where(mask, log_probabilities.exp(), 0.0) * (log_probabilities - target.to(log_probabilities.dtype))).sum(
        dim=1
    )


def lipo_lambda_loss(
    implicit_rewards: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    r"""Logistic loss of all pairs whose rewards differ, each weighted by what swapping the two would cost in DCG.

    $$\ell = \sum_{R_i > R_j} \left| G_i - G_j \right| \left| \frac{1}{D(\tau_i)} - \frac{1}{D(\tau_j)} \right|
    \log\left(1 + e^{-(r_i - r_j)}\right), \qquad G_i = 2^{R_i} - 1, \quad D(\tau) = \ln(1 + \tau)$$

    $\tau_i$ is the candidate's rank by its current implicit reward, 1 for the highest; equal ones go by reward.

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless.
        rewards: Rewards $R$ on a scale on which one unit doubles the gain; the paper's lie between 0 and 1. Above
            about 100 a gain is infinite.
        mask: True for the candidates that exist and have a reward.

    Returns:
        Loss of each group, a sum over its pairs; 0 for a group without any. No gradient passes through the ranks.

    Example:
        >>> r, rewards = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
        >>> lipo_lambda_loss(r, rewards, torch.ones(1, 2, dtype=torch.bool))  # 1 * (1/ln 2 - 1/ln 3) * ln 2
        tensor([0.3691])

    Source:
        LiPO-λ, arXiv 2402.01878.
    """
    values = torch.where(mask, working_precision(implicit_rewards), 0.0)
    order = torch.where(mask, working_precision(rewards), 0.0)
    both = mask.unsqueeze(2) & mask.unsqueeze(1)
    pairs = both & (order.unsqueeze(2) > order.unsqueeze(1))
    discount = 1 / (1 + _ranks(values.detach(), order, mask)).log()
    gain = torch.special.expm1(order * math.log(2))
    differences = (gain.unsqueeze(2) - gain.unsqueeze(1)).abs() * (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()
    losses = torch.where(pairs, differences, 0.0).to(values.dtype) * F.softplus(values.unsqueeze(1) - values.unsqueeze(2))
    return losses.sum(dim=(1, 2))


def hps_loss(
    implicit_rewards: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, gamma: float
) -> Float[Tensor, " B"]:
    r"""RNCE whose negatives count by how hard they are: by how high their rewards stand.

    $$\ell = -r_0 + \log\left(e^{r_0} + M \sum_{i=1}^{M} q_i e^{r_i}\right), \qquad q = \mathrm{softmax}(\gamma R_{1..M})$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless; column 0 is the positive.
        rewards: Rewards $R$, in their own unit; the positive's is not read.
        mask: True for the candidates that enter. A group whose positive is masked gives 0.
        gamma: Hardness, one over the reward's unit. At 0 all negatives count alike, and this is RNCE.

    Returns:
        Loss of each group, in nats; $\log(M + 1)$ where all implicit rewards are equal, 0 without negatives.

    Example:
        >>> import math
        >>> r, rewards = torch.tensor([[0.0, math.log(2.0), 0.0]]), torch.tensor([[9.0, math.log(3.0), 0.0]])
        >>> hps_loss(r, rewards, torch.ones(1, 3, dtype=torch.bool), gamma=1.0)  # log(1 + 2 * (3/4 * 2 + 1/4 * 1))
        tensor([1.5041])

    Source:
        Hard Preference Sampling, arXiv 2502.14400, with the expectation over q in full.
    """
    negatives = mask[:, 1:] & mask[:, :1]
    present = negatives.any(dim=1, keepdim=True)
    values = torch.where(mask, working_precision(implicit_rewards), 0.0)
    hardness = torch.where(negatives, working_precision(rewards)[:, 1:], 0.0) * gamma
    count = negatives.sum(dim=1, keepdim=True).clamp(min=1).to(values.dtype)
    weights = _log_softmax(hardness, negatives).to(values.dtype) + count.log()
    exponents = torch.where(negatives, values[:, 1:] - values[:, :1] + weights, -torch.inf)
    if exponents.shape[1] == 0:
        return values.sum(dim=1) * 0.0
    total = torch.where(present, exponents, 0.0).logsumexp(dim=1)
    return torch.where(present.squeeze(1), F.softplus(total), 0.0)


def swepo_loss(
    implicit_rewards: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, alpha: float
) -> Float[Tensor, " B"]:
    r"""Contrast of the candidates above the group's mean reward, as one set, with the set of the others.

    $$\ell = -\log \frac{\sum_{i \in P} e^{r_i + \alpha |\Delta_i|}}{\sum_{i} e^{r_i + \alpha |\Delta_i|}}, \qquad
    \Delta_i = R_i - \bar R, \quad P = \{i : \Delta_i > 0\}$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless.
        rewards: Rewards $R$, in their own unit.
        mask: True for the candidates that exist and have a reward; the mean is theirs.
        alpha: Weight of the deviation from the mean, one over the reward's unit, as the paper has it: it multiplies, and is not
            the reward temperature of other losses. At 0 all candidates of a set count alike.

    Returns:
        Loss of each group, in nats; 0 for a group whose rewards are all equal.

    Example:
        >>> import math
        >>> r, rewards = torch.tensor([[0.0, math.log(2.0), 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> swepo_loss(r, rewards, torch.ones(1, 3, dtype=torch.bool), alpha=0.0)  # -log(1 / (1 + 2 + 1))
        tensor([1.3863])

    Source:
        SWEPO, later named MPO, arXiv 2412.04628.
    """
    # Measured from the best, so that equal rewards deviate by exactly 0.
    below = torch.where(mask, working_precision(rewards) - _best(rewards, mask), 0.0)
    deviation = below - below.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    values = torch.where(mask, working_precision(implicit_rewards), 0.0)
    values = values + (alpha * deviation.abs()).to(values.dtype)
    positives, negatives = mask & (deviation > 0), mask & (deviation <= 0)
    both = positives.any(dim=1, keepdim=True) & negatives.any(dim=1, keepdim=True)
    chosen = torch.where(both, torch.where(positives, values, -torch.inf), 0.0).logsumexp(dim=1)
    rejected = torch.where(both, torch.where(negatives, values, -torch.inf), 0.0).logsumexp(dim=1)
    return torch.where(both.squeeze(1), F.softplus(rejected - chosen), 0.0)


def _best(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B 1"]:
    """Highest reward of each group; 0 for a group without candidates."""
    values = torch.where(mask, working_precision(rewards), -torch.inf)
    return torch.where(mask.any(dim=1, keepdim=True), values.amax(dim=1, keepdim=True), 0.0)


def _log_softmax(logits: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Log-softmax over the real entries of each row, no lower than `LOWEST`; 0 where masked."""
    present = mask.any(dim=1, keepdim=True)
    known = torch.where(mask, logits, -torch.inf)
    return torch.where(mask, torch.where(present, known, 0.0).log_softmax(dim=1).clamp(min=LOWEST), 0.0)


def _ranks(values: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Rank of each candidate among the real ones by value, 1 for the highest; of ties the higher reward, then the first one."""
    other, own = values.unsqueeze(1), values.unsqueeze(2)
    other_reward, own_reward = rewards.unsqueeze(1), rewards.unsqueeze(2)
    columns = torch.arange(values.shape[1], device=values.device)
    tied, alike = other == own, other_reward == own_reward
    before = (other > own) | (tied & (other_reward > own_reward)) | (tied & alike & (columns < columns.unsqueeze(1)))
    return 1 + (before & mask.unsqueeze(1)).sum(dim=2).to(values.dtype)


def _refuse_for_lipo(rewards: Sequence[float]) -> str | None:
    """Refuse groups without a preference, and rewards whose gains are too large."""
    reason = needs_few_to_pair(rewards)
    if reason is None and max(rewards) > MOST_LIPO_REWARD:
        return f"a reward of {max(rewards)}: lipo_lambda's gain is 2^reward, so scale rewards to at most {MOST_LIPO_REWARD}"
    return reason


class EXO(WholeGroup):
    """EXO: reverse KL divergence from the softmax of implicit rewards to softmax(reward/alpha) (arXiv 2402.00856)."""

    name: Literal["exo"] = "exo"
    beta: Beta = 0.1
    alpha: Alpha = 0.1

    def method(self) -> Method:
        loss, hooks = partial(exo_loss, alpha=self.alpha), Hooks(target_weights=partial(target_weights, alpha=self.alpha))
        return compose(self.name, beta=self.beta, loss=loss, refuse=needs_candidates, hooks=hooks)


class LiPOLambda(WholeGroup):
    """LiPO-λ: logistic loss of all pairs, weighted by what their order means for DCG (arXiv 2402.01878)."""

    name: Literal["lipo_lambda"] = "lipo_lambda"
    beta: Beta = 0.05

    def method(self) -> Method:
        return compose(self.name, beta=self.beta, loss=lipo_lambda_loss, refuse=_refuse_for_lipo)


class HPS(WholeGroup):
    """HPS: RNCE whose negatives count by their reward, the hard ones most (arXiv 2502.14400)."""

    name: Literal["hps"] = "hps"
    beta: Beta = 0.1
    gamma: float = Field(
        1.0, description="Hardness: negatives count as softmax(gamma * reward); 0 is RNCE, below 0 the easy ones count most."
    )

    def method(self) -> Method:
        loss = partial(hps_loss, gamma=self.gamma)
        return compose(self.name, beta=self.beta, loss=loss, refuse=needs_preference, sampler=all_below())


class SWEPO(WholeGroup):
    """SWEPO: candidates above the group's mean reward against the others, weighted by distance from it (arXiv 2412.04628)."""

    name: Literal["swepo"] = "swepo"
    beta: Beta = 0.1
    alpha: float = Field(
        1.0,
        ge=0,
        description="Multiplies a reward's distance from the group's mean, added to the implicit reward; 0: unweighted.",
    )

    def method(self) -> Method:
        loss = partial(swepo_loss, alpha=self.alpha)
        return compose(self.name, beta=self.beta, loss=loss, refuse=needs_preference)


Config = EXO | LiPOLambda | HPS | SWEPO

"""Losses of a pair that only its difference enters, and their methods: DPO and its family.

Each takes what its method compares, `[B]` of the chosen and `[B]` of the rejected completions, and returns one number a pair,
in nats; the caller reduces. `ncalign.objectives.method` makes a loss of a group out of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ncalign.objectives.config import Beta
from ncalign.objectives.method import Method, PairConfig, chosen_nll, mean_logprob, policy_logprob
from ncalign.objectives.targets import working_precision

__all__ = ["dpo_loss", "simpo_loss", "exo_pair_loss", "reward_aware_rpo_loss"]
__all__ += ["DPO", "RPO", "SimPO", "CPO", "EXOPair", "RewardAwareRPO"]


def dpo_loss(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], *, label_smoothing: float = 0.0
) -> Float[Tensor, " P"]:
    r"""DPO loss of a pair; with label smoothing, conservative DPO.

    $$\ell = -(1 - \varepsilon) \log \sigma(r_w - r_l) - \varepsilon \log \sigma(r_l - r_w)$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.
        label_smoothing: $\varepsilon$, the probability that a label is wrong, in [0, 0.5).

    Returns:
        Loss of each pair; $\ln 2$ where the two are equal.

    Example:
        >>> dpo_loss(torch.tensor([0.0]), torch.tensor([math.log(2.0)]))  # log(1 + 2)
        tensor([1.0986])

    Source:
        DPO, arXiv 2305.18290, equation 7; cDPO is its authors' note on noisy labels.
    """
    difference = working_precision(chosen) - working_precision(rejected)
    right = -F.logsigmoid(difference)
    # The wrong label costs the difference more: log sigmoid(-d) = log sigmoid(d) - d.
    return right + label_smoothing * difference


def simpo_loss(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], *, gamma: float) -> Float[Tensor, " P"]:
    r"""SimPO loss of a pair.

    $$\ell = -\log \sigma(s_w - s_l - \gamma), \qquad s = \frac{\beta}{|y|} \log \pi_\theta(y|x)$$

    Args:
        chosen: $s_w$, the preferred completion's mean log-prob times beta, without a reference.
        rejected: $s_l$ of the other.
        gamma: Margin $\gamma$ that the difference should exceed, dimensionless.

    Returns:
        Loss of each pair.

    Example:
        >>> simpo_loss(torch.tensor([1.0]), torch.tensor([0.0]), gamma=1.0)  # log 2
        tensor([0.6931])

    Source:
        SimPO, arXiv 2405.14734, equation 6.
    """
    return -F.logsigmoid(working_precision(chosen) - working_precision(rejected) - gamma)


def exo_pair_loss(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], *, label_smoothing: float = 1e-3
) -> Float[Tensor, " P"]:
    r"""EXO loss of a pair: the reverse divergence from the smoothed label to the model's preference.

    $$\ell = \sigma(d) \log \frac{\sigma(d)}{1 - \varepsilon} + \sigma(-d) \log \frac{\sigma(-d)}{\varepsilon},
        \qquad d = r_w - r_l$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.
        label_smoothing: $\varepsilon$, in (0, 1): the label's probability for the rejected completion.

    Returns:
        Loss of each pair; 0 where $\sigma(d) = 1 - \varepsilon$.

    Raises:
        ValueError: The label is certain, and the divergence infinite.

    Example:
        >>> exo_pair_loss(torch.tensor([0.0]), torch.tensor([0.0]), label_smoothing=0.5)  # the label says as much
        tensor([0.])

    Source:
        EXO-pref, arXiv 2402.00856, equation 16.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: EXO divides by it, and needs a number between 0 and 1")
    difference = working_precision(chosen) - working_precision(rejected)
    won = torch.sigmoid(difference) * (F.logsigmoid(difference) - math.log1p(-label_smoothing))
    return won + torch.sigmoid(-difference) * (F.logsigmoid(-difference) - math.log(label_smoothing))


def reward_aware_rpo_loss(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    chosen_rewards: Float[Tensor, " P"],
    rejected_rewards: Float[Tensor, " P"],
    *,
    eta: float,
) -> Float[Tensor, " P"]:
    r"""Reward-aware preference optimisation: the difference of implicit rewards should be that of the rewards.

    $$\ell = \mathrm{KL}\left(\sigma(\eta (R_w - R_l)) \,\|\, \sigma(r_w - r_l)\right)$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.
        chosen_rewards: Rewards $R_w$.
        rejected_rewards: Rewards $R_l$.
        eta: Scale $\eta$ of the rewards: 1 over InfoNCA's alpha.

    Returns:
        Loss of each pair; 0 where $r_w - r_l = \eta (R_w - R_l)$.

    Example:
        >>> r = torch.tensor([1.0]), torch.tensor([0.0])
        >>> reward_aware_rpo_loss(*r, torch.tensor([0.5]), torch.tensor([0.0]), eta=2.0)  # 1 - 0 = 2 (0.5 - 0)
        tensor([0.])

    Source:
        Nemotron-4 340B, arXiv 2406.11704, section 3.3.2.
    """
    model = working_precision(chosen) - working_precision(rejected)
    target = (eta * (chosen_rewards - rejected_rewards)).to(model.dtype)
    share = torch.sigmoid(target)
    won = share * (F.logsigmoid(target) - F.logsigmoid(model))
    return won + torch.sigmoid(-target) * (F.logsigmoid(-target) - F.logsigmoid(-model))


class DPO(PairConfig):
    """DPO on pairs made from a scored group; with label smoothing, cDPO (arXiv 2305.18290)."""

    name: Literal["dpo"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Probability that a preference is labelled wrongly (cDPO).")

    def method(self) -> Method:
        return self.pairs(partial(dpo_loss, label_smoothing=self.label_smoothing))


class RPO(PairConfig):
    """RPO: DPO with the chosen completion's negative log-likelihood as an anchor (arXiv 2404.19733)."""

    name: Literal["rpo"] = "rpo"
    nll_weight: float = Field(1.0, ge=0, description="Weight of the chosen completion's mean negative log-likelihood a token.")

    def method(self) -> Method:
        return self.pairs(dpo_loss, anchors=[chosen_nll(self.nll_weight)])


class SimPO(PairConfig):
    """SimPO: mean log-probs with a margin and without a reference (arXiv 2405.14734)."""

    name: Literal["simpo"] = "simpo"
    beta: Beta = 2.0
    gamma: float = Field(1.0, ge=0, description="Margin that the difference of scores should exceed.")

    def method(self) -> Method:
        return self.pairs(partial(simpo_loss, gamma=self.gamma), score=mean_logprob)


class CPO(PairConfig):
    """CPO: DPO without a reference, with the chosen completion's negative log-likelihood (arXiv 2401.08417)."""

    name: Literal["cpo"] = "cpo"
    nll_weight: float = Field(1.0, ge=0, description="Weight of the chosen completion's mean negative log-likelihood a token.")

    def method(self) -> Method:
        return self.pairs(dpo_loss, score=policy_logprob, anchors=[chosen_nll(self.nll_weight)])


class EXOPair(PairConfig):
    """EXO for pairs: the reverse divergence from a smoothed label (arXiv 2402.00856)."""

    name: Literal["exo_pair"] = "exo_pair"
    label_smoothing: float = Field(1e-3, gt=0, lt=0.5, description="The label's probability for the rejected completion.")

    def method(self) -> Method:
        return self.pairs(partial(exo_pair_loss, label_smoothing=self.label_smoothing))


class RewardAwareRPO(PairConfig):
    """Reward-aware RPO: differences of implicit rewards matched to those of rewards (Nemotron-4, arXiv 2406.11704)."""

    name: Literal["reward_aware_rpo"] = "reward_aware_rpo"
    eta: float = Field(1.0, gt=0, description="Scale of the rewards: 1 / alpha.")

    def method(self) -> Method:
        return self.rewarded(partial(reward_aware_rpo_loss, eta=self.eta))


Config = DPO | RPO | SimPO | CPO | EXOPair | RewardAwareRPO

"""Losses that fit implicit rewards to numbers by least squares: IPO, SPPO, REBEL, QRPO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from ncalign.objectives.config import Beta, WholeGroup
from ncalign.objectives.method import (
    Hooks,
    Method,
    PairConfig,
    compose,
    log_ratio,
    mean_log_ratio,
    mean_over_rewarded_pairs,
    needs_few_to_pair,
    needs_preference,
)
from ncalign.objectives.targets import ranks, working_precision

__all__ = ["ipo_loss", "sppo_hard_loss", "rebel_loss", "qrpo_loss", "IPO", "SPPOHard", "REBEL", "QRPO"]


def ipo_loss(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], *, beta: float) -> Float[Tensor, " P"]:
    r"""IPO loss of a pair: a difference of log-ratios of one over twice beta, no more.

    $$\ell = \left(\frac{r_w - r_l}{\beta} - \frac{1}{2\beta}\right)^2$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion: beta times its log-ratio.
        rejected: Implicit reward $r_l$ of the other.
        beta: The paper's $\tau$.

    Returns:
        Loss of each pair; 0 where $r_w - r_l = 1/2$.

    Example:
        >>> ipo_loss(torch.tensor([0.5]), torch.tensor([0.0]), beta=0.1)
        tensor([0.])

    Source:
        IPO, arXiv 2310.12036, equation 17.
    """
    return ((working_precision(chosen) - working_precision(rejected) - 0.5) / beta).square()


def sppo_hard_loss(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], *, beta: float) -> Float[Tensor, " P"]:
    r"""SPPO loss of a pair whose preference is certain.

    $$\ell = \left(\frac{r_w}{\beta} - \frac{1}{2\beta}\right)^2 + \left(\frac{r_l}{\beta} + \frac{1}{2\beta}\right)^2$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion: beta times its log-ratio.
        rejected: Implicit reward $r_l$ of the other.
        beta: Scale of the log-ratio: one over the paper's $\eta$.

    Returns:
        Loss of each pair; 0 at $r_w = 1/2$ and $r_l = -1/2$.

    Example:
        >>> sppo_hard_loss(torch.tensor([0.5]), torch.tensor([-0.5]), beta=0.1)
        tensor([0.])

    Source:
        SPPO, arXiv 2405.00675, equation 4.7 with P = 1 for the winner and 0 for the loser.
    """
    wins = (working_precision(chosen) - 0.5) / beta
    return wins.square() + ((working_precision(rejected) + 0.5) / beta).square()


def rebel_loss(
    implicit_rewards: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    r"""REBEL: mean over pairs of the squared error of the difference of implicit rewards against that of the rewards.

    $$\ell = \frac{1}{|P|} \sum_{(i,j) \in P} \bigl( (r_i - r_j) - (R_i - R_j) \bigr)^2, \qquad P = \{(i, j) : R_i > R_j\}$$

    Args:
        implicit_rewards: Implicit rewards $r$; beta is one over the paper's $\eta$.
        rewards: Rewards $R$. A tie makes no pair.
        mask: True for the candidates that exist and have a reward.

    Returns:
        Loss of each group; 0 where $r = R + C(x)$, and for a group without pairs.

    Example:
        >>> r, rewards = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
        >>> rebel_loss(r, rewards, torch.ones(1, 2, dtype=torch.bool))  # (1 - 3)^2
        tensor([4.])

    Source:
        REBEL, arXiv 2404.16767, equation 1.
    """
    return _REBEL(implicit_rewards, rewards, mask)


def _squared_error(chosen: Tensor, rejected: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    difference = working_precision(chosen) - working_precision(rejected)
    return (difference - (chosen_rewards - rejected_rewards).to(difference.dtype)).square()


_REBEL = mean_over_rewarded_pairs(_squared_error)


def log_partition(beta: float) -> float:
    r"""$\log Z = \log \int_0^1 e^{q/\beta} dq = \log \beta (e^{1/\beta} - 1)$ of quantile rewards, which are uniform.

    Example:
        >>> round(log_partition(1.0), 12) == round(math.log(math.e - 1), 12)
        True
    """
    # expm1 keeps a large beta exact, the second form keeps a small one from overflowing.
    if beta > 1:
        return math.log(beta) + math.log(math.expm1(1 / beta))
    return math.log(beta) + 1 / beta + math.log1p(-math.exp(-1 / beta))


def candidates_log_partition(
    quantiles: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, beta: float
) -> Float[Tensor, "B 1"]:
    r"""$\log Z = \log \frac1K \sum_i e^{q_i/\beta}$ of candidates that the reference gave, with quantiles among each other.

    Without ties the quantiles are $0, \frac{1}{K-1}, \dots, 1$, each as likely: this is exact for every K, and only a large K
    brings it down to the `log_partition` of quantiles that take every value.

    Example:
        >>> quantiles, mask = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> candidates_log_partition(quantiles, mask, beta=1.0).exp()  # (e + 1) / 2
        tensor([[1.8591]])
    """
    present = mask.any(dim=1, keepdim=True)
    exponents = torch.where(mask, working_precision(quantiles) / beta, -torch.inf)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1).to(exponents.dtype)
    return torch.where(present, exponents, 0.0).logsumexp(dim=1, keepdim=True) - count.log()


def qrpo_loss(
    implicit_rewards: Float[Tensor, "B K"],
    quantiles: Float[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
    *,
    beta: float,
    log_z: Float[Tensor, "B 1"] | None = None,
) -> Float[Tensor, " B"]:
    r"""QRPO: each implicit reward fitted to its completion's quantile reward, with the exact partition function.

    $$\ell = \frac1K \sum_i \left( q_i - \beta \log Z - r_i \right)^2, \qquad Z = \beta (e^{1/\beta} - 1)$$

    Args:
        implicit_rewards: Implicit rewards $r$, beta times the log-ratio.
        quantiles: Quantile $q$ of each completion's reward among the rewards of the reference's completions, in [0, 1].
        mask: True for the candidates that exist and have a quantile; K counts these.
        beta: Scale of the log-ratio.
        log_z: $\log Z$ of each group, where quantiles are not uniform on [0, 1]: `candidates_log_partition`.

    Returns:
        Loss of each group, by itself for each candidate: K = 1 will do. 0 for a group without candidates.

    Example:
        >>> optimum = torch.tensor([[0.7 - log_partition(1.0)]])
        >>> qrpo_loss(optimum, torch.tensor([[0.7]]), torch.ones(1, 1, dtype=torch.bool), beta=1.0).round(decimals=6)
        tensor([0.])

    Source:
        QRPO, arXiv 2507.08068: the pointwise objective with the identity as transformation of the quantile.
    """
    values = torch.where(mask, working_precision(implicit_rewards), 0.0)
    partition = log_partition(beta) if log_z is None else log_z.to(values.dtype)
    aims = torch.where(mask, quantiles, 0.0).to(values.dtype) - beta * partition
    errors = torch.where(mask, (aims - values).square(), 0.0)
    return errors.sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def quantile_rewards(rewards: Sequence[float], reference_rewards: Sequence[float]) -> list[float]:
    """Share of the reference rewards that are no higher than each reward: the empirical distribution function.

    Example:
        >>> quantile_rewards([0.0, 0.5, 9.0], [0.1, 0.5, 0.7, 1.0])
        [0.0, 0.5, 1.0]
    """
    return [sum(other <= reward for other in reference_rewards) / len(reference_rewards) for reward in rewards]


def reference_quantiles(rewards: Sequence[float], metadata: Mapping[str, Any]) -> list[float]:
    """Quantiles of a group's rewards among its ``reference_rewards``.

    Args:
        rewards: Of the group's candidates.
        metadata: Of the group; ``reference_rewards`` lists the rewards of completions that the reference gave to the prompt.

    Returns:
        One quantile a candidate.

    Raises:
        ValueError: There are no reference rewards, or they are no numbers.
    """
    found = metadata.get("reference_rewards")
    if found is None:
        raise ValueError("no reference_rewards in the metadata")
    known = isinstance(found, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in found)
    if not known or not found:
        raise ValueError("reference_rewards is not a list of at least one number")
    return quantile_rewards(rewards, found)


class IPO(PairConfig):
    """IPO: a bounded difference of log-ratios, a token's mean (arXiv 2310.12036)."""

    name: Literal["ipo"] = "ipo"
    length_normalized: bool = Field(True, description="Whether log-ratios are means over the tokens, as the authors' are.")

    def method(self) -> Method:
        return self.pairs(partial(ipo_loss, beta=self.beta), score=mean_log_ratio if self.length_normalized else log_ratio)


class SPPOHard(PairConfig):
    """SPPO with certain preferences: log-ratios fitted to plus and minus 1/(2 beta) (arXiv 2405.00675)."""

    name: Literal["sppo_hard"] = "sppo_hard"

    def method(self) -> Method:
        return replace(self.pairs(partial(sppo_hard_loss, beta=self.beta)), separable=True)


class REBEL(WholeGroup):
    """REBEL: differences of implicit rewards fitted to those of rewards, over all pairs (arXiv 2404.16767)."""

    name: Literal["rebel"] = "rebel"
    beta: Beta = 1.0

    def method(self) -> Method:
        return compose(self.name, beta=self.beta, loss=rebel_loss, refuse=needs_few_to_pair)


class QRPO(WholeGroup):
    """QRPO: implicit rewards fitted to quantile rewards with the exact partition function (arXiv 2507.08068)."""

    name: Literal["qrpo"] = "qrpo"
    beta: Beta = 0.1
    reference_rewards: Literal["data", "candidates"] = Field(
        "data",
        description="Rewards of the reference's completions: each group's metadata.reference_rewards, or its candidates', "
        "if the reference gave these.",
    )

    def method(self) -> Method:
        given = self.reference_rewards == "data"
        made = compose(
            self.name,
            beta=self.beta,
            loss=partial(qrpo_loss, beta=self.beta) if given else self._among_candidates,
            refuse=(lambda rewards: None) if given else needs_preference,
            hooks=Hooks(rewards_from=reference_quantiles if given else None),
        )
        return replace(made, separable=True)

    def _among_candidates(
        self, values: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
    ) -> Float[Tensor, " B"]:
        """The loss of quantiles among the group's own candidates, and their own partition function."""
        quantiles = ranks(rewards, mask)
        log_z = candidates_log_partition(quantiles, mask, beta=self.beta)
        return qrpo_loss(values, quantiles, mask, beta=self.beta, log_z=log_z)


Config = IPO | SPPOHard | REBEL | QRPO

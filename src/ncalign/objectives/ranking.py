r"""Losses that compare the candidates of a group with one another: RNCE (and MC-PO), InfoNCA and the linear contrast.

They depend on differences of implicit rewards only, so adding a constant to all of a group's implicit rewards changes nothing.
Each takes `[B, K]` implicit rewards $r_i = \beta(\log \pi_\theta(y_i|x) - \log \pi_{ref}(y_i|x))$ and returns one
number a group, in nats; the caller reduces. Masked entries may hold anything and reach neither value nor gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from ncalign.objectives.config import Beta, DrawnStrategy, Frozen, WholeGroup
from ncalign.objectives.kernels import KernelSettings
from ncalign.objectives.method import Hooks, Method, compose, needs_candidates, needs_preference
from ncalign.objectives.samplers import all_below, by_log_ratio, by_logprob, mc_sampler, some_below
from ncalign.objectives.targets import TargetConfig, target_weights, working_precision

__all__ = ["rnce_loss", "info_nca_loss", "info_nca_weighted_loss", "linear_contrast_loss"]
__all__ += ["RNCE", "InfoNCA", "MCPO", "ContrastiveDivergence"]


def rnce_loss(
    implicit_rewards: Float[Tensor, "B K"], positive: Int[Tensor, " B"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    r"""Ranking noise-contrastive loss of the positive against every other candidate of its group.

    $$\ell = -r_0 + \log \sum_{i=0}^{M} e^{r_i}$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless.
        positive: Column of the positive. A group whose positive is masked or negative (absent) gives 0.
        mask: True for the candidates that enter: the positive and its M negatives.

    Returns:
        Loss of each group; $\log(M + 1)$ where all implicit rewards are equal. A negative that is a copy of the positive
        counts as a negative and adds nothing to the gradient.

    Example:
        >>> import math
        >>> r = torch.tensor([[0.0, math.log(2.0), 7.0]])
        >>> rnce_loss(r, torch.tensor([0]), torch.tensor([[True, True, False]]))  # log(1 + 2)
        tensor([1.0986])

    Source:
        Sampling-based objective of MC-PO, arXiv 2502.04567, section 2.3; with M = 1 it is DPO.
    """
    column = positive.clamp(min=0).unsqueeze(1)
    present = (positive >= 0).unsqueeze(1) & mask.gather(1, column)
    rewards = torch.where(mask & present, working_precision(implicit_rewards), 0.0)
    # Differences first: they stay exact where the implicit rewards themselves are large.
    differences = torch.where(mask & present, rewards - rewards.gather(1, column), -torch.inf)
    differences = torch.where(present, differences, 0.0)
    return torch.where(present.squeeze(1), differences.logsumexp(dim=1), 0.0)


def info_nca_loss(
    implicit_rewards: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, alpha: float
) -> Float[Tensor, " B"]:
    r"""Cross-entropy between the target weights and the softmax of the implicit rewards.

    $$\ell = -\sum_i w_i \log \frac{e^{r_i}}{\sum_j e^{r_j}}, \qquad w = \mathrm{softmax}(R / \alpha)$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless.
        rewards: Rewards $R$, in their own unit.
        mask: True for the candidates that exist and have a reward.
        alpha: Reward temperature, in the reward's unit.

    Returns:
        Loss of each group; $\log K$ where all implicit rewards are equal, 0 for a group without candidates.

    Raises:
        ValueError: alpha is not above 0.

    Example:
        >>> r, rewards = torch.zeros(1, 4), torch.tensor([[1.0, 0.5, 0.0, 0.2]])
        >>> info_nca_loss(r, rewards, torch.ones(1, 4, dtype=torch.bool), alpha=0.1)  # log 4
        tensor([1.3863])

    Source:
        InfoNCA, arXiv 2402.05369, section 3.
    """
    return info_nca_weighted_loss(implicit_rewards, target_weights(rewards, mask, alpha=alpha), mask)


def info_nca_weighted_loss(
    implicit_rewards: Float[Tensor, "B K"], weights: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    r"""InfoNCA's cross-entropy for target weights from anywhere.

    $$\ell = -\sum_i w_i \log \frac{e^{r_i}}{\sum_j e^{r_j}}$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless.
        weights: Target weights $w$, which sum to 1 over the real candidates of a group. Masked entries may hold anything.
        mask: True for the candidates that enter.

    Returns:
        Loss of each group, in nats; 0 for a group without candidates.

    Example:
        >>> import math
        >>> r, weights = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[1.0, 0.0]])
        >>> info_nca_weighted_loss(r, weights, torch.ones(1, 2, dtype=torch.bool))  # log(1 + 3)
        tensor([1.3863])

    Source:
        InfoNCA, arXiv 2402.05369, section 3.
    """
    present = mask.any(dim=1, keepdim=True)
    logits = torch.where(mask, working_precision(implicit_rewards), -torch.inf)
    log_probabilities = torch.where(present, logits, 0.0).log_softmax(dim=1)
    shares = torch.where(mask, weights, 0.0).to(logits.dtype)
    return -(shares * torch.where(mask, log_probabilities, 0.0)).sum(dim=1)


def linear_contrast_loss(
    implicit_rewards: Float[Tensor, "B K"], positive: Int[Tensor, " B"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    r"""Difference between the mean implicit reward of the negatives and that of the positive.

    $$\ell = -r_0 + \frac1M \sum_{m=1}^{M} r_{z_m}$$

    Args:
        implicit_rewards: Implicit rewards $r$, dimensionless.
        positive: Column of the positive. A group whose positive is masked or negative (absent) gives 0.
        mask: True for the candidates that enter: the positive and its M negatives. A drawn copy of the positive is a negative
            in a column of its own.

    Returns:
        Loss of each group; 0 without negatives. It has no lower bound and its value says little: its gradient is what counts.
        For $z \sim \mathrm{softmax}(r)$ over the positive and all negatives, the expected gradient is `rnce_loss`'s.

    Example:
        >>> r = torch.tensor([[1.0, 3.0, 0.0]])
        >>> linear_contrast_loss(r, torch.tensor([0]), torch.ones(1, 3, dtype=torch.bool))  # (3 + 0) / 2 - 1
        tensor([0.5000])

    Source:
        The contrastive divergence gradient that MC-PO's Algorithm 1 rests on, arXiv 2502.04567.
    """
    column = positive.clamp(min=0).unsqueeze(1)
    present = (positive >= 0).unsqueeze(1) & mask.gather(1, column)
    negatives = (mask & present).scatter(1, column, False)
    values = torch.where(mask & present, working_precision(implicit_rewards), 0.0)
    differences = torch.where(negatives, values - values.gather(1, column), 0.0)
    return differences.sum(dim=1) / negatives.sum(dim=1).clamp(min=1)


def _rnce_of_first(
    values: Float[Tensor, "B S"], rewards: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]
) -> Float[Tensor, " B"]:
    """`rnce_loss` with the positive in column 0."""
    return rnce_loss(values, torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device), mask)


def _linear_contrast_of_first(
    values: Float[Tensor, "B S"], rewards: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]
) -> Float[Tensor, " B"]:
    """`linear_contrast_loss` with the positive in column 0."""
    return linear_contrast_loss(values, torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device), mask)


NumProposals = Annotated[
    int | None,
    Field(ge=1, description="Candidates that a step of the chain proposes; none: all of them, and one step is exact."),
]


class RNCE(WholeGroup):
    """RNCE: the best completion against lower-scored ones, all of them or a random few (S-DPO, arXiv 2406.09215)."""

    name: Literal["rnce"] = "rnce"
    beta: Beta = 0.1
    num_negatives: int | None = Field(
        None,
        ge=1,
        description="M, lower-scored candidates drawn each time a group is used; none: all. Groups with fewer are refused.",
    )

    def method(self) -> Method:
        return compose(
            self.name,
            beta=self.beta,
            loss=_rnce_of_first,
            refuse=self._refuse,
            sampler=all_below() if self.num_negatives is None else some_below(self.num_negatives),
        )

    def _refuse(self, rewards: Sequence[float]) -> str | None:
        """Refuse groups without a preference, and those with too few negatives."""
        reason = needs_preference(rewards)
        if reason is not None or self.num_negatives is None:
            return reason
        best = max(rewards)
        below = sum(reward < best for reward in rewards)
        if below >= self.num_negatives:
            return None
        return f"{below} candidates below the best, and num_negatives is {self.num_negatives}"


class InfoNCA(TargetConfig):
    """InfoNCA: cross-entropy between target weights from rewards and the softmax of implicit rewards (arXiv 2402.05369)."""

    name: Literal["info_nca"] = "info_nca"
    beta: Beta = 0.1

    def method(self) -> Method:
        weights = self.weights()
        return compose(
            self.name,
            beta=self.beta,
            loss=lambda values, rewards, mask: info_nca_weighted_loss(values, weights(rewards, mask), mask),
            refuse=needs_candidates,
            hooks=Hooks(
                target_weights=weights,
                fit=None if self.target_entropy is None else lambda rewards, mask: self.fitted(rewards, mask).method(),
            ),
        )


class MCPO(Frozen):
    """MC-PO: RNCE with negatives drawn by a Monte Carlo kernel (arXiv 2502.04567, Algorithm 1)."""

    name: Literal["mc_po"] = "mc_po"
    beta: Beta = 0.1
    num_negatives: int = Field(1, ge=1, description="M, the negatives that enter the loss.")
    strategy: DrawnStrategy = Field(
        "mc", description="How negatives are drawn; mc, max and min read the kernel's scores, the others don't."
    )
    kernel_score: Literal["implicit_reward", "policy_logprob"] = Field(
        "implicit_reward", description="What the kernel weighs by, times beta: the log-ratio, or the policy's log-prob alone."
    )
    include_positive: bool = Field(False, description="Whether the preferred completion is itself a state of the kernel.")
    replacement: bool = Field(False, description="Whether the M negatives are drawn with replacement.")
    temperature: float = Field(1.0, gt=0, description="Divides the scores before the softmax of the kernel.")
    target_ess: float | None = Field(
        None,
        gt=0,
        le=1,
        description="In place of temperature: share of a group's candidates that the kernel's effective sample size has.",
    )
    chain_steps: int = Field(
        1, ge=1, description="Steps k of the kernel's chain, whose last state is the draw; above 1 with num_proposals alone."
    )
    num_proposals: NumProposals = None
    log_q_correction: bool = Field(
        False, description="Whether each negative's score is corrected for the probability with which it was drawn."
    )
    acceptance: bool = Field(
        False, description="Whether a draw is a proposal, which the loss weighs with the probability that it is accepted."
    )
    proposals: Literal["current", "last_visit"] = Field(
        "current",
        description="Whose scores mc draws by: the current policy's, of a pass over all candidates; or without that pass, "
        "each candidate's as it last entered the loss, which needs acceptance or log_q_correction.",
    )

    @model_validator(mode="after")
    def _correction_is_possible(self) -> MCPO:
        """Refuse, before any data is read, settings that the sampler refuses."""
        self.method()
        return self

    def method(self) -> Method:
        return compose(
            self.name,
            beta=self.beta,
            loss=_rnce_of_first,
            refuse=needs_preference,
            sampler=mc_sampler(
                KernelSettings(
                    self.strategy,
                    self.num_negatives,
                    include_positive=self.include_positive,
                    replacement=self.replacement,
                    temperature=self.temperature,
                    chain_steps=self.chain_steps,
                    num_proposals=self.num_proposals,
                    target_ess=self.target_ess,
                ),
                scores=by_logprob if self.kernel_score == "policy_logprob" else by_log_ratio,
                log_q_correction=self.log_q_correction,
                acceptance=self.acceptance,
                last_visit=self.proposals == "last_visit",
            ),
        )


class ContrastiveDivergence(Frozen):
    """CD: linear contrast of the positive with draws of the kernel that includes it; exact on average (arXiv 2502.04567)."""

    name: Literal["cd"] = "cd"
    beta: Beta = 0.1
    num_negatives: int = Field(1, ge=1, description="M, draws of the kernel, with replacement; they average its gradient.")
    chain_steps: int = Field(1, ge=1, description="Steps k of the chain from the positive; above 1 with num_proposals alone.")
    num_proposals: NumProposals = None

    @model_validator(mode="after")
    def _chain_is_possible(self) -> ContrastiveDivergence:
        """Refuse, before any data is read, settings that the kernel refuses."""
        self.method()
        return self

    def method(self) -> Method:
        return compose(
            self.name,
            beta=self.beta,
            loss=_linear_contrast_of_first,
            refuse=needs_preference,
            sampler=mc_sampler(
                KernelSettings(
                    "mc",
                    self.num_negatives,
                    include_positive=True,
                    replacement=True,
                    chain_steps=self.chain_steps,
                    num_proposals=self.num_proposals,
                )
            ),
        )


Config = RNCE | InfoNCA | MCPO | ContrastiveDivergence

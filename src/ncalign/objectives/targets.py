"""What the losses share: the precision they work in and the target weights made from rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from ncalign.objectives.config import Alpha, WholeGroup

__all__ = ["target_weights"]

Weights = Callable[[Tensor, Tensor], Tensor]
"""``(rewards [B, K], mask [B, K]) -> weights [B, K]``."""
Transform = Callable[[Tensor, Tensor], Tensor]
"""``(rewards [B, K], mask [B, K]) -> rewards [B, K]``."""

Configured = TypeVar("Configured", bound="TargetConfig")

ONE_HOT_BELOW, UNIFORM_ABOVE = 0.02, 0.98


def working_precision(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers in the precision that losses are computed in.

    Args:
        values: Numbers of any floating type.

    Returns:
        float64 as it is, everything else as float32.

    Example:
        >>> working_precision(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> working_precision(torch.zeros(2, dtype=torch.float64)).dtype
        torch.float64
    """
    return values if values.dtype == torch.float64 else values.float()


def target_weights(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, alpha: float) -> Float[Tensor, "B K"]:
    r"""Share of each candidate in the distribution that the rewards call for.

    $$w_i = \frac{e^{R_i/\alpha}}{\sum_j e^{R_j/\alpha}}$$

    Args:
        rewards: Rewards $R$, in the reward's own unit. Masked entries may hold anything, NaN and inf too.
        mask: True for the candidates that exist and have a reward.
        alpha: Reward temperature $\alpha > 0$, in the reward's unit. Towards 0 the weight goes to the best candidate (tied
            best ones share it); towards infinity all weights become equal, and at infinity they are.

    Returns:
        Weights that sum to 1 over a group; 0 where masked, and all 0 in a group without any candidate. float64 for float64
        rewards, float32 for others.

    Raises:
        ValueError: alpha is not above 0.

    Example:
        >>> import math
        >>> rewards = torch.tensor([[math.log(3.0), 0.0, 99.0]])
        >>> target_weights(rewards, torch.tensor([[True, True, False]]), alpha=1.0)
        tensor([[0.7500, 0.2500, 0.0000]])

    Source:
        InfoNCA / NCA, arXiv 2402.05369: the reward weights of both losses.
    """
    if not alpha > 0:
        raise ValueError(
            f"alpha is {alpha}, and the target weights softmax(reward / alpha) need a number above 0: "
            "use a small one such as 0.01 to put all the weight on the best candidate"
        )
    present = mask.any(dim=1, keepdim=True)
    values = torch.where(mask, working_precision(rewards), -torch.inf)
    best = torch.where(present, values.amax(dim=1, keepdim=True), 0.0)
    # Subtracting before dividing keeps a tiny alpha from overflowing: every exponent is at most 0, and the best's is 0.
    # At infinity the quotient of a masked entry would be NaN, and all exponents are 0.
    exponents = torch.where(mask, 0.0, values) if math.isinf(alpha) else (values - best) / alpha
    exponents = torch.where(present, exponents, 0.0)
    return torch.where(mask, exponents.softmax(dim=1), 0.0)


def one_hot_weights(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    r"""All the weight on the best candidate, the limit of `target_weights` as alpha falls to 0.

    $$w_i = \frac{[R_i = \max_j R_j]}{\#\{j : R_j = \max R\}}$$

    Args:
        rewards: Rewards $R$; only which is the highest matters. Masked entries may hold anything, NaN and inf too.
        mask: True for the candidates that exist and have a reward.

    Returns:
        Weights that sum to 1 over a group, tied best candidates sharing alike; 0 where masked.

    Example:
        >>> one_hot_weights(torch.tensor([[3.0, 1.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool))
        tensor([[0.5000, 0.0000, 0.5000]])

    Source:
        Reward datasets with alpha towards 0, arXiv 2402.05369.
    """
    values = torch.where(mask, working_precision(rewards), -torch.inf)
    best = mask & (values == values.amax(dim=1, keepdim=True))
    return best.to(values.dtype) / best.sum(dim=1, keepdim=True).clamp(min=1)


def dense_ranks(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    r"""Dense rank of each candidate's reward in its group, scaled to [0, 1].

    $$\frac{\#\{\text{distinct rewards below } R_i\}}{\#\{\text{distinct rewards}\} - 1}$$

    Args:
        rewards: Rewards $R$; only their order matters. Masked entries may hold anything, NaN and inf too.
        mask: True for the candidates that exist and have a reward.

    Returns:
        0 for the lowest, 1 for the highest, equal steps between neighbouring levels, ties on one level; 0 where masked and in a
        group whose rewards are all equal. In `ranks` candidates tied with one another use up places.

    Example:
        >>> dense_ranks(torch.tensor([[5.0, -1.0, 5.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool))
        tensor([[1.0000, 0.0000, 1.0000, 0.5000]])
    """
    values, ordered = _ordered(rewards, mask)
    first = torch.zeros_like(ordered[:, :1], dtype=torch.long)
    rises = ((ordered[:, 1:] > ordered[:, :-1]) & ordered[:, 1:].isfinite()).long()
    levels = torch.cat([first, rises.cumsum(dim=1)], dim=1)
    place = torch.searchsorted(ordered, values).clamp(max=ordered.shape[1] - 1)
    top = levels[:, -1:].clamp(min=1).to(values.dtype)
    return torch.where(mask, levels.gather(1, place).to(values.dtype) / top, 0.0)


def ranks(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    r"""Share of the group's other candidates that a candidate beats, ties counting half.

    $$q_i = \frac{\#\{j \ne i : R_j < R_i\} + \frac12 \#\{j \ne i : R_j = R_i\}}{K - 1}$$

    Args:
        rewards: Rewards $R$; only their order matters. Masked entries may hold anything, NaN and inf too.
        mask: True for the candidates that exist and have a reward; K counts these.

    Returns:
        Shares in [0, 1], with mean 1/2 over a group of several candidates; 1 for a candidate without others; 0 where masked.

    Example:
        >>> ranks(torch.tensor([[5.0, -1.0, 5.0]]), torch.ones(1, 3, dtype=torch.bool))  # 1.5 / 2, 0, 1.5 / 2
        tensor([[0.7500, 0.0000, 0.7500]])

    Source:
        Our choice; the quantile of a reward among other completions of the prompt as in QRPO, arXiv 2507.08068.
    """
    values, ordered = _ordered(rewards, mask)
    below = torch.searchsorted(ordered, values)
    tied = torch.searchsorted(ordered, values, right=True) - below - 1
    others = mask.sum(dim=1, keepdim=True) - 1
    shares = (below + 0.5 * tied).to(values.dtype) / others.clamp(min=1)
    return torch.where(mask, torch.where(others > 0, shares, 1.0), 0.0)


def z_scores(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    r"""Rewards with their group's mean taken off, in its standard deviations.

    $$z_i = \frac{R_i - \bar R}{s}, \qquad s^2 = \frac1K \sum_j (R_j - \bar R)^2$$

    Args:
        rewards: Rewards $R$. Masked entries may hold anything, NaN and inf too.
        mask: True for the candidates that exist and have a reward; K counts these.

    Returns:
        Dimensionless, mean 0 and variance 1 over a group; all 0 in a group whose rewards are all equal, and where masked.

    Example:
        >>> z_scores(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.ones(2, 2, dtype=torch.bool))
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """
    varies = _varies(rewards, mask).unsqueeze(1)
    real = mask & varies
    values = torch.where(real, working_precision(rewards), 0.0)
    # Measured from the lowest, so that rewards far from zero keep their digits, and in units of the largest difference, so that
    # squares neither overflow nor vanish. Where the difference itself overflows, that of the halves does not.
    low = torch.where(varies, torch.where(real, values, torch.inf).amin(dim=1, keepdim=True), 0.0)
    away = values - low
    away = torch.where(away.isinf().any(dim=1, keepdim=True), values / 2 - low / 2, away)
    away = torch.where(real, away, 0.0) / torch.where(varies, torch.where(real, away, 0.0).amax(dim=1, keepdim=True), 1.0)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    away = torch.where(mask, away - away.sum(dim=1, keepdim=True) / count, 0.0)
    return away / torch.where(varies, (away.square().sum(dim=1, keepdim=True) / count).sqrt(), 1.0)


def sharpness(weights: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> float:
    r"""Mean over the groups of $H(w) / \log K$: 0 where one candidate has all the weight, 1 where all have the same.

    Args:
        weights: Target weights, each group's summing to 1.
        mask: True for the candidates that count; groups with fewer than two of them are left out.

    Returns:
        A number in [0, 1]; NaN where no group has two candidates.

    Example:
        >>> sharpness(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.ones(2, 2, dtype=torch.bool))  # (0 + 1) / 2
        0.5
    """
    return float(_normalized_entropies(weights, mask)[mask.sum(dim=1) >= 2].mean())


def alpha_for_entropy(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], *, entropy: float) -> float:
    r"""Reward temperature at which the target weights are as sharp as asked.

    $$\alpha : \quad \frac1N \sum_n \frac{H(\mathrm{softmax}(R_n / \alpha))}{\log K_n} = \text{entropy}$$

    Args:
        rewards: Rewards $R$ of a whole data set. Masked entries may hold anything, NaN and inf too.
        mask: True for the candidates that exist and have a reward. Groups whose rewards are all equal are left out of the mean.
        entropy: Share of the largest entropy, between 0 (one-hot) and 1 (uniform), both excluded.

    Returns:
        Alpha, in the reward's unit, by bisection on its logarithm.

    Raises:
        ValueError: entropy is not between 0 and 1, no group has rewards that differ, or so many best candidates are tied that
            even the one-hot target is less sharp than asked.

    Example:
        >>> import math
        >>> rewards, mask = torch.tensor([[math.log(3.0), 0.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)  # weights 3/4 and 1/4 at alpha = 1
        >>> round(alpha_for_entropy(rewards, mask, entropy=quarter), 5)
        1.0
    """
    if not 0 < entropy < 1:
        raise ValueError(f"the target's entropy is {entropy}: give a share of log K between 0 (one-hot) and 1 (uniform)")
    varies = _varies(rewards, mask)
    if not varies.any():
        raise ValueError(
            "no group has rewards that differ, so every alpha gives the same weights: "
            "give alpha itself, or rewards that tell the candidates of a group apart"
        )
    real = mask[varies]
    values = torch.where(real, rewards[varies].double(), torch.nan)
    least = sharpness(one_hot_weights(values, real), real)
    if entropy <= least:
        raise ValueError(
            f"the target's entropy {entropy} can't be reached: ties among the best candidates leave {least:.4g} "
            "even with all the weight on them; ask for more than that, or use transform one_hot"
        )
    best = torch.where(real, values, -torch.inf).amax(dim=1, keepdim=True)
    gaps = (best - values)[real & (values < best)]
    # At the ends every exponent is beyond e^+-2900 or within 1e-8 of 0: the limits of float64.
    low, high = math.log(gaps.min().item()) - 8, math.log(gaps.max().item()) + 20
    return temperature_where(lambda alpha: sharpness(target_weights(values, real, alpha=alpha), real), entropy, low, high)


def temperature_where(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """The temperature at which a rising function of it has the value wanted, by bisection between two logarithms of it.

    Example:
        >>> round(temperature_where(lambda alpha: alpha**2, 4.0, -5.0, 5.0), 12)
        2.0
    """
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(math.exp(middle)) < wanted else (low, middle)
    return math.exp((low + high) / 2)


def warn_if_degenerate(weights: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> str | None:
    """A warning for target weights that are one-hot or uniform in effect.

    Args:
        weights: Target weights of a data set, or of a part of it.
        mask: True for the candidates that count.

    Returns:
        A message that says how to change alpha, or None for weights in between.

    Example:
        >>> warn_if_degenerate(torch.tensor([[0.9, 0.1]]), torch.ones(1, 2, dtype=torch.bool)) is None
        True
        >>> warn_if_degenerate(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
        'the target weights are one-hot in effect (0.000 of the largest entropy): take a larger alpha, or let
        target_entropy: 0.5 find one'
    """
    share = sharpness(weights, mask)
    if share < ONE_HOT_BELOW:
        what, change = "one-hot", "a larger"
    elif share > UNIFORM_ABOVE:
        what, change = "uniform", "a smaller"
    else:
        return None
    factor = _factor_to_half(weights, mask)
    by = "" if factor is None else f" (about {factor:.2g} times the present one)"
    return (
        f"the target weights are {what} in effect ({share:.3f} of the largest entropy): "
        f"take {change} alpha{by}, or let target_entropy: 0.5 find one"
    )


def _factor_to_half(weights: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> float | None:
    """Factor on alpha that brings the entropy to half; None where the weights no longer determine it, or ties forbid it."""
    # Log weights are R / alpha and a constant, so that an alpha of theirs is a factor on the one that made them.
    logs = torch.where(mask, weights.double(), 1.0).log()
    known = _varies(logs, mask) & logs.isfinite().all(dim=1)
    if not known.any() or sharpness(one_hot_weights(logs[known], mask[known]), mask[known]) >= 0.5:
        return None
    return alpha_for_entropy(logs[known], mask[known], entropy=0.5)


def _ordered(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Rewards with 0 where masked, and those of each group in rising order with infinity for the masked ones."""
    values = torch.where(mask, working_precision(rewards), 0.0)
    ordered = torch.where(mask, values, torch.inf).sort(dim=1).values
    return values.contiguous(), ordered.contiguous()


def _varies(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Bool[Tensor, " B"]:
    """Whether a group has rewards that differ."""
    highest = torch.where(mask, rewards, -torch.inf).amax(dim=1)
    return highest > torch.where(mask, rewards, torch.inf).amin(dim=1)


def _normalized_entropies(weights: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    entropies: Tensor = torch.special.entr(torch.where(mask, weights.double(), 0.0)).sum(dim=1)
    return entropies / mask.sum(dim=1).clamp(min=2).double().log()


# --- Configuration ----------------------------------------------------------------------------------------------------


def _as_given(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    return rewards


def _softened(transform: Transform, alpha: float) -> Weights:
    """The weights of the transformed rewards at this temperature."""
    if transform is _as_given:
        return partial(target_weights, alpha=alpha)
    return lambda rewards, mask: target_weights(transform(rewards, mask), mask, alpha=alpha)


TRANSFORMS: Mapping[str, Transform] = {
    "none": _as_given,
    "rank": ranks,
    "quantile": ranks,
    "dense_rank": dense_ranks,
    "z_score": z_scores,
}
WEIGHTS: Mapping[str, Callable[[float], Weights]] = {
    **{name: partial(_softened, transform) for name, transform in TRANSFORMS.items()},
    "one_hot": lambda alpha: one_hot_weights,
}


class TargetConfig(WholeGroup):
    """How rewards become target weights."""

    alpha: Alpha = 0.1
    target_entropy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="How sharp the targets are, as a share of log K; alpha is then found from the training set's rewards.",
    )
    transform: Literal["none", "rank", "quantile", "dense_rank", "z_score", "one_hot"] = Field(
        "none",
        description="What is done to a group's rewards before alpha divides them; quantile is an older name of rank; "
        "one_hot: all weight on the best.",
    )

    @model_validator(mode="after")
    def _one_source_of_sharpness(self) -> TargetConfig:
        if self.target_entropy is not None and self.transform == "one_hot":
            raise ValueError("target_entropy asks for an alpha, and transform one_hot uses none: leave out one of the two")
        return self

    def weights(self) -> Weights:
        """The function from rewards to target weights; alpha must be known, given or found by `fitted`."""
        if self.target_entropy is not None:
            return _unfitted
        return WEIGHTS[self.transform](self.alpha)

    def fitted(self: Configured, rewards: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> Configured:
        """The same configuration with alpha found from these rewards where `target_entropy` asks for that."""
        return self.model_copy(update={"alpha": fitted_alpha(self, rewards, mask), "target_entropy": None})


def fitted_alpha(config: TargetConfig, rewards: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> float:
    """The alpha that a configuration calls for on a data set: the given one, or the one that `target_entropy` asks for.

    Args:
        config: How rewards become target weights.
        rewards: Rewards of the whole training set.
        mask: True for the candidates that exist and have a reward.

    Returns:
        Alpha, in the unit of the transformed rewards.

    Raises:
        ValueError: No alpha gives that entropy.

    Example:
        >>> rewards, mask = torch.tensor([[7.0, 5.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> fitted_alpha(TargetConfig(alpha=0.3), rewards, mask)
        0.3
        >>> found = fitted_alpha(TargetConfig(target_entropy=0.5), rewards, mask)
        >>> round(sharpness(target_weights(rewards, mask, alpha=found), mask), 6)
        0.5
    """
    if config.target_entropy is None:
        return config.alpha
    return alpha_for_entropy(TRANSFORMS[config.transform](rewards, mask), mask, entropy=config.target_entropy)


def _unfitted(rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    raise ValueError(
        "target_entropy leaves alpha to the data: call the method's fit with the training set's rewards first, "
        "or give alpha and leave target_entropy out"
    )

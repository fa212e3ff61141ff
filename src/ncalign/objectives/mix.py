"""Mixes: a weighted sum of methods as one method, each part with its own candidates, scores and beta.

MPO of preferences (DPO), quality (BCO) and generation (NLL) is one; so is any other list of this package's methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ncalign.objectives import anchored, binary, lists, pairs, ranking, regression
from ncalign.objectives.config import Estimate, Frozen, WholeGroup
from ncalign.objectives.method import Hooks, LossInputs, Method, chosen_nll
from ncalign.objectives.samplers import Sampler, best_alone, everyone

__all__ = ["weighted_sum", "Mix", "NLL"]


@dataclass(frozen=True)
class _Part:
    """A method in a mix.

    Attributes:
        label: its name in the metrics.
        weight: of its loss.
        method: as it is alone.
        sampler: its own, or all candidates with the positive first.
        scale: its beta over the mix's, which scores and baseline are multiplied by.
    """

    label: str
    weight: float
    method: Method
    sampler: Sampler
    scale: float = 1.0

    def of_block(self, inputs: LossInputs, block: int, num_blocks: int) -> LossInputs:
        """What this part's loss is computed from, out of the columns of all parts."""

        def own(values: Tensor) -> Tensor:
            return values.chunk(num_blocks, dim=1)[block]

        corrected = inputs.log_q is not None and self.sampler.log_q is not None
        return LossInputs(
            log_ratios=own(inputs.log_ratios),
            logprobs=own(inputs.logprobs),
            rewards=own(inputs.rewards),
            lengths=own(inputs.lengths),
            mask=own(inputs.mask),
            log_q=own(inputs.log_q) if corrected and inputs.log_q is not None else None,
            baseline=self.scale * inputs.baseline if self.method.hooks.baseline is not None else 0.0,
        )


def weighted_sum(name: str, methods: Sequence[Method], *, weights: Sequence[float] | None = None) -> Method:
    r"""A method whose loss is a weighted sum of others': $\ell = \sum_p \lambda_p \ell_p$.

    Each part chooses its candidates as it does alone, with the same random numbers: all parts have the same positive, and parts
    that draw in one way the same negatives. What several parts chose passes through the model once.

    Args:
        name: For messages and results.
        methods: The parts.
        weights: $\lambda_p$ of each, above 0; None: 1 each.

    Returns:
        The method. Its beta, which metrics and kernels use, is that of the first part that compares candidates.

    Raises:
        ValueError: Weights of another number or not above 0, or parts that can't be trained together: one replaces the rewards
            that the others read or is a mix, two measure scores from different levels or draw by different scores.

    Example:
        >>> from ncalign.objectives.binary import NCA
        >>> from ncalign.objectives.pairs import DPO
        >>> zero, real = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)  # two columns for each part
        >>> inputs = LossInputs(zero, zero - 1, torch.tensor([[1.0, 0.0, 1.0, 0.0]]), zero + 1, real)
        >>> mix = weighted_sum("both", [DPO().method(), NCA().method()], weights=[2.0, 0.5])
        >>> mix.loss(inputs)  # 2 log 2 + 0.5 * 2 log 2
        tensor([2.0794])
    """
    factors, labels = [1.0] * len(methods) if weights is None else list(weights), _labels(methods)
    if len(factors) != len(methods) or not methods or not all(factor > 0 for factor in factors):
        raise ValueError(f"{name}: weights {factors} for {len(methods)} parts: give each part a weight above 0")
    _refuse_what_does_not_mix(name, dict(zip(labels, methods, strict=True)))
    parts = [
        _Part(label, factor, method, everyone() if method.sampler is None else method.sampler)
        for label, factor, method in zip(labels, factors, methods, strict=True)
    ]
    # Parts with negatives first: metrics describe the first part's candidates, and its beta is the mix's.
    parts.sort(key=lambda part: part.sampler.size == 1)
    beta = parts[0].method.beta
    parts = [replace(part, scale=part.method.beta / beta) for part in parts]

    def shares(inputs: LossInputs) -> dict[str, Tensor]:
        of_blocks = (part.of_block(inputs, block, len(parts)) for block, part in enumerate(parts))
        return {part.label: part.weight * part.method.loss(own) for part, own in zip(parts, of_blocks, strict=True)}

    def refuse(rewards: Sequence[float]) -> str | None:
        reasons = ((part.label, part.method.refuse(rewards)) for part in parts)
        return next((f"{label}: {reason}" for label, reason in reasons if reason is not None), None)

    def fit(rewards: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> Method:
        fitted = [method if method.hooks.fit is None else method.hooks.fit(rewards, mask) for method in methods]
        return weighted_sum(name, fitted, weights=weights)

    hooks = replace(_hooks(methods), fit=fit if any(method.hooks.fit for method in methods) else None, shares=shares)
    return Method(name, beta, lambda inputs: total(shares(inputs)), _sampler(parts), refuse, hooks)


def _hooks(methods: Sequence[Method]) -> Hooks:
    """What the loop does for the parts: the target weights of the first that has them, the level that all agree on, notices."""
    notices = [method.hooks.notice for method in methods if method.hooks.notice is not None]

    def notice(rewards: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> str | None:
        return "; ".join(filter(None, (one(rewards, mask) for one in notices))) or None

    targets = (method.hooks.target_weights for method in methods)
    levels = (method.hooks.baseline for method in methods)
    return Hooks(
        target_weights=next((found for found in targets if found is not None), None),
        baseline=next((found for found in levels if found is not None), None),
        notice=notice if notices else None,
    )


def total(shares: Mapping[str, Float[Tensor, " B"]]) -> Float[Tensor, " B"]:
    """The loss that the parts' shares make up."""
    return torch.stack(list(shares.values())).sum(dim=0)


def _labels(methods: Sequence[Method]) -> list[str]:
    """The methods' names; of several with one name the second is ``name_2``."""
    seen: Counter[str] = Counter()
    labels = []
    for method in methods:
        seen[method.name] += 1
        labels.append(method.name if seen[method.name] == 1 else f"{method.name}_{seen[method.name]}")
    return labels


def _refuse_what_does_not_mix(name: str, methods: Mapping[str, Method]) -> None:
    """Refuse parts that need different things of the loop, by their names."""
    for label, method in methods.items():
        if method.hooks.shares is not None:
            raise ValueError(f"{name}: {label} is a mix itself: give its parts instead")
        if method.hooks.rewards_from is not None:
            raise ValueError(
                f"{name}: {label} replaces the rewards as the data is read, and the other parts read them: leave it out "
                "(qrpo can be mixed with reference_rewards: candidates)"
            )
    levels = {label: method.hooks.baseline for label, method in methods.items()}
    scores = {
        label: None if (own := method.sampler) is None or own.scores is None else (own.scores, own.last_visit)
        for label, method in methods.items()
    }
    for what, found in (("measure scores from different levels", levels), ("draw negatives by different scores", scores)):
        known = {label: value for label, value in found.items() if value is not None}
        if len(set(known.values())) > 1:
            raise ValueError(f"{name}: {' and '.join(known)} {what}: leave one of them out")


def _sampler(parts: Sequence[_Part]) -> Sampler:
    """The columns of all parts, one block after the other, each as wide as the widest."""
    reading = [part for part in parts if part.sampler.scores is not None]
    drawing = [part for part in reading if part.sampler.kernel is not None]

    def select(
        scores: Float[Tensor, "B K"] | None,
        rewards: Float[Tensor, "B K"],
        mask: Bool[Tensor, "B K"],
        generator: torch.Generator,
    ) -> Int[Tensor, "B S"]:
        state, chosen = generator.get_state(), []
        for part in parts:
            generator.set_state(state)
            read = None if scores is None or part.sampler.scores is None else part.scale * scores
            chosen.append(part.sampler.select(read, rewards, mask, generator))
        width = max(columns.shape[1] for columns in chosen)
        return torch.cat([F.pad(columns, (0, width - columns.shape[1]), value=-1) for columns in chosen], dim=1)

    def kernel(scores: Tensor, positive: Tensor, rewards: Tensor, mask: Tensor) -> Float[Tensor, "B K"]:
        first = drawing[0]
        assert first.sampler.kernel is not None
        return first.sampler.kernel(first.scale * scores, positive, rewards, mask)

    def temperature(scores: Tensor, positive: Tensor, rewards: Tensor, mask: Tensor) -> Float[Tensor, " B"]:
        first = drawing[0]
        assert first.sampler.temperature is not None
        return first.sampler.temperature(first.scale * scores, positive, rewards, mask)

    def log_q(scores: Tensor, rewards: Tensor, mask: Tensor, columns: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        corrections = []
        for part, own in zip(parts, columns.unflatten(1, (len(parts), -1)).unbind(dim=1), strict=True):
            correct = part.sampler.log_q
            corrections.append(
                scores.new_zeros(own.shape) if correct is None else correct(part.scale * scores, rewards, mask, own)
            )
        return torch.cat(corrections, dim=1)

    def reads(rewards: Tensor, mask: Tensor) -> Bool[Tensor, "B K"]:
        wanted = [mask if part.sampler.reads is None else part.sampler.reads(rewards, mask) for part in reading]
        return torch.stack(wanted).any(dim=0)

    sizes = [part.sampler.size for part in parts]
    return Sampler(
        select,
        reading[0].sampler.scores if reading else None,
        kernel if drawing else None,
        log_q if any(part.sampler.log_q is not None for part in parts) else None,
        None if None in sizes else 1 + sum(size - 1 for size in sizes if size is not None),
        reads if reading else None,
        len(parts),
        temperature if drawing and drawing[0].sampler.temperature is not None else None,
        parts[0].sampler.accepts,
        any(part.sampler.last_visit for part in reading),
    )


# --- Configuration ----------------------------------------------------------------------------------------------------


class NLL(Frozen):
    """NLL: the chosen completion's mean negative log-likelihood a token, as a part of a mix."""

    name: Literal["nll"] = "nll"

    def method(self) -> Method:
        return Method(
            self.name, 1.0, chosen_nll(1.0), best_alone(), lambda rewards: None if rewards else "no candidate has a reward"
        )


PartConfig = Annotated[
    ranking.Config | lists.Config | binary.Config | pairs.Config | anchored.Config | regression.Config | NLL,
    Field(discriminator="name"),
]


class Mix(Frozen):
    """A mix: a weighted sum of other methods' losses, such as MPO's dpo, bco and nll (arXiv 2411.10442)."""

    name: Literal["mix"] = "mix"
    parts: tuple[PartConfig, ...] = Field(
        min_length=2,
        description="The methods, by name or as sections with their fields; nll is the chosen's mean NLL a token.",
    )
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="Weight of each part's loss, in their order; none: 1 each."
    )
    estimator: Estimate = None

    @field_validator("parts", mode="before")
    @classmethod
    def _named(cls, written: Any) -> Any:
        """A name alone is that method with its defaults."""
        if not isinstance(written, list | tuple):
            return written
        return tuple({"name": part} if isinstance(part, str) else part for part in written)

    @model_validator(mode="after")
    def _parts_mix(self) -> Mix:
        """Refuse, before any data is read, parts that can't be trained together."""
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.parts)} parts: give one for each, in their order")
        own = [part.name for part in self.parts if isinstance(part, WholeGroup) and part.estimator is not None]
        if own:
            raise ValueError(
                f"{', '.join(own)}: an estimator within a mix, whose candidates are drawn by what they count in the whole sum: "
                "set the mix's own estimator instead"
            )
        method = self.method()
        if self.estimator is not None:
            method.estimated(self.estimator.number, self.estimator.proposals)
        return self

    def method(self) -> Method:
        return weighted_sum(self.name, [part.method() for part in self.parts], weights=self.weights)


Config = Mix

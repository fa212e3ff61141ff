"""Every row of the laboratory fails with some wrong factor in the package's functions: none holds whatever they do.

A wrong function takes the place of the right one in all modules of the objectives and the laboratory. Each changes a factor, a
mask or a rule that some statement is about.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ncalign.lab import fixed_points
from ncalign.lab.results import Findings
from ncalign.lab.theory import EXPERIMENTS
from ncalign.objectives import estimators, inclusion, kernels, method, samplers, targets, tempering
from ncalign.objectives.binary import nca_loss, nca_pair_loss, nca_weighted_loss, normalized_weights
from ncalign.objectives.pairs import dpo_loss
from ncalign.objectives.ranking import info_nca_loss, info_nca_weighted_loss, linear_contrast_loss, rnce_loss

Function = Callable[..., Any]


def scaled(right: Function, *, output: float = 1.0, first: float = 1.0, second: float = 1.0) -> Function:
    """The function with a factor on its result or on its first two arguments."""

    def wrong(*args: Any, **settings: Any) -> Any:
        factors = (first, second, *[1.0] * len(args))
        given = [value if factor == 1.0 else factor * value for value, factor in zip(args, factors, strict=False)]
        return output * right(*given, **settings)

    return wrong


def rnce_of_one_negative(r: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """Only the first negative enters, however many there are."""
    columns = torch.arange(mask.shape[1])
    itself = columns == positive.unsqueeze(1)
    first = (mask & ~itself).int().cumsum(dim=1) == 1
    return rnce_right(r, positive, mask & (first | itself))


def rnce_with_a_copy(r: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """The positive is counted twice among the states."""
    twice = torch.cat([r, r.gather(1, positive.clamp(min=0).unsqueeze(1))], dim=1)
    return rnce_right(twice, positive, torch.cat([mask, mask.gather(1, positive.clamp(min=0).unsqueeze(1))], dim=1))


def rnce_by_column(r: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """A candidate's place in the group, padding included, changes the loss."""
    return rnce_right(r, positive, mask) + r.shape[1] * (1 + positive)


def rnce_as_linear_contrast(r: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    return contrast_right(r, positive, mask)


def contrast_as_rnce(r: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    return rnce_right(r, positive, mask)


def with_level(right: Function) -> Function:
    """The group's mean implicit reward enters."""

    def wrong(r: Tensor, other: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        level = torch.where(mask, r, 0.0).sum(dim=1) / mask.sum(dim=1)
        return right(r, other, mask, **settings) + 0.01 * level

    return wrong


def raising_the_best(r: Tensor, rewards: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    """Only the best candidate enters, and is raised without end."""
    return -r.gather(1, torch.where(mask, rewards, -torch.inf).argmax(dim=1, keepdim=True)).squeeze(1)


def dpo_without_a_weight(chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
    """Each pair has the same weight."""
    return rejected - chosen


def dpo_near_a_tie(chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
    """Pairs far from a tie have no weight."""
    return (rejected - chosen).tanh()


def dpo_and_chosen(chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
    """The chosen one's own likelihood enters, with all the weight."""
    return -10 * chosen + 0 * rejected


def nca_of_positives(r: Tensor, weights: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """The term that raises candidates counts for a twentieth more."""
    return nca_weighted_right(r, 1.05 * weights, mask, **settings)


def nca_loss_of_positives(r: Tensor, rewards: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    return nca_weighted_right(r, 1.05 * weights_right(rewards, mask, alpha=alpha), mask)


def nca_as_info_nca(r: Tensor, rewards: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    return info_nca_right(r, rewards, mask, alpha=alpha) * 2 * 0.6931471805599453 / max(1, r.shape[1] - 1)


def pair_as_dpo(chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
    return dpo_right(chosen, rejected) * 2


def even_weights(rewards: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    return weights_right(rewards, mask, alpha=1e9)


def weights_of_the_first(rewards: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    """Of tied candidates the first has more weight."""
    tilt = torch.arange(rewards.shape[1], dtype=rewards.dtype)
    return weights_right(rewards - 0.01 * tilt, mask, alpha=alpha)


def _normalized(values: Tensor) -> Tensor:
    return values / values.sum(dim=1, keepdim=True).clamp(min=1e-300)


def tempered_kernel(scores: Tensor, positive: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    return _normalized(kernels_right(scores, positive, mask, **settings).sqrt())


def blind_kernel(scores: Tensor, positive: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """Whatever the strategy is."""
    return kernels_right(scores, positive, mask, strategy="uniform", include_positive=settings.get("include_positive", False))


def kernel_of_everything(scores: Tensor, positive: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """The positive is a state where it must not be, and the strategies all draw."""
    return kernels_right(scores, positive, mask, strategy="mc", include_positive=True)


def kernel_of_negatives(scores: Tensor, positive: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    return kernels_right(scores, positive, mask, **{**settings, "include_positive": False})


def tempered_built(settings: kernels.KernelSettings) -> kernels.Kernel:
    right = build_right(settings)
    return replace(right, probabilities=lambda *given: _normalized(right.probabilities(*given).sqrt()))


def built_for_all(settings: kernels.KernelSettings) -> kernels.Kernel:
    """Whatever the group has can be drawn, and blindly."""
    return replace(
        build_right(settings),
        probabilities=lambda scores, rewards, positive, visible, mask: mask.to(scores.dtype) / mask.sum(dim=1, keepdim=True),
    )


def without_the_number(probabilities: Tensor, negatives: Tensor) -> Tensor:
    """The number of draws is left out of the correction."""
    drawn = (negatives >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    return log_weights_right(probabilities, negatives) + drawn.log()


def corrected_twice(probabilities: Tensor, negatives: Tensor) -> Tensor:
    return 2 * log_weights_right(probabilities, negatives)


def lazy_steps(scores: Tensor, **settings: Any) -> Tensor:
    """A step in ten stays where it is."""
    right = transition_right(scores, **settings)
    return 0.9 * right + 0.1 * torch.eye(len(scores), dtype=right.dtype)


def tempered_steps(scores: Tensor, **settings: Any) -> Tensor:
    return transition_right(0.9 * scores, **settings)


def perfect_steps(scores: Tensor, **settings: Any) -> Tensor:
    """Each step ends at the model whatever its start is."""
    return transition_right(scores)


def tied_are_negatives(rewards: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    others = torch.arange(rewards.shape[1]) != positive.unsqueeze(1)
    return mask & others & (rewards <= rewards.gather(1, positive.clamp(min=0).unsqueeze(1)))


def worst_as_positive(rewards: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    return rewards.argmin(dim=1)


def even_entering(c: Tensor, candidates: int) -> Tensor:
    """Each candidate enters as often as another."""
    return torch.full_like(c, candidates / c.shape[1])


def draws_of_one_start(probabilities: Tensor, start: Tensor) -> Tensor:
    return systematic_right(probabilities, torch.full_like(start, 0.5))


def too_warm(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    return 1.1 * temperature_right(scores, mask, share)


def divided_by_more(kernel: kernels.Kernel) -> samplers.LogQ:
    right = dividing_right(kernel)
    return lambda *given: 1.05 * right(*given)


def no_anchor(weight: float) -> method.Anchor:
    return lambda inputs: 0 * inputs.logprobs[:, 0]


# The right functions, whatever stands in the modules while a test runs.
kernels_right, build_right, transition_right = kernels.kernel_probabilities, kernels.build_kernel, kernels.transition_matrix
log_weights_right, weights_right, nca_weighted_right = kernels.importance_log_weights, targets.target_weights, nca_weighted_loss
systematic_right, temperature_right = inclusion.systematic_from, tempering.temperature_for_ess
dividing_right = samplers.dividing
rnce_right, contrast_right, info_nca_right, dpo_right = rnce_loss, linear_contrast_loss, info_nca_loss, dpo_loss

WRONG: dict[Function, tuple[Function, ...]] = {
    kernels.kernel_probabilities: (blind_kernel, tempered_kernel, kernel_of_everything, kernel_of_negatives),
    rnce_loss: (
        scaled(rnce_loss, first=1.01),
        scaled(rnce_loss, output=1.01),
        rnce_with_a_copy,
        rnce_of_one_negative,
        rnce_as_linear_contrast,
        rnce_by_column,
        with_level(rnce_loss),
    ),
    kernels.build_kernel: (tempered_built, built_for_all),
    kernels.importance_log_weights: (without_the_number, corrected_twice),
    kernels.transition_matrix: (lazy_steps, tempered_steps, perfect_steps),
    linear_contrast_loss: (scaled(linear_contrast_loss, output=1.01), contrast_as_rnce),
    info_nca_loss: (with_level(info_nca_loss), scaled(info_nca_loss, first=1.01), scaled(info_nca_loss, second=1.01)),
    info_nca_weighted_loss: (scaled(info_nca_weighted_loss, first=1.01), scaled(info_nca_weighted_loss, output=1.01)),
    nca_loss: (
        scaled(nca_loss, first=1.01),
        scaled(nca_loss, output=1.01),
        scaled(nca_loss, output=-1.0),
        nca_loss_of_positives,
        nca_as_info_nca,
        raising_the_best,
    ),
    nca_weighted_loss: (scaled(nca_weighted_loss, first=1.01), nca_of_positives),
    nca_pair_loss: (scaled(nca_pair_loss, first=1.01, second=1.01), scaled(nca_pair_loss, output=1.01), pair_as_dpo),
    dpo_loss: (
        scaled(dpo_loss, first=1.01),
        scaled(dpo_loss, output=1.01),
        dpo_without_a_weight,
        dpo_near_a_tie,
        dpo_and_chosen,
    ),
    targets.target_weights: (scaled(targets.target_weights, first=1.01), even_weights, weights_of_the_first),
    normalized_weights: (scaled(normalized_weights, output=1.01),),
    kernels.eligible_negatives: (tied_are_negatives,),
    kernels.pick_positive: (worst_as_positive,),
    samplers.proposal_log_ratio: (scaled(samplers.proposal_log_ratio, output=0.9),),
    method.chosen_nll: (no_anchor,),
    estimators.coefficients: (scaled(estimators.coefficients, output=1.01),),
    estimators.enter: (even_entering,),
    estimators.relative_variance: (scaled(estimators.relative_variance, output=1.01),),
    estimators.surrogate_loss: (scaled(estimators.surrogate_loss, output=1.01),),
    inclusion.systematic_from: (draws_of_one_start,),
    tempering.temperature_for_ess: (too_warm,),
    samplers.dividing: (divided_by_more,),
    samplers.by_log_ratio: (scaled(samplers.by_log_ratio, output=30.0),),
}


def places(right: Function) -> list[tuple[Any, str]]:
    """Where a function stands under its name: what looks it up there gets the one that takes its place."""
    rooms = [module for name, module in sys.modules.items() if name.startswith(("ncalign.lab", "ncalign.objectives"))]
    return [(module, name) for module in rooms for name, value in vars(module).items() if value is right]


def called(experiment: Callable[[], Findings], patch: pytest.MonkeyPatch) -> list[Function]:
    """The functions among those above that an experiment calls."""
    seen: dict[Function, None] = {}

    def watched(right: Function) -> Function:
        def watching(*args: Any, **settings: Any) -> Any:
            seen[right] = None
            return right(*args, **settings)

        return watching

    with patch.context() as watching:
        for right in WRONG:
            for module, name in places(right):
                watching.setattr(module, name, watched(right))
        experiment()
    return [right for right in WRONG if right in seen]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.__name__)
def test_each_row_fails_with_a_wrong_function(experiment: Callable[[], Findings], monkeypatch: pytest.MonkeyPatch) -> None:
    # As many steps of the gradient flow as the statements need to hold.
    monkeypatch.setattr(fixed_points, "flow", partial(fixed_points.flow, num_steps=250))
    rows = experiment().statements
    assert all(row.holds for row in rows)
    left = set(range(len(rows)))
    for right in called(experiment, monkeypatch):
        for wrong in WRONG[right]:
            if not left:
                return
            with monkeypatch.context() as patch:
                for module, name in places(right):
                    patch.setattr(module, name, wrong)
                left -= {number for number, row in enumerate(experiment().statements) if not row.holds}
    assert [rows[number].statement for number in sorted(left)] == []

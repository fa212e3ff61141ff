"""Samplers: accepted proposals leave the model invariant, by enumeration; what is tied with the positive takes no part."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from loss_inputs import inputs_of_one_token
from ncalign.objectives import RNCE, ContrastiveDivergence, LiPOLambda, Method
from ncalign.objectives.kernels import KernelSettings
from ncalign.objectives.pairs import DPO
from ncalign.objectives.ranking import MCPO
from ncalign.objectives.samplers import PAIRINGS, Sampler, all_below, mc_sampler, some_below

SIZE = 5


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step_of(sampler: Sampler, r: Tensor, scores: Tensor) -> Tensor:
    """Probability of each next state (column) from each state (row): of each proposal, and of its acceptance by the loss.

    A state is the positive, and all others are candidates below it.
    """
    matrix, mask = torch.zeros(SIZE, SIZE, dtype=torch.float64), torch.ones(1, SIZE, dtype=torch.bool)
    for state in range(SIZE):
        rewards, positive = torch.zeros(1, SIZE, dtype=torch.float64), torch.tensor([state])
        rewards[0, state] = 1
        assert sampler.kernel is not None
        proposed = sampler.kernel(scores.unsqueeze(0), positive, rewards, mask)[0]
        for other in range(SIZE):
            columns = torch.tensor([[state, other]])
            log_q = torch.zeros(1, 2) if sampler.log_q is None else sampler.log_q(scores.unsqueeze(0), rewards, mask, columns)
            # What the logistic loss multiplies the difference's gradient by.
            accepted = (r[other] - log_q[0, 1] - r[state] + log_q[0, 0]).sigmoid()
            matrix[state, other] += proposed[other] * accepted
        matrix[state, state] += 1 - matrix[state].sum()
    return matrix


@pytest.mark.parametrize(
    "settings",
    [
        KernelSettings("mc"),
        KernelSettings("mc", temperature=3.0),
        KernelSettings("mc", target_ess=0.5),
        KernelSettings("uniform"),
    ],
    ids=["mc", "flatter", "target_ess", "uniform"],
)
def test_accepted_proposals_leave_the_model_invariant_whatever_the_scores(settings: KernelSettings) -> None:
    sampler = mc_sampler(settings, acceptance=True)
    assert sampler.accepts
    r = numbers(SIZE)
    for scores in (r, 2 * numbers(SIZE, seed=1)):
        step, model = step_of(sampler, r, scores), r.softmax(dim=0)
        flow = model.unsqueeze(1) * step
        torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(model @ step, model, rtol=0, atol=1e-12)


def test_without_acceptance_the_model_is_not_invariant() -> None:
    """The enumeration can fail: proposals by the model itself without the correction are accepted too seldom or too often."""
    r = numbers(SIZE)
    step, model = step_of(mc_sampler(KernelSettings("mc")), r, r), r.softmax(dim=0)
    assert (model @ step - model).abs().max() > 0.01


# --- Ties -------------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
EVERY = torch.ones(1, 4, dtype=torch.bool)
SAMPLERS: Mapping[str, Sampler | None] = {
    **PAIRINGS,
    "some_below": some_below(3),
    "all_below": all_below(),
    **{name: mc_sampler(KernelSettings(name, num_negatives=3)) for name in ("mc", "max", "min", "uniform", "sweet_spot")},
    "cd": mc_sampler(KernelSettings("mc", 3, include_positive=True, replacement=True)),
    "chain": mc_sampler(KernelSettings("mc", 2, include_positive=True, replacement=True, chain_steps=3, num_proposals=2)),
}


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler is not None])
def test_a_candidate_tied_with_the_positive_is_never_a_negative(name: str) -> None:
    sampler, generator = SAMPLERS[name], torch.Generator().manual_seed(0)
    assert sampler is not None
    # The tied ones have the highest scores, so that a kernel would draw them.
    scores, positives = torch.tensor([[9.0, 0.0, 9.0, 1.0]], dtype=torch.float64), set()
    for _ in range(40):
        positive, *negatives = sampler.select(scores, REWARDS, EVERY, generator)[0].tolist()
        positives.add(positive)
        assert set(negatives) <= {1, 3, -1} | ({positive} if name in ("cd", "chain") else set())
    assert positives == {0, 2}, "tied best ones are the positive equally often"


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(config.method(), id=f"{config.name} {number}")
        for number, config in enumerate(
            [RNCE(), MCPO(), ContrastiveDivergence(), LiPOLambda(), DPO(pairing="all_pairs"), DPO(pairing="best_vs_each")]
        )
    ],
)
def test_two_tied_candidates_are_not_told_apart(method: Method) -> None:
    """A pair of them alone has no gradient; and in a group, only the positive of the two has one, or both have the same."""
    ratios = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    both = inputs_of_one_token(ratios, torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))
    columns = torch.arange(2).unsqueeze(0)
    if method.sampler is not None:
        read = None if method.sampler.scores is None else torch.zeros(1, 2, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        columns = method.sampler.select(read, both.rewards, both.mask, generator)
        assert columns[0, 1:].tolist() == [-1] * (columns.shape[1] - 1)
    entering = inputs_of_one_token(ratios.gather(1, columns.clamp(min=0)), both.rewards, columns >= 0)
    (gradient,) = torch.autograd.grad(method.loss(entering).sum(), ratios, allow_unused=True)
    assert gradient is None or gradient.abs().sum().item() == 0
    assert method.refuse([1.0, 1.0]) == "all rewards equal"

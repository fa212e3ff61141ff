"""The identities that the two papers rest on, in float64, values and gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ncalign.objectives import dpo_loss, info_nca_loss, nca_loss, nca_pair_loss, rnce_loss, target_weights
from ncalign.objectives.kernels import transition_matrix

TOLERANCE = 1e-10
ALPHAS = (1e-3, 0.1, 1.0, 50.0)
Loss = Callable[[Tensor], Tensor]


def numbers(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def every(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def value_and_gradient(loss: Loss, at: Tensor) -> tuple[Tensor, Tensor]:
    point = at.clone().requires_grad_()
    value = loss(point)
    (gradient,) = torch.autograd.grad(value.sum(), point)
    return value.detach(), gradient


def assert_same(left: Loss, right: Loss, at: Tensor) -> None:
    for one, other in zip(value_and_gradient(left, at), value_and_gradient(right, at), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def firsts(values: Tensor) -> Tensor:
    return torch.zeros(values.shape[0], dtype=torch.long)


def rnce(values: Tensor) -> Tensor:
    return rnce_loss(values, firsts(values), every(values))


def test_1_rnce_with_one_negative_is_dpo() -> None:
    assert_same(rnce, lambda r: dpo_loss(r[:, 0], r[:, 1]), numbers(16, 2))


def test_1_holds_for_the_parameters_of_a_tabular_policy() -> None:
    reference = numbers(6, seed=1).log_softmax(dim=0)
    beta = 0.3

    def implicit(logits: Tensor) -> Tensor:
        return beta * (logits.log_softmax(dim=0) - reference)[[2, 5]].unsqueeze(0)

    assert_same(lambda t: rnce(implicit(t)), lambda t: dpo_loss(implicit(t)[:, 0], implicit(t)[:, 1]), numbers(6, seed=2))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_2_rnce_is_info_nca_with_a_one_hot_target(size: int) -> None:
    rewards = torch.zeros(16, size, dtype=torch.float64)
    rewards[:, 0] = 1.0
    # The other weights are exp(-1000), which is 0 in float64.
    assert_same(rnce, lambda r: info_nca_loss(r, rewards, every(r), alpha=1e-3), numbers(16, size))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_3_info_nca_of_two_is_dpo_with_label_smoothing(alpha: float) -> None:
    rewards = numbers(16, 2, seed=3)

    def smoothed(r: Tensor) -> Tensor:
        smoothing = torch.sigmoid(-(rewards[:, 0] - rewards[:, 1]).abs() / alpha)
        better = (rewards[:, 1] > rewards[:, 0]).long().unsqueeze(1)
        chosen, rejected = r.gather(1, better).squeeze(1), r.gather(1, 1 - better).squeeze(1)
        return (1 - smoothing) * dpo_loss(chosen, rejected) + smoothing * dpo_loss(rejected, chosen)

    assert_same(lambda r: info_nca_loss(r, rewards, every(r), alpha=alpha), smoothed, numbers(16, 2))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_4_values_at_the_reference(size: int, alpha: float) -> None:
    r, rewards = torch.zeros(4, size, dtype=torch.float64), numbers(4, size)
    for loss, expected in (
        (rnce(r), math.log(size)),
        (info_nca_loss(r, rewards, every(r), alpha=alpha), math.log(size)),
        (nca_loss(r, rewards, every(r), alpha=alpha), 2 * math.log(2)),
        (nca_pair_loss(r[:, 0], r[:, -1]), 2 * math.log(2)),
        (dpo_loss(r[:, 0], r[:, -1]), math.log(2)),
    ):
        torch.testing.assert_close(loss, torch.full_like(loss, expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_5_gradient_coefficients(alpha: float) -> None:
    r, rewards = numbers(16, 5), numbers(16, 5, seed=1)
    weights = target_weights(rewards, every(rewards), alpha=alpha)
    _, info_nca = value_and_gradient(lambda x: info_nca_loss(x, rewards, every(x), alpha=alpha), r)
    _, nca = value_and_gradient(lambda x: nca_loss(x, rewards, every(x), alpha=alpha), r)
    torch.testing.assert_close(info_nca, r.softmax(dim=1) - weights, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(nca, (weights + 1 / 5) * torch.sigmoid(r) - weights, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
def test_5_at_the_reference_nca_has_half_the_gradient_of_info_nca(alpha: float) -> None:
    rewards = numbers(16, 5)
    zero = torch.zeros_like(rewards)
    _, info_nca = value_and_gradient(lambda x: info_nca_loss(x, rewards, every(x), alpha=alpha), zero)
    _, nca = value_and_gradient(lambda x: nca_loss(x, rewards, every(x), alpha=alpha), zero)
    assert info_nca.abs().max() > 0.01
    torch.testing.assert_close(nca, info_nca / 2, rtol=0, atol=TOLERANCE)


def test_5_nca_is_stationary_at_log_k_times_the_weight() -> None:
    rewards = numbers(16, 5, scale=1.0)
    optimum = (5 * target_weights(rewards, every(rewards), alpha=1.0)).log()
    _, gradient = value_and_gradient(lambda x: nca_loss(x, rewards, every(x), alpha=1.0), optimum)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=TOLERANCE)


def test_6_only_ranking_losses_ignore_a_shift_of_the_group() -> None:
    r, rewards, shift = numbers(8, 4), numbers(8, 4, seed=1), numbers(8, 1, seed=2)
    assert_same(rnce, lambda x: rnce(x + shift), r)
    assert_same(
        lambda x: info_nca_loss(x, rewards, every(x), alpha=0.5),
        lambda x: info_nca_loss(x + shift, rewards, every(x), alpha=0.5),
        r,
    )
    moved = nca_loss(r + shift, rewards, every(r), alpha=0.5) - nca_loss(r, rewards, every(r), alpha=0.5)
    assert (moved.abs() > 1e-3).all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_6_order_of_candidates_does_not_matter(order: tuple[int, ...]) -> None:
    places = list(order)
    r, rewards = numbers(8, 3), numbers(8, 3, seed=1)
    where_first = torch.full((8,), places.index(0))
    assert_same(rnce, lambda x: rnce_loss(x[:, places], where_first, every(x)), r)
    for loss in (info_nca_loss, nca_loss):
        assert_same(
            lambda x, f=loss: f(x, rewards, every(x), alpha=0.5),
            lambda x, f=loss: f(x[:, places], rewards[:, places], every(x), alpha=0.5),
            r,
        )


def test_7_gradient_of_the_normaliser_is_unbiased_when_the_positive_comes_from_the_model() -> None:
    r, proposal = numbers(4), numbers(4, seed=1).softmax(dim=0)
    model = (proposal * r.exp()) / (proposal * r.exp()).sum()
    _, exact = value_and_gradient(lambda x: (proposal * x.exp()).sum().log(), r)
    for num_negatives in (1, 2, 3):
        expected = torch.zeros_like(r)
        for drawn in itertools.product(range(4), repeat=num_negatives + 1):
            probability = model[drawn[0]] * proposal[list(drawn[1:])].prod()
            picked = list(drawn)
            # RNCE is -r_0 + log of the sum: adding r_0 back leaves the estimate of log Z, up to a constant.
            _, gradient = value_and_gradient(lambda x, c=picked: rnce(x[c].unsqueeze(0)) + x[c[0]], r)
            expected += probability * gradient
        torch.testing.assert_close(expected, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_proposals", [1, 2, 3, None])
def test_9_kernel_with_the_positive_is_reversible_and_keeps_the_model_invariant(num_proposals: int | None) -> None:
    scores = numbers(4, scale=1.5)
    model = scores.softmax(dim=0)
    step = transition_matrix(scores, num_proposals=num_proposals)
    flow = model.unsqueeze(1) * step
    torch.testing.assert_close(step.sum(dim=1), torch.ones_like(model), rtol=0, atol=1e-12)
    torch.testing.assert_close(model @ step, model, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_proposals", [1, 2])
def test_9_distance_to_the_model_decays_with_the_second_eigenvalue(num_proposals: int) -> None:
    scores = numbers(4, scale=1.5)
    model = scores.softmax(dim=0)
    step = transition_matrix(scores, num_proposals=num_proposals)
    # Reversibility makes the step similar to a symmetric matrix, so its eigenvalues are real.
    root = model.sqrt()
    rates, directions = torch.linalg.eigh(root.unsqueeze(1) * step / root)
    second = rates.abs().sort(descending=True).indices[1]
    rate = rates[second].abs()
    assert 0.05 < rate < 0.95
    # From any start, the chi-square distance after k steps is at most rate^k times the one before the first.
    reached = torch.eye(4, dtype=torch.float64)
    first = ((reached - model).square() / model).sum(dim=1).sqrt()
    # A start that is off along the second eigenvector keeps exactly that share at every step: the bound is met.
    slowest = model + 0.01 * directions[:, second] * root
    for steps in range(1, 9):
        reached, slowest = reached @ step, slowest @ step
        distance = ((reached - model).square() / model).sum(dim=1).sqrt()
        assert (distance <= rate**steps * first + 1e-12).all()
        torch.testing.assert_close((slowest - model).abs(), rate**steps * (0.01 * directions[:, second] * root).abs())


@pytest.mark.parametrize("alpha", [1e12, math.inf])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_11_a_high_alpha_makes_both_optima_constant(size: int, alpha: float) -> None:
    rewards = numbers(8, size)
    level = numbers(8, 1, seed=1).expand(8, size)
    _, info_nca = value_and_gradient(lambda x: info_nca_loss(x, rewards, every(x), alpha=alpha), level)
    _, nca = value_and_gradient(lambda x: nca_loss(x, rewards, every(x), alpha=alpha), torch.zeros_like(level))
    torch.testing.assert_close(info_nca, torch.zeros_like(info_nca), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(nca, torch.zeros_like(nca), rtol=0, atol=TOLERANCE)


def test_11_an_infinite_alpha_makes_the_weights_equal_over_the_mask() -> None:
    rewards = torch.tensor(
        [[0.3, -2.0, 1e300, math.nan], [5.0, math.inf, -math.inf, 0.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64
    )
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(target_weights(rewards, mask, alpha=math.inf), expected, rtol=0, atol=TOLERANCE)
    # At equal implicit rewards both losses take their values over the candidates there are: log K and 2 log 2.
    r = torch.zeros(3, 4, dtype=torch.float64)
    info_nca = torch.tensor([math.log(3), 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(info_nca_loss(r, rewards, mask, alpha=math.inf), info_nca, rtol=0, atol=TOLERANCE)
    nca = torch.tensor([2 * math.log(2), 2 * math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(nca_loss(r, rewards, mask, alpha=math.inf), nca, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_11_a_low_alpha_puts_the_best_candidate_at_log_k(size: int) -> None:
    rewards = numbers(8, size)
    best = rewards.argmax(dim=1, keepdim=True)
    weights = target_weights(rewards, every(rewards), alpha=1e-9)
    torch.testing.assert_close(weights, torch.zeros_like(rewards).scatter(1, best, 1.0), rtol=0, atol=TOLERANCE)
    # Minimum of a convex function: stationary at log K, falling below, rising above.
    at = torch.full_like(rewards, math.log(size))
    for offset, sign in ((-0.5, -1), (0.0, 0), (0.5, 1)):
        _, gradient = value_and_gradient(lambda x: nca_loss(x, rewards, every(x), alpha=1e-9), at + offset)
        slope = gradient.gather(1, best)
        assert (slope.sign() == sign).all() if sign else (slope.abs() <= TOLERANCE).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_11_the_best_candidate_of_nca_is_never_above_log_k_nor_below_zero(alpha: float) -> None:
    rewards = numbers(64, 6)
    highest = (6 * target_weights(rewards, every(rewards), alpha=alpha)).log().amax(dim=1, keepdim=True)
    best = rewards.argmax(dim=1, keepdim=True)
    optimum = torch.zeros_like(rewards).scatter(1, best, highest)
    _, gradient = value_and_gradient(lambda x: nca_loss(x, rewards, every(x), alpha=alpha), optimum)
    torch.testing.assert_close(gradient.gather(1, best), torch.zeros_like(highest), rtol=0, atol=TOLERANCE)
    for bound, sign in ((0.0, -1), (math.log(6), 1)):
        _, slope = value_and_gradient(lambda x: nca_loss(x, rewards, every(x), alpha=alpha), torch.full_like(rewards, bound))
        assert (sign * slope.gather(1, best) >= -TOLERANCE).all()


def test_11_the_pair_caps_the_chosen_one_at_log_2() -> None:
    r = torch.tensor([[math.log(2), -3.0]], dtype=torch.float64)
    _, gradient = value_and_gradient(lambda x: nca_pair_loss(x[:, 0], x[:, 1]), r)
    assert abs(gradient[0, 0].item()) <= TOLERANCE
    assert gradient[0, 1].item() == pytest.approx(0.5 / (1 + math.exp(3.0)), abs=TOLERANCE)

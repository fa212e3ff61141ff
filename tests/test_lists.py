"""Losses of lists, the linear contrast, the settings of RNCE, MC-PO and CD: values by hand, reductions, masks, draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from ncalign.objectives.lists import (
    EXO,
    HPS,
    MOST_LIPO_REWARD,
    SWEPO,
    LiPOLambda,
    exo_loss,
    hps_loss,
    lipo_lambda_loss,
    swepo_loss,
)
from ncalign.objectives.method import LossInputs, Method
from ncalign.objectives.ranking import (
    MCPO,
    RNCE,
    ContrastiveDivergence,
    InfoNCA,
    info_nca_loss,
    info_nca_weighted_loss,
    linear_contrast_loss,
    rnce_loss,
)
from ncalign.objectives.targets import target_weights

GroupLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def first(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape[0], dtype=torch.long)


# Losses of all candidates, whose order is free; and those with the positive in column 0.
FREE: dict[str, GroupLoss] = {
    "exo": partial(exo_loss, alpha=0.7),
    "lipo_lambda": lipo_lambda_loss,
    "swepo": partial(swepo_loss, alpha=0.6),
    "info_nca_weighted": lambda r, rewards, mask: info_nca_weighted_loss(r, target_weights(rewards, mask, alpha=0.7), mask),
}
POSITIVE_FIRST: dict[str, GroupLoss] = {
    "hps": partial(hps_loss, gamma=0.8),
    "linear_contrast": lambda r, rewards, mask: linear_contrast_loss(r, first(mask), mask),
}
ALL = {**FREE, **POSITIVE_FIRST}
losses = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in ALL.items()])
free_losses = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in FREE.items()])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def real(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.sum(), of, retain_graph=True)
    return found


def loss_inputs(log_ratios: Tensor, rewards: Tensor, mask: Tensor, log_q: Tensor | None = None) -> LossInputs:
    lengths = torch.ones_like(log_ratios)
    return LossInputs(log_ratios, log_ratios - 5.0, rewards, lengths, mask, log_q)


def applied(method: Method, log_ratios: Tensor, rewards: Tensor, mask: Tensor, seed: int = 0) -> Tensor:
    """What a training step does with a method."""
    if method.sampler is None:
        return method.loss(loss_inputs(log_ratios, rewards, mask))
    scores = None if method.sampler.scores is None else method.beta * log_ratios.detach()
    columns = method.sampler.select(scores, rewards, mask, torch.Generator().manual_seed(seed))
    taken = columns.clamp(min=0)
    return method.loss(loss_inputs(log_ratios.gather(1, taken), rewards.gather(1, taken), columns >= 0))


def test_values_derived_by_hand() -> None:
    a, b, c = 0.3, -1.2, 0.8
    r, rewards, mask = row(a, b, c), row(2.0, 1.0, 0.0), real(1, 3)
    total = math.exp(a) + math.exp(b) + math.exp(c)
    p = [math.exp(x) / total for x in (a, b, c)]
    # With alpha = 1 / log 2 the weights are 4 : 2 : 1.
    w = [4 / 7, 2 / 7, 1 / 7]
    # Gains 3, 1, 0; ranks by current score 2, 3, 1.
    d = [1 / math.log(3), 1 / math.log(4), 1 / math.log(2)]

    def pair(weight: float, winner: float, loser: float) -> float:
        return weight * math.log(1 + math.exp(loser - winner))

    e = math.e
    expected = {
        "exo": (
            exo_loss(r, rewards, mask, alpha=1 / math.log(2)),
            sum(pi * math.log(pi / wi) for pi, wi in zip(p, w, strict=True)),
        ),
        "lipo": (
            lipo_lambda_loss(r, rewards, mask),
            pair(2 * abs(d[0] - d[1]), a, b) + pair(3 * abs(d[0] - d[2]), a, c) + pair(1 * abs(d[1] - d[2]), b, c),
        ),
        # q = softmax of gamma * R = log 3 * (1, 0), that is 3/4 and 1/4.
        "hps": (
            hps_loss(r, rewards, mask, gamma=math.log(3)),
            -a + math.log(math.exp(a) + 2 * (0.75 * math.exp(b) + 0.25 * math.exp(c))),
        ),
        # The mean is 1: the first deviates by 1 and is positive, the second by 0, the third by -1.
        "swepo": (
            swepo_loss(r, rewards, mask, alpha=1.0),
            -math.log(e * math.exp(a) / (e * math.exp(a) + math.exp(b) + e * math.exp(c))),
        ),
        "linear": (linear_contrast_loss(r, torch.tensor([2]), mask), (a + b) / 2 - c),
        "weighted": (
            info_nca_weighted_loss(r, row(0.5, 0.2, 0.3), mask),
            math.log(total) - 0.5 * a - 0.2 * b - 0.3 * c,
        ),
    }
    for name, (found, value) in expected.items():
        assert found.item() == pytest.approx(value, abs=1e-12), name


@losses
def test_gradient(loss: GroupLoss) -> None:
    r, rewards = numbers(3, 4).requires_grad_(), numbers(3, 4, seed=1)
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    assert torch.autograd.gradcheck(lambda x: loss(x, rewards, mask), (r,), atol=1e-8)


@losses
def test_a_constant_added_to_a_group_changes_nothing(loss: GroupLoss) -> None:
    r, rewards = numbers(5, 4), numbers(5, 4, seed=1)
    close(loss(r + numbers(5, 1, seed=2), rewards, real(5, 4)), loss(r, rewards, real(5, 4)))


@free_losses
def test_a_permutation_of_the_candidates_changes_nothing(loss: GroupLoss) -> None:
    r, rewards = numbers(6, 5), numbers(6, 5, seed=1).round(decimals=0)
    # Ties of scores and of rewards too, as at the start of training.
    r[:2] = 0.0
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    order = torch.tensor([3, 0, 4, 2, 1])
    close(loss(r[:, order], rewards[:, order], mask[:, order]), loss(r, rewards, mask))


@pytest.mark.parametrize("loss", POSITIVE_FIRST.values(), ids=POSITIVE_FIRST)
def test_a_permutation_of_the_negatives_changes_nothing(loss: GroupLoss) -> None:
    r, rewards, order = numbers(6, 5), numbers(6, 5, seed=1), torch.tensor([0, 3, 4, 2, 1])
    close(loss(r[:, order], rewards[:, order], real(6, 5)), loss(r, rewards, real(6, 5)))


@losses
@pytest.mark.parametrize("junk", [0.0, 1e4, math.nan, math.inf, -math.inf])
def test_padding_reaches_neither_value_nor_gradient(loss: GroupLoss, junk: float) -> None:
    rewards = numbers(4, 3, seed=1)
    padding = torch.full((4, 2), junk, dtype=torch.float64)
    plain = numbers(4, 3).requires_grad_()
    padded = torch.cat([plain.detach(), padding], dim=1).requires_grad_()
    mask = torch.cat([real(4, 3), ~real(4, 2)], dim=1)
    value, padded_value = loss(plain, rewards, real(4, 3)), loss(padded, torch.cat([rewards, padding], dim=1), mask)
    close(padded_value, value)
    found = gradient(value, plain)
    assert found.abs().max() > 1e-3
    close(gradient(padded_value, padded), torch.cat([found, torch.zeros_like(padding)], dim=1))


@losses
@pytest.mark.parametrize("junk", [0.0, math.nan, math.inf])
def test_a_group_without_candidates_or_with_one_gives_zero(loss: GroupLoss, junk: float) -> None:
    r = torch.full((2, 3), junk)
    r[1, 0] = 0.7
    r.requires_grad_()
    rewards = torch.full((2, 3), junk)
    rewards[1, 0] = 0.5
    mask = torch.tensor([[False] * 3, [True, False, False]])
    value = loss(r, rewards, mask)
    assert value.tolist() == [0.0, 0.0]
    assert gradient(value, r).tolist() == [[0.0] * 3] * 2
    alone = torch.tensor([[3.0]], requires_grad=True)
    assert loss(alone, torch.tensor([[0.5]]), real(1, 1)).tolist() == [0.0]


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_implicit_rewards_stay_finite(loss: GroupLoss, dtype: torch.dtype, size: float) -> None:
    r = torch.tensor([[size, -size, 0.0], [-size, size, size], [size, size, size]], dtype=dtype, requires_grad=True)
    value = loss(r, torch.tensor([[3.0, 2.0, 1.0]], dtype=dtype).expand(3, 3), real(3, 3))
    assert value.isfinite().all()
    assert gradient(value, r).isfinite().all()


@pytest.mark.parametrize("name", ["exo", "swepo", "hps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_rewards_stay_finite(name: str, dtype: torch.dtype) -> None:
    r = torch.tensor([[0.3, -0.2, 0.1]], dtype=dtype, requires_grad=True)
    value = ALL[name](r, torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype), real(1, 3))
    assert value.isfinite().all()
    assert gradient(value, r).isfinite().all()
    assert exo_loss(r, torch.tensor([[1e4, -1e4, 0.0]]), real(1, 3), alpha=1e-30).isfinite().all()


def test_extreme_values_by_hand() -> None:
    r, rewards, mask = row(-1e4, 1e4), row(1.0, 0.0), real(1, 2)
    # One probability is 1: log 1 - log w of the worse candidate, w = 1 / (1 + e).
    assert exo_loss(r, rewards, mask, alpha=1.0).item() == pytest.approx(math.log(1 + math.e), abs=1e-12)
    assert hps_loss(r, rewards, mask, gamma=1.0).item() == 2e4
    assert swepo_loss(r, rewards, mask, alpha=0.0).item() == 2e4
    assert linear_contrast_loss(r, torch.tensor([0]), mask).item() == 2e4
    weight = 1 / math.log(2) - 1 / math.log(3)
    assert lipo_lambda_loss(r, rewards, mask).item() == pytest.approx(2e4 * weight, rel=1e-12)


@losses
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_in_float32_at_least(loss: GroupLoss, given: torch.dtype) -> None:
    r, rewards = numbers(4, 3, dtype=given), numbers(4, 3, seed=1)
    value = loss(r, rewards, real(4, 3))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(r.double(), rewards, real(4, 3)).float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_alpha_of_exo_must_be_above_zero(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is .* number above 0"):
        exo_loss(torch.zeros(1, 2), torch.zeros(1, 2), real(1, 2), alpha=alpha)


# --- Reductions -------------------------------------------------------------------------------------------------------


def test_exo_of_two_is_its_pair_form() -> None:
    """With the target (1 - e, e): sigma(m) (log sigma(m) - log(1 - e)) + sigma(-m) (log sigma(-m) - log e)."""
    r, smoothing = numbers(8, 2), 0.001
    margin = r[:, 0] - r[:, 1]
    expected = margin.sigmoid() * (F.logsigmoid(margin) - math.log(1 - smoothing))
    expected = expected + (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(smoothing))
    gap = math.log((1 - smoothing) / smoothing)
    close(exo_loss(r, row(gap, 0.0).expand(8, 2), real(8, 2), alpha=1.0), expected)


def test_exo_is_zero_and_flat_exactly_at_its_optimum() -> None:
    rewards = numbers(3, 4)
    r = (rewards / 0.7 + numbers(3, 1, seed=1)).requires_grad_()
    value = exo_loss(r, rewards, real(3, 4), alpha=0.7)
    close(value, torch.zeros(3, dtype=torch.float64))
    close(gradient(value, r), torch.zeros(3, 4, dtype=torch.float64))
    assert (exo_loss(numbers(3, 4, seed=2), rewards, real(3, 4), alpha=0.7) > 1e-3).all()


def test_hps_without_hardness_is_rnce() -> None:
    r, rewards = numbers(8, 5).requires_grad_(), numbers(8, 5, seed=1)
    mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    found, expected = hps_loss(r, rewards, mask, gamma=0.0), rnce_loss(r, first(mask), mask)
    close(found, expected)
    close(gradient(found, r), gradient(expected, r))


def test_hps_that_is_very_hard_sees_the_best_negative_alone() -> None:
    r, rewards = row(0.4, -0.3, 1.2), row(9.0, 2.0, 1.0)
    expected = -0.4 + math.log(math.exp(0.4) + 2 * math.exp(-0.3))
    assert hps_loss(r, rewards, real(1, 3), gamma=1e4).item() == pytest.approx(expected, abs=1e-12)


def test_swepo_of_two_is_dpo_for_every_alpha() -> None:
    """Two candidates deviate alike from their mean, so that alpha cancels."""
    r = numbers(8, 2)
    for alpha in (0.0, 1.3):
        close(swepo_loss(r, row(1.0, 0.0).expand(8, 2), real(8, 2), alpha=alpha), -F.logsigmoid(r[:, 0] - r[:, 1]))


def test_swepo_of_equal_rewards_is_zero_though_their_mean_rounds() -> None:
    r = numbers(1, 3).requires_grad_()
    value = swepo_loss(r, row(0.1, 0.1, 0.1), real(1, 3), alpha=1.0)
    assert value.item() == 0.0
    assert gradient(value, r).abs().sum() == 0.0


def test_swepo_with_one_candidate_above_the_mean_is_rnce() -> None:
    r, rewards = numbers(8, 4), row(1.0, 0.0, 0.0, 0.0).expand(8, 4)
    close(swepo_loss(r, rewards, real(8, 4), alpha=0.0), rnce_loss(r, torch.zeros(8, dtype=torch.long), real(8, 4)))


def test_lipo_of_two_is_weighted_dpo() -> None:
    r, rewards = numbers(8, 2), row(2.0, 1.0).expand(8, 2)
    weight = (2**2 - 2**1) * (1 / math.log(2) - 1 / math.log(3))
    close(lipo_lambda_loss(r, rewards, real(8, 2)), -weight * F.logsigmoid(r[:, 0] - r[:, 1]))


def test_lipo_at_equal_scores_ranks_by_reward() -> None:
    r = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    value = lipo_lambda_loss(r, row(0.0, 2.0, 1.0), real(1, 3))
    best, middle, last = 1 / math.log(2), 1 / math.log(3), 1 / math.log(4)
    weights = (2 * (best - middle), 3 * (best - last), 1 * (middle - last))
    assert value.item() == pytest.approx(math.log(2) * sum(weights), abs=1e-12)
    # Each pair pulls with half its weight.
    slopes = row(weights[1] + weights[2], -weights[0] - weights[1], weights[0] - weights[2]) / 2
    close(gradient(value, r), slopes)


def test_the_weighted_core_with_softmax_weights_is_info_nca() -> None:
    r, rewards, mask = numbers(6, 4), numbers(6, 4, seed=1), numbers(6, 4, seed=2) > -0.5
    weights = torch.where(mask, target_weights(rewards, mask, alpha=0.3), torch.nan)
    close(info_nca_weighted_loss(r, weights, mask), info_nca_loss(r, rewards, mask, alpha=0.3))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_linear_contrast_has_the_gradient_of_rnce_in_expectation(size: int) -> None:
    """Enumerated: sum over z of softmax(r)_z times the gradient for the draw z, y_0 among the draws."""
    log_ratios = numbers(1, size).requires_grad_()
    probabilities = log_ratios.detach().softmax(dim=1)
    zero, both = torch.tensor([0]), real(1, 2)
    expected = torch.zeros(1, size, dtype=torch.float64)
    for drawn in range(size):
        pair = log_ratios.gather(1, torch.tensor([[0, drawn]]))
        slope = gradient(linear_contrast_loss(pair, zero, both), log_ratios)
        if drawn == 0:
            assert slope.abs().sum() == 0.0
        expected = expected + probabilities[0, drawn] * slope
    close(expected, gradient(rnce_loss(log_ratios, zero, real(1, size)), log_ratios))


def test_linear_contrast_of_an_absent_or_masked_positive_is_zero() -> None:
    r, mask = row(0.7, -0.4).expand(2, 2), torch.tensor([[True, True], [False, True]])
    assert linear_contrast_loss(r, torch.tensor([-1, 0]), mask).tolist() == [0.0, 0.0]


# --- Methods ----------------------------------------------------------------------------------------------------------

CONFIGS = [EXO(), LiPOLambda(), HPS(), SWEPO(), RNCE(), RNCE(num_negatives=2), InfoNCA(), MCPO(), ContrastiveDivergence()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_method_multiplies_by_its_beta_and_ignores_missing_candidates(config: EXO) -> None:
    rewards = row(0.1, math.nan, 0.9, 0.3).expand(4, 4)
    log_ratios = numbers(4, 4)
    log_ratios[:, 1] = math.nan
    log_ratios.requires_grad_()
    mask = ~rewards.isnan()
    value = applied(config.method(), log_ratios, rewards, mask)
    doubled = config.model_copy(update={"beta": 2 * config.beta}).method()
    close(applied(doubled, log_ratios, rewards, mask), applied(config.method(), 2 * log_ratios, rewards, mask))
    found = gradient(value, log_ratios)
    assert value.isfinite().all()
    assert found.isfinite().all()
    assert found[:, 1].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("method", "pure"),
    [
        (EXO(beta=0.5, alpha=0.3).method(), partial(exo_loss, alpha=0.3)),
        (LiPOLambda(beta=0.5).method(), lipo_lambda_loss),
        (SWEPO(beta=0.5, alpha=0.3).method(), partial(swepo_loss, alpha=0.3)),
        (InfoNCA(beta=0.5, alpha=0.3).method(), partial(info_nca_loss, alpha=0.3)),
        # Sorted best first: what HPS's sampler makes of the group.
        (HPS(beta=0.5, gamma=0.3).method(), partial(hps_loss, gamma=0.3)),
    ],
    ids=lambda part: getattr(part, "name", None),
)
def test_every_field_of_a_list_method_reaches_its_loss(method: Method, pure: GroupLoss) -> None:
    log_ratios, rewards = numbers(6, 4), numbers(6, 4, seed=1).sort(dim=1, descending=True).values
    close(applied(method, log_ratios, rewards, real(6, 4)), pure(0.5 * log_ratios, rewards, real(6, 4)))


def test_exo_and_info_nca_show_their_target() -> None:
    rewards, mask = row(0.3, 0.1), real(1, 2)
    for config in (EXO(alpha=0.2), InfoNCA(alpha=0.2)):
        weights = config.method().hooks.target_weights
        assert weights is not None
        close(weights(rewards, mask), target_weights(rewards, mask, alpha=0.2))


def test_info_nca_finds_the_alpha_of_its_target_entropy() -> None:
    """Weights 3/4 and 1/4 have that entropy, so the gap log 3 in the rewards is 1 times alpha, and 2 log 3 is 2 times it."""
    share = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    method = InfoNCA(target_entropy=share).method()
    assert method.hooks.fit is not None
    rewards = row(2 * math.log(3), 0.0)
    fitted = method.hooks.fit(rewards, real(1, 2))
    found = applied(fitted, torch.zeros(1, 2, dtype=torch.float64), rewards, real(1, 2))
    assert found.item() == pytest.approx(math.log(2), abs=1e-12)
    assert fitted.hooks.target_weights is not None
    torch.testing.assert_close(fitted.hooks.target_weights(rewards, real(1, 2)), row(0.75, 0.25), rtol=0, atol=1e-6)
    assert InfoNCA().method().hooks.fit is None


def test_what_is_refused() -> None:
    equal, single, good = [0.5, 0.5], [0.5], [0.5, 0.1]
    for config in (LiPOLambda(), HPS(), SWEPO(), RNCE(), MCPO(), ContrastiveDivergence()):
        assert config.method().refuse(equal) == "all rewards equal"
        assert config.method().refuse(good) is None
    for soft in (EXO(), InfoNCA()):
        assert soft.method().refuse(equal) is None
        assert soft.method().refuse(single) == "only one candidate"
    too_large = LiPOLambda().method().refuse([MOST_LIPO_REWARD + 1.0, 0.0])
    assert too_large is not None
    assert "61" in too_large
    assert "60" in too_large


def test_rnce_refuses_groups_with_fewer_negatives_than_asked_naming_both_numbers() -> None:
    refuse = RNCE(num_negatives=3).method().refuse
    assert refuse([0.9, 0.9, 0.1, 0.2]) == "2 candidates below the best, and num_negatives is 3"
    assert refuse([0.9, 0.3, 0.1, 0.2]) is None
    assert refuse([0.9, 0.9, 0.9]) == "all rewards equal"


def test_rnce_draws_its_negatives_uniformly_without_replacement() -> None:
    rewards = row(0.3, 0.9, 0.1, 0.2).expand(3000, 4)
    sampler = RNCE(num_negatives=2).method().sampler
    assert sampler is not None
    assert sampler.scores is None
    columns = sampler.select(None, rewards, real(3000, 4), torch.Generator().manual_seed(0))
    assert columns.shape == (3000, 3)
    assert (columns[:, 0] == 1).all()
    assert (columns[:, 1] != columns[:, 2]).all()
    for column in (0, 2, 3):
        # Each is among the two of three with probability 2/3; four standard errors are .035.
        assert (columns[:, 1:] == column).any(dim=1).double().mean().item() == pytest.approx(2 / 3, abs=0.035)


def test_rnce_with_all_its_negatives_asked_for_is_rnce() -> None:
    log_ratios, rewards = numbers(8, 4), numbers(8, 4, seed=1)
    close(
        applied(RNCE(num_negatives=3).method(), log_ratios, rewards, real(8, 4)),
        applied(RNCE().method(), log_ratios, rewards, real(8, 4)),
    )


def test_cd_averages_to_the_gradient_of_rnce() -> None:
    """Many draws of one group: their mean gradient is softmax minus one-hot, within four standard errors."""
    num = 20_000
    scores, rewards = row(0.3, -0.4, 0.9), row(1.0, 0.2, 0.1).expand(num, 3)
    log_ratios = scores.expand(num, 3).clone().requires_grad_()
    config = ContrastiveDivergence(beta=1.0)
    found = gradient(applied(config.method(), log_ratios, rewards, real(num, 3)), log_ratios)
    expected = scores.softmax(dim=1) - row(1.0, 0.0, 0.0)
    assert (found.mean(dim=0) - expected[0]).abs().max() < 4 * 0.5 / math.sqrt(num)
    sampler = config.method().sampler
    assert sampler is not None
    assert sampler.kernel is not None
    probabilities = sampler.kernel(scores, torch.tensor([0]), rewards[:1], real(1, 3))
    torch.testing.assert_close(probabilities, scores.softmax(dim=1), rtol=0, atol=1e-12)


def test_cd_reads_its_number_of_draws_and_its_chain() -> None:
    rewards, mask = row(1.0, 0.2, 0.1, 0.0).expand(4000, 4), real(4000, 4)
    scores = row(0.0, 0.0, 0.0, 0.0).expand(4000, 4)

    def share_of_positive(config: ContrastiveDivergence) -> tuple[int, float]:
        sampler = config.method().sampler
        assert sampler is not None
        drawn = sampler.select(scores, rewards, mask, torch.Generator().manual_seed(0))[:, 1:]
        return drawn.shape[1], (drawn == 0).double().mean().item()

    # One proposal, equal scores: a step stays with probability 1/2. So 1/2, then 1/2 1/2 + 1/2 1/6 = 1/3, and 1/4 with all.
    # Four standard errors of 4000 draws are at most .032.
    assert share_of_positive(ContrastiveDivergence(num_proposals=1)) == (1, pytest.approx(1 / 2, abs=0.032))
    assert share_of_positive(ContrastiveDivergence(num_proposals=1, chain_steps=2)) == (1, pytest.approx(1 / 3, abs=0.032))
    assert share_of_positive(ContrastiveDivergence(num_negatives=5)) == (5, pytest.approx(1 / 4, abs=0.032))


def test_mc_po_weighs_by_what_kernel_score_names() -> None:
    logprobs, reference = row(-3.0, -4.0), row(-1.0, -9.0)
    for config, expected in ((MCPO(), logprobs - reference), (MCPO(kernel_score="policy_logprob"), logprobs)):
        sampler = config.method().sampler
        assert sampler is not None
        assert sampler.scores is not None
        close(sampler.scores(logprobs, reference), expected)


def test_mc_po_refuses_a_correction_whose_probability_is_not_known() -> None:
    sampler = MCPO(log_q_correction=True).method().sampler
    assert sampler is not None
    assert sampler.log_q is not None
    for settings in ({"strategy": "max"}, {"include_positive": True}, {"num_proposals": 2}):
        with pytest.raises(ValidationError, match="log_q_correction needs"):
            MCPO.model_validate({"log_q_correction": True, **settings})


def test_mc_po_takes_the_correction_off_the_negatives() -> None:
    method = MCPO(beta=1.0, log_q_correction=True).method()
    log_q = row(0.0, math.log(0.25))
    found = method.loss(loss_inputs(row(0.0, 0.5), row(1.0, 0.0), real(1, 2), log_q))
    assert found.item() == pytest.approx(math.log(1 + 4 * math.exp(0.5)), abs=1e-12)

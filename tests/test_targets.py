"""Target weights and what is done to rewards before: values derived by hand, invariances, masks, and alpha from an entropy."""

from __future__ import annotations

import math
import re

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ncalign.objectives.targets import (
    TargetConfig,
    alpha_for_entropy,
    dense_ranks,
    fitted_alpha,
    one_hot_weights,
    ranks,
    sharpness,
    target_weights,
    warn_if_degenerate,
    z_scores,
)

MAPS = {
    "one_hot": one_hot_weights,
    "rank": ranks,
    "dense_rank": dense_ranks,
    "z_score": z_scores,
    "softmax": lambda rewards, mask: target_weights(rewards, mask, alpha=0.7),
}
maps = pytest.mark.parametrize("of", [pytest.param(function, id=name) for name, function in MAPS.items()])


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def real(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_values_derived_by_hand() -> None:
    rewards, mask = row(5.0, -1.0, 5.0, 2.0), real(1, 4)
    assert one_hot_weights(rewards, mask).tolist() == [[1 / 2, 0, 1 / 2, 0]]
    # Levels -1, 2, 5: two steps.
    assert dense_ranks(rewards, mask).tolist() == [[1, 0, 1, 1 / 2]]
    # Of three others, 5 beats two and ties with one, 2 beats one.
    assert ranks(rewards, mask).tolist() == [[2.5 / 3, 0, 2.5 / 3, 1 / 3]]
    # Mean 11/4; deviations 9/4, -15/4, 9/4, -3/4; mean square (81 + 225 + 81 + 9) / 64 = 396/64.
    deviation = math.sqrt(396) / 8
    expected = row(9 / 4, -15 / 4, 9 / 4, -3 / 4) / deviation
    torch.testing.assert_close(z_scores(rewards, mask), expected, rtol=0, atol=1e-14)


@maps
def test_missing_candidates_change_nothing_and_get_zero(of) -> None:
    rewards = (numbers(16, 4) * 2).round()
    padding = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64).expand(16, 3)
    padded = torch.cat([padding, rewards], dim=1)
    mask = torch.cat([torch.zeros(16, 3, dtype=torch.bool), real(16, 4)], dim=1)
    found = of(padded, mask)
    torch.testing.assert_close(found[:, 3:], of(rewards, real(16, 4)), rtol=0, atol=1e-14)
    assert found[:, :3].abs().max() == 0
    assert of(padded, torch.zeros_like(mask)).abs().max() == 0


@maps
def test_order_of_the_candidates_does_not_matter(of) -> None:
    rewards, order = (numbers(16, 5) * 2).round(), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(of(rewards[:, order], real(16, 5)), of(rewards, real(16, 5))[:, order], rtol=0, atol=1e-14)


@maps
@pytest.mark.parametrize(("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision(of, given: torch.dtype, computed: torch.dtype) -> None:
    assert of(numbers(3, 4).to(given), real(3, 4)).dtype == computed


@pytest.mark.parametrize("name", ["one_hot", "rank", "dense_rank"])
def test_only_the_order_matters(name: str) -> None:
    rewards = (numbers(32, 6) * 2).round()
    torch.testing.assert_close(MAPS[name](rewards.exp(), real(32, 6)), MAPS[name](rewards, real(32, 6)), rtol=0, atol=0)


def test_z_scores_forget_shift_and_scale_and_have_unit_variance() -> None:
    rewards = numbers(32, 6)
    found = z_scores(rewards, real(32, 6))
    torch.testing.assert_close(z_scores(100 * rewards - 7, real(32, 6)), found, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(32, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.square().mean(dim=1), torch.ones(32, dtype=torch.float64), rtol=0, atol=1e-13)


def test_constant_and_single_groups() -> None:
    for rewards in (torch.full((1, 3), 0.1), torch.tensor([[0.1]])):
        mask = torch.ones_like(rewards, dtype=torch.bool)
        assert z_scores(rewards, mask).abs().max() == 0
        assert dense_ranks(rewards, mask).abs().max() == 0
        assert (ranks(rewards, mask) == (0.5 if rewards.shape[1] > 1 else 1.0)).all()
        torch.testing.assert_close(one_hot_weights(rewards, mask), torch.ones_like(rewards) / rewards.shape[1])


@pytest.mark.parametrize("values", [(1e308, -1e308), (5e-324, 0.0), (1e15, 1e15 + 2), (-1e300, -2e300)])
def test_z_scores_of_extreme_rewards(values: tuple[float, float]) -> None:
    sign = 1.0 if values[0] > values[1] else -1.0
    torch.testing.assert_close(z_scores(row(*values), real(1, 2)), row(sign, -sign), rtol=0, atol=1e-12)
    three = row(1e308, 1e308, -1e308)  # mean 1/3 of 1e308, deviations 2/3, 2/3 and -4/3, their mean square 8/9
    torch.testing.assert_close(z_scores(three, real(1, 3)), row(2, 2, -4) / math.sqrt(8), rtol=0, atol=1e-12)


def test_large_rewards_stay_finite() -> None:
    rewards = torch.tensor([[1e30, -1e30, 0.0]])
    deviation = math.sqrt(2 / 3)
    torch.testing.assert_close(z_scores(rewards, real(1, 3)), torch.tensor([[1 / deviation, -1 / deviation, 0.0]]))
    assert dense_ranks(rewards, real(1, 3)).tolist() == [[1.0, 0.0, 0.5]]
    assert math.isfinite(alpha_for_entropy(rewards, real(1, 3), entropy=0.3))


def test_one_hot_is_the_limit_of_a_small_alpha() -> None:
    rewards = (numbers(32, 5) * 2).round()
    torch.testing.assert_close(target_weights(rewards, real(32, 5), alpha=1e-4), one_hot_weights(rewards, real(32, 5)))


def test_sharpness_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, False, False]])
    # The last has one candidate and no say.
    assert sharpness(weights, mask) == pytest.approx((0 + math.log(2) / math.log(3) + 1) / 3, abs=1e-7)
    assert math.isnan(sharpness(weights[3:], mask[3:]))


def entropy_of(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.mark.parametrize("p", [0.501, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("gap", [1e-6, 3.0, 1e6])
def test_alpha_of_a_pair_is_its_logit(p: float, gap: float) -> None:
    """Two candidates: softmax(R / alpha) = (p, 1 - p) exactly where gap / alpha = log(p / (1 - p))."""
    found = alpha_for_entropy(row(gap, 0.0), real(1, 2), entropy=entropy_of(p) / math.log(2))
    assert found == pytest.approx(gap / math.log(p / (1 - p)), rel=1e-6)


@pytest.mark.parametrize("entropy", [0.05, 0.5, 0.95, 0.999])
def test_alpha_brings_the_mean_entropy_to_what_was_asked(entropy: float) -> None:
    rewards, mask = numbers(64, 5), torch.rand(64, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, :2] = True
    # Groups without a spread would pull the mean up and must not count.
    rewards[:8] = 3.0
    found = alpha_for_entropy(torch.where(mask, rewards, math.nan), mask, entropy=entropy)
    assert sharpness(target_weights(rewards[8:], mask[8:], alpha=found), mask[8:]) == pytest.approx(entropy, abs=1e-9)
    assert alpha_for_entropy(10 * rewards, mask, entropy=entropy) == pytest.approx(10 * found, rel=1e-8)


@pytest.mark.parametrize("entropy", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_an_entropy_outside_its_range_is_refused(entropy: float) -> None:
    with pytest.raises(ValueError, match="between 0"):
        alpha_for_entropy(row(1.0, 0.0), real(1, 2), entropy=entropy)


def test_alpha_needs_a_spread_of_rewards() -> None:
    with pytest.raises(ValueError, match="no group has rewards that differ"):
        alpha_for_entropy(row(1.0, 1.0, 9.0), torch.tensor([[True, True, False]]), entropy=0.5)


def test_ties_can_put_an_entropy_out_of_reach() -> None:
    # Two of three share the top: at least log 2 / log 3 = 0.63 is left.
    with pytest.raises(ValueError, match=r"ties among the best .* leave 0\.6309"):
        alpha_for_entropy(row(1.0, 1.0, 0.0), real(1, 3), entropy=0.6)
    assert alpha_for_entropy(row(1.0, 1.0, 0.0), real(1, 3), entropy=0.7) > 0


def test_the_warning_names_the_factor_that_mends_it() -> None:
    rewards, mask = numbers(64, 4), real(64, 4)
    right = alpha_for_entropy(rewards, mask, entropy=0.5)
    assert warn_if_degenerate(target_weights(rewards, mask, alpha=right), mask) is None
    uniform = warn_if_degenerate(target_weights(rewards, mask, alpha=100 * right), mask)
    assert uniform is not None
    assert "uniform in effect" in uniform
    assert "smaller alpha (about 0.01 times the present one)" in uniform
    sharp = warn_if_degenerate(target_weights(rewards, mask, alpha=right / 100), mask)
    assert sharp is not None
    assert "one-hot in effect" in sharp
    # Groups in which a weight has fallen to 0 no longer tell, so that the factor is that of the others.
    factor = re.search(r"larger alpha \(about (\S+) times the present one\)", sharp)
    assert factor is not None
    assert float(factor[1]) == pytest.approx(100, rel=0.1)
    assert "target_entropy: 0.5" in sharp
    hard = warn_if_degenerate(one_hot_weights(rewards, mask), mask)
    assert hard is not None
    assert "larger alpha, or" in hard


def test_a_configuration_makes_the_weights_it_names() -> None:
    rewards, mask = numbers(8, 4), real(8, 4)
    expected = {
        "none": target_weights(rewards, mask, alpha=0.5),
        "dense_rank": target_weights(dense_ranks(rewards, mask), mask, alpha=0.5),
        "rank": target_weights(ranks(rewards, mask), mask, alpha=0.5),
        "quantile": target_weights(ranks(rewards, mask), mask, alpha=0.5),
        "z_score": target_weights(z_scores(rewards, mask), mask, alpha=0.5),
        "one_hot": one_hot_weights(rewards, mask),
    }
    for transform, weights in expected.items():
        found = TargetConfig.model_validate({"alpha": 0.5, "transform": transform}).weights()(rewards, mask)
        torch.testing.assert_close(found, weights, rtol=0, atol=0)


@pytest.mark.parametrize("transform", ["none", "rank", "quantile", "dense_rank", "z_score"])
def test_target_entropy_is_fitted_to_the_transformed_rewards(transform: str) -> None:
    rewards, mask = 5 * numbers(32, 4), real(32, 4)
    config = TargetConfig.model_validate({"target_entropy": 0.4, "transform": transform})
    with pytest.raises(ValueError, match="call the method's fit"):
        config.weights()(rewards, mask)
    fitted = config.fitted(rewards, mask)
    assert fitted.alpha == fitted_alpha(config, rewards, mask)
    assert fitted.transform == transform
    assert sharpness(fitted.weights()(rewards, mask), mask) == pytest.approx(0.4, abs=1e-9)
    assert fitted.fitted(10 * rewards, mask) == fitted


def test_settings_that_contradict_one_another_are_refused() -> None:
    with pytest.raises(ValidationError, match="leave out one of the two"):
        TargetConfig(target_entropy=0.5, transform="one_hot")
    for bad in ({"alpha": 0.0}, {"target_entropy": 0.0}, {"target_entropy": 1.0}, {"transform": "softmax"}):
        with pytest.raises(ValidationError):
            TargetConfig.model_validate(bad)

"""NCA in its forms, KTO and BCO: values derived by hand, exact optima by enumeration, reductions, TRL's own code, refusals."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import trl_losses
from loss_inputs import inputs_of_one_token
from ncalign.objectives.binary import (
    BCO,
    KTO,
    NCA,
    BiasedNCA,
    NCAPair,
    bco_loss,
    biased_nca_loss,
    kto_loss,
    log_normalizer,
    nca_loss,
    nca_pair_loss,
    nca_weighted_loss,
    normalized_weights,
)
from ncalign.objectives.config import Pairing
from ncalign.objectives.method import Method, mean_over_negatives
from ncalign.objectives.mix import weighted_sum
from ncalign.objectives.pairs import DPO
from ncalign.objectives.targets import sharpness, target_weights, z_scores
from trl_losses import assert_trls, dpo_trainer, random_groups

LABELLED = {
    "kto": partial(kto_loss, baseline=0.3, desirable_weight=1.5, undesirable_weight=0.75),
    "bco": partial(bco_loss, shift=0.3),
}
labelled = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in LABELLED.items()])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def real(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gradient_of(value: Tensor, of: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value.sum(), of)
    return gradient


# --- Values -----------------------------------------------------------------------------------------------------------


def test_values_derived_by_hand() -> None:
    a, b, c, z = 0.3, -1.2, 0.8, 0.25
    r, labels, mask = row(a, b, c), torch.tensor([[True, False, False]]), real(1, 3)
    found = kto_loss(r, labels, mask, baseline=z, desirable_weight=2.0, undesirable_weight=0.5)
    expected = (2 * (1 - sigmoid(a - z)) + 0.5 * (1 - sigmoid(z - b)) + 0.5 * (1 - sigmoid(z - c))) / 3
    assert found.item() == pytest.approx(expected, abs=1e-12)
    found = bco_loss(r, labels, mask, shift=z)
    expected = -math.log(sigmoid(a - z)) - (math.log(sigmoid(z - b)) + math.log(sigmoid(z - c))) / 2
    assert found.item() == pytest.approx(expected, abs=1e-12)
    found = nca_weighted_loss(r, row(0.5, 0.0, 1.5), mask)
    noise = sum(math.log(sigmoid(-x)) for x in (a, b, c)) / 3
    assert found.item() == pytest.approx(-0.5 * math.log(sigmoid(a)) - 1.5 * math.log(sigmoid(c)) - noise, abs=1e-12)
    assert biased_nca_loss(r[:, 0], r[:, 1]).item() == pytest.approx(-math.log(sigmoid(a)) - math.log(sigmoid(-b)), abs=1e-12)


def test_the_normaliser_by_hand() -> None:
    # e^(R / alpha) = 4, 2 and 9, of three candidates in two groups: Z = 5.
    rewards = torch.tensor([[math.log(4), math.log(2)], [math.log(9), math.nan]], dtype=torch.float64) / 2
    mask = ~rewards.isnan()
    found = log_normalizer(rewards, mask, alpha=0.5)
    assert found == pytest.approx(math.log(5), abs=1e-12)
    weights = normalized_weights(rewards, mask, alpha=0.5, log_normalizer=found)
    torch.testing.assert_close(weights, torch.tensor([[4 / 10, 2 / 10], [9 / 5, 0]], dtype=torch.float64))
    assert log_normalizer(rewards + 3, mask, alpha=0.5) == pytest.approx(math.log(5) + 6, abs=1e-12)


def test_a_normaliser_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no candidate has a reward"):
        log_normalizer(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool), alpha=1.0)
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="number above 0"):
            log_normalizer(torch.zeros(2, 2), real(2, 2), alpha=alpha)
        with pytest.raises(ValueError, match="number above 0"):
            normalized_weights(torch.zeros(2, 2), real(2, 2), alpha=alpha, log_normalizer=0.0)


# --- Gradients, masks, extremes ---------------------------------------------------------------------------------------


@labelled
def test_gradient(loss) -> None:
    labels = numbers(3, 4, seed=1) > 0
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    assert torch.autograd.gradcheck(lambda r: loss(r, labels, mask), (numbers(3, 4).requires_grad_(),), atol=1e-8)


def test_gradient_of_weighted_nca_and_biased_nca() -> None:
    weights, mask = numbers(3, 4, seed=1).exp(), torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    r = numbers(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nca_weighted_loss(x, weights, mask), (r,), atol=1e-8)
    pair = (numbers(4).requires_grad_(), numbers(4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(biased_nca_loss, pair, atol=1e-8)


@labelled
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_padding_and_order_change_nothing(loss, junk: float) -> None:
    r, labels = numbers(8, 4), numbers(8, 4, seed=1) > 0
    order = torch.tensor([2, 4, 0, 3, 1])
    padded = torch.cat([r, torch.full((8, 1), junk)], dim=1)[:, order].requires_grad_()
    many = torch.cat([labels, real(8, 1)], dim=1)[:, order]
    mask = (order != 4).expand(8, 5)
    plain = r.clone().requires_grad_()
    value, padded_value = loss(plain, labels, real(8, 4)), loss(padded, many, mask)
    torch.testing.assert_close(padded_value, value, rtol=0, atol=1e-14)
    found = gradient_of(padded_value, padded)
    assert found[:, 1].abs().max() == 0
    torch.testing.assert_close(found[:, mask[0]], gradient_of(value, plain)[:, order[mask[0]]], rtol=0, atol=1e-14)
    assert loss(padded, many, torch.zeros_like(mask)).tolist() == [0.0] * 8
    assert gradient_of(loss(padded, many, torch.zeros_like(mask)), padded).abs().max() == 0


@labelled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_stay_finite(loss, dtype: torch.dtype, size: float) -> None:
    r = torch.tensor([[size, -size, 0.0], [-size, size, size]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[True, False, True], [True, True, False]])
    value = loss(r, labels, real(2, 3))
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert gradient_of(value, r).isfinite().all()


def test_extremes_by_hand() -> None:
    wrong = row(-1e4, 1e4)
    labels = torch.tensor([[True, False]])
    assert kto_loss(wrong, labels, real(1, 2), baseline=0.0).item() == 1.0
    assert bco_loss(wrong, labels, real(1, 2), shift=0.0).item() == 2e4
    assert biased_nca_loss(wrong[:, 0], wrong[:, 1]).item() == 2e4


def test_a_reward_far_above_all_that_the_normaliser_has_seen_stays_finite() -> None:
    rewards = torch.tensor([[1e4, 0.0]])
    weights = normalized_weights(rewards, real(1, 2), alpha=1e-2, log_normalizer=0.0)
    for size in (1e4, -1e4):
        r = torch.tensor([[size, -size]], requires_grad=True)
        value = nca_weighted_loss(r, weights, real(1, 2))
        assert value.isfinite().all()
        assert gradient_of(value, r).isfinite().all()
    # A normaliser estimated from the same candidates cuts nothing: the best has Z = e^(1e6) / 2 in its weight.
    precise = rewards.double()
    log_z = log_normalizer(precise, real(1, 2), alpha=1e-2)
    found = normalized_weights(precise, real(1, 2), alpha=1e-2, log_normalizer=log_z)
    torch.testing.assert_close(found, row(1.0, 0.0), rtol=1e-9, atol=0)


@labelled
def test_half_precision_is_computed_in_float32(loss) -> None:
    r, labels = numbers(4, 3, dtype=torch.bfloat16), numbers(4, 3, seed=1) > 0
    value = loss(r, labels, real(4, 3))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(r.double(), labels, real(4, 3)).float(), rtol=2e-6, atol=1e-6)


# --- Optima -----------------------------------------------------------------------------------------------------------


def expected_nca_loss(r: Tensor, rewards: Tensor, proposal: Tensor, num_candidates: int, weights) -> Tensor:
    """The NCA loss on average over all groups of K completions drawn from the proposal, by enumeration."""
    tuples = torch.tensor(list(itertools.product(range(len(proposal)), repeat=num_candidates)))
    mask = torch.ones_like(tuples, dtype=torch.bool)
    chance = proposal[tuples].prod(dim=1)
    return (chance * nca_weighted_loss(r[tuples], weights(rewards[tuples], mask), mask)).sum()


REWARDS, PROPOSAL = row(0.0, 1.0, 2.5, -0.5)[0], row(0.4, 0.3, 0.1, 0.2)[0]


@pytest.mark.parametrize("num_candidates", [1, 2, 3, 4])
def test_with_the_true_normaliser_the_optimum_is_exact_at_every_size_of_group(num_candidates: int) -> None:
    alpha = 0.7
    log_z = float((PROPOSAL * (REWARDS / alpha).exp()).sum().log())
    weights = partial(normalized_weights, alpha=alpha, log_normalizer=log_z)
    r = (REWARDS / alpha - log_z).requires_grad_()
    value = expected_nca_loss(r, REWARDS, PROPOSAL, num_candidates, weights)
    assert gradient_of(value, r).abs().max() < 1e-12
    # The loss is convex in r, and strictly where every completion can be drawn: this is the only optimum.
    moved = expected_nca_loss(r + 0.1 * numbers(4), REWARDS, PROPOSAL, num_candidates, weights)
    assert moved.item() > value.item() + 1e-5


@pytest.mark.parametrize("num_candidates", [2, 3, 4])
def test_with_the_groups_own_sum_the_optimum_is_log_k_times_the_mean_weight(num_candidates: int) -> None:
    alpha = 0.7
    weights = partial(target_weights, alpha=alpha)
    tuples = torch.tensor(list(itertools.product(range(4), repeat=num_candidates)))
    found = weights(REWARDS[tuples], torch.ones_like(tuples, dtype=torch.bool))[:, 0]
    # E[w | y] over the groups whose first candidate is y; the places are alike.
    rest = PROPOSAL[tuples[:, 1:]].prod(dim=1)
    mean = torch.stack([(rest * found)[tuples[:, 0] == y].sum() for y in range(4)])
    r = (num_candidates * mean).log().requires_grad_()
    assert gradient_of(expected_nca_loss(r, REWARDS, PROPOSAL, num_candidates, weights), r).abs().max() < 1e-12
    assert 0 < r.max().item() < math.log(num_candidates)
    exact = (REWARDS / alpha - (PROPOSAL * (REWARDS / alpha).exp()).sum().log()).requires_grad_()
    assert gradient_of(expected_nca_loss(exact, REWARDS, PROPOSAL, num_candidates, weights), exact).abs().max() > 1e-3


def test_optima_of_the_pair_losses() -> None:
    chosen = torch.tensor([math.log(2.0)], dtype=torch.float64, requires_grad=True)
    assert gradient_of(nca_pair_loss(chosen, torch.zeros(1).double()), chosen).abs().item() < 1e-15
    # The biased one still pushes up there: by 1 - sigmoid(log 2) = 1/3.
    assert gradient_of(biased_nca_loss(chosen, torch.zeros(1).double()), chosen).item() == pytest.approx(-1 / 3, abs=1e-12)


# --- Reductions -------------------------------------------------------------------------------------------------------


def test_nca_is_its_weighted_loss() -> None:
    r, rewards = numbers(8, 4), numbers(8, 4, seed=1)
    weights = target_weights(rewards, real(8, 4), alpha=0.5)
    torch.testing.assert_close(
        nca_loss(r, rewards, real(8, 4), alpha=0.5), nca_weighted_loss(r, weights, real(8, 4)), rtol=0, atol=0
    )


def test_one_hot_nca_of_two_is_nca_pair() -> None:
    r = numbers(8, 2)
    rewards = row(1.0, 0.0).expand(8, 2)
    expected = nca_pair_loss(r[:, 0], r[:, 1])
    for config in (NCA(beta=1.0, transform="one_hot"), NCA(beta=1.0, alpha=1e-3)):
        found = config.method().loss(inputs_of_one_token(r, rewards, real(8, 2)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_groups_own_normaliser_makes_normalized_weights_target_weights() -> None:
    rewards, mask = numbers(1, 5), real(1, 5)
    log_z = log_normalizer(rewards, mask, alpha=0.3)
    found = normalized_weights(rewards, mask, alpha=0.3, log_normalizer=log_z)
    torch.testing.assert_close(found, target_weights(rewards, mask, alpha=0.3), rtol=0, atol=1e-14)


def test_bco_of_one_desirable_and_one_undesirable_is_biased_nca() -> None:
    r = numbers(8, 2)
    labels = torch.tensor([[True, False]]).expand(8, 2)
    expected = biased_nca_loss(r[:, 0], r[:, 1])
    torch.testing.assert_close(bco_loss(r, labels, real(8, 2), shift=0.0), expected, rtol=0, atol=1e-14)
    # And of pairs, each on its own row: the two halves.
    halves = bco_loss(r.reshape(16, 1), labels.reshape(16, 1), real(16, 1), shift=0.0).reshape(8, 2).sum(dim=1)
    torch.testing.assert_close(halves, expected, rtol=0, atol=1e-14)


def test_kto_of_a_group_is_the_mean_of_kto_of_its_candidates() -> None:
    r, labels = numbers(8, 3), numbers(8, 3, seed=1) > 0
    loss = LABELLED["kto"]
    alone = loss(r.reshape(24, 1), labels.reshape(24, 1), real(24, 1)).reshape(8, 3).mean(dim=1)
    torch.testing.assert_close(loss(r, labels, real(8, 3)), alone, rtol=0, atol=1e-14)


@labelled
def test_a_shift_of_both_the_scores_and_the_baseline_changes_nothing(loss) -> None:
    r, labels = numbers(8, 3), numbers(8, 3, seed=1) > 0
    name = "baseline" if loss.func is kto_loss else "shift"
    moved = partial(loss, **{name: torch.tensor(2.3, dtype=torch.float64)})
    torch.testing.assert_close(moved(r + 2, labels, real(8, 3)), loss(r, labels, real(8, 3)), rtol=0, atol=1e-12)


# --- TRL's own code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [0.5, -0.5])
@pytest.mark.parametrize("share", [0.5, 0.0, 1.0])
def test_kto_is_trls(drift: float, share: float) -> None:
    logps, reference, beta = numbers(4, 3).requires_grad_(), numbers(4, 3, seed=1), 0.3
    labels = numbers(4, 3, seed=2).sigmoid() < share if 0 < share < 1 else torch.full((4, 3), share == 1)
    kl_reference = numbers(12, seed=3)
    kl_logps = kl_reference + drift + 0.1 * numbers(12, seed=4)
    weights = torch.tensor([1.4, 0.6])
    theirs = trl_losses.kto_loss(
        logps.flatten(), reference.flatten(), labels.flatten(), kl_logps, kl_reference, beta=beta, weights=weights
    )
    config = KTO(beta=beta, desirable_weight=weights[0].item(), undesirable_weight=weights[1].item())
    method = config.method()
    assert method.hooks.baseline is not None
    level = method.hooks.baseline.level(method.beta * (kl_logps - kl_reference).mean().item(), 99.0)
    assert (level > 0) == (drift > 0)
    inputs = inputs_of_one_token(logps - reference, labels.double(), real(4, 3))
    ours = method.loss(replace(inputs, baseline=level)).mean()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient_of(ours, logps), gradient_of(theirs, logps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pairing", ["best_vs_worst", "best_vs_each", "all_pairs"])
@pytest.mark.parametrize(("name", "config"), [("nca_pair", NCAPair), ("bco_pair", BiasedNCA)])
def test_pair_methods_are_trls(name: str, config: type[NCAPair] | type[BiasedNCA], pairing: Pairing) -> None:
    theirs = dpo_trainer([name], pairing=pairing, beta=0.3)
    assert_trls(config(beta=0.3, pairing=pairing), theirs, random_groups())


# --- Methods ----------------------------------------------------------------------------------------------------------


def value_of(method: Method, r: Tensor, rewards: Tensor) -> Tensor:
    return method.loss(inputs_of_one_token(r / method.beta, rewards, ~rewards.isnan()))


def test_nca_with_the_data_sets_normaliser_is_fitted_and_exact() -> None:
    rewards = torch.stack([REWARDS, REWARDS.flip(0)])
    method = NCA(alpha=0.7, normalizer="data").method()
    with pytest.raises(ValueError, match="call the method's fit"):
        value_of(method, rewards, rewards)
    assert method.hooks.fit is not None
    fitted = method.hooks.fit(rewards, real(2, 4))
    assert fitted.hooks.fit is None
    r = (rewards / 0.7 - (REWARDS / 0.7).exp().mean().log()).requires_grad_()
    assert gradient_of(value_of(fitted, r, rewards), r).abs().max() < 1e-12
    # A group of the best alone: above the mean, and no group's sum takes that away.
    best = row(2.5, 2.5)
    r = (best / 0.7 - (REWARDS / 0.7).exp().mean().log()).requires_grad_()
    assert r.min() > 0
    assert gradient_of(value_of(fitted, r, best), r).abs().max() < 1e-12


def test_nca_finds_alpha_from_the_rewards() -> None:
    rewards, r = 3 * numbers(32, 4), numbers(32, 4, seed=1)
    method = NCA(target_entropy=0.4).method()
    assert method.hooks.fit is not None
    fitted = method.hooks.fit(rewards, real(32, 4))
    assert fitted.hooks.target_weights is not None
    weights = fitted.hooks.target_weights(rewards, real(32, 4))
    assert sharpness(weights, real(32, 4)) == pytest.approx(0.4, abs=1e-9)
    torch.testing.assert_close(value_of(fitted, r, rewards), nca_weighted_loss(r, weights, real(32, 4)))
    assert NCA().method().hooks.fit is None


def test_nca_finds_alpha_and_normaliser_of_transformed_rewards_together() -> None:
    rewards, r = 3 * numbers(32, 4), numbers(32, 4, seed=1)
    method = NCA(target_entropy=0.4, transform="z_score", normalizer="data").method()
    assert method.hooks.fit is not None
    fitted = method.hooks.fit(rewards, real(32, 4))
    z = z_scores(rewards, real(32, 4))
    assert fitted.hooks.target_weights is not None
    shares = fitted.hooks.target_weights(rewards, real(32, 4))
    assert sharpness(shares, real(32, 4)) == pytest.approx(0.4, abs=1e-9)
    # The shares tell alpha: their logarithms are z / alpha and a constant.
    alpha = ((z[0, 0] - z[0, 1]) / (shares[0, 0] / shares[0, 1]).log()).item()
    weights = (z / alpha).exp() / (z / alpha).exp().mean() / 4
    torch.testing.assert_close(value_of(fitted, r, rewards), nca_weighted_loss(r, weights, real(32, 4)))


def test_contradictory_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="leave out one"):
        NCA(normalizer="data", transform="one_hot")
    for config, field in ((KTO, "desirable_weight"), (KTO, "undesirable_weight"), (BCO, "beta")):
        with pytest.raises(ValidationError):
            config.model_validate({field: 0.0})


@pytest.mark.parametrize("config", [KTO, BCO])
def test_rewards_that_are_no_labels_are_refused_without_a_threshold(config: type[KTO] | type[BCO]) -> None:
    refuse = config().method().refuse
    for fine in ([1.0], [0.0], [1.0, 0.0, 0.0], [1.0, 1.0]):
        assert refuse(fine) is None
    assert refuse([]) == "no candidate has a reward"
    for odd in (0.3, 2.0, -1.0):
        reason = refuse([1.0, odd])
        assert reason is not None
        assert f"reward {odd} is no label" in reason
        assert "threshold" in reason
    assert config(threshold=0.5).method().refuse([0.3]) is None
    assert config(threshold=0.5).method().refuse([]) == "no candidate has a reward"


@pytest.mark.parametrize("config", [KTO, BCO])
def test_the_threshold_makes_the_labels(config: type[KTO] | type[BCO]) -> None:
    r, rewards = numbers(1, 4), row(7.0, 3.0, 2.9, math.nan)
    labels = row(1.0, 0.0, 0.0, math.nan)
    found = value_of(config(threshold=3.0).method(), r, rewards)
    torch.testing.assert_close(found, value_of(config().method(), r, labels), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rewards", "weight", "told"),
    [
        (
            [1.0, 0.0, 0.0, 0.0],
            1.0,
            "count as 0.33 to 1: training lowers nearly all completions; set objective.desirable_weight to 3 to 4.5",
        ),
        (
            [1.0, 1.0, 1.0, 0.0],
            2.0,
            "count as 6 to 1: training raises nearly all completions; set objective.desirable_weight to 0.333 to 0.5",
        ),
        ([1.0, 0.0, 0.0, 0.0], 4.0, None),
        ([1.0, 0.0, 0.0, 1.0], 1.0, None),
        ([0.0, 0.0, 0.0, 0.0], 1.0, "0 desirable and 4 undesirable candidates: it learns from both"),
    ],
)
def test_labels_out_of_balance_are_told(rewards: list[float], weight: float, told: str | None) -> None:
    kto, padded = KTO(desirable_weight=weight).method(), torch.tensor([[*rewards, 1.0]])
    mask = torch.tensor([[True] * 4 + [False]])
    for method in (kto, weighted_sum("mix", [DPO().method(), kto])):
        assert method.hooks.notice is not None
        found = method.hooks.notice(padded, mask)
        assert found is None if told is None else re.search(told, found or "")
    assert DPO().method().hooks.notice is None


def test_bco_takes_the_mean_of_the_steps_before_as_its_shift() -> None:
    baseline = BCO().method().hooks.baseline
    assert baseline is not None
    assert not baseline.mismatched
    assert baseline.level(99.0, 0.7) == 0.7
    other = KTO(beta=0.5).method().hooks.baseline
    assert other is not None
    assert other.mismatched
    assert other.level(1.5, 99.0) == 1.5
    assert other.level(-1.5, 99.0) == 0.0


@pytest.mark.parametrize(("config", "loss"), [(NCAPair, nca_pair_loss), (BiasedNCA, biased_nca_loss)])
def test_pair_methods_score_the_positive_against_each_negative(config, loss) -> None:
    method = config(beta=0.5, pairing="best_vs_each").method()
    r, rewards = numbers(4, 3), row(2.0, 1.0, 0.0).expand(4, 3)
    expected = (loss(r[:, 0], r[:, 1]) + loss(r[:, 0], r[:, 2])) / 2
    torch.testing.assert_close(value_of(method, r, rewards), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mean_over_negatives(loss)(r, rewards, real(4, 3)), expected, rtol=0, atol=1e-12)
    assert config().pairing == "best_vs_one"
    assert config().method().refuse([1.0, 1.0]) == "all rewards equal"

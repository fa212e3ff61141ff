"""DPO and its family: values derived by hand, gradients, extremes, TRL's own code, reductions, pairings, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from loss_inputs import inputs_of_one_token
from ncalign.objectives.config import Pairing
from ncalign.objectives.lists import LiPOLambda, exo_loss
from ncalign.objectives.method import LossInputs, Method, PairConfig
from ncalign.objectives.pairs import (
    CPO,
    DPO,
    RPO,
    EXOPair,
    RewardAwareRPO,
    SimPO,
    dpo_loss,
    exo_pair_loss,
    reward_aware_rpo_loss,
    simpo_loss,
)
from ncalign.objectives.ranking import MCPO, info_nca_loss
from ncalign.objectives.regression import REBEL
from trl_losses import Groups, assert_trls, cpo_trainer, dpo_trainer, ours, random_groups

PairLoss = Callable[[Tensor, Tensor], Tensor]


def reward_aware(chosen: Tensor, rejected: Tensor) -> Tensor:
    better, worse = (torch.full(chosen.shape, reward, dtype=torch.float64) for reward in (0.9, 0.2))
    return reward_aware_rpo_loss(chosen, rejected, better, worse, eta=2.0)


LOSSES: dict[str, PairLoss] = {
    "dpo": dpo_loss,
    "cdpo": partial(dpo_loss, label_smoothing=0.1),
    "simpo": partial(simpo_loss, gamma=0.6),
    "exo_pair": partial(exo_pair_loss, label_smoothing=0.01),
    "reward_aware_rpo": reward_aware,
}
losses = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in LOSSES.items()])
fixed_pairings = pytest.mark.parametrize("pairing", ["best_vs_worst", "best_vs_each", "all_pairs"])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def real(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def gradient_of(value: Tensor, of: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value.sum(), of)
    return gradient


def loss_inputs(log_ratios: Tensor, logprobs: Tensor, lengths: Tensor) -> LossInputs:
    """Candidates in the order of their rewards, the best first."""
    rewards = -torch.arange(log_ratios.shape[1], dtype=torch.float64).expand_as(log_ratios)
    mask = torch.ones_like(log_ratios, dtype=torch.bool)
    return LossInputs(log_ratios, logprobs, rewards, lengths, mask)


# --- Values -----------------------------------------------------------------------------------------------------------


def test_values_derived_by_hand() -> None:
    a, b = 0.3, -1.2
    chosen, rejected = one(a), one(b)
    p, e, gamma = sigmoid(a - b), 0.1, 2.0
    target = sigmoid(1.5 * (0.8 - 0.3))
    expected = {
        "dpo": (dpo_loss(chosen, rejected), -math.log(p)),
        "cdpo": (dpo_loss(chosen, rejected, label_smoothing=e), -(1 - e) * math.log(p) - e * math.log(1 - p)),
        "simpo": (simpo_loss(chosen, rejected, gamma=gamma), -math.log(sigmoid(a - b - gamma))),
        "exo_pair": (
            exo_pair_loss(chosen, rejected, label_smoothing=e),
            p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e),
        ),
        "reward_aware_rpo": (
            reward_aware_rpo_loss(chosen, rejected, one(0.8), one(0.3), eta=1.5),
            target * math.log(target / p) + (1 - target) * math.log((1 - target) / (1 - p)),
        ),
    }
    for name, (found, value) in expected.items():
        assert found.item() == pytest.approx(value, abs=1e-12), name


def test_what_each_method_compares_and_adds_by_hand() -> None:
    # Two completions of 3 and 4 tokens.
    group = loss_inputs(row(0.5, -0.7), row(-6.0, -9.0), row(3.0, 4.0))
    nll = 6.0 / 3
    expected = {
        DPO(beta=0.4): -math.log(sigmoid(0.4 * (0.5 + 0.7))),
        RPO(beta=0.4, nll_weight=0.3): -math.log(sigmoid(0.4 * (0.5 + 0.7))) + 0.3 * nll,
        CPO(beta=0.4, nll_weight=0.3): -math.log(sigmoid(0.4 * (-6 + 9))) + 0.3 * nll,
        SimPO(beta=2.5, gamma=0.8): -math.log(sigmoid(2.5 * (-6 / 3 + 9 / 4) - 0.8)),
    }
    for config, value in expected.items():
        assert config.method().loss(group).item() == pytest.approx(value, abs=1e-12), config.name


# --- Gradients and extremes -------------------------------------------------------------------------------------------


@losses
def test_gradient(loss: PairLoss) -> None:
    pair = (numbers(5).requires_grad_(), numbers(5, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(loss, pair, atol=1e-8)


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(loss: PairLoss, dtype: torch.dtype) -> None:
    chosen = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 1e4, 1e4, -1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    value = loss(chosen, rejected)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert (value >= 0).all()
    for side in (chosen, rejected):
        (gradient,) = torch.autograd.grad(value.sum(), side, retain_graph=True)
        assert gradient.isfinite().all()
        # A slope is at most 1; EXO's is p (1 - p) (d - log-odds of the label), at equal rewards log(99) / 4.
        assert gradient.abs().max() <= 1.15


def test_extremes_by_hand() -> None:
    right, wrong = (one(1e4), one(-1e4)), (one(-1e4), one(1e4))
    assert dpo_loss(*right).item() == 0.0
    assert dpo_loss(*wrong).item() == 2e4
    # A label that is wrong with probability 1/4 costs a quarter of the difference on either side.
    assert dpo_loss(*right, label_smoothing=0.25).item() == 0.25 * 2e4
    assert dpo_loss(*wrong, label_smoothing=0.25).item() == 0.75 * 2e4
    assert simpo_loss(*wrong, gamma=5.0).item() == 2e4 + 5
    assert exo_pair_loss(*right, label_smoothing=0.25).item() == pytest.approx(-math.log(0.75), abs=1e-12)
    assert exo_pair_loss(*wrong, label_smoothing=0.25).item() == pytest.approx(-math.log(0.25), abs=1e-12)
    # Rewards as far apart as the implicit rewards: nothing to learn; the other way round, all of the difference.
    assert reward_aware_rpo_loss(*right, *right, eta=1.0).item() == 0.0
    assert reward_aware_rpo_loss(*wrong, *right, eta=1.0).item() == 2e4


@losses
def test_half_precision_is_computed_in_float32(loss: PairLoss) -> None:
    chosen, rejected = numbers(4, dtype=torch.bfloat16), numbers(4, seed=1, dtype=torch.bfloat16)
    value = loss(chosen, rejected)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(chosen.double(), rejected.double()).float(), rtol=2e-6, atol=1e-6)


# --- TRL's own code ---------------------------------------------------------------------------------------------------


@fixed_pairings
def test_dpo_is_trls_sigmoid(pairing: Pairing) -> None:
    assert_trls(DPO(beta=0.3, pairing=pairing), dpo_trainer(["sigmoid"], pairing=pairing, beta=0.3), random_groups())


def test_dpo_with_one_random_negative_is_trls_sigmoid_on_pairs() -> None:
    theirs = dpo_trainer(["sigmoid"], pairing="best_vs_each", beta=0.3)
    groups = random_groups(num_candidates=2)
    assert DPO().pairing == "best_vs_one"
    assert_trls(DPO(beta=0.3), theirs, groups)


def test_conservative_dpo_is_trls_aot_unpaired_on_one_pair() -> None:
    """TRL's sigmoid takes no label smoothing; aot_unpaired does, and one pair is sorted already."""
    theirs = dpo_trainer(["aot_unpaired"], pairing="best_vs_worst", beta=0.3, label_smoothing=0.2)
    assert_trls(DPO(beta=0.3, label_smoothing=0.2, pairing="best_vs_worst"), theirs, random_groups())


@fixed_pairings
def test_conservative_dpo_is_trls_cpo_under_a_reference_that_likes_all_alike(pairing: Pairing) -> None:
    groups = random_groups()
    alike = Groups(groups.tokens, torch.zeros_like(groups.reference), groups.mask, groups.rewards)
    theirs = cpo_trainer("sigmoid", pairing=pairing, beta=0.3, label_smoothing=0.2)
    assert_trls(DPO(beta=0.3, label_smoothing=0.2, pairing=pairing), theirs, alike)


@pytest.mark.parametrize("pairing", ["best_vs_worst", "best_vs_each"])
def test_rpo_is_trls_sigmoid_and_sft(pairing: Pairing) -> None:
    theirs = dpo_trainer(["sigmoid", "sft"], weights=[1.0, 0.7], pairing=pairing, beta=0.3)
    assert_trls(RPO(beta=0.3, nll_weight=0.7, pairing=pairing), theirs, random_groups())


@pytest.mark.parametrize("label_smoothing", [1e-3, 0.2])
@fixed_pairings
def test_exo_pair_is_trls(pairing: Pairing, label_smoothing: float) -> None:
    theirs = dpo_trainer(["exo_pair"], pairing=pairing, beta=0.3, label_smoothing=label_smoothing)
    assert_trls(EXOPair(beta=0.3, label_smoothing=label_smoothing, pairing=pairing), theirs, random_groups())


@pytest.mark.parametrize("pairing", ["best_vs_worst", "best_vs_each"])
@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
def test_cpo_is_trls(pairing: Pairing, nll_weight: float) -> None:
    """TRL's mean over all chosen tokens of a batch is ours within a group, which has one chosen completion."""
    theirs = cpo_trainer("sigmoid", pairing=pairing, beta=0.3, nll_weight=nll_weight)
    assert_trls(CPO(beta=0.3, nll_weight=nll_weight, pairing=pairing), theirs, random_groups())


@fixed_pairings
def test_simpo_is_trls(pairing: Pairing) -> None:
    theirs = cpo_trainer("simpo", pairing=pairing, beta=2.5, gamma=0.8)
    assert_trls(SimPO(beta=2.5, gamma=0.8, pairing=pairing), theirs, random_groups())


# --- Reductions -------------------------------------------------------------------------------------------------------


def test_conservative_dpo_mixes_dpo_of_both_labels() -> None:
    chosen, rejected = numbers(8), numbers(8, seed=1)
    close(dpo_loss(chosen, rejected, label_smoothing=0.0), dpo_loss(chosen, rejected))
    mixed = 0.7 * dpo_loss(chosen, rejected) + 0.3 * dpo_loss(rejected, chosen)
    close(dpo_loss(chosen, rejected, label_smoothing=0.3), mixed)


@pytest.mark.parametrize("loss", [dpo_loss, exo_pair_loss])
def test_a_smoothed_label_is_met_at_its_log_odds(loss: Callable[..., Tensor]) -> None:
    """Forward and reverse divergence have one optimum, sigmoid(d) = 1 - e: there DPO is the label's entropy and EXO 0."""
    e = 0.2
    chosen = one(math.log((1 - e) / e)).requires_grad_()
    value = loss(chosen, one(0.0), label_smoothing=e)
    entropy = -(1 - e) * math.log(1 - e) - e * math.log(e)
    assert value.item() == pytest.approx(entropy if loss is dpo_loss else 0.0, abs=1e-12)
    assert gradient_of(value, chosen).item() == pytest.approx(0.0, abs=1e-12)


def test_without_their_nll_rpo_and_cpo_are_dpo() -> None:
    logprobs, lengths = numbers(8, 3) - 5, torch.randint(1, 9, (8, 3), generator=torch.Generator().manual_seed(0)).double()
    group = loss_inputs(numbers(8, 3, seed=1), logprobs, lengths)
    each: Pairing = "best_vs_each"
    dpo = DPO(beta=0.3, pairing=each).method()
    close(RPO(beta=0.3, nll_weight=0.0, pairing=each).method().loss(group), dpo.loss(group))
    # A reference that gives every completion -4 nats.
    uniform = loss_inputs(logprobs + 4, logprobs, lengths)
    close(CPO(beta=0.3, nll_weight=0.0, pairing=each).method().loss(group), dpo.loss(uniform))


@pytest.mark.parametrize("config", [RPO, CPO])
def test_an_nll_weight_adds_that_many_chosen_nlls(config: type[RPO] | type[CPO]) -> None:
    logprobs, lengths = numbers(8, 3) - 5, torch.randint(1, 9, (8, 3), generator=torch.Generator().manual_seed(0)).double()
    group = loss_inputs(numbers(8, 3, seed=1), logprobs, lengths)
    plain, anchored = (config(nll_weight=weight, pairing="best_vs_each").method().loss(group) for weight in (0.0, 0.4))
    close(anchored - plain, -0.4 * logprobs[:, 0] / lengths[:, 0])


def test_simpo_of_equal_lengths_without_margin_is_dpo_without_reference() -> None:
    logprobs = numbers(8, 2) - 5
    group = loss_inputs(numbers(8, 2, seed=1), logprobs, torch.full((8, 2), 7.0, dtype=torch.float64))
    bare = loss_inputs(logprobs, logprobs, torch.ones(8, 2, dtype=torch.float64))
    close(SimPO(beta=2.1, gamma=0.0).method().loss(group), DPO(beta=0.3).method().loss(bare))


def test_simpos_margin_is_a_head_start_of_the_rejected() -> None:
    chosen, rejected = numbers(8), numbers(8, seed=1)
    close(simpo_loss(chosen, rejected, gamma=0.8), dpo_loss(chosen, rejected + 0.8))


def test_exo_pair_is_exo_of_two_whose_weights_are_the_smoothed_label() -> None:
    r, e = numbers(8, 2).requires_grad_(), 0.05
    rewards = row(math.log(1 - e), math.log(e)).expand(8, 2)
    expected = exo_loss(r, rewards, real(8, 2), alpha=1.0)
    found = exo_pair_loss(r[:, 0], r[:, 1], label_smoothing=e)
    close(found, expected)
    close(gradient_of(found, r), gradient_of(expected, r))


def test_reward_aware_rpo_is_info_nca_of_two_less_the_targets_entropy() -> None:
    r, rewards, eta = numbers(8, 2).requires_grad_(), numbers(8, 2, seed=1), 1.7
    found = reward_aware_rpo_loss(r[:, 0], r[:, 1], rewards[:, 0], rewards[:, 1], eta=eta)
    cross = info_nca_loss(r, rewards, real(8, 2), alpha=1 / eta)
    close(found, cross - torch.special.entr((eta * rewards).softmax(dim=1)).sum(dim=1))
    close(gradient_of(found, r), gradient_of(cross, r))


def test_reward_aware_rpo_with_a_steep_scale_is_dpo() -> None:
    chosen, rejected = numbers(8).requires_grad_(), numbers(8, seed=1)
    found = reward_aware_rpo_loss(chosen, rejected, torch.full((8,), 0.6), torch.full((8,), 0.1), eta=1e8)
    close(found, dpo_loss(chosen, rejected))
    close(gradient_of(found, chosen), gradient_of(dpo_loss(chosen, rejected), chosen))


def test_reward_aware_rpo_is_zero_and_flat_exactly_at_its_optimum() -> None:
    better, worse = numbers(8).exp(), -numbers(8, seed=1).exp()
    level = numbers(8, seed=2)
    chosen = (1.7 * better + level).requires_grad_()
    value = reward_aware_rpo_loss(chosen, 1.7 * worse + level, better, worse, eta=1.7)
    close(value, torch.zeros(8, dtype=torch.float64))
    close(gradient_of(value, chosen), torch.zeros(8, dtype=torch.float64))
    assert (reward_aware_rpo_loss(chosen + 1, 1.7 * worse + level, better, worse, eta=1.7) > 1e-6).all()


def test_every_field_reaches_the_loss() -> None:
    r, rewards = numbers(8, 2), row(0.7, 0.2).expand(8, 2)
    group = inputs_of_one_token(r, rewards, real(8, 2))
    chosen, rejected = 0.5 * r[:, 0], 0.5 * r[:, 1]
    close(DPO(beta=0.5, label_smoothing=0.1).method().loss(group), dpo_loss(chosen, rejected, label_smoothing=0.1))
    close(EXOPair(beta=0.5, label_smoothing=0.1).method().loss(group), exo_pair_loss(chosen, rejected, label_smoothing=0.1))
    expected = reward_aware_rpo_loss(chosen, rejected, rewards[:, 0], rewards[:, 1], eta=3.0)
    close(RewardAwareRPO(beta=0.5, eta=3.0).method().loss(group), expected)


# --- Pairings ---------------------------------------------------------------------------------------------------------

CONFIGS: list[type[PairConfig]] = [DPO, RPO, SimPO, CPO, EXOPair, RewardAwareRPO]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_fields["name"].default)


def with_columns(groups: Groups, *columns: int) -> Groups:
    return Groups(*(value[:, list(columns)] for value in vars(groups).values()))


def ranked_groups(num_groups: int = 6) -> Groups:
    """Random groups of four in the order of their rewards, the best first."""
    groups = random_groups(num_groups)
    return Groups(groups.tokens, groups.reference, groups.mask, groups.rewards.sort(dim=1, descending=True).values)


@configs
def test_best_vs_each_is_the_mean_over_the_pairs_of_the_best(config: type[PairConfig]) -> None:
    groups = ranked_groups()
    alone = [ours(config(pairing="best_vs_one"), with_columns(groups, 0, column)) for column in (1, 2, 3)]
    close(ours(config(pairing="best_vs_each"), groups), sum(alone) / 3)
    close(ours(config(pairing="best_vs_worst"), groups), alone[2])


@configs
def test_best_vs_one_is_one_of_these_pairs_and_each_as_often(config: type[PairConfig]) -> None:
    num = 3000
    group = ranked_groups(1)
    many = Groups(*(value.expand(num, *value.shape[1:]) for value in vars(group).values()))
    found = ours(config(pairing="best_vs_one"), many)
    alone = [ours(config(pairing="best_vs_one"), with_columns(group, 0, column)).item() for column in (1, 2, 3)]
    shares = [(found - value).abs().lt(1e-12).double().mean().item() for value in alone]
    assert sum(shares) == pytest.approx(1.0, abs=1e-9)
    # Four standard errors of a share of 1/3 in 3000 draws.
    assert shares == pytest.approx([1 / 3] * 3, abs=0.035)


@pytest.mark.parametrize("config", [DPO, SimPO, EXOPair, RewardAwareRPO])
def test_all_pairs_is_the_mean_over_every_pair(config: type[PairConfig]) -> None:
    groups = ranked_groups()
    alone = [ours(config(pairing="best_vs_one"), with_columns(groups, *pair)) for pair in combinations(range(4), 2)]
    assert len(alone) == 6
    close(ours(config(pairing="all_pairs"), groups), sum(alone) / 6)


def drawn(method: Method, scores: Tensor, rewards: Tensor, seed: int = 0) -> Tensor:
    assert method.sampler is not None
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return method.sampler.select(scores, rewards, mask, torch.Generator().manual_seed(seed))


def test_best_vs_hard_draws_what_mc_po_draws() -> None:
    rewards, scores = numbers(64, 5), 3 * numbers(64, 5, seed=1)
    found = drawn(DPO(pairing="best_vs_hard").method(), scores, rewards)
    assert torch.equal(found, drawn(MCPO().method(), scores, rewards))


def test_best_vs_sweet_spot_takes_the_negative_nearest_to_two_deviations_below_the_mean() -> None:
    values = [2.0, *[0.0] * 17, -5.0, -12.0]
    mean = sum(values) / 20
    spot = mean - 2 * math.sqrt(sum((value - mean) ** 2 for value in values) / 20)
    # About -6.4: nearer to -5 than to 0 or to the worst.
    assert abs(-5 - spot) < min(abs(0 - spot), abs(-12 - spot))
    rewards = row(*values)
    assert drawn(DPO(pairing="best_vs_sweet_spot").method(), torch.zeros_like(rewards), rewards).tolist() == [[0, 18]]


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 1.0, -0.1, math.nan])
def test_exo_pair_refuses_a_certain_label(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing is .* between 0 and 1"):
        exo_pair_loss(one(0.0), one(0.0), label_smoothing=label_smoothing)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (DPO, "label_smoothing", 0.5),
        (DPO, "label_smoothing", -0.1),
        (DPO, "beta", 0.0),
        (DPO, "pairing", "best_vs_second"),
        (DPO, "gamma", 1.0),
        (RPO, "nll_weight", -1.0),
        (CPO, "nll_weight", -1.0),
        (SimPO, "gamma", -1.0),
        (EXOPair, "label_smoothing", 0.0),
        (EXOPair, "label_smoothing", 0.5),
        (RewardAwareRPO, "eta", 0.0),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: type[PairConfig], field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        config.model_validate({field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


@pytest.mark.parametrize("config", [RPO, CPO])
def test_an_anchor_needs_one_chosen_completion(config: type[RPO] | type[CPO]) -> None:
    with pytest.raises(ValueError, match="all_pairs has no single chosen completion to anchor: use best_vs_each"):
        config(pairing="all_pairs").method()


@configs
def test_groups_without_a_preference_are_refused(config: type[PairConfig]) -> None:
    refuse = config().method().refuse
    assert refuse([0.5, 0.5]) == "all rewards equal"
    assert refuse([0.5]) == "only one candidate"
    assert refuse([0.5, 0.1]) is None


@pytest.mark.parametrize("config", [DPO(pairing="all_pairs"), REBEL(), LiPOLambda()], ids=lambda config: config.name)
def test_all_pairs_of_very_many_candidates_are_refused(config: DPO | REBEL | LiPOLambda) -> None:
    refuse = config.method().refuse
    assert refuse([float(k % 2) for k in range(2000)]) is None
    assert "more than 2000 candidates, whose pairs are too many" in str(refuse([float(k % 2) for k in range(2001)]))

"""APO, DPOP and Cal-DPO: values derived by hand, gradients, extremes, TRL's own code, reductions, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from loss_inputs import inputs_of_one_token
from ncalign.objectives.anchored import DPOP, APODown, APOZero, CalDPO, apo_down_loss, apo_zero_loss, cal_dpo_loss, dpop_loss
from ncalign.objectives.binary import kto_loss
from ncalign.objectives.config import Pairing
from ncalign.objectives.method import PairConfig
from ncalign.objectives.pairs import DPO, dpo_loss
from ncalign.objectives.regression import sppo_hard_loss
from trl_losses import Groups, assert_trls, dpo_trainer, ours, random_groups

PairLoss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, PairLoss] = {
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "dpop": partial(dpop_loss, penalty=5.0),
    "cal_dpo": partial(cal_dpo_loss, beta=0.5),
}
losses = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in LOSSES.items()])
configs = pytest.mark.parametrize("config", [APOZero, APODown, DPOP, CalDPO])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def gradients_of(loss: PairLoss, chosen: float, rejected: float) -> tuple[float, float]:
    """Slopes in the chosen and in the rejected implicit reward."""
    sides = one(chosen).requires_grad_(), one(rejected).requires_grad_()
    found = torch.autograd.grad(loss(*sides).sum(), sides)
    return found[0].item(), found[1].item()


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0.3, -1.2), (-0.4, 0.9), (-2.0, -3.0)])
def test_values_derived_by_hand(a: float, b: float) -> None:
    chosen, rejected, beta = one(a), one(b), 0.4
    shortfall = 2.5 * max(0.0, -a)
    calibration = (a / beta - 1 / (2 * beta)) ** 2 + (b / beta + 1 / (2 * beta)) ** 2
    expected = {
        "apo_zero": (apo_zero_loss(chosen, rejected), 1 - sigmoid(a) + sigmoid(b)),
        "apo_down": (apo_down_loss(chosen, rejected), sigmoid(a) + 1 - sigmoid(a - b)),
        "dpop": (dpop_loss(chosen, rejected, penalty=2.5), -math.log(sigmoid(a - b - shortfall))),
        "cal_dpo": (cal_dpo_loss(chosen, rejected, beta=beta), -math.log(sigmoid((a - b) / beta)) + calibration / 2),
    }
    for name, (found, value) in expected.items():
        assert found.item() == pytest.approx(value, abs=1e-12), name


def test_slopes_by_hand() -> None:
    a, b = -0.4, 0.9
    p, q, d = sigmoid(a), sigmoid(b), sigmoid(a - b)
    assert gradients_of(apo_zero_loss, a, b) == pytest.approx((-p * (1 - p), q * (1 - q)), abs=1e-12)
    assert gradients_of(apo_down_loss, a, b) == pytest.approx((p * (1 - p) - d * (1 - d), d * (1 - d)), abs=1e-12)
    # Below its reference the chosen completion is pulled up 1 + penalty times as hard as the rejected one is pushed down.
    push = sigmoid(-(a - b + 2.5 * a))
    dpop = partial(dpop_loss, penalty=2.5)
    assert gradients_of(dpop, a, b) == pytest.approx((-3.5 * push, push), abs=1e-12)
    assert gradients_of(dpop, 0.4, 0.9) == pytest.approx((-sigmoid(0.5), sigmoid(0.5)), abs=1e-12)


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
    for gradient in torch.autograd.grad(value.sum(), (chosen, rejected)):
        assert gradient.isfinite().all()


def test_extremes_by_hand() -> None:
    right, wrong = (one(1e4), one(-1e4)), (one(-1e4), one(1e4))
    assert (apo_zero_loss(*right).item(), apo_zero_loss(*wrong).item()) == (0.0, 2.0)
    assert (apo_down_loss(*right).item(), apo_down_loss(*wrong).item()) == (1.0, 1.0)
    assert apo_down_loss(one(-1e4), one(-3e4)).item() == 0.0
    assert dpop_loss(*right, penalty=50.0).item() == 0.0
    assert dpop_loss(*wrong, penalty=50.0).item() == 2e4 + 50 * 1e4
    # Half of twice ((1e4 + 1/2) / beta)^2, and the log-ratios' difference 2e4 / beta.
    assert cal_dpo_loss(*wrong, beta=0.5).item() == (2e4 + 1) ** 2 + 4e4


@losses
def test_half_precision_is_computed_in_float32(loss: PairLoss) -> None:
    chosen, rejected = numbers(4, dtype=torch.bfloat16), numbers(4, seed=1, dtype=torch.bfloat16)
    value = loss(chosen, rejected)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(chosen.double(), rejected.double()).float(), rtol=2e-6, atol=1e-6)


# --- TRL's own code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["best_vs_worst", "best_vs_each", "all_pairs"])
@pytest.mark.parametrize("config", [APOZero, APODown])
def test_apo_is_trls(config: type[APOZero] | type[APODown], pairing: Pairing) -> None:
    name = config.model_fields["name"].default
    assert_trls(config(beta=0.3, pairing=pairing), dpo_trainer([name], pairing=pairing, beta=0.3), random_groups())


def test_cal_dpo_at_beta_one_is_trls_sigmoid_and_half_of_sppo_hard() -> None:
    """Its calibration is half of SPPO's loss; TRL has one beta for both terms, and Cal-DPO none in the first."""
    theirs = dpo_trainer(["sigmoid", "sppo_hard"], weights=[1.0, 0.5], pairing="best_vs_each", beta=1.0)
    assert_trls(CalDPO(beta=1.0, pairing="best_vs_each"), theirs, random_groups())


@pytest.mark.parametrize("beta", [0.1, 0.001])
def test_cal_dpo_is_its_authors(beta: float) -> None:
    """Their code at log-ratios 1 and -1: log(1 + e^-2) without beta, and half of two squares; 16.127 at beta = .1."""
    expected = math.log1p(math.exp(-2)) + 0.5 * ((1 - 1 / (2 * beta)) ** 2 + (-1 + 1 / (2 * beta)) ** 2)
    log_ratios = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    group = inputs_of_one_token(log_ratios, log_ratios, torch.ones(1, 2, dtype=torch.bool))
    assert CalDPO(beta=beta).method().loss(group).item() == pytest.approx(expected, rel=1e-12)
    if beta == 0.1:
        assert expected == pytest.approx(16.127, abs=5e-4)


# --- Reductions -------------------------------------------------------------------------------------------------------


def test_dpop_without_penalty_or_above_the_reference_is_dpo() -> None:
    chosen, rejected = numbers(8), numbers(8, seed=1)
    close(dpop_loss(chosen, rejected, penalty=0.0), dpo_loss(chosen, rejected))
    close(dpop_loss(chosen.abs(), rejected, penalty=50.0), dpo_loss(chosen.abs(), rejected))
    assert (dpop_loss(-chosen.abs(), rejected, penalty=1.0) > dpo_loss(-chosen.abs(), rejected)).all()
    group = inputs_of_one_token(torch.stack([chosen, rejected], dim=1), numbers(8, 2), torch.ones(8, 2, dtype=torch.bool))
    close(DPOP(beta=0.3, penalty=0.0).method().loss(group), DPO(beta=0.3).method().loss(group))


def test_cal_dpo_is_dpo_of_log_ratios_and_half_of_sppo() -> None:
    chosen, rejected = numbers(8), numbers(8, seed=1)
    expected = dpo_loss(chosen / 0.3, rejected / 0.3) + 0.5 * sppo_hard_loss(chosen, rejected, beta=0.3)
    close(cal_dpo_loss(chosen, rejected, beta=0.3), expected)


def test_apo_zero_is_twice_kto_without_a_reference_point() -> None:
    chosen, rejected = numbers(8), numbers(8, seed=1)
    labels = torch.tensor([[True, False]]).expand(8, 2)
    pairs = torch.stack([chosen, rejected], dim=1)
    kto = kto_loss(pairs, labels, torch.ones_like(labels), baseline=0.0)
    close(apo_zero_loss(chosen, rejected), 2 * kto)


def test_apo_down_is_apo_zero_of_the_chosen_taken_down_and_the_difference_taken_up() -> None:
    chosen, rejected = numbers(8), numbers(8, seed=1)
    close(apo_down_loss(chosen, rejected), apo_zero_loss(chosen - rejected, chosen))


@losses
def test_the_level_matters_unlike_in_dpo(loss: PairLoss) -> None:
    chosen, rejected = -numbers(8).abs(), numbers(8, seed=1)
    close(dpo_loss(chosen - 1, rejected - 1), dpo_loss(chosen, rejected))
    assert ((loss(chosen - 1, rejected - 1) - loss(chosen, rejected)).abs() > 1e-3).all()


def test_every_field_reaches_the_loss() -> None:
    r = numbers(8, 2)
    group = inputs_of_one_token(r, numbers(8, 2, seed=1), torch.ones(8, 2, dtype=torch.bool))
    chosen, rejected = 0.5 * r[:, 0], 0.5 * r[:, 1]
    close(APOZero(beta=0.5).method().loss(group), apo_zero_loss(chosen, rejected))
    close(APODown(beta=0.5).method().loss(group), apo_down_loss(chosen, rejected))
    close(DPOP(beta=0.5, penalty=7.0).method().loss(group), dpop_loss(chosen, rejected, penalty=7.0))
    close(CalDPO(beta=0.5).method().loss(group), cal_dpo_loss(chosen, rejected, beta=0.5))


@configs
def test_pairings_average_over_their_pairs(config: type[PairConfig]) -> None:
    groups = random_groups(num_candidates=3)
    ranked = Groups(groups.tokens, groups.reference, groups.mask, groups.rewards.sort(dim=1, descending=True).values)

    def of(*columns: int) -> Tensor:
        return ours(config(), Groups(*(value[:, list(columns)] for value in vars(ranked).values())))

    close(ours(config(pairing="best_vs_each"), ranked), (of(0, 1) + of(0, 2)) / 2)
    close(ours(config(pairing="best_vs_worst"), ranked), of(0, 2))
    close(ours(config(pairing="all_pairs"), ranked), (of(0, 1) + of(0, 2) + of(1, 2)) / 3)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (DPOP, "penalty", -1.0),
        (DPOP, "beta", 0.0),
        (CalDPO, "beta", -0.1),
        (APOZero, "penalty", 1.0),
        (APODown, "beta", math.nan),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: type[PairConfig], field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        config.model_validate({field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


@configs
def test_groups_without_a_preference_are_refused(config: type[PairConfig]) -> None:
    refuse = config().method().refuse
    assert refuse([0.5, 0.5]) == "all rewards equal"
    assert refuse([0.5]) == "only one candidate"
    assert refuse([0.5, 0.1]) is None

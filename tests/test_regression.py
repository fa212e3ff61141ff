"""IPO, SPPO, REBEL and QRPO: values derived by hand, gradients, extremes, TRL's own code, optima, quantiles, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from loss_inputs import inputs_of_one_token
from ncalign.core.config import Frozen
from ncalign.objectives.config import Pairing
from ncalign.objectives.method import LossInputs
from ncalign.objectives.regression import (
    IPO,
    QRPO,
    REBEL,
    SPPOHard,
    candidates_log_partition,
    ipo_loss,
    log_partition,
    qrpo_loss,
    quantile_rewards,
    rebel_loss,
    reference_quantiles,
    sppo_hard_loss,
)
from ncalign.objectives.targets import ranks
from trl_losses import Groups, assert_trls, dpo_trainer, ours, random_groups

PairLoss = Callable[[Tensor, Tensor], Tensor]
GroupLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
PAIR_LOSSES: dict[str, PairLoss] = {"ipo": partial(ipo_loss, beta=0.5), "sppo_hard": partial(sppo_hard_loss, beta=0.5)}
GROUP_LOSSES: dict[str, GroupLoss] = {"rebel": rebel_loss, "qrpo": partial(qrpo_loss, beta=0.5)}
pair_losses = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in PAIR_LOSSES.items()])
group_losses = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in GROUP_LOSSES.items()])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def real(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def gradient_of(value: Tensor, of: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value.sum(), of)
    return gradient


# --- Values -----------------------------------------------------------------------------------------------------------


def test_values_derived_by_hand() -> None:
    a, b, c, beta = 0.3, -1.2, 0.8, 0.4
    r, mask = row(a, b, c), real(1, 3)
    log_z = math.log(beta * (math.exp(1 / beta) - 1))
    expected = {
        "ipo": (ipo_loss(one(a), one(b), beta=beta), ((a - b) / beta - 1 / (2 * beta)) ** 2),
        "sppo_hard": (
            sppo_hard_loss(one(a), one(b), beta=beta),
            (a / beta - 1 / (2 * beta)) ** 2 + (b / beta + 1 / (2 * beta)) ** 2,
        ),
        # Rewards 2, 1 and 4: the pairs (a, b), (c, a) and (c, b).
        "rebel": (rebel_loss(r, row(2.0, 1.0, 4.0), mask), ((a - b - 1) ** 2 + (c - a - 2) ** 2 + (c - b - 3) ** 2) / 3),
        # A tie makes no pair.
        "rebel with a tie": (rebel_loss(r, row(2.0, 1.0, 2.0), mask), ((a - b - 1) ** 2 + (c - b - 1) ** 2) / 2),
        "qrpo": (
            qrpo_loss(r, row(0.5, 0.0, 1.0), mask, beta=beta),
            sum((q - beta * log_z - x) ** 2 for q, x in ((0.5, a), (0.0, b), (1.0, c))) / 3,
        ),
    }
    for name, (found, value) in expected.items():
        assert found.item() == pytest.approx(value, abs=1e-11), name


@pytest.mark.parametrize("beta", [0.05, 0.5, 1.0, 1.0001, 3.0])
def test_the_partition_function_is_its_integral(beta: float) -> None:
    """Midpoint rule with n steps: off by h^2 / 24 times the integral of the second derivative, a share h^2 / (24 beta^2)."""
    num = 20_000
    mean = sum(math.exp(((i + 0.5) / num - 1) / beta) for i in range(num)) / num
    error = 1 / (24 * num**2 * beta**2)
    assert log_partition(beta) == pytest.approx(math.log(mean) + 1 / beta, abs=2 * error + 1e-13 / beta)


def test_the_partition_function_at_its_ends() -> None:
    # Towards 0 the best quantile is all: beta e^(1 / beta). Towards infinity e^(1 / (2 beta)), the mean quantile's.
    assert log_partition(1e-4) == pytest.approx(1e4 + math.log(1e-4), rel=1e-15)
    assert log_partition(1e3) == pytest.approx(1 / 2e3 + 1 / 24e6, abs=1e-12)
    assert log_partition(1.0) == pytest.approx(log_partition(1.0 + 1e-12), abs=1e-11)


# --- Gradients and extremes -------------------------------------------------------------------------------------------


@pair_losses
def test_gradient_of_pair_losses(loss: PairLoss) -> None:
    pair = (numbers(5).requires_grad_(), numbers(5, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(loss, pair, atol=1e-8)


@group_losses
def test_gradient_of_group_losses(loss: GroupLoss) -> None:
    rewards, mask = numbers(3, 4, seed=1).sigmoid(), torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    assert torch.autograd.gradcheck(lambda r: loss(r, rewards, mask), (numbers(3, 4).requires_grad_(),), atol=1e-8)


@pair_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite_in_pairs(loss: PairLoss, dtype: torch.dtype) -> None:
    chosen = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 1e4, 1e4, -1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    value = loss(chosen, rejected)
    assert value.dtype == dtype
    assert value.isfinite().all()
    for gradient in torch.autograd.grad(value.sum(), (chosen, rejected)):
        assert gradient.isfinite().all()


@group_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_stay_finite_in_groups(loss: GroupLoss, dtype: torch.dtype, size: float) -> None:
    r = torch.tensor([[size, -size, 0.0], [-size, size, size]], dtype=dtype, requires_grad=True)
    value = loss(r, torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype).expand(2, 3), real(2, 3))
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert gradient_of(value, r).isfinite().all()


def test_extremes_by_hand() -> None:
    right, wrong = (one(1e4), one(-1e4)), (one(-1e4), one(1e4))
    # Squares: too much of the right difference costs as well.
    assert ipo_loss(*right, beta=0.5).item() == (4e4 - 1) ** 2
    assert ipo_loss(*wrong, beta=0.5).item() == (4e4 + 1) ** 2
    assert sppo_hard_loss(*right, beta=0.5).item() == 2 * (2e4 - 1) ** 2
    assert rebel_loss(row(-1e4, 1e4), row(1e4, -1e4), real(1, 2)).item() == 4e4**2
    assert rebel_loss(row(1e4, -1e4), row(1e4, -1e4), real(1, 2)).item() == 0.0


@pair_losses
def test_half_precision_is_computed_in_float32(loss: PairLoss) -> None:
    chosen, rejected = numbers(4, dtype=torch.bfloat16), numbers(4, seed=1, dtype=torch.bfloat16)
    value = loss(chosen, rejected)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(chosen.double(), rejected.double()).float(), rtol=2e-6, atol=1e-6)


@group_losses
def test_half_precision_of_groups_is_computed_in_float32(loss: GroupLoss) -> None:
    r, rewards = numbers(4, 3, dtype=torch.bfloat16), numbers(4, 3, seed=1)
    value = loss(r, rewards, real(4, 3))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(r.double(), rewards, real(4, 3)).float(), rtol=2e-6, atol=1e-6)


# --- TRL's own code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["best_vs_worst", "best_vs_each", "all_pairs"])
@pytest.mark.parametrize(("name", "config"), [("ipo", IPO), ("sppo_hard", SPPOHard)])
def test_ipo_and_sppo_are_trls(name: str, config: type[IPO] | type[SPPOHard], pairing: Pairing) -> None:
    theirs = dpo_trainer([name], pairing=pairing, beta=0.3)
    assert_trls(config(beta=0.3, pairing=pairing), theirs, random_groups())


def test_the_papers_ipo_is_trls_where_completions_have_one_token() -> None:
    """Summed log-ratios and a token's means are then the same; elsewhere they are not."""
    theirs = dpo_trainer(["ipo"], pairing="best_vs_each", beta=0.3)
    config = IPO(beta=0.3, pairing="best_vs_each", length_normalized=False)
    assert_trls(config, theirs, random_groups(num_tokens=1))
    assert (ours(config, random_groups()) - theirs(random_groups())).abs().min() > 1e-3


# --- Optima and reductions --------------------------------------------------------------------------------------------


def test_ipo_has_one_best_difference_and_no_level() -> None:
    level = numbers(8)
    chosen = (level + 0.5).requires_grad_()
    value = ipo_loss(chosen, level, beta=0.1)
    close(value, torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(gradient_of(value, chosen), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12)


def test_sppo_has_one_best_level_at_twice_ipos_difference() -> None:
    optimum = row(0.5, -0.5).requires_grad_()
    value = sppo_hard_loss(optimum[:, 0], optimum[:, 1], beta=0.1)
    assert value.item() == 0.0
    assert gradient_of(value, optimum).tolist() == [[0.0, 0.0]]
    # There the difference is 1, and IPO wants 1/2.
    assert ipo_loss(one(0.5), one(-0.5), beta=0.1).item() == pytest.approx((0.5 / 0.1) ** 2, rel=1e-12)


def test_sppo_is_ipo_at_twice_the_difference_and_a_square_of_the_level() -> None:
    """(w - 1/2)^2 + (l + 1/2)^2 = ((w - l - 1)^2 + (w + l)^2) / 2."""
    chosen, rejected, beta = numbers(8), numbers(8, seed=1), 0.5
    expected = 2 * ipo_loss(chosen / 2, rejected / 2, beta=beta) + ((chosen + rejected) / beta).square() / 2
    close(sppo_hard_loss(chosen, rejected, beta=beta), expected)


def test_rebel_of_two_whose_rewards_differ_by_a_half_is_ipo() -> None:
    r, beta = numbers(8, 2), 0.5
    found = rebel_loss(r, row(0.5, 0.0).expand(8, 2), real(8, 2))
    close(found / beta**2, ipo_loss(r[:, 0], r[:, 1], beta=beta))


def test_rebel_is_zero_and_flat_exactly_at_its_optimum() -> None:
    rewards, mask = numbers(8, 4), real(8, 4)
    r = (rewards + numbers(8, 1, seed=1)).requires_grad_()
    value = rebel_loss(r, rewards, mask)
    close(value, torch.zeros(8, dtype=torch.float64))
    close(gradient_of(value, r), torch.zeros(8, 4, dtype=torch.float64))
    assert (rebel_loss(r + numbers(8, 4, seed=2), rewards, mask) > 1e-3).all()


def test_rebel_is_the_mean_of_rebel_over_the_pairs() -> None:
    r, rewards = numbers(8, 3), numbers(8, 3, seed=1)
    pairs = [rebel_loss(r[:, pair], rewards[:, pair], real(8, 2)) for pair in ([0, 1], [0, 2], [1, 2])]
    close(rebel_loss(r, rewards, real(8, 3)), sum(pairs) / 3)


def test_qrpo_is_zero_and_flat_exactly_at_its_optimum() -> None:
    quantiles, mask, beta = numbers(8, 4).sigmoid(), real(8, 4), 0.3
    r = (quantiles - beta * math.log(beta * (math.exp(1 / beta) - 1))).requires_grad_()
    value = qrpo_loss(r, quantiles, mask, beta=beta)
    close(value, torch.zeros(8, dtype=torch.float64))
    close(gradient_of(value, r), torch.zeros(8, 4, dtype=torch.float64))
    close(qrpo_loss(r + 0.5, quantiles, mask, beta=beta), torch.full((8,), 0.25, dtype=torch.float64))


def test_qrpos_optimum_is_a_distribution() -> None:
    """The reference's completions have uniform quantiles: the mean of policy / reference = e^(r / beta) is 1 there."""
    num, beta = 10_000, 0.3
    quantiles = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    optimum = quantiles / beta - log_partition(beta)
    # The midpoint rule's share of error: 1 / (24 n^2 beta^2).
    assert optimum.exp().mean().item() == pytest.approx(1.0, abs=1e-8)


def test_qrpo_takes_each_candidate_by_itself() -> None:
    r, quantiles = numbers(8, 3), numbers(8, 3, seed=1).sigmoid()
    alone = qrpo_loss(r.reshape(24, 1), quantiles.reshape(24, 1), real(24, 1), beta=0.3).reshape(8, 3)
    close(qrpo_loss(r, quantiles, real(8, 3), beta=0.3), alone.mean(dim=1))


# --- Methods ----------------------------------------------------------------------------------------------------------


def test_what_each_method_compares_by_hand() -> None:
    # Log-ratios 0.6 and -0.8 of 3 and 4 tokens, the first one better by 1/4.
    group = LossInputs(row(0.6, -0.8), row(-6.0, -9.0), row(0.75, 0.5), row(3.0, 4.0), real(1, 2))
    aim = 1 / (2 * 0.4)
    log_z, of_two = math.log(0.4 * (math.exp(1 / 0.4) - 1)), 0.4 * math.log((math.exp(1 / 0.4) + 1) / 2)
    expected: dict[Frozen, float] = {
        IPO(beta=0.4): (0.2 + 0.2 - aim) ** 2,
        IPO(beta=0.4, length_normalized=False): (0.6 + 0.8 - aim) ** 2,
        SPPOHard(beta=0.4): (0.6 - aim) ** 2 + (-0.8 + aim) ** 2,
        REBEL(beta=0.4): (0.4 * 1.4 - 0.25) ** 2,
        QRPO(beta=0.4): ((0.75 - 0.4 * log_z - 0.24) ** 2 + (0.5 - 0.4 * log_z + 0.32) ** 2) / 2,
        # The better of two is at quantile 1, the other at 0.
        QRPO(beta=0.4, reference_rewards="candidates"): ((1 - of_two - 0.24) ** 2 + (-of_two + 0.32) ** 2) / 2,
    }
    for config, value in expected.items():
        assert config.method().loss(group).item() == pytest.approx(value, abs=1e-12), config


@pytest.mark.parametrize("config", [IPO, SPPOHard])
def test_pairings_average_over_their_pairs(config: type[IPO] | type[SPPOHard]) -> None:
    groups = random_groups(num_candidates=3)
    ranked = Groups(groups.tokens, groups.reference, groups.mask, groups.rewards.sort(dim=1, descending=True).values)

    def of(*columns: int) -> Tensor:
        return ours(config(), Groups(*(value[:, list(columns)] for value in vars(ranked).values())))

    close(ours(config(pairing="best_vs_each"), ranked), (of(0, 1) + of(0, 2)) / 2)
    close(ours(config(pairing="best_vs_worst"), ranked), of(0, 2))
    close(ours(config(pairing="all_pairs"), ranked), (of(0, 1) + of(0, 2) + of(1, 2)) / 3)


def test_qrpo_among_the_candidates_uses_their_quantiles() -> None:
    r, rewards = numbers(8, 4), 5 * numbers(8, 4, seed=1)
    found = QRPO(beta=1.0, reference_rewards="candidates").method()
    log_z = torch.full((8, 1), math.log(sum(math.exp(k / 3) for k in range(4)) / 4), dtype=torch.float64)
    close(
        found.loss(inputs_of_one_token(r, rewards, real(8, 4))),
        qrpo_loss(r, ranks(rewards, real(8, 4)), real(8, 4), beta=1.0, log_z=log_z),
    )
    assert found.hooks.rewards_from is None
    assert found.refuse([0.5, 0.5]) == "all rewards equal"
    assert found.refuse([0.5]) == "only one candidate"


@pytest.mark.parametrize("mask", [[True] * 4, [True, True, False, False], [True, False, True, True]])
@pytest.mark.parametrize("rewards", [[3.0, 1.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0]], ids=["distinct", "tied"])
def test_qrpos_optimum_among_candidates_is_a_distribution_over_them(rewards: list[float], mask: list[bool]) -> None:
    """The reference gave each of the K: the mean over them of policy / reference = e^(r / beta) is 1 at the optimum."""
    beta, real_ones = 0.1, torch.tensor([mask])
    quantiles = ranks(row(*rewards), real_ones)
    optimum = (quantiles - beta * candidates_log_partition(quantiles, real_ones, beta=beta)).requires_grad_()
    value = (
        QRPO(beta=beta, reference_rewards="candidates")
        .method()
        .loss(inputs_of_one_token(optimum / beta, row(*rewards), real_ones))
    )
    assert value.item() == pytest.approx(0, abs=1e-24)
    assert (optimum / beta).exp()[real_ones].mean().item() == pytest.approx(1, abs=1e-12)


def test_the_partition_function_of_k_candidates_tends_to_that_of_uniform_quantiles() -> None:
    def of(size: int, beta: float) -> float:
        quantiles = torch.arange(size, dtype=torch.float64).unsqueeze(0) / (size - 1)
        return candidates_log_partition(quantiles, real(1, size), beta=beta).item()

    # Four candidates, beta = .1: quantiles 0, 1/3, 2/3 and 1, against the integral.
    assert of(4, 0.1) == pytest.approx(math.log(sum(math.exp(10 * k / 3) for k in range(4)) / 4), abs=1e-12)
    assert (of(4, 0.1), log_partition(0.1)) == (pytest.approx(8.65, abs=5e-3), pytest.approx(7.70, abs=5e-3))
    gaps = [of(size, 0.1) - log_partition(0.1) for size in (4, 40, 400, 4000)]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[-1] < 2e-3


def test_qrpo_is_its_authors_and_sppo_half_of_theirs() -> None:
    """Their QRPO of two completions, whose log Z leaves out log(1 - e^(-1/beta)); their SPPO at certain preferences."""
    rewards, reference_rewards, log_ratios, beta = [0.3, 0.9], [0.1, 0.3, 0.5], [0.6, -0.8], 0.1
    group = {"reference_rewards": reference_rewards}
    quantiles = QRPO(beta=beta).method().hooks.rewards_from(rewards, group)
    shares = [sum(other <= reward for other in reference_rewards) / 3 for reward in rewards]
    theirs = [(q - beta * (math.log(beta) + 1 / beta) - beta * x) ** 2 for q, x in zip(shares, log_ratios, strict=True)]
    inputs = inputs_of_one_token(row(*log_ratios), row(*quantiles), real(1, 2))
    assert QRPO(beta=beta).method().loss(inputs).item() == pytest.approx(sum(theirs) / 2, abs=2 * math.exp(-1 / beta) * beta)
    chosen, rejected = (log_ratios[0] - (1 - 0.5) / beta) ** 2, (log_ratios[1] - (0 - 0.5) / beta) ** 2
    assert SPPOHard(beta=beta).method().loss(inputs).item() == pytest.approx(2 * (chosen + rejected) / 2, abs=1e-12)


def test_qrpo_with_reference_rewards_takes_any_group() -> None:
    method = QRPO().method()
    assert method.sampler is None
    for rewards in ([0.5], [0.5, 0.5], [0.5, 0.1]):
        assert method.refuse(rewards) is None
    assert method.hooks.rewards_from is not None
    assert method.hooks.rewards_from([3.0, 1.0], {"reference_rewards": [1.0, 2.0, 3.0, 4.0]}) == [3 / 4, 1 / 4]
    # One candidate is enough.
    assert method.loss(inputs_of_one_token(row(0.3), row(0.5), real(1, 1))).item() > 0


# --- Quantiles --------------------------------------------------------------------------------------------------------


def test_quantiles_by_hand() -> None:
    # A reward equal to reference rewards beats these too.
    assert quantile_rewards([2.0, 1.9, 0.0, 9.0], [1.0, 2.0, 2.0, 3.0, 5.0]) == [3 / 5, 1 / 5, 0.0, 1.0]
    assert quantile_rewards([2.0, 1.0], [2.0]) == [1.0, 0.0]
    assert quantile_rewards([], [1.0]) == []


def test_quantiles_depend_on_order_alone() -> None:
    rewards, reference = numbers(1, 6)[0].tolist(), numbers(1, 9, seed=1)[0].tolist()
    expected = quantile_rewards(rewards, reference)
    assert quantile_rewards([math.exp(value) for value in rewards], [math.exp(value) for value in reference]) == expected
    assert quantile_rewards(rewards, reference[::-1]) == expected


def test_reference_quantiles_reads_the_groups_own_metadata() -> None:
    assert reference_quantiles([0.5, 1.0], {"reference_rewards": [0.0, 1.0, 0.5, 2.5], "source": "x"}) == [2 / 4, 3 / 4]


def test_missing_reference_rewards_are_refused() -> None:
    for metadata in ({}, {"reference_rewards": None}):
        with pytest.raises(ValueError, match="no reference_rewards in the metadata"):
            reference_quantiles([0.5], metadata)


@pytest.mark.parametrize("given", [[], 0.5, "0.5", ["0.5"], [0.5, None], [True, False], {"a": 0.5}, (0.5, 0.6)])
def test_reference_rewards_that_are_no_numbers_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match="not a list of at least one number"):
        reference_quantiles([0.5], {"reference_rewards": given})


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (IPO, "beta", 0.0),
        (IPO, "length_normalized", "perhaps"),
        (SPPOHard, "beta", -1.0),
        (REBEL, "beta", 0.0),
        (REBEL, "pairing", "best_vs_one"),
        (QRPO, "beta", 0.0),
        (QRPO, "reference_rewards", "none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: type[Frozen], field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        config.model_validate({field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


@pytest.mark.parametrize("config", [IPO, SPPOHard, REBEL])
def test_groups_without_a_preference_are_refused(config: type[IPO] | type[SPPOHard] | type[REBEL]) -> None:
    refuse = config().method().refuse
    assert refuse([0.5, 0.5]) == "all rewards equal"
    assert refuse([0.5]) == "only one candidate"
    assert refuse([0.5, 0.1]) is None

"""The losses by themselves: values derived by hand, gradients, masks, extremes, precision; and the methods built from them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ncalign.objectives import (
    DPO,
    MCPO,
    NCA,
    RNCE,
    InfoNCA,
    NCAPair,
    ObjectiveConfig,
    build_method,
    dpo_loss,
    info_nca_loss,
    mean_over_negatives,
    mean_over_pairs,
    nca_loss,
    nca_pair_loss,
    rnce_loss,
    target_weights,
)
from ncalign.objectives.method import LossInputs

GroupLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def best(rewards: Tensor, mask: Tensor) -> Tensor:
    """Column of the highest reward, -1 for an empty group; rewards are distinct wherever this is used."""
    values = torch.where(mask, rewards, -torch.inf)
    return torch.where(mask.any(dim=1), values.argmax(dim=1), -1)


def dpo_best_vs_each_loss(r: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """DPO of the positive against all others: the lift takes the positive first, so it is moved there."""
    places = torch.arange(r.shape[1]).expand_as(r)
    order = torch.where(places == positive.unsqueeze(1), -1, places).argsort(dim=1, stable=True)
    present = mask.gather(1, order) & (positive >= 0).unsqueeze(1)
    return mean_over_negatives(dpo_loss)(r.gather(1, order), r.gather(1, order), present)


dpo_all_pairs_loss = mean_over_pairs(dpo_loss)


# Every loss of whole groups in one form.
GROUP_LOSSES: dict[str, GroupLoss] = {
    "rnce": lambda r, rewards, mask: rnce_loss(r, best(rewards, mask), mask),
    "info_nca": lambda r, rewards, mask: info_nca_loss(r, rewards, mask, alpha=0.7),
    "nca": lambda r, rewards, mask: nca_loss(r, rewards, mask, alpha=0.7),
    "dpo_best_vs_each": lambda r, rewards, mask: dpo_best_vs_each_loss(r, best(rewards, mask), mask),
    "dpo_all_pairs": dpo_all_pairs_loss,
}
group_losses = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in GROUP_LOSSES.items()])
pair_losses = pytest.mark.parametrize("loss", [dpo_loss, nca_pair_loss])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def real(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_values_derived_by_hand() -> None:
    a, b, c = 0.3, -1.2, 0.8
    r, rewards, mask = row(a, b, c), row(2.0, 1.0, 0.0), real(1, 3)
    first = torch.tensor([0])
    total = math.exp(a) + math.exp(b) + math.exp(c)
    # With alpha = 1 / log 2 the weights are 4 : 2 : 1.
    w = (4 / 7, 2 / 7, 1 / 7)
    alpha = 1 / math.log(2)
    expected = {
        "rnce": (rnce_loss(r, first, mask), -a + math.log(total)),
        "info_nca": (
            info_nca_loss(r, rewards, mask, alpha=alpha),
            math.log(total) - w[0] * a - w[1] * b - w[2] * c,
        ),
        "nca": (
            nca_loss(r, rewards, mask, alpha=alpha),
            -sum(wi * math.log(sigmoid(x)) + math.log(sigmoid(-x)) / 3 for wi, x in zip(w, (a, b, c), strict=True)),
        ),
        "best_vs_each": (
            dpo_best_vs_each_loss(r, first, mask),
            -(math.log(sigmoid(a - b)) + math.log(sigmoid(a - c))) / 2,
        ),
        "all_pairs": (
            dpo_all_pairs_loss(r, rewards, mask),
            -(math.log(sigmoid(a - b)) + math.log(sigmoid(a - c)) + math.log(sigmoid(b - c))) / 3,
        ),
        "dpo": (dpo_loss(r[:, 0], r[:, 1]), -math.log(sigmoid(a - b))),
        "nca_pair": (
            nca_pair_loss(r[:, 0], r[:, 1]),
            -math.log(sigmoid(a)) - 0.5 * math.log(sigmoid(-a)) - 0.5 * math.log(sigmoid(-b)),
        ),
    }
    for name, (found, value) in expected.items():
        assert found.item() == pytest.approx(value, abs=1e-12), name


def test_target_weights_by_hand() -> None:
    rewards = row(math.log(4.0), math.log(2.0), 0.0)
    torch.testing.assert_close(target_weights(rewards, real(1, 3), alpha=1.0), row(4 / 7, 2 / 7, 1 / 7))
    torch.testing.assert_close(target_weights(rewards, real(1, 3), alpha=0.5), row(16 / 21, 4 / 21, 1 / 21))


def test_target_weights_of_tied_best_candidates_are_shared_however_small_alpha_is() -> None:
    rewards = torch.tensor([[1e30, 1e30, -1e30]])
    assert target_weights(rewards, real(1, 3), alpha=1e-30).tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_alpha_must_be_above_zero(alpha: float) -> None:
    r = torch.zeros(1, 2)
    for loss in (info_nca_loss, nca_loss):
        with pytest.raises(ValueError, match=r"alpha is .* number above 0"):
            loss(r, r, real(1, 2), alpha=alpha)


@group_losses
def test_gradient_of_group_losses(loss: GroupLoss) -> None:
    r, rewards = numbers(3, 4).requires_grad_(), numbers(3, 4, seed=1)
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    assert torch.autograd.gradcheck(lambda x: loss(x, rewards, mask), (r,), atol=1e-8)


@pair_losses
def test_gradient_of_pair_losses(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    chosen, rejected = numbers(5).requires_grad_(), numbers(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (chosen, rejected), atol=1e-8)


@group_losses
def test_a_permutation_of_the_candidates_changes_nothing(loss: GroupLoss) -> None:
    r, rewards = numbers(6, 5), numbers(6, 5, seed=1)
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(loss(r[:, order], rewards[:, order], mask[:, order]), loss(r, rewards, mask), rtol=0, atol=1e-12)


@group_losses
@pytest.mark.parametrize("junk", [0.0, 1e4, math.nan, math.inf, -math.inf])
def test_padding_reaches_neither_value_nor_gradient(loss: GroupLoss, junk: float) -> None:
    r, rewards = numbers(4, 3), numbers(4, 3, seed=1)
    padding = torch.full((4, 2), junk, dtype=torch.float64)
    plain, padded = r.clone().requires_grad_(), torch.cat([padding, r], dim=1).requires_grad_()
    mask = torch.cat([~real(4, 2), real(4, 3)], dim=1)
    value, padded_value = loss(plain, rewards, real(4, 3)), loss(padded, torch.cat([padding, rewards], dim=1), mask)
    torch.testing.assert_close(padded_value, value, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), plain)
    (padded_gradient,) = torch.autograd.grad(padded_value.sum(), padded)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(padded_gradient, torch.cat([torch.zeros_like(padding), gradient], dim=1), rtol=0, atol=1e-12)


@group_losses
@pytest.mark.parametrize("junk", [0.0, math.nan, math.inf])
def test_a_group_without_candidates_gives_zero(loss: GroupLoss, junk: float) -> None:
    r = torch.full((2, 3), junk, requires_grad=True)
    value = loss(r, torch.full((2, 3), junk), ~real(2, 3))
    (gradient,) = torch.autograd.grad(value.sum(), r)
    assert value.tolist() == [0.0, 0.0]
    assert gradient.tolist() == [[0.0] * 3] * 2


@group_losses
def test_a_group_of_one(loss: GroupLoss) -> None:
    r = torch.tensor([[3.0]], requires_grad=True)
    value = loss(r, torch.tensor([[0.5]]), real(1, 1))
    # Nothing to compare with: only NCA, which fixes the level of r, has something to say.
    expected = -math.log(sigmoid(3.0)) - math.log(sigmoid(-3.0)) if loss is GROUP_LOSSES["nca"] else 0.0
    assert value.item() == pytest.approx(expected, rel=1e-6)


@group_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_implicit_rewards_stay_finite(loss: GroupLoss, dtype: torch.dtype, size: float) -> None:
    r = torch.tensor([[size, -size, 0.0], [-size, size, size], [size, size, size]], dtype=dtype, requires_grad=True)
    value = loss(r, torch.tensor([[3.0, 2.0, 1.0]], dtype=dtype).expand(3, 3), real(3, 3))
    (gradient,) = torch.autograd.grad(value.sum(), r)
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert gradient.isfinite().all()
    # Each loss is 1-Lipschitz in each implicit reward, so no gradient can explode.
    assert gradient.abs().max() <= 1 + 1e-6


def test_extreme_values_by_hand() -> None:
    r = torch.tensor([[-1e4, 1e4]])
    rewards, first = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert rnce_loss(r, first, real(1, 2)).item() == 2e4
    assert dpo_loss(r[:, 0], r[:, 1]).item() == 2e4
    assert dpo_best_vs_each_loss(r, first, real(1, 2)).item() == 2e4
    assert dpo_all_pairs_loss(r, rewards, real(1, 2)).item() == 2e4
    assert info_nca_loss(r, rewards, real(1, 2), alpha=1e-3).item() == 2e4
    # -log sigmoid(-1e4) = 1e4 for the best, and half of log sigmoid(-1e4) for the other.
    assert nca_loss(r, rewards, real(1, 2), alpha=1e-3).item() == 1.5e4
    assert nca_pair_loss(r[:, 0], r[:, 1]).item() == 1.5e4


@group_losses
@pytest.mark.parametrize(
    ("given_dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision(loss: GroupLoss, given_dtype: torch.dtype, computed: torch.dtype) -> None:
    r, rewards = numbers(4, 3, dtype=given_dtype), numbers(4, 3, seed=1, dtype=torch.float32)
    value = loss(r, rewards, real(4, 3))
    assert value.dtype == computed
    # What the low precision rounded is lost, but nothing more is.
    torch.testing.assert_close(value, loss(r.double(), rewards, real(4, 3)).to(computed), rtol=2e-6, atol=1e-6)


@pair_losses
def test_pair_losses_compute_half_precision_in_float32(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    chosen, rejected = numbers(4, dtype=torch.bfloat16), numbers(4, seed=1, dtype=torch.bfloat16)
    value = loss(chosen, rejected)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(chosen.double(), rejected.double()).float(), rtol=2e-6, atol=1e-6)


def test_a_draw_of_the_positive_has_no_pair_gradient() -> None:
    log_ratios = row(0.7, -0.4).requires_grad_()
    drawn = torch.tensor([[0, 0]])
    value = rnce_loss(log_ratios.gather(1, drawn), torch.tensor([0]), real(1, 2))
    (gradient,) = torch.autograd.grad(value.sum(), log_ratios)
    assert value.item() == pytest.approx(math.log(2), abs=1e-12)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_an_absent_or_masked_positive_gives_zero() -> None:
    r = row(0.7, -0.4).expand(2, 2)
    mask, positive = torch.tensor([[True, True], [False, True]]), torch.tensor([-1, 0])
    assert rnce_loss(r, positive, mask).tolist() == [0.0, 0.0]
    assert dpo_best_vs_each_loss(r, positive, mask).tolist() == [0.0, 0.0]


def test_ties_make_no_pairs() -> None:
    r = row(0.3, -0.2, 1.1)
    found = dpo_all_pairs_loss(r, row(1.0, 1.0, 0.0), real(1, 3))
    expected = -(math.log(sigmoid(0.3 - 1.1)) + math.log(sigmoid(-0.2 - 1.1))) / 2
    assert found.item() == pytest.approx(expected, abs=1e-12)
    assert dpo_all_pairs_loss(r, row(1.0, 1.0, 1.0), real(1, 3)).item() == 0.0


def test_all_pairs_of_two_levels_is_best_vs_each_when_one_is_best() -> None:
    r = numbers(8, 4)
    rewards = row(1.0, 0.0, 0.0, 0.0).expand(8, 4)
    torch.testing.assert_close(
        dpo_all_pairs_loss(r, rewards, real(8, 4)),
        dpo_best_vs_each_loss(r, torch.zeros(8, dtype=torch.long), real(8, 4)),
        rtol=0,
        atol=1e-12,
    )


moderate = st.floats(-30, 30, allow_nan=False)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(moderate, moderate), min_size=1, max_size=6), st.floats(0.05, 20))
def test_info_nca_and_nca_are_never_below_the_entropy_they_contain(pairs: list[tuple[float, float]], alpha: float) -> None:
    r, rewards = row(*(pair[0] for pair in pairs)), row(*(pair[1] for pair in pairs))
    mask = real(1, len(pairs))
    weights = target_weights(rewards, mask, alpha=alpha)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    entropy = torch.special.entr(weights).sum().item()
    # Cross-entropy is at least the entropy of its target.
    assert info_nca_loss(r, rewards, mask, alpha=alpha).item() >= entropy - 1e-9
    # NCA is a sum of binary cross-entropies with odds w_i : 1/K, each at least that of its own optimum.
    share = 1 / len(pairs)
    least = sum(-w * math.log(w / (w + share)) - share * math.log(share / (w + share)) for w in weights[0].tolist() if w > 0)
    assert nca_loss(r, rewards, mask, alpha=alpha).item() >= least - 1e-9


METHODS: list[tuple[ObjectiveConfig, float]] = [
    (MCPO(), math.log(2)),
    (MCPO(num_negatives=3), math.log(4)),
    (MCPO(num_negatives=3, strategy="uniform"), math.log(4)),
    (MCPO(num_negatives=2, strategy="max"), math.log(3)),
    (MCPO(num_negatives=2, strategy="min"), math.log(3)),
    (MCPO(num_negatives=9), math.log(5)),
    (MCPO(num_negatives=9, replacement=True), math.log(10)),
    (MCPO(include_positive=True), math.log(2)),
    (RNCE(), math.log(5)),
    (InfoNCA(), math.log(5)),
    (NCA(), 2 * math.log(2)),
    (DPO(), math.log(2)),
    (DPO(pairing="best_vs_each"), math.log(2)),
    (DPO(pairing="all_pairs"), math.log(2)),
    (NCAPair(), 2 * math.log(2)),
]
methods = pytest.mark.parametrize("config", [config for config, _ in METHODS], ids=str)


def loss_inputs(log_ratios: Tensor, rewards: Tensor, mask: Tensor) -> LossInputs:
    """One token each, under a reference that gives each completion a log-prob of -2 nats."""
    return LossInputs(log_ratios, log_ratios - 2, rewards, torch.ones_like(log_ratios), mask)


def applied(config: ObjectiveConfig, log_ratios: Tensor, rewards: Tensor, mask: Tensor, seed: int = 0) -> Tensor:
    """What a training step does with a method."""
    method = build_method(config)
    if method.sampler is None:
        return method.loss(loss_inputs(log_ratios, rewards, mask))
    scores = (method.beta * log_ratios).detach() if method.sampler.scores else None
    columns = method.sampler.select(scores, rewards, mask, torch.Generator().manual_seed(seed))
    taken = columns.clamp(min=0)
    return method.loss(loss_inputs(log_ratios.gather(1, taken), rewards.gather(1, taken), columns >= 0))


@pytest.mark.parametrize(("config", "expected"), METHODS, ids=str)
def test_a_method_starts_at_its_known_value(config: ObjectiveConfig, expected: float) -> None:
    # Four real candidates below the best one, and one that is missing.
    rewards = row(0.1, 0.5, 0.9, 0.3, 0.7, math.nan)
    mask = ~rewards.isnan()
    value = applied(config, torch.zeros_like(rewards), rewards, mask)
    assert value.item() == pytest.approx(expected, abs=1e-12)


@methods
def test_a_method_multiplies_by_its_beta(config: ObjectiveConfig) -> None:
    rewards, log_ratios = numbers(8, 5, seed=1), numbers(8, 5)
    doubled = config.model_copy(update={"beta": 2 * config.beta})
    torch.testing.assert_close(
        applied(doubled, log_ratios, rewards, real(8, 5)), applied(config, 2 * log_ratios, rewards, real(8, 5))
    )
    assert build_method(config).name == config.name
    assert build_method(config).beta == config.beta


@methods
def test_a_method_ignores_missing_candidates(config: ObjectiveConfig) -> None:
    rewards = row(0.1, math.nan, 0.9, 0.3).expand(4, 4)
    log_ratios = numbers(4, 4)
    log_ratios[:, 1] = math.nan
    log_ratios.requires_grad_()
    value = applied(config, log_ratios, rewards, ~rewards.isnan())
    (gradient,) = torch.autograd.grad(value.sum(), log_ratios)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[:, 1].tolist() == [0.0] * 4


@methods
@pytest.mark.parametrize("rewards", [row(0.5, 0.5, 0.5), row(0.5, math.nan, math.nan), row(math.nan, math.nan, math.nan)])
def test_a_group_without_preference_gives_zero_where_the_method_needs_one(config: ObjectiveConfig, rewards: Tensor) -> None:
    method = build_method(config)
    log_ratios = row(0.4, -0.2, 1.3).requires_grad_()
    value = applied(config, log_ratios, rewards, ~rewards.isnan())
    (gradient,) = torch.autograd.grad(value.sum(), log_ratios)
    if method.refuse([0.5, 0.5, 0.5]):
        assert value.item() == 0.0
        assert gradient.abs().sum().item() == 0.0
    elif rewards.isfinite().all():
        assert gradient.abs().sum().item() > 1e-3


def test_needs_scores_only_where_the_kernel_reads_them() -> None:
    samplers = [(config, build_method(config).sampler) for config, _ in METHODS]
    needing = [config for config, sampler in samplers if sampler is not None and sampler.scores is not None]
    assert needing == [config for config, _ in METHODS if isinstance(config, MCPO) and config.strategy != "uniform"]


@methods
def test_a_method_is_repeatable_from_its_generator(config: ObjectiveConfig) -> None:
    log_ratios, rewards = numbers(32, 6), numbers(32, 6, seed=1)
    first, again = (applied(config, log_ratios, rewards, real(32, 6), seed=5) for _ in range(2))
    assert torch.equal(first, again)


def test_the_kernel_settings_of_mc_po_reach_the_kernel() -> None:
    rewards = row(1.0, 0.0, 0.0, 0.0).expand(2000, 4)
    scores = row(9.0, 2.0, 0.0, 0.0).expand(2000, 4)

    def share(config: MCPO, column: int) -> float:
        sampler = build_method(config).sampler
        assert sampler is not None
        drawn = sampler.select(scores, rewards, real(2000, 4), torch.Generator().manual_seed(0))
        assert (drawn[:, 0] == 0).all()
        return (drawn[:, 1] == column).double().mean().item()

    assert share(MCPO(strategy="max"), 1) == 1
    assert share(MCPO(strategy="min"), 2) == 1
    # Four standard errors of a share of 2000 draws are at most 4 * sqrt(.25 / 2000) = .045.
    e = math.exp(2.0)
    assert share(MCPO(), 1) == pytest.approx(e / (e + 2), abs=0.045)
    assert share(MCPO(temperature=2.0), 1) == pytest.approx(math.e / (math.e + 2), abs=0.045)
    assert share(MCPO(strategy="uniform"), 1) == pytest.approx(1 / 3, abs=0.045)
    assert share(MCPO(), 0) == 0
    assert share(MCPO(include_positive=True), 0) > 0.99


def test_rnce_and_mc_po_take_no_tied_candidate_as_negative() -> None:
    rewards = row(1.0, 1.0, 0.0).expand(64, 3)
    for config in (MCPO(num_negatives=2), RNCE(), DPO(), NCAPair()):
        sampler = build_method(config).sampler
        assert sampler is not None
        drawn = sampler.select(torch.zeros(64, 3), rewards, real(64, 3), torch.Generator().manual_seed(0))
        assert set(drawn[:, 0].tolist()) == {0, 1}, "ties are broken at random"
        assert (drawn[:, 1] == 2).all()
        assert (drawn[:, 2:] == -1).all()
    # The tied candidate that is not the positive takes no part in the pairs either.
    log_ratios = row(0.2, 5.0, -0.3)
    config = DPO(beta=1.0, pairing="best_vs_each")
    found = {round(applied(config, log_ratios, rewards[:1], real(1, 3), seed=seed).item(), 12) for seed in range(16)}
    assert found == {round(-math.log(sigmoid(0.2 + 0.3)), 12), round(-math.log(sigmoid(5.0 + 0.3)), 12)}


def test_mc_po_with_all_negatives_is_rnce() -> None:
    log_ratios, rewards = numbers(16, 5), numbers(16, 5, seed=1)
    torch.testing.assert_close(
        applied(MCPO(num_negatives=4), log_ratios, rewards, real(16, 5)),
        applied(RNCE(), log_ratios, rewards, real(16, 5)),
        rtol=0,
        atol=1e-12,
    )


def test_mc_po_with_one_uniform_negative_is_dpo() -> None:
    log_ratios, rewards = numbers(16, 5), numbers(16, 5, seed=1)
    torch.testing.assert_close(
        applied(MCPO(strategy="uniform"), log_ratios, rewards, real(16, 5), seed=3),
        applied(DPO(), log_ratios, rewards, real(16, 5), seed=3),
        rtol=0,
        atol=1e-12,
    )


def test_shapes_are_checked_at_run_time() -> None:
    """The import hook of conftest.py is at work: a wrong shape is refused by the signature."""
    with pytest.raises(Exception, match=r"implicit_rewards|mask|rewards") as found:
        info_nca_loss(torch.zeros(2, 3), torch.zeros(2, 4), real(2, 3), alpha=1.0)
    assert "jaxtyping" in type(found.value).__module__


def test_shape_checks_work_outside_pytest() -> None:
    program = """
import jaxtyping
with jaxtyping.install_import_hook(["ncalign.objectives", "ncalign.objectives.kernels"], "beartype.beartype"):
    import ncalign.objectives.kernels, ncalign.objectives
import torch
ones = torch.ones(1, 2, dtype=torch.bool)
ncalign.objectives.rnce_loss(torch.zeros(1, 2), torch.tensor([0]), ones)
try:
    ncalign.objectives.rnce_loss(torch.zeros(1, 2), torch.tensor([0, 1]), ones)
except jaxtyping.TypeCheckError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "refused", done.stderr


def test_importing_the_objectives_brings_in_no_trainer() -> None:
    program = (
        "import sys, ncalign.objectives, ncalign.objectives.kernels; "
        "print(sorted({'transformers', 'accelerate', 'peft', 'ncalign.training', 'ncalign.data.groups'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


PRECISE = [
    *(MCPO(strategy=strategy, num_negatives=2) for strategy in ("mc", "max", "min", "uniform")),
    *(RNCE(), InfoNCA(alpha=0.5), NCA(alpha=0.5), NCAPair()),
    *(DPO(pairing=pairing) for pairing in ("best_vs_one", "best_vs_each", "all_pairs")),
]


@pytest.mark.parametrize("config", PRECISE, ids=lambda config: "-".join(map(str, config.model_dump().values())))
def test_float64_rewards_change_neither_draws_nor_precision(config: ObjectiveConfig) -> None:
    method = build_method(config)
    # Eighths: float32 holds them exactly, so that both precisions are given the same rewards.
    rewards = (numbers(16, 5, seed=3) * 8).round() / 8
    log_ratios, mask = numbers(16, 5, seed=4, dtype=torch.float32), real(16, 5)
    found = []
    for given_rewards in (rewards, rewards.float()):
        ratios, taken, present = log_ratios, given_rewards, mask
        if method.sampler is not None:
            columns = method.sampler.select(log_ratios, given_rewards, mask, torch.Generator().manual_seed(0))
            index, present = columns.clamp(min=0), columns >= 0
            ratios, taken = log_ratios.gather(1, index), given_rewards.gather(1, index)
        found.append(method.loss(loss_inputs(ratios, taken, present)))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)

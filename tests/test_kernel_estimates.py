"""Several corrected draws, and kernels of a held effective sample size: unbiased, of the variance foretold, by enumeration."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from ncalign.objectives import rnce_loss
from ncalign.objectives.draws import as_often
from ncalign.objectives.kernels import KernelSettings, build_kernel, effective_sample_size, kernel_probabilities
from ncalign.objectives.ranking import MCPO
from ncalign.objectives.samplers import Sampler, mc_sampler
from ncalign.objectives.tempering import temperature_for_ess
from systematic_draws import outcomes

# The positive first, then what may be drawn; a tie, a tied best, an absent candidate, few candidates, one that outweighs all.
GROUPS = {
    "plain": ([1.0, 0.0, 0.0, 0.0, 0.5], [0.3, 1.2, -0.4, 0.8, 0.1]),
    "equal scores": ([1.0, 0.0, 0.0, 0.0, 0.5], [0.3, 0.2, 0.2, 0.2, 0.2]),
    "tied best": ([1.0, 1.0, 0.0, 0.0, 0.5], [0.3, 1.2, -0.4, 0.8, 0.1]),
    "absent": ([1.0, 0.0, math.nan, 0.0, 0.5], [0.3, 1.2, -0.4, 0.8, 0.1]),
    "one": ([1.0, 0.0, math.nan, math.nan, math.nan], [0.3, 1.2, -0.4, 0.8, 0.1]),
    "outweighed": ([1.0, 0.0, 0.0, 0.0, 0.5], [0.3, 9.0, -0.4, 0.8, 0.1]),
}
DRAWN = [(2, False), (3, False), (6, False), (2, True), (3, True)]


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def corrected(
    sampler: Sampler, settings: KernelSettings, rewards: Tensor, r: Tensor, drawn_by: Tensor | None = None
) -> list[tuple[float, Tensor, Tensor]]:
    """Every draw of the positive's negatives: its probability, its columns, and the corrected implicit rewards."""
    scores = r.detach() if drawn_by is None else drawn_by
    mask = ~rewards.isnan()
    below = mask & (rewards < 1.0)
    visible = below.clone()
    visible[0, 0] = True
    kernel = build_kernel(settings)
    assert kernel.expected is not None
    assert sampler.log_q is not None
    expected = kernel.expected(scores, rewards, torch.tensor([0]), visible, mask)
    found = []
    for share, counts in outcomes(expected[0]):
        columns = pad(as_often(counts.unsqueeze(0), settings.num_negatives), (1, 0), value=0)
        log_q = sampler.log_q(scores, rewards, mask, columns)
        found.append((share, columns, r.gather(1, columns.clamp(min=0)) - log_q))
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("num_negatives", "replacement"), DRAWN)
@pytest.mark.parametrize("tempering", [{}, {"temperature": 3.0}, {"target_ess": 0.7}])
def test_several_corrected_draws_estimate_the_normaliser_and_the_gradient(
    group: str, num_negatives: int, replacement: bool, tempering: dict[str, float]
) -> None:
    rewards, scores = row(*GROUPS[group][0]), row(*GROUPS[group][1])
    settings = KernelSettings("mc", num_negatives, replacement=replacement, proportional=not replacement, **tempering)  # type: ignore[arg-type]
    sampler = mc_sampler(
        KernelSettings("mc", num_negatives, replacement=replacement, **tempering),  # type: ignore[arg-type]
        log_q_correction=True,
    )
    r = scores.requires_grad_()
    below = (rewards < 1.0) & ~rewards.isnan()
    normaliser, mean, gradient, values = r.exp()[below].sum(), 0.0, torch.zeros_like(r), []
    for share, columns, logits in corrected(sampler, settings, rewards, r):
        mean += share * float(logits.detach()[:, 1:].exp()[columns[:, 1:] >= 0].sum())
        loss = rnce_loss(logits, torch.tensor([0]), columns >= 0)
        values.append(float(loss.detach()))
        gradient += share * torch.autograd.grad(loss.sum(), r, retain_graph=True)[0]
    assert mean == pytest.approx(float(normaliser.detach()), rel=1e-12)
    if not tempering:
        # Drawn by the model itself, every draw has the sum, so that the loss's own gradient is exact on average too.
        full = (r.exp()[below].sum() + r[0, 0].exp()).log() - r[0, 0]
        assert values == pytest.approx([float(full.detach())] * len(values), abs=1e-12)
        torch.testing.assert_close(gradient, torch.autograd.grad(full, r)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("num_negatives", "replacement"), [(1, False), *DRAWN[:1], *DRAWN[3:4]])
def test_draws_by_outdated_scores_estimate_the_current_normaliser(group: str, num_negatives: int, replacement: bool) -> None:
    rewards, r = row(*GROUPS[group][0]), row(*GROUPS[group][1])
    outdated = row(3.0, 0.1, 1.3, -0.5, 0.4)
    settings = KernelSettings("mc", num_negatives, replacement=replacement)
    sampler = mc_sampler(settings, log_q_correction=True, last_visit=True)
    settings = KernelSettings("mc", num_negatives, replacement=replacement, proportional=not replacement)
    mean = sum(
        share * float(logits[:, 1:].exp()[columns[:, 1:] >= 0].sum())
        for share, columns, logits in corrected(sampler, settings, rewards, r, outdated)
    )
    below = (rewards < 1.0) & ~rewards.isnan()
    assert mean == pytest.approx(float(r.exp()[below].sum()), rel=1e-12)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("tempering", [{}, {"target_ess": 0.7}])
def test_permuting_and_padding_change_no_correction(replacement: bool, tempering: dict[str, float]) -> None:
    settings = KernelSettings("mc", 2, replacement=replacement, **tempering)  # type: ignore[arg-type]
    sampler = mc_sampler(settings, log_q_correction=True)
    assert sampler.log_q is not None
    rewards, r, mask = row(1.0, 0.0, 0.2, 0.0, 0.5), row(0.3, 1.2, -0.4, 0.8, 0.1), torch.ones(1, 5, dtype=torch.bool)
    found = sampler.log_q(r, rewards, mask, torch.tensor([[0, 3, 1]]))
    order = [3, 0, 4, 1, 2]
    moved = torch.tensor([[order.index(column) for column in (0, 3, 1)]])
    torch.testing.assert_close(sampler.log_q(r[:, order], rewards[:, order], mask, moved), found, rtol=0, atol=1e-12)
    padded = (pad(r, (0, 2), value=math.nan), pad(rewards, (0, 2), value=math.nan), pad(mask, (0, 2), value=False))
    torch.testing.assert_close(sampler.log_q(*padded, torch.tensor([[0, 3, 1]])), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS)
def test_the_gradients_variance_is_that_of_the_counts(group: str) -> None:
    """Of draws with replacement one by one, of systematic ones, and of two different candidates; each as a formula says."""
    rewards, r = row(*GROUPS[group][0]), row(*GROUPS[group][1])
    below = (rewards < 1.0) & ~rewards.isnan()
    weights = torch.where(below, r.exp(), 0.0)[0]
    p, share = weights / weights.sum(), weights / (weights.sum() + r[0, 0].exp())
    one_by_one = share.square().sum() / 2 * 0
    for columns in product(below[0].nonzero().flatten().tolist(), repeat=2):
        estimate = torch.bincount(torch.tensor(columns), minlength=5) / (2 * p)
        one_by_one += p[list(columns)].prod() * (torch.where(below[0], estimate - 1, 0.0) * share).square().sum()
    scale = float(share.sum()) ** 2
    assert float(one_by_one) == pytest.approx(scale * (1 - float(p.square().sum())) / 2, abs=1e-12)
    found = {}
    for replacement in (False, True):
        sampler = mc_sampler(KernelSettings("mc", 2, replacement=replacement), log_q_correction=True)
        settings = KernelSettings("mc", 2, replacement=replacement, proportional=not replacement)
        variance = 0.0
        for probability, columns, logits in corrected(sampler, settings, rewards, r):
            gradient = torch.zeros(5, dtype=torch.float64)
            probabilities = torch.where(columns >= 0, logits, -torch.inf).softmax(dim=1)[0]
            for column, value in zip(columns[0, 1:].tolist(), probabilities[1:].tolist(), strict=True):
                gradient[column] += value if column >= 0 else 0.0
            variance += probability * float((gradient - share).square().sum())
        # A count is its expectation rounded down or up: f (1 - f), with f the fraction.
        kernel = build_kernel(settings)
        assert kernel.expected is not None
        visible = below.clone()
        visible[0, 0] = True
        expected = kernel.expected(r, rewards, torch.tensor([0]), visible, ~rewards.isnan())[0]
        part = expected - expected.floor()
        safe = torch.where(expected > 0, expected, 1.0)
        assert variance == pytest.approx(float((part * (1 - part) * (share / safe).square()).sum()), abs=1e-12)
        found[replacement] = variance
    assert found[False] <= found[True] + 1e-12 <= float(one_by_one) + 2e-12


@pytest.mark.parametrize("replacement", [False, True])
def test_what_is_drawn_is_what_is_corrected_for(replacement: bool) -> None:
    times, rewards, r = 20_000, row(1.0, 0.0, 0.0, 0.0, 0.5), row(0.3, 1.2, -0.4, 0.8, 0.1)
    sampler = mc_sampler(KernelSettings("mc", 2, replacement=replacement), log_q_correction=True)
    mask = torch.ones(times, 5, dtype=torch.bool)
    columns = sampler.select(r.expand(times, 5), rewards.expand(times, 5), mask, torch.Generator().manual_seed(0))
    assert sampler.log_q is not None
    expected = torch.zeros(5, dtype=torch.float64)
    for column in range(1, 5):
        expected[column] = sampler.log_q(r, rewards, mask[:1], torch.tensor([[0, column, -1]]))[0, 1].exp()
    assert float(expected.sum()) == pytest.approx(2, abs=1e-12)
    for column in range(1, 5):
        counts = (columns[:, 1:] == column).sum(dim=1).double()
        part = float(expected[column]) % 1
        assert counts.mean().item() == pytest.approx(
            float(expected[column]), abs=4 * math.sqrt(part * (1 - part) / times) + 1e-12
        )


def test_draws_without_the_correction_are_those_of_before() -> None:
    """Without replacement each next negative comes from the softmax of those that remain, whatever the correction does."""
    scores = row(0.0, 0.4, -0.7, 1.1).expand(50, 4)
    mask, positive = torch.ones(50, 4, dtype=torch.bool), torch.zeros(50, dtype=torch.long)
    plain = build_kernel(KernelSettings("mc", 2))
    assert plain.expected is None
    assert build_kernel(KernelSettings("mc", 2, num_proposals=1)).expected is None
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    noise = -torch.empty(50, 4, dtype=torch.float64).exponential_(generator=generators[0]).log()
    keys = torch.where(torch.arange(4) > 0, scores + noise, -torch.inf)
    assert torch.equal(plain.draw(scores, scores, positive, mask, mask, generators[1]), keys.topk(2).indices)


# --- A held effective sample size -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_effective_sample_size_is_the_share_of_the_candidates(share: float, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(64, 7, dtype=torch.float64, generator=generator) * size
    mask = torch.rand(64, 7, generator=generator) < 0.8
    mask[:, 0] = True
    positive = torch.zeros(64, dtype=torch.long)
    probabilities = kernel_probabilities(scores.masked_fill(~mask, math.nan), positive, mask, strategy="mc", target_ess=share)
    count = mask[:, 1:].sum(dim=1).double()
    # Never closer to the best alone than 5 %.
    wanted = torch.where(count > 1, (share * count).clamp(min=1.05), count)
    torch.testing.assert_close(effective_sample_size(probabilities), wanted, rtol=0, atol=1e-9)


def test_the_temperature_by_hand() -> None:
    third = math.log(3.0)
    mask = torch.ones(1, 3, dtype=torch.bool)
    # 9 : 3 : 1 at temperature 1: 13^2 / 91; at temperature 2 its logarithms are halved.
    scores = row(2 * third, third, 0.0)
    assert float(temperature_for_ess(scores, mask, 169 / 91 / 3)) == pytest.approx(1, abs=1e-12)
    assert float(temperature_for_ess(2 * scores + 40, mask, 169 / 91 / 3)) == pytest.approx(2, abs=1e-12)
    # Tied best ones: no temperature leads below 2, and 0.5 * 3 is.
    tied = row(0.0, 0.0, -1.0)
    p = (tied / temperature_for_ess(tied, mask, 0.5)).softmax(dim=1)
    assert float(1 / p.square().sum()) == pytest.approx(2.1, abs=1e-12)


def test_where_no_temperature_changes_anything_it_is_one() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False] * 3])
    scores = torch.tensor([[2.0, 2.0, 2.0], [5.0, math.nan, math.inf], [math.nan] * 3])
    for share in (0.1, 1.0):
        assert temperature_for_ess(scores, mask, share).tolist() == [1.0, 1.0, 1.0]
    assert temperature_for_ess(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 0.5).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="it is a share of the candidates"):
        temperature_for_ess(scores, mask, 0.0)


@pytest.mark.parametrize(
    "scores", [(math.inf, 0.0, 1.0), (0.0, -math.inf, 1.0), (math.inf, -math.inf, 0.0), (1e308, -1e308, 0.0)]
)
def test_infinite_scores_have_a_finite_temperature(scores: tuple[float, ...]) -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    probabilities = kernel_probabilities(row(0.0, *scores), torch.tensor([0]), mask, strategy="mc", target_ess=0.5)
    assert temperature_for_ess(row(*scores), mask[:, 1:], 0.5).isfinite().all()
    assert float(effective_sample_size(probabilities)) == pytest.approx(1.5, abs=1e-9)
    order = sorted(range(3), key=lambda index: scores[index])
    assert probabilities[0, 1:][order].diff().min() >= 0


def test_permuting_padding_and_shifting_change_no_temperature() -> None:
    scores = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(8, 5, dtype=torch.bool)
    found, order = temperature_for_ess(scores, mask, 0.6), [4, 2, 0, 1, 3]
    for other, real in (
        (scores[:, order], mask),
        (pad(scores, (0, 3), value=99.0), pad(mask, (0, 3), value=False)),
        (scores + 7.0, mask),
    ):
        torch.testing.assert_close(temperature_for_ess(other, real, 0.6), found, rtol=1e-11, atol=0)
    torch.testing.assert_close(temperature_for_ess(3 * scores, mask, 0.6), 3 * found, rtol=1e-11, atol=0)


def test_the_sampler_tells_the_temperature_that_it_draws_at() -> None:
    sampler = mc_sampler(KernelSettings("mc", target_ess=0.5))
    rewards, r = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), torch.tensor([[9.0, 0.1, 0.2, 0.4]]).expand(2, 4)
    assert sampler.temperature is not None
    assert sampler.kernel is not None
    read = (r, torch.tensor([0, 0]), rewards, torch.ones(2, 4, dtype=torch.bool))
    found = sampler.temperature(*read)
    expected = (r[:1, 1:].double() / found[0]).softmax(dim=1)
    torch.testing.assert_close(sampler.kernel(*read)[:1, 1:], expected, rtol=0, atol=1e-12)
    assert math.isnan(found[1]), "nothing is below the positive"
    assert mc_sampler(KernelSettings("mc")).temperature is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_ess": 0.5, "temperature": 2.0}, "target_ess finds the temperature of each group"),
        ({"target_ess": 0.5, "strategy": "uniform"}, "target_ess does nothing with strategy 'uniform'"),
        ({"temperature": 2.0, "strategy": "min"}, "temperature does nothing with strategy 'min'"),
        ({"log_q_correction": True, "num_proposals": 2}, "log_q_correction needs negatives whose probability is known"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MCPO(**fields)


def test_the_configuration_reaches_the_kernel() -> None:
    sampler = MCPO(target_ess=0.5, num_negatives=2, log_q_correction=True).method().sampler
    assert sampler is not None
    assert sampler.temperature is not None
    assert sampler.log_q is not None
    # Two of three equal ones: each is in with 2/3.
    log_q = sampler.log_q(torch.zeros(1, 4), row(1, 0, 0, 0), torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0, 1, 2]]))
    assert log_q[0].tolist() == pytest.approx([0.0, math.log(2 / 3), math.log(2 / 3)], abs=1e-12)

"""How many candidates pay: variances by hand and by enumeration, costs by hand, and what real gradients say."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ncalign.audit.findings import findings
from ncalign.audit.sizes import ScoredGroup, audit_sizes, sizes_text, step_variance
from ncalign.objectives import info_nca_loss, nca_loss, rnce_loss
from ncalign.objectives.estimators import coefficients
from ncalign.objectives.inclusion import inclusion_probabilities, systematic_from

HEAD = 1.25


def groups(number: int, size: int, *, prompt: int = 40, length: int = 10, spread: float = 0.0) -> list[ScoredGroup]:
    scores = spread * torch.randn(number, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [ScoredGroup(tuple(row), prompt, (length,) * size) for row in scores.tolist()]


def ladder(number: int, size: int) -> list[list[float]]:
    """Rewards far apart: the last candidate is the best."""
    return [[float(k) for k in range(size)] for _ in range(number)]


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_variance_of_m_negatives_at_the_reference(size: int) -> None:
    _, tables = audit_sizes(groups(3, size), ladder(3, size), beta=None, alpha=1.0, head=HEAD, seed=0)
    rows, below = tables["pays_negatives"], size - 1
    # c_0^2 = (L / K)^2, and each of L negatives has 1 / K^2 with inclusion M / L.
    expected = [(below**2 + below * below / m) / (below**2 + below) for m in range(1, size)]
    assert column(rows, "M") == list(range(1, size))
    assert column(rows, "variance") == pytest.approx(expected, abs=1e-12)


def test_costs_by_hand() -> None:
    both = [ScoredGroup((0.0, 0.0, 0.0), 100, (10, 20, 60)), ScoredGroup((0.0, 0.0, 0.0), 40, (30, 30, 30))]
    rewards = [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]]
    _, tables = audit_sizes(both, rewards, beta=None, alpha=1e-3, head=HEAD, seed=0)
    # DPO: the best and the mean of the other two.
    dpo = 3 * 140 + 3 * HEAD * ((10 + 40) + (30 + 30))
    one, every = tables["pays_negatives"]
    # The best is not scored: it enters anyway.
    assert one["cost"] == pytest.approx((3 * 140 + HEAD * (140 + 3 * (10 + 40 + 30 + 30))) / dpo, abs=1e-12)
    # One-hot targets at r = 0: |c| is 2/3 and twice 1/3 (times one half under NCA), so that the best enters surely.
    drawn = tables["pays_drawn_nca"][0]
    assert drawn["cost"] == pytest.approx((3 * 140 + HEAD * (180 + 3 * (10 + 40 + 30 + 30))) / dpo, abs=1e-12)
    assert every["cost"] == pytest.approx((3 * 140 + 3 * HEAD * 180) / dpo, abs=1e-12)
    assert every["efficiency"] == pytest.approx(1.0, abs=1e-12)
    assert one["efficiency"] == pytest.approx(every["cost"] / (one["variance"] * one["cost"]), abs=1e-12)
    pair, whole = tables["pays_candidates"]
    assert pair["cost"] == pytest.approx((3 * 140 + 3 * HEAD * 120) / dpo, abs=1e-12)
    assert whole == {"K": 3, "variance": pytest.approx(1.0), "cost": every["cost"], "efficiency": pytest.approx(1.0)}


def test_two_of_eight_candidates_at_random() -> None:
    # One-hot targets at r = 0: a pair's coefficients are -1/4 and 1/4 under NCA, half of InfoNCA's, whose whole gradient g has
    # |g|^2 = 7/8. A pair's product with g is 1/8 on average, and its square 1/2.
    _, tables = audit_sizes(groups(2, 8), ladder(2, 8), beta=None, alpha=1e-3, head=HEAD, seed=0)
    assert tables["pays_candidates"][0]["variance"] == pytest.approx(0.5 * (7 / 8) * 64, abs=1e-9)


def orders(probabilities: Tensor) -> list[tuple[float, Tensor]]:
    """Every sample that systematic sampling in a random order can draw, with its probability."""
    size, found = probabilities.shape[0], []
    places = list(itertools.permutations(range(size)))
    for order in map(list, places):
        ends = [0.0, *sorted(float(end) % 1 for end in probabilities[order].cumsum(dim=0)), 1.0]
        for low, high in itertools.pairwise(ends):
            if high - low > 1e-12:
                counts = systematic_from(probabilities[order].unsqueeze(0), torch.tensor([(low + high) / 2]))[0]
                found.append(((high - low) / len(places), torch.zeros(size).long().scatter(0, torch.tensor(order), counts)))
    return found


@pytest.mark.parametrize("loss", [info_nca_loss, nca_loss])
def test_variance_of_s_of_k_is_that_of_all_draws(loss: object) -> None:
    chance = torch.Generator().manual_seed(3)
    r, rewards = (torch.randn(1, 5, dtype=torch.float64, generator=chance) for _ in range(2))
    mask = torch.ones(1, 5, dtype=torch.bool)
    group = [ScoredGroup(tuple(r[0].tolist()), 10, (5,) * 5)]
    _, tables = audit_sizes(group, rewards.tolist(), beta=1.0, alpha=0.7, head=HEAD, seed=0)
    c = coefficients(lambda at: loss(at, rewards, mask, alpha=0.7), r)  # type: ignore[operator]
    for row in tables[f"pays_drawn_{'nca' if loss is nca_loss else 'info_nca'}"]:
        probabilities = inclusion_probabilities(c.abs(), mask, row["S"])
        drawn = orders(probabilities[0])
        assert sum(weight for weight, _ in drawn) == pytest.approx(1.0, abs=1e-9)
        # Along orthogonal directions of equal length the vector of what each candidate adds is the gradient.
        vectors = [(weight, counts * c[0] / probabilities[0]) for weight, counts in drawn]
        mean = sum(weight * vector for weight, vector in vectors)
        torch.testing.assert_close(mean, c[0], rtol=0, atol=1e-9)
        square = sum(weight * float(vector.square().sum()) for weight, vector in vectors)
        assert row["variance"] == pytest.approx(square / float(c.square().sum()), abs=1e-9)


def test_with_equal_correlation_a_single_negatives_variance_is_the_same() -> None:
    # Ranking losses have coefficients that add up to 0, and so has one negative's estimate: what all gradients share cancels.
    r = torch.tensor([[0.3, -0.5, 1.0, 0.2]], dtype=torch.float64)
    c = coefficients(lambda at: rnce_loss(at, torch.tensor([0]), torch.ones(1, 4, dtype=torch.bool)), r)[0]
    for rho in (0.0, 0.6):
        gram = (1 - rho) * torch.eye(4, dtype=torch.float64) + rho
        vectors = [
            (c[z] / c[1:].sum(), torch.eye(4, dtype=torch.float64)[z] - torch.eye(4, dtype=torch.float64)[0]) for z in (1, 2, 3)
        ]
        square = sum(float(q * c[1:].sum() ** 2 * (v @ gram @ v)) for q, v in vectors) / float(c @ gram @ c)
        inclusion = torch.cat([torch.ones(1, dtype=torch.float64), c[1:] / c[1:].sum()])
        assert square == pytest.approx(step_variance(c.unsqueeze(0), inclusion.unsqueeze(0)), abs=1e-12)


def test_ragged_groups_ties_and_order_do_not_matter() -> None:
    one = [ScoredGroup((3.0, -1.0, 2.0), 7, (4, 5, 6)), ScoredGroup((1.0, 0.0, 2.0, 4.0), 9, (1, 2, 3, 4))]
    rewards = [[1.0, 0.0, 1.0], [0.1, 0.9, 0.9, 0.4]]
    settings = {"beta": 0.5, "alpha": 0.3, "head": HEAD, "seed": 0}
    numbers, tables = audit_sizes(one, rewards, **settings)  # type: ignore[arg-type]
    # The second-best of tied ones is no negative, so the first group has one.
    assert column(tables["pays_negatives"], "M") == [1, 2]
    turned = [ScoredGroup(g.scores[::-1], g.prompt, g.completions[::-1]) for g in reversed(one)]
    again, _ = audit_sizes(turned, [row[::-1] for row in reversed(rewards)], **settings)  # type: ignore[arg-type]
    for name in ("drawn_info_nca", "drawn_nca", "candidates"):
        for end in ("", "_variance", "_efficiency", "_enough"):
            assert again[f"pays/{name}{end}"] == pytest.approx(numbers[f"pays/{name}{end}"], abs=1e-9)


def test_larger_sizes_have_less_variance_and_all_have_one() -> None:
    rewards = torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()
    numbers, tables = audit_sizes(groups(40, 9, spread=10.0), rewards, beta=0.1, alpha=0.5, head=HEAD, seed=0)
    for rows in tables.values():
        variances = column(rows, "variance")
        assert variances == sorted(variances, reverse=True)
        assert variances[-1] == pytest.approx(1.0, abs=1e-9)
        assert rows[-1]["efficiency"] == pytest.approx(1.0, abs=1e-9)
        assert all(math.isfinite(value) for row in rows for value in row.values())
    # Whatever differs between this run's subsets and another's is the seed's.
    same, _ = audit_sizes(groups(40, 9, spread=10.0), rewards, beta=0.1, alpha=0.5, head=HEAD, seed=0)
    assert same == numbers


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            {"": 2.0, "_variance": 1.25, "_efficiency": 1.6, "_enough": 5.0, "_most": 7.0},
            "mc_po and rnce: M = 2 gives the least noise for the compute: 1.25 times the variance of all (M = 7), and 62% of "
            "their compute for the same noise; beyond M = 5 nothing is gained (under 2 % of the variance)",
        ),
        (
            {"": 7.0, "_variance": 1.0, "_efficiency": 1.0, "_enough": 7.0, "_most": 7.0},
            "mc_po and rnce: all, M = 7, give the least noise for the compute; fewer than 7 have a variance more than 2 % "
            "above that",
        ),
    ],
)
def test_what_is_said(numbers: dict[str, float], said: str) -> None:
    healthy = {
        "groups/with_spread": 1.0, "likeness/duplicates": 0.0, "likeness/swapped": 0.0, "length/agreement": 0.0,
        "length/explained": 0.0, "candidates/made_raw": 0, "candidates/empty": 0, "candidates/cut": 0, "candidates": 80,
        "rewards/missing": 0, "rewards/tied_best": 0, "rewards/noise_sd": 0.0, "rewards/within_sd": 1.0,
        "rewards/noise_pairs": 0, "sources/most_best": 0.0, "sources/number": 1,
        "prompts/duplicates": 0.0, "copies/across": 0.0,
        "likeness/best_to_others": 0.3, "likeness/random": 0.1, "alpha/low": math.nan, "candidates/worth_keeping": math.nan,
        "candidates/mean": 8.0,
    }  # fmt: skip
    found = findings(healthy | {f"pays/negatives{end}": value for end, value in numbers.items()})
    assert [finding["text"] for finding in found if finding["name"] == "pays_negatives"] == [said]


def test_tables_as_text() -> None:
    assert sizes_text({}) == []
    assert sizes_text({"pays_negatives": [{"M": 1, "variance": 1.75, "cost": 0.9, "efficiency": 1.6}]})[-1] == ""


@pytest.mark.slow
def test_gradients_of_a_model_against_the_orthogonal_ones(tiny_model_dir: Path) -> None:
    """On real gradients, neither orthogonal nor equally long, one negative's variance is of the predicted size."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double().eval()
    chance, ratios = torch.Generator().manual_seed(0), []
    for _ in range(8):
        rows = torch.randint(5, model.config.vocab_size, (6, 24), generator=chance)
        rows[:, :12] = rows[0, :12]
        gradients = []
        for row in rows:
            logprobs = model(row.unsqueeze(0)).logits[0, 11:-1].log_softmax(dim=-1)
            grads = torch.autograd.grad(
                logprobs.gather(1, row[12:].unsqueeze(1)).sum(), list(model.parameters()), allow_unused=True
            )
            gradients.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
        gram = torch.stack(gradients) @ torch.stack(gradients).T
        c = torch.full((6,), 1 / 6, dtype=torch.float64)
        c[0] -= 1
        leads = gram.diagonal()[1:] + gram[0, 0] - 2 * gram[0, 1:]
        ratios.append(float((5 / 6) ** 2 * leads.mean() / (c @ gram @ c)))
    assert sum(ratios) / len(ratios) == pytest.approx(2 * 5 / 6, rel=0.1)

"""Inclusion probabilities and systematic draws: unbiased by enumeration of every order and start, of a fixed size."""

from __future__ import annotations

import pytest
import torch

from ncalign.objectives.inclusion import inclusion_probabilities, systematic, systematic_from
from systematic_draws import outcomes

MASKS = torch.tensor([[True] * 5, [True, True, True, False, False], [True, False, True, True, True], [True] + [False] * 4])
WEIGHTS = torch.tensor(
    [[5.0, 1.0, 1.0, 2.0, 0.5], [0.2, 0.2, 0.2, 9.0, 9.0], [1e-3, torch.nan, 7.0, 7.0, 0.0], [3.0, 1.0, 1.0, 1.0, 1.0]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_probabilities_add_up_to_the_size_and_keep_the_weights_ratio_below_one(size: int) -> None:
    found = inclusion_probabilities(WEIGHTS, MASKS, size)
    drawable = MASKS & (WEIGHTS > 0)
    assert torch.equal(found > 0, drawable)
    assert torch.allclose(found.sum(1), drawable.sum(1).clamp(max=size).double(), atol=1e-12, rtol=0)
    assert found.max() <= 1
    for row, weights in zip(found, WEIGHTS, strict=True):
        below = (row > 0) & (row < 1)
        ratios = row[below] / weights[below]
        assert torch.allclose(ratios, ratios[:1].expand_as(ratios), rtol=1e-12, atol=0)
        # One that enters surely would be above 1 at the others' ratio.
        assert not len(ratios) or (weights[row == 1] * ratios[0] >= 1 - 1e-12).all()


def test_probabilities_by_hand() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = inclusion_probabilities(torch.tensor([[8.0, 4.0, 1.0, 1.0]]), mask, 3)
    # 3 * 8 / 14 is above 1; then 2 * 4 / 6 is; one place is left for two alike.
    assert torch.equal(found, torch.tensor([[1.0, 1.0, 0.5, 0.5]], dtype=torch.float64))
    assert torch.equal(inclusion_probabilities(torch.full((1, 4), 3.0), mask, 2), torch.full((1, 4), 0.5, dtype=torch.float64))
    assert torch.equal(inclusion_probabilities(torch.zeros(1, 4), mask, 2), torch.zeros(1, 4, dtype=torch.float64))
    assert inclusion_probabilities(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 2).shape == (2, 0)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e300])
def test_the_weights_unit_does_not_matter(scale: float) -> None:
    assert torch.allclose(
        inclusion_probabilities(WEIGHTS * scale, MASKS, 2), inclusion_probabilities(WEIGHTS, MASKS, 2), rtol=1e-12, atol=0
    )


def test_permuting_and_padding_candidates_changes_nothing() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    found = inclusion_probabilities(WEIGHTS, MASKS, 2)
    permuted = inclusion_probabilities(WEIGHTS[:, order], MASKS[:, order], 2)
    assert torch.allclose(permuted, found[:, order], atol=1e-15, rtol=0)
    padded = inclusion_probabilities(
        torch.nn.functional.pad(WEIGHTS, (0, 2), value=4.0), torch.nn.functional.pad(MASKS, (0, 2), value=False), 2
    )
    assert torch.allclose(padded[:, :5], found, atol=1e-15, rtol=0)
    assert (padded[:, 5:] == 0).all()


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 0: a sample has"):
        inclusion_probabilities(WEIGHTS, MASKS, 0)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_draw_without_replacement_has_its_size_and_its_probabilities(row: int, size: int) -> None:
    probabilities = inclusion_probabilities(WEIGHTS, MASKS, size)[row]
    mean = torch.zeros(5, dtype=torch.float64)
    for share, counts in outcomes(probabilities):
        assert counts.max() <= 1
        assert counts.sum() == round(float(probabilities.sum()))
        mean = mean + share * counts.double()
    assert torch.allclose(mean, probabilities, atol=1e-12, rtol=0)


def test_a_draw_with_replacement_has_the_expected_counts() -> None:
    expected = 4 * torch.tensor([0.6, 0.05, 0.2, 0.15, 0.0], dtype=torch.float64)
    mean = torch.zeros(5, dtype=torch.float64)
    for share, counts in outcomes(expected):
        assert counts.sum() == 4
        assert ((counts - expected).abs() < 1).all()
        mean = mean + share * counts.double()
    assert torch.allclose(mean, expected, atol=1e-12, rtol=0)


def test_sums_that_are_not_whole_are_kept_on_average() -> None:
    expected = torch.tensor([0.3, 0.4, 0.0, 0.1, 0.6], dtype=torch.float64)
    assert abs(sum(share * int(counts.sum()) for share, counts in outcomes(expected)) - 1.4) < 1e-12


@pytest.mark.parametrize("start", [0.0, 1e-17, 0.5, 1 - 2**-53])
def test_rounding_of_the_sums_loses_and_gains_no_draw(start: float) -> None:
    tenths = torch.full((1, 30), 0.1, dtype=torch.float64)
    assert systematic_from(tenths, torch.tensor([start], dtype=torch.float64)).sum() == 3
    thirds = inclusion_probabilities(torch.full((1, 7), 1 / 3), torch.ones(1, 7, dtype=torch.bool), 3)
    assert systematic_from(thirds, torch.tensor([start], dtype=torch.float64)).sum() == 3


def test_every_candidate_comes_as_often_as_it_should_in_a_random_order() -> None:
    probabilities = inclusion_probabilities(WEIGHTS[:1], MASKS[:1], 2)
    counts = systematic(probabilities.expand(20000, -1), torch.Generator().manual_seed(3))
    scatter = (probabilities * (1 - probabilities) / 20000).sqrt()
    assert ((counts.double().mean(0) - probabilities[0]).abs() <= 5 * scatter[0]).all()
    # Each pair of those that may be left out is drawn at some time: the order is random.
    pairs = {tuple(row.nonzero().flatten().tolist()) for row in counts.unique(dim=0)}
    assert pairs == {tuple(c.nonzero().flatten().tolist()) for _, c in outcomes(probabilities[0])}


def test_the_same_generator_gives_the_same_draw() -> None:
    probabilities = inclusion_probabilities(WEIGHTS, MASKS, 2)
    first, second = (systematic(probabilities, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)

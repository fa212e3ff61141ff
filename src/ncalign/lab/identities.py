"""Identities between the losses, their values at the reference, their gradients and what leaves them unchanged."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ncalign.lab.policies import Loss, every, firsts, numbers, value_and_gradient
from ncalign.lab.results import EXACT, Findings, Statement, furthest, largest, zero
from ncalign.objectives import (
    dpo_loss,
    info_nca_loss,
    info_nca_weighted_loss,
    nca_loss,
    nca_pair_loss,
    nca_weighted_loss,
    rnce_loss,
    target_weights,
)

ALPHAS = (0.1, 1.0, 50.0)


def _rnce(values: Tensor) -> Tensor:
    return rnce_loss(values, firsts(values), every(values))


def _dpo(values: Tensor) -> Tensor:
    return dpo_loss(values[:, 0], values[:, 1])


def _distances(left: Loss, right: Loss, at: Tensor) -> tuple[float, float]:
    """How far two losses are apart at most, in value and in gradient."""
    (one, its), (other, others) = value_and_gradient(left, at), value_and_gradient(right, at)
    return largest(one - other), largest(its - others)


def _same(statement: str, source: str, left: Loss, right: Loss, at: Tensor) -> list[Statement]:
    value, gradient = _distances(left, right, at)
    return [
        zero(f"{statement}: largest distance in value", source, value),
        zero(f"{statement}: largest distance in gradient", source, gradient),
    ]


def rnce_is_dpo() -> Findings:
    """RNCE with one negative is DPO, for free implicit rewards and for the parameters of a policy."""
    reference, beta = numbers(6, seed=1).log_softmax(dim=0), 0.3

    def implicit(logits: Tensor) -> Tensor:
        return beta * (logits.log_softmax(dim=0) - reference)[[2, 5]].unsqueeze(0)

    source = "MC-PO section 2.3"
    return Findings(
        [
            *_same("RNCE with M = 1 is DPO", source, _rnce, _dpo, numbers(32, 2, seed=0, scale=2.0)),
            *_same(
                "RNCE with M = 1 is DPO, by a policy's logits",
                source,
                lambda logits: _rnce(implicit(logits)),
                lambda logits: _dpo(implicit(logits)),
                numbers(6, seed=2),
            ),
        ]
    )


def rnce_is_one_hot_info_nca() -> Findings:
    """RNCE is InfoNCA whose target puts all weight on the positive."""
    at = numbers(32, 5, seed=3, scale=2.0)
    weights = torch.zeros_like(at)
    weights[:, 0] = 1.0
    return Findings(
        _same(
            "RNCE with M = 4 is InfoNCA with a one-hot target",
            "InfoNCA section 3",
            _rnce,
            lambda r: info_nca_weighted_loss(r, weights, every(r)),
            at,
        )
    )


def info_nca_of_two_is_smoothed_dpo() -> Findings:
    """InfoNCA of two candidates is DPO that believes each label with the probability that the rewards give it."""
    alpha, rewards = 0.7, numbers(16, 2, seed=4)

    def smoothed(r: Tensor) -> Tensor:
        rows = []
        for pair, values in zip(rewards.tolist(), r, strict=True):
            better = 0 if pair[0] >= pair[1] else 1
            wrong = 1 / (1 + math.exp(abs(pair[0] - pair[1]) / alpha))
            rows.append(dpo_loss(values[[better]], values[[1 - better]], label_smoothing=wrong))
        return torch.cat(rows)

    return Findings(
        _same(
            "InfoNCA with K = 2 is DPO with label smoothing sigmoid(-|R1 - R2| / alpha)",
            "InfoNCA section 3",
            lambda r: info_nca_loss(r, rewards, every(r), alpha=alpha),
            smoothed,
            numbers(16, 2, seed=5, scale=2.0),
        )
    )


def values_at_the_reference() -> Findings:
    """Losses where the policy is the reference, so that all implicit rewards are 0."""
    zeros = torch.zeros(8, 4, dtype=torch.float64)
    rewards = numbers(8, 4, seed=6)
    info_nca = torch.stack([info_nca_loss(zeros, rewards, every(zeros), alpha=alpha) for alpha in ALPHAS])
    nca = torch.cat(
        [
            nca_loss(zeros[:, :size], rewards[:, :size], every(zeros[:, :size]), alpha=alpha)
            for alpha, size in itertools.product(ALPHAS, (1, 2, 3, 4))
        ]
    )
    pairs = nca_pair_loss(zeros[:, 0], zeros[:, 1])
    log4, twice = math.log(4), 2 * math.log(2)
    cases = (
        ("RNCE at the reference, M = 3: log(M + 1)", _rnce(zeros), log4),
        ("InfoNCA at the reference, K = 4, every alpha: log K", info_nca, log4),
        ("NCA at the reference, K = 1 to 4, every alpha: 2 log 2", nca, twice),
        ("NCA of a pair at the reference: 2 log 2", pairs, twice),
    )
    return Findings(
        [Statement(text, "follows from the losses", value, furthest(got, value), EXACT) for text, got, value in cases]
    )


def gradient_coefficients() -> Findings:
    """What each implicit reward's gradient is, and that NCA's is half of InfoNCA's at the reference."""
    source = "InfoNCA sections 3 and 4"
    size, rewards = 5, numbers(16, 5, seed=8)
    at, zero, alpha = numbers(16, size, seed=7, scale=2.0), torch.zeros(16, size, dtype=torch.float64), 0.5
    weights = target_weights(rewards, every(rewards), alpha=alpha)

    def info_nca(r: Tensor) -> Tensor:
        return info_nca_loss(r, rewards, every(r), alpha=alpha)

    def nca(r: Tensor) -> Tensor:
        return nca_loss(r, rewards, every(r), alpha=alpha)

    (_, ranking), (_, binary) = value_and_gradient(info_nca, at), value_and_gradient(nca, at)
    (_, ranking_0), (_, binary_0) = value_and_gradient(info_nca, zero), value_and_gradient(nca, zero)
    (_, flat) = value_and_gradient(nca, (size * weights).log())
    cases = (
        ("InfoNCA's gradient is softmax(r) - w: largest distance", 0.0, ranking - (at.softmax(dim=1) - weights)),
        (
            "NCA's gradient is (w + 1/K) sigmoid(r) - w: largest distance",
            0.0,
            binary - ((weights + 1 / size) * at.sigmoid() - weights),
        ),
        ("NCA's gradient is 0 at r = log(K w): largest entry", 0.0, flat),
        ("NCA's gradient over InfoNCA's at r = 0: one half", 0.5, binary_0 / ranking_0),
    )
    return Findings([Statement(text, source, value, furthest(got, value), EXACT) for text, value, got in cases])


def invariances() -> Findings:
    """Only ranking losses ignore a constant added to a group; none depends on the order of candidates or on padding."""
    source = "follows from the losses"
    at, rewards, shift = numbers(8, 4, seed=9), numbers(8, 4, seed=10), numbers(8, 1, seed=11, scale=2.0)

    def info_nca(r: Tensor) -> Tensor:
        return info_nca_loss(r, rewards, every(r), alpha=0.5)

    weights = target_weights(rewards, every(rewards), alpha=0.5)
    raised = nca_weighted_loss(torch.ones_like(at), weights, every(at)) - nca_weighted_loss(
        torch.zeros_like(at), weights, every(at)
    )
    # -log sigmoid(1) - log sigmoid(-1) is 2 log(1 + e) - 1.
    predicted = 2 * math.log1p(math.e) - 1 - 2 * math.log(2)
    return Findings(
        [
            zero("RNCE ignores r + c(x): largest change", source, max(_distances(_rnce, lambda r: _rnce(r + shift), at))),
            zero(
                "InfoNCA ignores r + c(x): largest change", source, max(_distances(info_nca, lambda r: info_nca(r + shift), at))
            ),
            Statement(
                "NCA does not: from r = 0 to r = 1 it rises by 2 log(1 + e) - 1 - 2 log 2",
                source,
                predicted,
                furthest(raised, predicted),
                EXACT,
            ),
            zero("order of the candidates: largest change over all orders", source, _permuted(at, rewards)),
            zero("padding that holds NaN: largest change", source, _padded(at, rewards)),
        ]
    )


def _permuted(at: Tensor, rewards: Tensor) -> float:
    """Largest change of the three losses when their candidates change places."""
    worst = 0.0
    for order in itertools.permutations(range(at.shape[1])):
        places = list(order)
        positive = torch.full((at.shape[0],), places.index(0))
        moved = rnce_loss(at[:, places], positive, every(at)) - _rnce(at)
        worst = max(worst, largest(moved))
        for loss in (info_nca_loss, nca_loss):
            moved = loss(at[:, places], rewards[:, places], every(at), alpha=0.5) - loss(at, rewards, every(at), alpha=0.5)
            worst = max(worst, largest(moved))
    return worst


def _padded(at: Tensor, rewards: Tensor) -> float:
    """Largest change of the three losses when masked columns of NaN are added."""
    nothing = torch.full((at.shape[0], 2), math.nan, dtype=at.dtype)
    wide, wide_rewards = torch.cat([at, nothing], dim=1), torch.cat([rewards, nothing], dim=1)
    mask = ~wide.isnan()
    changes = [rnce_loss(wide, firsts(wide), mask) - _rnce(at)]
    for loss in (info_nca_loss, nca_loss):
        changes.append(loss(wide, wide_rewards, mask, alpha=0.5) - loss(at, rewards, every(at), alpha=0.5))
    return largest(torch.stack(changes))


EXPERIMENTS = (
    rnce_is_dpo,
    rnce_is_one_hot_info_nca,
    info_nca_of_two_is_smoothed_dpo,
    values_at_the_reference,
    gradient_coefficients,
    invariances,
)

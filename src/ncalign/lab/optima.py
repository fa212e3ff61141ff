"""Where InfoNCA and NCA have their optimum: found by Newton's method on the exact expected loss, and compared with theory."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ncalign.lab.policies import (
    RewardLoss,
    every,
    minimum,
    multiset_probabilities,
    multisets,
    numbers,
    sequence_probabilities,
    share,
    spread,
    total_variation,
    tuples,
)
from ncalign.lab.results import Curve, Findings, Statement, fitted_exponent, largest, zero
from ncalign.objectives import info_nca_loss, nca_loss, nca_pair_loss, nca_weighted_loss, normalized_weights, target_weights

SIZE, GROUP = 4, 3
FOUND = 1e-9
"""Tolerance of what a numerical minimum gives."""
SOURCE_INFO_NCA, SOURCE_NCA, SOURCE_FINITE = "InfoNCA section 3", "NCA section 4", "NCA section 4 at a finite K"


def _optimum(
    loss: RewardLoss, rewards: Float[Tensor, " V"], proposal: Float[Tensor, " V"], size: int, start: Float[Tensor, " V"]
) -> Float[Tensor, " V"]:
    """The implicit rewards with the smallest expected loss over all groups of a size that the proposal can draw."""
    columns = tuples(SIZE, size)
    weights, groups = sequence_probabilities(columns, proposal), rewards[columns]
    return minimum(lambda r: (weights * loss(r[columns], groups)).sum(), start)


def _info_nca(alpha: float) -> RewardLoss:
    return lambda r, rewards: info_nca_loss(r, rewards, every(rewards), alpha=alpha)


def _nca(alpha: float) -> RewardLoss:
    return lambda r, rewards: nca_loss(r, rewards, every(rewards), alpha=alpha)


def info_nca_optimum() -> Findings:
    """InfoNCA's optimum is R / alpha and a constant, whatever the group's size and proposal are."""
    proposal, rewards, alpha = numbers(SIZE, seed=40).softmax(dim=0), numbers(SIZE, seed=41), 0.5
    statements = []
    for size in (2, GROUP):
        found = _optimum(_info_nca(alpha), rewards, proposal, size, numbers(SIZE, seed=42))
        statement = f"InfoNCA's optimum is R/alpha + C, K = {size}: spread of r - R/alpha"
        statements.append(zero(statement, SOURCE_INFO_NCA, spread(found - rewards / alpha), FOUND))
    return Findings(statements)


def info_nca_depends_on_alpha_times_beta() -> Findings:
    """InfoNCA's optimal policy is the reference times exp(R / (alpha beta)): only the product counts."""
    reference, rewards = numbers(SIZE, seed=43).log_softmax(dim=0), numbers(SIZE, seed=44)
    columns = tuples(SIZE, GROUP)
    weights, groups = sequence_probabilities(columns, reference.exp()), rewards[columns]
    predicted = (reference + rewards / 0.2).softmax(dim=0)
    statements = []
    for alpha, beta in ((0.2, 1.0), (1.0, 0.2), (0.5, 0.4)):

        def expected(logits: Tensor, alpha: float = alpha, beta: float = beta) -> Tensor:
            r = beta * (logits.log_softmax(dim=0) - reference)
            return (weights * info_nca_loss(r[columns], groups, every(groups), alpha=alpha)).sum()

        policy = minimum(expected, reference).softmax(dim=0)
        statement = f"InfoNCA's optimal policy, alpha = {alpha} and beta = {beta}: total variation to that of alpha beta = 0.2"
        statements.append(zero(statement, SOURCE_INFO_NCA, float(total_variation(policy, predicted)), FOUND))
    return Findings(statements)


def nca_optimum_with_true_normalizer() -> Findings:
    """With the true normaliser NCA's optimum is exact at every group size."""
    proposal, rewards, alpha = numbers(SIZE, seed=45).softmax(dim=0), numbers(SIZE, seed=46), 0.7
    log_z = float((proposal.log() + rewards / alpha).logsumexp(dim=0))

    def loss(r: Tensor, groups: Tensor) -> Tensor:
        targets = normalized_weights(groups, every(groups), alpha=alpha, log_normalizer=log_z)
        return nca_weighted_loss(r, targets, every(targets))

    statements = []
    for size in (1, 2, GROUP):
        found = _optimum(loss, rewards, proposal, size, torch.zeros(SIZE, dtype=torch.float64))
        statement = f"NCA's optimum with the true normaliser is R/alpha - log Z, K = {size}: largest distance"
        statements.append(zero(statement, SOURCE_NCA, largest(found - (rewards / alpha - log_z)), FOUND))
    return Findings(statements)


def mean_weight(rewards: Float[Tensor, " V"], proposal: Float[Tensor, " V"], completion: int, size: int, alpha: float) -> float:
    """Expected target weight of a completion over the groups that it is in: the others are drawn from the proposal."""
    others, counts, log_orders = multisets(rewards.shape[0], size - 1)
    groups = torch.cat([rewards[torch.full((others.shape[0], 1), completion)], rewards[others]], dim=1)
    weights = target_weights(groups, every(groups), alpha=alpha)[:, 0]
    return float((multiset_probabilities(counts, log_orders, proposal) * weights).sum())


def nca_optimum_of_a_group() -> Findings:
    """With weights that a group normalises itself NCA's optimum is log(K E[w | y])."""
    proposal, rewards, alpha = numbers(SIZE, seed=47).softmax(dim=0), numbers(SIZE, seed=48), 0.5
    statements = []
    for size in (2, GROUP, 4):
        found = _optimum(_nca(alpha), rewards, proposal, size, torch.zeros(SIZE, dtype=torch.float64))
        means = [mean_weight(rewards, proposal, completion, size, alpha) for completion in range(SIZE)]
        off = largest(found - (size * torch.tensor(means, dtype=torch.float64)).log())
        statement = f"NCA's optimum with a group's own weights is log(K E[w|y]), K = {size}: largest distance"
        statements.append(zero(statement, SOURCE_FINITE, off, FOUND))
    return Findings(statements)


def nca_ceiling() -> Findings:
    """The best completion's implicit reward at NCA's optimum by K and alpha: at least 0, at most log K, true as K grows."""
    proposal, rewards = numbers(SIZE, seed=47).softmax(dim=0), numbers(SIZE, seed=48)
    best = int(rewards.argmax())
    sizes, alphas = (2, 3, 4, 6, 8, 12, 16, 24, 32), (1.0, 0.5, 0.2, 0.05)
    lines = {f"alpha = {a}": [(float(k), _at_optimum(rewards, proposal, best, k, a)) for k in sizes] for a in alphas}
    ceiling = [(float(size), math.log(size)) for size in sizes]
    heights = torch.tensor([[height for _, height in line] for line in lines.values()], dtype=torch.float64)
    exact = float(rewards[best]) - float((proposal.log() + rewards).logsumexp(dim=0))
    gap = [(size, exact - height) for size, height in lines["alpha = 1.0"]]
    statements = [
        zero(
            "NCA's best completion at its optimum is at 0 or above: lowest below 0",
            SOURCE_NCA,
            float(heights.clamp(max=0).min()),
        ),
        zero(
            "NCA's best completion at its optimum is at log K or below: highest above log K",
            SOURCE_FINITE,
            float((heights - torch.tensor(ceiling, dtype=torch.float64)[:, 1]).clamp(min=0).max()),
        ),
        Statement(
            "a group's own weights, alpha = 1: exponent of K from 12 to 32 in the distance to R/alpha - log Z",
            SOURCE_FINITE,
            -1.0,
            fitted_exponent(gap, start=12),
            0.1,
        ),
    ]
    curve = Curve(
        "nca_ceiling",
        "Implicit reward of the best completion at NCA's optimum",
        "candidates K",
        "implicit reward",
        {**lines, "ceiling log K": ceiling},
        log_x=True,
        note="A small alpha runs along the ceiling until copies of the best completion share its weight.",
    )
    return Findings(statements, [curve])


def _at_optimum(rewards: Tensor, proposal: Tensor, completion: int, size: int, alpha: float) -> float:
    return math.log(size * mean_weight(rewards, proposal, completion, size, alpha))


def _of_one_group(loss: RewardLoss, rewards: Float[Tensor, " K"], start: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """The implicit rewards with the smallest loss of a single group."""
    return minimum(lambda r: loss(r.unsqueeze(0), rewards.unsqueeze(0)).sum(), start)


def nca_never_lowers_the_best() -> Findings:
    """At NCA's optimum the best candidate of a group is at least as likely as under the reference."""
    rewards, start = numbers(50, 4, seed=49), torch.zeros(4, dtype=torch.float64)
    found = torch.stack([_of_one_group(_nca(0.8), group, start) for group in rewards])
    best = found.gather(1, rewards.argmax(dim=1, keepdim=True)).squeeze(1)
    lowered = "NCA never lowers the best candidate at its optimum: share of 50 groups in which it does"
    raised = "nor raises it above log K: share of 50 groups"
    return Findings(
        [zero(lowered, SOURCE_NCA, share(best < 0), 0.0), zero(raised, SOURCE_FINITE, share(best > math.log(4)), 0.0)]
    )


def pair_cap() -> Findings:
    """NCA of a pair draws the chosen completion to log 2 from either side."""
    found = [
        float(minimum(lambda r: nca_pair_loss(r[:1], r[1:] - 20.0).sum(), torch.tensor([start, 0.0], dtype=torch.float64))[0])
        for start in (-2.0, 3.0)
    ]
    furthest_off = max(found, key=lambda r: abs(r - math.log(2)))
    return Findings(
        [
            Statement(
                "NCA of a pair caps the chosen one's implicit reward at log 2", SOURCE_FINITE, math.log(2), furthest_off, 1e-6
            )
        ]
    )


def limits_of_alpha() -> Findings:
    """A high alpha makes both optima constant; a low one gives InfoNCA no limit and NCA's best candidate log K."""
    rewards, start = numbers(4, seed=50), torch.zeros(4, dtype=torch.float64)
    flat = _of_one_group(_info_nca(math.inf), rewards, numbers(4, seed=51))
    level, lowest = (_of_one_group(_nca(alpha), rewards, start) for alpha in (math.inf, 0.05))
    source = "follows from the optima"
    return Findings(
        [
            zero("InfoNCA's optimum at alpha = infinity is constant: spread", source, spread(flat), FOUND),
            zero("NCA's optimum at alpha = infinity is 0: largest entry", source, largest(level), FOUND),
            Statement(
                "NCA's best of K = 4 as alpha falls to 0.05: log K", source, math.log(4), float(lowest[rewards.argmax()]), 1e-3
            ),
        ]
    )


EXPERIMENTS = (
    info_nca_optimum,
    info_nca_depends_on_alpha_times_beta,
    nca_optimum_with_true_normalizer,
    nca_optimum_of_a_group,
    nca_ceiling,
    nca_never_lowers_the_best,
    pair_cap,
    limits_of_alpha,
)

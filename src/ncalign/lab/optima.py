"""Where InfoNCA and NCA have their optimum: found by Newton's method on the exact expected loss, and compared with theory."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ncalign.lab.policies import (
    RewardLoss,
    every,
    info_nca,
    minimum,
    multiset_probabilities,
    multisets,
    nca,
    numbers,
    sequence_probabilities,
    spread,
    total_variation,
    tuples,
)
from ncalign.lab.results import Curve, Findings, fitted_exponent
from ncalign.objectives import nca_pair_loss, nca_weighted_loss, normalized_weights, target_weights

SIZE, GROUP = 4, 3
FOUND = 1e-9
"""Tolerance of what a numerical minimum gives."""
SOURCE_FINITE = "NCA section 4 at a finite K"


def _optimum(
    loss: RewardLoss, rewards: Float[Tensor, " V"], proposal: Float[Tensor, " V"], size: int, start: Float[Tensor, " V"]
) -> Float[Tensor, " V"]:
    """The implicit rewards with the smallest expected loss over all groups of a size that the proposal can draw."""
    columns, counts, log_orders = multisets(SIZE, size)
    weights, groups = multiset_probabilities(counts, log_orders, proposal), rewards[columns]
    return minimum(lambda r: (weights * loss(r[columns], groups)).sum(), start)


def info_nca_optimum() -> Findings:
    """InfoNCA's optimum is R / alpha and a constant, whatever the group's size and proposal are."""
    found, alpha = Findings("InfoNCA section 3"), 0.5
    proposal, rewards = numbers(SIZE, seed=40).softmax(dim=0), numbers(SIZE, seed=41)
    for size in (2, GROUP):
        optimum = _optimum(info_nca(alpha), rewards, proposal, size, numbers(SIZE, seed=42))
        found.zero(
            f"InfoNCA's optimum is R/alpha + C, K = {size}: spread of r - R/alpha", spread(optimum - rewards / alpha), FOUND
        )
    return found


def info_nca_depends_on_alpha_times_beta() -> Findings:
    """InfoNCA's optimal policy is the reference times exp(R / (alpha beta)): only the product counts."""
    found = Findings("InfoNCA section 3")
    reference, rewards = numbers(SIZE, seed=43).log_softmax(dim=0), numbers(SIZE, seed=44)
    columns = tuples(SIZE, GROUP)
    weights, groups = sequence_probabilities(columns, reference.exp()), rewards[columns]
    predicted = (reference + rewards / 0.2).softmax(dim=0)
    for alpha, beta in ((0.2, 1.0), (1.0, 0.2), (0.5, 0.4)):

        def expected(logits: Tensor, alpha: float = alpha, beta: float = beta) -> Tensor:
            r = beta * (logits.log_softmax(dim=0) - reference)
            return (weights * info_nca(alpha)(r[columns], groups)).sum()

        distance = total_variation(minimum(expected, reference).softmax(dim=0), predicted)
        statement = f"InfoNCA's optimal policy, alpha = {alpha} and beta = {beta}: total variation to that of alpha beta = 0.2"
        found.zero(statement, distance, FOUND)
    return found


def nca_optimum_with_true_normalizer() -> Findings:
    """With the true normaliser NCA's optimum is exact at every group size."""
    found, alpha = Findings("NCA section 4"), 0.7
    proposal, rewards = numbers(SIZE, seed=45).softmax(dim=0), numbers(SIZE, seed=46)
    log_z = float((proposal.log() + rewards / alpha).logsumexp(dim=0))

    def loss(r: Tensor, groups: Tensor) -> Tensor:
        targets = normalized_weights(groups, every(groups), alpha=alpha, log_normalizer=log_z)
        return nca_weighted_loss(r, targets, every(targets))

    for size in (1, 2, GROUP):
        off = _optimum(loss, rewards, proposal, size, torch.zeros_like(rewards)) - (rewards / alpha - log_z)
        statement = f"NCA's optimum with the true normaliser is R/alpha - log Z, K = {size}: largest distance"
        found.zero(statement, off, FOUND)
    return found


def mean_weight(rewards: Float[Tensor, " V"], proposal: Float[Tensor, " V"], completion: int, size: int, alpha: float) -> float:
    """Expected target weight of a completion over the groups that it is in: the others are drawn from the proposal."""
    others, counts, log_orders = multisets(rewards.shape[0], size - 1)
    groups = torch.cat([rewards[torch.full((others.shape[0], 1), completion)], rewards[others]], dim=1)
    weights = target_weights(groups, every(groups), alpha=alpha)[:, 0]
    return float((multiset_probabilities(counts, log_orders, proposal) * weights).sum())


def nca_optimum_of_a_group() -> Findings:
    """With weights that a group normalises itself NCA's optimum is log(K E[w | y])."""
    found, alpha = Findings(SOURCE_FINITE), 0.5
    proposal, rewards = numbers(SIZE, seed=47).softmax(dim=0), numbers(SIZE, seed=48)
    for size in (2, GROUP, 4):
        optimum = _optimum(nca(alpha), rewards, proposal, size, torch.zeros_like(rewards))
        means = [mean_weight(rewards, proposal, completion, size, alpha) for completion in range(SIZE)]
        off = optimum - (size * torch.tensor(means, dtype=torch.float64)).log()
        found.zero(f"NCA's optimum with a group's own weights is log(K E[w|y]), K = {size}: largest distance", off, FOUND)
    return found


def nca_ceiling() -> Findings:
    """The best completion's implicit reward at NCA's optimum by K and alpha: at least 0, at most log K, true as K grows."""
    found = Findings(SOURCE_FINITE)
    proposal, rewards = numbers(SIZE, seed=47).softmax(dim=0), numbers(SIZE, seed=48)
    best = int(rewards.argmax())
    sizes, alphas = (2, 3, 4, 6, 8, 12, 16, 24, 32), (1.0, 0.5, 0.2, 0.05)
    heights = [[math.log(k * mean_weight(rewards, proposal, best, k, a)) for k in sizes] for a in alphas]
    start, few = torch.zeros_like(rewards), (2, 4, 8)
    reached = [[float(_optimum(nca(a), rewards, proposal, k, start)[best]) for k in few] for a in alphas]
    off = [
        value - line[sizes.index(k)]
        for values, line in zip(reached, heights, strict=True)
        for value, k in zip(values, few, strict=True)
    ]
    statement = "NCA's best completion at its optimum is at log(K E[w|y]), K = 2 to 8, alpha = 1 to 0.05: largest distance"
    found.zero(statement, off, FOUND)
    # Weights that are one-hot up to copies: 1 / (1 + n) with n further copies, a binomial number of them.
    p = float(proposal[best])
    sharp = [float(_optimum(nca(0.002), rewards, proposal, k, start)[best]) - math.log((1 - (1 - p) ** k) / p) for k in few]
    statement = "as alpha falls to 0 it is at log((1 - (1 - p)^K) / p) with p the proposal's probability: largest distance"
    found.zero(statement, sharp, FOUND)
    exact = float(rewards[best]) - float((proposal.log() + rewards).logsumexp(dim=0))
    gap = [(float(size), exact - height) for size, height in zip(sizes, heights[0], strict=True)]
    statement = "a group's own weights, alpha = 1: exponent of K from 12 to 32 in the distance to R/alpha - log Z"
    found.equal(statement, -1.0, fitted_exponent(gap, start=12), 0.1)
    names, ceiling = [*(f"alpha = {alpha}" for alpha in alphas), "ceiling log K"], [math.log(size) for size in sizes]
    found.curves.append(
        Curve(
            "nca_ceiling",
            "Implicit reward of the best completion at NCA's optimum",
            "candidates K",
            "implicit reward",
            {name: list(zip(sizes, line, strict=True)) for name, line in zip(names, [*heights, ceiling], strict=True)},
            log="x",
            note="A small alpha runs along the ceiling until copies of the best completion share its weight.",
        )
    )
    return found


def _of_one_group(loss: RewardLoss, rewards: Float[Tensor, " K"], start: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """The implicit rewards with the smallest loss of a single group."""
    return minimum(lambda r: loss(r.unsqueeze(0), rewards.unsqueeze(0)).sum(), start)


def nca_never_lowers_the_best() -> Findings:
    """At NCA's optimum the best candidate of a group is at least as likely as under the reference, and at most K times."""
    found, rewards = Findings(SOURCE_FINITE), numbers(50, 4, seed=49)
    # Rewards a twentieth apart at least, so that the smallest alpha tells every group's best from the next.
    apart = rewards[(rewards.sort(dim=1).values.diff(dim=1) > 0.05).all(dim=1)][:4]
    groups = {math.inf: rewards[:10], 0.8: rewards, 0.002: apart}
    heights = {alpha: _best_of_one_group(alpha, of) for alpha, of in groups.items()}
    weights = target_weights(rewards, every(rewards), alpha=0.8).amax(dim=1)
    statement = "NCA's best candidate at the optimum of its group is at log(K w), 50 groups: largest distance"
    found.zero(statement, heights[0.8] - (4 * weights).log(), FOUND)
    every_height = torch.cat(list(heights.values()))
    statement = "NCA never lowers the best candidate at its optimum: lowest over alpha, reached at infinity"
    found.equal(statement, 0.0, float(every_height.min()), FOUND, source="NCA section 4")
    statement = "nor raises it above log K: highest over alpha, reached as alpha falls to 0"
    found.equal(statement, math.log(4), float(every_height.max()), FOUND)
    return found


def _best_of_one_group(alpha: float, rewards: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """The best candidate's implicit reward where each group's NCA loss is smallest."""
    optima = torch.stack([_of_one_group(nca(alpha), group, torch.zeros_like(group)) for group in rewards])
    return optima.gather(1, rewards.argmax(dim=1, keepdim=True)).squeeze(1)


def pair_cap() -> Findings:
    """NCA of a pair draws the chosen completion to log 2 from either side."""
    found = Findings(SOURCE_FINITE)
    starts = (torch.tensor([chosen, 0.0], dtype=torch.float64) for chosen in (-2.0, 3.0))
    ends = [float(minimum(lambda r: nca_pair_loss(r[:1], r[1:] - 20.0).sum(), start)[0]) for start in starts]
    found.equal("NCA of a pair caps the chosen one's implicit reward at log 2", math.log(2), ends, 1e-6)
    return found


def limits_of_alpha() -> Findings:
    """A high alpha makes both optima constant; a low one gives InfoNCA no limit and NCA's best candidate log K."""
    found, rewards = Findings("follows from the optima"), numbers(4, seed=50)
    flat = _of_one_group(info_nca(math.inf), rewards, numbers(4, seed=51))
    level, lowest = (_of_one_group(nca(alpha), rewards, torch.zeros_like(rewards)) for alpha in (math.inf, 0.05))
    found.zero("InfoNCA's optimum at alpha = infinity is constant: spread", spread(flat), FOUND)
    found.zero("NCA's optimum at alpha = infinity is 0: largest entry", level, FOUND)
    found.equal("NCA's best of K = 4 as alpha falls to 0.05: log K", math.log(4), lowest[rewards.argmax()], 1e-3)
    return found

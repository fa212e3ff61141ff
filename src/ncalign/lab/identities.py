"""Identities between the losses, their values at the reference, their gradients and what leaves them unchanged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ncalign.lab.policies import Loss, RewardLoss, every, firsts, info_nca, nca, numbers, value_and_gradient
from ncalign.lab.results import Findings, largest
from ncalign.objectives import (
    MCPO,
    RNCE,
    LossInputs,
    ObjectiveConfig,
    build_method,
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

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""``(chosen [B], rejected [B]) -> [B]``, such as `dpo_loss`."""


def _rnce(values: Tensor) -> Tensor:
    return rnce_loss(values, firsts(values), every(values))


def _dpo(values: Tensor) -> Tensor:
    return dpo_loss(values[:, 0], values[:, 1])


def _distances(left: Loss, right: Loss, at: Tensor) -> list[float]:
    """How far two losses are apart at most, in value and in gradient."""
    pairs = zip(value_and_gradient(left, at), value_and_gradient(right, at), strict=True)
    return [largest(one - other) for one, other in pairs]


def _same(found: Findings, statement: str, left: Loss, right: Loss, at: Tensor) -> None:
    value, gradient = _distances(left, right, at)
    found.zero(f"{statement}: largest distance in value", value)
    found.zero(f"{statement}: largest distance in gradient", gradient)


def rnce_is_dpo() -> Findings:
    """RNCE with one negative is DPO, for free implicit rewards and for the parameters of a policy."""
    found = Findings("MC-PO section 2.3")
    reference, beta = numbers(6, seed=1).log_softmax(dim=0), 0.3

    def of_policy(loss: Loss) -> Loss:
        return lambda logits: loss(beta * (logits.log_softmax(dim=0) - reference)[[2, 5]].unsqueeze(0))

    _same(found, "RNCE with M = 1 is DPO", _rnce, _dpo, numbers(32, 2, seed=0, scale=2.0))
    _same(found, "RNCE with M = 1 is DPO, by a policy's logits", of_policy(_rnce), of_policy(_dpo), numbers(6, seed=2))
    return found


def rnce_is_one_hot_info_nca() -> Findings:
    """RNCE is InfoNCA whose target puts all weight on the positive."""
    found, at = Findings("InfoNCA section 3"), numbers(32, 5, seed=3, scale=2.0)
    weights = torch.zeros_like(at)
    weights[:, 0] = 1.0

    def one_hot(r: Tensor) -> Tensor:
        return info_nca_weighted_loss(r, weights, every(r))

    _same(found, "RNCE with M = 4 is InfoNCA with a one-hot target", _rnce, one_hot, at)
    return found


def info_nca_of_two_is_smoothed_dpo() -> Findings:
    """InfoNCA of two candidates is DPO that believes each label with the probability that the rewards give it."""
    found, alpha, rewards = Findings("InfoNCA section 3"), 0.7, numbers(16, 2, seed=4)

    def smoothed(r: Tensor) -> Tensor:
        rows = []
        for pair, values in zip(rewards.tolist(), r, strict=True):
            better = 0 if pair[0] >= pair[1] else 1
            wrong = 1 / (1 + math.exp(abs(pair[0] - pair[1]) / alpha))
            rows.append(dpo_loss(values[[better]], values[[1 - better]], label_smoothing=wrong))
        return torch.cat(rows)

    statement = "InfoNCA with K = 2 is DPO with label smoothing sigmoid(-|R1 - R2| / alpha)"
    _same(found, statement, lambda r: info_nca(alpha)(r, rewards), smoothed, numbers(16, 2, seed=5, scale=2.0))
    return found


def limits_of_two() -> Findings:
    """As alpha falls to 0 the targets of two candidates become a label: InfoNCA becomes DPO, and NCA the NCA of a pair."""
    found, rewards = Findings("InfoNCA sections 3 and 4"), numbers(16, 2, seed=12)
    # At least a tenth apart: the other weight is below exp(-50).
    rewards = rewards + 0.1 * (rewards - rewards.mean(dim=1, keepdim=True)).sign()
    better = rewards.argmax(dim=1, keepdim=True)

    def by_label(loss: PairLoss) -> Loss:
        return lambda r: loss(r.gather(1, better).squeeze(1), r.gather(1, 1 - better).squeeze(1))

    at = numbers(16, 2, seed=13, scale=2.0)
    statement = "InfoNCA with K = 2 is DPO as alpha falls to 0.002"
    _same(found, statement, lambda r: info_nca(0.002)(r, rewards), by_label(dpo_loss), at)
    statement = "NCA with K = 2 is the NCA of a pair as alpha falls to 0.002"
    _same(found, statement, lambda r: nca(0.002)(r, rewards), by_label(nca_pair_loss), at)
    return found


def ties() -> Findings:
    """Candidates tied with the positive are no negatives, and the tied best share a target weight."""
    found = Findings("our choice; see the kernels' page")
    rewards = torch.tensor([[0.5, 1.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    logprobs, zeros = numbers(1, 5, seed=14, scale=3.0), torch.zeros_like(rewards)
    mask, below = every(rewards), rewards < 1.0
    # Whichever of the two best is drawn as the positive.
    at_reference = [_sampled_loss(RNCE(), zeros, rewards, seed=seed) for seed in range(8)]
    statement = "RNCE at the reference, two best of five: log(1 + 3), the candidates strictly below and the positive"
    found.equal(statement, math.log(4), torch.cat(at_reference))
    method = build_method(MCPO(beta=1.0))
    assert method.sampler is not None
    assert method.sampler.kernel is not None
    scores = method.kernel_scores(logprobs, zeros)
    assert scores is not None
    drawn = torch.cat([method.sampler.kernel(scores, torch.tensor([best]), rewards, mask) for best in (1, 3)])
    found.zero("MC-PO's kernel: probability of the positive and of candidates tied with it", drawn[:, ~below[0]])
    expected = torch.where(below, logprobs, -torch.inf).softmax(dim=1)
    found.zero("MC-PO's kernel: softmax of the scores strictly below, largest distance", drawn - expected)
    shares = target_weights(rewards, mask, alpha=0.001)[~below]
    found.equal("target weights of two tied best candidates as alpha falls to 0.001: one half each", 0.5, shares)
    return found


def _sampled_loss(objective: ObjectiveConfig, log_ratios: Tensor, rewards: Tensor, *, seed: int) -> Tensor:
    """A method's loss of the candidates that its sampler selects, where it needs no scores."""
    method, mask = build_method(objective), every(rewards)
    assert method.sampler is not None
    columns = method.sampler.select(None, rewards, mask, torch.Generator().manual_seed(seed))
    ratios, chosen = (values.gather(1, columns.clamp(min=0)) for values in (log_ratios, rewards))
    return method.loss(LossInputs(ratios, ratios, chosen, torch.ones_like(ratios), columns >= 0))


def values_at_the_reference() -> Findings:
    """Losses where the policy is the reference, so that all implicit rewards are 0."""
    found, log4 = Findings("follows from the losses"), math.log(4)
    zeros, rewards = torch.zeros(8, 4, dtype=torch.float64), numbers(8, 4, seed=6)
    rankings = torch.cat([info_nca(alpha)(zeros, rewards) for alpha in ALPHAS])
    binaries = torch.cat([nca(alpha)(zeros[:, :size], rewards[:, :size]) for alpha in ALPHAS for size in (1, 2, 3, 4)])
    found.equal("RNCE at the reference, M = 3: log(M + 1)", log4, _rnce(zeros))
    found.equal("InfoNCA at the reference, K = 4, every alpha: log K", log4, rankings)
    found.equal("NCA at the reference, K = 1 to 4, every alpha: 2 log 2", 2 * math.log(2), binaries)
    found.equal("NCA of a pair at the reference: 2 log 2", 2 * math.log(2), nca_pair_loss(zeros[:, 0], zeros[:, 1]))
    return found


def gradient_coefficients() -> Findings:
    """What each implicit reward's gradient is, and that NCA's is half of InfoNCA's at the reference."""
    found, alpha, size = Findings("InfoNCA sections 3 and 4"), 0.5, 5
    at, rewards = numbers(16, size, seed=7, scale=2.0), numbers(16, size, seed=8)
    zeros, weights = torch.zeros_like(at), target_weights(rewards, every(rewards), alpha=alpha)

    def gradient(loss: RewardLoss, point: Tensor) -> Tensor:
        return value_and_gradient(lambda r: loss(r, rewards), point)[1]

    ranking = gradient(info_nca(alpha), at) - (at.softmax(dim=1) - weights)
    binary = gradient(nca(alpha), at) - ((weights + 1 / size) * at.sigmoid() - weights)
    ratio = gradient(nca(alpha), zeros) / gradient(info_nca(alpha), zeros)
    found.equal("InfoNCA's gradient is softmax(r) - w: largest distance", 0.0, ranking)
    found.equal("NCA's gradient is (w + 1/K) sigmoid(r) - w: largest distance", 0.0, binary)
    found.equal("NCA's gradient is 0 at r = log(K w): largest entry", 0.0, gradient(nca(alpha), (size * weights).log()))
    found.equal("NCA's gradient over InfoNCA's at r = 0: one half", 0.5, ratio)
    return found


def invariances() -> Findings:
    """Only ranking losses ignore a constant added to a group; none depends on the order of candidates or on padding."""
    found = Findings("follows from the losses")
    at, rewards, shift = numbers(8, 4, seed=9), numbers(8, 4, seed=10), numbers(8, 1, seed=11, scale=2.0)

    def shifted(loss: Loss) -> list[float]:
        return _distances(loss, lambda r: loss(r + shift), at)

    found.zero("RNCE ignores r + c(x): largest change", shifted(_rnce))
    found.zero("InfoNCA ignores r + c(x): largest change", shifted(lambda r: info_nca(0.5)(r, rewards)))
    weights, ones = target_weights(rewards, every(rewards), alpha=0.5), torch.ones_like(at)
    raised = nca_weighted_loss(ones, weights, every(at)) - nca_weighted_loss(0 * ones, weights, every(at))
    # -log sigmoid(1) - log sigmoid(-1) is 2 log(1 + e) - 1.
    predicted = 2 * math.log1p(math.e) - 1 - 2 * math.log(2)
    found.equal("NCA does not: from r = 0 to r = 1 it rises by 2 log(1 + e) - 1 - 2 log 2", predicted, raised)

    plain = _losses(at, rewards, positive=0)
    orders = [list(order) for order in itertools.permutations(range(at.shape[1]))]
    permuted = torch.stack([_losses(at[:, order], rewards[:, order], positive=order.index(0)) for order in orders])
    padded = _losses(*(torch.nn.functional.pad(values, (0, 2), value=math.nan) for values in (at, rewards)), positive=0)
    found.zero("order of the candidates: largest change over all orders", permuted - plain)
    found.zero("padding that holds NaN: largest change", padded - plain)
    return found


def _losses(r: Tensor, rewards: Tensor, *, positive: int) -> Tensor:
    """RNCE, InfoNCA and NCA of the same groups, ``[3, B]``; NaN is padding."""
    mask = ~r.isnan()
    rnce = rnce_loss(r, torch.full((r.shape[0],), positive), mask)
    return torch.stack([rnce, *(loss(r, rewards, mask, alpha=0.5) for loss in (info_nca_loss, nca_loss))])

"""Whole groups' sums from a few candidates: coefficient sampling, several negatives, held sample sizes, last-visit proposals.

Every sample that a systematic draw can give is enumerated: all orders of the candidates and, for each, the stretches of starts
that give one sample, whose lengths are probabilities.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncalign.lab.policies import every, firsts, group_gradients, numbers, value_and_gradient
from ncalign.lab.results import Findings
from ncalign.objectives import MCPO, RNCE, InfoNCA, LossInputs, Method, build_method, linear_contrast_loss
from ncalign.objectives.binary import NCA
from ncalign.objectives.estimators import coefficients, enter, relative_variance, surrogate_loss
from ncalign.objectives.inclusion import systematic_from
from ncalign.objectives.kernels import KernelSettings, build_kernel, effective_sample_size, kernel_probabilities
from ncalign.objectives.samplers import Sampler

SIZE = 5
SHARES = (0.4, 0.6, 0.8, 0.95)


def samples(expected: Float[Tensor, " K"]) -> Iterator[tuple[float, Int[Tensor, " K"]]]:
    """How often each candidate is drawn in each sample that a systematic draw can give, with the sample's probability."""
    orders = torch.tensor(list(itertools.permutations(range(len(expected)))))
    for order in orders:
        ends = expected[order].cumsum(dim=0) % 1
        cuts = torch.cat([torch.zeros(1), ends, torch.ones(1)]).unique()
        lengths = cuts.diff()
        starts = (cuts[:-1] + lengths / 2)[lengths > 1e-12]
        drawn = systematic_from(expected[order].expand(len(starts), -1), starts)
        for length, counts in zip(lengths[lengths > 1e-12].tolist(), drawn, strict=True):
            yield length / len(orders), torch.zeros_like(counts).scatter(0, order, counts)


def moments(expected: Float[Tensor, " K"], values: Float[Tensor, " K"]) -> tuple[Float[Tensor, " K"], float]:
    """Mean and summed variance of each candidate's value times how often it is drawn over how often it is on average."""
    scaled = torch.where(expected > 0, values / expected.clamp(min=1e-300), 0.0)
    drawn = [(share, counts * scaled) for share, counts in samples(expected)]
    mean = torch.stack([share * vector for share, vector in drawn]).sum(dim=0)
    return mean, sum(share * float((vector - mean).square().sum()) for share, vector in drawn)


def _whole_loss(method: Method, rewards: Float[Tensor, "1 K"], r: Float[Tensor, "1 K"]) -> Float[Tensor, " 1"]:
    """A method's loss of a group whose candidates all enter, the positive first."""
    return method.loss(LossInputs(r, r, rewards, torch.ones_like(r), every(r)))


def coefficient_sampling() -> Findings:
    """A few candidates, drawn by the sizes of their coefficients, give the whole group's gradient on average."""
    found = Findings("Horvitz and Thompson (1952)")
    r, rewards = numbers(1, SIZE, seed=80), numbers(1, SIZE, seed=81).sort(dim=1, descending=True).values
    methods = [NCA(alpha=0.5, beta=1.0).method(), InfoNCA(alpha=0.5, beta=1.0).method(), RNCE(beta=1.0).method()]
    for method in methods:
        loss, name = partial(_whole_loss, method, rewards), method.name
        _, whole = value_and_gradient(loss, r)
        c = coefficients(loss, r)
        biases, variances = [], []
        for size in (2, 3):
            probabilities = enter(c, size)
            mean, variance = moments(probabilities[0], _trained(c, probabilities)[0])
            biases.append(mean - whole[0])
            squares = c.square()
            variances += [
                variance - float((squares / probabilities.clamp(min=1e-300) - squares).sum()),
                variance / float(squares.sum()) - float(relative_variance(c, probabilities)),
            ]
        found.zero(
            f"{name}, 2 or 3 of 5 by their coefficients: mean gradient over every sample, distance to the whole",
            torch.stack(biases),
        )
        statement = f"{name}, 2 or 3 of 5, orthogonal gradients: variance over every sample, distance to sum c^2 (1/pi - 1)"
        found.zero(statement, variances)
    _against_even_draws(found)
    return found


def _trained(c: Float[Tensor, "1 K"], probabilities: Float[Tensor, "1 K"]) -> Float[Tensor, "1 K"]:
    """Gradient of the surrogate loss by all candidates' log-probs, times their probabilities: c, if it is right."""
    weights = c / probabilities.clamp(min=1e-300)
    return value_and_gradient(lambda at: surrogate_loss(torch.zeros(1), at, weights), torch.zeros_like(c))[1] * probabilities


def _against_even_draws(found: Findings) -> None:
    """Where no candidate enters surely, the variance of S of K is ((sum |c|)^2 / S - sum c^2), and K/S - 1 sum c^2 if even."""
    r, rewards = 0.1 * numbers(1, SIZE, seed=82), torch.tensor([[1.0, 0.9, 0.5, 0.1, 0.0]], dtype=torch.float64)
    method = build_method(NCA(alpha=1.0, beta=1.0))
    c = coefficients(partial(_whole_loss, method, rewards), r)
    squares, sizes = float(c.square().sum()), float(c.abs().sum())
    by_size, even = moments(enter(c, 2)[0], c[0])[1], moments(torch.full_like(c, 2 / SIZE)[0], c[0])[1]
    predicted = (sizes**2 / 2 - squares) / (squares * (SIZE / 2 - 1))
    found.equal("nca, 2 of 5 by their coefficients: variance over that of even draws", predicted, by_size / even)


def rnce_of_two() -> Findings:
    """RNCE over all negatives at a pair's price: the positive surely and one draw, both weighted by 1 - p_0."""
    found = Findings("Rao-Blackwell; our estimator")
    method, rewards = build_method(RNCE(beta=1.0)), torch.tensor([[1.0] + [0.0] * 7], dtype=torch.float64)
    shapes, variances, contrasts, savings = [], [], [], []
    for r in numbers(40, 8, seed=83).split(1):
        p = r.softmax(dim=1)[0]
        c = coefficients(partial(_whole_loss, method, rewards), r)
        entering = enter(c, 2)
        weights = torch.where(entering > 0, c / entering.clamp(min=1e-300), 0.0)[0]
        shapes += [entering[0, :1] - 1, entering[0, 1:] - p[1:] / (1 - p[0]), weights.abs() - (1 - p[0])]
        exact = float((1 - p[0]).square() - p[1:].square().sum())
        variances.append(float(relative_variance(c, entering) * c.square().sum()) - exact)
        contrasts.append(_contrast_variance(r[0]) - float(1 - p.square().sum()))
    statement = "rnce, 2 of 8: the positive surely, a negative with p_i / (1 - p_0), weights 1 - p_0, largest distance"
    found.zero(statement, torch.cat(shapes))
    found.zero("rnce, 2 of 8: variance (1 - p_0)^2 - sum p_i^2, largest distance", variances)
    found.zero("cd with one draw: variance 1 - sum p_i^2, the positive's among them, largest distance", contrasts)
    for size in (4, 6, 8):
        r = torch.zeros(1, size, dtype=torch.float64)
        c = coefficients(partial(_whole_loss, method, rewards[:, :size]), r)
        variance = float(relative_variance(c, enter(c, 2)) * c.square().sum())
        savings.append(1 - variance / _contrast_variance(r[0]) - 2 / size)
    found.zero("rnce, 2 of K at the reference: share of cd's variance that it saves, less 2/K, K = 4, 6 and 8", savings)
    return found


def _contrast_variance(r: Float[Tensor, " K"]) -> float:
    """Variance of the linear contrast's gradient along orthogonal directions, over all draws of the kernel."""
    scores, size = r.unsqueeze(0), len(r)
    q = kernel_probabilities(scores, firsts(scores), every(scores), strategy="mc", include_positive=True)[0]
    pairs = torch.stack([torch.zeros(size).long(), torch.arange(size)], dim=1)
    gradients = group_gradients(linear_contrast_loss, r, pairs)
    mean = (q.unsqueeze(1) * gradients).sum(dim=0)
    return float((q * (gradients - mean).square().sum(dim=1)).sum())


def several_negatives() -> Findings:
    """Several negatives with the log q correction: different ones, or systematic draws of some more than once."""
    found = Findings("Horvitz and Thompson (1952); systematic sampling")
    rewards = torch.tensor([[1.0] + [0.0] * (SIZE - 1)], dtype=torch.float64)
    below, plain = rewards < 1.0, torch.tensor([[0.2, 0.4, 0.1, -0.2, 0.0]], dtype=torch.float64)
    sharp = torch.tensor([[0.2, 2.5, 0.1, -0.2, 0.0]], dtype=torch.float64)
    for replacement, name in ((False, "without"), (True, "with")):
        off = []
        for r, num in itertools.product((plain, sharp), (2, 3)):
            method = build_method(MCPO(beta=1.0, num_negatives=num, log_q_correction=True, replacement=replacement))
            # The kernel's settings by which the method draws.
            settings = KernelSettings("mc", num, replacement=replacement, proportional=not replacement)
            kernel = build_kernel(settings).expected
            assert kernel is not None
            expected = kernel(r, rewards, torch.tensor([0]), every(r), every(r))[0]
            terms = (r - _log_q(method, r, rewards)).exp()[0] * expected
            off.append(moments(expected, torch.where(below[0], terms, 0.0))[0].sum() - r[below].exp().sum())
        found.zero(
            f"2 or 3 negatives {name} replacement, log q: mean estimate of the sum of e^r, distance to it", torch.stack(off)
        )
    p = torch.where(below, plain, -torch.inf).softmax(dim=1)[0]
    different = moments(_expected(plain, rewards, replacement=False), p)[1]
    found.equal(
        "two different negatives: variance of the gradient of the log of the sum, 1/2 - sum p^2",
        float(0.5 - p.square().sum()),
        different,
    )
    p = torch.where(below, sharp, -torch.inf).softmax(dim=1)[0]
    fraction = (2 * p) % 1
    repeated = moments(_expected(sharp, rewards, replacement=True), p)[1]
    predicted = float((fraction * (1 - fraction)).sum() / 4)
    found.equal(
        "two systematic draws with replacement: the same variance, sum f (1 - f) / 4 with f the fraction of 2 p",
        predicted,
        repeated,
    )
    return found


def _expected(r: Float[Tensor, "1 K"], rewards: Float[Tensor, "1 K"], *, replacement: bool) -> Float[Tensor, " K"]:
    """How often each of two negatives' candidates is drawn on average, by the correction that the method applies."""
    method = build_method(MCPO(beta=1.0, num_negatives=2, log_q_correction=True, replacement=replacement))
    return torch.where(rewards[0] < 1.0, _log_q(method, r, rewards)[0].exp(), 0.0)


def _sampler(method: Method) -> Sampler:
    assert method.sampler is not None
    return method.sampler


def _log_q(method: Method, scores: Float[Tensor, "1 K"], rewards: Float[Tensor, "1 K"]) -> Float[Tensor, "1 K"]:
    """The correction of each candidate, if it is drawn."""
    log_q = _sampler(method).log_q
    assert log_q is not None
    best = int(rewards.argmax())
    order = torch.tensor([[best, *(k for k in range(rewards.shape[1]) if k != best)]])
    return torch.zeros_like(scores).scatter(1, order, log_q(scores, rewards, every(scores), order))


def held_sample_size() -> Findings:
    """Temperatures found for each group hold the kernel's effective sample size; the log q correction undoes them."""
    found = Findings("our kernel with target_ess")
    r, rewards = 3 * numbers(6, SIZE, seed=84), torch.tensor([[1.0] + [0.0] * (SIZE - 1)], dtype=torch.float64).expand(6, -1)
    below, sizes, sums = rewards < 1.0, [], []
    for share in SHARES:
        method = build_method(MCPO(beta=1.0, target_ess=share, log_q_correction=True))
        kernel = _sampler(method).kernel
        assert kernel is not None
        q = kernel(r, firsts(r), rewards, every(r))
        sizes.append(effective_sample_size(q) - share * (SIZE - 1))
        corrected = torch.cat([one - _log_q(method, one, of) for one, of in zip(r.split(1), rewards.split(1), strict=True)])
        sums.append((q * corrected.exp()).sum(dim=1) / torch.where(below, r.exp(), 0.0).sum(dim=1) - 1)
    found.zero("target_ess from 0.4 to 0.95: effective sample size less that share of the candidates", torch.stack(sizes), 1e-9)
    statement = "target_ess, log q: mean estimate of the sum of e^r over the sum itself, less 1"
    found.zero(statement, torch.stack(sums))
    return found


def last_visits() -> Findings:
    """Proposals by the scores of a last visit, however old, accepted by the pair's own: the model stays invariant."""
    found = Findings("Barker's acceptance, proposals of the last visit")
    r = numbers(SIZE, seed=85)
    olds = (r, torch.zeros_like(r), r + numbers(SIZE, seed=86), -r)
    moved, unbalanced = [], []
    for share in (None, 0.6):
        method = build_method(MCPO(beta=1.0, acceptance=True, proposals="last_visit", target_ess=share))
        for old in olds:
            step = torch.stack([_accepted(method, r, old, state) for state in range(SIZE)])
            model = r.softmax(dim=0)
            flow = model.unsqueeze(1) * step
            moved.append(flow.sum(dim=0) - flow.sum(dim=1))
            unbalanced.append(flow - flow.T)
    found.zero(
        "proposals by scores of any age, plain or with target_ess, accepted: the model is invariant, largest change",
        torch.stack(moved),
    )
    found.zero("the same: reversible, largest difference of flows", torch.stack(unbalanced))
    return found


def _accepted(method: Method, r: Float[Tensor, " K"], old: Float[Tensor, " K"], state: int) -> Float[Tensor, " K"]:
    """Probability of moving from a state, as the positive, to each other: of its proposal times that of its acceptance.

    The acceptance is minus the gradient of the method's loss of the pair by the positive's log-ratio.
    """
    sampler, scores = _sampler(method), old.unsqueeze(0)
    rewards = torch.nn.functional.one_hot(torch.tensor([state]), len(r)).double()
    assert sampler.kernel is not None
    proposed = sampler.kernel(scores, torch.tensor([state]), rewards, every(scores))[0]
    log_q = _log_q(method, scores, rewards)[0]
    pairs = torch.stack([r[state].expand_as(r), r], dim=1)
    outside = torch.tensor([[1.0, 0.0]], dtype=r.dtype).expand_as(pairs)
    corrections = torch.stack([torch.zeros_like(log_q), log_q], dim=1)

    def loss(at: Tensor) -> Tensor:
        return method.loss(LossInputs(at, at, outside, torch.ones_like(at), every(at), log_q=corrections))

    accepted = -value_and_gradient(loss, pairs)[1][:, 0]
    return torch.where(torch.arange(len(r)) == state, 0.0, proposed * accepted)

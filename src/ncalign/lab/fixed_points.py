"""Whether the expected gradient of a sampler and a loss leads to the data's distribution.

The alphabet is its own group of candidates and the reference is uniform over it, so that the model is the softmax of the
implicit rewards. The gradient is that of `rnce_loss` or `linear_contrast_loss` on pairs, weighted with the exact
probabilities of the positive and, by `kernel_probabilities` or `transition_matrix`, of the negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncalign.lab.policies import (
    GroupLoss,
    every,
    firsts,
    mean_gradient,
    numbers,
    share,
    total_variation,
    value_and_gradient,
)
from ncalign.lab.results import Curve, Findings, Statement, furthest, largest, zero
from ncalign.objectives import linear_contrast_loss, rnce_loss
from ncalign.objectives.config import Strategy
from ncalign.objectives.kernels import importance_log_weights, kernel_probabilities, transition_matrix
from ncalign.objectives.samplers import proposal_log_ratio

PROBLEMS, SIZE = 10, 4
STEP, NUM_STEPS = 3.0, 400
FAR = 0.01
"""A total variation to the data above this counts as missed."""

Draws = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``r [P, V] -> probability of each negative [P, V, V] by positive, what is added to its score [P, V, V]``."""


@dataclass(frozen=True)
class Flow:
    """Where the flow of several problems ended, and how it went there.

    Attributes:
        distances: Total variation of model and data by step, ``[steps, P]``.
        norms: Largest entry of the expected gradient by step, ``[steps, P]``.
    """

    distances: Float[Tensor, "steps P"]
    norms: Float[Tensor, "steps P"]


def from_kernel(
    r: Float[Tensor, "P V"], *, strategy: Strategy, include_positive: bool = False, corrected: bool = False
) -> tuple[Float[Tensor, "P V V"], Float[Tensor, "P V V"]]:
    """Negatives that the package's kernel draws in one step."""
    size = r.shape[1]
    scores, positives = _by_positive(r)
    q = kernel_probabilities(scores, positives, every(scores), strategy=strategy, include_positive=include_positive)
    added = torch.zeros_like(q)
    if corrected:
        # One draw a group: each of the candidates in turn.
        draws = torch.arange(size).repeat(q.shape[0]).unsqueeze(1)
        added = importance_log_weights(q.repeat_interleave(size, dim=0), draws).view_as(q)
    return q.view(-1, size, size), added.view(-1, size, size)


def _by_positive(scores: Float[Tensor, "P V"]) -> tuple[Float[Tensor, "R V"], Int[Tensor, " R"]]:
    """Each problem's scores once for each candidate as the positive, and these positives."""
    problems, size = scores.shape
    return scores.repeat_interleave(size, dim=0), torch.arange(size).repeat(problems)


def from_chain(
    r: Float[Tensor, "P V"], *, steps: int, num_proposals: int
) -> tuple[Float[Tensor, "P V V"], Float[Tensor, "P V V"]]:
    """Negatives at the end of a chain that starts at the positive and has it among its states."""
    matrices = torch.stack([transition_matrix(scores, num_proposals=num_proposals) for scores in r])
    ends = torch.linalg.matrix_power(matrices, steps)
    return ends, torch.zeros_like(ends)


def expected_gradient(
    r: Float[Tensor, "P V"], data: Float[Tensor, "P V"], draws: Draws, loss: GroupLoss
) -> Float[Tensor, "P V"]:
    """Expected gradient of a loss of pairs by the implicit rewards: over the positive from the data and its negative."""
    size = r.shape[1]
    q, added = draws(r)
    pairs = torch.stack([r.unsqueeze(2).expand_as(q), r.unsqueeze(1) + added], dim=3).view(-1, 2)
    _, gradients = value_and_gradient(lambda values: loss(values, firsts(values), every(values)), pairs)
    # What can't be drawn may have any gradient.
    weights = (data.unsqueeze(2) * q).unsqueeze(3)
    by_pair = torch.where(weights > 0, weights * gradients.view(-1, size, size, 2), 0.0)
    return by_pair[..., 0].sum(dim=2) + by_pair[..., 1].sum(dim=1)


def flow(data: Float[Tensor, "P V"], draws: Draws, loss: GroupLoss, *, num_steps: int = NUM_STEPS) -> Flow:
    """Follow the expected gradient from the reference until it vanishes or the steps are used up."""
    r = torch.zeros_like(data)
    distances, norms = [total_variation(r.softmax(dim=1), data)], []
    for _ in range(num_steps):
        gradient = expected_gradient(r, data, draws, loss)
        norms.append(gradient.abs().amax(dim=1))
        r = r - STEP * gradient
        distances.append(total_variation(r.softmax(dim=1), data))
        if float(norms[-1].max()) < 1e-15:
            break
    return Flow(torch.stack(distances), torch.stack(norms))


def consistency() -> Findings:
    """Fisher consistency of each sampler and loss: where the expected gradient is zero, and whether that is the data."""
    data = numbers(PROBLEMS, SIZE, seed=30).softmax(dim=1)
    mc = partial(from_kernel, strategy="mc")
    right: dict[str, tuple[Draws, GroupLoss]] = {
        "uniform negatives, logistic loss": (partial(from_kernel, strategy="uniform"), rnce_loss),
        "kernel including the positive, linear contrast": (partial(mc, include_positive=True), linear_contrast_loss),
        "kernel excluding the positive, log q correction, logistic loss": (partial(mc, corrected=True), rnce_loss),
        "chain of 1 step, 1 proposal, linear contrast": (partial(from_chain, steps=1, num_proposals=1), linear_contrast_loss),
        "chain of 3 steps, 1 proposal, linear contrast": (partial(from_chain, steps=3, num_proposals=1), linear_contrast_loss),
    }
    wrong: dict[str, tuple[Draws, GroupLoss]] = {
        "kernel excluding the positive, logistic loss": (mc, rnce_loss),
        "kernel including the positive, logistic loss": (partial(mc, include_positive=True), rnce_loss),
        "lowest-scored negative, logistic loss": (partial(from_kernel, strategy="min"), rnce_loss),
        "highest-scored negative, logistic loss": (partial(from_kernel, strategy="max"), rnce_loss),
    }
    flows = {name: flow(data, draws, loss) for name, (draws, loss) in (right | wrong).items()}
    source = "expected gradient; contrastive divergence"
    statements = [
        zero(
            f"{name}: the data is the fixed point, largest total variation of 10 problems",
            source,
            largest(flows[name].distances[-1]),
        )
        for name in right
    ]
    statements += [
        Statement(
            f"{name}: not consistent, share of 10 problems that end further than {FAR} from the data",
            source,
            1.0,
            share(flows[name].distances[-1] > FAR),
            0.0,
        )
        for name in wrong
    ]
    unsettled = flows["highest-scored negative, logistic loss"].norms[-100:].amin(dim=0)
    statements.append(
        Statement(
            "highest-scored negative, logistic loss: share of 10 problems whose expected gradient stays above 0.01",
            source,
            1.0,
            share(unsettled > 0.01),
            0.0,
        )
    )
    return Findings(statements, [_flow_curve(flows)])


def _flow_curve(flows: dict[str, Flow]) -> Curve:
    return Curve(
        "fisher_consistency",
        "Distance of the model to the data along the expected gradient, first of 10 problems",
        "step",
        "total variation",
        {
            name: [(float(step + 1), max(float(value), 1e-16)) for step, value in enumerate(found.distances[:, 0])]
            for name, found in flows.items()
        },
        log_x=True,
        log_y=True,
        note="Lines that fall to the bottom reach the data; the others stay off it however long they run.",
    )


def rnce_recovers_the_data() -> Findings:
    """RNCE with positives from the data and negatives from the reference ends at the data whatever M is."""
    proposal, data = numbers(SIZE, seed=31).softmax(dim=0), numbers(SIZE, seed=32).softmax(dim=0)
    statements = []
    for num_negatives in (1, 2, 3):
        r = torch.zeros_like(data)
        for _ in range(3000):
            slope = mean_gradient(rnce_loss, r, data, proposal, num_negatives)
            r = r - 4.0 * slope
            if largest(slope) < 1e-16:
                break
        reached = (proposal.log() + r).softmax(dim=0)
        statements += [
            zero(
                f"RNCE with M = {num_negatives}: expected gradient where the model is the data, largest entry",
                "MC-PO section 2.3",
                largest(mean_gradient(rnce_loss, data.log() - proposal.log(), data, proposal, num_negatives)),
            ),
            zero(
                f"RNCE with M = {num_negatives}: total variation of model and data at the end of the gradient flow",
                "MC-PO section 2.3",
                float(total_variation(reached, data)),
            ),
        ]
    return Findings(statements)


def kernel_is_reversible() -> Findings:
    """The kernel with the positive among its states leaves the model invariant and is reversible."""
    scores = numbers(5, seed=33, scale=1.5)
    model = scores.softmax(dim=0)
    moved, unbalanced = [], []
    for num_proposals in (1, 2, 3, None):
        step = transition_matrix(scores, num_proposals=num_proposals)
        moved.append(largest(model @ step - model))
        unbalanced.append(largest(model.unsqueeze(1) * step - (model.unsqueeze(1) * step).T))
    source = "conditional importance sampling; MC-PO Algorithm 1"
    return Findings(
        [
            zero("kernel including the positive: the model is invariant, largest change", source, max(moved)),
            zero("kernel including the positive: reversible, largest difference of flows", source, max(unbalanced)),
        ]
    )


def accepted_proposals() -> Findings:
    """Proposals by any scores, accepted with Barker's probability, leave the model invariant, and the loss accepts them."""
    r, data = numbers(SIZE, seed=35, scale=1.5), numbers(PROBLEMS, SIZE, seed=30).softmax(dim=1)
    model, moved, slopes = r.softmax(dim=0), [], []
    for scores in (r, 0.3 * r, r + numbers(SIZE, seed=36), torch.zeros(SIZE, dtype=r.dtype)):
        proposed, corrected = (found[0] for found in from_proposals(scores.unsqueeze(0)))
        step = proposed * (r + corrected - r.unsqueeze(1)).sigmoid()
        moved.append(largest(model @ step + model * (1 - step.sum(dim=1)) - model))
        # The loss of a pair, drawn with the proposals' probability, against the contrast with the step's next state.
        at = r.clone().requires_grad_()
        values = torch.stack([at.unsqueeze(1).expand(SIZE, SIZE), at + corrected], dim=2).flatten(0, 1)
        losses = rnce_loss(values, torch.zeros(SIZE**2, dtype=torch.long), every(values)).view(SIZE, SIZE)
        (slope,) = torch.autograd.grad((proposed[0] * losses[0]).sum(), at)
        contrast = step[0].clone()
        contrast[0] = -step[0, 1:].sum()
        slopes.append(largest(slope - contrast))
    source = "Barker's acceptance; contrastive divergence"
    return Findings(
        [
            zero("accepted proposals by any scores: the model is invariant, largest change", source, max(moved)),
            zero(
                "accepted proposals: MC-PO's gradient is the linear contrast with the step's next state, largest difference",
                source,
                max(slopes),
            ),
            zero(
                "proposals from tempered scores, accepted, logistic loss: the data is the fixed point, total variation",
                source,
                largest(flow(data, lambda at: from_proposals(0.5 * at), rnce_loss, num_steps=3 * NUM_STEPS).distances[-1]),
            ),
        ]
    )


def from_proposals(scores: Float[Tensor, "P V"]) -> tuple[Float[Tensor, "P V V"], Float[Tensor, "P V V"]]:
    """Negatives proposed by some scores, with the correction that makes the loss accept them."""
    size = scores.shape[1]
    repeated, positives = _by_positive(scores)
    q = kernel_probabilities(repeated, positives, every(repeated), strategy="mc")
    ratio = proposal_log_ratio(repeated, positives, torch.arange(size).expand(len(repeated), -1), every(repeated))
    return q.view(-1, size, size), -ratio.view(-1, size, size)


def chain_bias() -> Findings:
    """The bias of k steps of contrastive divergence falls as the kernel's second eigenvalue to the power k."""
    scores = numbers(5, seed=33, scale=1.5)
    model, data = scores.softmax(dim=0), numbers(5, seed=34).softmax(dim=0)
    statements, lines = [], {}
    for num_proposals in (1, 2, 3):
        step = transition_matrix(scores, num_proposals=num_proposals)
        rate, direction = _second(step, model)
        slowest = model + 0.01 * direction * model.sqrt()
        steady = [_cd_bias(scores, slowest, k, num_proposals) for k in range(1, 9)]
        bias = [_cd_bias(scores, data, k, num_proposals) for k in range(1, 9)]
        # In the chi-square norm a reversible kernel contracts by at most the eigenvalue at each step.
        first = float(((data - model).square() / model).sum().sqrt())
        excess = max(0.0, *(size - rate**k * first for k, size in enumerate(bias, start=1)))
        sizes = torch.tensor(steady, dtype=torch.float64)
        ratios = sizes[1:] / sizes[:-1]
        proposals = "1 proposal" if num_proposals == 1 else f"{num_proposals} proposals"
        kind = f"CD-k, {proposals}"
        source = "contrastive divergence; MC-PO Algorithm 1"
        statements += [
            Statement(
                f"{kind}: bias of k + 1 steps over that of k, k = 1 to 7, from a start along the second eigenvector",
                source,
                rate,
                furthest(ratios, rate),
                1e-9,
            ),
            zero(f"{kind}: bias above |lambda_2|^k times the start's distance, k = 1 to 8", source, excess),
        ]
        lines[proposals] = [(float(k), size) for k, size in enumerate(bias, start=1)]
        lines[f"{proposals}: bound |lambda_2|^k"] = [(float(k), rate**k * first) for k in range(1, 9)]
    curve = Curve(
        "cd_bias",
        "Bias of contrastive divergence with k steps",
        "steps k",
        "chi-square norm of the bias",
        lines,
        log_y=True,
        note="Each line stays below its bound, and more proposals a step make it steeper.",
    )
    return Findings(statements, [curve])


def _second(step: Float[Tensor, "V V"], model: Float[Tensor, " V"]) -> tuple[float, Float[Tensor, " V"]]:
    """Second largest absolute eigenvalue, and its direction in the coordinates in which the kernel is symmetric."""
    root = model.sqrt()
    similar = root.unsqueeze(1) * step / root
    values, directions = torch.linalg.eigh((similar + similar.T) / 2)
    second = int(values.abs().sort(descending=True).indices[1])
    return float(values[second].abs()), directions[:, second]


def _cd_bias(scores: Float[Tensor, " V"], data: Float[Tensor, " V"], steps: int, num_proposals: int) -> float:
    """Distance of the linear contrast's expected gradient to that of the likelihood, in the chi-square norm."""
    model = scores.softmax(dim=0)
    draws = partial(from_chain, steps=steps, num_proposals=num_proposals)
    gradient = expected_gradient(scores.unsqueeze(0), data.unsqueeze(0), draws, linear_contrast_loss)[0]
    return float(((gradient - (model - data)).square() / model).sum().sqrt())


EXPERIMENTS = (consistency, rnce_recovers_the_data, kernel_is_reversible, accepted_proposals, chain_bias)

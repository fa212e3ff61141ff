"""Whether the expected gradient of a sampler and a loss leads to the data's distribution.

The alphabet is its own group of candidates and the reference is uniform over it, so that the model is the softmax of the
implicit rewards. The gradient is that of `rnce_loss` or `linear_contrast_loss` on pairs, weighted with the exact
probabilities of the positive and, by `kernel_probabilities` or `transition_matrix`, of the negative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ncalign.lab.policies import GroupLoss, every, firsts, mean_gradient, numbers, total_variation, value_and_gradient
from ncalign.lab.results import Curve, Findings, Line, largest
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


def from_kernel(
    r: Float[Tensor, "P V"],
    *,
    strategy: Strategy = "mc",
    include_positive: bool = False,
    correction: Literal["none", "log q", "acceptance"] = "none",
) -> tuple[Float[Tensor, "P V V"], Float[Tensor, "P V V"]]:
    """Negatives that the package's kernel draws in one step."""
    problems, size = r.shape
    # Each problem once for each candidate as the positive.
    scores, positives = r.repeat_interleave(size, dim=0), torch.arange(size).repeat(problems)
    q = kernel_probabilities(scores, positives, every(scores), strategy=strategy, include_positive=include_positive)
    added = torch.zeros_like(q)
    if correction == "log q":
        # One draw a group: each of the candidates in turn.
        draws = torch.arange(size).repeat(len(q)).unsqueeze(1)
        added = importance_log_weights(q.repeat_interleave(size, dim=0), draws)
    elif correction == "acceptance":
        added = -proposal_log_ratio(scores, positives, torch.arange(size).expand(len(q), -1), every(scores))
    return q.view(problems, size, size), added.view(problems, size, size)


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


def flow(
    data: Float[Tensor, "P V"], draws: Draws, loss: GroupLoss, *, num_steps: int = NUM_STEPS
) -> tuple[Float[Tensor, "steps P"], Float[Tensor, "steps P"]]:
    """Follow the expected gradient from the reference until it vanishes or the steps are used up.

    Returns:
        Total variation of model and data by step, and the largest entry of the expected gradient by step.
    """
    r = torch.zeros_like(data)
    distances, norms = [total_variation(r.softmax(dim=1), data)], []
    for _ in range(num_steps):
        gradient = expected_gradient(r, data, draws, loss)
        norms.append(gradient.abs().amax(dim=1))
        r = r - STEP * gradient
        distances.append(total_variation(r.softmax(dim=1), data))
        if float(norms[-1].max()) < 1e-15:
            break
    return torch.stack(distances), torch.stack(norms)


def consistency() -> Findings:
    """Fisher consistency of each sampler and loss: where the expected gradient is zero, and whether that is the data."""
    data = numbers(PROBLEMS, SIZE, seed=30).softmax(dim=1)
    including, with_log_q = partial(from_kernel, include_positive=True), partial(from_kernel, correction="log q")
    chain = partial(from_chain, num_proposals=1)
    cases: tuple[tuple[str, bool, Draws, GroupLoss], ...] = (
        ("uniform negatives, logistic loss", True, partial(from_kernel, strategy="uniform"), rnce_loss),
        ("kernel including the positive, linear contrast", True, including, linear_contrast_loss),
        ("kernel excluding the positive, log q correction, logistic loss", True, with_log_q, rnce_loss),
        ("chain of 1 step, 1 proposal, linear contrast", True, partial(chain, steps=1), linear_contrast_loss),
        ("chain of 3 steps, 1 proposal, linear contrast", True, partial(chain, steps=3), linear_contrast_loss),
        ("kernel excluding the positive, logistic loss", False, from_kernel, rnce_loss),
        ("kernel including the positive, logistic loss", False, including, rnce_loss),
        ("lowest-scored negative, logistic loss", False, partial(from_kernel, strategy="min"), rnce_loss),
        ("highest-scored negative, logistic loss", False, partial(from_kernel, strategy="max"), rnce_loss),
    )
    found, lines = Findings("expected gradient; contrastive divergence"), dict[str, Line]()
    for name, consistent, draws, loss in cases:
        distances, norms = flow(data, draws, loss)
        lines[name] = [(step, max(value, 1e-16)) for step, value in enumerate(distances[:, 0].tolist(), start=1)]
        if consistent:
            found.zero(f"{name}: the data is the fixed point, largest total variation of 10 problems", distances[-1])
        else:
            statement = f"{name}: not consistent, share of 10 problems that end further than {FAR} from the data"
            found.share(statement, 1.0, distances[-1] > FAR)
    # The last case does not settle anywhere.
    statement = f"{name}: share of 10 problems whose expected gradient stays above 0.01"
    found.share(statement, 1.0, norms[-100:].amin(dim=0) > 0.01)
    found.curves.append(
        Curve(
            "fisher_consistency",
            "Distance of the model to the data along the expected gradient, first of 10 problems",
            "step",
            "total variation",
            lines,
            log="xy",
            note="Lines that fall to the bottom reach the data; the others stay off it however long they run.",
        )
    )
    return found


def rnce_recovers_the_data() -> Findings:
    """RNCE with positives from the data and negatives from the reference ends at the data whatever M is."""
    found = Findings("MC-PO section 2.3")
    proposal, data = numbers(SIZE, seed=31).softmax(dim=0), numbers(SIZE, seed=32).softmax(dim=0)
    for num in (1, 2, 3):
        r = torch.zeros_like(data)
        for _ in range(3000):
            slope = mean_gradient(rnce_loss, r, data, proposal, num)
            r = r - 4.0 * slope
            if largest(slope) < 1e-16:
                break
        at_data = mean_gradient(rnce_loss, data.log() - proposal.log(), data, proposal, num)
        distance = total_variation((proposal.log() + r).softmax(dim=0), data)
        found.zero(f"RNCE with M = {num}: expected gradient where the model is the data, largest entry", at_data)
        found.zero(f"RNCE with M = {num}: total variation of model and data at the end of the gradient flow", distance)
    return found


def kernel_is_reversible() -> Findings:
    """The kernel with the positive among its states leaves the model invariant and is reversible."""
    found = Findings("conditional importance sampling; MC-PO Algorithm 1")
    scores = numbers(5, seed=33, scale=1.5)
    model = scores.softmax(dim=0)
    steps = [transition_matrix(scores, num_proposals=num) for num in (1, 2, 3, None)]
    flows = [model.unsqueeze(1) * step for step in steps]
    moved = torch.stack([model @ step - model for step in steps])
    unbalanced = torch.stack([there - there.T for there in flows])
    found.zero("kernel including the positive: the model is invariant, largest change", moved)
    found.zero("kernel including the positive: reversible, largest difference of flows", unbalanced)
    return found


def accepted_proposals() -> Findings:
    """Proposals by any scores, accepted with Barker's probability, leave the model invariant, and the loss accepts them."""
    found = Findings("Barker's acceptance; contrastive divergence")
    r, data = numbers(SIZE, seed=35, scale=1.5), numbers(PROBLEMS, SIZE, seed=30).softmax(dim=1)
    by_scores = (r, 0.3 * r, r + numbers(SIZE, seed=36), torch.zeros_like(r))
    moved, slopes = zip(*(_accepted_step(r, scores) for scores in by_scores), strict=True)
    proposals = partial(from_kernel, correction="acceptance")
    ends, _ = flow(data, lambda at: proposals(0.5 * at), rnce_loss, num_steps=3 * NUM_STEPS)
    found.zero("accepted proposals by any scores: the model is invariant, largest change", torch.stack(moved))
    statement = "accepted proposals: MC-PO's gradient is the linear contrast with the step's next state, largest difference"
    found.zero(statement, torch.stack(slopes))
    statement = "proposals from tempered scores, accepted, logistic loss: the data is the fixed point, total variation"
    found.zero(statement, ends[-1])
    return found


def _accepted_step(r: Float[Tensor, " V"], scores: Float[Tensor, " V"]) -> tuple[Float[Tensor, " V"], Float[Tensor, " V"]]:
    """What a step with accepted proposals changes in the model, and the loss's gradient minus the linear contrast."""
    drawn = from_kernel(scores.unsqueeze(0), correction="acceptance")
    proposed, corrected = drawn[0][0], drawn[1][0]
    step = proposed * (r + corrected - r.unsqueeze(1)).sigmoid()
    model = r.softmax(dim=0)
    # The loss of a pair, drawn with the proposals' probability, against the contrast with the step's next state.
    first = torch.eye(SIZE, dtype=r.dtype)[:1]
    slope = expected_gradient(r.unsqueeze(0), first, lambda _: drawn, rnce_loss)[0]
    contrast = step[0].clone()
    contrast[0] = -step[0, 1:].sum()
    return model @ step + model * (1 - step.sum(dim=1)) - model, slope - contrast


def chain_bias() -> Findings:
    """The bias of k steps of contrastive divergence falls as the kernel's second eigenvalue to the power k."""
    found, lines = Findings("contrastive divergence; MC-PO Algorithm 1"), dict[str, Line]()
    scores, steps = numbers(5, seed=33, scale=1.5), range(1, 9)
    model, data = scores.softmax(dim=0), numbers(5, seed=34).softmax(dim=0)
    for num in (1, 2, 3):
        rate, direction = _second(transition_matrix(scores, num_proposals=num), model)
        slowest = model + 0.01 * direction * model.sqrt()
        steady = torch.tensor([_cd_bias(scores, slowest, k, num) for k in steps], dtype=torch.float64)
        bias = [_cd_bias(scores, data, k, num) for k in steps]
        # In the chi-square norm a reversible kernel contracts by at most the eigenvalue at each step.
        first = float(((data - model).square() / model).sum().sqrt())
        bounds = [rate**k * first for k in steps]
        excess = [max(0.0, size - bound) for size, bound in zip(bias, bounds, strict=True)]
        name = f"{num} proposal{'s' * (num > 1)}"
        statement = f"CD-k, {name}: bias of k + 1 steps over that of k, k = 1 to 7, from a start along the second eigenvector"
        found.equal(statement, rate, steady[1:] / steady[:-1], 1e-9)
        found.zero(f"CD-k, {name}: bias above |lambda_2|^k times the start's distance, k = 1 to 8", excess)
        lines[name] = list(zip(steps, bias, strict=True))
        lines[f"{name}: bound |lambda_2|^k"] = list(zip(steps, bounds, strict=True))
    found.curves.append(
        Curve(
            "cd_bias",
            "Bias of contrastive divergence with k steps",
            "steps k",
            "chi-square norm of the bias",
            lines,
            log="y",
            note="Each line stays below its bound, and more proposals a step make it steeper.",
        )
    )
    return found


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

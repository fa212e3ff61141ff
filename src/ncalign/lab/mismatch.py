"""What happens where a premise fails: positives and scores of an older policy, a proposal with gaps, chains from elsewhere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ncalign.lab.fixed_points import expected_gradient, from_chain, from_kernel
from ncalign.lab.policies import every, firsts, mean_gradient, multisets, numbers, total_variation
from ncalign.lab.results import Curve, Findings, Line, fitted_exponent
from ncalign.objectives import linear_contrast_loss, rnce_loss
from ncalign.objectives.kernels import importance_log_weights, kernel_probabilities

SIZE = 4
DRIFTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def drift() -> Findings:
    """The bias as the policy moves on from the one that positives were sampled from, or that scores were computed with."""
    found = Findings("MC-PO Proposition 3.3, between two samplings")
    before, direction, proposal = numbers(SIZE, seed=70), numbers(SIZE, seed=71), numbers(SIZE, seed=72).softmax(dim=0)
    then = (proposal.log() + before).softmax(dim=0)
    lines: dict[str, Line] = {f"positives of the older policy, M = {num}": [] for num in (1, 2, 3)}
    off = []
    for step in DRIFTS:
        r = before + step * direction
        now = (proposal.log() + r).softmax(dim=0)
        divergence = float((then * (then / now).log()).sum())
        for num, line in enumerate(lines.values(), start=1):
            # RNCE is -r_0 plus the estimate of log Z, and the positive comes from the older policy's model.
            bias = mean_gradient(rnce_loss, r, then, proposal, num) + then - now
            line.append((divergence, float(bias.norm())))
            if num == 1:
                off.append(bias - _predicted_bias(r, then - now, proposal))
    statement = "positives of an older policy, M = 1: bias is linear in the change of the model, distance to the closed form"
    found.zero(statement, torch.stack(off))
    for num, line in enumerate(lines.values(), start=1):
        statement = f"positives of an older policy, M = {num}: exponent of the KL divergence up to 0.01 in the bias"
        found.equal(statement, 0.5, fitted_exponent([point for point in line if point[0] < 0.01]), 0.05)
    _stale_scores(found, before, direction)
    found.curves.append(
        Curve(
            "drift",
            "Bias of the gradient of log Z by how far the policy has moved since its positives were sampled",
            "KL divergence of the models (nats)",
            "length of the bias",
            lines,
            log="xy",
            note="It grows as the square root of the divergence: ten times nearer takes a hundredth of it.",
        )
    )
    return found


def _predicted_bias(r: Float[Tensor, " V"], change: Float[Tensor, " V"], proposal: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """What a change of the positives' distribution adds to the mean gradient of log(e^r_0 + e^r_z), z from the proposal."""
    taken = torch.sigmoid(r.unsqueeze(0) - r.unsqueeze(1)) * proposal
    return change * (1 - taken.sum(dim=1)) + change @ taken


def _stale_scores(found: Findings, before: Float[Tensor, " V"], direction: Float[Tensor, " V"]) -> None:
    """Kernels that read the older policy's scores: plain ones are off by what the model moved, accepted ones by nothing."""
    data, source = numbers(SIZE, seed=73).softmax(dim=0), "contrastive divergence, between two samplings"
    stale, corrected = from_kernel(before.unsqueeze(0), include_positive=True), []
    proposed, off = from_kernel(before.unsqueeze(0), correction="acceptance"), []
    for step in DRIFTS:
        r = before + step * direction
        now = r.softmax(dim=0)
        off.append(_contrast(r, data, stale) - (now - data) - (before.softmax(dim=0) - now))
        corrected.append(expected_gradient(r.unsqueeze(0), now.unsqueeze(0), lambda _: proposed, rnce_loss))
    statement = "kernel by an older policy's scores, linear contrast: bias is the older model less the newer, largest distance"
    found.zero(statement, torch.stack(off), source=source)
    statement = "proposals by an older policy's scores, accepted: expected gradient where the data is the newer model"
    found.zero(statement, torch.cat(corrected), source="Barker's acceptance")


def coverage() -> Findings:
    """What a proposal that never draws one of the completions does to the normaliser and to the optimum."""
    found = Findings("support of the proposal")
    r, missing = numbers(SIZE, seed=74), SIZE - 1
    # The pool of negatives lacks one completion; the reference is uniform.
    scores = r.unsqueeze(0)
    pool = every(scores).clone()
    pool[0, missing] = False
    kernel = kernel_probabilities(scores, firsts(scores), pool, strategy="mc", include_positive=True)
    lacks = float((1 - r.softmax(dim=0)[missing]).log())
    estimates = []
    for num in (1, 2, 3):
        columns, _, _ = multisets(missing, num)
        logs = importance_log_weights(kernel.expand(len(columns), -1), columns)
        estimates.append((r[columns] + logs).logsumexp(dim=1) - r.logsumexp(dim=0))
    statement = "pool without one completion, kernel with log q, every draw: what log Z lacks is log(1 - p) of that completion"
    found.equal(statement, lacks, torch.cat(estimates))
    _never_shown(found, missing)
    return found


def _never_shown(found: Findings, missing: int) -> None:
    """RNCE on data that holds a completion which the negatives' proposal does not."""
    data = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
    proposal = torch.tensor([0.3, 0.4, 0.3, 0.0], dtype=torch.float64)
    r, leads, rest = torch.zeros_like(data), [], data.clone()
    rest[missing] = 0.0
    for step in range(1, 3001):
        r = r - 4.0 * mean_gradient(rnce_loss, r, data, proposal, 1)
        leads.append((float(step), float((r[missing] - r[:missing].mean()).exp())))
    statement = "RNCE, completion that negatives never are: exponent of the step, from 300 on, in how much likelier it becomes"
    found.equal(statement, 1.0, fitted_exponent(leads, start=300), 0.02)
    statement = "RNCE, the completions that negatives are: total variation of model and data among them, after 3000 steps"
    found.zero(statement, total_variation((proposal.log() + r).softmax(dim=0), rest / rest.sum()), 1e-3)
    covered = 0.99 * proposal + 0.01 * torch.eye(SIZE, dtype=torch.float64)[missing]
    statement = "RNCE, proposal with 1 % on that completion: expected gradient where the model is the data"
    found.zero(statement, mean_gradient(rnce_loss, data.log() - covered.log(), data, covered, 1))


def random_starts() -> Findings:
    """Contrastive divergence whose chains start at the data, against chains that start at a random candidate."""
    found = Findings("contrastive divergence; MC-PO Algorithm 1")
    scores = numbers(5, seed=33, scale=1.5)
    model = scores.softmax(dim=0)
    even = torch.full_like(model, 1 / len(model))
    near = 0.9 * model + 0.1 * even
    from_data, ratios, reached = [], [], []
    for steps in range(1, 9):
        chain = from_chain(scores.unsqueeze(0), steps=steps, num_proposals=1)
        # The end of a chain whose first state is any candidate, whatever the positive is.
        anywhere = (chain[0].mean(dim=1, keepdim=True).expand_as(chain[0]), chain[1])
        by_start = [[_contrast(scores, data, draws) for draws in (chain, anywhere)] for data in (model, near)]
        from_data.append(by_start[0][0])
        reached.append(by_start[0][1].norm())
        close, far = (gradient - (model - near) for gradient in by_start[1])
        ratios.append(far.norm() / close.norm())
    found.zero("CD-k from the data, where the data is the model: expected gradient, k = 1 to 8", torch.stack(from_data))
    statement = (
        "CD-k from a random start, where the data is the model: share of k = 1 to 8 with an expected gradient above 0.001"
    )
    found.share(statement, 1.0, torch.stack(reached) > 1e-3)
    statement = "CD-k, data a tenth of the way from the model to random: bias from a random start over that from the data"
    found.equal(statement, 10.0, torch.stack(ratios), 1e-9)
    return found


def _contrast(scores: Float[Tensor, " V"], data: Float[Tensor, " V"], draws: tuple[Tensor, Tensor]) -> Float[Tensor, " V"]:
    """Expected gradient of the linear contrast of the data with these draws."""
    return expected_gradient(scores.unsqueeze(0), data.unsqueeze(0), lambda _: draws, linear_contrast_loss)[0]

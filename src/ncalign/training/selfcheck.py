"""Before the first step the policy is its own reference: every log-ratio is 0 and the loss has a value known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ncalign.model.batching import GroupBatch
from ncalign.objectives import LossInputs, Method


@dataclass(frozen=True)
class Tolerance:
    """Bounds on |log-ratio| per square root of the completion's tokens, in nats: rounding adds up as a random walk does."""

    typical: float
    worst: float


TOLERANCES = {
    "float64": Tolerance(1e-8, 1e-7),
    "float32": Tolerance(1e-3, 5e-3),
    # Batches of another shape round differently: typically by 0.01 to 0.07 for a 135M model on CPUs. Each of two such passes
    # was 0.07 from float32's with token swaps, which the model finds improbable, so that 0.1 may lie between them.
    "bfloat16": Tolerance(0.15, 0.6),
}
_TIMES = 3.0
"""How many times further than two passes of the starting model itself the reference may be from the policy."""
_NUM_ALONE = 8
"""Candidates of a group that are computed again without the others, to measure rounding."""


def check_first_step(
    method: Method,
    batch: GroupBatch,
    *,
    policy: Tensor,
    fresh_reference: Callable[[Tensor | None], Tensor],
    dtype: str,
    source: str,
    agreed: Callable[[bool], bool],
) -> None:
    """Compare the policy with the reference where they must agree, and name the side that is off.

    Args:
        method: the method whose first loss is checked.
        batch: groups that training starts with, and the reference log-probs that it would use.
        policy: log-probs of the policy as training computes them, ``[B, K]``; NaN where there is no candidate.
        fresh_reference: computes the log-probs with the adapter off (or the starting weights), ``[B, K]``, of all candidates or
            of those at the indices ``[B, K]`` that are not -1; NaN for others. Called when needed.
        dtype: precision of the computation.
        source: where the stored reference log-probs came from, for the message.
        agreed: whether any of the processes says so: where one computes again, all do.

    Raises:
        ValueError: log-ratios are not 0, so that the loss is not what it must be (ln 2 for DPO, ln(M+1) for RNCE, ln K for
            InfoNCA, 2 ln 2 for NCA).
    """
    stored, mask = batch.reference_logprobs.to(policy.dtype), batch.candidate_mask
    roots = batch.completion_lengths.clamp(min=1).to(policy.dtype).sqrt()

    def off(difference: Tensor, allowed: Tolerance) -> bool:
        typical, worst = _sizes(difference / roots, mask)
        return not (typical <= allowed.typical and worst <= allowed.worst)

    if not agreed(off(policy - stored, TOLERANCES[dtype])):
        return
    fresh = fresh_reference(None)
    allowed = _with_rounding(TOLERANCES[dtype], fresh, fresh_reference, mask, roots)
    if not off(policy - stored, allowed):
        return
    expected = _loss(method, batch, torch.zeros_like(policy))
    found = _loss(method, batch, torch.where(mask, policy - stored, 0.0))
    if off(fresh - stored, allowed):
        side = "the reference log-probs are off"
        b, k = _worst(fresh - stored, mask)
        detail = f"{source} says {float(stored[b, k]):.4f} nats where the starting model gives {float(fresh[b, k]):.4f}"
        advice = (
            "they belong to another model, tokenizer, chat template or precision: set reference: compute"
            if source == "the data"
            else f"the cache is damaged: delete {source}"
        )
    else:
        side = "the policy's log-probs are off"
        b, k = _worst(policy - stored, mask)
        detail = f"the policy gives {float(policy[b, k]):.4f} nats where its own reference gives {float(stored[b, k]):.4f}"
        advice = "the model is not deterministic in training (dropout, noise), or its adapter does not start at zero"
    raise ValueError(
        f"self-check before the first step: with policy = reference every log-ratio must be 0 and the loss of {method.name} "
        f"{expected:.4f}; they are up to {float((policy - stored)[mask].abs().max()):.4g} nats and {found:.4f}: {side} (group "
        f"{batch.ids[b]!r}, candidate {k}: {detail}); {advice}"
    )


def _sizes(differences: Tensor, mask: Tensor) -> tuple[float, float]:
    """Root mean square and maximum of the differences that there are; NaN where one is not finite."""
    sizes = differences[mask].abs()
    return float(sizes.square().mean().sqrt()), float(sizes.max())


def _with_rounding(
    least: Tolerance, fresh: Tensor, again: Callable[[Tensor | None], Tensor], mask: Tensor, roots: Tensor
) -> Tolerance:
    """The tolerance, or more where this model's log-probs round further apart with other candidates beside them, or none."""
    number = min(mask.shape[1], _NUM_ALONE)
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    alone = [again(columns.masked_fill(~mask | (columns != k), -1))[:, k] for k in range(number)]
    known = mask[:, :number]
    typical, worst = _sizes(((torch.stack(alone, dim=1) - fresh[:, :number]) / roots[:, :number]), known)
    return Tolerance(max(least.typical, _TIMES * typical), max(least.worst, _TIMES * worst))


def _loss(method: Method, batch: GroupBatch, log_ratios: Tensor) -> float:
    """The mean loss on what the method selects when nothing tells the candidates apart."""
    log_ratios, mask = log_ratios.cpu(), batch.candidate_mask.cpu()
    values = [log_ratios, batch.reference_logprobs.cpu() + log_ratios, batch.rewards.cpu(), batch.completion_lengths.cpu()]
    if method.sampler is not None:
        generator = torch.Generator().manual_seed(0)
        select = method.sampler.select(torch.zeros_like(log_ratios), values[2], mask, generator)
        values, mask = [value.gather(1, select.clamp(min=0)) for value in values], select >= 0
    ratios, logprobs, rewards, lengths = values
    inputs = LossInputs(ratios, logprobs, rewards, lengths.to(ratios.dtype), mask)
    return float(method.loss(inputs).mean())


def _worst(difference: Tensor, mask: Tensor) -> tuple[int, int]:
    size = difference.abs().nan_to_num(nan=torch.inf).masked_fill(~mask, -1.0)
    return divmod(int(size.argmax()), size.shape[1])

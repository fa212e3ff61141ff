"""From what a pass computed to what the loss and the metrics read: tensors gathered, placed and moved."""

from __future__ import annotations

import torch
from torch import Tensor

from ncalign.model.batching import GroupBatch
from ncalign.model.logprobs import Scored
from ncalign.objectives import LossInputs, Method, Sampler
from ncalign.training.metrics import NAN


def loss_inputs(
    logprobs: Tensor, batch: GroupBatch, sampler: Sampler | None, select: Tensor | None, scores: Tensor | None, baseline: float
) -> LossInputs:
    """What the loss sees, with 0 for the model's numbers where a group has nothing."""
    present = batch.candidate_mask if select is None else select >= 0
    reference = batch.reference_logprobs if select is None else gathered(batch.reference_logprobs, select)
    lengths = batch.completion_lengths.to(logprobs.dtype)
    log_q = None
    if sampler is not None and sampler.log_q is not None and scores is not None and select is not None:
        log_q = sampler.log_q(scores.detach(), batch.rewards, batch.candidate_mask, select)
    return LossInputs(
        log_ratios=torch.where(present, logprobs - reference.to(logprobs.dtype), 0.0),
        logprobs=torch.where(present, logprobs, 0.0),
        rewards=batch.rewards if select is None else gathered(batch.rewards, select),
        lengths=lengths if select is None else gathered(lengths, select).masked_fill(~present, 0.0),
        mask=present,
        log_q=log_q,
        baseline=baseline,
    )


def acceptance(inputs: LossInputs, method: Method) -> Tensor:
    """The probability with which each group's proposal is accepted; NaN where there is none."""
    pair = method.beta * inputs.log_ratios.detach() - (0.0 if inputs.log_q is None else inputs.log_q)
    return (pair[:, 1] - pair[:, 0]).sigmoid().masked_fill(~inputs.mask[:, :2].all(dim=1), NAN)


def estimate(number: Tensor, variance: Tensor, like: Tensor) -> dict[str, Tensor]:
    """How many candidates of each group passed with gradients, and the variance that this adds; for metrics."""
    return {"candidates": number.to(like), "relative_variance": variance.to(like)}


def read_columns(mask: Tensor, select: Tensor | None) -> Tensor:
    """``[B, K]``, the candidates that are among the columns chosen; all that there are without a choice."""
    return mask if select is None else placed(torch.zeros_like(mask), select >= 0, select)


def gathered(values: Tensor, select: Tensor | None) -> Tensor:
    """The values of the columns chosen, NaN for none; all of them without a choice."""
    return values if select is None else values.gather(1, select.clamp(min=0)).masked_fill(select < 0, NAN)


def chosen(found: Scored, select: Tensor | None) -> Scored:
    """What a pass over all candidates gives for some of them."""
    if select is None:
        return found
    use = found.expert_use
    if use is not None:
        index = select.clamp(min=0)[:, :, None, None].expand(-1, -1, *use.shape[2:])
        use = use.gather(1, index).masked_fill((select < 0)[:, :, None, None], 0.0)
    return Scored(gathered(found.logprobs, select), expert_use=use)


def once(found: Scored, select: Tensor) -> Scored:
    """The same with what experts were used by a candidate that several parts chose counted once."""
    if found.expert_use is None:
        return found
    again = (select.unsqueeze(2) == select.unsqueeze(1)).tril(-1).any(dim=2)
    return found._replace(expert_use=found.expert_use.masked_fill(again[:, :, None, None], 0.0))


def moved(select: Tensor | None, device: torch.device) -> Tensor | None:
    """What was chosen on the host, on a device, without waiting for it."""
    return None if select is None else select.to(device, non_blocking=True)


def placed(values: Tensor, entering: Tensor, select: Tensor | None) -> Tensor:
    """``values``, with those of the candidates in the loss replaced by fresh ones."""
    if select is None:
        return entering
    # Absent entries are written to a spare last column, which is dropped.
    spare = torch.cat([values, values.new_zeros(len(values), 1)], dim=1)
    return spare.scatter(1, select.masked_fill(select < 0, values.shape[1]), entering)[:, :-1]

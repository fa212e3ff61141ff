"""Whether prompts can be shared, and whether the head is computed right: values and gradients on the device that trains.

The rows that prompts are compared with are transformers' own forward pass with its own attention; shared prompts run as
training runs them, on an accelerator through other kernels than on a processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ncalign.model.attention import NAME as SHARED
from ncalign.model.attention import in_blocks, shares_prompts
from ncalign.model.batching import GroupBatch
from ncalign.model.layout import Span
from ncalign.model.limits import limits_of
from ncalign.model.logprobs import LogprobModel, base_causal_model

Sizes = tuple[tuple[int, tuple[int, ...]], ...]
"""Of each group the prompt's tokens and each completion's."""

_SHORT: Sizes = ((23, (9, 4, 12)), (11, (1, 7)))
"""Longer than a short window; less than a block in all."""
_LONG: Sizes = ((300, (140, 1, 9)), (5, (130, 64)))
"""Blocks that are visible wholly, in part and not at all; prompts and completions that begin and end within one."""


class _Apart(NamedTuple):
    """How far two layouts are apart, or may be: log-probs as a share of the largest, gradients of their norm."""

    values: float
    gradients: float


_EXACT = _Apart(1e-5, 1e-3)
"""What rounding to float32 or float64 comes to at most."""
# Deep models and routers amplify bfloat16's rounding each in their own measure: embeddings off by half its last digit set rows
# of random models of 4 to 24 layers twice as far apart from themselves as from shared prompts, routed or not.
_HALF_DIGIT, _TIMES, _LEAST = 2.0**-9, 3.0, _Apart(1e-3, 0.02)
_MOST = 0.7
"""Gradients that don't see the prompts at all are further off than this share."""


def share_prompts(model: PreTrainedModel | PeftModel) -> str | None:
    """Have the model compute each prompt once for all its completions, if :func:`why_not_shared` finds nothing against it.

    Args:
        model: on the device on which it will run.

    Returns:
        Why prompts can't be shared, the model being left as it was; None where they are from now on.
    """
    causal = base_causal_model(model)
    if shares_prompts(causal):
        return None
    reason = why_not_shared(LogprobModel(model), device=causal.device)
    if reason is None:
        causal.set_attn_implementation(SHARED)
    return reason


def why_not_shared(model: LogprobModel, *, device: torch.device, prompts_once: bool = True) -> str | None:
    """Compare shared prompts with a row for each completion: log-probs, and their gradients in the embedded tokens.

    Where they differ (a layer that mixes tokens in another way than attention, an attention that is not transformers' own
    interface, kernels that compute something else) prompts can't be shared. The model stays as it is: weights, gradients,
    modes, attention and random numbers.

    Args:
        model: as it trains, in its precision and sharded or not, but not in a wrapper that reduces gradients. Where it is
            sharded all processes call this together.
        device: on which it computes; where attention runs in blocks, rows of several blocks are compared too.
        prompts_once: whether the prompts in a pass of their own are compared as well.

    Returns:
        Why they can't be shared; None where they can.
    """
    causal = base_causal_model(model.model)
    before = causal.config.get_text_config()._attn_implementation
    batches = [_probe(causal, sizes, device) for sizes in ((_SHORT, _LONG) if in_blocks(device) else (_SHORT,))]
    with _evaluating(model):
        try:
            expected = [_values_and_gradients(model, batch) for batch in batches]
            tolerances = [_tolerance(model, *each) for each in zip(batches, expected, strict=True)]
            causal.set_attn_implementation(SHARED)
            # All of them, whatever is found: processes that hold parts of the weights must not part ways.
            found = [
                _difference(_values_and_gradients(model, batch, prompts_once=once), rows, most, batch)
                for batch, rows, most in zip(batches, expected, tolerances, strict=True)
                for once in (False, True)[: 1 + prompts_once]
            ]
            return next(filter(None, found), None)
        # What an architecture raises where prompts are laid out in a way that it does not know is its own affair.
        except Exception as failure:
            return str(failure).strip().split("\n", 1)[0] or type(failure).__name__
        finally:
            causal.set_attn_implementation(before)


def why_head_differs(model: LogprobModel, *, device: torch.device) -> str | None:
    """Compare Liger's head with ours: log-probs, and their gradients in the embedded tokens and in a head that is trained.

    The model stays as it is, as in :func:`why_not_shared`.

    Args:
        model: as it trains, as for :func:`why_not_shared`. Where it is sharded, the head's own gradient is left out.
        device: on which it computes.

    Returns:
        What sets them apart, or the kernel's error; None where they agree within rounding.
    """
    batch = _probe(base_causal_model(model.model), _LONG, device)
    before = model.fused_head
    with _evaluating(model):
        try:
            model.fused_head = False
            own = _values_and_gradients(model, batch, of_head=True)
            most = _tolerance(model, batch, own)
            model.fused_head = True
            return _difference(_values_and_gradients(model, batch, of_head=True), own, most, batch)
        # What a kernel that is compiled on its first call raises is its own affair.
        except Exception as failure:
            return str(failure).strip().split("\n", 1)[0] or type(failure).__name__
        finally:
            model.fused_head = before


class _Found(NamedTuple):
    """What a layout gives.

    Attributes:
        logprobs: nats, of all candidates; 0 where there is none.
        gradients: of a weighted sum of them in the embedded tokens, summed over the places of each of U tokens.
        exact: whether the model computes in float32 or better.
        head: the sum's gradient in the head's weight, where it was asked for, is trained and not sharded.
    """

    logprobs: Float[Tensor, "B K"]
    gradients: Float[Tensor, "U D"]
    exact: bool
    head: Float[Tensor, "V D"] | None = None


def _values_and_gradients(
    model: LogprobModel, batch: GroupBatch, *, prompts_once: bool = False, noise: float = 0.0, of_head: bool = False
) -> _Found:
    """``noise``: the share of themselves by which embeddings are off."""
    causal = base_causal_model(model.model)
    looked_up: list[tuple[Tensor, Tensor]] = []
    trained: list[Tensor] = []
    if of_head and not isinstance(model, FSDPModule):
        trained = [weight for weight in causal.get_output_embeddings().parameters() if weight.requires_grad]

    def as_leaf(module: nn.Module, given: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        looked_up.append((given[0], embedded.detach().requires_grad_()))
        signs = 1.0 - 2.0 * (torch.arange(embedded.shape[-1], device=embedded.device) % 2).to(embedded.dtype)
        # Half a digit would be rounded away again where embeddings are held in bfloat16: there it is a whole one.
        share = 2 * noise if embedded.dtype == torch.bfloat16 else noise
        # Not the leaf itself, which a model may not overwrite.
        return looked_up[-1][1] * (1.0 + share * signs)

    hook = causal.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with torch.enable_grad():
            every = batch.candidate_mask.cpu()
            every = torch.arange(every.shape[1]).expand(every.shape).masked_fill(~every, -1)
            logprobs = model(batch, choose=(lambda scores: every) if prompts_once else None).logprobs
            # Candidates weigh differently, so that errors of one do not make up for another's.
            weights = torch.linspace(0.5, 1.5, logprobs.numel(), dtype=logprobs.dtype, device=logprobs.device)
            # Weights accumulate nothing, and neither wrappers nor optimizers see a backward pass.
            wanted = [leaf for _, leaf in looked_up] + trained
            found = torch.autograd.grad((logprobs * weights.view_as(logprobs)).sum(), wanted)
    finally:
        hook.remove()
    tokens = batch.tokens.unique()
    gradients = torch.zeros(len(tokens), found[0].shape[-1], dtype=torch.promote_types(logprobs.dtype, torch.float32))
    gradients = gradients.to(batch.tokens.device)
    for (ids, _), gradient in zip(looked_up, found[: len(looked_up)], strict=True):
        # Padding, which is no token of the batch, has a gradient of 0.
        places = torch.searchsorted(tokens, ids.flatten()).clamp(max=len(tokens) - 1)
        gradients = gradients.index_add(0, places, gradient.flatten(0, -2).to(gradients.dtype))
    precisions = {model.autocast, causal.dtype, found[0].dtype}
    exact = precisions <= {None, torch.float32, torch.float64}
    return _Found(logprobs.detach(), gradients, exact, found[-1] if trained else None)


def _tolerance(model: LogprobModel, batch: GroupBatch, rows: _Found) -> _Apart:
    """How far apart rounding may set two layouts of this model."""
    if rows.exact:
        return _EXACT
    # Either way: of one alone the measure varies by half, and chance would refuse models that share rightly.
    both = [
        _apart(_values_and_gradients(model, batch, noise=noise, of_head=rows.head is not None), rows)
        for noise in (_HALF_DIGIT, -_HALF_DIGIT)
    ]
    values, gradients = (_TIMES * max(found) + least for found, least in zip(zip(*both, strict=True), _LEAST, strict=True))
    return _Apart(values, min(gradients, _MOST))


def _apart(found: _Found, expected: _Found) -> _Apart:
    values = (found.logprobs - expected.logprobs).abs().max() / expected.logprobs.abs().max().clamp(min=1.0)
    gradients = _share(found.gradients, expected.gradients)
    if found.head is not None and expected.head is not None:
        gradients = torch.maximum(gradients, _share(found.head, expected.head))
    return _Apart(float(values), float(gradients))


def _share(found: Tensor, expected: Tensor) -> Tensor:
    """How far gradients are apart as a share of their norm; a model of zeros has none."""
    share: Tensor = (found - expected).float().norm() / expected.float().norm().clamp(min=1e-30)
    return share


def _difference(found: _Found, expected: _Found, most: _Apart, batch: GroupBatch) -> str | None:
    """What sets two layouts further apart than rounding; NaN is that too."""
    apart, where = _apart(found, expected), f"in a row of {len(batch.tokens)} tokens on {batch.tokens.device.type}"
    if not apart.values <= most.values:
        return f"log-probs differ by {float((found.logprobs - expected.logprobs).abs().max()):.2g} nats {where}"
    if not apart.gradients <= most.gradients:
        return f"gradients differ by {100 * apart.gradients:.2g} % {where}"
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which nothing draws random numbers or computes activations again; afterwards each module's own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _probe(causal: PreTrainedModel, sizes: Sizes, device: torch.device) -> GroupBatch:
    """Groups of arbitrary tokens, for which the model has a place."""
    limits = limits_of(causal)
    most = min(bound for bound in (limits.positions, limits.context, 1 << 30) if bound)
    spans: list[Span] = []
    for prompt, completions in sizes:
        kept = min(prompt, most // 2)
        spans.append(Span(spans[-1].end if spans else 0, kept, tuple(min(length, most - kept) for length in completions)))
    ids = _ordinary_ids(causal)
    tokens = ids[(torch.arange(spans[-1].end) * 7919 + 11) % len(ids)]
    lengths = torch.zeros(len(spans), max(len(span.completions) for span in spans), dtype=torch.long)
    for row, span in zip(lengths, spans, strict=True):
        row[: len(span.completions)] = torch.tensor(span.completions)
    unknown = torch.full(lengths.shape, float("nan"), dtype=torch.float64)
    names = tuple(str(number) for number in range(len(spans)))
    return GroupBatch(names, lengths > 0, unknown, unknown, lengths, tokens, tuple(spans), pad_token_id=0).to(device)


def _ordinary_ids(causal: PreTrainedModel) -> Tensor:
    """Tokens that mean nothing in particular to the model: no padding, which some leave out, no places for images."""
    text = causal.config.get_text_config()
    number = min(text.vocab_size, limits_of(causal).vocabulary or text.vocab_size)
    ordinary = torch.ones(number, dtype=torch.bool)
    for config in (causal.config, text):
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index")):
                named = [value] if isinstance(value, int) else value if isinstance(value, list | tuple) else []
                ordinary[[one for one in named if isinstance(one, int) and 0 <= one < number]] = False
    return (ordinary if ordinary.any() else ~ordinary).nonzero().flatten()

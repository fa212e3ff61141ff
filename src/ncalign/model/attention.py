"""Attention of completions that share their prompt, through transformers' attention interface: no model is patched.

A row holds groups one after the other: a prompt once, then its completions. The prompt attends to itself; each completion
attends to its prompt and to itself, causally, and to nothing else. Everything else in a transformer works on each token alone,
so that hidden states are those of a row for each completion, up to rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ncalign.model.blockwise import UNBOUNDED, blockwise
from ncalign.model.layout import Segments, Span

NAME = "ncalign_shared"
"""Of the attention in transformers' registry; without segments it is their `sdpa`."""


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over rows that share prompts; over any others, transformers' own.

    Args:
        module: the attention layer.
        query: ``[1, H, N, D]``.
        key: ``[1, G, N, D]``, G a divisor of H.
        value: as the keys.
        attention_mask: not read where there are segments.
        segments: what lies where in the row.
        scaling: of the scores; by default one over the root of D.
        options: the layer's: a sliding window, a cap on scores.

    Returns:
        ``[1, N, H, D]``, and no weights.
    """
    cap, scale = options.get("softcap"), query.shape[-1] ** -0.5 if scaling is None else scaling
    if segments is None and cap is not None:
        return _attend(query, key, value, _given(attention_mask, query, key), cap=cap, scale=scale).transpose(1, 2), None
    if segments is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    if options.get("dropout") or options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise NotImplementedError("attention with dropout, sinks or a position bias")
    # Rotations leave queries and keys in float32 under autocast, which attention would round only once they are copied.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if segments.kept is not None and not segments.prompts:
        # Not overwritten when the layer runs again in the backward pass: these are the ones that gradients flow through.
        segments.kept.of.setdefault(module, (key, value))
    earlier = None
    if segments.kept is not None and segments.prompts:
        before_key, before_value = segments.kept.of[module]
        earlier = (before_key.to(value.dtype), before_value.to(value.dtype))
    window = options.get("sliding_window")
    if in_blocks(query.device):
        if earlier is not None:
            key, value = torch.cat([earlier[0], key], dim=2), torch.cat([earlier[1], value], dim=2)
        return blockwise(query, key, value, segments=segments, window=window, cap=cap, scale=scale).transpose(1, 2), None
    attend = partial(_span_attention, (query, key, value), segments=segments, window=window, cap=cap, scale=scale)
    if earlier is None:
        outputs = [output for span in segments.spans for output in attend(span, None)]
    else:
        outputs = [
            output
            for span, prompt in zip(segments.spans, segments.prompts, strict=True)
            for output in attend(span, tuple(part[:, :, prompt.start : prompt.end] for part in earlier))
        ]
    return torch.cat(outputs, dim=1), None


def in_blocks(device: torch.device) -> bool:
    """Whether attention over shared prompts runs in blocks on this device (FlexAttention), not group by group."""
    return device.type == "cuda"


def _span_attention(
    row: tuple[Tensor, Tensor, Tensor],
    span: Span,
    earlier: tuple[Tensor, ...] | None,
    *,
    segments: Segments,
    window: int | None,
    cap: float | None,
    scale: float,
) -> list[Tensor]:
    """The outputs ``[1, n, H, D]`` of a group's prompt and of its completions; the prompt may lie in an earlier row.

    Args:
        row: its queries, keys and values.
        span: the group's places in it.
        earlier: keys and values of a prompt that lies in an earlier row; None where it is in this one.
        segments: of the whole row, which keeps the masks.
        window: how far back a token sees; None for no limit.
        cap: on scores.
        scale: of scores.
    """
    start, end = span.start, span.start + span.prompt
    reach = window or UNBOUNDED
    outputs = []
    if earlier is None:
        q, k, v = (part[:, :, start:end] for part in row)
        whole = reach >= span.prompt and cap is None
        mask = None if whole else _causal_mask(segments, span.prompt, 0, reach, row[0].device)
        outputs.append(_attend(q, k, v, mask, cap=cap, scale=scale).transpose(1, 2))
    else:
        k, v = earlier
    if span.completions:
        longest, number = max(span.completions), len(span.completions)
        own = [_stack(part[:, :, end : span.end], span.completions, longest) for part in row]
        keys, values = (torch.cat([shared.expand(number, -1, -1, -1), each], 2) for shared, each in ((k, own[1]), (v, own[2])))
        mask = _causal_mask(segments, longest, k.shape[2], reach, row[0].device)
        completions = _attend(own[0], keys, values, mask, cap=cap, scale=scale).transpose(1, 2)
        outputs.append(_unstack(completions, span.completions))
    return outputs


def _stack(row: Tensor, lengths: tuple[int, ...], longest: int) -> Tensor:
    """``[1, H, sum of lengths, D]`` -> ``[K, H, longest, D]``, filled up with zeros."""
    if all(length == longest for length in lengths):
        return row[0].reshape(row.shape[1], len(lengths), longest, row.shape[3]).transpose(0, 1)
    pieces = row[0].split(list(lengths), dim=1)
    return torch.stack([F.pad(piece, (0, 0, 0, longest - piece.shape[1])) for piece in pieces])


def _unstack(outputs: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """``[K, longest, H, D]`` -> ``[1, sum of lengths, H, D]``."""
    if all(length == outputs.shape[1] for length in lengths):
        return outputs.flatten(0, 1).unsqueeze(0)
    return torch.cat([output[:length] for output, length in zip(outputs, lengths, strict=True)]).unsqueeze(0)


def _causal_mask(segments: Segments, length: int, prompt: int, reach: int, device: torch.device) -> Bool[Tensor, "T S"]:
    """What tokens that follow a prompt see of it and of themselves, no further back than a window reaches."""
    name = (length, prompt, reach, device)
    if name not in segments.masks:
        query = torch.arange(prompt, prompt + length, device=device).unsqueeze(1)
        key = torch.arange(prompt + length, device=device)
        segments.masks[name] = (key <= query) & (query - key < reach)
    found: Tensor = segments.masks[name]
    return found


def _given(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The mask that a layer was given; without one, the causal one for queries at the end of the keys."""
    if mask is not None:
        return mask
    length, whole = query.shape[2], key.shape[2]
    return torch.ones(length, whole, dtype=torch.bool, device=query.device).tril(whole - length)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, cap: float | None, scale: float) -> Tensor:
    """Scaled dot-product attention with grouped heads; without a mask, causal."""
    repeats = query.shape[1] // key.shape[1]
    if cap is not None:
        assert mask is not None
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        scores = cap * torch.tanh(query @ key.transpose(2, 3) * scale / cap)
        # A row of padding sees nothing: it must not become NaN, which no weight of 0 takes back.
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(
            dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype)
        )
        capped: Tensor = weights.to(query.dtype) @ value
        return capped
    if mask is None:
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        causal: Tensor = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return causal
    if repeats == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # Heads that share keys stand under each other as more queries: the keys need not be copied for each.
    number, heads, length, width = query.shape
    folded = query.reshape(number, heads // repeats, repeats * length, width)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask.repeat(repeats, 1), scale=scale)
    return out.reshape(number, heads, length, width)


# --- Switching it on --------------------------------------------------------------------------------------------------

AttentionInterface.register(NAME, shared_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model's attention is ours."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)

"""The same attention on accelerators, through FlexAttention's kernel, which skips blocks of a row that nothing attends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ncalign.model.layout import Segments, Span

UNBOUNDED = 1 << 30
"""A window further than any text reaches."""
BLOCK = 128
"""Tokens of a block of queries, and of one of keys; rows are filled up to whole ones."""

# One graph for each kind of pass: with and without gradients, precision, head width, window and soft cap, prompts before or
# within the row. Past PyTorch's own limit of 8 it would compute whole score matrices, without a word.
_MOST_GRAPHS = 64

_compiled: list[Callable[..., Tensor]] = []


class _Piece(NamedTuple):
    """Tokens of a row that follow one another: a group's prompt (part 0) or one of its completions."""

    start: int
    end: int
    group: int
    part: int
    position: int  # of the first of them, from the prompt's beginning


def blockwise(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, window: int | None, cap: float | None, scale: float
) -> Tensor:
    """Attention over a row that shares prompts.

    Args:
        query: ``[1, H, N, D]``.
        key: ``[1, G, S, D]``, G a divisor of H; those of an earlier row of prompts come first.
        value: as the keys.
        segments: what lies where in the row; keeps the masks.
        window: how far back a token sees; None for no limit.
        cap: on scores.
        scale: of scores.

    Returns:
        ``[1, H, N, D]``.
    """
    # What is captured is a tensor: numbers would become symbols of a graph with dynamic sizes, which soft caps refuse.
    blocks, capped = ("blocks", window, query.device), ("cap", cap, query.device)
    if blocks not in segments.masks:
        segments.masks[blocks] = block_mask(segments, key.shape[2] - query.shape[2], window=window, device=query.device)
    if cap is not None and capped not in segments.masks:
        segments.masks[capped] = _soft_cap(torch.tensor(cap).to(query.device, non_blocking=True))
    if not _compiled:
        _compiled.append(torch.compile(flex_attention, dynamic=True, fullgraph=True))
    filled = [F.pad(part, (0, 0, 0, -part.shape[2] % BLOCK)) for part in (query, key, value)]
    with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
        out = _compiled[0](
            *filled, score_mod=segments.masks.get(capped), block_mask=segments.masks[blocks], scale=scale, enable_gqa=True
        )
    return out[:, :, : query.shape[2]]


def _soft_cap(cap: Tensor) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def block_mask(segments: Segments, before: int, *, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries attends to, wholly or in part; made from the spans, without an N x N mask.

    Args:
        segments: what lies where in the row.
        before: keys of an earlier row of prompts, which come first; 0 where there is none.
        window: how far back a token sees; None for no limit.
        device: of the attention.
    """
    queries = _pieces(segments.spans, segments.prompts)
    own = [piece._replace(start=piece.start + before, end=piece.end + before) for piece in queries]
    keys = [*_earlier(segments), *own]
    length = queries[-1].end
    some, whole = _blocks(queries, keys, (_num_blocks(length), _num_blocks(before + length)), window or UNBOUNDED)
    (count, partly), (full_count, full) = _indices(some & ~whole, device), _indices(whole, device)
    visible = mask_function(queries, keys, lengths=(length, before + length), window=window, device=device)
    return BlockMask.from_kv_blocks(count, partly, full_count, full, BLOCK_SIZE=BLOCK, mask_mod=visible)


def mask_function(
    queries: Sequence[_Piece], keys: Sequence[_Piece], *, lengths: tuple[int, int], window: int | None, device: torch.device
) -> Callable[..., Tensor]:
    """FlexAttention's mask ``(batch, head, query, key) -> bool`` of single tokens, in partly visible blocks."""
    group, part, position = _of_tokens(queries, _num_blocks(lengths[0]) * BLOCK, nobody=-1).to(device, non_blocking=True)
    key_group, key_part, key_position = _of_tokens(keys, _num_blocks(lengths[1]) * BLOCK, nobody=-2).to(
        device, non_blocking=True
    )
    reach = torch.tensor(window or UNBOUNDED).to(device, non_blocking=True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (group[query] == key_group[key]) & ((key_part[key] == 0) | (key_part[key] == part[query]))
        distance = position[query] - key_position[key]
        seen: Tensor = same & (distance >= 0) & (distance < reach)
        return seen

    return visible


def _pieces(spans: Sequence[Span], prompts: Sequence[Span]) -> list[_Piece]:
    """The pieces of a row; the prompts may lie in an earlier one."""
    found: list[_Piece] = []
    for group, (span, prompt) in enumerate(zip(spans, prompts or spans, strict=True)):
        if span.prompt:
            found.append(_Piece(span.start, span.start + span.prompt, group, 0, 0))
        for part, (offset, length) in enumerate(zip(span.offsets(), span.completions, strict=True), start=1):
            found.append(_Piece(offset, offset + length, group, part, prompt.prompt))
    return found


def _earlier(segments: Segments) -> list[_Piece]:
    """The pieces of an earlier row of prompts: those that no completion here follows belong to no group."""
    return [
        _Piece(prompt.start, prompt.start + prompt.prompt, group, 0, 0)
        for group, prompt in enumerate(segments.prompts)
        if segments.kept is not None
    ]


def _of_tokens(pieces: Sequence[_Piece], length: int, *, nobody: int) -> Tensor:
    """``[3, length]`` int32: each token's group, part and position; those of no piece are of the group ``nobody``."""
    found = torch.zeros(3, length, dtype=torch.int32)
    found[0] = nobody
    for piece in pieces:
        found[0, piece.start : piece.end] = piece.group
        found[1, piece.start : piece.end] = piece.part
        found[2, piece.start : piece.end] = torch.arange(piece.position, piece.position + piece.end - piece.start)
    return found


def _blocks(
    queries: Sequence[_Piece], keys: Sequence[_Piece], shape: tuple[int, int], reach: int
) -> tuple[Bool[NDArray[np.bool_], "Q S"], Bool[NDArray[np.bool_], "Q S"]]:
    """Which pairs of blocks hold a visible pair of tokens, and which nothing else."""
    some, seeing = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
    seen: dict[tuple[int, int], list[_Piece]] = {}
    for piece in keys:
        seen.setdefault((piece.group, piece.part), []).append(piece)
    for query in queries:
        parts = {0, query.part}
        for key in (key for part in parts for key in seen.get((query.group, part), ())):
            rows, first, last = _overlap(query)
            columns, nearest, furthest = _overlap(key)
            # Distances between a block's queries and keys run through all numbers between these.
            least = first[:, None] - furthest[None, :]
            most = last[:, None] - nearest[None, :]
            pairs = np.outer(last - first + 1, furthest - nearest + 1)
            place = np.ix_(rows, columns)
            some[place] |= (most >= 0) & (least < reach)
            seeing[place] += np.where((least >= 0) & (most < reach), pairs, 0)
    return some, seeing == BLOCK * BLOCK


def _overlap(piece: _Piece) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The blocks that a piece lies in, and its first and last position in each."""
    blocks = np.arange(piece.start // BLOCK, (piece.end - 1) // BLOCK + 1)
    shift = piece.position - piece.start
    first, last = np.maximum(blocks * BLOCK, piece.start), np.minimum((blocks + 1) * BLOCK, piece.end) - 1
    return blocks, first + shift, last + shift


def _indices(blocks: Bool[NDArray[np.bool_], "Q S"], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, those first: ``[1, 1, Q]`` and ``[1, 1, Q, S]`` int32."""
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(axis=1, dtype=np.int32)
    number, listed = (torch.from_numpy(part)[None, None].to(device, non_blocking=True) for part in (counts, order))
    return number, listed


def _num_blocks(length: int) -> int:
    return -(-length // BLOCK)

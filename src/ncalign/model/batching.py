"""Groups of token ids → batches of tensors, and the order in which training sees them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ncalign.core.seeds import seed_of
from ncalign.data.groups import Group
from ncalign.model.config import StringPrompts
from ncalign.model.encoding import EncodedGroup, Encoder
from ncalign.model.layout import Span


@dataclass(frozen=True)
class GroupBatch:
    """B groups with at most K candidates each, and their tokens, each once.

    Attributes:
        ids: the groups' ids.
        candidate_mask: True where there is a candidate.
        rewards: float64, for rewards that float32 would round into ties; NaN where missing.
        reference_logprobs: nats, summed over completion tokens; NaN where not known.
        completion_lengths: scored tokens; 0 where there is no candidate.
        tokens: of all groups, one after the other.
        spans: where each group's prompt and completions lie in them.
        pad_token_id: fills rows, where a layout has any.
        scored: on the host, of each token whether it is scored if it is a completion's; None where all completions' are.
    """

    ids: tuple[str, ...]
    candidate_mask: Bool[Tensor, "B K"]
    rewards: Float[Tensor, "B K"]
    reference_logprobs: Float[Tensor, "B K"]
    completion_lengths: Int[Tensor, "B K"]
    tokens: Int[Tensor, " N"]
    spans: tuple[Span, ...]
    pad_token_id: int
    scored: Bool[Tensor, " N"] | None = None

    def to(self, device: torch.device | str) -> GroupBatch:
        """The batch with its tensors on a device, to which they are copied while the host goes on."""
        return replace(
            self,
            candidate_mask=self.candidate_mask.to(device, non_blocking=True),
            rewards=self.rewards.to(device, non_blocking=True),
            reference_logprobs=self.reference_logprobs.to(device, non_blocking=True),
            completion_lengths=self.completion_lengths.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
        )


def collate(groups: Sequence[EncodedGroup], *, pad_token_id: int) -> GroupBatch:
    """Put groups into a batch; K is the largest among them."""
    rewards, mask = rewards_and_mask(groups)
    references = torch.full(mask.shape, float("nan"), dtype=torch.float64)
    lengths = torch.zeros(mask.shape, dtype=torch.long)
    spans: list[Span] = []
    for b, group in enumerate(groups):
        sizes = tuple(len(completion) for completion in group.completions)
        lengths[b, : len(sizes)] = torch.tensor([group.num_scored(k) for k in range(len(sizes))])
        references[b, : len(sizes)] = _float64(group.reference_logprobs)
        spans.append(Span(spans[-1].end if spans else 0, len(group.prompt), sizes))
    tokens = np.concatenate([part for group in groups for part in (group.prompt, *group.completions)])
    return GroupBatch(
        ids=tuple(group.id for group in groups),
        candidate_mask=mask,
        rewards=rewards,
        reference_logprobs=references,
        completion_lengths=lengths,
        tokens=torch.from_numpy(tokens).long(),
        spans=tuple(spans),
        pad_token_id=pad_token_id,
        scored=_scored(groups) if any(mask is not None for group in groups for mask in group.masks) else None,
    )


def _scored(groups: Sequence[EncodedGroup]) -> Bool[Tensor, " N"]:
    """Of each token whether it is scored, if it is a completion's."""
    parts: list[np.ndarray[Any, np.dtype[np.bool_]]] = []
    for group in groups:
        parts.append(np.ones(len(group.prompt), dtype=bool))
        parts += [
            np.ones(len(completion), dtype=bool) if mask is None else mask
            for completion, mask in zip(group.completions, group.masks, strict=True)
        ]
    return torch.from_numpy(np.concatenate(parts))


def rewards_and_mask(groups: Sequence[EncodedGroup]) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """The groups' rewards, float64 and NaN where missing, and where there is a candidate; on the host."""
    rewards = torch.full((len(groups), max(len(group.completions) for group in groups)), float("nan"), dtype=torch.float64)
    mask = torch.zeros(rewards.shape, dtype=torch.bool)
    for b, group in enumerate(groups):
        mask[b, : len(group.completions)] = True
        rewards[b, : len(group.completions)] = _float64(group.rewards)
    return rewards, mask


def encode_groups(
    tokenizer: PreTrainedTokenizerBase,
    groups: Iterable[Group],
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    string_prompts: StringPrompts = "auto",
) -> GroupBatch:
    """Groups as one batch, encoded as training encodes them; a warning says what was cut or encoded in another way.

    Args:
        tokenizer: the model's tokenizer.
        groups: groups with at least one candidate each.
        max_length: most tokens of a prompt and its completion.
        max_prompt_length: prompt tokens kept when the two exceed ``max_length``; half of it by default.
        string_prompts: how plain-string prompts are encoded; see :func:`ncalign.model.encoding.resolve_string_prompts`.

    Raises:
        ValueError: there is no group, or one can't be encoded; the message names it.
    """
    encoder = Encoder(tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, string_prompts=string_prompts)
    encoded = []
    for group in groups:
        if not group.candidates:
            raise ValueError(f"{group.origin or 'group'}: group {group.id!r} has no candidates: there is nothing to batch")
        encoded.append(encoder.encode(group))
    if not encoded:
        raise ValueError("there are no groups: a batch needs at least one")
    for notice in encoder.report.notices():
        warnings.warn(notice, stacklevel=2)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return collate(encoded, pad_token_id=int(padding))


def epoch_order(num_groups: int, *, epoch: int, seed: int) -> list[int]:
    """The order of the groups in an epoch: a permutation that depends on nothing but the seed and the epoch."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(num_groups, generator=generator).tolist()


def group_generator(seed: int, *, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one group in one epoch: the same however a step is split over passes and processes."""
    return torch.Generator().manual_seed(seed_of(seed, epoch, index))


def split_by_tokens(sizes: Sequence[tuple[int, int]], *, max_groups: int, max_tokens: int, padded: bool) -> Iterator[list[int]]:
    """Split groups into passes of at most ``max_groups`` groups and ``max_tokens`` tokens, groups of like length together.

    Args:
        sizes: of each group, its rows and its longest row's tokens; or where prompts are shared, 1 and all its tokens.
        max_groups: most groups in a pass.
        max_tokens: most tokens in a pass; a group above it makes a pass of its own.
        padded: whether each row takes as many tokens as the longest of its pass.

    Yields:
        Positions in ``sizes``.

    Example:
        >>> list(split_by_tokens([(2, 10), (2, 50), (2, 40)], max_groups=8, max_tokens=200, padded=True))
        [[1, 2], [0]]
        >>> list(split_by_tokens([(1, 10), (1, 50), (1, 40)], max_groups=8, max_tokens=90, padded=False))
        [[1, 2], [0]]
    """
    current: list[int] = []
    rows = width = tokens = 0
    for position in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        group_rows, group_width = sizes[position]
        needed = (rows + group_rows) * max(width, group_width) if padded else tokens + group_rows * group_width
        if current and (len(current) == max_groups or needed > max_tokens):
            yield current
            current, rows, width, tokens = [], 0, 0, 0
        current.append(position)
        rows += group_rows
        width = max(width, group_width)
        tokens += group_rows * group_width
    if current:
        yield current


def _float64(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)

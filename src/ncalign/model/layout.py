"""How a batch's tokens are laid out for the model: prompts shared by their completions, or a padded row for each completion.

Both layouts say which hidden state predicts which scored token, so that what comes after the model's body is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Span(NamedTuple):
    """Where a group's tokens lie: the prompt's first, then each completion's.

    Attributes:
        start: index of the prompt's first token.
        prompt: tokens of the prompt.
        completions: tokens of each completion.
    """

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def end(self) -> int:
        """Index after the group's last token."""
        return self.start + self.prompt + sum(self.completions)

    def offsets(self) -> list[int]:
        """Index of each completion's first token."""
        found, at = [], self.start + self.prompt
        for length in self.completions:
            found.append(at)
            at += length
        return found


class KeptPrompts:
    """Keys and values of a row of prompts, of each attention layer (no dict: wrappers of models copy those)."""

    def __init__(self) -> None:
        """Start empty."""
        self.of: dict[Any, tuple[Tensor, Tensor]] = {}


@dataclass(frozen=True)
class Segments:
    """Groups that lie one after the other in one row of tokens: whole, or the prompts in one row and completions in others.

    Attributes:
        spans: what lies where.
        prompts: of completions without their prompts, where in the earlier row each span's prompt lies.
        kept: filled by the row of prompts, read by those of completions; None for whole groups.
        masks: made once for all layers.
    """

    spans: tuple[Span, ...]
    prompts: tuple[Span, ...] = ()
    kept: KeptPrompts | None = field(default=None, compare=False, repr=False)
    masks: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Layout:
    """Tokens as the model takes them, and where to find the log-probs of the scored ones.

    Attributes:
        input_ids: ``[rows, width]``.
        position_ids: each token's distance from its prompt's beginning; None where rows begin with their prompts.
        segments: of a row that shares prompts; None for rows of their own.
        predictors: index of the hidden state, rows one after the other, that predicts each scored token; for completions
            without their prompts the hidden states of the prompts' last tokens, one a group, come first.
        targets: the scored tokens.
        owners: place of each scored token's candidate among the wanted ones.
        pieces: tokens of each prompt, completion and padding, rows one after the other.
        rows: of each candidate wanted, the pieces that a row of its own would consist of; for completions without their
            prompts the prompts come first.
        sources: of a row of prompts or completions alone, each token's index among those of all groups.
    """

    input_ids: Int[Tensor, "R W"]
    position_ids: Int[Tensor, "R W"] | None
    segments: Segments | None
    predictors: Int[Tensor, " C"]
    targets: Int[Tensor, " C"]
    owners: Int[Tensor, " C"]
    pieces: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    sources: Int[Tensor, " N"] | None = None

    @property
    def num_candidates(self) -> int:
        """Candidates wanted."""
        return len(self.rows)


def shared_layout(
    tokens: Int[Tensor, " N"],
    spans: Sequence[Span],
    wanted: Sequence[Sequence[int]],
    *,
    scored: Bool[Tensor, " N"] | None = None,
) -> Layout:
    """One row in which each prompt stands once, with the wanted completions after it, each at the position after the prompt.

    Args:
        tokens: of all groups.
        spans: where each group's lie.
        wanted: of each group, its candidates to lay out, each once; a group without any is left out.
        scored: on the host, of each token whether it is scored if it is a completion's; None for all.

    Example:
        >>> tokens = torch.tensor([1, 2, 3, 4, 5, 6])
        >>> layout = shared_layout(tokens, [Span(0, 2, (1, 3))], [[0, 1]])
        >>> layout.position_ids
        tensor([[0, 1, 2, 2, 3, 4]])
        >>> layout.predictors  # the prompt's last token predicts the first one of both
        tensor([1, 1, 3, 4])
    """
    picked: list[Tensor] = []
    positions: list[Tensor] = []
    placed: list[Span] = []
    at = 0
    for span, chosen in zip(spans, wanted, strict=True):
        if not chosen:
            continue
        offsets = span.offsets()
        pieces = [(span.start, span.prompt, 0)] + [(offsets[k], span.completions[k], span.prompt) for k in chosen]
        picked += [torch.arange(first, first + length) for first, length, _ in pieces]
        positions += [torch.arange(position, position + length) for _, length, position in pieces]
        placed.append(Span(at, span.prompt, tuple(span.completions[k] for k in chosen)))
        at = placed[-1].end
    index = torch.cat(picked)
    input_ids = tokens[index.to(tokens.device, non_blocking=True)].unsqueeze(0)
    predictors, targets, owners = _scored(
        (span.start + span.prompt, offset, length)
        for span in placed
        for offset, length in zip(span.offsets(), span.completions, strict=True)
    )
    if scored is not None:
        predictors, targets, owners = _kept(scored[index[targets]], predictors, targets, owners)
    device = tokens.device
    return Layout(
        input_ids=input_ids,
        position_ids=torch.cat(positions).unsqueeze(0).to(device, non_blocking=True),
        segments=Segments(tuple(placed)),
        pieces=tuple(length for span in placed for length in (span.prompt, *span.completions)),
        rows=_shared_rows(placed),
        predictors=predictors.to(device, non_blocking=True),
        targets=input_ids[0][targets.to(device, non_blocking=True)],
        owners=owners.to(device, non_blocking=True),
    )


def prompts_layout(tokens: Int[Tensor, " N"], spans: Sequence[Span]) -> Layout:
    """The first half of a shared layout: one row of the prompts alone, whose last tokens predict; nothing in it is scored."""
    placed: list[Span] = []
    for span in spans:
        placed.append(Span(placed[-1].end if placed else 0, span.prompt, ()))
    device = tokens.device
    sources = torch.cat([torch.arange(span.start, span.start + span.prompt) for span in spans]).to(device, non_blocking=True)
    positions = torch.cat([torch.arange(span.prompt) for span in spans])
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    return Layout(
        input_ids=tokens[sources].unsqueeze(0),
        position_ids=positions.unsqueeze(0).to(device, non_blocking=True),
        segments=Segments(tuple(placed), kept=KeptPrompts()),
        predictors=torch.tensor([span.end - 1 for span in placed]).to(device, non_blocking=True),
        targets=nothing,
        owners=nothing,
        pieces=tuple(span.prompt for span in placed),
        rows=(),
        sources=sources,
    )


def completions_layout(
    tokens: Int[Tensor, " N"],
    spans: Sequence[Span],
    wanted: Sequence[Sequence[int]],
    prompts: Segments,
    *,
    scored: Bool[Tensor, " N"] | None = None,
) -> Layout:
    """The second half: one row of the wanted completions, to go after the row of all groups' prompts.

    Args:
        tokens: of all groups.
        spans: where each group's lie.
        wanted: of each group, its candidates to lay out, each once; a group without any is left out.
        prompts: what lies where in the earlier row, and its keys and values.
        scored: on the host, of each token whether it is scored if it is a completion's; None for all.

    Example:
        >>> tokens, spans = torch.tensor([1, 2, 3, 4, 5, 6]), [Span(0, 2, (1, 3))]
        >>> layout = completions_layout(tokens, spans, [[1]], prompts_layout(tokens, spans).segments)
        >>> layout.input_ids, layout.position_ids
        (tensor([[4, 5, 6]]), tensor([[2, 3, 4]]))
        >>> layout.predictors  # the prompt's last hidden state, then the completion's own
        tensor([0, 1, 2])
    """
    picked: list[Tensor] = []
    positions: list[Tensor] = []
    placed: list[Span] = []
    earlier: list[Span] = []
    pieces: list[tuple[int, int, int]] = []
    for number, (span, chosen, prompt) in enumerate(zip(spans, wanted, prompts.spans, strict=True)):
        if not chosen:
            continue
        offsets = span.offsets()
        picked += [torch.arange(offsets[k], offsets[k] + span.completions[k]) for k in chosen]
        positions += [torch.arange(span.prompt, span.prompt + span.completions[k]) for k in chosen]
        placed.append(Span(placed[-1].end if placed else 0, 0, tuple(span.completions[k] for k in chosen)))
        earlier.append(prompt)
        # Hidden states of the prompts' ends come first.
        pieces += [
            (number + 1, len(spans) + offset, length)
            for offset, length in zip(placed[-1].offsets(), placed[-1].completions, strict=True)
        ]
    predictors, targets, owners = _scored(pieces)
    index = torch.cat(picked)
    if scored is not None:
        predictors, targets, owners = _kept(scored[index[targets - len(spans)]], predictors, targets, owners)
    device = tokens.device
    input_ids = tokens[sources := index.to(device, non_blocking=True)].unsqueeze(0)
    return Layout(
        input_ids=input_ids,
        position_ids=torch.cat(positions).unsqueeze(0).to(device, non_blocking=True),
        segments=Segments(tuple(placed), prompts=tuple(earlier), kept=prompts.kept),
        predictors=predictors.to(device, non_blocking=True),
        targets=input_ids[0][(targets - len(spans)).to(device, non_blocking=True)],
        owners=owners.to(device, non_blocking=True),
        pieces=tuple(length for _, _, length in pieces),
        rows=tuple((number - 1, len(spans) + own) for own, (number, _, _) in enumerate(pieces)),
        sources=sources,
    )


def padded_layout(
    tokens: Int[Tensor, " N"],
    spans: Sequence[Span],
    wanted: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    scored: Bool[Tensor, " N"] | None = None,
) -> Layout:
    """A row for each wanted candidate: its prompt, itself, and padding that causal attention keeps from every real token.

    ``scored``: on the host, of each token whether it is scored if it is a completion's; None for all.
    """
    rows = [(span, span.offsets()[k], span.completions[k]) for span, chosen in zip(spans, wanted, strict=True) for k in chosen]
    width = max(span.prompt + length for span, _, length in rows)
    # One more token than there are stands for padding.
    index = torch.full((len(rows), width), len(tokens))
    for row, (span, offset, length) in zip(index, rows, strict=True):
        row[: span.prompt] = torch.arange(span.start, span.start + span.prompt)
        row[span.prompt : span.prompt + length] = torch.arange(offset, offset + length)
    input_ids = torch.cat([tokens, tokens.new_full((1,), pad_token_id)])[index.to(tokens.device, non_blocking=True)]
    predictors, targets, owners = _scored(
        (number * width + span.prompt, number * width + span.prompt, length) for number, (span, _, length) in enumerate(rows)
    )
    if scored is not None:
        predictors, targets, owners = _kept(scored[index.flatten()[targets]], predictors, targets, owners)
    return Layout(
        input_ids=input_ids,
        position_ids=None,
        segments=None,
        predictors=predictors.to(tokens.device, non_blocking=True),
        targets=input_ids.flatten()[targets.to(tokens.device, non_blocking=True)],
        owners=owners.to(tokens.device, non_blocking=True),
        pieces=tuple(length for span, _, own in rows for length in (span.prompt + own, width - span.prompt - own)),
        rows=tuple((2 * number,) for number in range(len(rows))),
    )


def _kept(scored: Bool[Tensor, " C"], *of_tokens: Int[Tensor, " C"]) -> tuple[Tensor, ...]:
    """What belongs to the scored ones among completions' tokens."""
    return tuple(values[scored] for values in of_tokens)


def _shared_rows(placed: Sequence[Span]) -> tuple[tuple[int, ...], ...]:
    """The pieces of each candidate's row, where each group's prompt comes before its completions."""
    rows: list[tuple[int, ...]] = []
    prompt = 0
    for span in placed:
        rows += [(prompt, prompt + own) for own in range(1, 1 + len(span.completions))]
        prompt += 1 + len(span.completions)
    return tuple(rows)


def _scored(completions: Iterable[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the predicting and of the scored tokens, and whose they are: (end of the prompt, offset, length) each."""
    predictors, scored, owners = [], [], []
    for owner, (end, offset, length) in enumerate(completions):
        predictors.append(torch.cat([torch.tensor([end - 1]), torch.arange(offset, offset + length - 1)]))
        scored.append(torch.arange(offset, offset + length))
        owners.append(torch.full((length,), owner))
    return torch.cat(predictors), torch.cat(scored), torch.cat(owners)

"""Groups as token ids, and what is told of their encoding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from ncalign.data.groups import Group
from ncalign.model.control_tokens import control_notice
from ncalign.model.untold import untold_notices

Ids = NDArray[np.int32]
Scored = NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedGroup:
    """A group as token ids: what training needs of it."""

    id: str
    origin: str
    prompt: Ids
    completions: tuple[Ids, ...]
    rewards: tuple[float | None, ...]
    reference_logprobs: tuple[float | None, ...]
    weights: tuple[float, ...] = ()
    """Factor of the group's loss when this candidate is its positive; empty where every factor is 1."""
    scored: tuple[Scored | None, ...] = ()
    """Which tokens of each completion are scored, None for all of them; empty where that is so for every completion."""

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max(len(completion) for completion in self.completions)

    @property
    def masks(self) -> tuple[Scored | None, ...]:
        """Which tokens of each completion are scored; None for all of them."""
        return self.scored or (None,) * len(self.completions)

    def num_scored(self, candidate: int) -> int:
        """Scored tokens of a completion."""
        mask = self.masks[candidate]
        return len(self.completions[candidate]) if mask is None else int(mask.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and all completions."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


@dataclass
class EncodingReport:
    """Counts of what encoding did.

    Attributes:
        groups: groups encoded.
        candidates: candidates encoded.
        tokens: prompt and completion tokens of all candidates.
        scored_tokens: scored tokens of completions.
        longest: tokens of the longest prompt and completion, after truncation.
        prompts_truncated: prompts that lost their beginning.
        completions_truncated: completions that lost their end, and their EOS with it.
        boundary_merges: candidates whose first token would have merged with the prompt's last.
        repeated_eos: candidates whose text ended with an EOS of its own; it is scored once.
        template_mismatches: candidates whose rendering is not the rendered prompt followed by the turn's header and their text
            (a template that rewrites the last turn); they are encoded as plain text after the prompt.
        rewritten: completions with which the template writes the prompt otherwise than without; what differs is encoded with
            them, and not scored.
        dropped: dropped groups by reason.
        control_prompts: prompts in whose texts control tokens are written out.
        control_completions: completions with such texts.
        control_escaped: those of both whose control tokens were encoded as text.
        control_tokens: how many texts hold each.
        first_truncated: the first truncated group, to look at.
        untold: groups by what the chat template leaves out of their messages.
    """

    groups: int = 0
    candidates: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    longest: int = 0
    prompts_truncated: int = 0
    completions_truncated: int = 0
    boundary_merges: int = 0
    repeated_eos: int = 0
    template_mismatches: int = 0
    rewritten: int = 0
    control_prompts: int = 0
    control_completions: int = 0
    control_escaped: int = 0
    control_tokens: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    first_truncated: str | None = None
    untold: Counter[str] = field(default_factory=Counter)

    def add(self, other: EncodingReport) -> None:
        """Count what another encoder did as well."""
        for entry in fields(self):
            if entry.type == "int":
                combine = max if entry.name == "longest" else sum
                setattr(self, entry.name, combine((getattr(self, entry.name), getattr(other, entry.name))))
        self.dropped.update(other.dropped)
        self.untold.update(other.untold)
        self.control_tokens.update(other.control_tokens)
        self.first_truncated = self.first_truncated or other.first_truncated

    def notices(self) -> list[str]:
        """What a user should know, one sentence each."""
        found = []
        if self.prompts_truncated or self.completions_truncated:
            found.append(
                f"{self.prompts_truncated} prompts lost their beginning and {self.completions_truncated} completions their end "
                f"(first: {self.first_truncated}); raise max_length to keep them whole"
            )
        if self.boundary_merges:
            found.append(
                f"{self.boundary_merges} completions would merge a token with their prompt; they are encoded after the "
                "prompt's own tokens, as in generation (end prompts without trailing spaces to avoid this)"
            )
        if self.repeated_eos:
            found.append(f"{self.repeated_eos} completions ended with an EOS of their own; it is scored once")
        if self.template_mismatches:
            found.append(
                f"the chat template renders {self.template_mismatches} completions differently from a generated turn; they are "
                "encoded as plain text after the prompt"
            )
        if self.rewritten:
            found.append(
                f"the chat template writes the prompt otherwise where {self.rewritten} completions follow; what differs is "
                "encoded with them, and not scored"
            )
        return [*found, *self.text_notices()]

    def text_notices(self) -> list[str]:
        """What is special about the texts themselves."""
        control = control_notice(self.control_prompts, self.control_completions, self.control_escaped, self.control_tokens)
        return [*untold_notices(self.untold), *([] if control is None else [control])]


class DroppedGroupError(ValueError):
    """A group that can't be encoded; ``reason`` is the short form that is counted."""

    def __init__(self, group: Group, reason: str, detail: str) -> None:
        """Name the group and say why."""
        super().__init__(f"{group.origin or 'group'}: group {group.id!r}: {detail}")
        self.reason = reason

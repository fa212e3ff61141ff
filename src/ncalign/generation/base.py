"""What a generator is: prompts in, K completions a prompt out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from ncalign.data.formats.group import TemplateKwargs, Tools
from ncalign.data.groups import Group, Message
from ncalign.data.rendering import Rendering


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled.

    Attributes:
        max_new_tokens: tokens of a completion, EOS included, at most.
        temperature: divides the logits; 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this is sampled from; 1 is off.
        top_k: the k likeliest tokens are sampled from; 0 is off.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """A sampled completion.

    Attributes:
        text: the text, without special tokens.
        num_tokens: tokens sampled, EOS included.
        finished: whether the model ended it; false when ``max_new_tokens`` cut it.
        token_ids: the tokens, EOS included; None where the generator does not give them.
        logprob: sum of their log-probs under the model itself, before temperature and truncation, in nats; None where the
            generator does not give it.
    """

    text: str
    num_tokens: int
    finished: bool
    token_ids: tuple[int, ...] | None = None
    logprob: float | None = field(default=None, compare=False)


class PromptError(ValueError):
    """A prompt that can't be answered.

    Attributes:
        index: its place among the prompts given.
        detail: what is wrong with it, and what to do.
        reason: the same in a few words, by which such prompts are counted.
    """

    def __init__(self, index: int, detail: str, *, reason: str | None = None) -> None:
        """Name the prompt by its place; who knows where it was read from says that instead."""
        super().__init__(f"prompt {index + 1}: {detail}")
        self.index = index
        self.detail = detail
        self.reason = detail if reason is None else reason


Refuse: TypeAlias = Callable[[PromptError], None]
"""Is told of a prompt that can't be answered, and has no completions then."""


def tell_refused(errors: Sequence[PromptError], refuse: Refuse | None) -> None:
    """Tell of each prompt that can't be answered; without somebody to tell, raise the first one's error.

    Raises:
        PromptError: the first, with how many others there are.
    """
    if refuse is None and errors:
        others = f" ({len(errors) - 1} more prompts can't be answered)" if len(errors) > 1 else ""
        raise PromptError(errors[0].index, errors[0].detail + others)
    for error in errors:
        assert refuse is not None
        refuse(error)


class LeftOutPrompts:
    """Counts prompts that can't be answered, to leave them out.

    Attributes:
        reasons: how many there are, by what is wrong with them.
        names: of the prompts left out, as messages call them.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.names: list[str] = []
        self._first: dict[str, str] = {}

    def among(self, names: Sequence[str]) -> Refuse:
        """What counts those of some prompts, which have these names."""

        def count(error: PromptError) -> None:
            name = names[error.index]
            self.reasons[error.reason] += 1
            self.names.append(name)
            self._first.setdefault(error.reason, f"{name}: {error.detail}")

        return count

    def notice(self, what: str) -> str | None:
        """What a user should know of them; None where there are none. ``what`` names all prompts, such as their file."""
        if not self.names:
            return None
        lines = [f"  {count} x {reason} (first: {self._first[reason]})" for reason, count in self.reasons.most_common()]
        return "\n".join([f"note: {what}: {len(self.names)} prompts can't be answered and are left out:", *lines])


def sample_seed(seed: int, index: int, num_samples: int) -> int:
    """The seed of prompt ``index`` where an engine samples its j-th completion with that seed + j, as vLLM does.

    No two completions of a call share a seed then: prompts whose seeds were neighbours would repeat each other's samples.

    >>> [sample_seed(7, index, 4) for index in range(3)]
    [7, 11, 15]
    """
    return (seed + index * num_samples) % 2**31


def group_name(group: Group, index: int) -> str:
    """A group as messages call it."""
    return f"{group.origin or f'prompt {index + 1}'}: group {group.id!r}"


class Generator(Protocol):
    """Anything that answers prompts."""

    @property
    def string_prompts(self) -> Rendering:
        """How prompts that are plain strings are put to the model."""
        ...

    def generate(
        self,
        prompts: Sequence[str | list[Message]],
        *,
        num_samples: int,
        params: SamplingParams,
        seed: int,
        tools: Sequence[Tools] | None = None,
        template_kwargs: Sequence[TemplateKwargs] | None = None,
        refuse: Refuse | None = None,
    ) -> list[list[Completion]]:
        """Sample completions.

        Args:
            prompts: strings or conversations.
            num_samples: K, completions per prompt.
            params: how they are sampled.
            seed: the same seed, prompts and settings give the same completions.
            tools: what the model may call, for each prompt; one that is put to it as plain text is put without. None: nothing.
            template_kwargs: further values for the chat template, for each prompt; None: none.
            refuse: is told of each prompt that can't be answered, which has no completions then; None raises at the first.

        Returns:
            For each prompt, in the order given, its K completions.

        Raises:
            PromptError: a prompt can't be answered, and nobody is told; none is.
        """
        ...

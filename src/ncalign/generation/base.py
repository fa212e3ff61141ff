"""What a generator is: prompts in, K completions a prompt out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ncalign.data.groups import Message
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
    """

    def __init__(self, index: int, detail: str) -> None:
        """Name the prompt by its place; who knows where it was read from says that instead."""
        super().__init__(f"prompt {index + 1}: {detail}")
        self.index = index
        self.detail = detail


class Generator(Protocol):
    """Anything that answers prompts."""

    @property
    def string_prompts(self) -> Rendering:
        """How prompts that are plain strings are put to the model."""
        ...

    def generate(
        self, prompts: Sequence[str | list[Message]], *, num_samples: int, params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """Sample completions.

        Args:
            prompts: strings or conversations.
            num_samples: K, completions per prompt.
            params: how they are sampled.
            seed: the same seed, prompts and settings give the same completions.

        Returns:
            For each prompt, in the order given, its K completions.

        Raises:
            PromptError: a prompt can't be answered; none is.
        """
        ...

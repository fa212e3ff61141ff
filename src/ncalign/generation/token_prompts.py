"""Prompts as token ids, and sampled ids as text, for generators outside this process that take and give tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ncalign.data.formats.group import TemplateKwargs, Tools
from ncalign.data.groups import Message
from ncalign.generation.base import Completion, PromptError
from ncalign.generation.local import answer_text, encode_prompts
from ncalign.model.chat import ChatTemplate, resolve_string_prompts
from ncalign.model.config import ControlTokensInText, StringPrompts


class TokenPrompts:
    """Encodes prompts with the policy's own tokenizer, so that a generator reads and writes the tokens that training scores.

    Args:
        tokenizer: the policy's.
        string_prompts: how plain-string prompts are encoded; see :func:`ncalign.model.chat.resolve_string_prompts`.
        control_tokens: what is done with control tokens that are written out in prompts.
        template: the chat template, with the date and the values that it is given; None for the tokenizer's as it is.
        max_tokens: of a prompt and its completion, that the generator has room for; None: no limit.
        vocabulary: number of tokens that the policy has; None: unknown.

    Attributes:
        string_prompts: how plain-string prompts are put to the model.
        end_id: the token that ends a completion.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        string_prompts: StringPrompts = "auto",
        control_tokens: ControlTokensInText = "keep",
        template: ChatTemplate | None = None,
        max_tokens: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self._tokenizer, self._control_tokens = tokenizer, control_tokens
        self._max_tokens, self._vocabulary = max_tokens, vocabulary
        self.string_prompts = resolve_string_prompts(tokenizer, string_prompts)
        self._template = template or ChatTemplate(tokenizer)
        self._turn = self._template.example()
        self.end_id = self._template.end_id(self._turn)

    def encode(
        self,
        prompts: Sequence[str | list[Message]],
        tools: Sequence[Tools] | None,
        max_new_tokens: int,
        *,
        template_kwargs: Sequence[TemplateKwargs] | None = None,
    ) -> list[list[int] | PromptError]:
        """Each prompt's tokens or, in the place of one that can't be answered, what to say."""
        found = encode_prompts(
            self._template,
            prompts,
            self.string_prompts,
            tools=tools,
            template_kwargs=template_kwargs,
            control_tokens=self._control_tokens,
        )
        return [self._fitting(index, ids, max_new_tokens) for index, ids in enumerate(found)]

    def _fitting(self, index: int, ids: list[int] | PromptError, max_new_tokens: int) -> list[int] | PromptError:
        if isinstance(ids, PromptError) or self._max_tokens is None or len(ids) + max_new_tokens <= self._max_tokens:
            return ids
        return PromptError(
            index,
            f"its {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the {self._max_tokens} tokens for which the "
            "generator makes room: shorten the prompt, or raise max_length",
            reason=f"too long for the generator's {self._max_tokens} tokens with max_new_tokens={max_new_tokens}",
        )

    def completion(self, ids: Sequence[int], *, finished: bool, logprob: float | None) -> Completion:
        """A completion of sampled ids, the end token among them where the model ended it.

        Raises:
            ValueError: the policy has no such token.
        """
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            raise ValueError(
                f"the generator answers with the token {max(ids)}, and the policy has {self._vocabulary} tokens: it serves "
                "another model, or one with another tokenizer"
            )
        text = answer_text(self._tokenizer, ids[:-1] if finished else ids, self._turn)
        return Completion(text, len(ids), finished, token_ids=tuple(ids), logprob=logprob)

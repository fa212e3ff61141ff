"""What is read of a server's answer: fields that one API or another names, whatever else it holds, and nothing unchecked.

A server may send anything. What is read has bounds, so that no answer takes long to refuse, sums to infinity, or is kept as
something that could not be read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ncalign.generation.refusals import reason_of

# Of an answer that is an error in spite of its status, and of one that is shown.
_HEAD, _SHOWN, _READ_OF_A_BODY = 1000, 200, 20_000
# Finish reasons, as servers spell them: the limit on tokens, a filter, and the server's own failure.
_CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})
_WITHHELD = frozenset({"content_filter", "safety", "recitation", "blocklist", "prohibited_content"})
_BROKEN_OFF = frozenset({"error", "abort", "cancelled", "insufficient_system_resource"})
# In nats: rounding may put the log-prob of a certain token a little above 0, and float32 has none below.
_HIGHEST, _LOWEST = 1e-3, -3.5e38
_MOST_CHOICES, _MOST_PARTS, _MOST_TOKENS, _MOST_ALTERNATIVES = 2**13, 2**13, 2**20, 2**10

# A sum of tokens' log-probs, and one of them: no sum of these is infinite.
Logprob = Annotated[float, Field(le=_HIGHEST, allow_inf_nan=False)]
_TokenLogprob = Annotated[float, Field(ge=_LOWEST, le=_HIGHEST, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=2**53)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Malformed(ValueError):
    """An answer that can't be used."""


@dataclass
class Usage:
    """What this process asked and was answered; tokens as the server counted them.

    Attributes:
        requests: HTTP requests that were answered.
        malformed: answers that could not be used, and were asked for again.
        remembered: requests whose answers were on disk.
    """

    requests: int = 0
    malformed: int = 0
    remembered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        text: what was answered.
        finished: whether the model ended it; false when a limit cut it.
        num_tokens: of the answer; None where the server does not say.
        logprob: sum of its tokens' log-probs, in nats; None where the server does not give them.
        top: for each token, the likeliest alternatives with their log-probs; empty where they were not asked for.
        withheld: whether a filter of the server's ended it, and no limit on its length.
        token_ids: its tokens, the one that ended it among them; None where they were not asked for, or are not given.
    """

    text: str
    finished: bool
    num_tokens: int | None = None
    logprob: Logprob | None = None
    top: tuple[Mapping[str, Logprob], ...] = ()
    withheld: bool = False
    token_ids: tuple[int, ...] | None = None

    def texts(self) -> Iterator[str]:
        """All that the server wrote in it."""
        yield self.text
        for alternatives in self.top:
            yield from alternatives


@dataclass(frozen=True)
class Read:
    """What an answer holds.

    Attributes:
        choices: at least one.
        prompt_tokens: as the server counted them, 0 where it does not say.
        completion_tokens: as the server counted them, 0 where it does not say.
    """

    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int


def read_answer(text: str, *, hidden: Callable[[str], str] = lambda text: text) -> Read:
    """Read the body of an answer.

    Counts of tokens that can't be read are passed over: what the model said is good without them.

    Args:
        text: the body.
        hidden: takes out what a message must not show.

    Raises:
        Malformed: it is no answer, or one with something in it that can't be.

    >>> read_answer('{"choices": [{"text": "4", "finish_reason": "stop"}], "usage": []}')
    Read(choices=[Choice(text='4', finished=True, num_tokens=None, logprob=None, top=(), withheld=False,
         token_ids=None)], prompt_tokens=0, completion_tokens=0)
    """
    text = text.removeprefix("\ufeff")
    try:
        answer = _Answer.model_validate_json(text)
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False, include_input=False)
        place = "".join(f"{part}: " for part in first["loc"])
        # Hidden before it is cut, which might leave half of it.
        shown = hidden(text[:_READ_OF_A_BODY])
        raise Malformed(
            reason_of(shown) if '"error"' in text[:_HEAD] else f"{place}{first['msg']} in {shown[:_SHOWN]!r}"
        ) from None
    counted = answer.usage or _Usage()
    found = [choice.read() for choice in answer.choices if choice.finish_reason not in _BROKEN_OFF]
    if not found:
        raise Malformed(f"the server broke off: finish_reason {answer.choices[0].finish_reason}")
    if len(found) == 1 and found[0].num_tokens is None:
        found = [replace(found[0], num_tokens=counted.completion_tokens or None)]
    return Read(found, counted.prompt_tokens or 0, counted.completion_tokens or 0)


class _Token(BaseModel):
    token: str
    logprob: _TokenLogprob
    top_logprobs: Annotated[list[_Token], Field(fail_fast=True, max_length=_MOST_ALTERNATIVES)] | None = None


class _Logprobs(BaseModel):
    # The chat API's; llama.cpp gives it in the completions API too.
    content: Annotated[list[_Token], Field(fail_fast=True, max_length=_MOST_TOKENS)] | None = None
    # The completions API's; None where a token has no left context.
    token_logprobs: Annotated[list[_TokenLogprob | None], Field(fail_fast=True, max_length=_MOST_TOKENS)] | None = None


class _Usage(BaseModel):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


class _Part(BaseModel):
    type: str = "text"
    text: str | None = None

    def is_text(self) -> bool:
        """Whether it is said, and not thought."""
        return self.type in ("text", "output_text")


class _Message(BaseModel):
    # Null where the model's tokens ended in its thoughts, where it called a tool, or said nothing: an answer without text.
    content: str | Annotated[list[str | _Part], Field(fail_fast=True, max_length=_MOST_PARTS)] | None = None
    refusal: str | None = None

    def read(self) -> str:
        parts = self.content if isinstance(self.content, list) else [self.content or ""]
        texts = [
            part if isinstance(part, str) else part.text or "" for part in parts if isinstance(part, str) or part.is_text()
        ]
        return "".join(texts) or self.refusal or ""


class _WireChoice(BaseModel):
    message: _Message | None = None
    text: str | None = None
    finish_reason: Annotated[str, AfterValidator(str.lower)] | None = None
    logprobs: _Logprobs | None = None
    # vLLM's, with return_token_ids.
    token_ids: Annotated[list[_TokenId], Field(fail_fast=True, max_length=_MOST_TOKENS)] | None = None

    @model_validator(mode="after")
    def _has_an_answer(self) -> _WireChoice:
        if self.message is None and self.text is None:
            raise ValueError("neither message nor text")
        return self

    def read(self) -> Choice:
        given = self.logprobs or _Logprobs()
        tokens, values = given.content, given.token_logprobs
        if values is None and tokens is not None:
            values = [token.logprob for token in tokens]
        top = tuple({one.token: one.logprob for one in token.top_logprobs or ()} for token in tokens or ())
        return Choice(
            self.message.read() if self.message is not None else self.text or "",
            finished=self.finish_reason not in _CUT | _WITHHELD,
            num_tokens=None if values is None else len(values),
            # Many tokens a little above 0 would add up to a log-prob that is not accepted when it is read again.
            logprob=None if values is None else min(float(sum(value for value in values if value is not None)), _HIGHEST),
            top=top if any(top) else (),
            withheld=self.finish_reason in _WITHHELD,
            token_ids=None if self.token_ids is None else tuple(self.token_ids),
        )


def _or_none(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        return None


class _Answer(BaseModel):
    choices: Annotated[list[_WireChoice], Field(fail_fast=True, min_length=1, max_length=_MOST_CHOICES)]
    usage: Annotated[_Usage | None, WrapValidator(_or_none)] = None


CHOICES = TypeAdapter(list[Choice])
"""Choices as they are kept."""

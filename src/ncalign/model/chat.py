"""A tokenizer's chat template: conversations as text, and where in it an assistant's turn begins and ends.

* **A turn's opening.** What a model is fed ends where the template's generation prompt ends; a template that has none still
  writes something before an answer, such as a role's name, and that is fed too. What the template writes between the two, such
  as the name of a channel or an empty thought, is the turn's header: the model writes it, and it is scored.
* **A half-written turn.** A conversation that ends with an assistant's turn is fed up to the end of that turn's text, and the
  answer goes on in it.
* **A turn's end** is the first added token that the template puts after an answer, be it marked special or not.
* **The date.** Templates that write today's date get one that is fixed for a run.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ncalign.core.deadline import within
from ncalign.core.errors import names
from ncalign.core.progress import say
from ncalign.data.formats.group import TEMPLATE_KWARGS, TemplateKwargs, Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering
from ncalign.model.config import StringPrompts
from ncalign.model.thoughts import without_thoughts

RENDER_SECONDS = 10.0
"""For one conversation; templates take milliseconds."""
_MOST_CHARACTERS = 50_000_000
_PROBE = "ncalign"
_CLOCK = "strftime_now"
_PARTS = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
"""What strftime can be asked for, after a per cent sign."""
_EXAMPLE: tuple[Message, ...] = ({"role": "user", "content": "a"},)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what an assistant writes, for transformers' mask of assistant's tokens."""
_NOTHING: TemplateKwargs = {}


class RefusedError(ValueError):
    """A conversation that the chat template does not take; the message says why, and names no group."""


class EndlessTemplateError(ValueError):
    """A chat template that does not end, or writes without end: no row's fault, so no row is left out for it."""


@dataclass(frozen=True)
class Rendered:
    """What a chat template writes.

    Attributes:
        text: all of it.
        generated: where in it the template says that an assistant writes, as beginnings and ends; empty without such marks.
    """

    text: str
    generated: tuple[tuple[int, int], ...] = ()


def _bounded(tokenizer: PreTrainedTokenizerBase, render: Callable[[], Rendered]) -> Rendered:
    """What a chat template writes, within bounds of time and size: templates are programs, and come with models."""
    remedy = f"put one that does into {tokenizer.name_or_path!r}, as chat_template.jinja"
    try:
        found = within(RENDER_SECONDS, render)
    except (TimeoutError, MemoryError) as error:
        why = "takes more memory than there is" if isinstance(error, MemoryError) else f"takes more than {RENDER_SECONDS:g} s"
        raise EndlessTemplateError(f"the chat template {why} for one conversation: it may never end; {remedy}") from error
    if len(found.text) > _MOST_CHARACTERS:
        raise EndlessTemplateError(f"the chat template writes {len(found.text):,} characters for one conversation; {remedy}")
    return found


@dataclass(frozen=True)
class Turn:
    """Where in a rendered conversation the answer of an assistant stands.

    Attributes:
        prompt: all that a model is fed.
        header: what the template writes after that and in front of the answer's text.
        before_end: what it writes between the text and the end token.
        end: the end token's text; None where the template puts none.
        after: all that it writes after the text.
    """

    prompt: str
    header: str
    before_end: str
    end: str | None
    after: str


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template, all on one day.

    Args:
        tokenizer: whose template it is.
        today: the date that a template which writes it is given; None for that of the call.
        kwargs: further values for the template; those of a conversation take their place.
        strip_thoughts: whether the template is given turns before the last question without their thoughts.

    Raises:
        ValueError: the template reads no such value.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        today: date | None = None,
        kwargs: TemplateKwargs = _NOTHING,
        *,
        strip_thoughts: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.today = date.today() if today is None else today
        self.kwargs, self._strips = dict(kwargs), strip_thoughts
        self._in_parts: bool | None = None
        if unread := self._unread(self.kwargs):
            raise ValueError(unread)
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self._ends = sorted(token for token in {*tokenizer.all_special_tokens, *added} if token.strip())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = None,
        opened: bool = False,
        what: str = "the prompt",
        kwargs: TemplateKwargs = _NOTHING,
    ) -> str:
        """A conversation as text.

        Args:
            messages: its turns.
            tools: what the model may call.
            opened: whether a generation prompt follows.
            what: names the conversation in messages.
            kwargs: further values for the template.

        Raises:
            RefusedError: the tokenizer has no chat template, or the template refuses the messages, or reads no such value.
            EndlessTemplateError: the template does not end, or writes without end.
        """
        tokenizer = self.tokenizer

        def write(messages: list[Message], template: str, given: dict[str, Any]) -> Rendered:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opened, chat_template=template, **given
            )
            assert isinstance(text, str)
            return Rendered(text)

        return self._written(write, messages, tools=tools, what=what, kwargs=kwargs).text

    def with_marks(
        self, messages: Sequence[Message], *, tools: Tools = None, kwargs: TemplateKwargs = _NOTHING
    ) -> Rendered | None:
        """A conversation, and where in it an assistant writes as the template itself marks it (``{% generation %}``).

        None where the template marks nothing.

        Raises:
            RefusedError: as :meth:`render`.
            EndlessTemplateError: as :meth:`render`.
        """
        tokenizer = self.tokenizer

        def write(messages: list[Message], template: str, given: dict[str, Any]) -> Rendered:
            texts, marked = cast(
                tuple[list[str], list[list[tuple[int, int]]]],
                render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    **{**tokenizer.special_tokens_map, **given},
                ),
            )
            return Rendered(texts[0], tuple(marked[0]))

        if tokenizer.chat_template is None or not _GENERATION.search(self._source(tools)):
            return None
        return self._written(write, messages, tools=tools, what="the prompt with its completion", kwargs=kwargs)

    def _written(
        self,
        write: Callable[[list[Message], str, dict[str, Any]], Rendered],
        messages: Sequence[Message],
        *,
        tools: Tools,
        what: str,
        kwargs: TemplateKwargs,
    ) -> Rendered:
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise RefusedError(
                f"the prompt is a conversation and the tokenizer of {tokenizer.name_or_path!r} has no chat template: put a "
                "chat_template.jinja into the model folder, or give prompts and completions as plain strings"
            )
        if kwargs and (unread := self._unread(kwargs)):
            raise RefusedError(unread)
        given = {**self.kwargs, **kwargs}
        messages = without_thoughts(messages) if self._strips else messages
        if self._takes_parts():
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        try:
            template = self._source(tools)
            dated = _clock(self.today) + template if _CLOCK in template else template
            try:
                return _bounded(tokenizer, lambda: write(list(messages), dated, given))
            except EndlessTemplateError:
                raise
            except Exception:
                # Some templates, such as DeepSeek's, take the arguments of calls as text alone.
                spelled = _with_written_arguments(messages)
                if spelled is None:
                    raise
                with contextlib.suppress(Exception):
                    return _bounded(tokenizer, lambda: write(spelled, dated, given))
                raise
        except EndlessTemplateError:
            raise
        except Exception as error:  # jinja2 raises its own classes, and templates raise what they like
            reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0][:200]
            raise RefusedError(f"the chat template refuses {what}: {reason}") from error

    def _takes_parts(self) -> bool:
        """Whether the template writes texts only as parts of a list, as those of models that see pictures do."""
        if self._in_parts is None:
            self._in_parts = False  # for the two renderings that follow
            self._in_parts = not self._shows(_PROBE) and self._shows([{"type": "text", "text": _PROBE}])
        return self._in_parts

    def _shows(self, content: object) -> bool:
        with contextlib.suppress(RefusedError):
            return _PROBE in self.render([{"role": "user", "content": content}], opened=True)
        return False

    def _source(self, tools: Tools) -> str:
        """The template: some tokenizers have one of their own for conversations with tools."""
        return str(self.tokenizer.get_chat_template(tools=tools))

    def _unread(self, kwargs: TemplateKwargs) -> str | None:
        """What to say of values that the template does not read; None where it reads them all."""
        written = self.tokenizer.chat_template
        if not kwargs or written is None:
            return None
        sources = " ".join(map(str, written.values())) if isinstance(written, dict) else str(written)
        unread = [name for name in kwargs if not re.search(rf"\b{re.escape(name)}\b", sources)]
        if not unread:
            return None
        return (
            f"the chat template of {self.tokenizer.name_or_path!r} does not read {names(unread)}: leave it out of "
            f"{TEMPLATE_KWARGS}, or use a template that reads it"
        )

    def turn(self, messages: Sequence[Message], *, tools: Tools = None, kwargs: TemplateKwargs = _NOTHING) -> Turn:
        """Where an answer to a conversation stands in its rendering.

        Raises:
            RefusedError: the template refuses the conversation, an answer to it, or does not write the answer as it is.
        """
        half_written = is_half_written(messages)
        prompt = "" if half_written else self.render(messages, tools=tools, opened=True, kwargs=kwargs)
        whole = self.render(answered(messages, _PROBE), tools=tools, what="the prompt with its completion", kwargs=kwargs)
        before, probe, after = whole.rpartition(_PROBE)
        if not probe:
            raise RefusedError("the chat template does not render an assistant's turn as it is: fix the template")
        header = ""
        if half_written:
            prompt = before
        elif before.startswith(prompt):
            header = before[len(prompt) :]
            if header.strip(" ") and self.render(messages, tools=tools, kwargs=kwargs) == prompt:
                # No generation prompt. Tokenizers join a space with the word after it, so it goes with the answer.
                prompt = before.rstrip(" ")
                header = before[len(prompt) :]
        present = [(after.index(token), -len(token), token) for token in self._ends if token in after]
        position, _, end = min(present, default=(0, 0, None))
        return Turn(prompt, header, after[:position], end, after)

    def prompt(self, messages: Sequence[Message], *, tools: Tools = None, kwargs: TemplateKwargs = _NOTHING) -> str:
        """What a model that may call these tools is fed before it answers.

        Raises:
            RefusedError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        if is_half_written(messages):
            return self.turn(messages, tools=tools, kwargs=kwargs).prompt
        opened = self.render(messages, tools=tools, opened=True, kwargs=kwargs)
        # A conversation that the template lets no answer follow can still be answered.
        with contextlib.suppress(RefusedError):
            return self.turn(messages, tools=tools, kwargs=kwargs).prompt
        return opened

    def example(self) -> Turn | None:
        """The turn of an answer to a plain question; None where there is no template, or it refuses one."""
        with contextlib.suppress(RefusedError):
            return self.turn(_EXAMPLE)
        return None

    def end_id(self, turn: Turn | None) -> int:
        """The token that ends a turn: the template's, or else the tokenizer's EOS."""
        if turn is None or turn.end is None:
            return int(self.tokenizer.eos_token_id)
        found = self.tokenizer.convert_tokens_to_ids(turn.end)
        assert isinstance(found, int)
        return found


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's chat template writes today's date."""
    return _CLOCK in str(tokenizer.chat_template or "")


def template_date(tokenizer: PreTrainedTokenizerBase, chosen: date | None) -> date | None:
    """The date that a run's templates are given, and said to be: that chosen, or today's; None where none is written."""
    if not writes_date(tokenizer):
        return chosen
    today = date.today() if chosen is None else chosen
    if chosen is None:
        say(f"note: the chat template writes today's date: it stays {today} for this run (template_date)")
    return today


def _clock(today: date) -> str:
    """A macro that takes the place of the templates' clock, which transformers lets nobody set otherwise."""
    moment = datetime(today.year, today.month, today.day)
    written = {f"%{sign}{part}": moment.strftime(f"%{sign}{part}") for part in _PARTS for sign in ("", "-")}
    steps = "".join(f" | replace({part!r}, {text!r})" for part, text in written.items())
    # The newline is the block's own, so that the template's first line begins as it did.
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n"


def resolve_string_prompts(tokenizer: PreTrainedTokenizerBase, string_prompts: StringPrompts) -> Rendering:
    """How prompts that are plain strings are put to a model.

    ``auto`` is a user's turn where the tokenizer has a chat template, and raw where it has none; ``raw`` and ``user_turn`` are
    themselves.
    """
    if string_prompts != "auto":
        return string_prompts
    return "user_turn" if tokenizer.chat_template else "raw"


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """A prompt as chat messages; a plain string is a user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def is_half_written(messages: Sequence[Message]) -> bool:
    """Whether a conversation ends with an assistant's turn that an answer goes on with."""
    return bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


def _with_written_arguments(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with the arguments of their calls as text in JSON; None where no call has others."""
    found, changed = [], False
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict | list):
                written = json.dumps(function["arguments"], ensure_ascii=False)
                call, changed = {**call, "function": {**function, "arguments": written}}, True
            calls.append(call)
        found.append({**message, "tool_calls": calls} if calls else message)
    return found if changed else None


def answered(messages: Sequence[Message], text: str) -> list[Message]:
    """A conversation with an answer, which goes on with a half-written turn at its end.

    >>> answered([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is"}], " 4.")[-1]
    {'role': 'assistant', 'content': 'It is 4.'}
    """
    if is_half_written(messages):
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}]

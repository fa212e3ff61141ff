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
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

from transformers import PreTrainedTokenizerBase

from ncalign.core.deadline import within
from ncalign.core.progress import say
from ncalign.data.formats.group import Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering
from ncalign.model.config import StringPrompts

RENDER_SECONDS = 10.0
"""For one conversation; templates take milliseconds."""
_MOST_CHARACTERS = 50_000_000
_PROBE = "ncalign"
_CLOCK = "strftime_now"
_PARTS = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
"""What strftime can be asked for, after a per cent sign."""
_EXAMPLE: tuple[Message, ...] = ({"role": "user", "content": "a"},)


class RefusedError(ValueError):
    """A conversation that the chat template does not take; the message says why, and names no group."""


class EndlessTemplateError(ValueError):
    """A chat template that does not end, or writes without end: no row's fault, so no row is left out for it."""


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Tools,
    opened: bool,
    template: str,
) -> str:
    """What a chat template writes, within bounds of time and size: templates are programs, and come with models."""

    def render() -> object:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=opened, chat_template=template
        )

    remedy = f"put one that does into {tokenizer.name_or_path!r}, as chat_template.jinja"
    try:
        text = within(RENDER_SECONDS, render)
    except (TimeoutError, MemoryError) as error:
        why = "takes more memory than there is" if isinstance(error, MemoryError) else f"takes more than {RENDER_SECONDS:g} s"
        raise EndlessTemplateError(f"the chat template {why} for one conversation: it may never end; {remedy}") from error
    assert isinstance(text, str)
    if len(text) > _MOST_CHARACTERS:
        raise EndlessTemplateError(f"the chat template writes {len(text):,} characters for one conversation; {remedy}")
    return text


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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date | None = None) -> None:
        self.tokenizer = tokenizer
        self.today = date.today() if today is None else today
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self._ends = sorted(token for token in {*tokenizer.all_special_tokens, *added} if token.strip())

    def render(
        self, messages: Sequence[Message], *, tools: Tools = None, opened: bool = False, what: str = "the prompt"
    ) -> str:
        """A conversation as text.

        Args:
            messages: its turns.
            tools: what the model may call.
            opened: whether a generation prompt follows.
            what: names the conversation in messages.

        Raises:
            RefusedError: the tokenizer has no chat template, or the template refuses the messages.
            EndlessTemplateError: the template does not end, or writes without end.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise RefusedError(
                f"the prompt is a conversation and the tokenizer of {tokenizer.name_or_path!r} has no chat template: put a "
                "chat_template.jinja into the model folder, or give prompts and completions as plain strings"
            )
        try:
            template = str(tokenizer.get_chat_template())
            dated = _clock(self.today) + template if _CLOCK in template else template
            text = _rendered(tokenizer, messages, tools=tools, opened=opened, template=dated)
        except EndlessTemplateError:
            raise
        except Exception as error:  # jinja2 raises its own classes, and templates raise what they like
            reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0][:200]
            raise RefusedError(f"the chat template refuses {what}: {reason}") from error
        return text

    def turn(self, messages: Sequence[Message], *, tools: Tools = None) -> Turn:
        """Where an answer to a conversation stands in its rendering.

        Raises:
            RefusedError: the template refuses the conversation, an answer to it, or does not write the answer as it is.
        """
        half_written = is_half_written(messages)
        prompt = "" if half_written else self.render(messages, tools=tools, opened=True)
        whole = self.render(answered(messages, _PROBE), tools=tools, what="the prompt with its completion")
        before, probe, after = whole.rpartition(_PROBE)
        if not probe:
            raise RefusedError("the chat template does not render an assistant's turn as it is: fix the template")
        header = ""
        if half_written:
            prompt = before
        elif before.startswith(prompt):
            header = before[len(prompt) :]
            if header.strip(" ") and self.render(messages, tools=tools) == prompt:
                # No generation prompt. Tokenizers join a space with the word after it, so it goes with the answer.
                prompt = before.rstrip(" ")
                header = before[len(prompt) :]
        present = [(after.index(token), -len(token), token) for token in self._ends if token in after]
        position, _, end = min(present, default=(0, 0, None))
        return Turn(prompt, header, after[:position], end, after)

    def prompt(self, messages: Sequence[Message], *, tools: Tools = None) -> str:
        """What a model that may call these tools is fed before it answers.

        Raises:
            RefusedError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        if is_half_written(messages):
            return self.turn(messages, tools=tools).prompt
        opened = self.render(messages, tools=tools, opened=True)
        # A conversation that the template lets no answer follow can still be answered.
        with contextlib.suppress(RefusedError):
            return self.turn(messages, tools=tools).prompt
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


def answered(messages: Sequence[Message], text: str) -> list[Message]:
    """A conversation with an answer, which goes on with a half-written turn at its end.

    >>> answered([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is"}], " 4.")[-1]
    {'role': 'assistant', 'content': 'It is 4.'}
    """
    if is_half_written(messages):
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}]

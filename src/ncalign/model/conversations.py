"""Completions of several turns, with calls and thoughts: where in a rendered conversation an assistant's turns stand.

A chat template may write a turn otherwise than it was given (trimmed, escaped, its thought removed), and an earlier one
otherwise once others follow. So nothing is looked for by its text. The conversation is rendered a second time with a mark
inside each message, a character that no text holds: without the marks the two are the same, and the marks say where each
message stands. A turn begins where the generation prompt ends, which follows the message before, and ends with the first end
token after the turn's last mark. Where the template itself says what an assistant writes (``{% generation %}``), that is taken
as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from ncalign.core.errors import shown
from ncalign.data.formats.group import Message, TemplateKwargs, Tools
from ncalign.model.chat import ChatTemplate, RefusedError, Turn, answered, is_half_written
from ncalign.model.config import ScoredTurns, Thoughts
from ncalign.model.thoughts import KEYS, outside_thoughts, spot_in, spot_in_thought

Spans: TypeAlias = tuple[tuple[int, int], ...]

END_TOKENS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|call|>", "<|eot|>"),
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    *("<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>"),
)
"""What ends turns, as tokenizers call it; templates may end calls, and turns that others follow, with another one."""
_PLANES = (0xF0000, 0x100000)
"""Where Unicode's characters for private use begin."""
_MOST_MARKS = 65_000


@dataclass(frozen=True)
class ConversationRules:
    """What is scored of completions that are conversations, and what their template is given.

    Attributes:
        scored_turns: all turns of the assistant, or the last one alone.
        thoughts: whether thoughts are scored, are read and not scored, or are left out of turns before the last question.
        template_kwargs: further values for the chat template; those of a group take their place.
    """

    scored_turns: ScoredTurns = "assistant"
    thoughts: Thoughts = "scored"
    template_kwargs: TemplateKwargs = field(default_factory=dict)

    def template(self, tokenizer: PreTrainedTokenizerBase, today: date | None) -> ChatTemplate:
        """A tokenizer's chat template under these rules."""
        return ChatTemplate(tokenizer, today, self.template_kwargs, strip_thoughts=self.thoughts == "stripped")


@dataclass(frozen=True)
class Asked:
    """What a completion answers, as its chat template takes it.

    Attributes:
        messages: the prompt's turns.
        tools: what the model may call.
        kwargs: the group's own values for the template.
        turn: where an answer stands.
    """

    messages: list[Message]
    tools: Tools
    kwargs: TemplateKwargs
    turn: Turn


@dataclass(frozen=True)
class Placed:
    """A rendered conversation.

    Attributes:
        text: the prompt with its completion, as the chat template writes them.
        spans: what of it is scored, as beginnings and ends.
        has_end: whether the last scored part has an end token of the template's.
        hides_thoughts: whether the template leaves out thoughts of some turns of the completion.
    """

    text: str
    spans: Spans
    has_end: bool
    hides_thoughts: bool = False


def is_plain(completion: str | Sequence[Message]) -> bool:
    """Whether a completion is one text: a string, or an assistant's turn that holds nothing but its text."""
    if isinstance(completion, str):
        return True
    return len(completion) == 1 and completion[0]["role"] == "assistant" and completion[0].keys() == {"role", "content"}


def end_tokens(template: ChatTemplate, turn: Turn) -> tuple[str, ...]:
    """The tokens that may end a turn: the template's, the tokenizer's EOS, and those of common templates that it has."""
    tokenizer = template.tokenizer
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
    own = (turn.end, tokenizer.eos_token, *(token for token in END_TOKENS if token in known))
    return tuple(dict.fromkeys(str(token) for token in own if token is not None))


def shared_length(*sequences: Sequence[Any]) -> int:
    """How many items sequences have in common at their beginnings.

    >>> shared_length("<think>", "<table>"), shared_length([1, 2], [1, 2, 3], [2])
    (2, 0)
    """
    return next(
        (n for n, items in enumerate(zip(*sequences, strict=False)) if any(item != items[0] for item in items[1:])),
        min(map(len, sequences)),
    )


class _Marks:
    """A character inside each text of messages, by which the places of these texts are found in what a template writes.

    Args:
        messages: the conversation.
        joint: of a message whose text is begun in the prompt, its place and where the prompt's part ends.
    """

    def __init__(self, messages: Sequence[Message], joint: tuple[int, int] | None = None) -> None:
        held = json.dumps(list(messages), ensure_ascii=False)
        free = (plane for plane in _PLANES if not re.search(f"[{chr(plane)}-{chr(plane + 0xFFFD)}]", held))
        self._plane = next(free, None)
        if self._plane is None:
            raise RefusedError("its texts hold private-use characters of both of Unicode's planes: its turns can't be marked")
        self._pattern = re.compile(f"[{chr(self._plane)}-{chr(self._plane + 0xFFFD)}]")
        self._used = 0
        self.of: list[list[str]] = []
        self.contents: list[str | None] = []
        self.calls: list[list[str]] = []
        self.thoughts: list[list[str]] = []
        self.inside: set[str] = set()
        self.messages = [
            self._marked(message, joint[1] if joint and joint[0] == n else None) for n, message in enumerate(messages)
        ]

    def _new(self) -> str:
        if self._used >= _MOST_MARKS:
            raise RefusedError(f"it has more than {_MOST_MARKS} turns and calls")
        assert self._plane is not None
        self._used += 1
        self.of[-1].append(chr(self._plane + self._used))
        return self.of[-1][-1]

    def _marked(self, message: Message, joint: int | None) -> Message:
        self.of.append([])
        self.calls.append([])
        found, text = dict(message), message["content"]
        for key in KEYS:
            if isinstance(thought := found.get(key), str) and (place := spot_in(thought)) is not None:
                found[key] = f"{thought[:place]}{self._new()}{thought[place:]}"
        spot, inside = spot_in(text) if joint is None else joint, spot_in_thought(text) if joint is None else None
        if spot is not None:
            text = f"{text[:spot]}{self._new()}{text[spot:]}"
        self.contents.append(None if spot is None else self.of[-1][-1])
        self.thoughts.append([mark for mark in self.of[-1] if mark != self.contents[-1]])
        if inside is not None and spot is not None and inside < spot:
            text = f"{text[:inside]}{self._new()}{text[inside:]}"
            self.thoughts[-1].append(self.of[-1][-1])
            self.inside.add(self.of[-1][-1])
        found["content"] = text
        if found.get("tool_calls"):
            found["tool_calls"] = [self._marked_call(call) for call in found["tool_calls"]]
        return found

    def _marked_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            return call
        self.calls[-1].append(self._new())
        marked = {**function, "name": f"{name[0]}{self.calls[-1][-1]}{name[1:]}"}
        return marked if function is call else {**call, "function": marked}

    def place(self, mark: str, found: Mapping[str, list[int]]) -> int | None:
        """Where a mark stands; None where it does not, or where a text was written several times.

        The name of a call comes first in the call, and again with its result in some templates.
        """
        places = found.get(mark, [])
        of_a_call = any(mark in calls for calls in self.calls)
        return places[0] if len(places) == 1 or (places and of_a_call) else None

    def read(self, text: str) -> tuple[str, dict[str, list[int]]]:
        """A rendered text without the marks, and where each of them stood."""
        for mark in (mark for marks in self.of for mark in marks if mark not in text):
            text = text.replace(json.dumps(mark)[1:-1], mark)  # templates may write JSON in ASCII
        places: dict[str, list[int]] = {}
        for number, found in enumerate(self._pattern.finditer(text)):
            places.setdefault(found[0], []).append(found.start() - number)
        return self._pattern.sub("", text), places


def placed(
    template: ChatTemplate, asked: Asked, completion: Sequence[Message], rules: ConversationRules, *, finished: bool
) -> Placed:
    """Render a prompt with a completion of turns, and find what of it is scored.

    Args:
        template: the model's.
        asked: the prompt.
        completion: the turns that follow it.
        rules: what is scored.
        finished: whether the model ended the last turn; else no end token of it is scored.

    Raises:
        RefusedError: the template refuses it, leaves out what is scored or what it answers, or writes turns that can't be told
            apart; or it has no assistant's turn at its end.
    """
    messages, joint = joined(asked.messages, completion)
    first = joint[0] if joint is not None else len(asked.messages)
    if messages[-1]["role"] != "assistant":
        raise RefusedError(
            f"a completion ends with a turn of {shown(messages[-1]['role'])}: the assistant's must come last; leave out what "
            "follows it"
        )
    return _Places(template, asked, messages, joint).placed(first, rules, finished=finished)


def joined(prompt: list[Message], completion: Sequence[Message]) -> tuple[list[Message], tuple[int, int] | None]:
    """The prompt's turns and the completion's, and of a half-written turn its place and where the prompt's part ends.

    Raises:
        RefusedError: the prompt ends with a half-written turn, and the completion does not go on in it.
    """
    if not is_half_written(prompt):
        return [*prompt, *completion], None
    if completion[0]["role"] != "assistant":
        raise RefusedError("the prompt ends with a half-written turn, and the completion does not begin with the assistant's")
    *before, last = answered(prompt, completion[0]["content"])
    more = {key: value for key, value in completion[0].items() if key not in last}
    return [*before, {**last, **more}, *completion[1:]], (len(prompt) - 1, len(prompt[-1]["content"]))


class _Places:
    """Where the turns of one conversation stand in its rendering."""

    def __init__(self, template: ChatTemplate, asked: Asked, messages: list[Message], joint: tuple[int, int] | None) -> None:
        self._template, self._asked, self._messages, self._joint = template, asked, messages, joint
        what = "the prompt with its completion"
        self._text = template.render(messages, tools=asked.tools, kwargs=asked.kwargs, what=what)
        self._marks = _Marks(messages, joint)
        marked = template.render(self._marks.messages, tools=asked.tools, kwargs=asked.kwargs, what=what)
        clean, self._found = self._marks.read(marked)
        if clean != self._text:
            raise RefusedError("the chat template writes turns by single letters of them: where they stand is not known")
        self._ends = end_tokens(template, asked.turn)

    def placed(self, first: int, rules: ConversationRules, *, finished: bool) -> Placed:
        """What is scored of the turns from the first one on."""
        last = len(self._messages) - 1
        answers = [n for n in range(first, last + 1) if self._messages[n]["role"] == "assistant"]
        scored = answers if rules.scored_turns == "assistant" else [last]
        for n in range(first, last + 1):
            self._check_shown(n, scored=n in scored)
        spans = self._generated(scored) or [(self._start(n), self._end(n)[1]) for n in scored]
        at, _ = self._end(last)
        if not finished and at is not None:
            spans = [(start, min(end, at)) for start, end in spans if start < at]
        if rules.thoughts == "masked":
            spans = outside_thoughts(self._text, spans)
            self._check_masked(scored, spans)
        return Placed(self._text, tuple(spans), at is not None, self._hides_thoughts(answers))

    def _hides_thoughts(self, answers: Sequence[int]) -> bool:
        """Whether the template leaves out thoughts of some turns: those in texts, or a part of those beside texts."""
        thoughts = [mark for n in answers for mark in self._marks.thoughts[n]]
        hidden = {mark for mark in thoughts if mark not in self._found}
        beside = {*thoughts} - self._marks.inside
        return bool(hidden & self._marks.inside) or bool(hidden & beside and beside - hidden)

    def _check_masked(self, scored: Sequence[int], spans: Sequence[tuple[int, int]]) -> None:
        """Raise where a thought is scored all the same: the template writes it between marks that are not known."""
        for n in scored:
            places = (place for mark in self._marks.thoughts[n] for place in self._found.get(mark, ()))
            if any(start <= place < end for place in places for start, end in spans):
                raise RefusedError(
                    f"where the thought of turn {n + 1} begins and ends in this chat template is not known: it can't be masked"
                )

    def _known(self, n: int) -> list[tuple[int, str]]:
        """Where a message's marks stand, in order, as :meth:`_Marks.place` has them."""
        places = ((self._marks.place(mark, self._found), mark) for mark in self._marks.of[n])
        return sorted((place, mark) for place, mark in places if place is not None)

    def _check_shown(self, n: int, *, scored: bool) -> None:
        """Raise where the template leaves out a turn that is scored, or that a scored one may answer."""
        message, where = self._messages[n], f"turn {n + 1}, which is the {self._messages[n]['role']}'s"
        if scored and not (message.get("tool_calls") or message["content"].strip()):
            raise RefusedError(f"{where}, is empty: there is nothing to score")
        if any(mark not in self._found for mark in self._marks.calls[n]):
            raise RefusedError(f"the chat template leaves out `tool_calls` of {where}: use a template that writes them")
        content = self._marks.contents[n]
        if content is not None and content not in self._found:
            raise RefusedError(f"the chat template leaves out the text of {where}: use a template that writes it")
        if scored and not self._known(n):
            raise RefusedError(f"the chat template writes {where}, more than once: which one is the answer is not known")

    def _generated(self, scored: Sequence[int]) -> list[tuple[int, int]]:
        """What the template marks as an assistant's, of the turns that are scored; nothing where it marks none."""
        found = self._template.with_marks(self._messages, tools=self._asked.tools, kwargs=self._asked.kwargs)
        if found is None or not found.generated:
            return []
        if self._joint is not None and self._joint[0] == scored[0]:
            begin = self._joint_place()
            spans = [(max(start, begin), end) for start, end in found.generated if end > begin]
        else:
            before = (known[-1][0] for n in range(scored[0] - 1, -1, -1) if (known := self._known(n)))
            begin = next(before, 0)
            spans = [(start, end) for start, end in found.generated if start >= begin and end > start]
        for n in scored:
            place, _ = self._known(n)[-1]
            if not any(start <= place < end for start, end in spans):
                raise RefusedError(
                    f"the chat template does not mark turn {n + 1} as what an assistant writes: mend its {{% generation %}}"
                )
        return spans

    def _joint_place(self) -> int:
        """Where the prompt's part of a half-written turn ends."""
        assert self._joint is not None
        mark = self._marks.contents[self._joint[0]]
        places = self._found.get(mark or "", [])
        if len(places) != 1:
            raise RefusedError("the chat template rewrites the half-written turn: where the answer goes on is not known")
        return places[0]

    def _start(self, n: int) -> int:
        """Where a turn begins: after what a model is fed, which follows a known place in the message before."""
        if self._joint is not None and self._joint[0] == n:
            return self._joint_place()
        anchor = next((m for m in range(n - 1, -1, -1) if self._known(m)), None)
        opened, plain = (self._tail(n, anchor, opened=opened) for opened in (True, False))
        place = 0 if anchor is None else self._known(anchor)[-1][0]
        following = self._text[place:]
        if opened != plain and following.startswith(opened):
            return place + len(opened)
        if not (following.startswith(plain) and opened.startswith(plain)):
            raise RefusedError(
                f"the chat template writes what stands before turn {n + 1} otherwise once it is answered: where the turn "
                "begins is not known"
            )
        start = place + len(plain)
        opener = self._past_opener()
        if opened == plain:
            # No generation prompt. Tokenizers join a space with the word after it, so it goes with the answer.
            opener = opener.rstrip(" ")
            return start + (len(opener) if following.startswith(opener, len(plain)) else 0)
        # The generation prompt may open a thought, which past turns don't have.
        return start + shared_length(opened[len(plain) :], following[len(plain) :], opener)

    def _tail(self, n: int, anchor: int | None, *, opened: bool) -> str:
        """What stands after the anchor's last known place in a conversation that ends before turn n."""
        marked = self._template.render(
            self._marks.messages[:n], tools=self._asked.tools, kwargs=self._asked.kwargs, opened=opened
        )
        text, found = self._marks.read(marked)
        if anchor is None:
            return text
        place = self._marks.place(self._known(anchor)[-1][1], found)
        return text if place is None else text[place:]

    def _past_opener(self) -> str:
        """What the template writes between a question and an answer to it that others follow."""
        probe, question = "ncalign", {"role": "user", "content": "a"}
        try:
            before = self._template.render([question])
            whole = self._template.render([question, {"role": "assistant", "content": probe}, question])
        except RefusedError:
            return ""
        at = whole.find(probe)
        return whole[len(before) : at] if whole.startswith(before) and at >= 0 else ""

    def _end(self, n: int) -> tuple[int | None, int]:
        """Where a turn's end token begins, None where it has none, and where the turn ends."""
        place, _ = self._known(n)[-1]
        later = (known[0][0] for m in range(n + 1, len(self._messages)) if (known := self._known(m)))
        limit = next(later, len(self._text))
        found = [(at, -len(token)) for token in self._ends if (at := self._text.find(token, place, limit)) >= 0]
        if found:
            at, length = min(found)
            return at, at - length
        following = self._tail(n + 1, n, opened=False).rstrip()
        if not self._text.startswith(following, place):
            raise RefusedError(f"the chat template writes turn {n + 1} otherwise where others follow: its end is not known")
        return None, place + len(following)

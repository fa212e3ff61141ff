"""Thoughts in a model's turns: where they begin and end, and turns without them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ncalign.data.formats.group import Message

KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of messages that hold thoughts beside the text."""
_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""What models open and close thoughts with: most; Mistral; Gemma 4; gpt-oss; Cohere."""
_THOUGHT = re.compile("|".join(f"{re.escape(begin)}.*?(?:{re.escape(end)}|\\Z)" for begin, end in _TAGS), re.DOTALL)
_CLOSED = re.compile("|".join(f"{re.escape(begin)}.*?{re.escape(end)}\\s*" for begin, end in _TAGS), re.DOTALL)
_ENDS = re.compile("|".join(re.escape(end) for _, end in _TAGS))
_LETTER = re.compile(r"<[^<>]{1,60}>|\[[^\[\]\s]{1,60}\]|(\w)")


def spot_in(text: str) -> int | None:
    r"""A place inside a text at which one more character changes nothing that templates look at; None in white space.

    It lies after the first letter or digit that follows the thoughts and is in no tag.

    >>> spot_in("<think>\nSo</think> <b>4"), spot_in(" ")
    (23, None)
    """
    after = max((found.end() for found in _ENDS.finditer(text)), default=0)
    for start in dict.fromkeys((after, 0)):
        letters = (found for found in _LETTER.finditer(text, start) if found[1] is not None)
        if (found := next(letters, None)) is not None:
            return found.end()
    other = re.search(r"\S", text)
    return None if other is None else other.end()


def spot_in_thought(text: str) -> int | None:
    """Such a place inside the first thought that a text holds; None without one.

    >>> spot_in_thought("<think>So</think>4"), spot_in_thought("4")
    (8, None)
    """
    thought = _THOUGHT.search(text)
    if thought is None:
        return None
    letters = (found.end() for found in _LETTER.finditer(text, thought.start(), thought.end()) if found[1] is not None)
    return next(letters, None)


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    r"""A conversation without the thoughts of the turns before its last question, as reasoning models are given it.

    >>> turns = [{"role": "assistant", "content": "<think>Hm</think>\n\n4"}, {"role": "user", "content": "Sure?"}]
    >>> without_thoughts(turns)[0]
    {'role': 'assistant', 'content': '4'}
    """
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
    return [
        _stripped(message) if n < last and message["role"] == "assistant" else message for n, message in enumerate(messages)
    ]


def _stripped(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key not in KEYS}
    return {**kept, "content": _CLOSED.sub("", message["content"])}


def outside_thoughts(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Parts of a text less the thoughts in them.

    A part that begins where a thought was opened, as the generation prompt of some templates does, begins inside it.

    Args:
        text: a rendered conversation.
        spans: parts of it, as beginnings and ends.

    >>> outside_thoughts("a <think>b</think> c", [(0, 20)])
    [(0, 2), (18, 20)]
    """
    found: list[tuple[int, int]] = []
    for start, end in spans:
        at = start
        for begin, close in _TAGS:
            if text[:start].rstrip().endswith(begin.rstrip()):
                closed = text.find(close, start, end)
                at = end if closed < 0 else closed + len(close)
        for thought in _THOUGHT.finditer(text, at, end):
            if thought.start() > at:
                found.append((at, thought.start()))
            at = thought.end()
        if at < end:
            found.append((at, end))
    return found

"""What messages and groups hold for a chat template, and the template leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ncalign.data.formats.group import MORE_KEYS, TOOLS, Text, Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering
from ncalign.model.chat import ChatTemplate, RefusedError, as_messages


def left_out(template: ChatTemplate, prompt: Text, tools: Tools, string_prompts: Rendering) -> list[str]:
    """What a prompt holds beside roles and texts that its rendering does not show: tools, tool calls, thoughts, names.

    What only joins an answer to its call, the call's id and the tool's name, is not looked for.

    Args:
        template: the model's.
        prompt: text or turns.
        tools: what the model may call.
        string_prompts: how a prompt that is text is put to the model.
    """
    if isinstance(prompt, str) and string_prompts == "raw":
        return [f"{TOOLS} of plain text"] if tools else []
    messages = as_messages(prompt)
    if not tools and not any(turn.keys() & {*MORE_KEYS} for turn in messages):
        return []
    try:
        whole = template.render(messages, tools=tools)
    except RefusedError:  # a template that takes no conversation without its answer
        return []
    found = [TOOLS] if tools and _same(template, messages, None, whole) else []
    for key in MORE_KEYS:
        without = [{name: value for name, value in turn.items() if name != key or _joins(turn, key)} for turn in messages]
        if without != messages and _same(template, without, tools, whole):
            found.append(key)
    return found


def answers_keys(completions: Sequence[Any]) -> Iterator[str]:
    """What answers hold beside their text, which alone is scored."""
    turns = [turn for completion in completions if isinstance(completion, list) for turn in completion]
    return (f"{key} of answers" for key in MORE_KEYS if any(key in turn for turn in turns))


def untold_notices(counts: Mapping[str, int]) -> list[str]:
    """What a user should know where a chat template leaves something out, from the number of groups by what it is."""
    listed = ", ".join(f"`{name}` ({number} groups)" for name, number in counts.items())
    if not listed:
        return []
    return [f"the chat template leaves out {listed}: the model does not see it; use a template that writes it"]


def _joins(turn: Message, key: str) -> bool:
    return key == "tool_call_id" or (key == "name" and turn["role"] == "tool")


def _same(template: ChatTemplate, messages: list[Message], tools: Tools, whole: str) -> bool:
    try:
        return template.render(messages, tools=tools) == whole
    except RefusedError:  # a template that needs it writes it
        return False

"""What messages and groups hold for a chat template, and the template leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from ncalign.data.formats.group import MORE_KEYS, TOOLS
from ncalign.data.groups import Group, Message
from ncalign.data.rendering import Rendering

Render: TypeAlias = Callable[[list[Message], "list[Any] | None"], str]
"""A conversation and its tools as a template writes them."""


def left_out(tokenizer: PreTrainedTokenizerBase, group: Group, string_prompts: Rendering) -> list[str]:
    """What a group holds beside roles and texts that its rendering does not show."""

    def render(messages: list[Message], tools: list[Any] | None) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except Exception as error:  # jinja2 raises its own classes, and templates raise what they like
            raise ValueError(str(error)) from error

    found = list(answers_keys([candidate.completion for candidate in group.candidates]))
    tools = group.metadata.get(TOOLS)
    if isinstance(group.prompt, str):
        messages: list[Message] = [{"role": "user", "content": group.prompt}]
        if tools and string_prompts == "raw":
            return [*found, f"{TOOLS} of plain text"]
    else:
        messages = group.prompt
    if tools or any(turn.keys() & {*MORE_KEYS} for turn in messages):
        found += untold(render, messages, tools)
    return found


def untold(render: Render, messages: Sequence[Message], tools: list[Any] | None = None) -> list[str]:
    """The names of what a template writes the same text without: tools, tool calls, thoughts, names.

    What only joins an answer to its call, the call's id and the tool's name, is not looked for.

    Args:
        render: raises a ValueError where the template refuses the conversation.
        messages: the conversation.
        tools: what the model may call.
    """
    try:
        whole = render(list(messages), tools)
    except ValueError:  # a template that takes no conversation without its answer
        return []
    found = ["tools"] if tools and _same(render, list(messages), None, whole) else []
    for key in MORE_KEYS:
        without = [{name: value for name, value in turn.items() if name != key or _joins(turn, key)} for turn in messages]
        if without != list(messages) and _same(render, without, tools, whole):
            found.append(key)
    return found


def answers_keys(completions: Sequence[Any]) -> Iterator[str]:
    """What answers hold beside their text, which alone is scored."""
    turns = [turn for completion in completions if isinstance(completion, list) for turn in completion]
    return (f"{key} of answers" for key in MORE_KEYS if any(key in turn for turn in turns))


def _joins(turn: Message, key: str) -> bool:
    return key == "tool_call_id" or (key == "name" and turn["role"] == "tool")


def _same(render: Render, messages: list[Message], tools: list[Any] | None, whole: str) -> bool:
    try:
        return render(messages, tools) == whole
    except ValueError:  # a template that needs it writes it
        return False

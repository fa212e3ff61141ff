"""What messages and groups hold for a chat template, and the template leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ncalign.data.formats.group import MESSAGE_KEYS, MORE_KEYS, TEMPLATE_KWARGS, TOOLS, TemplateKwargs, Text, Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering
from ncalign.model.chat import ChatTemplate, RefusedError, as_messages

_NOTHING: TemplateKwargs = {}


def left_out(
    template: ChatTemplate, prompt: Text, string_prompts: Rendering, *, tools: Tools, kwargs: TemplateKwargs = _NOTHING
) -> list[str]:
    """What a prompt holds beside roles and texts that its rendering does not show: tools, tool calls, thoughts, names.

    What only joins an answer to its call, the call's id and the tool's name, is not looked for.

    Args:
        template: the model's.
        prompt: text or turns.
        string_prompts: how a prompt that is text is put to the model.
        tools: what the model may call.
        kwargs: further values for the template.
    """
    if isinstance(prompt, str) and string_prompts == "raw":
        return [f"{name} of plain text" for name, given in ((TOOLS, tools), (TEMPLATE_KWARGS, kwargs)) if given]
    messages = as_messages(prompt)
    if not tools and not _more_keys(messages) and all(turn["role"] in ("user", "assistant") for turn in messages):
        return []
    try:
        whole = template.render(messages, tools=tools, kwargs=kwargs)
    except RefusedError:  # a template that takes no conversation without its answer
        return []
    unshown = [TOOLS] if tools and _same(template, messages, None, kwargs, whole) else []
    turns = dict.fromkeys(_unshown_turns(template, messages, tools, kwargs, whole))
    return [*unshown, *turns, *_unshown(template, [], messages, tools, kwargs, whole)]


def left_out_of_answers(
    template: ChatTemplate, prompt: list[Message], completion: list[Message], *, tools: Tools, kwargs: TemplateKwargs = _NOTHING
) -> list[str]:
    """What a completion of turns holds beside roles and texts that its rendering does not show, as :func:`left_out`."""
    if not _more_keys(completion):
        return []
    try:
        whole = template.render([*prompt, *completion], tools=tools, kwargs=kwargs)
    except RefusedError:  # encoding says so
        return []
    return [f"{key} of answers" for key in _unshown(template, prompt, completion, tools, kwargs, whole)]


def _more_keys(messages: Sequence[Message]) -> list[str]:
    """What messages hold beside roles and texts: keys that many have first."""
    found = dict.fromkeys(key for turn in messages for key in turn if key not in MESSAGE_KEYS)
    return [*(key for key in MORE_KEYS if key in found), *(key for key in found if key not in MORE_KEYS)]


def _unshown_turns(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools, kwargs: TemplateKwargs, whole: str
) -> Iterator[str]:
    """The roles of turns whose texts a rendering does not show: some templates pass over those of tools, or the system's."""
    for place, turn in enumerate(messages):
        if turn["content"].strip() in whole or turn["role"] in ("user", "assistant"):
            continue
        other = [*messages[:place], {**turn, "content": f"{turn['content']} ncalign"}, *messages[place + 1 :]]
        if _same(template, other, tools, kwargs, whole):
            yield f"{turn['role']} turns"


def _unshown(
    template: ChatTemplate,
    before: Sequence[Message],
    messages: Sequence[Message],
    tools: Tools,
    kwargs: TemplateKwargs,
    whole: str,
) -> list[str]:
    found = []
    for key in _more_keys(messages):
        without = [{name: value for name, value in turn.items() if name != key or _joins(turn, key)} for turn in messages]
        if without != [*messages] and _same(template, [*before, *without], tools, kwargs, whole):
            found.append(key)
    return found


def untold_notices(counts: Mapping[str, int]) -> list[str]:
    """What a user should know where a chat template leaves something out, from the number of groups by what it is."""
    listed = ", ".join(f"`{name}` ({number} groups)" for name, number in counts.items())
    if not listed:
        return []
    return [f"the chat template leaves out {listed}: the model does not see it; use a template that writes it"]


def _joins(turn: Message, key: str) -> bool:
    return key == "tool_call_id" or (key == "name" and turn["role"] == "tool")


def _same(template: ChatTemplate, messages: list[Message], tools: Tools, kwargs: TemplateKwargs, whole: str) -> bool:
    try:
        return template.render(messages, tools=tools, kwargs=kwargs) == whole
    except RefusedError:  # a template that needs it writes it
        return False

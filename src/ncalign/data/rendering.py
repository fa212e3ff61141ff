"""How prompts that are plain strings were put to the model; and conversations as plain text, for readers that are no model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from ncalign.data.formats.group import JSON, STRING_PROMPTS, Candidate, Group, Message, Text

Rendering: TypeAlias = Literal["raw", "user_turn"]
"""A plain string as text that the model continues, or as a user's turn of the chat template."""

_MEANING: Mapping[Rendering, str] = {"raw": "text that the model continues", "user_turn": "a user's turn of the chat template"}


def record_rendering(prompt: Text, metadata: Mapping[str, JSON], rendering: Rendering) -> dict[str, JSON]:
    """The metadata of a group whose candidates are sampled now; a conversation has nothing to record.

    >>> record_rendering("2 + 2 = ", {"task": "sums"}, "raw")
    {'task': 'sums', 'string_prompts': 'raw'}
    """
    kept = {name: value for name, value in metadata.items() if name != STRING_PROMPTS}
    return {**kept, STRING_PROMPTS: rendering} if isinstance(prompt, str) else kept


def recorded_renderings(prompt: Text, metadata: Mapping[str, JSON]) -> set[Rendering]:
    """How a group's candidates were made: nothing where that is not recorded, both where rows that differ were joined.

    >>> recorded_renderings("2 + 2 = ", {"string_prompts": "raw"})
    {'raw'}
    """
    if not isinstance(prompt, str):
        return set()
    found = metadata.get(STRING_PROMPTS)
    values = found if isinstance(found, list) else [found]
    return {rendering for rendering in _MEANING if rendering in values}


def count_renderings(groups: Iterable[Group]) -> Counter[Rendering]:
    """Groups with candidates, by how these were made, where that is recorded."""
    made: Counter[Rendering] = Counter()
    for group in groups:
        if group.candidates:
            made.update(recorded_renderings(group.prompt, group.metadata))
    return made


def rendering_warning(
    made: Counter[Rendering], used: Rendering, *, what: str, does: str, unit: str = "groups", remedy: str | None = None
) -> str | None:
    """A line that says how many groups were made in another way than the run treats them; None where there are none.

    Args:
        made: groups by how their candidates were made.
        used: how this run puts string prompts to its model.
        what: names the groups, such as their file.
        does: the run's verb, such as "training encodes them".
        unit: what is counted.
        remedy: what makes them agree; None for the run's own flag.
    """
    other: Rendering = "user_turn" if used == "raw" else "raw"
    if not made[other]:
        return None
    if remedy is None:
        remedy = f"--string_prompts {other} makes them agree"
    if made[used]:
        remedy = f"{made[used]} others were made as {used}, so no value suits all: sample these again, or use the two apart"
    return (
        f"warning: {what}: {made[other]} {unit} were made with string_prompts {other} ({_MEANING[other]}), and {does} with "
        f"string_prompts {used} ({_MEANING[used]}); {remedy}"
    )


def message_text(message: Message) -> str:
    r"""What a message says, as plain text: its content, and a line for each call; thoughts beside the content are left out.

    >>> call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    >>> message_text({"role": "assistant", "content": "I look.", "tool_calls": [call]})
    'I look.\n[call weather {"city": "Oslo"}]'
    """
    lines = [str(message["content"])] if message["content"] or not message.get("tool_calls") else []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        written = function.get("arguments", {})
        arguments = written if isinstance(written, str) else json.dumps(written, ensure_ascii=False)
        lines.append(f"[call {function.get('name')} {arguments}]")
    return "\n".join(lines)


def transcript(messages: Sequence[Message]) -> str:
    r"""A conversation as plain text, each turn after who said it.

    >>> transcript([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'User: Hi\n\nAssistant: Hello'
    """
    return "\n\n".join(f"{message['role'].capitalize()}: {message_text(message)}" for message in messages)


def completion_text(completion: Text) -> str:
    """A completion as plain text: what one turn says, or the transcript of several.

    >>> completion_text([{"role": "assistant", "content": "Four."}])
    'Four.'
    """
    if isinstance(completion, str):
        return completion
    return message_text(completion[0]) if len(completion) == 1 else transcript(completion)


def last_answer(candidate: Candidate) -> str:
    """The text of a completion's last turn, which is the answer where there are several.

    >>> turns = [{"role": "assistant", "content": "How many?"}, {"role": "user", "content": "2"}]
    >>> last_answer(Candidate([*turns, {"role": "assistant", "content": "Two, then."}]))
    'Two, then.'
    """
    completion = candidate.completion
    return completion if isinstance(completion, str) else str(completion[-1]["content"])

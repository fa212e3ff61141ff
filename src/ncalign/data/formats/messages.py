"""Messages in all their spellings: what other tools write becomes ``{role, content}`` and what else templates read."""

from __future__ import annotations

import json
import re
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import MORE_KEYS, Message

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response"), "tool"),
}
"""Roles by the names that files give them; chat templates know those on the right."""
_CALLS = frozenset({"function_call", "tool_call"})
"""Roles of assistant's turns whose text is a call, as JSON."""
DESCRIPTIONS = ("tools", "functions")
"""Columns that describe what a model may call."""
_OF_THE_CALL = frozenset(
    "add_generation_prompt chat_template continue_final_message conversation documents max_length messages padding "
    "return_assistant_tokens_mask return_dict return_tensors sanitize_control_tokens tokenize tokenizer_kwargs tools "
    "truncation".split()
)
"""What transformers' ``apply_chat_template`` takes for itself: no values for the template."""
_LISTS = ("candidates", "completions", "answers", "output", "messages", "conversations", "conversation")
"""Columns that hold a list of objects in the schemas that have them."""
_CONTENTS = ("content", "value")
_NOTHING: tuple[Any, ...] = (None, [], {}, "")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*"(role|content|from|value)"\s*:""")


def spelled(value: Any, where: str) -> Any:
    """A column's value with the messages in it as ours, whatever their spelling; everything else stays as it is.

    One message becomes a list of one; an object of lists, as `datasets` stores a list of objects, becomes that list; a text
    that is a list of messages in JSON becomes the list.

    >>> spelled({"from": "human", "value": "Hi"}, "chosen")
    [{'role': 'user', 'content': 'Hi'}]

    Raises:
        ValueError: a message can't be told to a model in words, such as one with an image.
    """
    if isinstance(value, str):
        return _written(value, where)
    if isinstance(value, dict):
        if _is_message(value):
            return _conversation([value], where)
        objects = objects_of(value)
        if any(_is_message(one) for one in objects or []):
            return _conversation(objects or [], where)
        return {key: one if key in DESCRIPTIONS else spelled(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list):
        if any(isinstance(one, dict) and _is_message(one) for one in value):
            return _conversation(value, where)
        return [spelled(one, f"{where}[{index}]") for index, one in enumerate(value)]
    return value


def objects_of(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The objects of an object of lists of one length, which is how `datasets` stores a list of objects; None for others.

    >>> objects_of({"rank": [1, 2], "model": ["a", "b"]})
    [{'rank': 1, 'model': 'a'}, {'rank': 2, 'model': 'b'}]
    """
    columns = list(value.values())
    if not columns or not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
        return None
    return [dict(zip(value, entry, strict=True)) for entry in zip(*columns, strict=True)]


def with_lists(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose lists of objects are lists, where they are stored as objects of lists.

    >>> with_lists({"answers": {"answer": ["a", "b"], "rank": [1, 2]}})
    {'answers': [{'answer': 'a', 'rank': 1}, {'answer': 'b', 'rank': 2}]}
    """
    found = {name: objects_of(row[name]) for name in _LISTS if isinstance(row.get(name), dict)}
    return {**row, **{name: value for name, value in found.items() if value is not None}} if found else row


def without_nulls(value: Any) -> Any:
    """A value without its null entries: Parquet gives every object the keys of all.

    >>> without_nulls({"city": "Oslo", "unit": None, "more": [{"a": None}]})
    {'city': 'Oslo', 'more': [{}]}
    """
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def read_json(value: Any) -> Any:
    """What a text writes down in JSON; the value itself if it is no text, or no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _written(text: str, where: str) -> Any:
    if not _WRITTEN.match(text):
        return text
    found = read_json(text)
    messages = isinstance(found, list) and all(isinstance(one, dict) and _is_message(one) for one in found)
    return _conversation(found, where) if messages else text


def _is_message(value: dict[str, Any]) -> bool:
    return isinstance(value.get("role"), str) or {"from", "value"} <= value.keys()


def _conversation(values: list[Any], where: str) -> list[Any]:
    if values:
        _check_weight(values[-1], f"{where}[{len(values) - 1}]")
    return [_message(value, f"{where}[{index}]") if isinstance(value, dict) else value for index, value in enumerate(values)]


def _message(value: dict[str, Any], where: str) -> Message:
    """A message of ours; keys that nothing knows stay, for the chat template."""
    plain = value.keys() == {"role", "content"} and all(type(held) is str for held in value.values())
    if plain and _ROLES.get(value["role"]) == value["role"]:
        return value
    role_key = "role" if value.get("role") is not None or "from" not in value else "from"
    if role_key not in value:
        return value
    content_key = next((key for key in _CONTENTS if value.get(key) is not None), None)
    read = (role_key, *_CONTENTS, "weight", "function_call", "tool_calls")
    more = {key: without_nulls(held) for key, held in value.items() if key not in read and held not in _NOTHING}
    calls = _tool_calls(value, f"{where}.tool_calls")
    content = None if content_key is None else _text(value[content_key], f"{where}.{content_key}")
    if str(value[role_key]).lower() in _CALLS and content and not calls:
        # Some write the call as the model does, with marks around it; such a text stays text.
        found = read_json(content)
        calls = _called(found, f"{where}.{content_key}") if isinstance(found, dict | list) else []
        content = "" if calls else content
    if calls:
        more["tool_calls"] = calls
    if content is None and more.keys() & {*MORE_KEYS}:
        content = ""
    if content is None and (nulls := [key for key in _CONTENTS if key in value]):
        raise DataError(f"{where}.{nulls[0]} is null: a text is needed", reason="wrong type")
    role = _role(value[role_key], role_key, where)
    return {"role": role, **({} if content is None else {"content": content}), **more}


def _role(role: Any, key: str, where: str) -> Any:
    """The role that templates know; names of our own are left to the template, except in `from`, which none reads."""
    known = _ROLES.get(str(role).lower())
    if known is None and key == "from":
        raise DataError(f"{where}.from is {shown(role)}: one of {', '.join(_ROLES)} is needed", reason="unknown role")
    return role if known is None else known


def _text(value: Any, where: str) -> str:
    """A message's content: a text, or parts that are texts, which follow each other."""
    if isinstance(value, str):
        return value
    parts = [value] if isinstance(value, dict) else value
    if not isinstance(parts, list) or not parts:
        raise DataError(f"{where} is {shown(value)}: a text is needed", reason="wrong type")
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(parts))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        kind = shown(part["type"] if isinstance(part, dict) and part.get("type") is not None else part)
        raise DataError(f"{where} is {kind}: only parts of the type `text` can be used", reason="wrong type")
    return str(part["text"])


def _tool_calls(value: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message's calls, in OpenAI's newer or older key, or none."""
    given = read_json(value.get("tool_calls"))
    if given in _NOTHING:
        given = read_json(value.get("function_call"))
    return [] if given in _NOTHING else _called(given, where)


def _called(given: Any, where: str) -> list[dict[str, Any]]:
    """Calls as templates take them, ``{type, function: {name, arguments}}``, with the arguments as an object."""
    found = []
    for index, call in enumerate(given if isinstance(given, list) else [given]):
        call = read_json(call)
        function = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}[{index}] is {shown(call)}: an object with the function's `name` and `arguments` is needed",
                reason="wrong type",
            )
        written = function.get("arguments", function.get("parameters"))
        arguments = read_json(written) if isinstance(written, str) else without_nulls(written)
        if arguments is None:
            arguments = {}
        made = {"name": function["name"], "arguments": arguments if isinstance(arguments, dict) else written}
        named = {"id": call["id"]} if function is not call and call.get("id") is not None else {}
        found.append({"type": "function", **named, "function": made})
    return found


def _check_weight(message: Any, where: str) -> None:
    """Raise where an answer's weight says that it must not be trained on; those of earlier turns weigh nothing here."""
    if not isinstance(message, dict) or _ROLES.get(str(message.get("role", message.get("from"))).lower()) != "assistant":
        return
    weight = message.get("weight")
    if weight not in (None, 1):
        raise DataError(
            f"{where}.weight is {shown(weight)}: only answers of weight 1, which OpenAI trains on, can be candidates",
            reason="out of range",
        )


def tools_of(value: Any, where: str) -> list[dict[str, Any]]:
    """The tools that a column describes, as chat templates take them: ``{type, function: {name, ...}}``; none for nothing.

    A list of objects, one object, or either as text in JSON, also one text for each tool.

    Raises:
        ValueError: it is something else.
    """
    found = read_json(value)
    if found in _NOTHING:
        return []
    tools = []
    for one in found if isinstance(found, list) else [found]:
        tool = read_json(one)
        if not isinstance(tool, dict):
            raise DataError(
                f"{where} is {shown(value)}: tools are a list of objects, or JSON that holds one; rename the column if it "
                f"means something else ({names([where.rpartition('.')[2]])} is given to the chat template)",
                reason="wrong type",
            )
        if tool is one:
            tool = without_nulls(tool)
        plain = "name" in tool and "function" not in tool
        tools.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} if plain else tool)
    return tools


def template_kwargs_of(value: Any, where: str) -> dict[str, Any]:
    """Further values for a chat template, as an object or as text in JSON; nulls, which Parquet adds, are left out.

    >>> template_kwargs_of('{"enable_thinking": false}', "chat_template_kwargs")
    {'enable_thinking': False}

    Raises:
        ValueError: it is something else, or has a name that rendering a conversation takes for itself.
    """
    found = read_json(value)
    if found in _NOTHING:
        return {}
    if not isinstance(found, dict):
        raise DataError(
            f"{where} is {shown(value)}: an object with values for the chat template, such as enable_thinking, is needed; "
            "rename the column if it means something else",
            reason="wrong type",
        )
    if taken := [name for name in found if name in _OF_THE_CALL]:
        raise DataError(f"{where} has {names(taken)}: that is no value for a chat template; leave it out", reason="unknown key")
    return {name: one for name, one in found.items() if one is not None}

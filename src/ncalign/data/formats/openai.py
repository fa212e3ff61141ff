"""OpenAI's fine-tuning files: chats (``messages``) and pairs (``input, preferred_output, non_preferred_output``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import Group, Message
from ncalign.data.formats.parsing import Row, make_candidate, row_id, row_metadata

CHAT = ("messages",)
PAIR = ("input", "preferred_output", "non_preferred_output")
_ROLES = {"developer": "system"}
"""The newer name of the same message, which chat templates know by the older one."""


def required_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that a row must have, given those that it has."""
    present = set(columns)
    return CHAT if "messages" in present and present.isdisjoint(PAIR) else PAIR


def known_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that are read; others go to the metadata."""
    return ("id", *required_columns(columns), "metadata")


def is_row(row: Row) -> bool:
    """Whether the turns are messages with a role."""
    held = row["input"].get("messages") if isinstance(row.get("input"), dict) else row.get("messages")
    return isinstance(held, list) and all(isinstance(message, dict) and "role" in message for message in held[:1])


def parse(row: Row, default_id: str, origin: str) -> Group:
    """Read a pair, or a chat whose last message, if it is the assistant's, is a candidate without a reward."""
    if required_columns(row) == PAIR:
        return _pair(row, default_id, origin)
    if row.get("rejected_response") is not None:
        raise DataError(
            "`rejected_response` beside `messages` makes a pair, which is not OpenAI's: name the answers `chosen` and "
            "`rejected`, and the turns before them `prompt`",
            reason="unknown key",
        )
    messages = _messages(row["messages"], "messages")
    candidates = []
    if messages[-1]["role"] == "assistant":
        _check_weight(row["messages"][-1], f"messages[{len(messages) - 1}]")
        candidates = [make_candidate(f"messages[{len(messages) - 1}]", [messages.pop()], None)]
    if not messages:
        raise DataError("messages has nothing before the answer: a prompt is needed", reason="empty prompt")
    return Group(row_id(row, default_id), messages, candidates, _metadata(row, {}), origin)


def _pair(row: Row, default_id: str, origin: str) -> Group:
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise DataError(f"input is {shown(given)}: an object with `messages` is needed", reason="wrong type")
    prompt = _messages(given["messages"], "input.messages")
    candidates = []
    for column, reward in (("preferred_output", 1.0), ("non_preferred_output", 0.0)):
        value = row[column]
        output = [value] if isinstance(value, dict) else value
        turns = _messages(output, column)
        if turns[-1]["role"] != "assistant":
            role = shown(turns[-1]["role"])
            raise DataError(f"{column} ends with a message of {role}: the assistant's is needed", reason="unknown role")
        _check_weight(output[-1], f"{column}[{len(turns) - 1}]")
        candidates.append(make_candidate(column, turns, reward))
    more = {name: value for name, value in given.items() if name != "messages"}
    return Group(row_id(row, default_id), prompt, candidates, _metadata(row, more), origin)


def _metadata(row: Row, more: dict[str, Any]) -> dict[str, Any]:
    """The row's metadata with what else its input holds, such as tools; what is null or empty there is left out."""
    found = row_metadata(row, known_columns(row))
    clash = [name for name in more if name in found]
    if clash:
        raise DataError(f"both a column and an entry of input are called {names(clash)}: rename one", reason="name clash")
    return {**found, **{name: value for name, value in more.items() if value not in (None, [], "")}}


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {shown(value)}: a list of messages, not empty, is needed", reason="wrong type")
    return [_message(one, f"{where}[{index}]") for index, one in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    """A message's role and text; whatever else it says can't be told to a model by role and text, and is refused by name."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise DataError(f"{where} is {shown(value)}: an object with `role` and `content` is needed", reason="wrong type")
    # Parquet gives every message all keys, null where it has none.
    more = [name for name, held in value.items() if name not in ("role", "content", "weight") and held not in (None, [], "")]
    if more:
        raise DataError(
            f"{where} has {names(more)}: only messages of a role and a text can be used; write it into the text, or remove it",
            reason="unknown key",
        )
    role = str(value["role"])
    return {"role": _ROLES.get(role, role), "content": _text(value.get("content"), f"{where}.content")}


def _text(value: Any, where: str) -> str:
    """A message's content: a text, or parts that are texts, which follow each other."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {shown(value)}: a text is needed", reason="wrong type")
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = shown(part.get("type") if isinstance(part, dict) else part)
            raise DataError(f"{where}[{index}] is {kind}: only parts of the type `text` can be used", reason="wrong type")
    return "".join(part["text"] for part in value)


def _check_weight(message: dict[str, Any], where: str) -> None:
    """Raise where an answer's weight says that it must not be trained on; those of earlier turns weigh nothing here."""
    weight = message.get("weight")
    if weight not in (None, 1):
        raise DataError(
            f"{where}.weight is {shown(weight)}: only answers of weight 1, which OpenAI trains on, can be candidates",
            reason="out of range",
        )

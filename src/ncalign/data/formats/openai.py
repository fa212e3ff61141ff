"""OpenAI's fine-tuning files: chats (``messages``) and pairs (``input, preferred_output, non_preferred_output``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import Group, Message, check_text
from ncalign.data.formats.parsing import Row, make_candidate, row_id, row_metadata

CHAT = ("messages",)
PAIR = ("input", "preferred_output", "non_preferred_output")


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
        turns = _messages(row[column], column)
        if turns[-1]["role"] != "assistant":
            role = shown(turns[-1]["role"])
            raise DataError(f"{column} ends with a message of {role}: the assistant's is needed", reason="unknown role")
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
    check_text(value, where)
    return list(value)

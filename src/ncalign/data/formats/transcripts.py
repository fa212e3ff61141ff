"""Transcripts: conversations as one string, ``Human:`` and ``Assistant:`` after blank lines, as HH and Nectar write them."""

from __future__ import annotations

import re
from typing import Any

from ncalign.core.errors import DataError, shown
from ncalign.data.formats.group import Group, Message
from ncalign.data.formats.parsing import Row, make_candidate, row_id, row_metadata, shared_turns

COLUMNS = ("id", "chosen", "rejected", "metadata")
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: object) -> bool:
    r"""Whether a string is a conversation that begins with a human's turn.

    >>> is_transcript("\n\nHuman: Hi\n\nAssistant: Hello"), is_transcript("Human nature is odd")
    (True, False)
    """
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None and "\n\nAssistant:" in value


def messages_of(text: str) -> list[Message]:
    r"""The turns of a transcript; an assistant's turn without text at its end is where the answer goes.

    >>> messages_of("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:")[-1]
    {'role': 'user', 'content': 'Bye'}
    """
    parts = _TURN.split("\n\n" + text.strip())
    turns = [{"role": _ROLES[name], "content": content.strip()} for name, content in zip(parts[1::2], parts[2::2], strict=True)]
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    if not turns:
        raise DataError(
            f"the transcript {shown(text)} has no turns: `Human:` and `Assistant:` are needed", reason="bad transcript"
        )
    return turns


def is_pair(row: Row) -> bool:
    """Whether a row's chosen and rejected are transcripts."""
    return "prompt" not in row and is_transcript(row.get("chosen")) and is_transcript(row.get("rejected"))


def parse(row: Row, default_id: str, origin: str) -> Group:
    """Read a pair of transcripts: the turns that both begin with are the prompt, and what follows the candidates.

    That is an answer, or several turns that begin and end with the assistant's.
    """
    pair: dict[str, Any] = {}
    for column in ("chosen", "rejected"):
        if not is_transcript(row[column]):
            raise DataError(f"{column} is {shown(row[column])}: a transcript is needed", reason="bad transcript")
        pair[column] = messages_of(row[column])
    cut = min(len(shared_turns(list(pair.values()))), *(len(turns) - 1 for turns in pair.values()))
    prompt = pair["chosen"][:cut]
    if not prompt or any({turns[cut]["role"], turns[-1]["role"]} != {"assistant"} for turns in pair.values()):
        raise DataError(
            "the transcripts must part at an answer of the assistant's, and end with one; these part at a human's turn, or end "
            "otherwise",
            reason="prompt not found",
        )
    return Group(
        id=row_id(row, default_id),
        prompt=prompt,
        candidates=[
            make_candidate(column, pair[column][cut:], reward) for column, reward in (("chosen", 1.0), ("rejected", 0.0))
        ],
        metadata=row_metadata(row, COLUMNS),
        origin=origin,
    )

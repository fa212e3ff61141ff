"""Which of a row's columns a model should see, by the names that other tools give them, and which ones nothing reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import STRING_PROMPTS, TEMPLATE_KWARGS, TOOLS, Group, Message, Text
from ncalign.data.formats.messages import DESCRIPTIONS, spelled, template_kwargs_of, tools_of
from ncalign.data.formats.parsing import Row, as_conversation
from ncalign.data.formats.values import as_number

QUESTIONS = ("instruction", "question", "query", "input", "problem")
"""Columns that hold a prompt's text where there is no `prompt`."""
TURNS = ("messages", "conversations", "conversation")
"""Columns that hold a prompt's turns where there is no text."""
ALPACA = {"instruction", "input"}
"""Two columns that make one text."""
SYSTEMS = ("system", "system_prompt", "system_message", "custom_system_prompt")
HISTORY = "history"
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_NUMBERS = frozenset("margin reward rewards score scores rating ratings".split())
_SCORES = ("reward", "score", "rating")
_SCORE_WORDS = frozenset({*_SCORES, *(f"{name}s" for name in _SCORES), "avg", "average", "mean", "overall", "rm", "model"})
_WORDS = re.compile(r"[\W_]+")
_NOTHING: tuple[Any, ...] = (None, [], {}, "")


def prompt_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that hold a row's prompt: `prompt`, or else the one that stands for it; none where there is none.

    >>> prompt_columns({"question": "Q", "chosen": "a", "rejected": "b"})
    ('question',)
    """
    if row.get("prompt") not in _NOTHING:
        return ("prompt",)
    asked = [name for name in QUESTIONS if row.get(name) not in _NOTHING]
    turns = [name for name in TURNS if row.get(name) not in _NOTHING]
    if asked and set(asked) <= ALPACA:
        return tuple(asked)
    return tuple(asked) or tuple(turns)


def prompt_of(row: Row, columns: tuple[str, ...]) -> Any:
    """The prompt that stands in these columns; a text and its input are joined by a line break, as LLaMA-Factory does.

    Raises:
        ValueError: several columns could be the prompt.
    """
    if len(columns) == 1:
        return row[columns[0]]
    if {*columns} == ALPACA:
        for name in columns:
            if not isinstance(row[name], str):
                raise DataError(f"{name} is {shown(row[name])}: a string is needed", reason="wrong type")
        return "\n".join(row[name] for name in columns)
    raise DataError(f"each of {names(columns)} could be the prompt: call the one that is `prompt`", reason="prompt not found")


def score_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """The columns with the rewards of the chosen and the rejected completions; none where the row has none.

    Rewards come before scores, and scores before ratings, where a row has several.

    >>> score_columns({"chosen": "a", "rejected": "b", "chosen-rating": 5, "rejected-rating": 1})
    {'chosen': 'chosen-rating', 'rejected': 'rejected-rating'}

    Raises:
        ValueError: one of the two is missing.
    """
    found: list[tuple[int, str]] = []
    for name in row:
        side = next((side for side in ("chosen", "rejected") if side in name), None)
        words = {*_WORDS.split(name.lower())} - {"chosen", "rejected", "response"}
        kind = next((place for place, word in enumerate(_SCORES) if words & {word, f"{word}s"}), None)
        if side is None or kind is None or not words <= _SCORE_WORDS or isinstance(row[name], dict):
            continue
        found.append((kind, name.replace(side, "chosen", 1)))
    if not found:
        return {}
    chosen = min(found, key=lambda one: one[0])[1]
    pair = (chosen, chosen.replace("chosen", "rejected", 1))
    lacking = [name for name in pair if name not in row]
    if lacking:
        present = next(name for name in pair if name in row)
        raise DataError(f"the row has `{present}` alone: {names(pair)} are needed together", reason="missing key")
    return dict(zip(("chosen", "rejected"), pair, strict=True))


def completed(group: Group, row: Row, known: Collection[str]) -> Group:
    """The group with all that a row's other columns say to the model: a system text, earlier turns, tools, template values.

    Columns that a schema reads itself are ``known``; the others are in the group's metadata, which they leave.

    Raises:
        ValueError: what a column holds can't be put into the prompt.
    """
    metadata = dict(group.metadata)
    columns = [name for name in (*SYSTEMS, HISTORY) if name in row and name in metadata and name not in known]
    said = {name: metadata.pop(name) for name in columns}
    tools = {name: tools_of(metadata.pop(name), name) for name in DESCRIPTIONS if name in metadata}
    described = [given for given in tools.values() if given]
    if described[1:] and described[0] != described[1]:
        raise DataError(f"{names(tools)} differ: keep the one that the model is given", reason="name clash")
    if described:
        metadata[TOOLS] = described[0]
    if TEMPLATE_KWARGS in metadata and (kwargs := template_kwargs_of(metadata.pop(TEMPLATE_KWARGS), TEMPLATE_KWARGS)):
        metadata[TEMPLATE_KWARGS] = kwargs
    group = replace(group, metadata=metadata)
    opening = [*_system_turn(said), *_history(said.get(HISTORY))]
    raw = group.metadata.get(STRING_PROMPTS) == "raw"
    if raw and opening:
        raise DataError(
            f"{names(said)} can't stand before the text that all answers begin with, which a model continues: put the question "
            "into a column `prompt`",
            reason="prompt not found",
        )
    # A row whose system text is empty stands among others that have one: all are questions to a chat model.
    return _opened(as_conversation(group), opening, [*said]) if said and not raw else group


def _system_turn(said: Mapping[str, Any]) -> list[Message]:
    texts = {name: _system_text(said[name], name) for name in SYSTEMS if said.get(name) not in _NOTHING}
    different = {text for text in texts.values() if text.strip()}
    if len(different) > 1:
        raise DataError(f"{names(texts)} differ: keep the one that the model is told", reason="name clash")
    return [{"role": "system", "content": text} for text in different]


def _system_text(value: Any, column: str) -> str:
    turns = spelled(value, column)
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict) and {*turns[0]} == {"role", "content"}:
        turns = turns[0]["content"]
    if not isinstance(turns, str):
        raise DataError(
            f"{column} is {shown(value)}: the text of a system's turn is needed; rename the column if it means something else",
            reason="wrong type",
        )
    return turns


def _history(value: Any) -> list[Message]:
    """Earlier turns, as messages or as pairs of a question and its answer."""
    if value in _NOTHING:
        return []
    turns = spelled(value, HISTORY)
    if isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return turns
    if not isinstance(turns, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in turns
    ):
        raise DataError(
            f"{HISTORY} is {shown(value)}: a list of [question, answer], or of messages, is needed", reason="wrong type"
        )
    return [{"role": role, "content": text} for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)]


def _opened(group: Group, opening: list[Message], columns: list[str]) -> Group:
    """A conversation that begins with these turns."""
    turns = group.prompt
    assert isinstance(turns, list)
    if opening and turns[0]["role"] == "system" and opening[0]["role"] == "system":
        if turns[0]["content"].strip() != opening[0]["content"].strip():
            raise DataError(
                f"the prompt begins with a system turn, and {names(columns[:1])} holds another: remove one", reason="name clash"
            )
        turns = turns[1:]
    return replace(group, prompt=[*opening, *turns])


def unread(group: Group, row: Row, known: Collection[str], *, pair: bool) -> list[str]:
    """A row's columns that are in the metadata alone, though a model might be meant to see them.

    ``pair``: the rewards are 1 and 0 where no column gives them, so that columns of scores are named too.
    """
    carried = [name for name in row if name in group.metadata and name not in (*known, TOOLS, TEMPLATE_KWARGS)]
    texts = [*_texts(group.prompt), *(text for one in group.candidates for text in _texts(one.completion))]
    return [
        *(
            name
            for name in carried
            if (name in MEDIA and row[name] not in _NOTHING)
            or (pair and {*_WORDS.split(name.lower())} & _NUMBERS and _is_numeric(row[name]))
            or any(_is_prose(text) and not any(text in seen for seen in texts) for text in _prose(row[name]))
        ),
    ]


def _is_numeric(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, int | float) and not isinstance(one, bool) for one in values) or any(
        isinstance(one, str) and as_number(one) is not None for one in values
    )


def _prose(value: Any) -> Iterator[str]:
    """The texts of a column: itself, its elements, or what its messages say."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            held = (
                next((one[key] for key in ("content", "value", "text") if key in one), None) if isinstance(one, dict) else one
            )
            yield from _prose(held) if isinstance(held, str | list) else ()


def _is_prose(text: str) -> bool:
    """Whether a text may be words to a model: several words, a sentence, or a script without spaces; not a name or a date."""
    stripped = text.strip()
    if re.fullmatch(r"[\d\s:T.+Z/-]*", stripped) or not any(character.isalpha() for character in stripped):
        return False
    return len(stripped.split()) > 1 or stripped.endswith((".", "?", "!", ":")) or (not text.isascii() and len(stripped) > 1)


def _texts(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else [turn["content"] for turn in text]

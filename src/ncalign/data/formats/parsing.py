"""What the schemas share: ids, extra columns, candidates with their place in the row, prompts inside conversations."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from ncalign.core.errors import DataError, names, nearest, shown
from ncalign.data.formats.group import MAX_INT_BITS, Candidate, Group, Message, Text, check_text
from ncalign.data.formats.values import read_number

Row: TypeAlias = dict[str, Any]


def require_columns(row: Row, required: Collection[str], known: Collection[str], schema: str) -> None:
    """Raise if a required column is missing, or if an extra one is nearly the name of a known one that is missing."""
    lacking = [name for name in required if name not in row]
    # Short names such as `idx` are too near to `id` by chance.
    absent = tuple(name for name in known if name not in row and len(name) > 2)
    for column in row:
        if absent and column not in known:
            guess = _near_miss(column, absent)
            if guess:
                raise DataError(
                    f"column {names([column])} is not part of the schema `{schema}`: did you mean `{guess}`?",
                    reason="unknown key",
                )
    if lacking:
        raise DataError(
            f"the row lacks {names(lacking)}: schema `{schema}` needs {names(required)}, found {names(row) or 'no columns'}",
            reason="missing key",
        )


@functools.lru_cache(maxsize=4096)
def _near_miss(column: str, absent: tuple[str, ...]) -> str | None:
    # Cached: the same few columns come with every row. Above `prompt_id` for `prompt`, below plurals and slips.
    return nearest(column, absent, cutoff=0.82)


def row_id(row: Row, default: str) -> str:
    """Return the row's id as a string; a missing one becomes the line's number."""
    value = row.get("id")
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what pandas makes of whole numbers where some are missing
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= MAX_INT_BITS:
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"id is {shown(value)}: a string or a whole number is needed", reason="wrong type")
    return value


def row_metadata(row: Row, known: Collection[str]) -> dict[str, Any]:
    """Return the ``metadata`` column and, beside its entries, the columns that the schema doesn't know."""
    extra = {key: value for key, value in row.items() if key not in known}
    stored = row.get("metadata")
    if stored is None or stored == []:  # an empty Arrow map is a list
        return extra
    if isinstance(stored, str):
        stored = _decoded(stored)
    if not isinstance(stored, dict):
        raise DataError(f"metadata is {shown(stored)}: an object is needed; rename the column", reason="wrong type")
    clash = [key for key in extra if key in stored]
    if clash:
        raise DataError(f"both a column and an entry of metadata are called {names(clash)}: rename one", reason="name clash")
    return {**stored, **extra} if extra else stored


def _decoded(text: str) -> object:
    """Parquet has no type for free-form objects, so metadata is a JSON string there."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(
            f"metadata is {shown(text)}: an object, or a string with a JSON object, is needed; rename the column",
            reason="wrong type",
        ) from None


def make_candidate(where: str, completion: Text, reward: Any) -> Candidate:
    """Build a candidate; errors name the column that it came from."""
    try:
        return Candidate(completion, reward=read_number(reward, "reward"))
    except DataError as error:
        raise error.within(where) from None


def question_turns(prompt: Any, system: str | None) -> Any:
    """A prompt that a chat model is asked, as turns: a string is the user's, after the system's if there is one."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt
    return [{"role": "system", "content": system}, *turns] if system and isinstance(turns, list) else turns


def answer_turn(completion: Any) -> Any:
    """A chat model's answer as turns: a string is the assistant's."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def as_conversation(group: Group) -> Group:
    """The group with its strings as turns: the prompt as the user's, completions as the assistant's."""
    candidates = [replace(one, completion=answer_turn(one.completion)) for one in group.candidates]
    return replace(group, prompt=question_turns(group.prompt, None), candidates=candidates)


def separate_prompt(prompt: object, completions: dict[str, Any], where: str = "prompt") -> tuple[Text, list[Text]]:
    """Check a prompt and completions by their columns, and take the prompt's turns off the completions that repeat them.

    A string prompt beside conversations becomes the turns that they open with, up to the user's turn that asks it; beside
    answers alone it becomes a user's turn.
    """
    check_text(prompt, where.replace("`", ""))
    for column, value in completions.items():
        check_text(value, column)
    values: list[Text] = list(completions.values())
    if not isinstance(prompt, str | list):  # for the type checker; check_text has raised
        raise AssertionError
    _check_kinds(completions)
    conversations = [value for value in values if isinstance(value, list)]
    if not conversations:
        return prompt, values
    turns = _opening_turns(prompt, conversations) if isinstance(prompt, str) else prompt
    separated: list[Text] = []
    for column, conversation in zip(completions, conversations, strict=True):
        rest = conversation[len(turns) :] if conversation[: len(turns)] == turns else conversation
        if not rest:
            raise DataError(f"{column} repeats the prompt and adds nothing: an answer must follow", reason="empty completion")
        separated.append(rest)
    return turns, separated


def _opening_turns(prompt: str, conversations: Sequence[list[Message]]) -> list[Message]:
    """Return the shared leading turns up to the one that asks the prompt; that one alone where they are answers alone."""
    lead = shared_turns(conversations)
    for index in range(len(lead) - 1, -1, -1):
        if lead[index]["role"] == "user" and lead[index]["content"].strip() == prompt.strip():
            return lead[: index + 1]
    if all(conversation[0]["role"] == "assistant" for conversation in conversations):
        return [{"role": "user", "content": prompt}]
    raise DataError(
        "the conversations neither open with the string in `prompt` nor start with an assistant's turn: make the prompt the "
        "list of messages that the conversations share",
        reason="prompt not found",
    )


def implicit_prompt(completions: Mapping[str, Any]) -> tuple[Text, list[Text]]:
    """Split what all completions, given by their columns, share at their start off as the prompt.

    Conversations share leading messages, and each keeps at least its last. Strings share a prefix that ends at a word's
    end: white space before the first word that differs belongs to the completions, where tokenizers expect it.
    """
    for column, value in completions.items():
        check_text(value, column)
    _check_kinds(completions)
    values: list[Text] = list(completions.values())
    texts = [value for value in values if isinstance(value, str)]
    conversations = [value for value in values if isinstance(value, list)]
    if texts:
        cut = _shared_words(texts)
    else:
        cut = min(len(shared_turns(conversations)), *(len(turns) - 1 for turns in conversations))
    if not cut:
        raise DataError(
            f"{names(completions)} share no beginning that could be the prompt, and there is no `prompt` column: add one",
            reason="prompt not found",
        )
    return values[0][:cut], [value[cut:] for value in values]


def _check_kinds(completions: Mapping[str, object]) -> None:
    """Raise unless the completions of a row are all strings or all conversations."""
    first = {isinstance(value, str): column for column, value in reversed(list(completions.items()))}
    if len(first) == 2:
        kinds = ", ".join(f"`{column}` is {shown(completions[column])}" for column in completions if column in first.values())
        raise DataError(f"{kinds}: all must be strings or all conversations", reason="wrong type")


def shared_turns(conversations: Sequence[list[Message]]) -> list[Message]:
    """Return the messages that all conversations start with."""
    lead = []
    for turns in zip(*conversations, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        lead.append(turns[0])
    return lead


def _shared_words(texts: Sequence[str]) -> int:
    """Length of the shared prefix, backed up to where a word ends and something is left of each string."""
    # What the first and the last in alphabetical order share, all share.
    first, last = min(texts), max(texts)
    pairs = enumerate(zip(first, last, strict=False))
    shared = next((index for index, (left, right) in pairs if left != right), min(len(first), len(last)))
    if all(text[shared : shared + 1].isspace() for text in texts):
        return len(first[:shared].rstrip())
    end = min(shared, *(len(text) - 1 for text in texts))
    while end > 0 and not first[end - 1].isspace():
        end -= 1
    return len(first[: max(end, 0)].rstrip())

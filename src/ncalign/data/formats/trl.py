"""Pairs and labelled completions: TRL's schemas, and the same under the names that other trainers give their columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.columns import QUESTIONS, TURNS, prompt_columns, prompt_of, score_columns, unread
from ncalign.data.formats.group import STRING_PROMPTS, Candidate, Group
from ncalign.data.formats.parsing import (
    Row,
    answer_turn,
    implicit_prompt,
    make_candidate,
    row_id,
    row_metadata,
    separate_prompt,
)
from ncalign.data.formats.values import read_flag

PAIR = ("chosen", "rejected")
PAIRS = (PAIR, ("chosen_response", "rejected_response"), ("response", "rejected_response"))
CHAT_PAIRS = (("messages", "rejected_messages"), ("messages", "rejected_response"))
"""A whole conversation, and another one or another last answer."""
SCORE_LISTS = ("rewards", "scores", "ratings", "rating")
COMPLETIONS = ("completion", "response", "output")
LABELS = ("label", "kto_tag")


def pair_columns(row: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of the chosen and the rejected completions, by the names that a row has for them."""
    there = [pair for pair in (*PAIRS, *CHAT_PAIRS) if all(name in row for name in pair)]
    filled = (pair for pair in there if all(row[name] is not None for name in pair))
    return next(filled, there[0] if there else PAIR)


def known_pair_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that are read, given those there are; those of rewards are known where they are missing too."""
    pair = pair_columns(row)
    scores = tuple(score_columns(row).values()) or tuple(name for name in SCORE_LISTS if _is_score_list(row.get(name)))
    return ("id", *_asked(row, pair), *pair, *(scores or ("chosen_reward", "rejected_reward")), "metadata")


def is_sharegpt(row: Row) -> bool:
    """Whether the turns are written as from and value."""
    found = row.get("conversations")
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict) and {"from", "value"} <= found[0].keys()


def asks_by(row: Row, column: str) -> bool:
    """Whether a column is the prompt, or a part of it."""
    return column in _asked(row, pair_columns(row))


def _asked(row: Mapping[str, Any], pair: tuple[str, str]) -> tuple[str, ...]:
    """The prompt's columns; those of turns that repeat a whole answer are no prompt."""
    if pair in CHAT_PAIRS:
        return ()
    answers = [row.get(side) for side in pair]
    return tuple(name for name in prompt_columns(row) if name not in TURNS or row[name] not in answers) or ("prompt",)


def parse_pair(row: Row, default_id: str, origin: str) -> Group:
    """Read chosen and rejected completions, one of each or lists: rewards 1 and 0 unless columns give them.

    Without a prompt, what all completions start with is the prompt; for strings, only where no other column may be it.
    """
    pair = pair_columns(row)
    given = _given_rewards(row)
    completions: dict[str, Any] = {}
    rewards: list[Any] = []
    for side, column, reward in zip(PAIR, pair, (1.0, 0.0), strict=True):
        found = _completions(_answers(row, column, pair), column)
        completions |= found
        scored = _rewards(*given[side], len(found), several=column not in found) if given else None
        rewards += [reward] * len(found) if scored is None else scored
    asked = _asked(row, pair)
    implicit = not asked or row.get(asked[0]) is None
    prompt, texts = (
        implicit_prompt(completions) if implicit else separate_prompt(prompt_of(row, asked), completions, names(asked))
    )
    known = known_pair_columns(row)
    metadata = row_metadata(row, known)
    raw = implicit and isinstance(prompt, str)
    group = Group(
        id=row_id(row, default_id),
        prompt=prompt,
        candidates=[
            make_candidate(where, text, reward) for where, text, reward in zip(completions, texts, rewards, strict=True)
        ],
        # The completions go on in the middle of the text.
        metadata={STRING_PROMPTS: "raw", **metadata} if raw else metadata,
        origin=origin,
    )
    if raw and (others := unread(group, row, known, pair=False)):
        raise DataError(
            f"there is no `prompt`, and {names(others)} may be it: rename it to `prompt`, or remove it if the words that "
            f"{names(pair)} begin with are the prompt",
            reason="prompt not found",
        )
    return group


def _answers(row: Row, column: str, pair: tuple[str, str]) -> Any:
    """A column's answers; a last answer alone is put after the turns that it shares."""
    if pair == CHAT_PAIRS[1] and column == pair[1] and isinstance(row[pair[0]], list):
        return [*row[pair[0]][:-1], *answer_turn(row[column])]
    return row[column]


def _completions(value: Any, column: str) -> dict[str, Any]:
    """A column's completions by their places: itself, or the elements of a list of strings or of conversations."""
    if value == []:
        raise DataError(f"{column} is an empty list: at least one completion is needed", reason="no candidates")
    if not isinstance(value, list) or not any(isinstance(one, str | list) for one in value):
        return {column: value}
    return {f"{column}[{index}]": one for index, one in enumerate(value)}


def _is_score_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
    )


def _given_rewards(row: Row) -> dict[str, tuple[str, Any]]:
    """The columns of the rewards of either side, and what they hold; nothing where the row has none."""
    columns = score_columns(row)
    if columns:
        return {side: (column, row[column]) for side, column in columns.items()}
    for column in SCORE_LISTS:
        value: Any = row.get(column)
        if _is_score_list(value):
            if value[0] < value[1]:
                raise DataError(
                    f"{column} is {value}: the rejected answer, which comes second, has more than the chosen one; name the "
                    "rewards `chosen_reward` and `rejected_reward`",
                    reason="out of range",
                )
            return {side: (column, number) for side, number in zip(PAIR, value, strict=True)}
    return {}


def _rewards(column: str, value: Any, number: int, *, several: bool) -> list[Any]:
    """The rewards of a column's completions, one each."""
    if not several:
        return [value]
    if value is None:
        return [None] * number
    if not isinstance(value, list):
        raise DataError(
            f"{column} is {shown(value)}: a list of {number} rewards, one for each completion, is needed", reason="wrong type"
        )
    if len(value) != number:
        raise DataError(
            f"{column} has {len(value)} rewards for {number} completions: one each is needed", reason="wrong length"
        )
    return value


def unpaired_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a labelled completion: its prompt's, its own, and the label's; or a conversation's and the label's."""
    label = next((name for name in LABELS if name in row), LABELS[0])
    asked = tuple(name for name in prompt_columns(row))
    completion = next((name for name in COMPLETIONS if name in row), None)
    if completion is None and len(asked) == 1 and asked[0] not in ("prompt", *QUESTIONS):
        return (*asked, label)
    return (*(asked or ("prompt",)), completion or COMPLETIONS[0], label)


def known_unpaired_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that are read, given those there are."""
    return ("id", *unpaired_columns(row), "metadata")


def is_labelled(row: Row) -> bool:
    """Whether the label says that a completion is wanted or not; TRL's own names say so themselves."""
    *_, completion, label = unpaired_columns(row)
    return (completion == COMPLETIONS[0] and label == LABELS[0]) or read_flag(row.get(label)) in (0, 1)


def parse_unpaired(row: Row, default_id: str, origin: str) -> Group:
    """Read one labelled completion: reward 1 when it is wanted, 0 when not; rows with the same prompt are joined later.

    A conversation's last turn is the completion, and the turns before it are the prompt.
    """
    *asked, column, named = unpaired_columns(row)
    label: Any = read_flag(row[named])
    if not isinstance(label, int) or label not in (0, 1):
        raise DataError(f"{named} is {shown(label)}: true or false is needed", reason="wrong type")
    if asked:
        prompt, (completion,) = separate_prompt(prompt_of(row, tuple(asked)), {column: row[column]}, names(asked))
        candidate: Candidate = make_candidate(column, completion, float(label))
    else:
        turns = row[column]
        if not isinstance(turns, list) or len(turns) < 2 or not isinstance(turns[-1], dict):
            raise DataError(f"{column} is {shown(turns)}: turns and an answer to them are needed", reason="wrong type")
        if turns[-1].get("role") != "assistant":
            raise DataError(
                f"{column} ends with a turn of {shown(turns[-1].get('role'))}: the labelled answer, the assistant's, is needed",
                reason="unknown role",
            )
        prompt, candidate = turns[:-1], make_candidate(f"{column}[{len(turns) - 1}]", turns[-1:], float(label))
    return Group(
        id=row_id(row, default_id),
        prompt=prompt,
        candidates=[candidate],
        metadata=row_metadata(row, known_unpaired_columns(row)),
        origin=origin,
    )

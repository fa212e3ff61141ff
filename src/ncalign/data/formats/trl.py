"""TRL's schemas: preference pairs (``prompt, chosen, rejected``) and unpaired (``prompt, completion, label``)."""

from __future__ import annotations

from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import STRING_PROMPTS, Group
from ncalign.data.formats.parsing import Row, implicit_prompt, make_candidate, row_id, row_metadata, separate_prompt

REWARD_COLUMNS = (("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected"))
PREFERENCE_COLUMNS = ("id", "prompt", "chosen", "rejected", "metadata")
UNPAIRED = ("prompt", "completion", "label")
UNPAIRED_COLUMNS = ("id", *UNPAIRED, "metadata")


def parse_preference(row: Row, default_id: str, origin: str) -> Group:
    """Read chosen and rejected completions, one of each or lists: rewards 1 and 0 unless columns give them.

    Without a prompt, what all completions start with is the prompt.
    """
    rewards_of = _reward_columns(row)
    completions: dict[str, Any] = {}
    rewards: list[Any] = []
    for column, reward in (("chosen", 1.0), ("rejected", 0.0)):
        found = _completions(row[column], column)
        completions |= found
        given = _rewards(row, rewards_of[column], len(found), several=column not in found) if rewards_of else None
        rewards += [reward] * len(found) if given is None else given
    if row.get("prompt") is None:
        prompt, texts = implicit_prompt(completions)
    else:
        prompt, texts = separate_prompt(row["prompt"], completions)
    metadata = row_metadata(row, (*PREFERENCE_COLUMNS, *rewards_of.values()))
    if row.get("prompt") is None and isinstance(prompt, str):
        # The completions go on in the middle of the text.
        metadata = {STRING_PROMPTS: "raw", **metadata}
    return Group(
        id=row_id(row, default_id),
        prompt=prompt,
        candidates=[
            make_candidate(where, text, reward) for where, text, reward in zip(completions, texts, rewards, strict=True)
        ],
        metadata=metadata,
        origin=origin,
    )


def _completions(value: Any, column: str) -> dict[str, Any]:
    """A column's completions by their places: itself, or the elements of a list of strings or of conversations."""
    if value == []:
        raise DataError(f"{column} is an empty list: at least one completion is needed", reason="no candidates")
    if not isinstance(value, list) or not any(isinstance(one, str | list) for one in value):
        return {column: value}
    return {f"{column}[{index}]": one for index, one in enumerate(value)}


def _reward_columns(row: Row) -> dict[str, str]:
    """The columns with the rewards of the chosen and the rejected completions; none where the row has none."""
    for pair in REWARD_COLUMNS:
        present = [column for column in pair if column in row]
        if len(present) == 2:
            return dict(zip(("chosen", "rejected"), pair, strict=True))
        if present:
            raise DataError(f"the row has `{present[0]}` alone: {names(pair)} are needed together", reason="missing key")
    return {}


def _rewards(row: Row, column: str, number: int, *, several: bool) -> list[Any]:
    """The rewards of a column's completions, one each."""
    value = row[column]
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


def parse_unpaired(row: Row, default_id: str, origin: str) -> Group:
    """Read one labelled completion: reward 1 when it is wanted, 0 when not; rows with the same prompt are joined later."""
    label = row["label"]
    if not isinstance(label, int) or label not in (0, 1):
        raise DataError(f"label is {shown(label)}: true or false is needed", reason="wrong type")
    prompt, (completion,) = separate_prompt(row["prompt"], {"completion": row["completion"]})
    return Group(
        id=row_id(row, default_id),
        prompt=prompt,
        candidates=[make_candidate("completion", completion, float(label))],
        metadata=row_metadata(row, UNPAIRED_COLUMNS),
        origin=origin,
    )

"""TRL's schemas: preference pairs (``prompt, chosen, rejected``) and unpaired (``prompt, completion, label``)."""

from __future__ import annotations

from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import Group
from ncalign.data.formats.parsing import Row, implicit_prompt, make_candidate, row_id, row_metadata, separate_prompt

REWARD_COLUMNS = (("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected"))
PREFERENCE_COLUMNS = ("id", "prompt", "chosen", "rejected", "metadata")
UNPAIRED = ("prompt", "completion", "label")
UNPAIRED_COLUMNS = ("id", *UNPAIRED, "metadata")


def parse_preference(row: Row, default_id: str, origin: str) -> Group:
    """Read a pair: rewards 1 and 0 unless columns give them; without a prompt, what both completions start with."""
    if row.get("prompt") is None:
        prompt, chosen, rejected = implicit_prompt(row["chosen"], row["rejected"], ("chosen", "rejected"))
    else:
        pair = {"chosen": row["chosen"], "rejected": row["rejected"]}
        prompt, (chosen, rejected) = separate_prompt(row["prompt"], pair)
    rewards, reward_columns = _pair_rewards(row)
    return Group(
        id=row_id(row, default_id),
        prompt=prompt,
        candidates=[make_candidate("chosen", chosen, rewards[0]), make_candidate("rejected", rejected, rewards[1])],
        metadata=row_metadata(row, (*PREFERENCE_COLUMNS, *reward_columns)),
        origin=origin,
    )


def _pair_rewards(row: Row) -> tuple[tuple[Any, Any], tuple[str, ...]]:
    for pair in REWARD_COLUMNS:
        present = [column for column in pair if column in row]
        if len(present) == 2:
            return (row[pair[0]], row[pair[1]]), pair
        if present:
            raise DataError(f"the row has `{present[0]}` alone: {names(pair)} are needed together", reason="missing key")
    return (1.0, 0.0), ()


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

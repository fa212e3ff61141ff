"""Our own schema: ``id, prompt, candidates[].{completion, reward, reference_logprob, source, finished}, metadata``."""

from __future__ import annotations

from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import Candidate, Group, unknown_key
from ncalign.data.formats.parsing import Row, row_id, row_metadata
from ncalign.data.formats.values import read_number

COLUMNS = ("id", "prompt", "candidates", "metadata")
CANDIDATE_KEYS = ("completion", "reward", "reference_logprob", "source", "finished")
_CANDIDATE_KEYS = frozenset(CANDIDATE_KEYS)


def parse(row: Row, default_id: str, origin: str) -> Group:
    """Read a row of our schema; without ``candidates`` it is a prompt alone."""
    candidates = row.get("candidates")
    if candidates is None:
        candidates = []
    if not isinstance(candidates, list):
        raise DataError(f"candidates is {shown(candidates)}: a list of objects is needed", reason="wrong type")
    return Group(
        id=row_id(row, default_id),
        prompt=row["prompt"],
        candidates=[_candidate(value, index) for index, value in enumerate(candidates)],
        metadata=row_metadata(row, COLUMNS),
        origin=origin,
    )


def _candidate(value: Any, index: int) -> Candidate:
    if not isinstance(value, dict):
        raise DataError(f"candidates[{index}] is {shown(value)}: an object with a `completion` is needed", reason="wrong type")
    if not value.keys() <= _CANDIDATE_KEYS:
        unknown = next(key for key in value if key not in _CANDIDATE_KEYS)
        raise unknown_key(unknown, CANDIDATE_KEYS, f"candidates[{index}]")
    if "completion" not in value:
        raise DataError(
            f"candidates[{index}] lacks `completion`, found {names(value) or 'no keys'}: text or a list of messages is needed",
            reason="missing key",
        )
    try:
        numbers = {name: read_number(value.get(name), name) for name in ("reward", "reference_logprob")}
        return Candidate(**{**value, **numbers, "finished": True if value.get("finished") is None else value["finished"]})
    except DataError as error:
        raise error.within(f"candidates[{index}]") from None


def to_row(group: Group) -> Row:
    """Return a group as a row of our schema; what is not set is left out, rewards excepted."""
    row: Row = {"id": group.id, "prompt": group.prompt, "candidates": [_to_object(item) for item in group.candidates]}
    if group.metadata:
        row["metadata"] = group.metadata
    return row


def _to_object(candidate: Candidate) -> Row:
    value: Row = {"completion": candidate.completion, "reward": candidate.reward}
    if candidate.reference_logprob is not None:
        value["reference_logprob"] = candidate.reference_logprob
    if candidate.source is not None:
        value["source"] = candidate.source
    if not candidate.finished:
        value["finished"] = False
    return value

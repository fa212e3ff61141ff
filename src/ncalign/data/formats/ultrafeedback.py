"""UltraFeedback's raw rows, and the faulty overall scores that are in them.

In the first release 2,628 completions have an ``overall_score`` of 10; for many the model that judged them had written 1.
The authors compared each with the mean rating of the aspects (1 to 5) in `src/data_annotation/fix_overall_score_issue.py`
of https://github.com/OpenBMB/UltraFeedback: a mean of at most 2 makes the score 1, one of at most 4 had the completion scored
again by GPT-4, and above that the 10 stands. Rows that went through that script have a ``fine-grained_score``, the mean.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, TypeAlias

from ncalign.core.errors import DataError, shown
from ncalign.data.formats.group import Group
from ncalign.data.formats.parsing import Row, question_turns, row_id, row_metadata
from ncalign.data.formats.ranked import candidate, entries
from ncalign.data.formats.values import read_number

Reward: TypeAlias = Literal["overall_score", "aspect_mean"]

COLUMNS = ("instruction", "completions")
KNOWN = ("id", *COLUMNS, "metadata", "models")
_SUSPECT, _TRUE_SCORE = 10.0, 1.0
_FAULTY_MEAN, _DOUBTFUL_MEAN = 2.0, 4.0
_NOTES = {
    "faulty": "completions with overall_score 10 and a mean aspect rating of at most 2 were read as 1, as UltraFeedback's "
    "authors corrected them; metadata.overall_score keeps what the file says",
    "doubtful": "completions with overall_score 10 and a mean aspect rating above 2 and at most 4 were kept as 10, though "
    "UltraFeedback's authors scored such ones again; the schema ultrafeedback_aspects takes the mean rating as reward",
    "unknown": "completions with overall_score 10 have no aspect rating that it could be compared with, and were kept as 10",
}


def is_row(row: Row) -> bool:
    """Whether the completions are responses with annotations."""
    found = row.get("completions")
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict) and "response" in found[0]


def parse(row: Row, default_id: str, origin: str, *, reward: Reward) -> Group:
    """Read a row: the reward is the overall score, corrected, or the mean rating of the aspects.

    The aspects' ratings go to ``metadata["aspects"]``; where a reward is not what ``overall_score`` says, the row's overall
    scores go to ``metadata["overall_score"]`` as the file has them, in the candidates' order.
    """
    completions = entries(row, "completions", ("response",))
    places = [f"completions[{k}]" for k in range(len(completions))]
    ratings = [_ratings(entry, place) for entry, place in zip(completions, places, strict=True)]
    given = [_overall(entry, place) for entry, place in zip(completions, places, strict=True)]
    aspects = sorted({aspect for rated in ratings for aspect in rated})
    metadata = row_metadata(row, KNOWN)
    if aspects:
        metadata = {**metadata, "aspects": {aspect: [rated.get(aspect) for rated in ratings] for aspect in aspects}}
    rewards = [_reward(entry, place, reward) for entry, place in zip(completions, places, strict=True)]
    if rewards != given:
        metadata = {**metadata, "overall_score": given}
    return Group(
        id=row_id(row, default_id),
        prompt=question_turns(row["instruction"], None),
        candidates=[
            candidate(place, entry["response"], value, entry.get("model"))
            for place, entry, value in zip(places, completions, rewards, strict=True)
        ],
        metadata=metadata,
        origin=origin,
    )


def notes(row: Row, *, reward: Reward) -> dict[str, int]:
    """How many overall scores of a row, which :func:`parse` has read, were corrected or are in doubt."""
    if reward == "aspect_mean":
        return {}
    kinds = Counter(_fault(entry, "completions") for entry in row["completions"])
    return {text: kinds[kind] for kind, text in _NOTES.items() if kinds[kind]}


def _reward(entry: dict[str, Any], where: str, reward: Reward) -> float | None:
    if reward == "aspect_mean":
        return _mean_rating(entry, where)
    return _TRUE_SCORE if _fault(entry, where) == "faulty" else _overall(entry, where)


def _fault(entry: dict[str, Any], where: str) -> str:
    """What an overall score is: sound, faulty, doubtful, or unknown for want of ratings."""
    if _overall(entry, where) != _SUSPECT:
        return "sound"
    mean = _mean_rating(entry, where)
    if mean is None:
        return "unknown"
    if mean <= _FAULTY_MEAN:
        return "faulty"
    # A row of the corrected release: what is in doubt there was scored again.
    return "doubtful" if mean <= _DOUBTFUL_MEAN and entry.get("fine-grained_score") is None else "sound"


def _mean_rating(entry: dict[str, Any], where: str) -> float | None:
    """The mean over the aspects that have a rating; None where none has."""
    known = [rating for rating in _ratings(entry, where).values() if rating is not None]
    if known:
        return sum(known) / len(known)
    return read_number(entry.get("fine-grained_score"), f"{where}.fine-grained_score")


def _overall(entry: dict[str, Any], where: str) -> float | None:
    value = entry.get("overall_score", entry.get("fine-grained_score"))
    return read_number(value, f"{where}.overall_score")


def _ratings(entry: dict[str, Any], where: str) -> dict[str, float | None]:
    given = entry.get("annotations") or {}
    if not isinstance(given, dict):
        raise DataError(f"{where}.annotations is {shown(given)}: an object of aspects is needed", reason="wrong type")
    # A list holds an aspect's several annotations; Parquet gives every aspect, null where a row has none.
    found = {}
    for aspect, annotation in given.items():
        several = [one for one in (annotation if isinstance(annotation, list) else [annotation]) if isinstance(one, dict)]
        values = [read_number(one.get("Rating"), f"{where}.annotations.{aspect}.Rating") for one in several]
        known = [value for value in values if value is not None]
        if several:
            found[str(aspect)] = sum(known) / len(known) if known else None
    return found

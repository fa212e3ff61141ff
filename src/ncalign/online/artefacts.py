"""The files of a round's phases: their forms, and how they are read again."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ncalign.core.kept import Kept, read_kept


class Sample(TypedDict):
    """A completion, as a round keeps it."""

    text: str
    num_tokens: int
    finished: bool
    token_ids: list[int] | None
    logprob: float | None


class Logprobs(TypedDict):
    """Log-probs of some groups' candidates; none where they are not needed."""

    policy: list[list[float] | None]
    reference: list[list[float] | None]


SAMPLES, REWARDS = TypeAdapter(list[list[Sample]]), TypeAdapter(list[list[float | None]])
LOGPROBS = TypeAdapter(Logprobs)
MISMATCHED = TypeAdapter(list[list[float]])


class Evaluated(TypedDict):
    """A held-out prompt's answer."""

    id: str
    text: str
    reward: float | None


EVALUATION = TypeAdapter(list[Evaluated])


def read_artefact(path: Path, form: TypeAdapter[Kept], *, rows: int | None = None) -> Kept:
    """The contents of a phase's file; ``rows`` says how many it has.

    Raises:
        ValueError: it can't be read, or something else is in it.
    """
    remedy = "delete it, and resume makes it again"
    found = read_kept(path, form, remedy=remedy)
    if rows is not None and isinstance(found, list) and len(found) != rows:
        raise ValueError(f"{path} is damaged (it has {len(found)} rows where {rows} are needed): {remedy}")
    return found

"""The files of a round's phases: their forms, and how they are written and read again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ncalign.core.atomic import write_json_atomic
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


class _Sealed(TypedDict):
    """What a phase's file holds: the content, and a checksum of it."""

    sha256: str
    content: object


_SEALED = TypeAdapter(_Sealed)
MADE_AGAIN = "delete it, and resume makes it again"
MADE_ONCE = f"{MADE_AGAIN} if the round has not begun to train; else restore it, or start again (overwrite: true)"


def write_artefact(content: object, path: Path) -> None:
    """Write a phase's file with a checksum of its content.

    Raises:
        ValueError: the content holds NaN or an infinity.
    """
    write_json_atomic({"sha256": _digest(content), "content": content}, path)


def read_artefact(path: Path, form: TypeAdapter[Kept], *, rows: int | None = None, remedy: str = MADE_AGAIN) -> Kept:
    """The content of a phase's file, as it was written.

    Args:
        path: the file.
        form: what is in it.
        rows: how many entries its list has; None: any number.
        remedy: what to do where it is damaged.

    Raises:
        ValueError: it can't be read, or it holds something else than what was written.
    """
    sealed = read_kept(path, _SEALED, remedy=remedy)
    if _digest(sealed["content"]) != sealed["sha256"]:
        raise ValueError(f"{path} is damaged (its content changed after writing): {remedy}")
    found = form.validate_python(sealed["content"])
    if rows is not None and isinstance(found, list) and len(found) != rows:
        raise ValueError(f"{path} is damaged (it has {len(found)} rows where {rows} are needed): {remedy}")
    return found


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""The NCA authors' schema: ``prompt, A0, A1, ...`` and ``score_A0, score_A1, ...``, any number of answers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ncalign.core.errors import DataError, names
from ncalign.data.formats.group import Group
from ncalign.data.formats.parsing import Row, make_candidate, row_id, row_metadata, separate_prompt

_ANSWER = re.compile(r"A(\d{1,4})")
_SCORE = re.compile(r"score_A\d{1,4}")


def answer_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns that hold answers, in the order of their numbers."""
    found = [match for match in map(_ANSWER.fullmatch, columns) if match]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1]))]


def known_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of the schema, given those of a row."""
    listed = list(columns)
    answers = answer_columns(listed)
    scores = [column for column in listed if _SCORE.fullmatch(column)]
    return ("id", "prompt", "metadata", *answers, *scores)


def required_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that a row must have: each answer its score, and each score its answer."""
    listed = list(columns)
    numbered = {*answer_columns(listed), *(column[6:] for column in listed if _SCORE.fullmatch(column))} or {"A0"}
    answers = answer_columns(numbered)
    return ("prompt", *answers, *(f"score_{answer}" for answer in answers))


def parse(row: Row, default_id: str, origin: str) -> Group:
    """Read a row; an answer that is null together with its score was never there."""
    answers = answer_columns(row)
    present = [answer for answer in answers if row[answer] is not None or row[f"score_{answer}"] is not None]
    if not present:
        raise DataError(f"all of {names(answers)} are null: at least one answer is needed", reason="no candidates")
    prompt, completions = separate_prompt(row["prompt"], {answer: row[answer] for answer in present})
    return Group(
        id=row_id(row, default_id),
        prompt=prompt,
        candidates=[
            make_candidate(answer, completion, row[f"score_{answer}"])
            for answer, completion in zip(present, completions, strict=True)
        ],
        metadata=row_metadata(row, known_columns(row)),
        origin=origin,
    )

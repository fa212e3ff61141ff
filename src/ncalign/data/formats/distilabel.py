"""What distilabel writes: an instruction, its generations, and a rating for each.

Its steps name the columns: `UltraFeedback`, `FormatTextGenerationDPO` and `GroupColumns` of version 1, `PreferenceTask` of
version 0, in https://github.com/argilla-io/distilabel. Ratings are ``ratings`` or ``rating``; models are ``generation_models``,
``model_names``, ``models`` or ``generation_model``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ncalign.core.errors import DataError, shown
from ncalign.data.formats.group import Group
from ncalign.data.formats.parsing import Row, answer_turn, question_turns, row_id, row_metadata
from ncalign.data.formats.ranked import candidate
from ncalign.data.formats.values import read_number

PROMPTS = ("instruction", "messages", "prompt", "input")
RATINGS = ("ratings", "rating")
MODELS = ("generation_models", "model_names", "models", "generation_model")
SYSTEMS = ("system_prompt", "system")
PAIR = ("chosen", "rejected")
"""The pair that distilabel makes of the generations, which are read in its place."""
_ALIGNED = ("rationales", "rationale", "types", "rationales-for-ratings")
_NO_TEXT_NOTE = "generations are null and were left out"


def is_row(row: Row) -> bool:
    """Whether a row has generations: texts, or null where a model gave none."""
    found = row.get("generations")
    return isinstance(found, list) and bool(found) and all(isinstance(text, str | list | None) for text in found)


def required_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that a row must have, given those it has: a prompt, by whichever name, and its generations."""
    listed = set(columns)
    return (_first(listed, PROMPTS), "generations")


def known_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that are read, given those there are; missing ratings are known too, as they may be misspelt."""
    listed = set(columns)
    read = [_first(listed, RATINGS), *(name for choices in (MODELS, SYSTEMS) if (name := _first(listed, choices)) in listed)]
    return ("id", *required_columns(listed), *read, *(PAIR if listed >= {*PAIR} else ()), "metadata")


def parse(row: Row, default_id: str, origin: str) -> Group:
    """Read a row: the reward is the rating; null for a rating that could not be read from the judge's answer.

    A generation that is null is left out, and what belongs to it.
    """
    generations = _listed(row, "generations", None)
    if not generations:
        raise DataError(f"generations is {shown(row['generations'])}: a list, not empty, is needed", reason="no candidates")
    kept = [place for place, text in enumerate(generations) if text is not None]
    if not kept:
        raise DataError("all generations are null: at least one text is needed", reason="no candidates")
    column = required_columns(row)[0]
    ratings = _listed(row, _first(row, RATINGS), len(generations))
    models = _listed(row, _first(row, MODELS), len(generations))
    system = row.get(_first(row, SYSTEMS))
    metadata = row_metadata(row, known_columns(row))
    aligned = {name: metadata[name] for name in _ALIGNED if _is_list(metadata.get(name), len(generations))}
    return Group(
        id=row_id(row, default_id),
        prompt=question_turns(row[column], system if isinstance(system, str) else None),
        candidates=[
            candidate(
                f"generations[{place}]",
                answer_turn(generations[place]),
                read_number(ratings[place], f"ratings[{place}]"),
                models[place],
            )
            for place in kept
        ],
        metadata={**metadata, **{name: [values[place] for place in kept] for name, values in aligned.items()}},
        origin=origin,
    )


def notes(row: Row) -> dict[str, int]:
    """How many generations of a row, which :func:`parse` has read, are null."""
    missing = sum(text is None for text in row["generations"])
    return {_NO_TEXT_NOTE: missing} if missing else {}


def _first(row: Collection[str], choices: tuple[str, ...]) -> str:
    return next((name for name in choices if name in row), choices[0])


def _listed(row: Row, column: str, length: int | None) -> list[Any]:
    """A column with an entry for each generation; nulls where it is missing or null, and one text for all is each one's."""
    value = row.get(column)
    if length is not None and value is None:
        return [None] * length
    if length is not None and isinstance(value, str) and column in MODELS:
        return [value] * length
    if not isinstance(value, list):
        raise DataError(f"{column} is {shown(value)}: a list with an entry for each generation is needed", reason="wrong type")
    if length is not None and len(value) != length:
        raise DataError(
            f"there are {length} generations and {len(value)} {column}: one each is needed, null where there is none",
            reason="wrong length",
        )
    return value


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length

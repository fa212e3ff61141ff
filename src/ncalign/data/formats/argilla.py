"""What Argilla exports: records with several answers, and the rankings or ratings that annotators gave them.

Three shapes are read. A `FeedbackDataset` (Argilla 1) has a column for each question, with a list of
``{user_id, value, status}`` or the same as an object of lists, and ``<question>-suggestion``. A `Dataset` (Argilla 2) has
``<question>.responses``, ``.responses.users``, ``.responses.status`` and ``<question>.suggestion``; or, written as JSON, the
objects ``fields``, ``responses`` and ``suggestions``. Source: `HuggingFaceDatasetMixin` and `GenericIO` in
https://github.com/argilla-io/argilla.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import Group, number_or_none
from ncalign.data.formats.parsing import Row, answer_turn, question_turns, row_id, row_metadata
from ncalign.data.formats.ranked import candidate, rewards_from_ranks

PROMPTS = ("prompt", "instruction", "question", "input")
LISTS = ("completions", "generations", "responses")
SYSTEMS = ("system_prompt", "system")
_ANSWER = re.compile(
    r"((?:responses?|completions?|generations?|repl(?:y|ies)|answers?|outputs?|candidates?|options?)[-_ ]?)(\d{1,4})?"
)
_USED = (None, "submitted")
_UNUSED_NOTE = "answers of annotators are drafts, discarded or pending, and were not used"
_SUGGESTED_NOTE = "groups without a submitted answer have their rewards from a suggestion"


@dataclass(frozen=True)
class Question:
    """A question of a record: the values that annotators submitted, or else the one that was suggested.

    Attributes:
        name: the question's.
        values: what is used.
        unused: how many answers are drafts, discarded or pending.
        suggested: whether the value is the suggestion.
    """

    name: str
    values: Sequence[Any]
    unused: int
    suggested: bool


@dataclass(frozen=True)
class Judgement:
    """What one ranking, or the ratings of one kind, say of the answers: a number for each, or None."""

    name: str
    questions: Sequence[Question]
    values: Sequence[float | None]


def is_record(row: Row) -> bool:
    """Whether a row is a record: a prompt, answers and a question."""
    flat = _flat(row)
    asked = bool(_question_names(flat)) or isinstance(row.get("responses"), dict)
    return asked and _prompt_column(flat) is not None and bool(_answers(flat))


def required_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that a row must have, given those it has: all else has many names."""
    listed = list(columns)
    return ("fields",) if "fields" in listed else (next((name for name in PROMPTS if name in listed), PROMPTS[0]),)


def known_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that may not be misspelt; those of questions and answers are the author's own."""
    return (*required_columns(columns), "id", "metadata")


def parse(row: Row, default_id: str, origin: str) -> Group:
    """Read a record: the reward is the share of the other answers that one beats, or its rating, as a mean over annotators.

    Rankings come before ratings. Several questions of the kind that is used give their mean, and each one's values go to
    ``metadata["aspects"]``.
    """
    flat = _flat(row)
    column = _prompt_column(flat)
    if column is None:
        raise DataError(
            f"the record has none of {names(PROMPTS)}, found {names(flat)}: a prompt is needed", reason="missing key"
        )
    answers = _answers(flat)
    kept = [place for place, answer in enumerate(answers.values()) if answer is not None]
    if not kept:
        raise DataError(
            "the record has no answer: columns such as `response-1`, `response-2`, or a list `completions`, are needed",
            reason="no candidates",
        )
    judgements = _judgements(_questions(flat), answers)
    rewards = _means([judgement.values for judgement in judgements], len(answers))
    system = next((name for name in SYSTEMS if isinstance(flat.get(name), str)), None)
    return Group(
        id=row_id({"id": flat["external_id"]} if _named_outside(flat) else flat, default_id),
        prompt=question_turns(flat[column], flat[system] if system else None),
        candidates=[
            candidate(name, answer_turn(answers[name]), rewards[place]) for place, name in enumerate(answers) if place in kept
        ],
        metadata=_metadata(flat, (column, system, *answers), judgements, kept),
        origin=origin,
    )


def notes(row: Row) -> dict[str, int]:
    """How many annotators' answers of a row, which :func:`parse` has read, are not used, and whether it has no other."""
    flat = _flat(row)
    questions = _questions(flat)
    judgements = _judgements(questions, _answers(flat))
    unused = max((question.unused for question in questions), default=0)
    used = [question for judgement in judgements for question in judgement.questions]
    suggested = bool(used) and all(question.suggested for question in used)
    return {**({_UNUSED_NOTE: unused} if unused else {}), **({_SUGGESTED_NOTE: 1} if suggested else {})}


def _metadata(flat: Row, read: Iterable[str | None], judgements: Sequence[Judgement], kept: Sequence[int]) -> dict[str, Any]:
    """What else the record has; the answers' columns that are lists are read too."""
    columns = {name for judgement in judgements for question in judgement.questions for name in _columns_of(question.name)}
    lists = {name for name in LISTS if f"{name}-1" in read and f"{name}-1" not in flat}
    outside = {"external_id"} if _named_outside(flat) else set()
    metadata = row_metadata(flat, {"id", "metadata", *filter(None, read), *columns, *lists, *outside})
    if len(judgements) < 2:
        return metadata
    return {**metadata, "aspects": {one.name: [one.values[place] for place in kept] for one in judgements}}


def _named_outside(flat: Row) -> bool:
    return flat.get("id") is None and flat.get("external_id") is not None


def _flat(row: Row) -> Row:
    """A record as one level of columns, whichever of the shapes it has."""
    fields = row.get("fields")
    if not isinstance(fields, dict):
        return row
    nested = ("fields", "responses", "suggestions", "vectors")
    flat = {**{name: value for name, value in row.items() if name not in nested}, **fields}
    for name, answers in _object(row, "responses").items():
        given = _objects(answers)
        flat[f"{name}.responses"] = [answer.get("value") for answer in given]
        flat[f"{name}.responses.status"] = [answer.get("status") for answer in given]
    for name, suggestion in _object(row, "suggestions").items():
        flat[f"{name}.suggestion"] = suggestion.get("value") if isinstance(suggestion, dict) else suggestion
    return flat


def _object(row: Row, column: str) -> dict[str, Any]:
    found = row.get(column)
    return found if isinstance(found, dict) else {}


def _prompt_column(flat: Mapping[str, Any]) -> str | None:
    return next((name for name in PROMPTS if isinstance(flat.get(name), str | list)), None)


def _answers(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The answers by their columns' names, in the order of their numbers, or those of a list by their places."""
    for column in LISTS:
        found = flat.get(column)
        if isinstance(found, list) and found and all(isinstance(answer, str | None) for answer in found):
            return {f"{column}-{k}": answer for k, answer in enumerate(found, start=1)}
    by_kind: dict[str, dict[int, str]] = {}
    for name, value in flat.items():
        match = _ANSWER.fullmatch(name)
        if match and match[2] and isinstance(value, str | list | None) and not _is_answered(value):
            by_kind.setdefault(match[1], {})[int(match[2])] = name
    numbered = max(by_kind.values(), key=len, default={})
    if numbered:
        return {numbered[number]: flat[numbered[number]] for number in sorted(numbered)}
    single = next((name for name in flat if _ANSWER.fullmatch(name) and isinstance(flat[name], str)), None)
    return {single: flat[single]} if single else {}


def _question_names(flat: Mapping[str, Any]) -> list[str]:
    found = [_bare(name) for name in flat if name.endswith((".responses", ".suggestion", "-suggestion"))]
    found += [name for name, value in flat.items() if _is_answered(value)]
    return list(dict.fromkeys(found))


def _bare(name: str) -> str:
    for suffix in (".responses", ".suggestion", "-suggestion"):
        name = name.removesuffix(suffix)
    return name


def _columns_of(question: str) -> tuple[str, ...]:
    old = (question, f"{question}-suggestion", f"{question}-suggestion-metadata")
    parts = ("responses", "responses.users", "responses.status", "suggestion", "suggestion.score", "suggestion.agent")
    return (*old, *(f"{question}.{part}" for part in parts))


def _is_answered(value: Any) -> bool:
    """Whether a column's value is a list of annotators' answers."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "value" in first and ("user_id" in first or "status" in first)


def _questions(flat: Mapping[str, Any]) -> list[Question]:
    found = []
    for name in _question_names(flat):
        if f"{name}.responses" in flat:
            answers = _with_status(flat, f"{name}.responses")
        else:
            answers = [(answer.get("value"), answer.get("status")) for answer in _objects(flat.get(name))]
        used = [value for value, status in answers if status in _USED and not _is_empty(value)]
        suggestion = flat.get(f"{name}.suggestion", flat.get(f"{name}-suggestion"))
        suggested = not used and not _is_empty(suggestion)
        unused = sum(status not in _USED for _, status in answers)
        found.append(Question(name, [suggestion] if suggested else used, unused, suggested))
    return found


def _with_status(flat: Mapping[str, Any], column: str) -> list[tuple[Any, Any]]:
    """Argilla 2's answers to a question, each with its status."""
    values = [] if flat[column] is None else flat[column]
    if not isinstance(values, list):
        raise DataError(f"{column} is {shown(values)}: a list of the annotators' answers is needed", reason="wrong type")
    statuses = flat.get(f"{column}.status")
    if statuses is None:
        return [(value, None) for value in values]
    if not isinstance(statuses, list) or len(statuses) != len(values):
        raise DataError(
            f"{column}.status is {shown(statuses)}: one for each of the {len(values)} answers is needed", reason="wrong length"
        )
    return list(zip(values, statuses, strict=True))


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, dict) and not any(value.values()))


def _judgements(questions: Sequence[Question], answers: Mapping[str, Any]) -> list[Judgement]:
    """What the questions say of the answers: by rankings, or where there is none by ratings."""
    ranked, columns = [], list(answers)
    for question in questions:
        rankings = [ranks for value in question.values if (ranks := _ranks(value, question.name, columns)) is not None]
        # An answer that is null was not there to be beaten.
        there = [
            [None if answers[name] is None else rank for name, rank in zip(columns, ranks, strict=True)] for ranks in rankings
        ]
        if there:
            shares = [rewards_from_ranks(ranks, question.name) for ranks in there]
            ranked.append(Judgement(question.name, [question], _means(shares, len(columns))))
    return ranked or _rated(questions, columns)


def _ranks(value: Any, question: str, answers: Sequence[str]) -> list[Any] | None:
    """Each answer's rank in one annotator's ranking; None where the value is no ranking."""
    if isinstance(value, str):
        chosen = _place(value, answers)
        return None if chosen is None else [int(place != chosen) for place in range(len(answers))]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        # Argilla 2 exports the names alone, the best first. Labels are lists of strings too.
        places = [_place(option, answers) for option in value]
        ranks = {place: rank for rank, place in enumerate(places)}
        return None if None in ranks else [ranks.get(place) for place in range(len(answers))]
    if not isinstance(value, list | dict) or not (entries := _objects(value)) or not all("rank" in entry for entry in entries):
        return None
    found: list[Any] = [None] * len(answers)
    for entry in entries:
        place = _place(entry.get("value"), answers, by_number=True)
        if place is None:
            unknown = shown(entry.get("value"))
            raise DataError(
                f"{question} ranks {unknown}, which is none of the answers {names(answers)}", reason="unknown answer"
            )
        found[place] = entry["rank"]
    return found


def _objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list, or of an object of lists, as which `datasets` stores them."""
    if isinstance(value, dict):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        if len({len(column) for column in columns.values()}) > 1:
            raise DataError(f"the lists of {names(columns)} differ in length: one entry each is needed", reason="wrong length")
        return [dict(zip(columns, entry, strict=True)) for entry in zip(*columns.values(), strict=True)]
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _place(option: Any, answers: Sequence[str], *, by_number: bool = False) -> int | None:
    """Which answer a question's option names: by its name, but for case and signs, or by a number that one answer has."""
    plain = [_plain(name) for name in answers]
    if (named := _plain(str(option))) in plain:
        return plain.index(named)
    number, numbers = _number(str(option)), [_number(name) for name in answers]
    known = by_number and number is not None and numbers.count(number) == 1
    return numbers.index(number) if known else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _number(name: str) -> int | None:
    """The one number in a name."""
    found = re.findall(r"\d+", name)
    return int(found[0]) if len(found) == 1 and len(found[0]) < 10 else None


def _rated(questions: Sequence[Question], answers: Sequence[str]) -> list[Judgement]:
    """Ratings by the question's name without its number, such as ``generation-rating`` for ``generation-1-rating``."""
    numbers = [_number(name) for name in answers]
    kinds: dict[str, dict[int | None, Question]] = {}
    for question in questions:
        number = _number(question.name)
        if question.values and number in numbers and all(_is_number(value) for value in question.values):
            kinds.setdefault(re.sub(r"[-_. ]?\d+", "", question.name), {})[number] = question
    return [
        Judgement(kind, list(rated.values()), [_rating(rated.get(number)) for number in numbers])
        for kind, rated in kinds.items()
    ]


def _rating(question: Question | None) -> float | None:
    return None if question is None else _mean([number_or_none(value, question.name) for value in question.values])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _means(rows: Sequence[Sequence[float | None]], length: int) -> list[float | None]:
    """The mean at each place over the rows that have a number there."""
    return [_mean([row[place] for row in rows]) for place in range(length)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

"""Judgements in the files of AlpacaEval, Arena-Hard-Auto and FastChat, to and from our records."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ncalign.core.atomic import write_json_atomic, write_jsonl_atomic
from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.sources import rows_of
from ncalign.judging.records import LABELS, Answers, Question, fastchat_id, verdict_weight
from ncalign.rewards.reading import label_of
from ncalign.stats.records import Game, Rating

_WINNERS: Mapping[str, float | None] = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}
_TURN = re.compile(r"(.*) \(turn (\d+)\)", re.DOTALL)

Fields: TypeAlias = Mapping[str, tuple[Callable[[Any], bool], str]]
"""The fields that a row needs: whether a value can be used, and what is needed, for the message."""


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


_ANYTHING = (lambda value: True, "a value")
_TEXT = (lambda value: isinstance(value, str), "a text")
_WINNER = (lambda value: value in tuple(_WINNERS), f"one of {', '.join(_WINNERS)}")
_ANNOTATION: Fields = {
    **dict.fromkeys(("instruction", "output_1", "output_2"), _TEXT),
    "preference": (
        # AlpacaEval writes a missing one as NaN.
        lambda value: value is None or value != value or _is_number(value, 0, 0) or _is_number(value, 1, 2),
        "1 to 2, 0 for a tie, or null",
    ),
}
_JUDGEMENT: Fields = {
    "uid": (lambda value: value is not None, "uid or question_id"),
    "model": _TEXT,
    "games": (lambda value: isinstance(value, list) and len(value) == 2, "a list of two games"),
}
_RATING: Fields = {
    **dict.fromkeys(("question_id", "model"), _ANYTHING),
    "turn": (lambda value: type(value) is int and value >= 1, "1 or 2"),
    "score": (lambda value: value is None or _is_number(value, -1, -1) or _is_number(value, 0, 10), "0 to 10, -1 or null"),
}
_PAIR: Fields = {
    **dict.fromkeys(("question_id", "model_1", "model_2"), _ANYTHING),
    **dict.fromkeys(("g1_winner", "g2_winner"), _WINNER),
}


def _check(row: Mapping[str, Any], fields: Fields, place: str, what: str) -> None:
    """Raise, with the row's place, where a field is lacking or can't be used."""
    lacking = [name for name in fields if name not in row]
    if lacking:
        raise DataError(f"{place} is no {what}: it lacks {names(lacking)}, found {names(row)}")
    for name, (usable, needed) in fields.items():
        if not usable(row[name]):
            raise DataError(f"{place}: {name} is {shown(row[name])}: {needed} is needed")


@dataclass(frozen=True)
class Annotation:
    """A row of AlpacaEval's annotations.

    Attributes:
        instruction: the question's text.
        outputs: the baseline's answer and the model's.
        generators: who wrote them.
        preference: from 1 for the baseline to 2 for the model, 0 and 1.5 for a tie; None where there is none.
        dataset: the part of the question set.
    """

    instruction: str
    outputs: tuple[str, str]
    generators: tuple[str, str]
    preference: float | None
    dataset: str = ""


def read_alpaca_annotations(path: Path) -> list[Annotation]:
    """AlpacaEval's annotations, in the file's order.

    Raises:
        ValueError: the file can't be read, or a row is no annotation; the message says where.
    """
    found = []
    for place, row in rows_of(path):
        _check(row, _ANNOTATION, place, "annotation of AlpacaEval's")
        value = row["preference"]
        found.append(
            Annotation(
                row["instruction"],
                (row["output_1"], row["output_2"]),
                (str(row.get("generator_1") or "output_1"), str(row.get("generator_2") or "output_2")),
                None if value is None or value != value else float(value),
                str(row.get("dataset") or ""),
            )
        )
    return found


def write_alpaca_annotations(
    path: Path,
    questions: Sequence[Question],
    ours: Answers,
    theirs: Answers,
    preferences: Mapping[str, float],
    *,
    annotator: str,
) -> None:
    """Write annotations as `alpaca_eval` reads them: the baseline's output is the first; a missing preference is null.

    Preferences are from 0 (the baseline, ``theirs``) to 1 (the model, ``ours``) by question, NaN where there is none; questions
    may be absent.
    """
    rows = [
        {
            "instruction": question.turns[0],
            "dataset": question.category,
            "generator_1": theirs[question.id].model,
            "output_1": "\n\n".join(theirs[question.id].turns),
            "generator_2": ours[question.id].model,
            "output_2": "\n\n".join(ours[question.id].turns),
            "annotator": annotator,
            "preference": None if math.isnan(preferences[question.id]) else 1 + preferences[question.id],
        }
        for question in questions
        if question.id in preferences
    ]
    write_json_atomic(rows, path)


def read_arena_judgements(path: Path, *, baseline: str | None = None) -> list[Game]:
    """Games of Arena-Hard-Auto's judgement files, of its version 0.1 and 2.0.

    In the first game of a row A is the baseline, in the second the model. A label that is null is a missing verdict.
    ``baseline`` names whom the models were compared with where the file does not (version 0.1).

    Raises:
        ValueError: the file can't be read, or a row is no judgement.
    """
    games = []
    for place, row in rows_of(path):
        row = {"uid": row.get("question_id"), **row}
        _check(row, _JUDGEMENT, place, "judgement of Arena-Hard's")
        other = row.get("baseline", baseline)
        if not isinstance(other, str):
            raise DataError(f"{place} does not name the baseline: give it")
        for game, model_first in zip(row["games"], (False, True), strict=True):
            label = game.get("score") if isinstance(game, dict) else None
            # Spelled as its judge did: version 2.0 keeps A<B and B<<A too.
            said = label_of(label) if isinstance(label, str) else None
            if said is None and label is not None:
                raise DataError(f"{place}: score is {shown(label)}: one of {', '.join(LABELS)}, or null, is needed")
            label, first = said, None if said is None else LABELS[said]
            mine = first if first is None or model_first else 1 - first
            weight = verdict_weight(label or "")
            games.append(Game(str(row["uid"]), row["model"], other, model_first, mine, weight, label or ""))
    return games


def write_arena_judgements(
    games: Iterable[Game], path: Path, *, judge: str, categories: Mapping[str, str] | None = None
) -> None:
    """Write games as Arena-Hard-Auto reads them, in both its versions; both orders of a question make a row.

    A missing verdict is null. Verdicts by log-probs have no label: theirs is that of the preferred answer, or a tie.
    Version 2.0 takes its means by the questions' categories.

    Raises:
        ValueError: a question was judged twice in one order.
    """
    rows = [
        {
            "uid": question,
            "question_id": question,
            "category": (categories or {}).get(question, ""),
            "judge": judge,
            "model": model,
            "baseline": baseline,
            "games": [{"score": _label(game), "judgment": None} for game in played],
        }
        for (question, model, baseline), played in _by_question(games).items()
    ]
    write_jsonl_atomic(rows, path)


def _label(game: Game | None) -> str | None:
    if game is None or game.preference is None:
        return None
    if game.verdict:
        return game.verdict
    first = game.preference if game.model_first else 1 - game.preference
    return "A=B" if first == 0.5 else "A>B" if first > 0.5 else "B>A"


def read_fastchat_ratings(path: Path, *, categories: Mapping[str, str] | None = None) -> list[Rating]:
    """MT-Bench's single-answer judgements; a score of -1 is a missing one. Their categories are given by question.

    Raises:
        ValueError: the file can't be read, or a row is no rating.
    """
    ratings = []
    for place, row in rows_of(path):
        _check(row, _RATING, place, "rating of FastChat's")
        question, score = str(row["question_id"]), None if row["score"] in (None, -1) else float(row["score"])
        ratings.append(Rating(question, str(row["model"]), row["turn"], (categories or {}).get(question, ""), score))
    return ratings


def write_fastchat_ratings(ratings: Iterable[Rating], path: Path, *, judge: str) -> None:
    """Write ratings as FastChat's show_result reads them; a missing one is -1."""
    rows = [
        {
            "question_id": fastchat_id(rating.question),
            "model": rating.model,
            "judge": [judge, "single-v1" if rating.turn == 1 else "single-v1-multi-turn"],
            "user_prompt": "",
            "judgment": "",
            "score": -1 if rating.score is None else rating.score,
            "turn": rating.turn,
            "tstamp": time.time(),
        }
        for rating in ratings
    ]
    write_jsonl_atomic(rows, path)


def read_fastchat_pairs(path: Path) -> list[Game]:
    """MT-Bench's pairwise judgements: model_1 stands first in the first game; ``error`` is a missing verdict.

    Raises:
        ValueError: the file can't be read, or a row is no judgement.
    """
    games: list[Game] = []
    for place, row in rows_of(path):
        _check(row, _PAIR, place, "pairwise judgement of FastChat's")
        turn = row.get("turn", 1)
        question = str(row["question_id"]) if turn == 1 else f"{row['question_id']} (turn {turn})"
        for first, winner in ((True, row["g1_winner"]), (False, row["g2_winner"])):
            games.append(Game(question, str(row["model_1"]), str(row["model_2"]), first, _WINNERS[winner], 1, winner))
    return games


def write_fastchat_pairs(games: Iterable[Game], path: Path, *, judge: str) -> None:
    """Write games as FastChat's show_result reads them; both orders of a question make a row, a missing one is ``error``.

    Raises:
        ValueError: a question was judged twice in one order.
    """
    rows = []
    for (question, model, baseline), (second, first) in _by_question(games).items():
        name = _TURN.fullmatch(question)
        number, turn = (name[1], int(name[2])) if name else (question, 1)
        rows.append(
            {
                "question_id": fastchat_id(number),
                "model_1": model,
                "model_2": baseline,
                "g1_winner": _winner(first),
                "g2_winner": _winner(second),
                "judge": [judge, "pair-v2"],
                "turn": turn,
                "tstamp": time.time(),
            }
        )
    write_jsonl_atomic(rows, path)


def _winner(game: Game | None) -> str:
    if game is None or game.preference is None:
        return "error"
    return "tie" if game.preference == 0.5 else "model_1" if game.preference > 0.5 else "model_2"


def _by_question(games: Iterable[Game]) -> dict[tuple[str, str, str], list[Game | None]]:
    """The two orders of each question and pair of models, the baseline's first; None where one is not there."""
    rows: dict[tuple[str, str, str], list[Game | None]] = {}
    for game in games:
        played = rows.setdefault((game.question, game.model, game.baseline), [None, None])
        if played[game.model_first] is not None:
            raise ValueError(f"question {game.question!r} of {game.model} was judged twice in one order: write one of them")
        played[game.model_first] = game
    return rows


def games_of_annotations(annotations: Sequence[Annotation]) -> list[Game]:
    """Each annotation as a game in both orders, as AlpacaEval shuffles the order and keeps the outcome alone."""
    games = []
    for number, one in enumerate(annotations):
        value = None if one.preference is None else 0.5 if one.preference == 0 else one.preference - 1
        for first in (True, False):
            games.append(Game(str(number), one.generators[1], one.generators[0], first, value))
    return games

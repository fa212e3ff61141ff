"""Judgements in the files of AlpacaEval, Arena-Hard-Auto and FastChat, to and from our records."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncalign.core.atomic import write_json_atomic, write_jsonl_atomic
from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import number_or_none
from ncalign.data.formats.sources import rows_of
from ncalign.judging.records import LABELS, Answer, Question, verdict_weight
from ncalign.stats.records import Game, Rating

_SAME_AS = {"A<B": "B>A", "A<<B": "B>>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}
"""Labels that Arena-Hard-Auto 2.0 takes too."""
_WORDS = {1.0: "A>B", 0.5: "A=B", 0.0: "B>A"}


@dataclass(frozen=True)
class Annotation:
    """A row of AlpacaEval's annotations.

    Attributes:
        instruction: the question's text.
        outputs: the baseline's answer and the model's.
        generators: who wrote them.
        preference: from 1 for the baseline to 2 for the model, 0 and 1.5 for a tie; None where there is none.
        dataset: the part of the question set.
        annotator: who judged.
    """

    instruction: str
    outputs: tuple[str, str]
    generators: tuple[str, str]
    preference: float | None
    dataset: str = ""
    annotator: str = ""


def read_alpaca_annotations(path: Path) -> list[Annotation]:
    """AlpacaEval's annotations, in the file's order.

    Raises:
        ValueError: the file can't be read, or a row is no annotation; the message says where.
    """
    found = []
    for place, row in rows_of(path):
        needed = ("instruction", "output_1", "output_2", "preference")
        lacking = [name for name in needed if name not in row]
        if lacking:
            raise DataError(f"{place} is no annotation of AlpacaEval's: it lacks {names(lacking)}, found {names(row)}")
        for name in needed[:3]:
            if not isinstance(row[name], str):
                raise DataError(f"{place}: {name} is {shown(row[name])}: a text is needed")
        try:
            preference = number_or_none(row["preference"], "preference")
        except DataError:
            # The package writes a missing one as NaN.
            preference = None if row["preference"] != row["preference"] else _refuse(place, row["preference"])
        if preference is not None and preference != 0 and not 1 <= preference <= 2:
            _refuse(place, preference)
        found.append(
            Annotation(
                row["instruction"],
                (row["output_1"], row["output_2"]),
                (str(row.get("generator_1") or "output_1"), str(row.get("generator_2") or "output_2")),
                preference,
                str(row.get("dataset") or ""),
                str(row.get("annotator") or ""),
            )
        )
    return found


def _refuse(place: str, value: object) -> float | None:
    raise DataError(f"{place}: preference is {shown(value)}: 1 to 2, 0 for a tie, or null is needed")


def write_alpaca_annotations(
    path: Path,
    questions: Sequence[Question],
    ours: Mapping[str, Answer],
    theirs: Mapping[str, Answer],
    preferences: Mapping[str, float],
    *,
    annotator: str,
) -> None:
    """Write annotations as `alpaca_eval` reads them: the baseline's output is the first; a missing preference is null.

    Args:
        path: of the file.
        questions: of the set.
        ours: the model's answers by question.
        theirs: the baseline's.
        preferences: 0 (baseline) to 1 (model) by question, NaN where there is none; questions may be absent.
        annotator: what the judge is called.
    """
    rows = []
    for question in questions:
        if question.id not in preferences:
            continue
        value, mine, other = preferences[question.id], ours[question.id], theirs[question.id]
        rows.append(
            {
                "instruction": question.turns[0],
                "dataset": question.category,
                "generator_1": other.model,
                "output_1": "\n\n".join(other.turns),
                "generator_2": mine.model,
                "output_2": "\n\n".join(mine.turns),
                "annotator": annotator,
                "preference": 1 + value if value == value else None,
            }
        )
    write_json_atomic(rows, path)


def read_arena_judgements(path: Path, *, baseline: str | None = None) -> list[Game]:
    """Games of Arena-Hard-Auto's judgement files, of its version 0.1 and 2.0.

    In the first game of a row A is the baseline, in the second the model. A label that is null is a missing verdict.

    Args:
        path: of the file.
        baseline: whom the models were compared with, where the file does not say (version 0.1).

    Raises:
        ValueError: the file can't be read, or a row is no judgement.
    """
    games = []
    for place, row in rows_of(path):
        question, model = row.get("uid", row.get("question_id")), row.get("model")
        other, played = row.get("baseline", baseline), row.get("games")
        if question is None or not isinstance(model, str) or not isinstance(played, list) or len(played) != 2:
            raise DataError(f"{place} is no judgement of Arena-Hard's: uid or question_id, model and two games are needed")
        if not isinstance(other, str):
            raise DataError(f"{place} does not name the baseline: give it")
        for number, game in enumerate(played):
            label = game.get("score") if isinstance(game, dict) else None
            label = _SAME_AS.get(label, label) if isinstance(label, str) else label
            if label is not None and label not in LABELS:
                raise DataError(f"{place}: score is {shown(label)}: one of {', '.join(LABELS)}, or null, is needed")
            games.append(_game(str(question), model, other, label, model_first=number == 1))
    return games


def _game(question: str, model: str, baseline: str, label: str | None, *, model_first: bool) -> Game:
    first = None if label is None else LABELS[label]
    mine = first if first is None or model_first else 1 - first
    weight = verdict_weight(label or "")
    return Game(question, model, baseline, model_first, mine, weight, label or "")


def write_arena_judgements(
    games: Iterable[Game], path: Path, *, judge: str, categories: Mapping[str, str] | None = None
) -> None:
    """Write games as Arena-Hard-Auto reads them, in both its versions; both orders of a question make a row.

    A missing verdict is null. Verdicts by log-probs have no label: theirs is that of the preferred answer, or a tie.

    Args:
        games: of one or more models.
        path: of the file.
        judge: what the judge is called.
        categories: of the questions, by which version 2.0 takes its means.

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
    return _WORDS[0.5 if first == 0.5 else float(first > 0.5)]


def read_fastchat_ratings(path: Path, *, categories: Mapping[str, str] | None = None) -> list[Rating]:
    """MT-Bench's single-answer judgements; a score of -1 is a missing one.

    Args:
        path: of the file.
        categories: of the questions, by id.

    Raises:
        ValueError: the file can't be read, or a row is no rating.
    """
    ratings = []
    for place, row in rows_of(path):
        if not {"question_id", "model", "turn", "score"} <= row.keys():
            raise DataError(f"{place} is no rating of FastChat's: question_id, model, turn and score are needed")
        score = number_or_none(row["score"], "score")
        if type(row["turn"]) is not int or row["turn"] < 1 or (score is not None and score != -1 and not 0 <= score <= 10):
            raise DataError(f"{place}: turn is {shown(row['turn'])} and score {shown(row['score'])}: 1 or 2, and -1 to 10")
        question = str(row["question_id"])
        category = (categories or {}).get(question, "")
        ratings.append(Rating(question, str(row["model"]), row["turn"], category, None if score == -1 else score))
    return ratings


def write_fastchat_ratings(ratings: Iterable[Rating], path: Path, *, judge: str) -> None:
    """Write ratings as FastChat's show_result reads them; a missing one is -1."""
    rows = [
        {
            "question_id": int(rating.question) if rating.question.isdigit() else rating.question,
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


_WINNERS: Mapping[str, float | None] = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}


def read_fastchat_pairs(path: Path) -> list[Game]:
    """MT-Bench's pairwise judgements: model_1 stands first in the first game; ``error`` is a missing verdict.

    Raises:
        ValueError: the file can't be read, or a row is no judgement.
    """
    games: list[Game] = []
    for place, row in rows_of(path):
        winners = [row.get("g1_winner"), row.get("g2_winner")]
        if not {"question_id", "model_1", "model_2"} <= row.keys() or any(winner not in _WINNERS for winner in winners):
            raise DataError(
                f"{place} is no pairwise judgement of FastChat's: question_id, model_1, model_2, and g1_winner and g2_winner, "
                f"each of {', '.join(_WINNERS)}, are needed; found {names(row)}"
            )
        question = _turn_name(row)
        for first, winner in zip((True, False), winners, strict=True):
            value = _WINNERS[str(winner)]
            games.append(Game(question, str(row["model_1"]), str(row["model_2"]), first, value, 1, str(winner)))
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
                "question_id": int(number) if number.isdigit() else number,
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


_TURN = re.compile(r"(.*) \(turn (\d+)\)", re.DOTALL)


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


def _turn_name(row: Mapping[str, Any]) -> str:
    turn: Any = row.get("turn", 1)
    return str(row["question_id"]) if turn == 1 else f"{row['question_id']} (turn {turn})"


def games_of_annotations(annotations: Sequence[Annotation]) -> list[Game]:
    """Each annotation as a game in both orders, as AlpacaEval shuffles the order and keeps the outcome alone."""
    games = []
    for number, one in enumerate(annotations):
        value = None if one.preference is None else 0.5 if one.preference == 0 else one.preference - 1
        for first in (True, False):
            games.append(Game(str(number), one.generators[1], one.generators[0], first, value))
    return games

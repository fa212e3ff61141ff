"""Verdicts of files: AlpacaEval's annotations, Arena-Hard's and FastChat's judgements, and games of an earlier evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ncalign.data.formats.sources import rows_of
from ncalign.judging.counts import Counting, Results, count_games, count_ratings
from ncalign.judging.interop import (
    games_of_annotations,
    read_alpaca_annotations,
    read_arena_judgements,
    read_fastchat_pairs,
    read_fastchat_ratings,
)
from ncalign.judging.readings import pairs_to_read
from ncalign.judging.records import Answer, Question
from ncalign.stats.records import Game, Rating

_GAME = TypeAdapter(Game)


def count_verdicts(
    files: Sequence[Path],
    counting: Counting,
    *,
    baseline: str | None,
    read_categories: Callable[[], Mapping[str, str]],
) -> Results:
    """What AlpacaEval's annotations, and Arena-Hard's and FastChat's judgements, say; a file's rows tell which tool wrote it.

    Args:
        files: of any of them.
        counting: how verdicts are counted.
        baseline: the model that others were compared with, where a file does not say.
        read_categories: gives the questions' categories by id; called where there are ratings.

    Raises:
        ValueError: a file can't be read, or has no verdict.
    """
    results = Results(values={"judgements": [str(path) for path in files]})
    games: list[Game] = []
    ratings: list[Rating] = []
    answers: dict[str, dict[str, Answer]] = {}
    questions: dict[str, Question] = {}
    for path in files:
        first = _first_row(path)
        if "games" in first:
            games += read_arena_judgements(path, baseline=baseline)
        elif "g1_winner" in first:
            games += read_fastchat_pairs(path)
        elif "score" in first and "turn" in first:
            ratings += read_fastchat_ratings(path, categories=read_categories())
        else:
            games += _annotated(path, answers, questions, {game.model for game in games})
    if games:
        counting = replace(counting, places={question: int(question) for given in answers.values() for question in given})
        known = answers if answers and {game.model for game in games} <= answers.keys() else None
        # AlpacaEval keeps a question's outcome but not its orders, so nothing can be said about position bias.
        count_games(games, results, counting, answers=known, ordered=not answers)
        if known is not None:
            results.readings = pairs_to_read(list(questions.values()), known, games, ordered=False)
    if ratings:
        count_ratings(ratings, results, counting)
    return results


def _first_row(path: Path) -> dict[str, Any]:
    with closing(rows_of(path)) as rows:
        _, first = next(rows, ("", None))
    if first is None:
        raise ValueError(f"{path} has no verdict")
    return first


def _annotated(
    path: Path, answers: dict[str, dict[str, Answer]], questions: dict[str, Question], before: set[str]
) -> list[Game]:
    """The games of a file of annotations; the outputs are added to the answers, and the questions to those before."""
    rows = read_alpaca_annotations(path)
    model = _only({row.generators[1] for row in rows}, path, "model")
    baseline = _only({row.generators[0] for row in rows}, path, "baseline")
    if model in before:
        raise ValueError(f"{path}: there are verdicts of {model} in a file before it: name each model once")
    for which, name in enumerate((baseline, model)):
        given = {str(number): Answer(str(number), name, (row.outputs[which],)) for number, row in enumerate(rows)}
        answers.setdefault(name, {}).update(given)
    questions.update({str(k): Question(str(k), (row.instruction,), row.dataset) for k, row in enumerate(rows)})
    return games_of_annotations(rows)


def _only(found: set[str], path: Path, what: str) -> str:
    if len(found) != 1:
        raise ValueError(f"{path} has annotations of more than one {what}: {', '.join(sorted(found)[:5])}; make a file of each")
    return next(iter(found))


def read_games(path: Path) -> list[Game]:
    """The games.jsonl of an evaluation.

    Raises:
        ValueError: the file can't be read, or a row is no game.
    """
    games = []
    for place, row in rows_of(path):
        try:
            games.append(_GAME.validate_python(row))
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            where = ".".join(map(str, wrong["loc"]))
            raise ValueError(f"{place} is no game of ours: {where}{': ' if where else ''}{wrong['msg']}") from None
    return games

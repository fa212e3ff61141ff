"""`ncalign evaluate`: answers judged, other tools' verdicts counted, or reasoning tasks, by what the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ncalign.judging.compare import evaluate_answers, names_of, read_games
from ncalign.judging.config import EvaluateConfig
from ncalign.judging.counts import Counting, Results, check_folder, count_games, count_ratings, write_results
from ncalign.judging.interop import (
    games_of_annotations,
    read_alpaca_annotations,
    read_arena_judgements,
    read_fastchat_pairs,
    read_fastchat_ratings,
)
from ncalign.judging.records import Answer
from ncalign.judging.sets import read_questions, rows_of
from ncalign.report.tables import Column, Table
from ncalign.stats.length_control import read_difficulty_table
from ncalign.stats.records import Game, Rating
from ncalign.tasks.lm_backend import Backend
from ncalign.tasks.reasoning import TaskProtocol, run_tasks
from ncalign.tasks.reasoning_table import paper_table


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, and leave ``results.json``, tables and charts in the output folder.

    Returns:
        What results.json holds, and the tables as printable text under ``text``.

    Raises:
        ValueError: the configuration names nothing that can be evaluated, or a file or model can't be read.
        ServerError: a judge answers nothing at all; what it answered is kept.
    """
    check_folder(config.output_dir)
    if config.tasks:
        results = _reasoning(config)
    elif config.judgements:
        results = _counted(config)
    else:
        results = evaluate_answers(config)
    return write_results(results, config.output_dir)


# -- verdicts of other tools -----------------------------------------------------------------------------------------------


def _counted(config: EvaluateConfig) -> Results:
    """What files of AlpacaEval's annotations, or of Arena-Hard's or FastChat's judgements, say; each told by its rows."""
    results = Results(values={"judgements": [str(path) for path in config.judgements]})
    games: list[Game] = []
    ratings: list[Rating] = []
    answers: dict[str, dict[str, Answer]] = {}
    annotated = False
    for path in config.judgements:
        first = _first_row(path)
        if "games" in first:
            games += read_arena_judgements(path, baseline=config.against[0] if config.against else None)
        elif "g1_winner" in first:
            games += read_fastchat_pairs(path)
        elif "score" in first and "turn" in first:
            questions = read_questions(config.set_name, file=config.set_file) if config.set_file is not None else []
            ratings += read_fastchat_ratings(path, categories={question.id: question.category for question in questions})
        else:
            annotated = True
            games += _annotated(path, answers, {game.model for game in games})
    places = {question: int(question) for given in answers.values() for question in given}
    table = None if config.difficulty_table is None else read_difficulty_table(config.difficulty_table)
    counting = Counting(config.seed, config.num_resamples, table, places)
    if games:
        known = answers if annotated and {game.model for game in games} <= answers.keys() else None
        other_judge = None if config.compare_games is None else read_games(config.compare_games)
        # AlpacaEval keeps a question's outcome and not its orders: there is nothing to say of places.
        count_games(games, results, counting, answers=known, ordered=not annotated, other_judge=other_judge)
    if ratings:
        count_ratings(ratings, results, counting)
    return results


def _first_row(path: Path) -> dict[str, Any]:
    with closing(rows_of(path)) as rows:
        for _, row in rows:
            return row
    raise ValueError(f"{path} has no verdict")


def _annotated(path: Path, answers: dict[str, dict[str, Answer]], before: set[str]) -> list[Game]:
    """The games of a file of annotations; the outputs are added to the answers."""
    rows = read_alpaca_annotations(path)
    model = _only({row.generators[1] for row in rows}, path, "model")
    baseline = _only({row.generators[0] for row in rows}, path, "baseline")
    if model in before:
        raise ValueError(f"{path}: there are verdicts of {model} in a file before it: name each model once")
    for name, which in ((model, 1), (baseline, 0)):
        given = answers.setdefault(name, {})
        for number, row in enumerate(rows):
            given[str(number)] = Answer(str(number), name, (row.outputs[which],))
    return games_of_annotations(rows)


def _only(found: set[str], path: Path, what: str) -> str:
    if len(found) != 1:
        raise ValueError(f"{path} has annotations of more than one {what}: {', '.join(sorted(found)[:5])}; make a file of each")
    return next(iter(found))


# -- reasoning -------------------------------------------------------------------------------------------------------------


def _reasoning(config: EvaluateConfig) -> Results:
    """Tasks on the model and on those it is compared with, as the papers tabulate them: the baseline stands first."""
    if config.model is None:
        raise ValueError("model is needed: a model folder, a hub id, or the name that a backend knows")
    models = [*config.against, config.model]
    found = [_tasks_of(config, model, name) for model, name in zip(models, names_of(models), strict=True)]
    columns, rows = paper_table(found)
    results = Results(values={"models": found})
    caption = "Accuracy in percent; arrows say whether a score rose or fell against the first row."
    results.tables["reasoning"] = Table(tuple(map(Column, columns)), tuple(map(tuple, rows)), caption)
    others = [task for one in found for task in one["results"]]
    results.tables["tasks"] = Table(
        (
            Column("model"),
            Column("task"),
            Column("score (%)"),
            Column("standard error"),
            Column("questions"),
            Column("measure"),
        ),
        tuple(
            (
                one["model"],
                task,
                100 * score["score"],
                None if score["stderr"] is None else 100 * score["stderr"],
                score["num_samples"],
                score["metric"],
            )
            for one in found
            for task, score in one["results"].items()
        ),
        "Every task, as it was scored.",
    )
    if not others:
        del results.tables["tasks"]
    for one in found:
        results.lines += [f"{one['model']}: task {task} failed: {reason}" for task, reason in one["failed"].items()]
    if config.limit is not None:
        results.lines.append(f"At most {config.limit} questions a task: these are not the tasks' own scores")
    return results


def _tasks_of(config: EvaluateConfig, model: str, name: str) -> dict[str, Any]:
    return run_tasks(
        model,
        config.tasks,
        output_dir=config.output_dir / "tasks" / model.strip("/").replace("/", "--"),
        task_data=_pairs(config.task_data, "task_data", "TASK=FILE is needed, such as svamp=data/SVAMP.json"),
        name=name,
        backend=Backend(
            name=config.backend,
            arguments=_pairs(
                config.backend_args, "backend_args", "NAME=VALUE is needed, such as base_url=http://localhost:8000"
            ),
            batch_size=config.batch_size,
            # lm-eval takes a GPU for granted.
            device=None if torch.cuda.is_available() or config.backend != "hf" else "cpu",
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        ),
        protocol=TaskProtocol(config.limit, config.num_fewshot, config.apply_chat_template, config.seed),
        allow_weak=config.allow_weak,
    )


def _pairs(given: Sequence[str], field: str, needed: str) -> dict[str, str]:
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"{field} is {one!r}: {needed}")
        found[name.strip()] = value.strip()
    return found

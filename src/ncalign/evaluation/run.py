"""`ncalign evaluate`: answers judged, other tools' verdicts counted, or reasoning tasks, by what the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.config import EvaluateConfig
from ncalign.evaluation.charts import interval_chart
from ncalign.evaluation.evaluate import Results, check_folder, evaluate_answers, write_results
from ncalign.evaluation.interop import Annotation, games_of_annotations, read_alpaca_annotations
from ncalign.evaluation.length_control import LengthControlled, length_controlled_win_rate, read_difficulty_table
from ncalign.evaluation.preferences import question_preferences
from ncalign.evaluation.reasoning import CodeSettings, run_tasks
from ncalign.evaluation.reasoning_table import paper_table
from ncalign.evaluation.summaries import json_ready, win_rate_table
from ncalign.evaluation.tables import Column, Table
from ncalign.evaluation.win_rate import WinRate, win_rate


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
    """Win rates of AlpacaEval's annotation files, a model each."""
    table = None if config.difficulty_table is None else read_difficulty_table(config.difficulty_table)
    rates: dict[str, WinRate] = {}
    controlled: dict[str, LengthControlled] = {}
    baselines = set()
    for path in config.judgements:
        rows = read_alpaca_annotations(path)
        name = _only({row.generators[1] for row in rows}, path, "model")
        baselines.add(_only({row.generators[0] for row in rows}, path, "baseline"))
        if name in rates:
            raise ValueError(f"{path}: there are annotations of {name} in a file before it: name each model once")
        preferences = question_preferences(games_of_annotations(rows)).preferences
        rates[name] = win_rate(preferences, seed=config.seed)
        ours, theirs = _lengths(rows, 1), _lengths(rows, 0)
        if len(set((ours - theirs).tolist())) > 1:
            controlled[name] = length_controlled_win_rate(
                preferences, ours, theirs, table=table, seed=config.seed, num_resamples=config.num_resamples
            )
    baseline = ", ".join(sorted(baselines))
    chart = {
        "win rate": {name: (rate.win_rate, rate.ci) for name, rate in rates.items()},
        "length-controlled": {name: (found.win_rate, found.ci) for name, found in controlled.items()},
    }
    return Results(
        values={"baseline": baseline, "win_rates": json_ready(rates), "length_controlled": json_ready(controlled)},
        tables={"win_rates": win_rate_table(rates, controlled, baseline=baseline)},
        charts={"win_rates.png": interval_chart(chart, title=f"Win rate against {baseline}", unit="%", reference=50)},
    )


def _only(found: set[str], path: Path, what: str) -> str:
    if len(found) != 1:
        raise ValueError(f"{path} has annotations of more than one {what}: {', '.join(sorted(found)[:5])}; make a file of each")
    return next(iter(found))


def _lengths(rows: Sequence[Annotation], which: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([len(row.outputs[which]) for row in rows], dtype=np.int64)


# -- reasoning -------------------------------------------------------------------------------------------------------------


def _reasoning(config: EvaluateConfig) -> Results:
    """Tasks on the model and on those it is compared with, as the papers tabulate them: the baseline stands first."""
    if config.model is None:
        raise ValueError("model is needed: a model folder, a hub id, or the name that a backend knows")
    found = [_tasks_of(config, model) for model in (*config.against, config.model)]
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


def _tasks_of(config: EvaluateConfig, model: str) -> dict[str, Any]:
    name = Path(model).name or model
    return run_tasks(
        model,
        config.tasks,
        output_dir=config.output_dir / "tasks" / model.strip("/").replace("/", "--"),
        task_data=_task_data(config.task_data),
        name=name,
        backend=config.backend,
        batch_size=config.batch_size,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        dtype=config.dtype,
        apply_chat_template=config.apply_chat_template,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        code=CodeSettings(allow_weak=config.allow_weak),
    )


def _task_data(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for one in given:
        task, equals, path = one.partition("=")
        if not equals or not task or not path:
            raise ValueError(f"task_data is {one!r}: TASK=FILE is needed, such as svamp=data/SVAMP.json")
        found[task.strip()] = path.strip()
    return found

"""Scores of models on reasoning tasks, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ncalign.judging.counts import Results
from ncalign.report.tables import Table, columns
from ncalign.tasks.lm_backend import Backend
from ncalign.tasks.reasoning import TaskProtocol, run_tasks
from ncalign.tasks.reasoning_table import paper_table


def score_tasks(
    models: Mapping[str, str],
    tasks: Sequence[str],
    *,
    folder: Path,
    task_data: Mapping[str, str],
    backend: Backend,
    protocol: TaskProtocol,
    allow_weak: bool,
) -> Results:
    """Tasks on each model, tabulated as in the papers.

    Args:
        models: folders, hub ids, or names that the backend knows, by what tables call them; the first is the baseline.
        tasks: names of tasks.
        folder: for what each model answered.
        task_data: files of tasks that read one.
        backend: what loads and runs the models.
        protocol: how questions are asked.
        allow_weak: run answers that are programs where the sandbox has no walls.
    """
    found = [
        run_tasks(
            model,
            tasks,
            output_dir=folder / model.strip("/").replace("/", "--"),
            task_data=task_data,
            name=name,
            backend=backend,
            protocol=protocol,
            allow_weak=allow_weak,
        )
        for name, model in models.items()
    ]
    names, rows = paper_table(found)
    results = Results(values={"models": found})
    caption = "Accuracy in percent; arrows say whether a score rose or fell against the first row."
    results.tables["reasoning"] = Table(columns(*names), tuple(map(tuple, rows)), caption)
    every = tuple(
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
    )
    if every:
        heads = columns("model", "task", "score (%)", "standard error", "questions", "measure")
        results.tables["tasks"] = Table(heads, every, "Every task, as it was scored.")
    for one in found:
        results.lines += [f"{one['model']}: task {task} failed: {reason}" for task, reason in one["failed"].items()]
    if protocol.limit is not None:
        results.lines.append(f"At most {protocol.limit} questions a task: these are not the tasks' own scores")
    return results

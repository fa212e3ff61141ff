"""Scores of models on reasoning tasks, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ncalign.judging.counts import Results
from ncalign.report.tables import Table, columns
from ncalign.stats.intervals import share_interval
from ncalign.tasks.reasoning_table import paper_table


def tabulate_tasks(found: Sequence[Mapping[str, Any]], *, limit: int | None) -> Results:
    """What `run_tasks` gave for each model, the baseline first, tabulated as in the papers."""
    names, rows = paper_table(found)
    results = Results(values={"models": found})
    caption = "Accuracy in percent; arrows say whether a score rose or fell against the first row, be it by chance."
    reasons = {("", ""): "the task was not run", ("", names[-1]): "none of these tasks was run"}
    results.tables["reasoning"] = Table(columns(*names), tuple(map(tuple, rows)), caption, reasons)
    every = []
    for one in found:
        for task, score in one["results"].items():
            error = None if score["stderr"] is None else 100 * score["stderr"]
            bounds = share_interval(score["score"], score["num_samples"], standard_error=score["stderr"])
            low, high = (100 * bound for bound in bounds)
            every.append((one["model"], task, 100 * score["score"], low, high, error, score["num_samples"], score["metric"]))
        results.lines += [f"{one['model']}: task {task} failed: {reason}" for task, reason in one["failed"].items()]
    if every:
        heads = columns("model", "task", "score (%)", "low", "high", "standard error", "questions", "measure")
        caption = "Every task, as it was scored; low and high bound 95 % intervals (score intervals)."
        without = {("", "standard error"): "lm-eval gives none for this measure"}
        without |= {("", bound): "one question, or a score that is no share, has no interval" for bound in ("low", "high")}
        results.tables["tasks"] = Table(heads, tuple(every), caption, without)
    if limit is not None:
        results.lines.append(f"At most {limit} questions a task: these are not the tasks' own scores")
    return results

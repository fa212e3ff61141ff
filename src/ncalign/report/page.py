"""The page of a training run: plots of its metrics, the comparison before and after, answers side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ncalign.core.json import read_results
from ncalign.core.logs import read_log
from ncalign.report.html import label_axes, png, write_run_page

PLOTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "nats", ("loss",)),
    ("Log-prob change since the start", "nats", ("logps/chosen_change", "logps/rejected_change")),
    ("Implicit rewards", "beta x log-ratio", ("rewards/chosen", "rewards/rejected")),
    ("Pairs ordered as their rewards", "share", ("rewards/accuracies",)),
    ("Kernel entropy", "nats", ("kernel/entropy",)),
    ("Entropy of the target weights", "nats", ("targets/entropy",)),
    ("Negatives that out-score the positive", "share", ("negatives/above_positive",)),
    ("Gradient norm", "", ("grad_norm",)),
)
_NAMES = {
    "logps/chosen_change": "chosen",
    "logps/rejected_change": "negatives",
    "rewards/chosen": "chosen",
    "rewards/rejected": "negatives",
}


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder from its metrics.jsonl and results.json, and return its path.

    Raises:
        ValueError: the folder has no metrics.jsonl with a line in it.
    """
    metrics = plot(read_metrics(run_folder / "metrics.jsonl"))
    results_file = run_folder / "results.json"
    results = read_results(results_file) if results_file.is_file() else {}
    answers = results.pop("answers", ())  # before the results are shown
    return write_run_page(
        run_folder,
        "run",
        method=results.get("method", run_folder.name),
        comparison=results.get("comparison"),
        notes=results.get("notes", ()),
        metrics=metrics,
        answers=answers,
        results=json.dumps(results, indent=2),
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged training steps of a metrics.jsonl; damaged lines are told, and left out.

    Raises:
        ValueError: it has no logged step.
    """
    rows = [row for row in read_log(path, key="step") if "loss" in row] if path.is_file() else []
    if not rows:
        raise ValueError(f"{path} has no logged steps: a report needs the folder of a run that trained")
    return rows


def plot(rows: Sequence[Mapping[str, float]]) -> bytes:
    """A PNG with one panel for each kind of metric that the run logged."""
    panels = [
        (title, unit, found) for title, unit, names in PLOTS if (found := [n for n in names if any(n in r for r in rows)])
    ]
    num_rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 2.8 * num_rows), layout="constrained")
    for position, (title, unit, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, 2, position)
        for metric in names:
            points = [(row["step"], row[metric]) for row in rows if isinstance(row.get(metric), int | float)]
            axes.plot(
                [step for step, _ in points], [value for _, value in points], marker=".", label=_NAMES.get(metric, metric)
            )
        label_axes(axes, title, "optimizer step", unit)
    return png(figure)

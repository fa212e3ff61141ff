"""A study's page, tables and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ncalign.core.logs import read_log
from ncalign.report.charts import interval_chart, label, write_chart
from ncalign.report.html import label_axes, png, write_run_page
from ncalign.report.tables import Table, write_table
from ncalign.stats.intervals import Interval
from ncalign.study.spec import Study

TABLES = ("claims.csv", "claims.tex", "arms.csv", "arms.tex")
FIGURE, PAGE = "figure.svg", "report.html"
CURVES: tuple[tuple[str, str, str], ...] = (
    ("logps/chosen_change", "Log-prob of the preferred since the start", "nats"),
    ("logps/rejected_change", "Log-prob of the negatives since the start", "nats"),
    ("rewards/margins", "Margin of implicit rewards", "beta x log-ratio"),
    ("rewards/accuracies", "Pairs ordered as their rewards", "share"),
    ("kernel/entropy", "Kernel entropy", "nats"),
    ("loss", "Loss", "nats"),
)
Steps = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
"""The logged steps of each run, by arm."""


def logged_steps(folders: Mapping[str, Sequence[Path]]) -> dict[str, list[list[dict[str, float]]]]:
    """The logged steps of the runs in these folders, by arm; a run without any is left out."""
    found: dict[str, list[list[dict[str, float]]]] = {}
    for arm, runs in folders.items():
        rows = ([row for row in read_log(path, key="step") if "loss" in row] for path in runs if path.is_file())
        found[arm] = [one for one in rows if one]
    return found


def plot_curves(steps: Steps) -> bytes | None:
    """A PNG with a panel for each metric that was logged: a line for each arm, the mean of its seeds; None without any."""
    panels = [curve for curve in CURVES if any(curve[0] in row for runs in steps.values() for rows in runs for row in rows)]
    if not panels:
        return None
    num_rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 3.2 * num_rows), layout="constrained")
    for position, (metric, title, unit) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, 2, position)
        for arm, runs in steps.items():
            points = _mean_curve(runs, metric)
            if points:
                axes.plot([step for step, _ in points], [value for _, value in points], marker=".", label=label(arm))
        label_axes(axes, title, "optimizer step", unit)
    return png(figure)


def _mean_curve(runs: Sequence[Sequence[Mapping[str, float]]], metric: str) -> list[tuple[float, float]]:
    """The mean over runs at each step that all of them logged."""
    curves = [{row["step"]: row[metric] for row in rows if isinstance(row.get(metric), int | float)} for rows in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(step, float(np.mean([curve[step] for curve in curves]))) for step in shared]


def figure_of(study: Study, found: Mapping[str, Any]) -> Figure | None:
    """The main measure of each arm with its interval; None where no arm has one."""
    main = study.measures[0]
    rows = {row["arm"]: row for row in found["arms"] if row["measure"] == main}
    values = {arm: (float(row["mean"]), _interval(row["interval"])) for arm, row in rows.items()}
    if not values:
        return None
    return interval_chart({str(main): values}, title=study.file.claim or study.name, unit=main)


def _interval(ends: Sequence[float | None]) -> Interval:
    low, high = (float("nan") if end is None else end for end in ends)
    return low, high


def write_outputs(folder: Path, study: Study, found: Mapping[str, Any], *, claims: Table, arms: Table, steps: Steps) -> Path:
    """Write the tables, the figure and the page of a study into its folder, and return the page's path."""
    for name in TABLES:
        write_table(claims if name.startswith("claims") else arms, folder / name)
    figure = figure_of(study, found)
    if figure is not None:
        write_chart(figure, folder / FIGURE)
    return write_run_page(
        folder,
        "study",
        study=study.name,
        claim=study.file.claim,
        source=study.file.source,
        comparisons=found["comparisons"],
        claims=claims,
        arms=arms,
        failed=found["failed"],
        figure=None if figure is None else png(figure),
        curves=plot_curves(steps),
        results=json.dumps(found, indent=2),
    )

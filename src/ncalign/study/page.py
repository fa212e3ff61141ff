"""A study's page, tables and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.core.logs import read_log
from ncalign.report.charts import interval_chart, write_chart
from ncalign.report.html import write_run_page
from ncalign.report.plots import Chart, Series
from ncalign.report.tables import write_table
from ncalign.stats.intervals import Interval
from ncalign.study.analysis import CAPTION, arms_table, claims_table
from ncalign.study.runs import RUNS

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


def curve_charts(steps: Steps) -> list[Chart]:
    """A chart for each metric that was logged: a line for each arm, the mean of its seeds."""
    found = []
    for metric, title, unit in CURVES:
        lines = [
            Series(arm, points, colour=k)
            for k, (arm, runs) in enumerate(steps.items())
            if (points := _mean_curve(runs, metric))
        ]
        if lines:
            found.append(Chart(title, "step", unit, lines, group="steps"))
    return found


def _mean_curve(runs: Sequence[Sequence[Mapping[str, float]]], metric: str) -> list[tuple[float, float]]:
    """The mean over runs at each step that all of them logged."""
    curves = [{row["step"]: row[metric] for row in rows if isinstance(row.get(metric), int | float)} for rows in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(step, float(np.mean([curve[step] for curve in curves]))) for step in shared]


def measured_arms(found: Mapping[str, Any]) -> dict[str, tuple[float, Interval]]:
    """The main measure of each arm that has it, with its interval."""
    main = found["measures"][0]
    rows = {row["arm"]: row for row in found["arms"] if row["measure"] == main}
    return {arm: (float(row["mean"]), _interval(row["interval"])) for arm, row in rows.items()}


def _interval(ends: Sequence[float | None]) -> Interval:
    low, high = (float("nan") if end is None else end for end in ends)
    return low, high


def _measure_chart(found: Mapping[str, Any]) -> Chart | None:
    values = measured_arms(found)
    if not values:
        return None
    points = [(value, place, *interval) for place, (value, interval) in enumerate(values.values())]
    main = str(found["measures"][0])
    return Chart(f"{main}, 95 % intervals", main, "", [Series(main, points, "dots")], categories=list(values), across=True)


def write_outputs(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write the tables, the figure and the page of a study into its folder, and return the page's path.

    Args:
        folder: of the study, with its runs.
        found: what study.json holds.
    """
    claims, arms = claims_table(found["comparisons"], caption=CAPTION), arms_table(found)
    for name in TABLES:
        write_table(claims if name.startswith("claims") else arms, folder / name)
    values, main = measured_arms(found), str(found["measures"][0])
    if values:
        figure = interval_chart({main: values}, title=found["claim"] or found["study"], unit=main)
        write_chart(figure, folder / FIGURE)
    return write_page(folder, found)


def write_page(folder: Path, found: Mapping[str, Any], page: Path | None = None) -> Path:
    """Write the page of a study into its folder, or where ``page`` says, and return its path."""
    metrics = {
        arm: [folder / RUNS / arm / f"seed-{seed}" / "metrics.jsonl" for seed in range(found["seeds"])]
        for arm in found["arm_settings"]
    }
    return write_run_page(
        folder,
        "study",
        page,
        study=found["study"],
        claim=found["claim"],
        source=found["source"],
        claims=claims_table(found["comparisons"], caption=CAPTION),
        arms=arms_table(found),
        failed=found["failed"],
        measures=_measure_chart(found),
        curves=curve_charts(logged_steps(metrics)),
        results=json.dumps(found, indent=2, ensure_ascii=False),
    )

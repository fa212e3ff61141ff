"""The page of several runs: a table that sorts, their evaluations, the settings that differ, their metrics overlaid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ncalign.report.html import render
from ncalign.report.page import PLOTS
from ncalign.report.plots import Chart, Series, lines_of
from ncalign.report.runs import HELD_OUT, SAMPLES, TRAINED, Run, evaluation_table, evaluations_of, read_samples, runs_table
from ncalign.report.samples import last_answers, side_by_side
from ncalign.report.settings import differing
from ncalign.report.tables import Column, Table, columns


def several_page(runs: Sequence[Run], *, title: str = "", comparison: Mapping[str, Any] | None = None) -> str:
    """The page as HTML.

    Args:
        runs: of `train`, `online`, `demo`, `evaluate` and `audit`.
        title: of the page; default: the runs' names.
        comparison: what was compared of them, as a demo's results have it.

    Raises:
        ValueError: there is a study among them, which has a page of its own.
    """
    if wrong := next((run for run in runs if run.kind in ("study", "online demo")), None):
        raise ValueError(
            f"{wrong.folder} is a {wrong.kind}, which compares runs itself: give it alone for its page, or the runs in it"
        )
    trained = [run for run in runs if run.kind in TRAINED]
    audits = {run.name: run for run in runs if run.kind == "audit"}
    evaluations = [one for run in runs if run.kind == "evaluation" for one in evaluations_of(run)]
    return render(
        "several",
        title=title or _title(runs),
        comparison=_comparison_table(comparison or {}),
        runs=runs_table(trained, evaluations) if trained else None,
        evaluated=evaluation_table(evaluations, trained),
        win_rates=_win_rate_charts([run for run in runs if run.kind == "evaluation"]),
        settings=differing({run.name: run.settings for run in trained}) if len(trained) > 1 else None,
        compared=len(trained),
        charts=overlaid(trained),
        audits=_audit_table(audits),
        trained=[run.name for run in trained],
        samples=side_by_side([last_answers(read_samples(run.folder / SAMPLES)) for run in trained]),
        results={run.name: json.dumps(_short(run.results), indent=2, ensure_ascii=False) for run in runs if run.results},
    )


def _title(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _short(results: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the run's own page shows to read."""
    return {name: value for name, value in results.items() if name not in ("answers", "page")}


def _comparison_table(comparison: Mapping[str, Any]) -> Table | None:
    rows = [
        (name, row["before"], row["after"], row["difference"], *row["difference_interval"], row["p_value"])
        for name, row in comparison.items()
    ]
    caption = "Low and high bound the difference's 95 % interval (score interval); p: paired permutation test, uncorrected."
    heads = columns("", "before", "after", "difference", "low", "high", "p", digits=4)
    return Table(heads, tuple(rows), caption) if rows else None


def overlaid(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each metric of the runs' pages that one of them logged: a colour for each run, held-out groups dashed."""
    found = []
    for title, unit, names in PLOTS:
        for metric, label in names.items():
            lines: list[Series] = []
            for colour, run in enumerate(runs):
                series = lines_of(run.rows, "step", {metric: run.name, HELD_OUT + metric: f"{run.name}, held out"})
                lines += [replace(one, colour=colour, dashed=one.name != run.name) for one in series]
            if lines:
                found.append(Chart(title if len(names) == 1 else f"{title}: {label}", "step", unit, lines, group="steps"))
    return found


def _win_rate_charts(evaluations: Sequence[Run]) -> list[Chart]:
    found = []
    for run in evaluations:
        rates: Mapping[str, Any] = run.results.get("win_rates", {})
        controlled: Mapping[str, Any] = run.results.get("length_controlled", {})
        if chart := win_rate_chart(rates, controlled, baseline=str(run.results.get("baseline", "")), title=run.name):
            found.append(chart)
    return found


def win_rate_chart(rates: Mapping[str, Any], controlled: Mapping[str, Any], *, baseline: str, title: str = "") -> Chart | None:
    """Win rates with their intervals, a line for each model; of what results.json has, None without any."""
    names = sorted(rates, key=lambda name: -rates[name]["win_rate"])
    series = []
    for measure, found in (("win rate", rates), ("length-controlled", controlled)):
        points = [
            (found[name]["win_rate"], place, *found[name]["ci"])
            for place, name in enumerate(names)
            if name in found and found[name]["win_rate"] is not None
        ]
        series += [Series(measure, points, "dots")] if points else []
    if not series:
        return None
    head = f"{title}: win rate against {baseline}" if title else f"Win rate against {baseline}"
    return Chart(head, "%, 95 % intervals", "", series, categories=names, across=True, even=[50.0])


def _audit_table(audits: Mapping[str, Run]) -> Table | None:
    """The audits' numbers side by side; None without any."""
    if not audits:
        return None
    numbers = {name: run.results.get("numbers", {}) for name, run in audits.items()}
    rows = [
        (name, *(found.get(name) for found in numbers.values()))
        for name in dict.fromkeys(n for one in numbers.values() for n in one)
    ]
    reasons = {("", ""): "too few groups to tell, or nothing in them that it could be computed from"}
    return Table((Column("number"), *columns(*numbers, digits=4)), tuple(rows), reasons=reasons)

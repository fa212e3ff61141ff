"""The page of an evaluation: win rates, the answers that judges disagree about, every table with the reasons of its dashes."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ncalign.core.json import read_results
from ncalign.report.html import write_run_page
from ncalign.report.plots import Chart, Series
from ncalign.report.runs import RESULTS
from ncalign.report.several_page import win_rate_chart
from ncalign.report.tables import Table, from_json

READINGS = "pairs.jsonl"
"""Pairs of answers with what was said of them."""
MOST_READ, LONGEST = 400, 6000
"""Pairs on a page, and characters of each text."""
_FIRST, _LAST = ("win_rates", "ratings", "reasoning", "win_matrix", "comparisons"), ("judge",)
_TITLES = {
    "win_rates": "Win rates",
    "ratings": "Ratings",
    "reasoning": "Reasoning tasks",
    "tasks": "Every task",
    "win_matrix": "Every pair of models",
    "comparisons": "Models on the same questions",
    "judge": "The judge",
    "arena_hard": "Arena-Hard scores",
    "strengths": "Strengths",
    "strengths_style_controlled": "Strengths, style controlled",
}
_JUDGES, _ORDERS, _MISSING, _OTHERS = range(4)
_WORDS = {_JUDGES: "judges disagree", _ORDERS: "the judge's orders disagree", _MISSING: "no verdict"}


def write_evaluation_page(folder: Path, page: Path | None = None) -> Path:
    """Write the page of an evaluation into its folder, or where ``page`` says, and return its path.

    It reads results.json, ``tables/`` and pairs.jsonl.

    Raises:
        ValueError: a file is damaged.
    """
    results = read_results(folder / RESULTS)
    tables = _tables(folder)
    rows, left_out = read_pairs(folder / READINGS)
    charts = [_rates(results), _ratings(results)]
    return write_run_page(
        folder,
        "evaluation",
        page,
        facts=_facts(results),
        notes=results.get("notes", ()),
        charts=[chart for chart in charts if chart is not None],
        main={name: table for name, table in tables.items() if name in _FIRST[:3]},
        tables={name: table for name, table in tables.items() if name not in _FIRST[:3]},
        titles={name: _TITLES.get(name, name.replace("_", " ")) for name in tables},
        pairs=rows,
        left_out=left_out,
        columns=_columns(rows),
        results=json.dumps(results, indent=2, ensure_ascii=False),
    )


def _facts(results: Mapping[str, Any]) -> list[str]:
    facts = []
    if "set" in results:
        facts += [f"{results['questions']} questions of {Path(str(results['set'])).name}"]
    facts += [f"baseline {results['baseline']}"] if results.get("baseline") else []
    for account in results.get("verdicts", ()):
        facts += [f"judged by {account['mode']}"] if f"judged by {account['mode']}" not in facts else []
    return [*facts, *([f"{missing} verdicts are missing"] if (missing := results.get("missing_verdicts")) else [])]


def _tables(folder: Path) -> dict[str, Table]:
    """The evaluation's tables, the ones that are looked at first in front."""
    found = {path.stem: from_json(read_results(path)) for path in sorted((folder / "tables").glob("*.json"))}
    order = [*_FIRST, *(name for name in found if name not in (*_FIRST, *_LAST)), *_LAST]
    return {name: found[name] for name in order if name in found}


def _rates(results: Mapping[str, Any]) -> Chart | None:
    return win_rate_chart(
        results.get("win_rates", {}), results.get("length_controlled", {}), baseline=str(results.get("baseline", ""))
    )


def _ratings(results: Mapping[str, Any]) -> Chart | None:
    """Mean ratings by category, bars with their intervals."""
    scores: Sequence[Mapping[str, Any]] = results.get("ratings", ())
    categories = sorted({name for score in scores for name in score["categories"]})
    series = []
    for score in scores:
        known = [(k, score["categories"][name]) for k, name in enumerate(categories) if name in score["categories"]]
        bars = [(k, one["mean"], *one["ci"]) for k, one in known if one["mean"] is not None]
        series += [Series(score["model"], bars, "bars")] if bars else []
    return Chart("Ratings by category", "category", "mean rating", series, categories=categories) if series else None


def read_pairs(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The pairs that are to be read first, with an ``outcome`` each, and how many more there are.

    First those about which two judges disagree, then those about which a judge's two orders do, those without a verdict, and
    those whose ratings are furthest apart.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return [], 0
    count = 0

    def ranked() -> Iterator[tuple[int, float, int, dict[str, Any]]]:
        nonlocal count
        with path.open(encoding="utf-8") as file:
            for count, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    kind, distance = _kind(row)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(f"{path}:{count} is damaged ({error}): delete the file, and run evaluate again") from error
                yield kind, -distance, count, row

    # Counts differ, so that rows are never compared.
    first = heapq.nsmallest(MOST_READ, ranked())
    rows = [{**_cut(row), "outcome": _WORDS.get(kind) or _outcome(row)} for kind, _, _, row in first]
    return rows, count - len(rows)


def _kind(row: Mapping[str, Any]) -> tuple[int, float]:
    """Why a pair is to be read, and how far what was said of it lies apart."""
    if "rating" in row:
        known = row["rating"] is not None and row["baseline_rating"] is not None
        return (_OTHERS, abs(row["rating"] - row["baseline_rating"])) if known else (_MISSING, 0.0)
    mine, other = row["preference"], row.get("other_judge")
    first, second = row.get("shown_first"), row.get("shown_second")
    if mine is not None and other is not None and (mine - 0.5) * (other - 0.5) < 0:
        return _JUDGES, abs(mine - other)
    if first is not None and second is not None and (first - 0.5) * (second - 0.5) < 0:
        return _ORDERS, abs(first - second)
    return (_MISSING if mine is None else _OTHERS), 0.0


def _outcome(row: Mapping[str, Any]) -> str:
    mine, theirs = (row["rating"], row["baseline_rating"]) if "rating" in row else (row["preference"], 0.5)
    return "won" if mine > theirs else "lost" if mine < theirs else "tied"


def _cut(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair with texts that are not too long to read, and which says so."""

    def short(text: str) -> str:
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text)} characters in all)"

    return {name: short(value) if isinstance(value, str) else value for name, value in row.items()}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of numbers that pairs have, by field, with what heads them."""
    heads = {
        "preference": "preference",
        "shown_first": "shown first",
        "shown_second": "shown second",
        "other_judge": "other judge",
        "rating": "rating",
        "baseline_rating": "baseline's rating",
    }
    return {field: head for field, head in heads.items() if any(field in row for row in rows)}

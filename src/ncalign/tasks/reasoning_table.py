"""Reasoning results as in the papers' tables: a row for each model, with arrows where it differs from the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("BBH (CoT)", ("bbh_cot_fewshot", "bbh", "bbh_cot_zeroshot")),
    ("LeetCode", ("leetcode",)),
    ("HumanEval", ("humaneval",)),
    ("GSM-Plus", ("gsm_plus", "gsm_plus_mini")),
    ("MATH", ("hendrycks_math", "minerva_math", "hendrycks_math500", "minerva_math500")),
    ("TheoremQA", ("theoremqa",)),
    ("SVAMP", ("svamp",)),
    ("ASDiv", ("asdiv_cot", "asdiv_cot_llama", "asdiv")),
)
"""The papers' columns, each with the tasks that fill it: the first of them that a model was evaluated on."""
MISSING = "–"


def paper_table(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the papers' table, in percent with one digit.

    An arrow says that the digits shown differ from those of the first row. Scores of different tasks, or of one task with other
    settings, are not compared. An average over fewer than all columns says how many it covers, and has an arrow only where the
    first row's average covers the same ones.

    Args:
        results: what :func:`ncalign.tasks.reasoning.run_tasks` returned for each model, the one to compare with first.

    >>> before = {"model": "sft", "results": {"svamp": {"score": 0.269}, "humaneval": {"score": 0.281}}}
    >>> after = {"model": "nca", "results": {"svamp": {"score": 0.653}, "humaneval": {"score": 0.267}}}
    >>> columns, rows = paper_table([before, after])
    >>> after_row = rows[1]
    >>> after_row.count("–"), "26.7 ↓" in after_row, "65.3 ↑" in after_row, "46.0 ↑ (2 of 8)" in after_row
    (6, True, True, True)
    """
    rows: list[list[str]] = []
    baseline: list[_Cell] = [None] * len(COLUMNS)
    for result in results:
        cells = _cells(result)
        shown = [_shown(mine, theirs) for mine, theirs in zip(cells, baseline, strict=True)]
        rows.append([str(result["model"]), *shown, _average(cells, baseline)])
        if len(rows) == 1:
            baseline = cells
    return ["Model", *(title for title, _ in COLUMNS), "Avg."], rows


# A cell: its score in percent, and what it may be compared with.
_Cell = tuple[float, Any] | None


def _cells(result: Mapping[str, Any]) -> list[_Cell]:
    tasks = result["results"]
    found = [next((name for name in names if name in tasks), None) for _, names in COLUMNS]
    return [None if name is None else (100 * tasks[name]["score"], [name, tasks[name].get("protocol")]) for name in found]


def _shown(cell: _Cell, other: _Cell) -> str:
    if cell is None:
        return MISSING
    return f"{cell[0]:.1f}" + (_arrow(cell[0], other[0]) if other is not None and other[1] == cell[1] else "")


def _average(own: Sequence[_Cell], other: Sequence[_Cell]) -> str:
    mine, theirs = [cell for cell in own if cell is not None], [cell for cell in other if cell is not None]
    if not mine:
        return MISSING
    mean = sum(cell[0] for cell in mine) / len(mine)
    comparable = [cell[1] for cell in mine] == [cell[1] for cell in theirs]
    arrow = _arrow(mean, sum(cell[0] for cell in theirs) / len(theirs)) if comparable else ""
    return f"{mean:.1f}{arrow}" + ("" if len(mine) == len(own) else f" ({len(mine)} of {len(own)})")


def _arrow(value: float, baseline: float) -> str:
    shown, before = float(f"{value:.1f}"), float(f"{baseline:.1f}")
    return " ↓" if shown < before else " ↑" if shown > before else ""

"""Reasoning results as the papers tabulate them: a row a model, arrows where it changed against its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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


def paper_table(
    results: Sequence[Mapping[str, Any]],
    *,
    baselines: Sequence[int | None] | None = None,
    arrows: Literal["both", "falls"] = "both",
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the papers' table, in percent with one digit.

    An arrow stands where the digits shown differ from those of the row's baseline. Scores of different tasks, or of one task
    with other settings, are not compared. An average over fewer than all columns says over how many, and has an arrow only
    where the baseline's is over the same ones.

    Args:
        results: what :func:`ncalign.tasks.reasoning.run_tasks` returned for each model, before first.
        baselines: for each row the number of the row that it is compared with, or None; by default the first.
        arrows: ``falls`` leaves out those of rises, as the papers do.

    Raises:
        ValueError: there are not as many baselines as results, or one is no row.

    >>> before = {"model": "sft", "results": {"svamp": {"score": 0.269}, "humaneval": {"score": 0.281}}}
    >>> after = {"model": "nca", "results": {"svamp": {"score": 0.653}, "humaneval": {"score": 0.267}}}
    >>> columns, rows = paper_table([before, after])
    >>> after_row = rows[1]
    >>> after_row.count("–"), "26.7 ↓" in after_row, "65.3 ↑" in after_row, "46.0 ↑ (2 of 8)" in after_row
    (6, True, True, True)
    """
    against = [None if row == 0 else 0 for row in range(len(results))] if baselines is None else list(baselines)
    if len(against) != len(results) or any(row is not None and not 0 <= row < len(results) for row in against):
        raise ValueError(f"baselines is {against} for {len(results)} results: a number of a row, or None, is needed for each")
    cells = [_cells(result) for result in results]
    rows = []
    for result, own, row in zip(results, cells, against, strict=True):
        other = [None] * len(own) if row is None else cells[row]
        texts = [_shown(mine, theirs, arrows) for mine, theirs in zip(own, other, strict=True)]
        rows.append([str(result["model"]), *texts, _average(own, other, arrows)])
    return ["Model", *(title for title, _ in COLUMNS), "Avg."], rows


# A cell: its score in percent, and what it may be compared with.
_Cell = tuple[float, Any] | None


def _cells(result: Mapping[str, Any]) -> list[_Cell]:
    tasks = result["results"]
    found = [next((name for name in names if name in tasks), None) for _, names in COLUMNS]
    return [None if name is None else (100 * tasks[name]["score"], [name, tasks[name].get("protocol")]) for name in found]


def _shown(cell: _Cell, other: _Cell, arrows: str) -> str:
    if cell is None:
        return MISSING
    comparable = other is not None and other[1] == cell[1]
    return f"{cell[0]:.1f}{_arrow(cell[0], other[0], arrows) if comparable and other is not None else ''}"


def _average(own: Sequence[_Cell], other: Sequence[_Cell], arrows: str) -> str:
    mine, theirs = [cell for cell in own if cell is not None], [cell for cell in other if cell is not None]
    if not mine:
        return MISSING
    mean = sum(cell[0] for cell in mine) / len(mine)
    comparable = [cell[1] for cell in mine] == [cell[1] for cell in theirs]
    arrow = _arrow(mean, sum(cell[0] for cell in theirs) / len(theirs), arrows) if comparable else ""
    return f"{mean:.1f}{arrow}" + ("" if len(mine) == len(own) else f" ({len(mine)} of {len(own)})")


def _arrow(value: float, baseline: float, arrows: str) -> str:
    shown, before = float(f"{value:.1f}"), float(f"{baseline:.1f}")
    if shown < before:
        return " ↓"
    return " ↑" if shown > before and arrows == "both" else ""

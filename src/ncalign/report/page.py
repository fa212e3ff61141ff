"""The page of a training run or a demo: answers before and after, held-out groups, its metrics, its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ncalign.core.progress import say
from ncalign.data.rendering import transcript
from ncalign.report.html import write_run_page
from ncalign.report.plots import Chart, Series, lines_of
from ncalign.report.runs import (
    HELD_OUT,
    SAMPLES,
    evaluation_table,
    evaluations_in,
    evaluations_of,
    is_held_out,
    read_metrics,
    read_run,
    read_samples,
    results_of,
)
from ncalign.report.settings import flat_settings, read_settings
from ncalign.report.tables import Column, Table

PLOTS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("Loss", "nats", {"loss": "loss"}),
    (
        "Log-prob change since the start",
        "nats",
        {"logps/chosen_change": "chosen", "logps/rejected_change": "negatives"},
    ),
    ("Implicit rewards", "beta × log-ratio", {"rewards/chosen": "chosen", "rewards/rejected": "negatives"}),
    ("Pairs ordered as their rewards", "share", {"rewards/accuracies": "accuracy"}),
    ("Kernel entropy", "nats", {"kernel/entropy": "entropy"}),
    ("Entropy of the target weights", "nats", {"targets/entropy": "entropy"}),
    ("Negatives that out-score the positive", "share", {"negatives/above_positive": "share"}),
    ("Gradient norm", "", {"grad_norm": "norm"}),
)
_STEPS_OF_SAMPLES = 4
_ROOM_FOR_OTHERS = 60
"""Charts of a page's further metrics, at most."""


def write_report(run_folder: Path, page: Path | None = None) -> Path:
    """Write the page of a run folder, into it or where ``page`` says, and return its path.

    It reads metrics.jsonl, results.json, config.yaml, all but the first of which may be missing, and evaluations in the folder.

    Raises:
        ValueError: the folder has no metrics.jsonl with a line in it, or a file is damaged.
    """
    rows = read_metrics(run_folder / "metrics.jsonl")
    results = results_of(run_folder)
    answers = results.pop("answers", ())  # before the results are shown
    samples = read_samples(run_folder / SAMPLES)
    training = results.get("training", results)
    main, others = metric_charts(rows)
    evaluated = [one for folder in evaluations_in(run_folder) for one in evaluations_of(read_run(folder))]
    return write_run_page(
        run_folder,
        "run",
        page,
        method=results.get("method", ""),
        facts=_facts(rows, training),
        comparison=results.get("comparison"),
        notes=results.get("notes", ()),
        evaluated=evaluation_table(evaluated),
        held_out=held_out_table(rows, training),
        charts=main,
        others=others,
        answers=answers,
        sample_heads=["prompt", *(f"step {step}" for step in sampled_at(samples))],
        samples=samples_by_prompt(samples),
        settings=flat_settings(read_settings(run_folder)),
        results=json.dumps(results, indent=2, ensure_ascii=False) if results else "",
    )


def report_at_end(run_folder: Path, *, first: bool) -> None:
    """Write the page of a run that has just ended, which does not fail for want of it; the ``first`` process does."""
    try:
        if first:
            write_report(run_folder)
    except (OSError, ValueError) as error:
        say(f"warning: no page was written ({error}); `ncalign report {run_folder}` tries again")


def sampled_at(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps whose samples are shown: all of them, or the first, the last and others evenly between.

    >>> sampled_at([{"step": step} for step in range(0, 100, 10)])
    [0, 30, 60, 90]
    """
    steps = sorted({int(row["step"]) for row in rows})
    if len(steps) <= _STEPS_OF_SAMPLES:
        return steps
    apart = (len(steps) - 1) / (_STEPS_OF_SAMPLES - 1)
    return [steps[round(apart * place)] for place in range(_STEPS_OF_SAMPLES)]


def samples_by_prompt(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str | None]]]:
    """Each prompt with its answers at the steps that are shown; None where there is none.

    >>> samples_by_prompt([{"step": 0, "id": "a", "prompt": "2 + 2 =", "completion": "5"}])
    [('2 + 2 =', ['5'])]
    """
    steps, prompts, found = sampled_at(rows), dict[str, str](), dict[tuple[str, int], str]()
    for row in rows:
        prompt = row["prompt"]
        prompts.setdefault(str(row.get("id")), prompt if isinstance(prompt, str) else transcript(prompt))
        found[str(row.get("id")), int(row["step"])] = row["completion"]
    return [(prompt, [found.get((name, step)) for step in steps]) for name, prompt in prompts.items()]


def metric_charts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """A chart for each kind of metric that the run logged, and one for each further metric."""
    named = {metric for _, _, names in PLOTS for metric in names}
    main = [
        Chart(title, "step", unit, series, group="steps")
        for title, unit, names in PLOTS
        if (series := _with_held_out(rows, names))
    ]
    further = dict.fromkeys(name.removeprefix(HELD_OUT) for row in rows for name in row if name != "step")
    others = [
        Chart(name, "step", "", series, group="steps")
        for name in sorted(further)
        if name not in named and (series := _with_held_out(rows, {name: "training"}))
    ]
    return main, others[:_ROOM_FOR_OTHERS]


def _with_held_out(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Series]:
    """Lines of the training steps, and dashed in the same colour those of the held-out groups."""
    series = []
    for colour, (metric, name) in enumerate(names.items()):
        lines = lines_of(rows, "step", {metric: name, HELD_OUT + metric: f"{name}, held out" if len(names) > 1 else "held out"})
        series += [replace(line, colour=colour, dashed=line.name.endswith("held out")) for line in lines]
    return series


def held_out_table(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Table | None:
    """The metrics of held-out groups before training and at the last evaluation; None where none were held out."""
    evaluated = [row for row in rows if is_held_out(row)]
    before, after = results.get("before"), results.get("after")
    if not isinstance(before, Mapping) and evaluated:
        before = evaluated[0]
    if not isinstance(after, Mapping) or not is_held_out(after):
        after = evaluated[-1] if evaluated else None
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return None
    names = [name for name in after if name.startswith(HELD_OUT) and isinstance(after[name], int | float)]
    cells = [(name.removeprefix(HELD_OUT), _number(before, name), float(after[name])) for name in names]
    changed = [(name, first, last, None if first is None else last - first) for name, first, last in cells]
    heads = (Column("held-out groups"), *(Column(name, 4) for name in ("before", "after", "change")))
    reasons = {("", "before"): "not measured before training", ("", "change"): "not measured before training"}
    return Table(heads, tuple(changed), reasons=reasons) if changed else None


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def _facts(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[str]:
    """What stands below the heading."""
    if "steps" not in results:
        return [f"not finished: step {max(row['step'] for row in rows)} is the last one logged"]
    data = results.get("data", {})
    found = [f"{results['steps']} steps"]
    found += [f"{data['groups_trained_on']} groups trained on"] if "groups_trained_on" in data else []
    found += [f"{data['groups_held_out']} held out"] if data.get("groups_held_out") else []
    found += [str(results[name]) for name in ("dtype",) if name in results]
    found += [f"seed {results['seed']}"] if "seed" in results else []
    return [*found, *([f"{results['seconds']:.0f} s"] if "seconds" in results else [])]

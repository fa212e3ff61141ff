"""The page of an online run: its rounds' rewards, drift and health, where the time went, and what was sampled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ncalign.core.json import read_results
from ncalign.report.html import write_run_page
from ncalign.report.page import metric_charts
from ncalign.report.plots import Chart, Point, Series
from ncalign.report.runs import read_metrics, results_of
from ncalign.report.samples import shown_text
from ncalign.report.settings import flat_settings, read_settings

DRIFT_LIMIT = 0.1
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward of the samples", "", (("reward/mean", "mean"), ("reward/best", "best of a group"))),
    ("Groups without spread", "share", (("groups/without_spread", "groups"),)),
    ("Entropy", "nats a token", (("completions/entropy", "entropy"),)),
    ("Distinct words and pairs", "share", (("completions/distinct_1", "distinct-1"), ("completions/distinct_2", "distinct-2"))),
    ("Length", "tokens", (("completions/tokens", "tokens"),)),
    ("Endings and repetitions", "share", (("completions/finished", "ended by EOS"), ("completions/duplicates", "repeated"))),
)
_EXAMPLES = 12


def write_rounds_report(
    run_folder: Path,
    rounds: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    *,
    method: str,
    page: Path | None = None,
) -> Path:
    """Write ``report.html`` into the folder of an online run, with its metrics.jsonl and rounds/, and return its path.

    Args:
        run_folder: of the run.
        rounds: what the rounds' ``round.json`` hold, in order.
        evaluation: steps and mean rewards of the held-out prompts; empty where there are none.
        method: its name.
        page: where else the page is to be.
    """
    main, others = metric_charts(read_metrics(run_folder / "metrics.jsonl"))
    results = results_of(run_folder)
    return write_run_page(
        run_folder,
        "online",
        page,
        method=method,
        rounds=rounds,
        round_charts=round_charts(rounds, evaluation),
        charts=main,
        others=others,
        samples=_samples(run_folder / "rounds" / f"{rounds[-1]['round'] - 1:03d}" / "pool.jsonl"),
        settings=flat_settings(read_settings(run_folder)),
        results=json.dumps(results, indent=2, ensure_ascii=False) if results else "",
    )


def rewrite_rounds_report(run_folder: Path, page: Path | None = None) -> Path:
    """The same from the files of the folder alone, finished or not.

    Raises:
        ValueError: no round has ended, or a file is damaged.
    """
    files = sorted((run_folder / "rounds").glob("[0-9]*/round.json"))
    if not files:
        raise ValueError(f"{run_folder} has no round that ended: there is nothing to show yet")
    rounds = [read_results(path) for path in files]
    settings, results = read_settings(run_folder), results_of(run_folder)
    objective = settings.get("objective")
    method = results.get("method") or (objective.get("name", "") if isinstance(objective, dict) else "")
    return write_rounds_report(run_folder, rounds, _evaluation(run_folder, rounds, results), method=str(method), page=page)


def _evaluation(run_folder: Path, rounds: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Steps and mean rewards of the held-out prompts, as far as they were answered."""
    known = results.get("evaluation")
    if isinstance(known, Mapping):
        return known
    means: list[float | None] = []
    files = [run_folder / "rounds" / f"{row['round'] - 1:03d}" / "evaluation.json" for row in rounds]
    for path in files:
        if not path.is_file():
            return {}
        rewards = [row["reward"] for row in read_results(path).get("content", ()) if row["reward"] is not None]
        means.append(math.fsum(rewards) / len(rewards) if rewards else None)
    return {"steps": [row["start"] for row in rounds], "mean_reward": means}


def round_charts(rounds: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> list[Chart]:
    """A chart for each kind of number that rounds have."""
    found = []
    logged = zip(evaluation.get("steps", ()), evaluation.get("mean_reward", ()), strict=False)
    if points := [(step, mean) for step, mean in logged if mean is not None]:
        found.append(Chart("Held-out prompts, greedy", "step", "mean reward", [Series("held out", points)]))
    measured = [row for row in rounds if row["drift"] is not None]
    if measured:
        named = (("kl", "KL(generating ‖ current)"), ("preferred", "KL(preferred ‖ policy), change"))
        drifts = [Series(label, [_drift(row, name) for row in measured], "dots") for name, label in named]
        title = "Drift at the round's end, on prompts not trained on"
        found.append(Chart(title, "round", "nats a completion", drifts, even=[DRIFT_LIMIT]))
    for title, unit, lines in _PANELS:
        series = [
            Series(label, points)
            for name, label in lines
            if (points := [(row["round"], row["health"][name]) for row in rounds if row["health"].get(name) is not None])
        ]
        if series:
            found.append(Chart(title, "round", unit, series))
    return found


def _drift(row: Mapping[str, Any], name: str) -> Point:
    """A round's drift; with its interval, where there is one."""
    low, high = row["drift"].get(f"{name}_interval") or (None, None)
    value = row["drift"][name]
    return (row["round"], value) if low is None or high is None else (row["round"], value, low, high)


def _samples(pool: Path) -> list[dict[str, Any]]:
    """The best and the worst completion of some prompts of a round; none where the round kept no candidates."""
    if not pool.is_file():
        return []
    rows = []
    with pool.open(encoding="utf-8") as file:
        for group in map(json.loads, islice(file, _EXAMPLES)):
            scored = [candidate for candidate in group["candidates"] if candidate["reward"] is not None]
            if scored:
                scored.sort(key=lambda candidate: candidate["reward"])
                worst, best = ({"text": shown_text(c["completion"]), "reward": c["reward"]} for c in (scored[0], scored[-1]))
                rows.append({"prompt": shown_text(group["prompt"]), "best": best, "worst": worst})
    return rows

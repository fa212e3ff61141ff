"""The page of an online run: its rounds' rewards, drift and health, where the time went, and what was sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncalign.report.html import label_axes, png, write_run_page
from ncalign.report.page import plot, read_metrics

DRIFT_LIMIT = 0.1
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward of the samples", "", (("reward/mean", "mean"), ("reward/best", "best of a group"))),
    ("Groups without spread", "share", (("groups/without_spread", ""),)),
    ("Entropy", "nats a token", (("completions/entropy", ""),)),
    ("Distinct words and pairs", "share", (("completions/distinct_1", "distinct-1"), ("completions/distinct_2", "distinct-2"))),
    ("Length", "tokens", (("completions/tokens", ""),)),
    ("Endings and repetitions", "share", (("completions/finished", "ended by EOS"), ("completions/duplicates", "repeated"))),
)
_EXAMPLES = 3


def write_rounds_report(
    run_folder: Path, rounds: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], *, method: str
) -> Path:
    """Write ``report.html`` into the folder of an online run, with its metrics.jsonl and rounds/, and return its path.

    Args:
        run_folder: of the run.
        rounds: what the rounds' ``round.json`` hold, in order.
        evaluation: steps and mean rewards of the held-out prompts; empty where there are none.
        method: its name.
    """
    return write_run_page(
        run_folder,
        "online",
        method=method,
        rounds=rounds,
        pictures={"rounds": plot_rounds(rounds, evaluation), "metrics": plot(read_metrics(run_folder / "metrics.jsonl"))},
        samples=_samples(run_folder / "rounds" / f"{rounds[-1]['round'] - 1:03d}" / "pool.jsonl"),
    )


def plot_rounds(rounds: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> bytes:
    """A PNG with a panel for each kind of number."""
    figure = Figure(figsize=(11, 11.2), layout="constrained")
    places = iter(figure.subplots(4, 2).flat)
    _plot_evaluation(next(places), evaluation)
    _plot_drift(next(places), rounds)
    numbers = [row["round"] for row in rounds]
    for title, unit, lines in _PANELS:
        axes = next(places)
        for name, label in lines:
            axes.plot(numbers, [row["health"].get(name, float("nan")) for row in rounds], marker="o", label=label)
        label_axes(axes, title, "round", unit)
        axes.set_xticks(numbers)
    return png(figure)


def _plot_evaluation(axes: Axes, evaluation: Mapping[str, Any]) -> None:
    logged = zip(evaluation.get("steps", ()), evaluation.get("mean_reward", ()), strict=False)
    if points := [(step, mean) for step, mean in logged if mean is not None]:
        axes.plot(*zip(*points, strict=True), marker="o")
    else:
        axes.text(0.5, 0.5, "no prompts were held out", ha="center", va="center", transform=axes.transAxes)
    label_axes(axes, "Held-out prompts, greedy", "optimizer step", "mean reward")


def _plot_drift(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    measured = [row for row in rounds if row["drift"] is not None]
    for name, label in (("kl", "KL(generating ‖ current)"), ("preferred", "KL(preferred ‖ policy), change")):
        values = np.array([row["drift"][name] for row in measured], dtype=np.float64)
        bounds = np.array([row["drift"][f"{name}_interval"] for row in measured], dtype=np.float64).reshape(-1, 2).T
        # Where there is no interval, none is drawn.
        arms = np.nan_to_num(np.abs(bounds - values))
        axes.errorbar([row["round"] for row in measured], values, yerr=arms, marker="o", capsize=3, label=label)
    axes.axhline(DRIFT_LIMIT, color="0.5", linestyle="--")
    label_axes(axes, "Drift at the round's end, on prompts not trained on", "round", "nats a completion")
    axes.set_xticks([row["round"] for row in rounds])


def _samples(pool: Path) -> list[dict[str, Any]] | None:
    """The best and the worst completion of a few prompts of a round; None where the round kept no candidates."""
    if not pool.is_file():
        return None
    rows = []
    with pool.open(encoding="utf-8") as file:
        for group in map(json.loads, islice(file, _EXAMPLES)):
            scored = [candidate for candidate in group["candidates"] if candidate["reward"] is not None]
            if scored:
                scored.sort(key=lambda candidate: candidate["reward"])
                worst, best = ({"text": _text(c["completion"]), "reward": c["reward"]} for c in (scored[0], scored[-1]))
                rows.append({"prompt": _text(group["prompt"]), "best": best, "worst": worst})
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(f"{message['role']}: {message['content']}" for message in value)

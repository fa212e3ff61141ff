"""One HTML page of an online run: its rounds' rewards, drift and health, where the time went, and what was sampled."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncalign.core.atomic import write_text_atomic
from ncalign.report.page import embedded, head, plot, read_metrics

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
    """Write ``report.html`` into the folder of an online run.

    Args:
        run_folder: of the run, with its metrics.jsonl and rounds/.
        rounds: what the rounds' ``round.json`` hold, in order.
        evaluation: steps and mean rewards of the held-out prompts; empty where there are none.
        method: its name.

    Returns:
        The page's path.
    """
    page = run_folder / "report.html"
    last = run_folder / "rounds" / f"{rounds[-1]['round'] - 1:03d}" / "pool.jsonl"
    parts = [
        head(run_folder.name),
        f"<h1>{escape(method)}, online: {len(rounds)} rounds, {rounds[-1]['end']} steps</h1>",
        _alarms(rounds),
        f'<h2>Rounds</h2><img alt="rewards, drift and health by round" src="{embedded(plot_rounds(rounds, evaluation))}">',
        _table(rounds),
        f'<h2>Training</h2><img alt="metrics by step" src="{embedded(plot(read_metrics(run_folder / "metrics.jsonl")))}">',
        _samples(last),
    ]
    write_text_atomic("\n".join(part for part in parts if part) + "\n", page)
    return page


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
        _labelled(axes, title, "round", unit)
        axes.set_xticks(numbers)
        if len(lines) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot_evaluation(axes: Axes, evaluation: Mapping[str, Any]) -> None:
    points = [
        (s, m) for s, m in zip(evaluation.get("steps", ()), evaluation.get("mean_reward", ()), strict=False) if m is not None
    ]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o")
    else:
        axes.text(0.5, 0.5, "no prompts were held out", ha="center", va="center", transform=axes.transAxes)
    _labelled(axes, "Held-out prompts, greedy", "optimizer step", "mean reward")


def _plot_drift(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    measured = [row for row in rounds if row["drift"] is not None]
    for name, label in (("kl", "KL(generating ‖ current)"), ("reverse_kl", "KL(current ‖ generating)")):
        values = [row["drift"][name] for row in measured]
        below, above = (
            [abs(row["drift"][f"{name}_interval"][side] - row["drift"][name]) for row in measured] for side in (0, 1)
        )
        axes.errorbar([row["round"] for row in measured], values, yerr=[below, above], marker="o", capsize=3, label=label)
    axes.axhline(DRIFT_LIMIT, color="0.5", linestyle="--")
    _labelled(axes, "Drift at the round's end", "round", "nats a completion")
    axes.set_xticks([row["round"] for row in rounds])
    axes.legend()


def _labelled(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _alarms(rounds: Sequence[Mapping[str, Any]]) -> str:
    items = [f"<li>round {row['round']}: {escape(alarm)}" for row in rounds for alarm in row["alarms"]]
    return "<h2>Alarms</h2><ul>" + "".join(items) + "</ul>" if items else ""


def _table(rounds: Sequence[Mapping[str, Any]]) -> str:
    head_row = "<table><tr><th>round<th>steps<th>prompts<th>trained on<th>tokens sampled<th>time</tr>"
    rows = []
    for row in rounds:
        counts = row["counts"]
        total = sum(row["seconds"].values()) or 1.0
        time = ", ".join(f"{escape(name)} {seconds / total:.0%}" for name, seconds in row["seconds"].items())
        rows.append(
            f"<tr><td>{row['round']}<td>{row['start'] + 1}–{row['end']}<td>{counts['prompts']}<td>{counts['groups_trained_on']}"
            f"<td>{counts['tokens']}<td>{total:.0f} s: {time}</tr>"
        )
    return head_row + "".join(rows) + "</table>"


def _samples(pool: Path) -> str:
    """The best and the worst completion of a few prompts of the last round."""
    if not pool.is_file():
        return ""
    rows = []
    with pool.open(encoding="utf-8") as file:
        for line in islice(file, _EXAMPLES):
            group = json.loads(line)
            scored = [candidate for candidate in group["candidates"] if candidate["reward"] is not None]
            if not scored:
                continue
            ordered = sorted(scored, key=lambda candidate: candidate["reward"])
            cells = "".join(
                f"<td><pre>{escape(_text(c['completion']))}</pre><small>reward {c['reward']:.3g}</small>"
                for c in (ordered[-1], ordered[0])
            )
            rows.append(f"<tr><td><pre>{escape(_text(group['prompt']))}</pre>{cells}</tr>")
    return "<h2>Samples of the last round</h2><table><tr><th>prompt<th>best<th>worst</tr>" + "".join(rows) + "</table>"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(f"{message['role']}: {message['content']}" for message in value)

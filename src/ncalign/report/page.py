"""One HTML page from a run folder: plots of the metrics, the comparison before and after, answers side by side.

The page needs no network and no script; every text that a model or a data set wrote is escaped.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ncalign.core.atomic import write_text_atomic

PLOTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "nats", ("loss",)),
    ("Log-prob change since the start", "nats", ("logps/chosen_change", "logps/rejected_change")),
    ("Implicit rewards", "beta x log-ratio", ("rewards/chosen", "rewards/rejected")),
    ("Pairs ordered as their rewards", "share", ("rewards/accuracies",)),
    ("Kernel entropy", "nats", ("kernel/entropy",)),
    ("Entropy of the target weights", "nats", ("targets/entropy",)),
    ("Negatives that out-score the positive", "share", ("negatives/above_positive",)),
    ("Gradient norm", "", ("grad_norm",)),
)
_NAMES = {
    "logps/chosen_change": "chosen",
    "logps/rejected_change": "negatives",
    "rewards/chosen": "chosen",
    "rewards/rejected": "negatives",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
color: #1a1a1a; background: #fff }
table { border-collapse: collapse; width: 100% } th, td { border-bottom: 1px solid #ddd; padding: .4rem .6rem; text-align: left;
vertical-align: top; overflow-wrap: anywhere } img { width: 100% } pre { white-space: pre-wrap; margin: 0; font-size: .85rem }
.big { font-size: 1.3rem }
"""


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder from its metrics.jsonl and results.json.

    Returns:
        The page's path.

    Raises:
        ValueError: the folder has no metrics.jsonl with a line in it.
    """
    rows = read_metrics(run_folder / "metrics.jsonl")
    results_file = run_folder / "results.json"
    results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.is_file() else {}
    page = run_folder / "report.html"
    write_text_atomic(render(run_folder.name, rows, results), page)
    return page


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged training steps of a metrics.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows: list[dict[str, float]] = [json.loads(line) for line in lines]
    rows = [row for row in rows if "loss" in row]
    if not rows:
        raise ValueError(f"{path} has no logged steps: a report needs the folder of a run that trained")
    return rows


def render(name: str, rows: Sequence[Mapping[str, float]], results: Mapping[str, Any]) -> str:
    """The page as HTML."""
    image = embedded(plot(rows))
    parts = [
        head(name),
        f"<h1>{escape(str(results.get('method', name)))}</h1>",
        comparison_table(results.get("comparison", {})),
        f'<h2>Training</h2><img alt="metrics by step" src="{image}">',
        _answers(results.get("answers", ())),
        f"<h2>results.json</h2><pre>{escape(json.dumps({k: v for k, v in results.items() if k != 'answers'}, indent=2))}</pre>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def head(name: str) -> str:
    """The beginning of a page."""
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>ncalign: {escape(name)}</title><style>{_STYLE}</style>"


def embedded(image: bytes) -> str:
    """A PNG as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def plot(rows: Sequence[Mapping[str, float]]) -> bytes:
    """A PNG with one panel for each kind of metric that the run logged."""
    panels = [
        (title, unit, found) for title, unit, names in PLOTS if (found := [n for n in names if any(n in r for r in rows)])
    ]
    num_rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 2.8 * num_rows), layout="constrained")
    for position, (title, unit, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, 2, position)
        for metric in names:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            axes.plot(*zip(*points, strict=True), marker=".", label=_NAMES.get(metric, metric))
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def comparison_table(comparison: Mapping[str, Mapping[str, Any]]) -> str:
    """Before and after with intervals; empty where there is no comparison."""
    if not comparison:
        return ""
    head = "<h2>Held-out prompts, before and after</h2><table><tr><th><th>before<th>after<th>difference<th>p-value</tr>"
    rows = [
        f"<tr class=big><td>{escape(name)}<td>{_interval(c['before'], c['before_interval'])}<td>"
        f"{_interval(c['after'], c['after_interval'])}<td>{_interval(c['difference'], c['difference_interval'])}"
        f"<td>{c['p_value']:.4g}</tr>"
        for name, c in comparison.items()
    ]
    note = "<p>In brackets: 95 % bootstrap intervals. p-value: paired permutation test, two-sided."
    return head + "".join(rows) + "</table>" + note


def _answers(answers: Sequence[Mapping[str, Any]]) -> str:
    if not answers:
        return ""
    rows = [
        f"<tr><td>{escape(str(a['outcome']))}<td><pre>{escape(str(a['prompt']))}</pre>"
        f"<td>{_answer(a['before'], a['reward_before'])}<td>{_answer(a['after'], a['reward_after'])}</tr>"
        for a in answers
    ]
    return "<h2>Answers side by side</h2><table><tr><th><th>prompt<th>before<th>after</tr>" + "".join(rows) + "</table>"


def _answer(text: str, reward: float | None) -> str:
    shown = "" if reward is None else f"<br><small>reward {reward:.2f}</small>"
    return f"<pre>{escape(text)}</pre>{shown}"


def _interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} <small>[{interval[0]:.3f}, {interval[1]:.3f}]</small>"

"""The audit as one HTML page that needs no network and no script; all text of the data is escaped."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ncalign.atomic import write_text_atomic
from ncalign.audit.measures import GroupMeasures
from ncalign.encoding import as_messages, completion_text
from ncalign.groups import Group
from ncalign.report.page import embedded, head

_EXAMPLES, _SHOWN = 4, 600


def write_page(path: Path, result: Mapping[str, Any], measured: Sequence[GroupMeasures], sample: Sequence[Group]) -> None:
    """Write the page."""
    rows = ((name, "" if value is None else f"{value:.4g}") for name, value in result["numbers"].items())
    numbers = "".join(f"<tr><td>{escape(name)}<td>{value}</tr>" for name, value in rows)
    found = "".join(f"<li><b>{escape(f['level'])}</b>: {escape(f['text'])}" for f in result["findings"])
    parts = [
        head(f"audit of {result['data']}"),
        f"<h1>Audit of {escape(result['data'])}</h1><ul>{found}</ul>",
        f'<img alt="rewards, likeness and length" src="{embedded(picture(measured, result["sizes"]))}">',
        f"<h2>Numbers</h2><p>Those of likeness and length from {result['sampled']} groups.<table>{numbers}</table>",
        _examples(measured, sample),
    ]
    write_text_atomic("\n".join(parts) + "\n", path)


def picture(measured: Sequence[GroupMeasures], sizes: Mapping[int, int]) -> bytes:
    """A PNG with six panels."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = list(figure.subplots(3, 2).flat)
    likeness = [one for group in measured for one in group.likeness]
    panels: list[tuple[str, str, list[float]]] = [
        ("Rewards", "reward", [reward for group in measured for reward in group.rewards]),
        ("Spread of the rewards in a group", "best less worst", [group.spread for group in measured]),
        ("The best candidate and the others", "words in common order", [one.edit for one in likeness]),
        (
            "Reward and length in a group",
            "rank correlation",
            [group.length_correlation for group in measured if group.length_correlation is not None],
        ),
        ("Length", "words", [float(length) for group in measured for length in group.lengths]),
    ]
    for axis, (title, label, values) in zip(axes, panels, strict=False):
        axis.hist(values, bins=30)
        axis.set_title(title)
        axis.set_xlabel(label)
    axes[5].bar([str(size) for size in sizes], list(sizes.values()))
    axes[5].set_title("Candidates of a group")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _examples(measured: Sequence[GroupMeasures], sample: Sequence[Group]) -> str:
    """Groups whose best candidate is most like another: what a reader should look at first."""
    order = sorted(
        (number for number, group in enumerate(measured) if group.likeness),
        key=lambda number: -max(one.edit for one in measured[number].likeness),
    )
    rows = []
    for number in order[:_EXAMPLES]:
        group = sample[number]
        scored = sorted((c for c in group.candidates if c.reward is not None), key=lambda c: -(c.reward or 0.0))
        shown = ((completion_text(c, group)[:_SHOWN], c.reward) for c in scored[:3])
        cells = "".join(f"<td><pre>{escape(text)}</pre><small>reward {reward:.3g}</small>" for text, reward in shown)
        prompt = as_messages(group.prompt)[-1]["content"][:_SHOWN]
        rows.append(f"<tr><td><small>{escape(group.id)}</small><pre>{escape(prompt)}</pre>{cells}</tr>")
    header = "<h2>Where the best is most like another</h2><table><tr><th>prompt<th>best<th>next<th>next</tr>"
    return header + "".join(rows) + "</table>" if rows else ""

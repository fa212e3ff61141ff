"""The audit as one HTML page that needs no network and no script; all text of the data is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncalign.audit.measures import GroupMeasures, ranked
from ncalign.core.atomic import write_text_atomic
from ncalign.data.groups import Group
from ncalign.model.encoding import as_messages, completion_text
from ncalign.report.html import png, render

_EXAMPLES, _SHOWN = 4, 600
_TITLES = {
    "likeness_by_rank": "Likeness of the best candidate to the second, third and so on",
    "sources": "Sources: rewards, and how often each wrote the best candidate alone",
    "copies_within_groups": "Sets of near-copies within groups",
    "copies_across_groups": "Sets of near-copies that several groups share",
    "kernel_by_rank": "Whom the kernel draws: weight by rank of reward",
    "kernel_by_source": "Whom the kernel draws: weight by source",
    "kernel_by_beta": "Effective sample size of the kernel, as a share of the candidates, by beta",
}


def write_page(path: Path, result: Mapping[str, Any], measured: Sequence[GroupMeasures], sample: Sequence[Group]) -> None:
    """Write the page."""
    text = render(
        "audit",
        data=result["data"],
        findings=result["findings"],
        charts=picture(measured, result),
        tables={_TITLES[name]: table for name, table in result["tables"].items()},
        sampled=result["sampled"],
        numbers=[{"number": name, "value": value} for name, value in result["numbers"].items()],
        examples=_examples(measured, sample),
    )
    write_text_atomic(text, path)


def picture(measured: Sequence[GroupMeasures], result: Mapping[str, Any]) -> bytes:
    """A PNG with a panel for each thing that there is to see."""
    likeness = [one for group in measured for one in group.likeness]
    tables = result["tables"]
    panels: list[tuple[str, str, list[float]]] = [
        ("Rewards", "reward", [reward for group in measured for reward in group.rewards]),
        ("Spread of the rewards in a group", "best less worst", [group.spread for group in measured]),
        ("The best candidate and the others", "words in common order", [one.edit for one in likeness]),
        ("Words that only moved", "share of the words", [one.bag - one.edit for one in likeness]),
        ("Length", "words", [float(length) for group in measured for length in group.lengths]),
    ]
    extra = [name for name in ("kernel_by_rank", "kernel_by_beta") if name in tables]
    rows = (len(panels) + 2 + len(extra) + 1) // 2
    figure = Figure(figsize=(11, 3 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, 2).flat)
    for title, label, values in panels:
        axis = next(axes)
        _histogram(axis, values)
        axis.set_title(title)
        axis.set_xlabel(label)
    _length_and_reward(next(axes), measured)
    axis = next(axes)
    axis.bar([str(size) for size in result["sizes"]], list(result["sizes"].values()))
    axis.set_title("Candidates of a group")
    if "kernel_by_rank" in tables:
        _drawn(next(axes), tables["kernel_by_rank"])
    if "kernel_by_beta" in tables:
        axis = next(axes)
        axis.plot(*zip(*((row["beta"], row["effective_share"]) for row in tables["kernel_by_beta"]), strict=True), marker="o")
        axis.set_xscale("log")
        axis.set_ylim(0, 1.05)
        axis.set_title("Effective sample size of the kernel")
        axis.set_xlabel("beta")
        axis.set_ylabel("share of the candidates")
    for axis in axes:
        axis.set_visible(False)
    return png(figure)


def _histogram(axis: Axes, values: Sequence[float]) -> None:
    if not values:
        return
    low, high = min(values), max(values)
    # Values that are all but equal have no room for bins between them.
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        axis.bar([f"{low:.4g}"], [len(values)])
    else:
        axis.hist(np.asarray(values, dtype=np.float64) if high - low < 1e300 else np.asarray(values) / 2, bins=30)


def _length_and_reward(axis: Axes, measured: Sequence[GroupMeasures]) -> None:
    """Each candidate's length and reward, less its group's means."""
    x: list[float] = []
    y: list[float] = []
    for group in measured:
        if group.num_distinct > 1:
            x += list(np.asarray(group.lengths) - np.mean(group.lengths))
            y += list(np.asarray(group.rewards) - np.mean(group.rewards))
    axis.scatter(x, y, s=4, alpha=0.4)
    axis.set_title("Reward and length within groups")
    axis.set_xlabel("words, less the group's mean")
    axis.set_ylabel("reward, less the mean")


def _drawn(axis: Axes, table: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(table))
    axis.bar(places - 0.2, [row["drawn"] for row in table], width=0.4, label="kernel")
    axis.bar(places + 0.2, [row["random"] for row in table], width=0.4, label="random")
    axis.set_xticks(places, [str(row["rank"]) for row in table])
    axis.set_title("Who gets drawn")
    axis.set_xlabel("rank of reward (1 is the best)")
    axis.set_ylabel("weight")
    axis.legend()


def _examples(measured: Sequence[GroupMeasures], sample: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups whose best candidate is most like another: what a reader should look at first."""
    order = sorted(
        (number for number, group in enumerate(measured) if group.likeness),
        key=lambda number: -max(one.edit for one in measured[number].likeness),
    )
    rows = []
    for number in order[:_EXAMPLES]:
        group, places = sample[number], ranked(sample[number])
        assert places is not None
        shown = [group.candidates[k] for k in (places.best, *places.lower[:2])]
        rows.append(
            {
                "id": group.id,
                "prompt": as_messages(group.prompt)[-1]["content"][:_SHOWN],
                "candidates": [{"text": completion_text(c, group)[:_SHOWN], "reward": c.reward} for c in shown],
            }
        )
    return rows

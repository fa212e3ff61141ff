"""The page of an audit: findings, charts, tables and some groups to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncalign.audit.measures import GroupMeasures, within_groups
from ncalign.core.atomic import write_text_atomic
from ncalign.data.groups import Group
from ncalign.data.rendering import completion_text
from ncalign.model.chat import as_messages
from ncalign.report.html import label_axes, png, render

_EXAMPLES, _SHOWN = 4, 600
_TITLES = {
    "likeness_by_rank": "Likeness of the best candidate to the second, third and so on",
    "sources": "Sources: rewards, and how often each wrote the best candidate alone",
    "copies_within_groups": "Sets of near-copies within groups",
    "copies_across_groups": "Sets of near-copies that several groups share",
    "kernel_by_rank": "Whom the kernel draws: weight by rank of reward",
    "kernel_by_source": "Whom the kernel draws: weight by source",
    "pays_negatives": "How many negatives pay (mc_po, rnce): M drawn by the kernel",
    "pays_drawn_info_nca": "How many drawn candidates pay (info_nca): S of K, by the sizes of their coefficients",
    "pays_drawn_nca": "How many drawn candidates pay (nca): S of K, by the sizes of their coefficients",
    "pays_candidates": "How many candidates a group pay (nca): K, all with gradients",
    "kernel_by_beta": "Effective sample size of the kernel, as a share of the candidates, by beta",
}


def write_page(path: Path, result: Mapping[str, Any], measured: Sequence[GroupMeasures], sample: Sequence[Group]) -> None:
    """Write the page."""
    text = render(
        "audit",
        data=result["data"],
        findings=result["findings"],
        charts=_charts(measured, result),
        tables={_TITLES[name]: table for name, table in result["tables"].items()},
        sampled=result["sampled"],
        large=result["large_groups"],
        numbers=[{"number": name, "value": value} for name, value in result["numbers"].items()],
        examples=_examples(measured, sample),
    )
    write_text_atomic(text, path)


def _charts(measured: Sequence[GroupMeasures], result: Mapping[str, Any]) -> bytes:
    """A PNG with a panel for each distribution, and for what the kernel draws."""
    likeness = [one for group in measured for one in group.likeness]
    tables = result["tables"]
    panels: list[tuple[str, str, list[float]]] = [
        ("Rewards", "reward", [reward for group in measured for reward in group.rewards]),
        ("Spread of the rewards in a group", "best less worst", [group.spread for group in measured]),
        ("The best candidate and the others", "words in common order", [one.edit for one in likeness]),
        ("Words that only moved", "share of the words", [one.bag - one.edit for one in likeness]),
        ("Length", "words", [float(length) for group in measured for length in group.lengths]),
    ]
    # Two more panels are always drawn, and one for each table of the kernel.
    rows = (len(panels) + 2 + len({"kernel_by_rank", "kernel_by_beta"} & tables.keys()) + 1) // 2
    figure = Figure(figsize=(11, 3 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, 2).flat)
    for (title, label, values), axis in zip(panels, axes, strict=False):
        _histogram(axis, values)
        axis.set_title(title)
        axis.set_xlabel(label)
    axis = next(axes)
    axis.scatter(*within_groups(measured), s=4, alpha=0.4)
    label_axes(axis, "Reward and length within groups", "words, less the group's mean", "reward, less the group's mean")
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
        label_axes(axis, "Effective sample size of the kernel", "beta", "share of the candidates")
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


def _drawn(axis: Axes, table: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(table))
    axis.bar(places - 0.2, [row["drawn"] for row in table], width=0.4, label="kernel")
    axis.bar(places + 0.2, [row["random"] for row in table], width=0.4, label="random")
    axis.set_xticks(places, [str(row["rank"]) for row in table])
    label_axes(axis, "Whom the kernel draws", "rank of reward (1 is the best)", "weight")


def _examples(measured: Sequence[GroupMeasures], sample: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups whose best candidate is most like another: what a reader should look at first."""
    order = sorted(
        (number for number, group in enumerate(measured) if group.likeness),
        key=lambda number: -max(one.edit for one in measured[number].likeness),
    )
    rows = []
    for number in order[:_EXAMPLES]:
        group, places = sample[number], measured[number].order
        assert places is not None
        shown = [group.candidates[k] for k in (places.best, *places.lower[:2])]
        candidates = [{"text": completion_text(c.completion)[:_SHOWN], "reward": c.reward} for c in shown]
        prompt = as_messages(group.prompt)[-1]["content"][:_SHOWN]
        rows.append({"id": group.id, "prompt": prompt, "candidates": candidates})
    return rows

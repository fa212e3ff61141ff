"""The page of an audit: findings, charts, tables and some groups to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ncalign.audit.measures import GroupMeasures, within_groups
from ncalign.core.atomic import write_text_atomic
from ncalign.data.groups import Group
from ncalign.data.rendering import completion_text
from ncalign.model.chat import as_messages
from ncalign.report.html import render
from ncalign.report.plots import Chart, Series, histogram

_EXAMPLES, _SHOWN = 12, 600
_DOTS = 3000
_DRAWN = (("kernel", "drawn"), ("random", "random"))
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


def page_parts(measured: Sequence[GroupMeasures], sample: Sequence[Group]) -> dict[str, Any]:
    """What the page shows besides the audit's numbers, for audit.json: distributions and groups to read."""
    likeness = [one for group in measured for one in group.likeness]
    distributions: dict[str, tuple[str, list[float]]] = {
        "Rewards": ("reward", [reward for group in measured for reward in group.rewards]),
        "Spread of the rewards in a group": ("best less worst", [group.spread for group in measured]),
        "The best candidate and the others": ("words in common order", [one.edit for one in likeness]),
        "Words that only moved": ("share of the words", [one.bag - one.edit for one in likeness]),
        "Length": ("words", [float(length) for group in measured for length in group.lengths]),
    }
    lengths, rewards = within_groups(measured)
    every = max(1, math.ceil(len(lengths) / _DOTS))
    dots = [[float(x), float(y)] for x, y in zip(lengths[::every], rewards[::every], strict=True)]
    bars = {title: histogram(title, label, values) for title, (label, values) in distributions.items()}
    return {
        "distributions": [
            {"title": title, "x": one.x, "bars": list(one.series[0].points), "width": one.width, "names": list(one.categories)}
            for title, one in bars.items()
            if one is not None
        ],
        "length_and_reward": dots,
        "examples": _examples(measured, sample),
    }


def write_page(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the page of what an audit.json holds, and return its path.

    Raises:
        ValueError: it holds nothing for the page, as those of earlier versions.
    """
    parts = result.get("page")
    if parts is None:
        raise ValueError(f"audit.json of {result.get('data')} is of an earlier version, and can't be shown: audit again")
    text = render(
        "audit",
        data=result["data"],
        findings=result["findings"],
        charts=_charts(result),
        tables={_TITLES[name]: table for name, table in result["tables"].items()},
        sampled=result["sampled"],
        large=result["large_groups"],
        numbers=[{"number": name, "value": value} for name, value in result["numbers"].items()],
        examples=parts["examples"],
        results=json.dumps({name: value for name, value in result.items() if name != "page"}, indent=2, ensure_ascii=False),
    )
    write_text_atomic(text, path)
    return path


def _charts(result: Mapping[str, Any]) -> list[Chart]:
    """A chart for each distribution, and for what the kernel draws."""
    parts, tables = result["page"], result["tables"]
    found = [
        Chart(one["title"], one["x"], "", [Series("", one["bars"], "bars")], categories=one["names"], width=one["width"])
        for one in parts["distributions"]
    ]
    labels = "words, less the group's mean", "reward, less the group's mean"
    found.append(Chart("Reward and length within groups", *labels, [Series("", parts["length_and_reward"], "dots")]))
    sizes = [(place, count) for place, count in enumerate(result["sizes"].values())]
    named = [str(size) for size in result["sizes"]]
    found.append(Chart("Candidates of a group", "candidates", "groups", [Series("", sizes, "bars")], categories=named))
    if "kernel_by_rank" in tables:
        rows = tables["kernel_by_rank"]
        drawn = [Series(name, [(k, row[at]) for k, row in enumerate(rows)], "bars") for name, at in _DRAWN]
        ranks = [str(row["rank"]) for row in rows]
        found.append(Chart("Whom the kernel draws", "rank of reward (1 is the best)", "weight", drawn, categories=ranks))
    if "kernel_by_beta" in tables:
        points = [(row["beta"], row["effective_share"]) for row in tables["kernel_by_beta"]]
        title = "Effective sample size of the kernel"
        found.append(Chart(title, "beta", "share of the candidates", [Series("share", points)], log="x"))
    return found


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

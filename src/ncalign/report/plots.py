"""Charts of a page: what they show, for the page's own script to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Point: TypeAlias = Sequence[float | None]
"""A place along and a value; and, where an interval is known, its low and high bound."""

MOST_POINTS = 1000
"""Of a line; of a longer one each stretch's lowest and highest values are kept."""


@dataclass(frozen=True)
class Series:
    """One line, set of dots or set of bars.

    Attributes:
        name: in the legend.
        points: its points, or its bars' middles and heights.
        kind: how they are drawn.
        dashed: such as values on held-out groups beside those in training.
        colour: number of its colour, where it is not its place in the chart.
    """

    name: str
    points: Sequence[Point]
    kind: Literal["line", "dots", "bars"] = "line"
    dashed: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: above it.
        x: what lies along.
        y: what is drawn upwards.
        series: in the legend's order.
        log: the axes that are logarithmic: numbers that are not positive are not drawn.
        categories: names of the places 0, 1, ... along; with ``across``, of those from above to below.
        across: values lie along, and categories below each other.
        width: of a bar, where bars are those of a histogram.
        even: values at which a line is drawn across, such as an even win rate.
        group: charts with the same one are zoomed together.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log: Literal["", "x", "y", "xy"] = ""
    categories: Sequence[str] = ()
    across: bool = False
    width: float = 0.0
    even: Sequence[float] = ()
    group: str = ""

    def spec(self) -> dict[str, Any]:
        """The chart as the page's script takes it."""
        shown = [
            {
                "name": one.name,
                "points": [list(point) for point in (thinned(one.points) if one.kind == "line" else one.points)],
                "kind": one.kind,
                "dashed": one.dashed,
                "colour": one.colour,
            }
            for one in self.series
        ]
        return {
            "title": self.title,
            "x": self.x,
            "y": self.y,
            "series": shown,
            "log": self.log,
            "categories": list(self.categories),
            "across": self.across,
            "width": self.width,
            "even": list(self.even),
            "group": self.group,
            "lines": bool(shown) and all(one["kind"] == "line" for one in shown),
        }


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about this many points of a line: the lowest and the highest of each stretch, so that no spike is lost.

    >>> [x for x, _ in thinned([(x, float(x == 7)) for x in range(20)], most=4)]
    [0, 7, 10]
    """
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        some = range(start, min(start + stretch, len(points)))
        known = [place for place in some if points[place][1] is not None]
        if known:
            values = {place: float(points[place][1] or 0.0) for place in known}
            ends = {min(known, key=values.__getitem__), max(known, key=values.__getitem__)}
            kept += [points[place] for place in sorted(ends)]
        else:
            kept.append(points[start])
    return kept


def lines_of(rows: Sequence[Mapping[str, Any]], x: str, names: Mapping[str, str]) -> list[Series]:
    """A line for each metric that some row has, by the name that the legend shows; the rows' other metrics are left out."""
    found = []
    for metric, name in names.items():
        points = [(row[x], row[metric]) for row in rows if x in row and isinstance(row.get(metric), int | float)]
        if points:
            found.append(Series(name, points))
    return found


def histogram(title: str, x: str, values: Sequence[float], *, bins: int = 30) -> Chart | None:
    """How many values lie in each of some ranges of equal width; None of no finite value.

    >>> [point for point in histogram("t", "x", [0.0, 0.1, 1.0], bins=2).series[0].points]
    [(0.25, 2), (0.75, 1)]
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    low, high = min(known), max(known)
    # Values that are all but equal, or too far apart for their distance to be a number, have no ranges between them.
    if not 1e-9 * max(abs(low), abs(high), 1e-300) < high - low < 1e300:
        middle = [f"{low:.4g}"] if high - low < 1e300 else [f"{low:.4g} to {high:.4g}"]
        return Chart(title, x, "", [Series("", [(0, len(known))], "bars")], categories=middle)
    width = (high - low) / bins
    counts = [0] * bins
    for value in known:
        counts[min(bins - 1, int((value - low) / width))] += 1
    bars = [(low + (place + 0.5) * width, count) for place, count in enumerate(counts)]
    return Chart(title, x, "", [Series("", bars, "bars")], width=width)

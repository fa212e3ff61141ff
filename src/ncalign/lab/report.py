"""The laboratory's results for people: a table, a plot for each curve, and a page with all of it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ncalign.lab.results import Curve, Statement
from ncalign.report.charts import label_axes, png
from ncalign.report.html import render
from ncalign.report.plots import Chart, Series


def verdict(statement: Statement) -> str:
    """Whether a statement holds, as tables show it."""
    return "holds" if statement.holds else "DOES NOT HOLD"


def summary(statements: Sequence[Statement]) -> str:
    """How many statements hold."""
    holding = sum(statement.holds for statement in statements)
    return f"{holding} of {len(statements)} statements hold"


def table(statements: Sequence[Statement]) -> str:
    """The statements as text, a line each, with the count at the end.

    Example:
        >>> print(table([Statement("half a pair", "arithmetic", 1.0, 1.0, 0.0)]))
            predicted      measured  tolerance  verdict        statement
                    1             1          0  holds          half a pair
        1 of 1 statements hold
    """
    lines = [f"{'predicted':>13} {'measured':>13} {'tolerance':>10}  {'verdict':<13}  statement"]
    lines += [
        f"{s.predicted:>13.6g} {s.measured:>13.6g} {s.tolerance:>10.2g}  {verdict(s):<13}  {s.statement}" for s in statements
    ]
    return "\n".join([*lines, summary(statements)])


def draw(curve: Curve) -> Figure:
    """A curve as a figure."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curve.lines.items():
        drawn = [(x, y) for x, y in points if (x > 0 or "x" not in curve.log) and (y > 0 or "y" not in curve.log)]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker="." if len(drawn) < 50 else "", label=name)
    axes.set_xscale("log" if "x" in curve.log else "linear")
    axes.set_yscale("log" if "y" in curve.log else "linear")
    label_axes(axes, curve.title, curve.x_label, curve.y_label)
    return figure


def plot(curve: Curve) -> bytes:
    """A curve as PNG."""
    return png(draw(curve))


def chart(curve: Curve) -> Chart:
    """A curve as a page's chart."""
    lines = [Series(name, points) for name, points in curve.lines.items()]
    return Chart(curve.title, curve.x_label, curve.y_label, lines, log=curve.log)


def page(statements: Sequence[Statement], curves: Sequence[Curve]) -> str:
    """The page as HTML."""
    charts = {curve.name: chart(curve) for curve in curves}
    return render("theory", summary=summary(statements), statements=statements, curves=curves, charts=charts, verdict=verdict)

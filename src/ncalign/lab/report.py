"""What the laboratory found, for people: a table, a plot for each curve, and one page that needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from ncalign.lab.results import Curve, Statement

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
color: #1a1a1a; background: #fff }
table { border-collapse: collapse; width: 100% } th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left;
vertical-align: top; overflow-wrap: anywhere } td.n { font-variant-numeric: tabular-nums; white-space: nowrap }
tr.no td { background: #fde8e8 } img { width: 100%; max-width: 52rem }
"""


def verdict(statement: Statement) -> str:
    """In a word."""
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


def plot(curve: Curve) -> bytes:
    """A curve as PNG."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curve.lines.items():
        drawn = [point for point in points if (point[0] > 0 or not curve.log_x) and (point[1] > 0 or not curve.log_y)]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker="." if len(drawn) < 50 else "", label=name)
    axes.set_xscale("log" if curve.log_x else "linear")
    axes.set_yscale("log" if curve.log_y else "linear")
    axes.set_title(curve.title)
    axes.set_xlabel(curve.x_label)
    axes.set_ylabel(curve.y_label)
    axes.grid(alpha=0.3)
    if len(curve.lines) > 1:
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(statements: Sequence[Statement], curves: Sequence[Curve], images: Mapping[str, bytes]) -> str:
    """The page as HTML; ``images`` holds each curve's plot by its name."""
    rows = "".join(
        f"<tr class={'yes' if s.holds else 'no'}><td>{escape(s.statement)}<td>{escape(s.source)}<td class=n>{s.predicted:.6g}"
        f"<td class=n>{s.measured:.6g}<td class=n>{s.tolerance:.2g}<td>{verdict(s)}</tr>"
        for s in statements
    )
    head = "<tr><th>statement<th>source<th>predicted<th>measured<th>tolerance<th>verdict</tr>"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>ncalign lab theory</title><style>{_STYLE}</style>",
        f"<h1>The theory on enumerable policies</h1><p>{summary(statements)}. Expectations are sums over everything that could "
        "be drawn, in float64; a statement holds where measured and predicted are no further apart than its tolerance.",
        *(_figure(curve, images[curve.name]) for curve in curves),
        f"<h2>Statements</h2><table>{head}{rows}</table>",
    ]
    return "\n".join(parts) + "\n"


def _figure(curve: Curve, image: bytes) -> str:
    encoded = base64.b64encode(image).decode()
    return (
        f"<h2>{escape(curve.title)}</h2><p>{escape(curve.note)}"
        f'<p><img alt="{escape(curve.title)}" src="data:image/png;base64,{encoded}">'
    )

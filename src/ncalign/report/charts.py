"""Charts of an evaluation: win rates with intervals, ratings by category, a matrix of win rates."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from ncalign.core.atomic import atomic_path
from ncalign.stats.intervals import Interval
from ncalign.stats.mt_bench import HIGHEST, MTBench
from ncalign.stats.win_rate import WinMatrix

_FONT = "DejaVu Sans"
_LONGEST_LABEL, _LONGEST_TITLE = 40, 90
_UNKNOWN_GLYPH = "?"
# Above this many models a cell of the matrix is too small for its number.
_MOST_WITH_NUMBERS = 15


def interval_chart(
    series: Mapping[str, Mapping[str, tuple[float, Interval]]], *, title: str, unit: str, reference: float | None = None
) -> Figure:
    """Points with intervals, a line for each model and a colour for each measure.

    Args:
        series: by measure, such as win rate and length-controlled win rate, then by model: a value and its interval. A value
            that is NaN is left out, an interval of NaN isn't drawn.
        title: of the chart.
        unit: of the values.
        reference: drawn as a line, such as 50 % for an even win rate.

    Raises:
        ValueError: there is no finite value.
    """
    models = list(dict.fromkeys(model for values in series.values() for model in values))
    if not any(math.isfinite(value) for values in series.values() for value, _ in values.values()):
        raise ValueError(f"{title}: there is no value to draw")
    figure, axes = _axes(title, width=8.0, height=1.6 + 0.42 * len(models))
    for number, (measure, values) in enumerate(series.items()):
        known = {models.index(model): found for model, found in values.items() if math.isfinite(found[0])}
        places, points, arms = _points(known, shift=(number - (len(series) - 1) / 2) * 0.5 / len(series))
        axes.errorbar(points, places, xerr=arms, fmt="o", capsize=3, label=label(measure))
    axes.set_yticks(range(len(models)), labels=map(label, models), parse_math=False)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlabel(label(unit, _LONGEST_TITLE), parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    if reference is not None:
        axes.axvline(reference, color="0.5", linewidth=1, linestyle="--")
    if len(series) > 1:
        _legend(axes)
    return figure


def category_chart(scores: Sequence[MTBench], *, title: str = "MT-Bench by category") -> Figure:
    """Bars of mean ratings with their intervals, grouped by category, a colour for each model.

    Raises:
        ValueError: there is no rating.
    """
    categories = sorted({name for score in scores for name in score.categories})
    if not any(score.overall.num_counted for score in scores):
        raise ValueError(f"{title}: there is no rating to draw")
    figure, axes = _axes(title, width=max(6.0, 1.5 + 0.9 * len(categories)), height=4.2)
    width = 0.8 / len(scores)
    for number, score in enumerate(scores):
        known = {categories.index(name): (one.mean, one.ci) for name, one in score.categories.items() if one.num_counted}
        places, heights, arms = _points(known, shift=(number - (len(scores) - 1) / 2) * width)
        axes.bar(places, heights, width, yerr=arms, capsize=2, label=label(score.model))
    axes.set_xticks(range(len(categories)), labels=map(label, categories), parse_math=False, rotation=30, ha="right")
    axes.set_ylim(0, HIGHEST)
    axes.set_ylabel("mean rating")
    _legend(axes)
    return figure


def matrix_chart(matrix: WinMatrix, *, title: str = "Win rate of the row's model (%)") -> Figure:
    """A heat map from 0 (red) over 50 (white) to 100 (blue); cells of models that never met are grey."""
    size = len(matrix.models)
    figure, axes = _axes(title, width=3.2 + 0.55 * size, height=2.4 + 0.5 * size)
    # Where models never met: grey, as white is an even rate.
    axes.set_facecolor("0.85")
    image = axes.imshow(matrix.rates, cmap="RdBu", vmin=0, vmax=100)
    labels = [label(name) for name in matrix.models]
    axes.set_xticks(range(size), labels=labels, parse_math=False, rotation=40, ha="right")
    axes.set_yticks(range(size), labels=labels, parse_math=False)
    if size <= _MOST_WITH_NUMBERS:
        for (row, column), rate in np.ndenumerate(matrix.rates):
            if math.isfinite(rate):
                color = "white" if abs(rate - 50) > 35 else "black"
                axes.text(column, row, f"{rate:.0f}", ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def write_chart(figure: Figure, path: str | Path) -> None:
    """Write a chart in the form that the file's name ends in, .png or .svg; the same values give the same bytes.

    Raises:
        ValueError: another ending.
        OSError: the file can't be written.
    """
    form = Path(path).suffix.lower().lstrip(".")
    if form not in ("png", "svg"):
        raise ValueError(f"{path}: a chart's file ends in .png or .svg")
    with atomic_path(path) as temporary, mpl.rc_context({"svg.hashsalt": "ncalign"}):
        figure.savefig(temporary, format=form, dpi=130, metadata={"Date": None} if form == "svg" else None)


def _axes(title: str, *, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(label(title, _LONGEST_TITLE), parse_math=False)
    return figure, axes


def _legend(axes: Axes) -> None:
    legend = axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _points(known: Mapping[int, tuple[float, Interval]], *, shift: float) -> tuple[list[float], list[float], np.ndarray]:
    """Places, values, and lengths of the error bars on either side: 0 where a bound is unknown or beyond the value."""
    values = [value for value, _ in known.values()]
    arms = [[value - low, high - value] for value, (low, high) in known.values()]
    lengths = np.nan_to_num(np.clip(np.array(arms).reshape(-1, 2).T, 0, None), posinf=0.0)
    return [place + shift for place in known], values, lengths


def png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Name a plot and its axes, and draw a faint grid; a legend is added where several lines have names."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize="small")


def label(text: str, longest: int = _LONGEST_LABEL) -> str:
    """Text that the font can draw on one line; with a leading underscore matplotlib would leave it out of a legend."""
    glyphs = _glyphs()
    drawn = "".join(c if c.isprintable() and ord(c) in glyphs else _UNKNOWN_GLYPH for c in text)
    cut = drawn if len(drawn) <= longest else drawn[: longest - 1] + "…"
    return f" {cut}" if cut.startswith("_") else cut


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(_FONT)).get_charmap())

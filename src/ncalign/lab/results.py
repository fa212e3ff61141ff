"""The results of an experiment: statements with what was predicted and measured, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ncalign.core.json import json_ready

EXACT = 1e-12
"""Tolerance of what holds up to the rounding of float64."""


@dataclass(frozen=True)
class Statement:
    """One statement of the theory as a number.

    Attributes:
        statement: The statement in words.
        source: Where the statement comes from.
        predicted: The number that follows from the statement.
        measured: The number that the package's own functions give.
        tolerance: The largest distance between the two with which the statement holds.
    """

    statement: str
    source: str
    predicted: float
    measured: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether measured and predicted are no further apart than the tolerance; a NaN never holds."""
        return abs(self.measured - self.predicted) <= self.tolerance

    def row(self) -> dict[str, object]:
        """The statement as JSON takes it; null for a measurement that is not a finite number.

        Example:
            >>> Statement("one and one is two", "arithmetic", 2.0, 1.0 + 1.0, 0.0).row()["holds"]
            True
        """
        return {
            "statement": self.statement,
            "source": self.source,
            "predicted": self.predicted,
            "measured": json_ready(self.measured),
            "tolerance": self.tolerance,
            "holds": self.holds,
        }


def zero(statement: str, source: str, measured: float, tolerance: float = EXACT) -> Statement:
    """A statement that a number is 0."""
    return Statement(statement, source, 0.0, measured, tolerance)


@dataclass(frozen=True)
class Curve:
    """Lines for one plot.

    Attributes:
        name: Name of the file, without its ending.
        title: Heading of the plot.
        x_label: What is on the horizontal axis.
        y_label: What is on the vertical axis.
        lines: Points of each line; in a plot with a logarithmic axis only positive numbers are drawn.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is.
        note: What to see in it.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """Statements and curves of one experiment."""

    statements: Sequence[Statement]
    curves: Sequence[Curve] = field(default=())


def furthest(values: Tensor, predicted: float) -> float:
    """The value that is furthest from what was predicted; a NaN is further than anything.

    Example:
        >>> furthest(torch.tensor([1.0, 1.5, 0.75]), 1.0)
        1.5
    """
    flat = values.detach().flatten().double()
    return float(flat[(flat - predicted).abs().nan_to_num(nan=torch.inf).argmax()])


def largest(values: Tensor) -> float:
    """Largest absolute value.

    Example:
        >>> largest(torch.tensor([1.0, -3.0]))
        3.0
    """
    return float(values.detach().abs().max())


def fitted_exponent(points: Sequence[tuple[float, float]], *, start: float = 0.0) -> float:
    """Exponent of the power law that fits the points from ``start`` on: the slope of least squares in both logarithms.

    Example:
        >>> round(fitted_exponent([(1.0, 4.0), (2.0, 1.0), (4.0, 0.25)]), 6)
        -2.0
    """
    kept = torch.tensor([point for point in points if point[0] >= start], dtype=torch.float64).log()
    x, y = (kept - kept.mean(dim=0)).unbind(dim=1)
    return float((x * y).sum() / x.square().sum())

"""The results of an experiment: statements with what was predicted and measured, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ncalign.core.json import json_ready

EXACT = 1e-12
"""Tolerance of what holds up to the rounding of float64."""

Line = list[tuple[float, float]]
"""Points of a plot."""
Measured = Tensor | float | list[float]


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
        return asdict(self) | {"measured": json_ready(self.measured), "holds": self.holds}


@dataclass(frozen=True)
class Curve:
    """Lines for one plot.

    Attributes:
        name: Name of the file, without its ending.
        title: Heading of the plot.
        x_label: What is on the horizontal axis.
        y_label: What is on the vertical axis.
        lines: Points of each line; in a plot with a logarithmic axis only positive numbers are drawn.
        log: The axes that are logarithmic.
        note: What to see in it.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Line]
    log: Literal["", "x", "y", "xy"] = ""
    note: str = ""


@dataclass
class Findings:
    """Statements and curves of one experiment, in the order in which it adds them.

    Attributes:
        source: Where the statements come from, unless one of them names another source.
        statements: What was predicted and measured.
        curves: The plots.

    Example:
        >>> found = Findings("arithmetic")
        >>> found.equal("a third of three numbers", 1.0, torch.tensor([3.0, 3.0]) / 3)
        >>> found.share("squares that are negative", 0.0, torch.tensor([-1.0, 2.0]).square() < 0)
        >>> [statement.holds for statement in found.statements]
        [True, True]
    """

    source: str
    statements: list[Statement] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def equal(
        self, statement: str, predicted: float, measured: Measured, tolerance: float = EXACT, *, source: str | None = None
    ) -> None:
        """Add that each measured number is the predicted one; the number furthest from it is kept."""
        value = furthest(torch.as_tensor(measured, dtype=torch.float64), predicted)
        self.statements.append(Statement(statement, source or self.source, predicted, value, tolerance))

    def zero(self, statement: str, measured: Measured, tolerance: float = EXACT, *, source: str | None = None) -> None:
        """Add that each measured number is 0; the largest absolute value is kept."""
        value = largest(torch.as_tensor(measured, dtype=torch.float64))
        self.equal(statement, 0.0, value, tolerance, source=source)

    def share(self, statement: str, predicted: float, cases: Tensor | list[bool], *, source: str | None = None) -> None:
        """Add what share of the cases is true, without tolerance."""
        share = float(torch.as_tensor(cases, dtype=torch.float64).mean())
        self.equal(statement, predicted, share, 0.0, source=source)


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

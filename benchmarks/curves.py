"""Seconds of an MC-PO step against K, P, T and M, and of an NCA step against K, beside the accounting; plotted for the docs.

The accounting counts forward passes of a prompt token: `3P + (K - 1 + 3(M + 1))cT` for MC-PO, whose positive needs no score,
and `3P + 3KcT` for NCA, times the groups of a step. One straight line, fitted to all points, turns them into seconds: its slope
is the machine's, its offset what a step costs whatever its size (the optimizer).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from _steps import Case, describe, interleaved, main_of, row

C = 1.27
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "cost.svg"


@dataclass(frozen=True)
class Point:
    """A step of one size."""

    method: str = "MC-PO"
    prompt: int = 256
    completion: int = 64
    candidates: int = 8
    negatives: int = 1

    def case(self) -> Case:
        """The step to run."""
        name = '{"name": "nca"}' if self.method == "NCA" else f'{{"name": "mc_po", "num_negatives": {self.negatives}}}'
        options = '{"scoring_dtype": "float32"}'
        return Case("ours", name, self.prompt, self.completion, self.candidates, steps=2, options=options)

    def passes(self) -> float:
        """Thousands of forward passes of a prompt token in a step."""
        passed = 3 * self.candidates if self.method == "NCA" else self.candidates - 1 + 3 * (1 + self.negatives)
        return 2 * (3 * self.prompt + passed * C * self.completion) / 1000


PANELS: dict[str, list[tuple[int, Point]]] = {
    "candidates K (MC-PO)": [(k, Point(candidates=k)) for k in (4, 8, 12, 16)],
    "candidates K (NCA)": [(k, Point("NCA", candidates=k)) for k in (2, 4, 8)],
    "prompt tokens P": [(p, Point(prompt=p)) for p in (64, 256, 512)],
    "completion tokens T": [(t, Point(completion=t)) for t in (32, 64, 128)],
    "negatives M": [(m, Point(negatives=m)) for m in (1, 3, 6)],
}


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Each point in a fresh process; the line; the picture."""
    points = list(dict.fromkeys(point for panel in PANELS.values() for _, point in panel))
    # One turn: the points are many, and the line smooths them.
    found = interleaved({str(number): point.case() for number, point in enumerate(points)}, repeats=1)
    seconds = {point: found[str(number)][0].cpu_seconds for number, point in enumerate(points)}
    slope, offset = np.polyfit([point.passes() for point in points], [seconds[point] for point in points], 1)
    off = [abs(float(seconds[point] / (offset + slope * point.passes())) - 1) for point in points]
    draw(seconds, float(slope), float(offset))
    said = describe(Case("ours"), 1).replace("P=256, T=64", "around P=256, T=64, K=8, M=1")
    return [
        row("Curves: largest deviation of a point from the accounting's line", [max(off)], goal=None, conditions=said),
        row("Curves: CPU seconds for a thousand forward passes of a prompt token", [float(slope)], goal=None, conditions=said),
        row("Curves: CPU seconds of a step beside them", [float(offset)], goal=None, conditions=said),
    ]


def draw(seconds: dict[Point, float], slope: float, offset: float) -> None:
    """Points measured and the accounting's line, a panel for each quantity."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "ncalign"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(15, 3.2), sharey=True, layout="constrained")
    for axis, (label, panel) in zip(axes, PANELS.items(), strict=True):
        sizes = [size for size, _ in panel]
        axis.plot(sizes, [offset + slope * point.passes() for _, point in panel], color="#999", label="accounting")
        axis.plot(sizes, [seconds[point] for _, point in panel], "o", color="#1f5fa8", label="measured")
        axis.set_xlabel(label)
        axis.set_xticks(sizes)
        axis.set_ylim(0, 1.1 * max(seconds.values()))
    axes[0].set_ylabel("CPU seconds of a step")
    axes[0].legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    temporary = PICTURE.with_name(f".{PICTURE.name}.tmp")
    figure.savefig(temporary, format="svg", metadata={"Date": None})
    temporary.replace(PICTURE)


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

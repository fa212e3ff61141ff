"""Draws the plots of docs/concepts.md from experiments of the laboratory: ``python docs/extensions/concept_plots.py``."""

from __future__ import annotations

import sys
from pathlib import Path

from ncalign.lab import concepts, online
from ncalign.lab.report import draw
from ncalign.report.charts import write_chart

IMAGES = Path(__file__).resolve().parents[1] / "images"
EXPERIMENTS = (
    concepts.normalizer_estimate,
    concepts.temperature_of_the_kernel,
    concepts.optimal_policies,
    online.pair_gradient,
    online.displacement,
)


def draw_all(folder: Path) -> list[Path]:
    """Write an SVG for each curve of the experiments, and return the files."""
    curves = [curve for experiment in EXPERIMENTS for curve in experiment().curves]
    files = [folder / f"{curve.name}.svg" for curve in curves]
    for curve, file in zip(curves, files, strict=True):
        write_chart(draw(curve), file)
    return files


if __name__ == "__main__":
    print(*draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES), sep="\n")

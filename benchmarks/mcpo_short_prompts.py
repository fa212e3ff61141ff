"""A step of MC-PO (M = 1) with seven negatives to draw from, against padded DPO; P = T, where sharing saves least."""

from __future__ import annotations

import argparse
import sys

from _steps import Case, describe, interleaved, main_of, ratio_row


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide."""
    cases = {
        "padded": Case("padded", prompt=128, completion=128),
        "mc_po": Case("ours", '{"name": "mc_po"}', prompt=128, completion=128, candidates=8),
    }
    found = interleaved(cases, repeats=arguments.repeats)
    said = describe(cases["padded"], arguments.repeats)
    over, under = found["mc_po"], found["padded"]
    name = "MC-PO fp32, scored as auto picks, P = T: over padded DPO"
    return [ratio_row(name, over, under, goal=1.10, at_least=False, conditions=said)]


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

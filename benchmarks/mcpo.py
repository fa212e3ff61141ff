"""A step of MC-PO (M = 1) with seven negatives to draw from, against padded DPO and our own; P = 4T.

Candidates are scored in the precision that `scoring_dtype: auto` picks on this processor, and for comparison in the other one.
"""

from __future__ import annotations

import argparse
import json
import sys

from _steps import Case, describe, interleaved, main_of, peak, processor, ratio_row, row

OBJECTIVE = '{"name": "mc_po"}'
OTHER = {"bf16": ("fp32", "float32"), "fp32-only": ("bf16", "bfloat16")}


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide."""
    other, precision = OTHER[processor()]
    cases = {
        "padded": Case("padded"),
        "dpo": Case("ours"),
        "mc_po": Case("ours", OBJECTIVE, candidates=8),
        "more": Case("ours", OBJECTIVE, candidates=12),
        f"scored in {other}": Case("ours", OBJECTIVE, candidates=8, options=json.dumps({"scoring_dtype": precision})),
    }
    found = interleaved(cases, repeats=arguments.repeats)
    said = describe(cases["dpo"], arguments.repeats)
    padded, dpo, picked = found["padded"], found["dpo"], found["mc_po"]
    turns = zip(found["more"], picked, padded, strict=True)
    further = [(more.cpu_seconds - fewer.cpu_seconds) / 4 / pair.cpu_seconds for more, fewer, pair in turns]
    auto, instead = "MC-PO fp32, scored as auto picks", f"MC-PO fp32, scored in {other} instead"
    others, of = found[f"scored in {other}"], "peak memory over our DPO's"
    return [
        ratio_row(f"{auto}: over padded DPO", picked, padded, goal=0.90, at_least=False, conditions=said),
        ratio_row(f"{instead}: over padded DPO", others, padded, goal=None, at_least=False, conditions=said),
        ratio_row(f"{auto}: over our DPO", picked, dpo, goal=1.25, at_least=False, conditions=said),
        ratio_row(f"{instead}: over our DPO", others, dpo, goal=None, at_least=False, conditions=said),
        ratio_row(f"{auto}: {of}", picked, dpo, goal=1.10, at_least=False, conditions=said, key=peak),
        ratio_row(f"{instead}: {of}", others, dpo, goal=1.10, at_least=False, conditions=said, key=peak),
        row("MC-PO: a further candidate (8 to 12), in steps of padded DPO", further, goal=0.05, conditions=said),
    ]


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

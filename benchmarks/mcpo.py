"""A step of MC-PO (M = 1) with seven negatives to draw from, against padded DPO and our own; P = 4T."""

from __future__ import annotations

import argparse
import sys

from _steps import Case, describe, interleaved, main_of, peak, ratio_row, row

OBJECTIVE = '{"name": "mc_po"}'
ROUNDED = '{"scoring_dtype": "bfloat16"}'


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide."""
    cases = {
        "padded": Case("padded"),
        "dpo": Case("ours"),
        "mc_po": Case("ours", OBJECTIVE, candidates=8),
        "scored_bf16": Case("ours", OBJECTIVE, candidates=8, options=ROUNDED),
        "more_bf16": Case("ours", OBJECTIVE, candidates=12, options=ROUNDED),
    }
    found = interleaved(cases, repeats=arguments.repeats)
    said = describe(cases["dpo"], arguments.repeats)
    padded, dpo, exact, rounded = found["padded"], found["dpo"], found["mc_po"], found["scored_bf16"]
    turns = zip(found["more_bf16"], rounded, padded, strict=True)
    further = [(more.cpu_seconds - fewer.cpu_seconds) / 4 / pair.cpu_seconds for more, fewer, pair in turns]
    return [
        ratio_row("MC-PO fp32, scored in bf16: over padded DPO", rounded, padded, goal=0.90, at_least=False, conditions=said),
        ratio_row("MC-PO fp32, scored in fp32: over padded DPO", exact, padded, goal=None, at_least=False, conditions=said),
        ratio_row("MC-PO fp32, scored in bf16: over our DPO", rounded, dpo, goal=1.25, at_least=False, conditions=said),
        ratio_row("MC-PO fp32, scored in fp32: over our DPO", exact, dpo, goal=None, at_least=False, conditions=said),
        ratio_row("MC-PO fp32: peak memory over our DPO's", exact, dpo, goal=1.10, at_least=False, conditions=said, key=peak),
        ratio_row(
            "MC-PO fp32, scored in bf16: peak memory over our DPO's",
            rounded,
            dpo,
            goal=1.10,
            at_least=False,
            conditions=said,
            key=peak,
        ),
        row("MC-PO: a further candidate (8 to 12), in steps of padded DPO", further, goal=0.05, conditions=said),
    ]


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

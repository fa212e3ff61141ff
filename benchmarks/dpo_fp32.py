"""A DPO step in float32, against TRL's DPOTrainer and against a plain padded loop with a chunked head; P = 4T."""

from __future__ import annotations

import argparse
import sys

from _steps import Case, describe, interleaved, main_of, peak, ratio_row


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide."""
    cases = {side: Case(side, dtype="float32") for side in ("trl", "padded", "ours")}
    found = interleaved(cases, repeats=arguments.repeats)
    said = describe(cases["ours"], arguments.repeats)
    trl, padded, ours = found["trl"], found["padded"], found["ours"]
    return [
        ratio_row("DPO fp32: tokens/s over TRL's, matched", trl, ours, goal=2.0, at_least=True, conditions=said),
        ratio_row("DPO fp32: tokens/s over a padded loop's", padded, ours, goal=1.4, at_least=True, conditions=said),
        ratio_row("DPO fp32: peak memory over TRL's", ours, trl, goal=0.70, at_least=False, conditions=said, key=peak),
        ratio_row(
            "DPO fp32: peak memory over a padded loop's", ours, padded, goal=None, at_least=False, conditions=said, key=peak
        ),
    ]


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

"""A DPO step against TRL's DPOTrainer as it comes: the reference model in memory, activations recomputed."""

from __future__ import annotations

import argparse
import sys

from _steps import Case, describe, interleaved, main_of, peak, ratio_row


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide."""
    cases = {side: Case(side) for side in ("trl_defaults", "ours")}
    found = interleaved(cases, repeats=arguments.repeats)
    said = describe(cases["ours"], arguments.repeats)
    trl, ours = found["trl_defaults"], found["ours"]
    return [
        ratio_row("DPO fp32: tokens/s over TRL's, defaults", trl, ours, goal=None, at_least=True, conditions=said),
        ratio_row(
            "DPO fp32: peak memory over TRL's, defaults", ours, trl, goal=None, at_least=False, conditions=said, key=peak
        ),
    ]


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

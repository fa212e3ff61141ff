"""What a group's price is when only two of its candidates are trained on: estimated losses and proposals of the last visit.

K = 8. RNCE over all seven negatives from the positive and one draw, NCA from two draws, also without scores, and MC-PO whose
proposals come from the last visit's scores; against our DPO, padded DPO and NCA on all eight. ``--tiny`` runs the same code on
a small model; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from _steps import Case, describe, interleaved, main_of, peak, prepare_model, processor, ratio_row

LAST, NCA_LAST = "MC-PO, proposals of the last visit", "NCA over 8, 2 trained by the last visit"
OBJECTIVES = {
    "RNCE over 7 negatives, 1 + 1 trained": '{"name": "rnce", "estimator": {"candidates": 2}}',
    "NCA over 8, 2 trained": '{"name": "nca", "estimator": {"candidates": 2}}',
    NCA_LAST: '{"name": "nca", "estimator": {"candidates": 2, "proposals": "last_visit"}}',
    LAST: '{"name": "mc_po", "proposals": "last_visit", "acceptance": true}',
}
SCORED = {"bf16": 1.25, "fp32-only": 1.55}
"""Most that a step may cost over our DPO's where candidates are scored, by the processor's kind."""
TINY: Mapping[str, int | str] = {"shape": "tiny", "prompt": 16, "completion": 4, "steps": 1}


def prepare(arguments: argparse.Namespace) -> None:
    """Make the model's folder, where it is needed."""
    if not arguments.tiny:
        prepare_model()


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide."""
    sizes = TINY if arguments.tiny else {}
    cases = {"padded DPO": Case("padded", **sizes), "our DPO": Case("ours", **sizes)}
    cases["NCA over all 8"] = Case("ours", '{"name": "nca"}', candidates=8, **sizes)
    cases |= {name: Case("ours", objective, candidates=8, **sizes) for name, objective in OBJECTIVES.items()}
    found = interleaved(cases, repeats=arguments.repeats)
    said, rows = describe(cases["our DPO"], arguments.repeats), []
    for name in OBJECTIVES:
        most = 1.05 if name in (LAST, NCA_LAST) else SCORED[processor()]
        goals = {"our DPO": most, "NCA over all 8": None, "padded DPO": None}
        if name.startswith("NCA"):
            goals["NCA over all 8"] = 0.55
        for other, goal in goals.items():
            goal = None if arguments.tiny else goal
            rows.append(
                ratio_row(f"{name}: over {other}", found[name], found[other], goal=goal, at_least=False, conditions=said)
            )
        memory = f"{name}: peak memory over our DPO's"
        rows.append(ratio_row(memory, found[name], found["our DPO"], goal=None, at_least=False, conditions=said, key=peak))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small model of random weights, to try the code")
    sys.exit(main_of(measure, __doc__ or "", parser=parser, prepare=prepare))

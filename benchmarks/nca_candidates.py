"""NCA on eight candidates against two: the cost against what the count of operations predicts; P = 4T."""

from __future__ import annotations

import argparse
import sys

from _steps import Case, describe, interleaved, main_of, ratio_row, row


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide."""
    cases = {f"nca_{k}": Case("ours", '{"name": "nca"}', candidates=k) for k in (2, 8)}
    found = interleaved(cases, repeats=arguments.repeats)
    said = describe(cases["nca_8"], arguments.repeats)
    # Vocabulary times width over the body's weights: what the head adds to a completion token.
    cost = 1 + 49152 * 576 / 106.2e6
    case = cases["nca_8"]
    predicted = (case.prompt + 8 * cost * case.completion) / (case.prompt + 2 * cost * case.completion)
    ratios = [
        eight.cpu_seconds / two.cpu_seconds / predicted for eight, two in zip(found["nca_8"], found["nca_2"], strict=True)
    ]
    return [
        ratio_row("NCA: 8 candidates over 2", found["nca_8"], found["nca_2"], goal=None, at_least=False, conditions=said),
        row(f"NCA: the same over the predicted {predicted:.3f}", ratios, goal=1.15, conditions=said),
    ]


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

"""DPO and MC-PO steps on a GPU, against TRL's DPOTrainer on the same card: tokens a second and peak memory; P = 4T.

1.1 billion random weights, all trained, in bfloat16. A step's tokens are those of the pairs in its loss, a prompt counted with
each of its two completions, for all sides alike: MC-PO reads six further candidates of each group beside them. ``--tiny`` runs
the same code on a small model, on the CPU where there is no GPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from _steps import Case, Measured, interleaved, main_of, peak, ratio_row, row

MC_PO = '{"name": "mc_po"}'


def prepare(arguments: argparse.Namespace) -> None:
    """Refuse to start without a GPU, or without TRL."""
    import torch

    if find_spec("trl") is None:
        sys.exit("error: this compares with TRL, which is not installed: pip install 'ncalign[dev]'")
    if not (arguments.tiny or torch.cuda.is_available()):
        print(
            "error: there is no GPU here: run this where one is, or the same code on a small model with --tiny", file=sys.stderr
        )
        sys.exit(2)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide."""
    import torch

    on_gpu = torch.cuda.is_available()
    sizes = {"prompt": 16, "completion": 4} if arguments.tiny else {"prompt": 1024, "completion": 256}
    common = {"shape": "tiny" if arguments.tiny else "1b", "device": "cuda" if on_gpu else "cpu", "dtype": "bfloat16"}
    common |= {"groups": 2 if arguments.tiny else 4, "steps": 1 if arguments.tiny else 6} | sizes
    cases = {side: Case(side, **common) for side in ("trl", "trl_defaults", "ours")}
    cases["mc_po"] = Case("ours", MC_PO, candidates=8, **common)
    found = interleaved(cases, repeats=arguments.repeats)
    case = cases["ours"]
    tokens = 2 * case.groups * (case.prompt + case.completion)
    card = torch.cuda.get_device_name() if on_gpu else "no GPU"
    said = (
        f"{card}, {case.shape} random weights, P={case.prompt}, T={case.completion}, {case.groups} groups a step, bfloat16, "
        f"AdamW, medians of {arguments.repeats} turns in fresh processes"
    )
    names = {"trl": "TRL, matched", "trl_defaults": "TRL, defaults", "ours": "DPO", "mc_po": "MC-PO, K = 8"}
    rows = []
    for side, name in names.items():
        rows += absolute(name, found[side], tokens, said)
    for side in ("ours", "mc_po"):
        for other in ("trl", "trl_defaults"):
            ours, theirs, name = found[side], found[other], f"GPU, {names[side]}"
            speed, memory = f"{name}: tokens/s over {names[other]}", f"{name}: peak memory over {names[other]}"
            rows += [
                ratio_row(speed, theirs, ours, goal=None, at_least=True, conditions=said),
                ratio_row(memory, ours, theirs, goal=None, at_least=False, conditions=said, key=peak),
            ]
    return rows


def absolute(name: str, measured: Sequence[Measured], tokens: int, said: str) -> list[dict[str, object]]:
    """A side's tokens a second and its peak."""
    return [
        row(f"GPU, {name}: tokens/s", [tokens / one.cpu_seconds for one in measured], goal=None, conditions=said),
        row(f"GPU, {name}: peak memory, GiB", [one.peak_mib / 1024 for one in measured], goal=None, conditions=said),
    ]


def parser() -> argparse.ArgumentParser:
    """With the flag of its own."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--tiny", action="store_true", help="a small model, on the CPU where there is no GPU")
    return made


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or "", parser=parser(), prepare=prepare))

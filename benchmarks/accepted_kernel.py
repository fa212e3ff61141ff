"""MC-PO whose draws are proposals (acceptance): its cost over our DPO, and how far one step goes towards the exact kernel.

The policy is SmolLM2-135M after a few steps on other groups, so that implicit rewards differ. Distances are total variations,
medians over groups, of one step's law from the positive to the softmax of the exact implicit rewards.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

import torch
from _steps import Case, describe, interleaved, main_of, make_loop, ratio_row, row
from torch import Tensor

from ncalign.demo.model import demo_model_folder
from ncalign.objectives.kernels import kernel_probabilities
from ncalign.objectives.samplers import proposal_log_ratio

BLIND = '{"name": "mc_po", "acceptance": true, "strategy": "uniform"}'
PROPOSED = '{"name": "mc_po", "acceptance": true}'


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, then divide; then the distances, in this process."""
    cases = {
        "dpo": Case("ours"),
        "blind": Case("ours", BLIND, candidates=8),
        "proposed": Case("ours", PROPOSED, candidates=8),
    }
    found = interleaved(cases, repeats=arguments.repeats)
    said = describe(cases["dpo"], arguments.repeats)
    rows = [
        ratio_row(
            "Accepted blind proposals: over our DPO", found["blind"], found["dpo"], goal=1.05, at_least=False, conditions=said
        ),
        ratio_row(
            "Accepted proposals, scored as auto picks: over our DPO",
            found["proposed"],
            found["dpo"],
            goal=None,
            at_least=False,
            conditions=said,
        ),
    ]
    case = Case("ours", '{"name": "rnce", "num_negatives": 3}', candidates=8, groups=2, steps=7)
    conditions = "SmolLM2-135M after 4 steps of RNCE on other groups, beta 0.1, 8 candidates of 64 random tokens"
    return rows + [row(name, values, goal=None, conditions=conditions) for name, values in distances(case).items()]


def distances(case: Case) -> dict[str, list[float]]:
    """Total variations to the softmax of the exact implicit rewards, group by group."""
    torch.set_num_threads(os.cpu_count() or 1)
    loop = replace(make_loop(case, demo_model_folder()), learning_rate=lambda step: 1e-5)
    trained: set[int] = set()
    for step in range((case.steps + 1) // 2):
        loop.step(step)
        trained |= set(loop.plan.step_groups(step)[1])
    rest = [index for index in range(len(loop.groups)) if index not in trained]
    found: dict[str, list[float]] = {}
    engine = loop.engine
    for part in engine.passes(rest, [loop.groups[index] for index in rest]):
        batch = engine.batch(part)
        exact, rounded = (
            0.1 * (engine.score(batch, dtype=dtype) - batch.reference_logprobs) for dtype in (None, torch.bfloat16)
        )
        positive, size, model = batch.rewards.argmax(dim=1), exact.shape[1], exact.softmax(dim=1)

        laws = {
            "where it starts, at the positive": torch.nn.functional.one_hot(positive, size).double(),
            "one accepted step, blind proposals": one_step(exact, torch.zeros_like(exact), positive),
            "one accepted step, proposals by bf16 scores": one_step(exact, rounded, positive),
            "one accepted step, proposals by exact scores": one_step(exact, exact, positive),
            "uniform, not accepted": torch.full_like(model, 1 / size),
            "bf16 scores, not accepted": rounded.softmax(dim=1),
        }
        for name, law in laws.items():
            found.setdefault(f"Total variation to the kernel: {name}", []).extend(
                (0.5 * (law - model).abs().sum(dim=1)).tolist()
            )
    return found


def one_step(exact: Tensor, scores: Tensor, positive: Tensor) -> Tensor:
    """Law of the state after a proposal by some scores that is accepted by the exact ones."""
    mask, columns = torch.ones_like(exact, dtype=torch.bool), torch.arange(exact.shape[1]).expand(exact.shape)
    ratio = proposal_log_ratio(scores, positive, columns, mask)
    accepted = (exact - exact.gather(1, positive.unsqueeze(1)) - ratio).sigmoid()
    step = kernel_probabilities(scores, positive, mask, strategy="mc") * accepted
    return step.scatter(1, positive.unsqueeze(1), 1 - step.sum(dim=1, keepdim=True))


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

"""Shared prompts against padded rows on SmolLM2-135M, ragged lengths: log-probs and gradients in float32."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path

from _steps import Case, machine, main_of, row


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One pass each way over the same ragged groups."""
    import numpy as np
    import torch
    from _steps import make_loop
    from transformers import AutoTokenizer

    from ncalign.demo.model import demo_model_folder
    from ncalign.training.engine import Pass, Scoring

    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    text = np.array(tokenizer(readme, verbose=False)["input_ids"], dtype=np.int32)
    logprobs, gradients = [], []
    for share in ("true", "false"):
        options = f'{{"share_prompts": {share}}}'
        loop = make_loop(Case("ours", '{"name": "nca"}', candidates=4, groups=3, steps=1, options=options), demo_model_folder())
        # Text, not random tokens: those are a thousand nats unlikely, where float32 itself steps by 1e-4.
        groups = [
            dataclasses.replace(
                group,
                prompt=text[300 * b : 300 * b + 256 - 71 * b],
                completions=tuple(text[900 + 70 * k : 964 + 65 * k - 9 * b] for k in range(len(group.completions))),
            )
            for b, group in enumerate(loop.groups[:3])
        ]
        visit = loop.engine.train_pass(Pass([0, 1, 2], groups, True), epoch=0, scoring=Scoring.NONE)
        visit.loss.sum().backward()
        logprobs.append(visit.logprobs)
        gradients.append([p.grad for p in loop.engine.inner.parameters() if p.grad is not None])
    nats = (logprobs[0] - logprobs[1]).abs().max().item()
    error = sum(float((a - b).double().square().sum()) for a, b in zip(*gradients, strict=True))
    size = sum(float(b.double().square().sum()) for b in gradients[1])
    said = f"SmolLM2-135M, NCA, 3 groups of 4 ragged candidates, float32; {machine()}"
    return [
        row("Shared against padded: largest difference of a completion's log-prob, nats", [nats], goal=1e-4, conditions=said),
        row("Shared against padded: relative difference of the gradients", [(error / size) ** 0.5], goal=1e-5, conditions=said),
    ]


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

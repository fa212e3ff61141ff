"""What a training step spends outside the model's passes, the backward pass, clipping and the optimizer."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from _steps import Case, main_of, row


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Clock every call of the engine's own parts inside `Loop.step`, and the step."""
    import torch
    from _steps import machine, make_loop

    from ncalign.demo.model import demo_model_folder
    from ncalign.model.logprobs import LogprobModel

    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    inside = 0.0

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                inside += time.process_time() - started

        return call

    case = Case("ours", '{"name": "mc_po"}', candidates=8, steps=max(4, 2 * arguments.repeats))
    loop = make_loop(case, demo_model_folder())
    LogprobModel.forward = clocked(LogprobModel.forward)  # type: ignore[method-assign]
    torch.autograd.backward = clocked(torch.autograd.backward)
    torch.nn.utils.clip_grad_norm_ = clocked(torch.nn.utils.clip_grad_norm_)
    torch.optim.AdamW.step = clocked(torch.optim.AdamW.step)  # type: ignore[method-assign]
    shares = []
    for step in range(case.steps + 1):
        inside, started = 0.0, time.process_time()
        loop.step(step)
        total = time.process_time() - started
        shares.append((total - inside) / inside)
        print(f"  step {step}: {total:.2f} cpu-s, {total - inside:.3f} of them outside", flush=True)
    said = f"{json.dumps(case.__dict__)}; one process; {machine()}"
    return [row("Overhead of a step: time outside over time inside the engine", shares[1:], goal=0.03, conditions=said)]


if __name__ == "__main__":
    sys.exit(main_of(measure, __doc__ or ""))

"""Steps of training on the device of far_device.py and on the processor, as JSON: gradient norms, and the host's waits."""

from __future__ import annotations

import json
import sys

import torch
from accelerate import Accelerator

import far_device
from conftest import build_model, build_tokenizer
from ncalign.model import logprobs
from ncalign.model.logprobs import LogprobModel, share_prompts
from ncalign.objectives import DPO, MCPO, NCA, build_method
from ncalign.training.engine import Engine
from ncalign.training.loop import Intervals, Loop
from ncalign.training.schedule import make_plan
from test_engine import groups

# PyTorch can't compute a part again in the backward pass of such a device.
logprobs.checkpoint = lambda function, *given, **options: function(*given)


def steps(
    device: torch.device, objective: MCPO | DPO | NCA, *, shared: bool, prompts_once: bool
) -> tuple[list[float], list[str]]:
    model = build_model(build_tokenizer())
    if shared:
        assert share_prompts(model) is None
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = device
    inner = LogprobModel(model.to(device))
    engine = Engine(
        inner,
        build_method(objective),
        accelerator,
        pad_token_id=0,
        seed=3,
        max_groups=8,
        max_tokens=4096,
        prompts_once=prompts_once,
    )
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3, foreach=False)
    plan = make_plan(3, groups_per_step=3, num_train_epochs=3, max_steps=-1, seed=0)
    loop = Loop(engine, optimizer, plan, groups(), [], lambda step: 1e-3, 1.0, Intervals(1, 0, 0), lambda row: None)
    norms = [loop.step(0)[0]]
    far_device.waits.clear()
    norms.append(loop.step(1)[0])
    return norms, list(far_device.waits)


found = {}
for shared, prompts_once in ((True, True), (True, False), (False, False)):
    for objective in (MCPO(), DPO(), NCA()):
        name = f"{objective.name} {shared} {prompts_once}"
        (near, _), (far, waits) = (
            steps(device, objective, shared=shared, prompts_once=prompts_once)
            for device in (torch.device("cpu"), far_device.DEVICE)
        )
        found[name] = {"near": near, "far": far, "waits": waits}
json.dump(found, sys.stdout)

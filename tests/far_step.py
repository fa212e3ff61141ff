"""Steps of training on the device of far_device.py and on the processor, as JSON: gradient norms, and the host's waits."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.utils import _to_kwargs

import far_device
from conftest import build_model, build_tokenizer
from ncalign.model import logprobs
from ncalign.model.logprobs import LogprobModel
from ncalign.model.sharing import share_prompts
from ncalign.objectives import DPO, MCPO, NCA, build_method
from ncalign.training.engine import Engine
from ncalign.training.loop import Intervals, Loop
from ncalign.training.schedule import make_plan
from test_engine import groups
from test_logprobs import adapted

# PyTorch can't compute a part again in the backward pass of such a device.
logprobs.checkpoint = lambda function, *given, **options: function(*given)


class Parallel(torch.nn.DataParallel[torch.nn.Module]):
    """As DistributedDataParallel treats what a model is called with; processes to talk to it has none."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        torch.nn.Module.__init__(self)
        self.module, self.device = module, device

    def forward(self, *given: Any, **options: Any) -> Any:
        moved, named = _to_kwargs(given, options, self.device, False)
        return self.module(*moved[0], **named[0])


def steps(
    device: torch.device, objective: MCPO | DPO | NCA, *, shared: bool, prompts_once: bool, lora: bool, parallel: bool
) -> tuple[list[float], list[str]]:
    model: Any = build_model(build_tokenizer())
    if lora:
        model = adapted(model)
    if shared:
        assert share_prompts(model) is None
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = device
    inner = LogprobModel(model.to(device))
    engine = Engine(
        Parallel(inner, device) if parallel else inner,
        build_method(objective),
        accelerator,
        pad_token_id=0,
        seed=3,
        max_groups=8,
        max_tokens=4096,
        prompts_once=prompts_once,
    )
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    plan = make_plan(3, groups_per_step=3, num_train_epochs=3, max_steps=-1, seed=0)
    loop = Loop(engine, optimizer, plan, groups(), [], lambda step: 1e-3, 1.0, Intervals(1, 0, 0), lambda row: None)
    norms = [loop.step(0)[0]]
    far_device.waits.clear()
    norms.append(loop.step(1)[0])
    return norms, list(far_device.waits)


found = {}
for shared, prompts_once in ((True, True), (True, False), (False, False)):
    for objective in (MCPO(), MCPO(proposals="last_visit", acceptance=True, target_ess=0.6), DPO(), NCA()):
        for lora, parallel in ((False, False), (False, True), (True, False)):
            if lora and not isinstance(objective, MCPO):
                continue
            kind = f"{objective.name} {getattr(objective, 'proposals', '')}"
            name = f"{kind} {shared} {prompts_once} {lora} {parallel}"
            options = {"shared": shared, "prompts_once": prompts_once, "lora": lora, "parallel": parallel}
            (near, _), (far, waits) = (
                steps(device, objective, **options) for device in (torch.device("cpu"), far_device.DEVICE)
            )
            found[name] = {"near": near, "far": far, "waits": waits}
json.dump(found, sys.stdout)

"""Norms and MLPs of a model's layers compiled, each in its place: fewer kernels to launch, and the model stays as it is."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ncalign.model.logprobs import base_causal_model

# One graph for each kind of module and pass: with and without gradients, precision, adapter on and off. Past PyTorch's own
# limit of 8 modules would run uncompiled, with no more than a warning.
_MOST_GRAPHS = 64


def compile_norms_and_mlps(model: PreTrainedModel | PeftModel, *, device: torch.device) -> int:
    """Compile the modules whose class is named a norm or an MLP, for any number of tokens.

    Modules, names of weights and hooks stay: checkpoints and adapters do not change.

    Args:
        model: whose modules are compiled, at their first call.
        device: on which it will run.

    Returns:
        How many there are.

    Raises:
        ValueError: the model has none, or PyTorch can't compile for this device.
    """
    causal = base_causal_model(model)
    modules = [module for module in causal.modules() if type(module).__name__.endswith(("Norm", "MLP"))]
    if not modules:
        raise ValueError(
            f"{type(causal).__name__} has no module whose class is named a norm or an MLP: leave compile_norms_and_mlps out"
        )
    try:
        torch.compile(nn.functional.silu)(torch.ones(8, device=device))
    # What a compiler raises that is missing or does not work differs from device to device.
    except Exception as failure:
        why = str(failure).strip().split("\n", 1)[0] or type(failure).__name__
        raise ValueError(
            f"compile_norms_and_mlps: PyTorch can't compile for this {device.type} ({why}): leave it out, or install a compiler"
        ) from failure
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    for module in modules:
        module.compile(dynamic=True)
    return len(modules)

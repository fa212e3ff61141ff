"""For a process that runs `ncalign online`: it shards (FSDP2) on the CPU, which accelerate does on accelerators only."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ncalign.generation.local import TransformersGenerator
from ncalign.model.logprobs import base_causal_model
from ncalign.training.config import TrainConfig
from ncalign.training.launch import make_accelerator
from ncalign.training.loop import Loop


def sharded_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a process that was launched with FSDP2."""
    accelerator = make_accelerator(config)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    return accelerator


def watched_sample(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Sample from weights that this process holds whole, without a word to others."""
    gather = torch.distributed.all_gather_into_tensor

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("sampling waits for other processes")

    def call(self: TransformersGenerator, *args: Any) -> Any:
        assert not any(isinstance(parameter, DTensor) for parameter in self._model.parameters())
        torch.distributed.all_gather_into_tensor = refuse
        try:
            return sample(self, *args)
        finally:
            torch.distributed.all_gather_into_tensor = gather

    return call


def watched_step(step: Callable[[Loop, int], tuple[float, int]]) -> Callable[[Loop, int], tuple[float, int]]:
    """Train on weights of which this process holds its parts."""

    def call(self: Loop, number: int) -> tuple[float, int]:
        layers = base_causal_model(self.engine.inner.model).model.layers
        assert all(isinstance(layer, FSDPModule) for layer in layers)
        assert all(isinstance(parameter, DTensor) for layer in layers for parameter in layer.parameters())
        return step(self, number)

    return call


for place, name, replacement in (
    ("ncalign.online.online", "make_accelerator", sharded_accelerator),
    ("ncalign.generation.local.TransformersGenerator", "_sample", watched_sample(TransformersGenerator._sample)),
    ("ncalign.training.loop.Loop", "step", watched_step(Loop.step)),
):
    setattr(resolve_name(place), name, replacement)

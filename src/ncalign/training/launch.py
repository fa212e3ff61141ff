"""How a launch is read: this process's accelerator, and in what precision sharded weights compute."""

from __future__ import annotations

import ctypes
import os
import sys
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    disable_fsdp_ram_efficient_loading,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from ncalign.core.progress import say
from ncalign.training.config import TrainConfig
from ncalign.training.peers import another_process_named
from ncalign.training.trackers import check_trackers

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_GROUPS: list[torch.distributed.ProcessGroup | None] = []
"""Every process group of this process, held until it ends: DDP must not be the last to let go of one.

Freeing a gloo group waits for its threads. Python's reference gives up the interpreter's lock for that; the one in DDP's C++
part does not, and a thread that needs the lock to drop its last tensor then never ends.
"""
_UNSUPPORTED = frozenset({DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA})


def make_accelerator(config: TrainConfig) -> Accelerator:
    """This process's accelerator, with the run's trackers.

    Raises:
        ConfigError: a tracker that accelerate does not know, or whose package is not installed.
        ValueError: it was launched with a way to distribute that ncalign does not support, or the first process is not there.
    """
    check_trackers(config.report_to)
    # Under it transformers itself leaves weights out in all processes but a node's first; `loading` does so where it can.
    disable_fsdp_ram_efficient_loading()
    accelerator = _joined(
        # Without an accelerator, torchrun's processes are joined (over gloo) only when the CPU is asked for.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        # The loop scales its losses itself, whatever the launcher was told.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(config.report_to) or None,
        project_dir=str(config.output_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout))],
    )
    if torch.distributed.is_initialized():
        _GROUPS.append(torch.distributed.group.WORLD)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    kind, fsdp = accelerator.distributed_type, accelerator.distributed_type == DistributedType.FSDP
    if kind in _UNSUPPORTED or (fsdp and not accelerator.is_fsdp2):
        zero = (
            "; docs/distributed.md, From ZeRO to FSDP2, has a table of its settings"
            if kind == DistributedType.DEEPSPEED
            else ""
        )
        raise ValueError(
            f"accelerate was launched with {'FSDP, version 1' if fsdp else kind.value}: ncalign trains on one process, with "
            f"DDP (distributed_type: MULTI_GPU) or with FSDP2 (distributed_type: FSDP and fsdp_version: 2){zero}"
        )
    if not fsdp and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and accelerator.is_main_process:
        say("note: accelerate shards only on an accelerator: every process holds the whole model (DDP)")
    return accelerator


def _joined(**options: Any) -> Accelerator:
    """The accelerator, once this process has joined the others.

    Raises:
        ValueError: the first process is not there; torchrun ends the others itself where it fails.
    """
    try:
        with another_process_named():
            return Accelerator(**options)
    except torch.distributed.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"the first process of this run is not reached at {place}: it was not started there, or has stopped, and its own "
            f"message says why ({error})"
        ) from error


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: fresh pages for large tensors cost some 10 % of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of every weight (FSDP2)."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def compute_in(dtype: torch.dtype | None, accelerator: Accelerator) -> None:
    """Have the weights of a model that is sharded next gathered in this precision, and its gradients added up in float32.

    Under autocast each layer would be gathered in float32, and its cast kept until the pass ends: the whole model in bfloat16
    beside what sharding saves.

    Args:
        dtype: None: the weights' own.
        accelerator: this process's, launched with FSDP2.
    """
    # Whatever the launcher was told: the run's dtype decides.
    policy = None if dtype is None else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    accelerator.state.fsdp_plugin.mixed_precision_policy = policy

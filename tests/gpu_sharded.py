"""A step under FSDP2 on one process, run by `sharded_step` in a process of its own; prints what memory grew by, as JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gpu_figures import Shape, Sizes
from gpu_runs import make_loop, measured_step
from ncalign.model.logprobs import base_causal_model
from ncalign.training.config import TrainConfig
from ncalign.training.launch import make_accelerator

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch` sets from `recipes/accelerate/fsdp2-8-gpus.yaml`."""


class Sharded(NamedTuple):
    """A step's seconds, bytes that memory grew by, and the weights that every process shares in."""

    seconds: float
    grown: int
    weights: int


def sharded_step(shape: Shape, sizes: Sizes) -> Sharded:
    """Run this file as one process of a launch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    if torch.cuda.is_available():
        launch |= LAUNCHED
    asked = json.dumps([list(vars(shape).values()), sizes])
    done = subprocess.run(
        [sys.executable, __file__, asked], env=os.environ | launch, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Sharded(*json.loads(done.stdout.splitlines()[-1]))


def main(asked: str) -> None:
    """The step."""
    warnings.filterwarnings("ignore")
    values, sizes = json.loads(asked)
    shape = Shape(*values)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(model="random", data=Path(folder), output_dir=Path(folder), report_to=())
        accelerator = make_accelerator(config)
        if accelerator.device.type == "cpu":
            # accelerate shards on accelerators only: tell its state what it would find there.
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
            )
        loop = make_loop(shape, sizes, accelerator)
        model, layers = loop.engine.model, base_causal_model(loop.engine.inner.model).model.layers
        assert all(isinstance(module, FSDPModule) for module in (model, *layers))
        # A pass without gradients may have left the root's own weights gathered.
        assert all(isinstance(parameter, DTensor) for parameter in layers.parameters())
        found = measured_step(loop)
        number = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps(Sharded(found.seconds, found.grown, number)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

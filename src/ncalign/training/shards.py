"""Weights and moments of a sharded model on disk: each process writes its parts, and any number of processes reads them.

By torch.distributed.checkpoint in its Hugging Face form: safetensors files whose headers say where in the whole tensor a part
lies. Its usual form pickles an index, which nothing here reads. No process ever holds more than its own parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ncalign.model.logprobs import LogprobModel

_FOLDER = "shards"
_CAN_RESET = "2.13"
"""Of torch: what a forward pass leaves behind can be undone from here on."""


def reshard(model: nn.Module) -> None:
    """Have a sharded model hold its parts alone, and what its parameters are: a pass without gradients leaves some gathered."""
    for part in model.modules() if isinstance(model, FSDPModule) else ():
        if isinstance(part, FSDPModule):
            part.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its part of one that is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, whole: Tensor) -> None:
    """Copy values into a tensor, or this process's part of them into its part."""
    if isinstance(target, DTensor):
        values = whole.to(target.to_local().device)
        whole = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    own_part(target).copy_(own_part(whole))


class Gathering:
    """Gives every process all weights of a sharded model for a while, such as to sample from it.

    Args:
        model: the policy, after accelerate has prepared it.
        accelerator: this process's.

    Raises:
        ValueError: the model is sharded, and torch is too old.
    """

    def __init__(self, model: LogprobModel, accelerator: Accelerator) -> None:
        self._model, self._accelerator = model, accelerator
        if isinstance(model, FSDPModule) and torch.__version__ < _CAN_RESET:
            raise ValueError(
                f"sampling from sharded weights (FSDP2) needs torch {_CAN_RESET}, and this is {torch.__version__}: upgrade it, "
                "train under DDP, or let servers sample (generator: server)"
            )
        # Torch finds out which module holds the others when that one is called first.
        register_fsdp_forward_method(model, "prepare_parts")

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A context in which passes through the model wait for no other process; all processes enter it together.

        Until it is left each holds the whole model, in the precision in which it computes.
        """
        if not isinstance(self._model, FSDPModule):
            yield
            return
        layers = [part for part in self._model.model.modules() if isinstance(part, FSDPModule)]
        # Not in inference mode, whose tensors can't be trained on.
        with torch.no_grad():
            self._model.prepare_parts()
            for layer in layers:
                layer.set_reshard_after_forward(False, recurse=False)
                layer.unshard()
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(bool(self._accelerator.state.fsdp_plugin.reshard_after_forward), recurse=False)
            # Backward passes prefetch what came before in forward passes: that must be the same on all processes.
            self._model.reset_iter_state()


def has_shards(folder: Path) -> bool:
    """Whether the checkpoint was written by processes that each held parts."""
    return (folder / _FOLDER).is_dir()


def write_shards(tensors: dict[str, Any], folder: Path, accelerator: Accelerator) -> list[Path]:
    """Write this process's parts; all processes call it.

    Args:
        tensors: as this process holds them.
        folder: of the checkpoint.
        accelerator: this process's.

    Returns:
        The files that this process wrote.

    Raises:
        OSError: a process could not write; in every process.
    """
    with _system_errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / _FOLDER), save_distributed=True))
    return sorted((folder / _FOLDER).glob(f"shard-{accelerator.process_index + 1:05d}-*"))


def shard_shapes(folder: Path) -> dict[str, torch.Size]:
    """The whole tensors' shapes, by name.

    Raises:
        OSError: a file can't be read.
        SafetensorError: a file is damaged.
    """
    described = HuggingFaceStorageReader(str(folder / _FOLDER)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in described.items() if isinstance(entry, TensorStorageMetadata)}


def read_shards(tensors: dict[str, Any], folder: Path, accelerator: Accelerator) -> None:
    """Fill tensors, whole or sharded over any number of processes, with what was written; all processes call it."""
    reader = HuggingFaceStorageReader(str(folder / _FOLDER))
    with _system_errors(), warnings.catch_warnings():
        # One process reads them alone, on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        load(tensors, storage_reader=reader, no_dist=accelerator.num_processes == 1)


@contextmanager
def _system_errors() -> Iterator[None]:
    """Torch wraps what failed in each process into an exception of its own, which is not even an ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"process {rank}: {cause.strerror or cause}", cause.filename) from error
        raise RuntimeError(f"process {rank}: {cause}") from error

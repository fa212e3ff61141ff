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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_FOLDER = "shards"


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

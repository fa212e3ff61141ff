"""Checkpoints: what training can't compute again from the configuration, written whole or not at all.

A checkpoint is a folder ``checkpoints/step-00000010`` with the trained weights and the optimizer's moments (safetensors), every
process's random state, ``state.json``, and ``checksums.json`` with the SHA-256 of each. Learning rate, data position and the
kernel's random numbers are functions of the step and the seed, so the step number restores them. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from ncalign.core.atomic import atomic_folder, delete_folder
from ncalign.core.outputs import record

_PREFIX = "step-"
_MOMENT = "|"
_FURTHER = "tensors.safetensors"
_CHECKSUMS = "checksums.json"


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    state: dict[str, Any],
    keep: int,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a step's checkpoint, with further tensors where a run has some, and delete all but the last ``keep``."""
    folder = checkpoint_folder(run_folder, step)
    if isinstance(model, FSDPModule):
        # A pass without gradients leaves the root's own weights gathered, and the optimizer does not know them so.
        model.reshard()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # Gathering takes every process; what is gathered reaches the first one alone.
    moments: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=options))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights: dict[str, Any] = dict(get_model_state_dict(model, options=options))
    if accelerator.is_main_process:
        record(folder.parent, [f"{_PREFIX}*"], verb="train")
    with atomic_folder(folder, first=accelerator.is_main_process) as temporary:
        accelerator.wait_for_everyone()
        save_file(_random_state(), temporary / f"random-{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            trained = _trained_names(moments["param_groups"])
            save_file(_unshared({name: weights[name] for name in sorted(trained)}), temporary / "model.safetensors")
            save_file(_unshared(_flat_moments(moments)), temporary / "optimizer.safetensors")
            if tensors:
                save_file(_unshared(dict(tensors)), temporary / _FURTHER)
            (temporary / "state.json").write_text(json.dumps({"step": step, **state, "param_groups": moments["param_groups"]}))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / _CHECKSUMS).write_text(json.dumps(_checksums(temporary)))
    if accelerator.is_main_process:
        for old in find_checkpoints(run_folder)[:-keep]:
            delete_folder(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(
    folder: Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """Restore weights, optimizer and random state; the rest of what was saved is returned, once no file differs from what was.

    Raises:
        ValueError: the checkpoint is damaged, or of another number of processes or another model.
    """
    written_by = len(list(folder.glob("random-*.safetensors")))
    if written_by != accelerator.num_processes:
        raise ValueError(
            f"{folder} was written by {written_by} process(es), and {accelerator.num_processes} would see other groups in each "
            f"step: resume with {written_by} (torchrun --nproc_per_node {written_by}), or start again with overwrite: true"
        )
    try:
        _verify(folder)
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
        flat_moments = load_file(folder / "optimizer.safetensors")
        random_state = load_file(folder / f"random-{accelerator.process_index}.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is damaged ({error}): delete it, and resume goes on from the checkpoint before it"
        ) from error
    options = StateDictOptions(full_state_dict=True, strict=False)
    result = set_model_state_dict(model, weights, options=options)
    moments: dict[str, Any] = {"state": {}, "param_groups": state.pop("param_groups")}
    lost = sorted(_trained_names(moments["param_groups"]).intersection(result.missing_keys))
    if lost or result.unexpected_keys:
        raise ValueError(f"{folder} is of another model: {[*lost, *result.unexpected_keys][:3]} do not fit")
    for name, tensor in flat_moments.items():
        parameter, _, key = name.rpartition(_MOMENT)
        moments["state"].setdefault(parameter, {})[key] = tensor
    set_optimizer_state_dict(model, optimizer, moments, options=StateDictOptions(full_state_dict=True))
    _restore_random_state(random_state)
    return state


def further_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that were saved with a checkpoint besides weights and optimizer."""
    path = folder / _FURTHER
    return dict(load_file(path)) if path.is_file() else {}


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run_folder / "checkpoints" / f"{_PREFIX}{step:08d}"


def find_checkpoints(run_folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run_folder / "checkpoints").glob(f"{_PREFIX}*")
    return sorted(folder for folder in found if (folder / "state.json").is_file())


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != _CHECKSUMS}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verify(folder: Path) -> None:
    """Raise ValueError where a file is not what was written, is missing, or came later."""
    written, found = json.loads((folder / _CHECKSUMS).read_text()), _checksums(folder)
    changed = sorted(name for name in {*written, *found} if written.get(name) != found.get(name))
    if changed:
        raise ValueError(f"{', '.join(changed)} changed after writing")


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _trained_names(param_groups: list[dict[str, Any]]) -> set[str]:
    return {name for group in param_groups for name in group["params"]}


def _flat_moments(moments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """AdamW's state of each parameter (two moments and a step count) under flat names."""
    return {f"{name}{_MOMENT}{key}": value for name, entry in moments["state"].items() for key, value in entry.items()}


def _unshared(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tied weights appear once each in a safetensors file: give every name memory of its own."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}

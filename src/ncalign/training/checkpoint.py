"""Checkpoints: what training can't compute again from the configuration, written whole or not at all.

A checkpoint is a folder ``checkpoints/step-00000010`` with the trained weights and the optimizer's moments (safetensors), every
process's random state, ``state.json``, and ``checksums.json`` with the SHA-256 of each. Learning rate, data position and the
kernel's random numbers are functions of the step and the seed, so the step number restores them. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
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
from ncalign.core.kept import read_kept
from ncalign.core.outputs import record
from ncalign.training.saved import SavedState

_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")
_MOMENT = "|"
_FURTHER = "tensors.safetensors"
_CHECKSUMS = "checksums.json"
_SUMS = TypeAdapter(dict[str, str])
_REMEDY = "delete the folder, and resume goes on from the checkpoint before it"
State = TypeVar("State", bound=SavedState)


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
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / _CHECKSUMS).write_text(json.dumps(_checksums(temporary)))
    if accelerator.is_main_process:
        for old in find_checkpoints(run_folder)[:-keep]:
            delete_folder(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(
    folder: Path,
    form: TypeAdapter[State],
    *,
    num_steps: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> State:
    """Restore weights, optimizer and random state; the rest of what was saved is returned, once no file differs from what was.

    Args:
        folder: of the checkpoint.
        form: of what was saved besides.
        num_steps: of the run.
        model: whose weights are restored.
        optimizer: whose moments are restored; how it steps is the run's configuration, not the checkpoint's.
        accelerator: this process's.

    Raises:
        ValueError: the checkpoint is damaged, or of another number of processes, another model or a longer run.
    """
    written_by = len(list(folder.glob("random-*.safetensors")))
    if written_by != accelerator.num_processes:
        raise ValueError(
            f"{folder} was written by {written_by} process(es), and {accelerator.num_processes} would see other groups in each "
            f"step: resume with {written_by} (torchrun --nproc_per_node {written_by}), or start again with overwrite: true"
        )
    _verify(folder)
    state = read_kept(folder / "state.json", form, remedy=_REMEDY)
    if checkpoint_folder(folder.parent.parent, state["step"]).name != folder.name:
        raise ValueError(f"{folder / 'state.json'} is damaged (it is of step {state['step']}): {_REMEDY}")
    if state["step"] > num_steps:
        raise ValueError(
            f"{folder} is of step {state['step']}, and the run ends at step {num_steps}: give it as many steps as before, or "
            "delete the checkpoints beyond its end"
        )
    try:
        weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
        flat_moments = load_file(folder / "optimizer.safetensors")
        random_state = load_file(folder / f"random-{accelerator.process_index}.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error}): {_REMEDY}") from error
    moments: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
    _check_fits(folder, weights, flat_moments, _trained_names(moments["param_groups"]), moments["state"])
    result = set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
    assert not result.unexpected_keys, result.unexpected_keys[:3]
    moments["state"] = {}
    for name, tensor in flat_moments.items():
        parameter, _, key = name.rpartition(_MOMENT)
        moments["state"].setdefault(parameter, {})[key] = tensor
    set_optimizer_state_dict(model, optimizer, moments, options=StateDictOptions(full_state_dict=True))
    _restore_random_state(folder, random_state)
    return state


def _check_fits(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    trained: set[str],
    state: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Refuse tensors that are not those of the parameters that this run trains."""
    shapes = {f"{name}{_MOMENT}{key}": value.shape for name, entry in state.items() for key, value in entry.items()}
    wrong = sorted(trained.symmetric_difference(weights))
    wrong += [name for name, tensor in moments.items() if shapes.get(name) != tensor.shape]
    # A parameter has the shape of its first moment.
    wrong += [name for name, tensor in weights.items() if shapes.get(f"{name}{_MOMENT}exp_avg") != tensor.shape]
    if wrong:
        raise ValueError(f"{folder} is of another model: {wrong[:3]} do not fit")


def refuse_other_run(folder: Path, state: SavedState, *, weights: str, data: str, what: str) -> None:
    """Refuse a checkpoint of a run that began with other weights or data; ``what`` names the data."""
    pairs = (("the model's weights or precision", state["weights"], weights), (what, state["data"], data))
    changed = [name for name, before, now in pairs if before != now]
    if changed:
        raise ValueError(
            f"{folder} is of a run with other inputs: {changed[0]} changed since; restore them, or start again with "
            "overwrite: true"
        )


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
    # A copy that someone made of one has another name.
    whole = (folder for folder in found if _NAME.fullmatch(folder.name) and (folder / "state.json").is_file())
    return sorted(whole)


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
    written = read_kept(folder / _CHECKSUMS, _SUMS, remedy=_REMEDY)
    found = _checksums(folder)
    changed = sorted(name for name in {*written, *found} if written.get(name) != found.get(name))
    if changed:
        raise ValueError(f"{folder} is damaged ({', '.join(changed)} changed after writing): {_REMEDY}")


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(folder: Path, state: dict[str, torch.Tensor]) -> None:
    own = torch.get_rng_state()
    if "cpu" not in state or (state["cpu"].dtype, state["cpu"].shape) != (own.dtype, own.shape):
        raise ValueError(f"{folder} is damaged (it holds no state of random numbers): {_REMEDY}")
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

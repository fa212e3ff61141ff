"""Checkpoints: what training can't compute again from the configuration, written whole or not at all.

A checkpoint is a folder ``checkpoints/step-00000010`` with the trained weights and the optimizer's moments (safetensors; of a
sharded model the parts as each process holds them, in ``shards/``), every process's random state, ``state.json``, and
``checksums.json`` with the SHA-256 of each. Learning rate, data position and the kernel's random numbers are functions of the
step and the seed, so the step number restores them. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
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
from ncalign.training.peers import decided_by_first
from ncalign.training.saved import SavedState
from ncalign.training.shards import fill, has_shards, read_shards, reshard, shard_shapes, write_shards

_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")
_MOMENT = "|"
_FURTHER, _WEIGHTS = "tensors", "model.safetensors"
_CHECKSUMS = "checksums.json"
_SUMS = TypeAdapter(dict[str, str])
REMEDY = "delete the folder, and resume goes on from the checkpoint before it"
"""What is to be done about a damaged checkpoint."""
State = TypeVar("State", bound=SavedState)
_NONE: Mapping[str, torch.Tensor] = MappingProxyType({})


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    state: dict[str, Any],
    tensors: Mapping[str, torch.Tensor] = _NONE,
) -> Path:
    """Write a step's checkpoint, with further tensors where a run has some."""
    folder = checkpoint_folder(run_folder, step)
    sharded = isinstance(model, FSDPModule)
    # The optimizer does not know weights that are gathered.
    reshard(model)
    weights, moments = _trained_state(model, optimizer)
    if accelerator.is_main_process:
        record(folder.parent, [f"{_PREFIX}*"], verb="train")
    with atomic_folder(folder, first=accelerator.is_main_process) as temporary:
        accelerator.wait_for_everyone()
        written = [temporary / f"random-{accelerator.process_index}.safetensors"]
        save_file(_random_state(), written[0])
        if sharded:
            written += write_shards(weights | _flat_moments(moments) | dict(tensors), temporary, accelerator)
        if accelerator.is_main_process:
            whole = {} if sharded else {"model": weights, "optimizer": _flat_moments(moments)}
            for name, content in (whole | ({_FURTHER: dict(tensors)} if tensors and not sharded else {})).items():
                save_file(_unshared(content), written_file := temporary / f"{name}.safetensors")
                written.append(written_file)
            written.append(temporary / "state.json")
            written[-1].write_text(json.dumps({"step": step, **state}))
        # Each process reads what it wrote: others' files may show late on a network's disk.
        sums = gather_object([{path.relative_to(temporary).as_posix(): _sha256(path) for path in written}])
        if accelerator.is_main_process:
            together = {name: digest for own in sums for name, digest in own.items()}
            (temporary / _CHECKSUMS).write_text(json.dumps(dict(sorted(together.items()))))
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
    return folder


def delete_old(run_folder: Path, accelerator: Accelerator, *, keep: int, best: int = 0) -> None:
    """Delete all checkpoints but the last ``keep``, and that of the step ``best``."""
    if accelerator.is_main_process:
        for old in find_checkpoints(run_folder)[:-keep]:
            if old != checkpoint_folder(run_folder, best):
                delete_folder(old)
    accelerator.wait_for_everyone()


def load_checkpoint(
    folder: Path,
    form: TypeAdapter[State],
    *,
    num_steps: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    tensors: Mapping[str, torch.Tensor] = _NONE,
) -> State:
    """Restore weights, optimizer and random state; the rest of what was saved is returned, once no file differs from what was.

    Args:
        folder: of the checkpoint.
        form: of what was saved besides.
        num_steps: of the run.
        model: whose weights are restored.
        optimizer: whose moments are restored; how it steps is the run's configuration, not the checkpoint's.
        accelerator: this process's.
        tensors: the further tensors that were saved, which are filled.

    Raises:
        ValueError: the checkpoint is damaged, or of another model or a longer run.
    """
    _verify(folder, accelerator)
    state = read_kept(folder / "state.json", form, remedy=REMEDY)
    if checkpoint_folder(folder.parent.parent, state["step"]).name != folder.name:
        raise ValueError(f"{folder / 'state.json'} is damaged (it is of step {state['step']}): {REMEDY}")
    if state["step"] > num_steps:
        raise ValueError(
            f"{folder} is of step {state['step']}, and the run ends at step {num_steps}: give it as many steps as before, or "
            "delete the checkpoints beyond its end"
        )
    weights, moments = _trained_state(model, optimizer)
    try:
        if has_shards(folder):
            flat = weights | _flat_moments(moments) | dict(tensors)
            _check_fits(folder, shard_shapes(folder), _shapes(flat))
            read_shards(flat, folder, accelerator)
            set_model_state_dict(model, weights, options=StateDictOptions(strict=False))
            set_optimizer_state_dict(model, optimizer, moments)
        else:
            _load_whole(folder, model, optimizer, weights, moments)
            _load_further(folder, tensors)
        # Each process goes on with its own; another number of them draws an adapter's dropout anew.
        if len(list(folder.glob("random-*.safetensors"))) == accelerator.num_processes:
            _restore_random_state(folder, load_file(folder / f"random-{accelerator.process_index}.safetensors"))
        else:
            torch.manual_seed(torch.initial_seed() + accelerator.num_processes * state["step"])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error}): {REMEDY}") from error
    return state


def _trained_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained, by name, and the optimizer's state of it: the tensors themselves, or this process's parts of them."""
    moments: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
    weights = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    trained = {name for group in moments["param_groups"] for name in group["params"]}
    return {name: weights[name] for name in sorted(trained)}, moments


def load_weights(folder: Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Restore the trained weights of a checkpoint of this run, and nothing else.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    _verify(folder, accelerator)
    weights, _ = _trained_state(model, optimizer)
    if has_shards(folder):
        read_shards(weights, folder, accelerator)
        set_model_state_dict(model, weights, options=StateDictOptions(strict=False))
    else:
        loaded: dict[str, Any] = dict(load_file(folder / _WEIGHTS))
        _check_fits(folder, _shapes(loaded), _shapes(weights))
        _set_whole(model, loaded)


def _load_whole(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], moments: dict[str, Any]
) -> None:
    """Restore what one process wrote."""
    loaded: dict[str, Any] = dict(load_file(folder / _WEIGHTS))
    flat = load_file(folder / "optimizer.safetensors")
    _check_fits(folder, _shapes(loaded | flat), _shapes(weights | _flat_moments(moments)))
    _set_whole(model, loaded)
    moments["state"] = {}
    for name, tensor in flat.items():
        parameter, _, key = name.rpartition(_MOMENT)
        moments["state"].setdefault(parameter, {})[key] = tensor
    set_optimizer_state_dict(model, optimizer, moments, options=StateDictOptions(full_state_dict=True))


def _set_whole(model: torch.nn.Module, weights: dict[str, Any]) -> None:
    result = set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
    assert not result.unexpected_keys, result.unexpected_keys[:3]


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_fits(folder: Path, found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Refuse tensors that are not those of the parameters that this run trains."""
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
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


def _load_further(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the tensors that were saved besides weights and optimizer."""
    path = folder / f"{_FURTHER}.safetensors"
    found = load_file(path) if tensors and path.is_file() else {}
    _check_fits(folder, {name: found[name].shape for name in found.keys() & tensors}, _shapes(tensors))
    for name, target in tensors.items():
        fill(target, found[name])


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run_folder / "checkpoints" / f"{_PREFIX}{step:08d}"


def find_checkpoints(run_folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run_folder / "checkpoints").glob(f"{_PREFIX}*")
    # A copy that someone made of one has another name.
    whole = (folder for folder in found if _NAME.fullmatch(folder.name) and (folder / "state.json").is_file())
    return sorted(whole)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verify(folder: Path, accelerator: Accelerator) -> None:
    """Raise ValueError, in every process, where a file is not what was written, is missing, or came later."""

    def kept() -> tuple[dict[str, str], list[str]]:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return read_kept(folder / _CHECKSUMS, _SUMS, remedy=REMEDY), sorted({*files} - {_CHECKSUMS})

    written, found = decided_by_first(accelerator, kept)
    changed = sorted(written.keys() ^ set(found))
    # Each process reads its share.
    shared = [name for name in found if name in written][accelerator.process_index :: accelerator.num_processes]
    changed += [name for name in shared if _sha256(folder / name) != written[name]]
    changed = sorted({name for names in gather_object([changed]) for name in names})
    if changed:
        raise ValueError(f"{folder} is damaged ({', '.join(changed)} changed after writing): {REMEDY}")


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(folder: Path, state: dict[str, torch.Tensor]) -> None:
    own = torch.get_rng_state()
    if "cpu" not in state or (state["cpu"].dtype, state["cpu"].shape) != (own.dtype, own.shape):
        raise ValueError(f"{folder} is damaged (it holds no state of random numbers): {REMEDY}")
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _flat_moments(moments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """AdamW's state of each parameter (two moments and a step count) under flat names."""
    return {f"{name}{_MOMENT}{key}": value for name, entry in moments["state"].items() for key, value in entry.items()}


def _unshared(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tied weights appear once each in a safetensors file: give every name memory of its own."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

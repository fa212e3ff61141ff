"""What `ncalign train --dry-run` tells of a model that is here by its config.json alone, before its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ncalign.model.adapters import is_adapter, with_adapter
from ncalign.model.policy import DTYPES, load_config
from ncalign.model.quantized import estimated_bytes, refuse_stored_quantized, refuse_unquantizable, shapes_of
from ncalign.training.config import TrainConfig
from ncalign.training.space import WEIGHTS, in_words

_MIB = 2**20


def lacks_weights(model: str) -> bool:
    """Whether a model is a folder with a configuration and no file of weights."""
    folder = Path(model)
    if not (folder / "config.json").is_file() or is_adapter(model):
        return False
    return not any(path.suffix in WEIGHTS for path in folder.iterdir())


def plan_from_shapes(config: TrainConfig, *, num_processes: int) -> dict[str, Any]:
    """Numbers of weights and the memory that they take in training, from their shapes.

    Args:
        config: the run, its precision decided.
        num_processes: that train.

    Returns:
        The facts as values, and as printable text under ``text``.

    Raises:
        ValueError: the configuration of the model or the run can't be used.
    """
    trained_dtype = torch.float64 if config.dtype == "float64" else torch.float32
    held_dtype = trained_dtype if config.lora is None else DTYPES[config.dtype]
    described = load_config(config.model, trust_remote_code=config.trust_remote_code)
    refuse_stored_quantized(described, config.model, what="model")
    shapes = shapes_of(described, dtype=held_dtype, trust_remote_code=config.trust_remote_code)
    if config.quantization is not None:
        refuse_unquantizable(shapes, config.model)
    number = sum(parameter.numel() for parameter in shapes.parameters())
    held, trained = estimated_bytes(shapes, config.quantization, held_dtype), number
    if config.lora is not None:
        with torch.device("meta"):
            adapted = with_adapter(shapes, config.lora, model=config.model, seed=config.seed)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        held += trained * trained_dtype.itemsize
    gradients, optimizer = trained * trained_dtype.itemsize, 2 * trained * trained_dtype.itemsize
    groups = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_processes
    facts: dict[str, Any] = {
        "dtype": config.dtype,
        "parameters": number,
        "trained_parameters": trained,
        "groups_per_step": groups,
        "weights_mib": held / _MIB,
        "gradients_mib": gradients / _MIB,
        "optimizer_mib": optimizer / _MIB,
        "memory_mib": (held + gradients + optimizer) / _MIB,
    }
    bits = f", linear layers in {config.quantization.bits} bits" if config.quantization is not None else ""
    lines = [
        f"note: {config.model} has a config.json and no weights: this is what their shapes tell, without data, tokens and time",
        f"dtype: {config.dtype}",
        f"parameters: {number:,}, of which {trained:,} are trained"
        if config.lora is None
        else f"parameters: {number:,}, and {trained:,} of the adapter, which are trained",
        f"groups per step: {groups}",
        f"memory of each process: about {in_words(held + gradients + optimizer)} (weights {in_words(held)}{bits}; gradients "
        f"{in_words(gradients)}; optimizer {in_words(optimizer)}); activations come on top, and FSDP2 divides it by the "
        "number of processes",
    ]
    return {**facts, "text": "\n".join(lines)}

"""The precision of a run, decided once for all its processes."""

from __future__ import annotations

from typing import get_args

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ncalign.model.config import Precision
from ncalign.model.precision import announce, fast_precision, precision_line
from ncalign.objectives import Method
from ncalign.training.config import TrainConfig
from ncalign.training.launch import is_sharded
from ncalign.training.run_folder import recorded_config


def with_precision(config: TrainConfig, accelerator: Accelerator, method: Method) -> TrainConfig:
    """The configuration with `auto` replaced, in `dtype` and `scoring_dtype`; every process gets what the first one decides.

    A run that is resumed keeps the precision that it was begun in: another would be another model with other reference
    log-probs.

    Raises:
        ValueError: candidates can't be scored in this precision while the model trains in that one.
    """
    decided = [_decided(config, accelerator, method) if accelerator.is_main_process else {}]
    if accelerator.num_processes > 1:
        broadcast_object_list(decided)
    config = config.model_copy(update=decided[0])
    _check_scoring(config, sharded=is_sharded(accelerator))
    return config


def _decided(config: TrainConfig, accelerator: Accelerator, method: Method) -> dict[str, Precision]:
    """Both precisions; what `auto` came to is said."""
    recorded, device = _recorded(config), accelerator.device.type
    scores = method.reads_scores
    dtype, scoring, reason = config.dtype, config.scoring_dtype, "as the run was begun"
    if dtype == "auto" and "dtype" in recorded:
        dtype = recorded["dtype"]
    elif dtype == "auto":
        dtype, reason = fast_precision(device).precision, fast_precision(device).reason
    if scoring == "auto" and recorded.get("dtype") == dtype and "scoring_dtype" in recorded:
        scoring = recorded["scoring_dtype"]
    elif scoring == "auto" and dtype == "float32" and scores:
        scoring, reason = fast_precision(device).precision, fast_precision(device).reason
    elif scoring == "auto":
        scoring = dtype
    if config.dtype == "auto" or (config.scoring_dtype == "auto" and scoring != dtype):
        announce(precision_line(dtype, reason, scoring if scores else None))
    return {"dtype": dtype, "scoring_dtype": scoring}


def _recorded(config: TrainConfig) -> dict[str, Precision]:
    """What the run to resume was begun with."""
    written = recorded_config(config)
    return {name: written[name] for name in ("dtype", "scoring_dtype") if written.get(name) in get_args(Precision)}


def _check_scoring(config: TrainConfig, *, sharded: bool) -> None:
    training, scoring = config.dtype, config.scoring_dtype
    possible = {training, *({"bfloat16"} if training == "float32" else ())}
    if training == "bfloat16" and config.lora is None and not sharded:
        # All weights are float32, and only the computation is rounded.
        possible.add("float32")
    if scoring not in possible:
        held = "sharded weights (FSDP2)" if sharded and config.lora is None else "bfloat16 weights under an adapter"
        weights = held if training == "bfloat16" else f"{training} weights"
        raise ValueError(
            f"scoring_dtype: {scoring} is not possible with dtype: {training}, since {weights} compute in {training} alone: "
            "leave scoring_dtype out, or change dtype"
        )

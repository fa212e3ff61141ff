"""What a finished run that is resumed can still do: export its model in another form, without training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from ncalign.core.atomic import atomic_folder, write_text_atomic
from ncalign.core.outputs import record
from ncalign.model.logprobs import LogprobModel
from ncalign.model.policy import Policy
from ncalign.training.config import TrainConfig
from ncalign.training.export import model_card, save_model
from ncalign.training.run_folder import ADAPTER, CONFIG, MODEL

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_finished(
    config: TrainConfig,
    written: dict[str, Any],
    results: dict[str, Any],
    accelerator: Accelerator,
    *,
    policy: Callable[[], Policy],
) -> str:
    """Merge the adapter of a finished run into its base model where ``merge`` asks for that now; the adapter stays beside it.

    Args:
        config: the run's.
        written: the run's whole configuration, as ``config.yaml`` has it.
        results: what ``results.json`` holds.
        accelerator: this process's.
        policy: loads the policy as the run began with it.

    Returns:
        What was done, in words; empty where nothing was left to do.

    Raises:
        ValueError: the adapter does not fit the model, or ``merge`` is off and the adapter was merged.
    """
    model, adapter = config.output_dir / MODEL, config.output_dir / ADAPTER
    is_merged = model.is_dir() and not (model / _CONFIG).is_file()
    if config.lora is None or (is_merged and config.merge):
        return ""
    if not config.merge:
        return f"nothing to resume ({model} is merged{f'; its adapter is in {adapter}' * adapter.is_dir()})" * is_merged
    if accelerator.is_main_process and not adapter.is_dir():
        _copy(model, adapter)
    accelerator.wait_for_everyone()
    loaded = policy()
    assert isinstance(loaded.model, PeftModel)
    found: Any = set_peft_model_state_dict(loaded.model, load_file(adapter / _WEIGHTS))
    if found.unexpected_keys:
        raise ValueError(f"{adapter} does not fit {config.model}: {found.unexpected_keys[:3]} are not in it")
    card = model_card(loaded, config, written, results)
    save_model(loaded, LogprobModel(loaded.model), accelerator, merge=True, card=card, target=model)
    if accelerator.is_main_process:
        write_text_atomic(yaml.safe_dump(written, sort_keys=False), config.output_dir / CONFIG)
    return f"its adapter was merged into {config.model}, without training. {model} is the merged model, {adapter} the adapter"


def _copy(source: Path, target: Path) -> None:
    """Copy a folder whole or not at all."""
    record(target.parent, [target.name], verb="train")
    with atomic_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)

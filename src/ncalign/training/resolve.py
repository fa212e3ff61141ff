"""What a run's configuration leaves to the model, settled before anything else looks at it."""

from __future__ import annotations

from datetime import date
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from ncalign.data.groups import read_groups
from ncalign.model.chat import resolve_string_prompts, template_date, writes_date
from ncalign.model.policy import load_tokenizer
from ncalign.training.config import TrainConfig
from ncalign.training.run_folder import recorded_config


def check_data_files(config: TrainConfig) -> None:
    """Raise, before the model is loaded, where a data file is missing or of no known kind."""
    for path in (config.data, config.eval_data):
        if path is not None:
            read_groups(path).close()


def with_rendering(config: TrainConfig, accelerator: Accelerator, *, dated: bool = False) -> TrainConfig:
    """The configuration with what ``string_prompts: auto`` means for its model, and the date that its chat template writes.

    ``config.yaml`` records both; the date where the template writes one, or the run is ``dated`` since others' templates may.

    Raises:
        ValueError: a data file is missing, or the model's tokenizer can't be loaded.
    """
    check_data_files(config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    found: dict[str, Any] = {"string_prompts": resolve_string_prompts(tokenizer, config.encoding.string_prompts)}
    if dated or writes_date(tokenizer):
        found["template_date"] = _date(config, tokenizer, accelerator)
    return config.model_copy(update={"encoding": config.encoding.model_copy(update=found)})


def _date(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> date | None:
    """The day of the run: a run that is resumed keeps the one on which it began, and every process has the first one's."""
    chosen = config.encoding.template_date
    if chosen is None and isinstance(written := recorded_config(config).get("template_date"), str):
        chosen = date.fromisoformat(written)
    decided = [(template_date(tokenizer, chosen) or date.today()) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(decided)
    return decided[0]

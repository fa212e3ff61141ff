"""What a run's configuration leaves to the model, settled before anything else looks at it."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from ncalign.core.kept import read_kept
from ncalign.core.progress import say
from ncalign.data.groups import read_groups
from ncalign.model.chat import resolve_string_prompts, template_date, writes_date
from ncalign.model.policy import load_tokenizer
from ncalign.training.checkpoint import REMEDY
from ncalign.training.config import TrainConfig
from ncalign.training.peers import decided_by_first
from ncalign.training.run_folder import recorded_config
from ncalign.training.saved import STEP_SIZE


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


def groups_per_step(config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> int:
    """The groups of all passes and processes in one step: a run that is resumed on other processes keeps its number.

    Args:
        config: of the training.
        accelerator: this process's.
        checkpoint: that the run goes on from.

    Raises:
        ValueError: there are more processes than groups in a step.
    """
    sizes: dict[str, int] = {
        name: getattr(config, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    }
    processes = int(accelerator.num_processes)
    own = math.prod(sizes.values()) * processes
    if checkpoint is None:
        return own

    def recorded() -> int:
        before = recorded_config(config)
        # What was accepted to change has its say.
        if any(before.get(name, value) != value for name, value in sizes.items()):
            return own
        state = read_kept(checkpoint / "state.json", STEP_SIZE, remedy=REMEDY)
        return state.get("groups_per_step", own)

    number = decided_by_first(accelerator, recorded)
    if number < processes:
        raise ValueError(
            f"the run in {config.output_dir} has {number} groups in a step, which can't be split over {processes} processes: "
            f"resume with at most {number} (torchrun --nproc_per_node {number})"
        )
    if number != own and accelerator.is_main_process:
        say(f"note: the run goes on with {number} groups in a step, as it began, now split over {processes} process(es)")
    return number

"""What a run's configuration leaves to the model, settled before anything else looks at it."""

from __future__ import annotations

from ncalign.data.groups import read_groups
from ncalign.model.encoding import resolve_string_prompts
from ncalign.model.policy import load_tokenizer
from ncalign.training.config import TrainConfig


def check_data_files(config: TrainConfig) -> None:
    """Raise, before the model is loaded, where a data file is missing or of no known kind."""
    for path in (config.data, config.eval_data):
        if path is not None:
            read_groups(path).close()


def with_string_prompts(config: TrainConfig) -> TrainConfig:
    """The configuration with what ``string_prompts: auto`` means for its model, as ``config.yaml`` records it.

    Raises:
        ValueError: a data file is missing, or the model's tokenizer can't be loaded.
    """
    check_data_files(config)
    encoding = config.encoding
    if encoding.string_prompts != "auto":
        return config
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    found = resolve_string_prompts(tokenizer, encoding.string_prompts)
    return config.model_copy(update={"encoding": encoding.model_copy(update={"string_prompts": found})})

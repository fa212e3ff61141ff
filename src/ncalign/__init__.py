"""ncalign: align language models from prompts with K scored candidate completions."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING

from ncalign.core.lazy import importer

if TYPE_CHECKING:
    from ncalign.data.groups import Candidate, Group, read_groups, write_groups
    from ncalign.model.batching import encode_groups
    from ncalign.model.logprobs import completion_logprobs
    from ncalign.model.policy import load_policy
    from ncalign.training.config import TrainConfig
    from ncalign.training.train import run_training as train

__version__ = version("ncalign")
# peft imports bitsandbytes where it is installed, which then asks for a further package on stderr, whatever is being done.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
__all__ = [
    "Candidate",
    "Group",
    "TrainConfig",
    "completion_logprobs",
    "encode_groups",
    "load_policy",
    "read_groups",
    "train",
    "write_groups",
]

__getattr__ = importer(
    __name__,
    **{
        "data.groups": "Candidate Group read_groups write_groups",
        "model.batching": "encode_groups",
        "model.logprobs": "completion_logprobs",
        "model.policy": "load_policy",
        "training.config": "TrainConfig",
        "training.train": "train:run_training",
    },
)

"""ncalign: align language models from prompts with K scored candidate completions."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from ncalign.core.lazy import importer

if TYPE_CHECKING:
    from ncalign.data.groups import Candidate, Group, read_groups, write_groups
    from ncalign.model.batching import encode_groups
    from ncalign.model.logprobs import completion_logprobs
    from ncalign.model.policy import load_policy
    from ncalign.training import run_training as train
    from ncalign.training.config import TrainConfig

__version__ = version("ncalign")
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
    {
        "Candidate": "ncalign.data.groups",
        "Group": "ncalign.data.groups",
        "TrainConfig": "ncalign.training.config",
        "completion_logprobs": "ncalign.model.logprobs",
        "encode_groups": "ncalign.model.batching",
        "load_policy": "ncalign.model.policy",
        "read_groups": "ncalign.data.groups",
        "train": "ncalign.training.train:run_training",
        "write_groups": "ncalign.data.groups",
    },
)

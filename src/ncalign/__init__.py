"""ncalign: align language models from prompts with K scored candidate completions."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncalign.batching import encode_groups
    from ncalign.groups import Candidate, Group, read_groups, write_groups
    from ncalign.logprobs import completion_logprobs
    from ncalign.policy import load_policy
    from ncalign.training import run_training as train
    from ncalign.training_config import TrainConfig

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

_HOMES = {
    "Candidate": ("ncalign.groups", "Candidate"),
    "Group": ("ncalign.groups", "Group"),
    "TrainConfig": ("ncalign.training_config", "TrainConfig"),
    "completion_logprobs": ("ncalign.logprobs", "completion_logprobs"),
    "encode_groups": ("ncalign.batching", "encode_groups"),
    "load_policy": ("ncalign.policy", "load_policy"),
    "read_groups": ("ncalign.groups", "read_groups"),
    "train": ("ncalign.training", "run_training"),
    "write_groups": ("ncalign.groups", "write_groups"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must answer before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ncalign' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)

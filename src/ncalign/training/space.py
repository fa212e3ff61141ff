"""Disk space: what a run will need in its folder, looked at before its first step."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ncalign.model.quantized import num_frozen
from ncalign.training.config import TrainConfig

_LINE = 2048
"""Bytes of a logged step, in metrics.jsonl and the trackers' files."""
_TENSOR = 200
"""Bytes that a tensor takes in a file besides its values: its name, shape and place."""
_OVERHEAD = 2**13
"""Bytes of a checkpoint's random state, and of a model's card."""
_TOKENIZER = 2**25
"""Bytes of a tokenizer's files where the model is no local folder."""
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run writes to its folder.

    Attributes:
        checkpoint: one checkpoint: the trained weights, and two moments of the optimizer.
        num_checkpoints: that lie there at once, the one that is being written among them.
        model: the model that the run ends with.
        others: metrics, and an online run's samples and pushed weights.
    """

    checkpoint: int
    num_checkpoints: int
    model: int
    others: int

    @property
    def total(self) -> int:
        """At the run's fullest moment."""
        return self.checkpoint * self.num_checkpoints + self.model + self.others

    def text(self) -> str:
        """What it is made up of, in words."""
        parts = [f"the model {in_words(self.model)}", f"metrics and others {in_words(self.others)}"]
        if self.num_checkpoints:
            checkpoints = f"{self.num_checkpoints} x {in_words(self.checkpoint)} for checkpoints"
            parts.insert(0, f"{checkpoints}, one of them while it is written")
        return f"{in_words(self.total)} ({'; '.join(parts)})"


def disk_need(
    config: TrainConfig,
    model: nn.Module,
    *,
    merged: torch.dtype | None,
    num_steps: int,
    num_saves: int,
    num_best: int = 0,
    kept_tensors: int = 0,
    samples: int = 0,
) -> DiskNeed:
    """Estimate what a run will write, from the sizes of its weights.

    Args:
        config: how often checkpoints are written and how many are kept.
        model: the policy.
        merged: precision of the weights with the adapter merged into them; None where the adapter is saved alone.
        num_steps: of the run.
        num_saves: checkpoints that it writes in all.
        num_best: those that it may write besides, of which the best is kept.
        kept_tensors: bytes that a checkpoint holds besides weights and optimizer.
        samples: bytes of an online run's rounds, or of answers to held-out prompts.
    """
    sizes = [(parameter.requires_grad, parameter.numel() * parameter.element_size()) for parameter in model.parameters()]
    trained, everything = sum(size for is_trained, size in sizes if is_trained), sum(size for _, size in sizes)
    adapter = config.lora is not None
    saved = trained if adapter else everything
    if merged is not None:
        saved = num_frozen(model) * merged.itemsize
    lines = num_steps // config.logging_steps + 2
    return DiskNeed(
        # Of each trained tensor: itself, two moments and a step count, and its name in the state.
        checkpoint=3 * trained + kept_tensors + 5 * _TENSOR * sum(is_trained for is_trained, _ in sizes) + _OVERHEAD,
        # While one is written, those that are kept are still there.
        num_checkpoints=min(num_saves + num_best, config.save_total_limit + 1 + bool(num_best)),
        model=saved + _TENSOR * len(sizes) + _OVERHEAD + _tokenizer_size(Path(config.model)),
        others=_LINE * lines + samples,
    )


def check_space(config: TrainConfig, need: DiskNeed) -> None:
    """Refuse a run that will not fit; what an earlier run left there makes room, where it is replaced or gone on with.

    Raises:
        ValueError: too little is free in the file system of ``output_dir``.
    """
    folder = config.output_dir
    free, reused = free_space(folder), 0
    if config.overwrite and not config.resume:
        reused = _size(folder)
    elif config.resume:
        reused = min(_size(folder / "checkpoints"), need.checkpoint * need.num_checkpoints)
    if need.total - reused <= free:
        return
    lower = f"lower save_total_limit ({config.save_total_limit}), raise save_steps ({config.save_steps}; 0: no checkpoints), "
    raise ValueError(
        f"{folder}: about {need.text()} are needed, {f'{in_words(reused)} of it are there, ' * bool(reused)}and "
        f"{in_words(free)} are free: free some space, {lower * bool(need.num_checkpoints)}or give an output_dir on another disk"
    )


def free_space(folder: Path) -> int:
    """Bytes that may be written to the file system of a folder, which need not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def in_words(size: int) -> str:
    """A number of bytes as people read it.

    >>> in_words(1536), in_words(5 * 2**30)
    ('1.5 KiB', '5.0 GiB')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"


def _size(folder: Path) -> int:
    return sum(os.lstat(Path(place) / name).st_size for place, _, names in os.walk(folder) for name in names)


def _tokenizer_size(model: Path) -> int:
    if not model.is_dir():
        return _TOKENIZER
    return sum(path.stat().st_size for path in model.iterdir() if path.is_file() and path.suffix not in WEIGHTS)

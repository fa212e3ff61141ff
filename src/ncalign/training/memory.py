"""Memory of a training step: what a pass keeps for its backward pass, and whether a step fits the device."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ncalign.model.quantized import held_bytes
from ncalign.training.space import in_words

_OF_WIDTH, _OF_INNER = 16, 5
"""Numbers that a layer keeps of each token, for each unit of its width and of its MLP's inner width: its norms' inputs and
outputs, also in float32, queries, keys, values and attention's output; gate, activation, up and their product."""
_SHARE = 0.9
"""Of a device's memory: the rest is for the head's logits, the allocator's gaps and the libraries' own."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step on one device.

    Attributes:
        state: weights, gradients and AdamW's two moments.
        activations: what a pass keeps for its backward pass, without activation checkpointing.
        recomputed: the same with it: each layer's input, and one layer's activations.
        device: all that the device has; None where nobody knows.
    """

    state: int
    activations: int
    recomputed: int
    device: int | None

    def fits(self) -> bool:
        """Whether a step has room without activation checkpointing."""
        return self.device is None or self.state + self.activations <= _SHARE * self.device

    def text(self) -> str:
        """What is needed and what there is, in words."""
        assert self.device is not None
        return (
            f"a step needs about {in_words(self.state)} for weights, gradients and optimizer, and {in_words(self.activations)} "
            f"for a pass, {in_words(self.recomputed)} with its layers computed again; the device has {in_words(self.device)}"
        )


def step_memory(
    model: nn.Module, *, tokens: int, precision: torch.dtype, device: torch.device, num_shards: int = 1
) -> StepMemory:
    r"""Estimate what a step needs.

    A layer of width $d$ and inner width $m$, that of all experts which a token visits, keeps $16 d + 5 m$ numbers of a token,
    within a third of what was counted on layers of Llama, Qwen 3, Gemma, Mixtral, OLMoE and GPT-2 in float32 and bfloat16.

    Args:
        model: the policy, on any device.
        tokens: of a pass.
        precision: that the computation is in.
        device: where it trains.
        num_shards: processes over which weights, gradients and optimizer are divided.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    layers, layer, width = _sizes(model)
    of_layer = tokens * layer * precision.itemsize
    return StepMemory(
        state=(held_bytes(model) + 3 * trained) // num_shards,
        activations=layers * of_layer,
        recomputed=layers * tokens * width * precision.itemsize + of_layer,
        device=device_memory(device),
    )


def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """Number of layers, numbers that one keeps of a token, and its width; of a model that does not say: no layers."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    width, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if not isinstance(width, int) or not isinstance(layers, int):
        return 0, 0, 0
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    inner = (inner if isinstance(inner, int) else 4 * width) * (experts if isinstance(experts, int) else 1)
    return layers, _OF_WIDTH * width + _OF_INNER * inner, width


def device_memory(device: torch.device) -> int | None:
    """All bytes of a device, of which each of its processes has an equal part on a CPU; None where nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type != "cpu" or not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys():
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass."""
    with warnings.catch_warnings():
        # transformers 5.23 renamed this; the old name is the one that every 5.x has.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated", category=FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

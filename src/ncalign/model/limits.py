"""How many tokens and positions a model has a place for: ids and positions beyond its tables end a pass with an index error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from ncalign.model.adapters import adapter_base, is_adapter
from ncalign.model.policy import quiet_transformers

_OTHER_TOWERS = ("vision", "visual", "audio")
_TABLES = ("embed_positions", "pos_encoding")
"""Tables of sines that some models (GPT-J, CodeGen, CTRL) compute once, as tensors."""


@dataclass(frozen=True)
class Limits:
    """What a model has a place for; None where nothing bounds it, or nothing says so.

    Attributes:
        vocabulary: token ids are below this.
        positions: tokens of a text, at most, where positions are looked up in a table.
        context: tokens for which it was made, by its configuration: beyond, rotary positions go on, and answers get worse.
    """

    vocabulary: int | None = None
    positions: int | None = None
    context: int | None = None


def limits_of(model: nn.Module) -> Limits:
    """The limits of a model, by its tables and its configuration."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    return Limits(_vocabulary(model), min(_positions(model), default=None), getattr(text, "max_position_embeddings", None))


def filler_id(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for masked places: tokenizers are given a padding token for which the model has no embedding."""
    padding, rows = int(tokenizer.pad_token_id), _vocabulary(model)
    return padding if rows is None or padding < rows else int(tokenizer.eos_token_id)


def _vocabulary(model: nn.Module) -> int | None:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else None


def _positions(model: nn.Module) -> Iterator[int]:
    """The positions of each table."""
    for name, module in model.named_modules():
        if any(tower in name for tower in _OTHER_TOWERS):
            continue
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in own or own == "wpe") and not own.startswith("rel"):
            # OPT and BioGPT begin at an offset, RoBERTa behind the padding's row.
            behind = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - int(getattr(module, "offset", behind))
        for table in _TABLES:
            found = getattr(module, table, None)
            if isinstance(found, torch.Tensor) and found.ndim == 2:
                yield len(found)


def limits_of_folder(model: str, *, trust_remote_code: bool) -> Limits:
    """The limits of a model that is not loaded: built without memory, from its configuration; an adapter's are its base's."""
    base = adapter_base(model) if is_adapter(model) else model
    try:
        with quiet_transformers(base):
            config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                built = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError):
        return Limits()
    found = limits_of(built)
    # An adapter may bring embeddings of its own for further tokens.
    return Limits(None, found.positions, found.context) if base != model else found

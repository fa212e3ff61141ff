"""`ncalign merge`: an adapter and its base model as one ordinary Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ncalign.core.atomic import atomic_folder, check_writable, write_text_atomic
from ncalign.core.hub import only_cached
from ncalign.core.locks import held
from ncalign.core.outputs import claim, record
from ncalign.model.adapters import adapter_base, base_from_cache, check_mergeable, hub_adapter, is_adapter
from ncalign.model.config import MergeConfig
from ncalign.model.policy import load_config, load_model, load_tokenizer, quiet_transformers
from ncalign.model.runs import model_of

_CARD = """---
library_name: transformers
{base_model}tags: [ncalign]
---

# {name}

The adapter `{adapter}` merged into the weights of its base model `{base}`, in {dtype}. An ordinary model folder: any program
that reads Hugging Face models loads it, and needs neither the adapter nor its base model.
{card}"""
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def run_merge(config: MergeConfig) -> dict[str, object]:
    """Merge an adapter into its base model's weights, and write the model whole or not at all.

    Returns:
        ``output``, ``adapter``, ``base``, ``dtype`` of the weights and their number, ``parameters``.

    Raises:
        ValueError: there is no adapter to merge, it can't be merged, its base model is not to be had, or the output may not be
            written.
        OSError: writing failed.
    """
    adapter = _adapter_of(config.model)
    check_mergeable(adapter, "CAUSAL_LM")
    base = adapter_base(adapter)
    base_from_cache(adapter, base)
    _claim_output(config, adapter)
    with held(config.output, busy=f"another process is writing {config.output}: wait for it, or give another output"):
        check_writable(config.output.parent / f".{config.output.name}.check")
        dtype = _chosen(config, adapter)
        model = load_model(adapter, dtype=dtype, trust_remote_code=config.trust_remote_code)
        _refuse_overflow(model, config, dtype)
        tokenizer = load_tokenizer(adapter, trust_remote_code=config.trust_remote_code)
        name = str(dtype).removeprefix("torch.")
        with atomic_folder(config.output) as temporary:
            with quiet_transformers():
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
            write_text_atomic(_card(config, adapter, base, name), temporary / "README.md")
            record(temporary, sorted(path.name for path in temporary.iterdir()), verb="merge")
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "output": str(config.output),
        "adapter": adapter,
        "base": base,
        "dtype": name,
        "parameters": parameters,
        "text": f"{config.output}: {adapter} merged into {base}: {parameters:,} weights in {name}",
    }


def _adapter_of(model: str) -> str:
    """The folder of the adapter that a name means: its own, its run's, or the local copy of the hub's.

    Raises:
        ValueError: it is no adapter.
    """
    meant = model_of(model)
    if not Path(meant).exists():
        found = hub_adapter(meant, from_cache=only_cached(meant, what="adapter"))
        if found is None:
            raise ValueError(f"{model!r} on the hub is a whole model, and no adapter: there is nothing to merge")
        return found
    if is_adapter(meant):
        return meant
    if (Path(meant) / "config.json").is_file():
        where = f"the model of {model}, {meant}," if meant != model else model
        raise ValueError(f"{where} is a whole model already, and no adapter: there is nothing to merge; use it as it is")
    raise ValueError(
        f"{model} holds no adapter: needed is the folder of an adapter (adapter_config.json, adapter_model.safetensors) or of "
        "a finished run, or a hub id"
    )


def _claim_output(config: MergeConfig, adapter: str) -> None:
    """Decide whether the folder may be written, as every verb does."""
    inputs: Mapping[str, object] = {"model": adapter}
    if config.output.is_file():
        raise ValueError(f"{config.output} is a file: output is the folder of the merged model; give another one")
    claim(config.output, verb="merge", inputs=inputs, overwrite=config.overwrite)
    held_names = [path.name for path in config.output.iterdir() if path.name != ".ncalign"] if config.output.is_dir() else []
    if held_names:
        claim(config.output, sorted(held_names), verb="merge", inputs=inputs, overwrite=config.overwrite)


def _chosen(config: MergeConfig, adapter: str) -> torch.dtype:
    """The precision of the merged weights: that asked for, or that in which the base model's are stored."""
    if config.dtype != "stored":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
            "float64": torch.float64,
        }[config.dtype]
    stored = load_config(adapter, trust_remote_code=config.trust_remote_code).dtype
    # Where the configuration does not say, weights are float32.
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _refuse_overflow(model: PreTrainedModel, config: MergeConfig, dtype: torch.dtype) -> None:
    """Refuse weights that are no finite numbers, as large ones are not in float16."""
    wrong = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if wrong:
        raise ValueError(
            f"{config.model} can't be merged in {str(dtype).removeprefix('torch.')}: {len(wrong)} of its tensors would hold "
            f"numbers that are not finite (first: {wrong[0]}); float32 and bfloat16 hold larger ones: set dtype: bfloat16"
        )


def _card(config: MergeConfig, adapter: str, base: str, dtype: str) -> str:
    """The folder's README.md, with the text of the adapter's own below."""
    there = Path(adapter) / "README.md"
    own = _FRONT_MATTER.sub("", there.read_text(encoding="utf-8", errors="replace")).strip() if there.is_file() else ""
    local = Path(base).exists()
    return _CARD.format(
        # A hub's card may name models of the hub alone.
        base_model="" if local else f"base_model: {base}\n",
        name=config.output.name,
        adapter=Path(config.model).name if Path(config.model).exists() else config.model,
        base=Path(base).resolve().name if local else base,
        dtype=dtype,
        card=f"\nThe adapter's own card:\n\n{own}\n" if own else "",
    )

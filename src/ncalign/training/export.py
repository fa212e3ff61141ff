"""The trained model as an ordinary Hugging Face folder, with a model card that records how it was trained."""

from __future__ import annotations

import copy
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ncalign.core.atomic import atomic_folder, write_text_atomic
from ncalign.core.outputs import foreign, record
from ncalign.model.adapters import merged, quiet_peft, shallow_copy
from ncalign.model.logprobs import base_causal_model
from ncalign.model.noise import as_stated
from ncalign.model.policy import Policy, cast_weights, load_model, quiet_transformers
from ncalign.model.precision import announce
from ncalign.model.quantized import dequantized, write_record
from ncalign.training.card import hub_id_of
from ncalign.training.config import TrainConfig

PREFIX = "model."
"""Of a policy's weights in the module that accelerate prepares."""

_CARD = """---
library_name: {library}
{base_model}tags: [ncalign, {method}]
---

# {name}

`{base}` aligned with **{method}** by ncalign {version} from {groups} groups of scored candidate completions
({candidates} candidates).{weights}

## Metrics

{metrics}

## Data

```json
{data}
```

## Configuration

```yaml
{config}```
"""


def save_model(
    policy: Policy,
    model: nn.Module,
    accelerator: Accelerator,
    *,
    merge: bool,
    card: str | None,
    target: Path,
) -> None:
    """Write a model folder whole or not at all: weights (or adapter) in safetensors, tokenizer, chat template, README.md.

    ``merge`` puts the adapter into the model's weights; without the text ``card`` there is no README.md.
    """
    # An adapter alone is saved without its frozen model, which no process may have room for.
    alone = isinstance(policy.model, PeftModel) and not merge
    options = StateDictOptions(full_state_dict=True, cpu_offload=accelerator.num_processes > 1, ignore_frozen_params=alone)
    state = get_model_state_dict(model, options=options)
    failed: list[OSError | None] = [None]
    if accelerator.is_main_process:
        try:
            _write_model(policy, state, merge=merge, card=card, target=target)
        except OSError as error:
            failed = [error]
    # All processes go on, or all of them stop.
    if accelerator.num_processes > 1:
        broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def _write_model(policy: Policy, state: dict[str, Any], *, merge: bool, card: str | None, target: Path) -> None:
    stranger = foreign(target)
    if stranger is not None:
        raise FileExistsError(f"{stranger} was put there by something else since this run began: it is left alone. Move it")
    named: dict[str, Any] = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    weights = {name: named[name] for name in named.keys() - aliases(policy.model)}
    with atomic_folder(target) as temporary:
        with quiet_transformers(str(temporary)), as_stated(policy.dropout):
            _write_weights(policy, weights, temporary, merge=merge)
            policy.tokenizer.save_pretrained(temporary)
        if card is not None:
            write_text_atomic(card, temporary / "README.md")
        record(temporary, sorted(path.name for path in temporary.iterdir()), verb="train")


def merges(policy: Policy, config: TrainConfig) -> bool:
    """Whether the adapter is merged: on request, or because its base exists on this machine alone."""
    return config.lora is not None and (config.merge or policy.on_adapter)


def _write_weights(policy: Policy, state: dict[str, Any], folder: Path, *, merge: bool) -> None:
    model = policy.model
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state)
    elif merge:
        _merged(policy, model, state).save_pretrained(folder)
    else:
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        if policy.quantization is not None:
            write_record(policy.quantization, policy.merged_dtype, folder)


def dequantized_line(policy: Policy) -> str:
    """What is said of a model whose adapter was merged into weights that training held in 4 bits."""
    assert policy.quantization is not None
    return (
        f"the base model's weights in {policy.quantization.bits} bits ({policy.quantization.type}) were dequantized, and the "
        f"adapter was merged into them: the saved weights are {str(policy.merged_dtype).removeprefix('torch.')}"
    )


def aliases(model: nn.Module) -> set[str]:
    """Further names of tied weights, which gathering gave memory of their own: one name is enough in the file."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once


def _merged(policy: Policy, model: PeftModel, state: dict[str, Any]) -> PreTrainedModel:
    """The policy with its adapter merged into the weights as they are stored: rounded ones would lose a part of the adapter."""
    if policy.quantization is not None:
        announce(f"note: {dequantized_line(policy)}")
        base = dequantized(model, state)
    elif policy.merged_dtype == base_causal_model(model).dtype:
        return merged(_apart(model, state))
    else:
        base = _loaded_again(policy)
    adapter = copy.deepcopy(model.active_peft_config)
    adapter.base_model_name_or_path = None
    with quiet_peft():
        whole = get_peft_model(base, adapter)
    assert isinstance(whole, PeftModel)
    found = whole.load_state_dict({name: tensor for name, tensor in state.items() if "lora_" in name}, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys[:3]
    result = merged(whole)
    cast_weights(result, policy.merged_dtype)
    return result


def _loaded_again(policy: Policy) -> PreTrainedModel:
    """The model that training started from, in the precision that its weights are stored in, or a finer one."""
    precise = torch.promote_types(policy.merged_dtype, torch.float32)
    try:
        return load_model(policy.source, dtype=precise, trust_remote_code=policy.trust_remote_code)
    except ValueError as error:
        # Of the kind that a run keeps its training from.
        raise OSError(f"the adapter can't be merged: {error}") from error


def _apart(model: PeftModel, state: dict[str, Any]) -> PeftModel:
    """A model of the same build that merging may use up while training goes on, with weights of all processes gathered."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return shallow_copy(model)
    sharded = base_causal_model(model)
    with torch.device("meta"):
        base = type(sharded)(sharded.config)
        whole = get_peft_model(base, model.peft_config["default"])
    whole.load_state_dict(state, strict=False, assign=True)
    base.tie_weights()
    left = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    assert not left, f"weights that were not gathered: {left[:3]}"
    assert isinstance(whole, PeftModel)
    return whole


def model_card(policy: Policy, config: TrainConfig, written: dict[str, Any], results: dict[str, Any]) -> str:
    """The folder's README.md, with the run's whole configuration as written in config.yaml."""
    after, before = results["after"], results["before"] or {}
    rows = ["| metric | before | after |", "|---|---|---|"]
    rows += [f"| {name} | {_shown(before.get(name))} | {_shown(value)} |" for name, value in after.items() if name != "step"]
    base = hub_id_of(policy.source)
    return _CARD.format(
        # A hub's card may name models of the hub alone.
        base_model=f"base_model: {base}\n" if base else "",
        library="peft" if config.lora is not None and not merges(policy, config) else "transformers",
        base=base or Path(policy.source).resolve().name,
        method=results["method"],
        name=config.output_dir.name,
        version=results["versions"]["ncalign"],
        groups=results["data"]["groups_trained_on"],
        candidates=results["data"]["candidates_used"],
        weights=_weights_line(policy, merged=merges(policy, config)),
        metrics="\n".join(rows),
        data=json.dumps(results["data"], indent=2),
        config=yaml.safe_dump(written, sort_keys=False),
    )


def _weights_line(policy: Policy, *, merged: bool) -> str:
    """What a card says of weights in 4 bits."""
    if policy.quantization is None:
        return ""
    if merged:
        line = dequantized_line(policy)
        return f" {line[0].upper()}{line[1:]}."
    held = f"{policy.quantization.bits} bits ({policy.quantization.type})"
    return f" The adapter was trained on its base model in {held}."


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    packages = ("ncalign", "torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}

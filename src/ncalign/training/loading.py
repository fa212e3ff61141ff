"""The policy that training starts from; where weights are sharded, only the first process reads and checks them.

The others build the same model over memory that is reserved and never touched, and receive their parts of the first one's
weights when the model is sharded: there is room needed for one copy of the model, however many processes run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import gather_object
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ncalign.model.adapters import with_adapter
from ncalign.model.attention import NAME as SHARED
from ncalign.model.encoding import Encoder, make_encoder
from ncalign.model.fused_head import why_not_fused
from ncalign.model.limits import limits_of
from ncalign.model.logprobs import LogprobModel, base_causal_model, check_head
from ncalign.model.noise import disable_dropout
from ncalign.model.policy import (
    DTYPES,
    Policy,
    compute_as_configured,
    load_config,
    load_policy,
    load_tokenizer,
    quiet_transformers,
)
from ncalign.model.sharing import why_head_differs, why_not_shared
from ncalign.training.config import TrainConfig
from ncalign.training.launch import is_sharded
from ncalign.training.peers import decided_by_first, say_first


@dataclass(frozen=True)
class _Told:
    """What the first process says of the policy that it loaded; without precisions the others load it themselves."""

    fingerprint: str
    on_adapter: bool
    merged_dtype: torch.dtype
    dtypes: dict[str, torch.dtype] | None


def open_policy(config: TrainConfig, accelerator: Accelerator) -> tuple[Policy, Encoder]:
    """The policy that training starts from, and the encoder of its groups."""
    # bitsandbytes's packed weights are sharded as they are loaded.
    once = is_sharded(accelerator) and accelerator.num_processes > 1 and config.quantization is None
    policy = _loaded_once(config, accelerator) if once else _loaded(config)
    return policy, make_encoder(policy.tokenizer, config.encoding, limits=limits_of(policy.model))


def share_prompts_alike(model: LogprobModel, accelerator: Accelerator, *, prompts_once: bool) -> str | None:
    """Have the model share prompts where no process finds, on its own device, that it computes something else then.

    Args:
        model: as accelerate prepared it, without its wrapper; all processes call this together.
        accelerator: this process's.
        prompts_once: whether prompts in a pass of their own are wanted too.

    Returns:
        Why prompts can't be shared, the same on all processes; None where they are from now on.
    """
    reason = _any_process(why_not_shared(model, device=accelerator.device, prompts_once=prompts_once), accelerator)
    if reason is None:
        base_causal_model(model.model).set_attn_implementation(SHARED)
    return reason


def choose_head(
    setting: Literal["auto", "liger", "own"], model: LogprobModel, accelerator: Accelerator, *, dtype: torch.dtype
) -> None:
    """Have the vocabulary head run through Liger's kernel, where it applies and every process finds that it computes the same.

    Says once which head it is, where there is a choice.

    Args:
        setting: the run's.
        model: as accelerate prepared it, without its wrapper; all processes call this together.
        accelerator: this process's.
        dtype: in which the model computes.

    Raises:
        ValueError: Liger's was asked for and can't be used.
    """
    if setting == "own":
        return
    device = accelerator.device
    reason = _any_process(why_not_fused(base_causal_model(model.model), device=device, dtype=dtype), accelerator)
    if reason is None:
        reason = _any_process(why_head_differs(model, device=device), accelerator)
    if reason is None:
        model.fused_head = True
        say_first(accelerator, f"Vocabulary head: Liger's kernel (head: {setting})")
    elif setting == "liger":
        raise ValueError(f"head: liger asks for Liger's kernel, which can't be used here: {reason}; set head: auto, or own")
    elif device.type == "cuda":
        say_first(accelerator, f"Vocabulary head: ncalign's own (head: auto); Liger's can't be used: {reason}")


def _any_process(reason: str | None, accelerator: Accelerator) -> str | None:
    """The first reason that any process found, the same on all of them."""
    reasons = gather_object([reason]) if accelerator.num_processes > 1 else [reason]
    return next(filter(None, reasons), None)


def _loaded(config: TrainConfig) -> Policy:
    policy = load_policy(
        config.model,
        dtype=config.dtype,
        lora=config.lora,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
    )
    check_head(policy.model)
    return policy


def _loaded_once(config: TrainConfig, accelerator: Accelerator) -> Policy:
    own: list[Policy] = []

    def load() -> _Told:
        own.append(policy := _loaded(config))
        receiver, dtypes = _without_weights(config), {name: p.dtype for name, p in policy.model.named_parameters()}
        # An adapter that was merged may have brought further tokens, and accelerate passes on no buffer that is saved.
        alike = _shapes(receiver.model) == _shapes(policy.model) and _shapes(policy.model).keys() == {
            *policy.model.state_dict()
        }
        return _Told(policy.fingerprint, policy.on_adapter, policy.merged_dtype, dtypes if alike else None)

    told = decided_by_first(accelerator, load)
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = told.dtypes is not None
    if own:
        return own[0]
    if told.dtypes is None:
        return _loaded(config)
    policy = _without_weights(config)
    _reserve(policy.model, told.dtypes)
    return replace(policy, fingerprint=told.fingerprint, on_adapter=told.on_adapter, merged_dtype=told.merged_dtype)


def _without_weights(config: TrainConfig) -> Policy:
    """The policy with weights that have a shape and no values, and nothing that only weights tell."""
    described = load_config(config.model, trust_remote_code=config.trust_remote_code)
    with init_empty_weights(include_buffers=False), quiet_transformers(config.model):
        model = AutoModelForCausalLM.from_config(
            described, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
        )
    assert isinstance(model, PreTrainedModel)
    compute_as_configured(model, DTYPES[config.dtype])
    model.tie_weights()
    model.requires_grad_(True)
    model.eval()
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    policy = Policy(model, tokenizer, config.model, "", False, disable_dropout(model))
    if config.lora is None:
        return policy
    return replace(policy, model=with_adapter(model, config.lora, model=config.model, seed=config.seed))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}


def _reserve(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give weights without values memory that the system hands out when it is first touched, which it never is."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reserved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            key = id(parameter)
            if parameter.is_meta and key not in reserved:
                values = torch.empty(parameter.shape, dtype=dtypes[names[key]], device="cpu")
                reserved[key] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            if parameter.is_meta:
                setattr(module, own, reserved[key])

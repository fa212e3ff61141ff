"""Model, method and optimizer put together, as a run trains with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from accelerate import Accelerator

from ncalign.model.attention import shares_prompts
from ncalign.model.compiled import compile_norms_and_mlps
from ncalign.model.limits import filler_id
from ncalign.model.logprobs import LogprobModel, base_causal_model, completion_token_cost
from ncalign.model.policy import DTYPES, Policy
from ncalign.model.routing import router_loss_of
from ncalign.objectives import Method
from ncalign.training.config import TrainConfig
from ncalign.training.engine import Engine
from ncalign.training.launch import compute_in, is_sharded
from ncalign.training.loading import choose_head, share_prompts_alike
from ncalign.training.memory import recompute_activations, step_memory
from ncalign.training.optimizer import make_optimizer
from ncalign.training.peers import decided_by_first, say_first

_PASS_TOKENS = {"cpu": 2048, "other": 16384}
"""Tokens of a pass by default: a CPU is busy with fewer."""


def make_engine(
    config: TrainConfig, policy: Policy, method: Method, accelerator: Accelerator, *, tokens: Sequence[int] = ()
) -> tuple[Engine, torch.optim.Optimizer]:
    """The engine that runs the method on this policy, and the optimizer of what it trains.

    ``tokens`` are those of each group, where they are known before: passes may be smaller than they are allowed to be.
    """
    max_tokens = config.max_tokens_per_batch or _PASS_TOKENS["cpu" if accelerator.device.type == "cpu" else "other"]
    longest = sorted(tokens, reverse=True)[: config.per_device_train_batch_size]
    most = max(longest[0], min(max_tokens, sum(longest))) if longest else max_tokens
    if _recomputes(config, policy, accelerator, most):
        recompute_activations(base_causal_model(policy.model))
    if config.compile_norms_and_mlps:
        compile_norms_and_mlps(policy.model, device=accelerator.device)
    find_router = partial(router_loss_of, base_causal_model(policy.model), config.router_aux_loss_coef)
    router, notice = decided_by_first(accelerator, find_router)
    if notice:
        say_first(accelerator, f"note: {notice}")
    # Trained weights are float32 in any case: all of them, or the adapter's beside a frozen model held in bfloat16.
    rounded = torch.bfloat16 if config.dtype == "bfloat16" else None
    autocast = rounded
    if is_sharded(accelerator):
        compute_in(rounded, accelerator)
        autocast = None
    model = LogprobModel(policy.model, autocast=autocast)
    # Before sharding, which hides how many weights a number packs.
    token_cost, once = completion_token_cost(policy.model), _may_share_once(config, accelerator)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    # Only now do the weights lie where they are trained, whole or in parts, and run through that device's kernels.
    reason = share_prompts_alike(model, accelerator, prompts_once=once) if config.share_prompts else None
    if reason is not None:
        say_first(accelerator, f"note: each completion computes its prompt again, since prompts can't be shared here: {reason}")
    choose_head(config.head, model, accelerator, dtype=DTYPES[config.dtype])
    engine = Engine(
        model=wrapped,
        method=method,
        accelerator=accelerator,
        pad_token_id=filler_id(policy.model, policy.tokenizer),
        seed=config.seed,
        max_groups=config.per_device_train_batch_size,
        max_tokens=max_tokens,
        token_cost=token_cost,
        scoring_dtype=None if config.scoring_dtype == config.dtype else DTYPES[config.scoring_dtype],
        prompts_once=once and shares_prompts(base_causal_model(policy.model)),
        router=router,
    )
    return engine, optimizer


def _recomputes(config: TrainConfig, policy: Policy, accelerator: Accelerator, tokens: int) -> bool:
    """Whether layers' activations are computed again in the backward pass, as configured or where a step would not fit."""
    if config.activation_checkpointing != "auto":
        return config.activation_checkpointing
    need = step_memory(
        policy.model,
        tokens=tokens,
        precision=DTYPES[config.dtype],
        device=accelerator.device,
        num_shards=accelerator.num_processes if is_sharded(accelerator) else 1,
    )
    able = bool(getattr(base_causal_model(policy.model), "supports_gradient_checkpointing", False))
    # Devices of different nodes may differ.
    recomputes, needed = decided_by_first(accelerator, lambda: (not need.fits(), "" if need.fits() else need.text()))
    if recomputes and able:
        say_first(
            accelerator, f"note: activations are computed again in the backward pass (activation_checkpointing): {needed}"
        )
    elif recomputes:
        say_first(accelerator, f"warning: this model can't compute its activations again in the backward pass: {needed}")
    return recomputes and able


def _may_share_once(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether one pass over prompts may serve scoring and training: not with an adapter's dropout, nor with sharded weights."""
    noisy = config.lora is not None and config.lora.dropout > 0
    return not noisy and not is_sharded(accelerator)

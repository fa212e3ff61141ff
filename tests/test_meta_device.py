"""Shared prompts on tensors that have shapes and no values: nothing is read back from the device, nothing is left on the CPU.

What depends on values stays out: padded rows, whose masks transformers reads, routers' choices of experts, a kernel's draws.
tests/far_step.py runs those.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ncalign.model.logprobs import completion_logprobs
from ncalign.model.sharing import share_prompts
from ncalign.training.memory import recompute_activations
from test_logprobs import ARCHITECTURES, build
from test_sharing import batch_of

META = torch.device("meta")
SIZES = ((50, (3, 10, 7)), (12, (2,)), (130, (100, 260)))


def on_meta(name: str, *, adapter: bool = False, checkpointed: bool = False) -> Any:
    """A model whose prompts are shared, moved to a device without values."""
    model: Any = build(name)
    assert share_prompts(model) is None
    if checkpointed:
        recompute_activations(model)
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    return model.to(META).train()


def assert_gradients_there(model: Any) -> None:
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(gradient is not None and gradient.device.type == "meta" for gradient in trained.values())


@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "adapter"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_shared_prompts(name: str, checkpointed: bool, adapter: bool) -> None:
    model = on_meta(name, adapter=adapter, checkpointed=checkpointed)
    batch = batch_of(SIZES).to(META)
    logprobs = completion_logprobs(model, batch)
    assert (logprobs.shape, logprobs.device.type) == (batch.candidate_mask.shape, "meta")
    logprobs.sum().backward()
    assert_gradients_there(model)


@pytest.mark.parametrize("name", sorted(name for name in ARCHITECTURES if not name.endswith(("moe", "mixtral"))))
def test_every_architecture_that_shares(name: str) -> None:
    model: Any = build(name)
    if (reason := share_prompts(model)) is not None:
        pytest.skip(reason)
    batch = batch_of(SIZES).to(META)
    completion_logprobs(model.to(META), batch).sum().backward()
    assert_gradients_there(model)

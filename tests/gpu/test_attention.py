"""Shared prompts through FlexAttention's kernels: the numbers of padded rows, few graphs, no mask of a row's length squared."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ncalign.model.attention import shares_prompts
from ncalign.model.batching import collate
from ncalign.model.blockwise import block_mask
from ncalign.model.layout import Segments, Span
from ncalign.model.logprobs import chosen_logprobs, completion_logprobs
from ncalign.model.sharing import share_prompts
from ncalign.training.memory import recompute_activations
from test_logprobs import VOCABULARY, group
from test_sharing import Sizes, assert_same, values_and_gradients

SIZES: tuple[Sizes, ...] = (
    ((50, (3, 10, 7)), (12, (2,)), (1, (4, 4, 4, 4))),
    ((100, (28, 128, 40)), (128, (128, 128))),
    ((900, (300, 257, 1, 412)), (411, (200, 220)), (130, (5,))),
)
TOLERANCES = {torch.float32: (2e-3, 1e-3), torch.bfloat16: (1.0, 0.05)}


def model_of(device: torch.device, dtype: torch.dtype, config: type = LlamaConfig, **options: Any) -> PreTrainedModel:
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256} | options
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config(
            vocab_size=VOCABULARY,
            intermediate_size=256,
            num_hidden_layers=2,
            max_position_embeddings=4096,
            **settings,
        ),
        dtype=dtype,
        attn_implementation="eager" if config is Gemma2Config else "sdpa",
    ).to(device)
    return model


def on(device: torch.device, sizes: Sizes, seed: int = 0) -> Any:
    groups = [group(seed * 100 + number, prompt, completions) for number, (prompt, completions) in enumerate(sizes)]
    return collate(groups, pad_token_id=0).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LlamaConfig, {"num_attention_heads": 4, "num_key_value_heads": 4}),
        (LlamaConfig, {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 384}),
        (LlamaConfig, {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}),
        (MistralConfig, {"sliding_window": 100}),
        (Gemma2Config, {"sliding_window": 100, "attn_logit_softcapping": 20.0}),
    ],
    ids=["heads 1:1", "heads 3:1", "heads 4:1, width 128", "window", "window and soft cap"],
)
def test_shared_is_padded(cuda: torch.device, config: type, options: dict[str, Any], dtype: torch.dtype) -> None:
    nats, relative = TOLERANCES[dtype]
    model = model_of(cuda, dtype, config, **options)
    expected = [values_and_gradients(model, on(cuda, sizes)) for sizes in SIZES]
    assert share_prompts(model) is None
    assert shares_prompts(model)
    for sizes, values in zip(SIZES, expected, strict=True):
        assert_same(values_and_gradients(model, on(cuda, sizes)), values, nats=nats, relative=relative)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_prompts_once_is_one_row(cuda: torch.device, checkpointed: bool) -> None:
    model = model_of(cuda, torch.float32)
    assert share_prompts(model) is None
    model.train()
    for sizes in SIZES:
        batch = on(cuda, sizes)
        chosen = torch.arange(batch.candidate_mask.shape[1], device=cuda).expand(batch.candidate_mask.shape)
        chosen = chosen.masked_fill(~batch.candidate_mask, -1)
        expected = values_and_gradients(model, batch)
        if checkpointed:
            recompute_activations(model)
        model.zero_grad(set_to_none=True)
        logprobs, scores, _ = chosen_logprobs(model, batch, lambda found, chosen=chosen: chosen, scoring=torch.no_grad())
        torch.testing.assert_close(scores, expected[0], rtol=0, atol=2e-3)
        weights = 0.3 + 0.17 * torch.arange(logprobs.numel(), dtype=logprobs.dtype, device=cuda).view_as(logprobs)
        (logprobs * weights).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same((logprobs.detach(), gradients), expected, nats=2e-3, relative=1e-3)


def test_forty_random_batches_make_few_graphs_and_none_that_is_dense(cuda: torch.device) -> None:
    model, rng = model_of(cuda, torch.bfloat16), random.Random(0)
    assert share_prompts(model) is None
    torch._dynamo.reset()
    counters.clear()
    torch.cuda.reset_peak_memory_stats()
    for number in range(40):
        sizes = tuple(
            (rng.randint(1, 900), tuple(rng.randint(1, 400) for _ in range(rng.randint(1, 8))))
            for _ in range(rng.randint(1, 3))
        )
        values_and_gradients(model, on(cuda, sizes, seed=number))
        with torch.no_grad():
            completion_logprobs(model, on(cuda, sizes, seed=number))
    assert counters["stats"]["unique_graphs"] <= 24
    # A dense row of 12,000 tokens would take 4 heads x 12,000^2 x 4 bytes = 2.3 GB a layer.
    assert torch.cuda.max_memory_allocated() < 1.5e9


@pytest.mark.parametrize("length", [16_384, 32_768])
def test_the_mask_of_a_long_row_is_small(cuda: torch.device, length: int) -> None:
    spans = tuple(Span(start, 1024, (512, 512)) for start in range(0, length, 2048))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = block_mask(Segments(spans), 0, window=None, device=cuda)
    assert mask.shape[-2:] == (length, length)
    assert torch.cuda.max_memory_allocated() - before <= 50e6

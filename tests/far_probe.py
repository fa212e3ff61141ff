"""What training compares on the device of far_device.py before it shares prompts, rightly and with mistakes, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

import far_device
from conftest import build_model, build_tokenizer
from ncalign.model import attention, blockwise, logprobs
from ncalign.model.blockwise import BLOCK, UNBOUNDED, block_mask
from ncalign.model.policy import Policy
from ncalign.objectives import MCPO, build_method
from ncalign.training.assembly import make_engine
from ncalign.training.config import TrainConfig
from test_sharing import HalfBackward

# PyTorch can't compute a part again in the backward pass of such a device.
logprobs.checkpoint = lambda function, *given, **options: function(*given)

rows: list[tuple[str, int, int]] = []
"""Of each attention in blocks, the device, and how many queries and keys."""


def in_blocks(query: Tensor, key: Tensor, value: Tensor, *, segments: Any, window: Any, cap: Any, scale: float) -> Tensor:
    """What the kernel makes of a block mask, with whole score matrices."""
    rows.append((query.device.type, query.shape[2], key.shape[2]))
    mask = block_mask(segments, key.shape[2] - query.shape[2], window=window, device=query.device)
    queries, keys = (torch.arange(length, device=query.device) for length in mask.shape[-2:])
    visible = mask.mask_mod(None, None, queries.unsqueeze(1), keys)
    partly = spread(mask.kv_num_blocks, mask.kv_indices)
    whole = spread(mask.full_kv_num_blocks, mask.full_kv_indices)
    seen = ((visible & partly) | whole)[: query.shape[2], : key.shape[2]]
    return attention._attend(query, key, value, seen, cap=cap, scale=scale)


def spread(counts: Tensor, indices: Tensor) -> Tensor:
    """``[Q, S]`` tokens of the blocks that are listed."""
    listed = torch.arange(indices.shape[3], device=indices.device) < counts[0, 0].unsqueeze(1)
    blocks = torch.zeros(indices.shape[2:], dtype=torch.int32, device=indices.device)
    blocks = blocks.scatter(1, indices[0, 0].long(), listed.to(torch.int32)) > 0
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


plain_function, plain_blocks = blockwise.mask_function, blockwise._blocks


def seeing_the_next(*given: Any, **options: Any) -> Callable[..., Tensor]:
    visible = plain_function(*given, **options)
    return lambda batch, head, query, key: visible(batch, head, query, key) | visible(batch, head, query, key - 1)


def seeing_each_other(queries: Any, keys: Any, **options: Any) -> Callable[..., Tensor]:
    return plain_function(*([piece._replace(part=0) for piece in pieces] for pieces in (queries, keys)), **options)


def whole_where_partly(*given: Any) -> Any:
    some, whole = plain_blocks(*given)
    return some, (some if len(some) > 1 else whole)


def without_the_first_block(*given: Any) -> Any:
    some, whole = plain_blocks(*given)
    some[2:, 0] = whole[2:, 0] = False
    return some, whole


def half_backward(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return in_blocks(query, key, HalfBackward.apply(value), **options)


def broken(*given: Any, **options: Any) -> Tensor:
    return in_blocks(*given, **options) * float("nan")


CASES: dict[str, Callable[[], Any]] = {
    "right": lambda: mock.patch.object(attention, "UNBOUNDED", UNBOUNDED),
    "the next token is seen": lambda: mock.patch.object(blockwise, "mask_function", seeing_the_next),
    "completions see each other": lambda: mock.patch.object(blockwise, "mask_function", seeing_each_other),
    "partly visible blocks are wholly": lambda: mock.patch.object(blockwise, "_blocks", whole_where_partly),
    "a block is left out": lambda: mock.patch.object(blockwise, "_blocks", without_the_first_block),
    "half of a gradient": lambda: mock.patch.object(attention, "blockwise", half_backward),
    "no numbers": lambda: mock.patch.object(attention, "blockwise", broken),
}


@contextmanager
def on_the_device() -> Iterator[None]:
    """Inside, attention over shared prompts runs in blocks there."""
    far = mock.patch.object(attention, "in_blocks", lambda device: device.type == far_device.DEVICE.type)
    probed = mock.patch("ncalign.model.sharing.in_blocks", lambda device: device.type == far_device.DEVICE.type)
    with far, probed, mock.patch.object(attention, "blockwise", in_blocks):
        yield


def probed(accelerator: Accelerator) -> dict[str, Any]:
    """An engine made on the device: what it compared, and what came of it."""
    tokenizer = build_tokenizer()
    policy = Policy(build_model(tokenizer), tokenizer, "tiny", "", False)
    rows.clear()
    said: list[str] = []
    config = TrainConfig.model_validate(
        {"model": "tiny", "data": "-", "output_dir": "run", "dtype": "float32", "scoring_dtype": "float32", "report_to": ()}
    )
    with mock.patch("ncalign.training.peers.say", said.append):
        engine, _ = make_engine(config, policy, build_method(MCPO()), accelerator)
    return {
        "rows": list(rows),
        "said": said,
        "attention": policy.model.config._attn_implementation,
        "prompts_once": engine.prompts_once,
        "devices": sorted({parameter.device.type for parameter in policy.model.parameters()}),
    }


if __name__ == "__main__":
    accelerator, found = Accelerator(cpu=True), {}
    PartialState().device = accelerator.state.device = far_device.DEVICE
    for name, case in CASES.items():
        with on_the_device(), case():
            found[name] = probed(accelerator)
    json.dump(found, sys.stdout)

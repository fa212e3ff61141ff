"""Attention on accelerators, as far as a processor can show it: masks, numbers, graphs. Kernels run in tests/gpu."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_mask, flex_attention

from ncalign.model import blockwise
from ncalign.model.attention import shared_attention
from ncalign.model.blockwise import BLOCK, UNBOUNDED, block_mask
from ncalign.model.layout import Segments, Span, completions_layout, prompts_layout

CPU = torch.device("cpu")


@pytest.fixture
def compiled() -> Iterator[Callable[..., None]]:
    """``compiled(backend=..., dynamic=...)``: what the attention is compiled with in this test."""

    def use(**options: Any) -> None:
        torch._dynamo.reset()
        counters.clear()
        blockwise._compiled[:] = [torch.compile(flex_attention, fullgraph=True, **options)]

    yield use
    blockwise._compiled.clear()
    torch._dynamo.reset()


def layout(rng: random.Random, lengths: list[int], most_groups: int = 4) -> tuple[Span, ...]:
    spans: list[Span] = []
    for _ in range(rng.randint(1, most_groups)):
        completions = tuple(rng.choice(lengths) for _ in range(rng.randint(1, 4)))
        spans.append(Span(spans[-1].end if spans else 0, rng.choice(lengths), completions))
    return tuple(spans)


def behind_prompts(spans: tuple[Span, ...], chosen: list[list[int]]) -> Segments:
    """Completions in a row of their own, behind a row of all prompts."""
    tokens = torch.arange(spans[-1].end)
    prompts = prompts_layout(tokens, spans).segments
    assert prompts is not None
    segments = completions_layout(tokens, spans, chosen, prompts).segments
    assert segments is not None
    return segments


def rule(spans: tuple[Span, ...], window: int | None) -> Tensor:
    """What sees what in a row of whole groups, text by text."""
    found = torch.zeros(spans[-1].end, spans[-1].end, dtype=torch.bool)
    for span in spans:
        prompt = list(range(span.start, span.start + span.prompt))
        texts = [prompt] + [
            prompt + list(range(offset, offset + size)) for offset, size in zip(span.offsets(), span.completions, strict=True)
        ]
        for text in texts:
            places = torch.tensor(text)
            distance = torch.arange(len(text)).unsqueeze(1) - torch.arange(len(text))
            seen = (distance >= 0) & (distance < (window or UNBOUNDED))
            found[places.unsqueeze(1), places] |= seen
    return found


def rule_behind_prompts(spans: tuple[Span, ...], chosen: list[list[int]], window: int | None) -> Tensor:
    """The same, taken out of the row of whole groups: rows of the chosen completions, columns of prompts and of these."""
    whole = rule(spans, window)
    prompts = [token for span in spans for token in range(span.start, span.start + span.prompt)]
    own = [
        token
        for span, picked in zip(spans, chosen, strict=True)
        for k in picked
        for token in range(span.offsets()[k], span.offsets()[k] + span.completions[k])
    ]
    return whole[own][:, prompts + own]


def check(segments: Segments, before: int, expected: Tensor, window: int | None) -> None:
    """The mask is the rule token by token, its blocks are those that hold something, and whole ones hold nothing else."""
    mask = block_mask(segments, before, window=window, device=CPU)
    size = [-(-length // BLOCK) for length in expected.shape]
    padded = torch.zeros(size[0] * BLOCK, size[1] * BLOCK, dtype=torch.bool)
    padded[: expected.shape[0], : expected.shape[1]] = expected
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, *padded.shape, device="cpu")[0, 0], padded)
    blocks = padded.reshape(size[0], BLOCK, size[1], BLOCK)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(3).any(1))
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks[0, 0], blocks.all(3).all(1).sum(1, dtype=torch.int32))
    assert mask.kv_indices.dtype == torch.int32


@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_mask_is_the_rule_written_out(window: int | None) -> None:
    rng = random.Random(0)
    for lengths in ([1, 2, 4], [1, 64, 128, 200, 300], [256]):
        for _ in range(3):
            spans = layout(rng, lengths, 3)
            check(Segments(spans), 0, rule(spans, window), window)
            # The first group may have nothing chosen: no group sees its prompt.
            chosen = [
                sorted(rng.sample(range(len(span.completions)), rng.randint(g == 0 < len(spans) - 1, 1)))
                for g, span in enumerate(spans)
            ]
            if any(chosen):
                before = sum(span.prompt for span in spans)
                check(behind_prompts(spans, chosen), before, rule_behind_prompts(spans, chosen, window), window)


def test_a_mask_of_a_long_row_takes_no_square_of_its_length() -> None:
    spans = tuple(Span(g * 4096, 2048, (512, 512, 512, 512)) for g in range(8))
    mask = block_mask(Segments(spans), 0, window=None, device=CPU)
    tensors = [value for value in mask.as_tuple() if isinstance(value, Tensor)]
    captured = [cell.cell_contents for cell in mask.mask_mod.__closure__ or ()]
    total = sum(t.numel() * t.element_size() for t in [*tensors, *(c for c in captured if isinstance(c, Tensor))])
    assert total < 2_000_000  # 32,768 tokens: int64 for each pair would be 8 GB


def compare(rng: random.Random, spans: tuple[Span, ...], *, heads: tuple[int, int], width: int, **options: Any) -> None:
    """The kernel's output for a row of whole groups, and for completions behind their prompts, against the dense one."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    row = [torch.randn(1, number, spans[-1].end, width, generator=generator) for number in (heads[0], heads[1], heads[1])]
    given = {name: value for name, value in options.items() if value is not None}
    with torch.no_grad():
        expected, _ = shared_attention(torch.nn.Module(), *row, None, segments=Segments(spans), **given)
        settings = {"window": options["sliding_window"], "cap": options["softcap"], "scale": width**-0.5}
        found = blockwise.blockwise(*row, segments=Segments(spans), **settings)
        torch.testing.assert_close(found.transpose(1, 2), expected, rtol=0, atol=2e-6)
        prompts = [i for span in spans for i in range(span.start, span.start + span.prompt)]
        own = [i for span in spans for i in range(span.start + span.prompt, span.end)]
        behind = behind_prompts(spans, [list(range(len(span.completions))) for span in spans])
        keys = [part[:, :, prompts + own] for part in row[1:]]
        found = blockwise.blockwise(row[0][:, :, own], *keys, segments=behind, **settings)
        torch.testing.assert_close(found.transpose(1, 2), expected[:, own], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_passes_of_all_kinds_share_few_graphs(compiled: Callable[..., None]) -> None:
    # Dynamo's graphs alone: what they hold is computed by PyTorch's own dense form.
    compiled(backend="eager", dynamic=True)
    rng = random.Random(1)
    for number in range(16):
        heads, width = ((4, 1), (4, 4), (6, 2))[number % 3], (16, 32)[number % 2]
        options = {"sliding_window": rng.choice([None, 5, 150]), "softcap": (None, 20.0, 50.0)[number % 3]}
        compare(rng, layout(rng, [1, 7, 60, 130], 3), heads=heads, width=width, **options)
    # More than PyTorch would make before it computes whole score matrices without a word.
    graphs = counters["stats"]["unique_graphs"]
    assert torch._dynamo.config.recompile_limit == 8 < graphs <= 24


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_the_kernel_on_a_processor(compiled: Callable[..., None]) -> None:
    # Sizes that stay the same: PyTorch 2.13 writes wrong C++ for an index into a row of unknown length.
    compiled(dynamic=False)
    rng = random.Random(2)
    for window, cap in ((None, None), (100, None), (None, 20.0)):
        spans = layout(rng, [40, 128, 200, 300], 2)
        compare(rng, spans, heads=(4, 2), width=32, sliding_window=window, softcap=cap)

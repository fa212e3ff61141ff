"""Arithmetic of what is measured on a GPU: idle time from kernels' intervals, a step's operations, and bounds on its memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import LlamaConfig

Sizes = Sequence[tuple[int, Sequence[int]]]
"""Tokens of each group's prompt and of its completions."""

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Operations a second in bfloat16, of dense matrices, by NVIDIA's data sheets (SXM)."""

HEAD_BYTES = 2**28
"""Logits that the head holds at a time on a GPU, in float32."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        """As transformers wants them."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2**15,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    @property
    def layer_weights(self) -> int:
        """Of one layer."""
        keys = self.width * self.kv_heads // self.heads
        return 2 * self.width * self.width + 2 * self.width * keys + 3 * self.width * self.inner + 2 * self.width

    @property
    def head_weights(self) -> int:
        """Of the head; the embeddings have as many."""
        return self.vocabulary * self.width


TINY = Shape(layers=3, width=64, inner=256, heads=4, kv_heads=2, vocabulary=384)
ONE_B = Shape(layers=16, width=2048, inner=8192, heads=32, kv_heads=8, vocabulary=32_000)
EIGHT_B = Shape(layers=32, width=4096, inner=14_336, heads=32, kv_heads=8, vocabulary=128_256)


def idle_share(intervals: Iterable[tuple[float, float]]) -> float:
    """The part of the time from the first start to the last end in which nothing runs; intervals may overlap."""
    ordered = sorted(intervals)
    if not ordered:
        raise ValueError("nothing ran")
    first, until = ordered[0][0], ordered[0][0]
    busy = 0.0
    for start, end in ordered:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - first)


def count_waits(run: Callable[[], object], *, mode: Callable[[str], None]) -> int:
    """How often the host waits for the device while ``run`` runs: PyTorch warns each time once ``mode("warn")`` is set."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mode("warn")
        try:
            run()
        finally:
            mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def visible_pairs(sizes: Sizes) -> int:
    """Pairs of a token and one that it attends to, where each prompt is computed once."""
    found = 0
    for prompt, completions in sizes:
        found += prompt * (prompt + 1) // 2 + sum(prompt * length + length * (length + 1) // 2 for length in completions)
    return found


def step_flops(shape: Shape, sizes: Sizes, *, all_weights: bool) -> float:
    r"""Operations of forward and backward passes over groups that share prompts, without any that are done again.

    A token costs 2 operations a weight forwards and 2 backwards, and 2 more for the weight's own gradient, where it is trained;
    a visible pair $4d$ forwards and $8d$ backwards in each layer of width $d$. The head sees completions' tokens alone.
    """
    scored = sum(sum(completions) for _, completions in sizes)
    tokens = scored + sum(prompt for prompt, _ in sizes)
    products = tokens * shape.layers * shape.layer_weights + scored * shape.head_weights
    return (6 if all_weights else 4) * products + 12.0 * shape.layers * shape.width * visible_pairs(sizes)


def mfu(flops: float, seconds: float, card: str) -> float | None:
    """The part of a card's peak that was reached; None for a card that is not in the table."""
    peak = next((value for name, value in PEAKS.items() if name in card), None)
    return None if peak is None else flops / seconds / peak


def activation_bytes(shape: Shape, tokens: int, *, checkpointed: bool) -> int:
    """Most that a bfloat16 pass with an adapter keeps for its backward pass, and one layer's work there.

    A layer keeps 13 numbers of 2 bytes of each token for each unit of its width and 4 for each of its inner width: the 220 KB
    that were counted at 4096 and 14,336. With checkpointing it keeps its input, and one layer is computed again.
    """
    layer = 2 * tokens * (13 * shape.width + 4 * shape.inner)
    kept = shape.layers * 2 * tokens * shape.width if checkpointed else shape.layers * layer
    # The layer that runs holds gradients of as many numbers beside them.
    return kept + 2 * layer

"""What `dtype: auto` means on this machine: bfloat16 where it multiplies clearly faster than float32, elsewhere float32.

An accelerator is asked; a processor is timed, since what torch reports of one does not tell whether it has bf16 instructions or
emulates them, which takes several times as long as float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from ncalign.core.progress import say
from ncalign.model.config import DType, Precision

_TOKENS, _WIDTH = 64, 576
"""The product that is timed: a projection of a model of some hundred million weights, for a few sentences."""
_REPEATS = 6
# The thread's own time stands still while the system runs another process in its place; Windows counts it too coarsely.
_clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-5 else time.perf_counter
_FASTER = 0.75
"""The share of float32's time that bfloat16 may take at most: about .4 is usual with bf16 instructions, 4 to 9 without them."""


@dataclass(frozen=True)
class FastPrecision:
    """The precision in which a device multiplies fastest, and how that was found."""

    precision: Precision
    reason: str


def resolve_dtype(dtype: DType, device: str | None = None) -> Precision:
    """The precision that a configuration asks for; what ``auto`` came to is said once in a process.

    Args:
        dtype: as configured.
        device: type of the device that computes, such as ``cpu``; None: a GPU where there is one, as for generation.
    """
    if dtype != "auto":
        return dtype
    found = fast_precision(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    announce(precision_line(found.precision, found.reason))
    return found.precision


def precision_line(dtype: Precision, reason: str, scoring: Precision | None = None) -> str:
    """What is said of a decision; ``scoring`` is the precision in which candidates are scored, where it differs."""
    apart = f", scoring in {scoring}" if scoring not in (None, dtype) else ""
    return f"Precision: {dtype}{apart} (auto: {reason})"


@cache
def announce(line: str) -> None:
    """Say a line on stderr, once in a process."""
    say(line)


@cache
def fast_precision(device: str) -> FastPrecision:
    """The precision in which this type of device multiplies fastest; decided once in a process."""
    if device == "cpu":
        ratio = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
        return FastPrecision("bfloat16" if ratio <= _FASTER else "float32", f"bf16 products take {ratio:.2g}x as long here")
    if device == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = device == "xpu" and torch.xpu.is_bf16_supported(including_emulation=False)
    if able:
        return FastPrecision("bfloat16", f"the {device} device has bf16 instructions")
    return FastPrecision("float32", f"torch reports no bf16 instructions of the {device} device")


def product_seconds(dtype: torch.dtype) -> float:
    """Seconds of a matrix product on one core, the fastest of a few: threads that wait for a busy core would tell nothing."""
    threads = torch.get_num_threads()
    rows, weights = torch.ones(_TOKENS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    seconds = []
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(_REPEATS + 1):
                started = _clock()
                torch.nn.functional.linear(rows, weights)
                seconds.append(_clock() - started)
    finally:
        torch.set_num_threads(threads)
    # The first one warms up.
    return min(seconds[1:])

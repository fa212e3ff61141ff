"""What `tests/gpu` runs on a GPU, at a tiny size on the CPU, and the arithmetic of its figures."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from conftest import build_tokenizer
from gpu_figures import TINY, activation_bytes, count_waits, idle_share, mfu, step_flops, visible_pairs
from gpu_runs import growing, killed_and_resumed, make_loop, measured_step, work_intervals
from gpu_sharded import sharded_step
from ncalign.training.config import TrainConfig

SIZES = [(128, (32, 32, 32, 32))] * 2
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("intervals", "idle"),
    [
        ([(10.0, 20.0)], 0.0),
        ([(0.0, 1.0), (3.0, 4.0)], 0.5),
        ([(3.0, 4.0), (0.0, 1.0), (1.0, 2.0)], 0.25),
        # One lies within another, and a third overlaps its end.
        ([(0.0, 6.0), (1.0, 2.0), (5.0, 8.0), (9.0, 10.0)], 0.1),
    ],
)
def test_idle_time_is_what_no_interval_covers(intervals: list[tuple[float, float]], idle: float) -> None:
    assert idle_share(intervals) == pytest.approx(idle)


def test_of_nothing_there_is_no_idle_time() -> None:
    with pytest.raises(ValueError, match="nothing ran"):
        idle_share([])


def test_waits_are_counted_while_they_are_asked_for() -> None:
    modes: list[str] = []

    def run() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    assert count_waits(run, mode=modes.append) == 3
    assert modes == ["warn", "default"]


def test_operations_of_a_step() -> None:
    sizes = [(3, (2, 1)), (1, (1,))]
    # Prompts see themselves, completions their prompt and themselves: 6 + (6 + 3) + (3 + 1), and 1 + (1 + 1).
    assert visible_pairs(sizes) == 22
    model = make_loop(TINY, SIZES, Accelerator(cpu=True), steps=1).engine.inner.model
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    assert TINY.layers * TINY.layer_weights == layers
    assert TINY.head_weights == model.get_output_embeddings().weight.numel()
    attention = 12 * TINY.layers * TINY.width * 22
    for all_weights, each in ((True, 6), (False, 4)):
        products = each * (8 * layers + 4 * TINY.head_weights)
        assert step_flops(TINY, sizes, all_weights=all_weights) == products + attention


def test_share_of_a_card() -> None:
    assert mfu(989e12, 2.0, "NVIDIA H100 80GB HBM3") == 0.5
    assert mfu(1.0, 1.0, "some other card") is None


def test_growth_of_memory_is_the_most_there_was() -> None:
    with growing(CPU) as grown:
        first = torch.zeros(1000, dtype=torch.float32)
        del first
        second = torch.zeros(500, dtype=torch.float32)
        assert 4000 <= grown() < 5000
    assert second.numel() == 500


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["all weights", "adapter"])
def test_a_step_takes_no_more_memory_than_its_bound(lora: Any, checkpointed: bool) -> None:
    loop = make_loop(TINY, SIZES, Accelerator(cpu=True), lora=lora, activation_checkpointing=checkpointed)
    found = measured_step(loop)
    trained = sum(p.numel() for p in loop.engine.model.parameters() if p.requires_grad)
    bound = activation_bytes(TINY, 2 * 256, checkpointed=checkpointed)
    assert bound / 3 < found.grown - 4 * trained < bound
    assert found.seconds > 0
    loss = loop.means.means()["loss"]
    assert math.isfinite(loss)


def test_a_profile_tells_when_the_device_worked(tmp_path: Path) -> None:
    loop = make_loop(TINY, SIZES, Accelerator(cpu=True), steps=2)
    intervals = work_intervals(lambda: loop.step(0), CPU, tmp_path)
    assert len(intervals) > 500
    assert 0 <= idle_share(intervals) < 1


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_as_one_that_is_not(
    tmp_path: Path, tiny_model_dir: Path, groups_file: Path
) -> None:
    found = killed_and_resumed(
        TrainConfig(
            model=str(tiny_model_dir),
            data=groups_file,
            output_dir=tmp_path,
            cache_dir=tmp_path / "cache",
            dtype="float32",
            learning_rate=1e-3,
            max_steps=5,
            per_device_train_batch_size=4,
            report_to=(),
        )
    )
    assert found.first_loss == pytest.approx(math.log(2), abs=1e-6)
    assert found.steps == [1, 2, 3, 4, 5]
    assert found.trained > 1e-4
    assert found.apart == 0


@pytest.mark.slow
def test_sharded_on_one_process_a_pass_keeps_no_cast_of_all_weights() -> None:
    shape = replace(TINY, layers=8, width=128, inner=512)
    found = sharded_step(shape, [(8, (4, 4))] * 2)
    assert found.weights == shape.layers * shape.layer_weights + 2 * shape.head_weights + shape.width
    # Gradients, then what comes and goes: kept casts would be two bytes of each weight.
    assert 4 * found.weights < found.grown < 5 * found.weights


def test_there_is_an_embedding_for_each_of_the_tokenizers_words() -> None:
    assert len(build_tokenizer()) <= TINY.vocabulary

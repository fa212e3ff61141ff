"""Steps and runs of training on a GPU: memory, speed, waits, idle time, and a run that is killed."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from gpu_figures import EIGHT_B, HEAD_BYTES, ONE_B, Sizes, activation_bytes, count_waits, idle_share, mfu, step_flops
from gpu_runs import killed_and_resumed, make_loop, measured_step, work_intervals
from gpu_sharded import sharded_step
from ncalign.objectives import MCPO, NCA
from ncalign.training.config import TrainConfig

GROUP = (1024, (256, 256, 256, 256))


@pytest.fixture(autouse=True)
def _room(cuda: torch.device) -> None:
    """What an earlier test left in memory."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("objective", [NCA(), MCPO()], ids=lambda objective: objective.name)
def test_killed_and_resumed(
    cuda: torch.device, tmp_path: Path, tiny_model_dir: Path, groups_file: Path, objective: NCA | MCPO
) -> None:
    found = killed_and_resumed(
        TrainConfig(
            model=str(tiny_model_dir),
            data=groups_file,
            output_dir=tmp_path,
            cache_dir=tmp_path / "cache",
            objective=objective,
            dtype="float32",
            learning_rate=1e-3,
            max_steps=5,
            per_device_train_batch_size=4,
            report_to=(),
        )
    )
    # NCA's is twice that of one comparison.
    assert found.first_loss == pytest.approx(math.log(2) * (2 if objective.name == "nca" else 1), abs=1e-5)
    assert found.steps == [1, 2, 3, 4, 5]
    # Kernels that add up in any order are not bitwise the same; lost moments or other groups would be as far off as training.
    assert found.apart < 0.02 * found.trained


@pytest.mark.parametrize("objective", [{"name": "nca"}, {"name": "mc_po"}], ids=["nca", "mc_po"])
def test_a_step_waits_five_times_at_most(cuda: torch.device, objective: dict[str, Any]) -> None:
    loop = make_loop(ONE_B, [GROUP] * 2, Accelerator(), objective=objective)
    for step in range(3):
        loop.step(step)
    waits = count_waits(lambda: loop.step(3), mode=torch.cuda.set_sync_debug_mode)
    print(f"{objective['name']}: {waits} waits")
    assert waits <= 5


@pytest.mark.parametrize(("groups", "checkpointed"), [(2, False), (4, False), (8, True)], ids=["4k", "8k", "16k"])
def test_an_adapter_on_eight_billion_weights(cuda: torch.device, groups: int, checkpointed: bool) -> None:
    sizes: Sizes = [GROUP] * groups
    loop = make_loop(EIGHT_B, sizes, Accelerator(), lora={"r": 16}, activation_checkpointing=checkpointed)
    found = measured_step(loop)
    trained = sum(p.numel() for p in loop.engine.model.parameters() if p.requires_grad)
    # Of the head: logits in two precisions, and their gradients.
    bound = activation_bytes(EIGHT_B, 2048 * groups, checkpointed=checkpointed) + 4 * trained + 3 * HEAD_BYTES
    reached = mfu(step_flops(EIGHT_B, sizes, all_weights=False), found.seconds, torch.cuda.get_device_name())
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{2048 * groups} tokens: {2048 * groups / found.seconds:.0f} tokens/s, MFU {reached}, peak {peak:.1f} GiB, a step "
        f"grows by {found.grown / 2**30:.1f} of at most {bound / 2**30:.1f} GiB"
    )
    assert found.grown <= 1.1 * bound


def test_the_gpu_is_busy(cuda: torch.device, tmp_path: Path) -> None:
    loop = make_loop(ONE_B, [GROUP] * 8, Accelerator(), activation_checkpointing=True)
    for step in range(3):
        loop.step(step)
    idle = idle_share(work_intervals(lambda: [loop.step(step) for step in range(3, 6)], cuda, tmp_path))
    print(f"idle {idle:.1%}")
    assert idle < 0.1


def test_sharded_on_one_process(cuda: torch.device) -> None:
    found = sharded_step(replace(ONE_B, layers=24, vocabulary=8000), [(128, (64, 64))])
    print(f"{found.weights} weights, a step grows by {found.grown / found.weights:.2f} bytes of each")
    # Gradients, then what comes and goes; casts that are kept would be two bytes more.
    assert found.grown < 5 * found.weights

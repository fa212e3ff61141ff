"""Steps and runs of training that `tests/gpu` makes at full size on a GPU, and the fast tests at a tiny one on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import build_tokenizer, relative_distance, weights
from gpu_figures import Shape, Sizes
from live_memory import LiveMemory
from ncalign.model.adapters import with_adapter
from ncalign.model.encoding import EncodedGroup
from ncalign.model.policy import Policy
from ncalign.objectives import build_method
from ncalign.training.checkpoint import find_checkpoints
from ncalign.training.config import TrainConfig
from ncalign.training.engine import Pass
from ncalign.training.loop import Intervals, Loop
from ncalign.training.schedule import DataPlan
from ncalign.training.train import make_engine, run_training

KILLED = """
import os, signal, sys
from ncalign.cli.app import main
from ncalign.training import loop
plain = loop.Loop.step

def step(self, number):
    found = plain(self, number)
    if number + 1 == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

loop.Loop.step = step
sys.exit(main(sys.argv[1:]))
"""
_WORK = {"cuda": {"kernel", "gpu_memcpy", "gpu_memset"}, "cpu": {"cpu_op"}}
"""What a profile calls a device's work."""


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape, its weights made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    return model


def random_groups(shape: Shape, sizes: Sizes, *, steps: int) -> list[EncodedGroup]:
    """Groups of random tokens with these lengths, as many times as there are steps."""
    source = np.random.default_rng(0)

    def some(length: int) -> Any:
        return source.integers(3, shape.vocabulary, length, dtype=np.int32)

    return [
        EncodedGroup(
            f"g{step}-{number}",
            "",
            some(prompt),
            tuple(map(some, completions)),
            tuple(float(k) for k in range(len(completions))),
            (None,) * len(completions),
        )
        for step in range(steps)
        for number, (prompt, completions) in enumerate(sizes)
    ]


def make_loop(
    shape: Shape, sizes: Sizes, accelerator: Accelerator, *, steps: int = 8, folder: Path = Path("unused"), **fields: Any
) -> Loop:
    """The loop that `ncalign train` would run on random groups and weights: NCA in bfloat16, all candidates in the loss."""
    config = TrainConfig.model_validate(
        {"model": "random", "data": folder, "output_dir": folder, "dtype": "bfloat16", "scoring_dtype": "bfloat16"}
        | {"objective": {"name": "nca"}, "per_device_train_batch_size": len(sizes), "max_tokens_per_batch": 10**9}
        | {"report_to": ()}
        | fields
    )
    dtype = torch.float32 if config.lora is None else torch.bfloat16
    model: Any = random_model(shape, accelerator.device, dtype)
    if config.lora is not None:
        model = with_adapter(model, config.lora, model="random", seed=0)
    policy = Policy(model, build_tokenizer(), "random", "random", on_adapter=False)
    engine, optimizer = make_engine(config, policy, build_method(config.objective), accelerator)
    groups = []
    for number, group in enumerate(random_groups(shape, sizes, steps=steps)):
        found = engine.score(engine.batch(Pass([number], [group], True)))
        groups.append(replace(group, reference_logprobs=tuple(found[0].tolist())))
    return Loop(
        engine=engine,
        optimizer=optimizer,
        plan=DataPlan(num_groups=len(groups), groups_per_step=len(sizes), num_steps=steps, seed=0),
        groups=groups,
        eval_groups=(),
        learning_rate=lambda step: 1e-5,
        max_grad_norm=1.0,
        intervals=Intervals(1, 0, 0),
        log=lambda row: None,
    )


@contextmanager
def growing(device: torch.device) -> Iterator[Callable[[], int]]:
    """Inside, a function that tells by how many bytes memory has grown at the most since it was entered."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    with LiveMemory() as memory:
        before = memory.now
        yield lambda: max(0, memory.peak - before)


class Step(NamedTuple):
    """What a step took: seconds, the median of some, and by how many bytes memory grew in one."""

    seconds: float
    grown: int


def measured_step(loop: Loop, *, timed: int = 3) -> Step:
    """Warm up for two steps, measure memory in the third and time of the next."""
    device = loop.engine.accelerator.device
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for step in range(2):
        loop.step(step)
    with growing(device) as grown:
        loop.step(2)
        most = grown()
    seconds = []
    for step in range(3, 3 + timed):
        wait()
        started = time.perf_counter()
        loop.step(step)
        wait()
        seconds.append(time.perf_counter() - started)
    return Step(sorted(seconds)[timed // 2], most)


def work_intervals(run: Callable[[], object], device: torch.device, folder: Path) -> list[tuple[float, float]]:
    """When the device worked while ``run`` ran, in microseconds: kernels and copies, and on the CPU operators."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    trace = folder / "trace.json"
    profiled.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    work = _WORK[device.type]
    return [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in work and "dur" in event]


class Resumed(NamedTuple):
    """A run that was killed and resumed, against one that was not.

    Attributes:
        first_loss: of the run's first step.
        steps: that the resumed run logged.
        trained: how far training moved the weights, relative to them.
        apart: how far the two runs' weights lie from each other, likewise.
    """

    first_loss: float
    steps: list[int]
    trained: float
    apart: float


def killed_and_resumed(config: TrainConfig) -> Resumed:
    """Train twice; the second run is killed after its third step and goes on from the checkpoint of its second."""
    whole = config.model_copy(update={"output_dir": config.output_dir / "whole", "save_steps": 2})
    killed = whole.model_copy(update={"output_dir": config.output_dir / "killed"})
    run_training(whole)
    file = config.output_dir / "killed.json"
    file.write_text(killed.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "train", "--config", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr[-3000:]
    assert [path.name for path in find_checkpoints(killed.output_dir)] == ["step-00000002"]
    run_training(killed.model_copy(update={"resume": True}))
    rows = [json.loads(line) for line in (killed.output_dir / "metrics.jsonl").read_text().splitlines()]
    start = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).state_dict()
    ended = weights(whole.output_dir)
    begun = {name: start[name] for name in ended}
    return Resumed(
        first_loss=rows[0]["loss"],
        steps=[row["step"] for row in rows],
        trained=relative_distance(begun, ended),
        apart=relative_distance(ended, weights(killed.output_dir)),
    )

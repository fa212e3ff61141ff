"""A small online run for tests, and a driver that kills it at a chosen moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REWARDS = """
def vowels(prompt, completions):
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]
"""

# Counts what happens in a run and kills it, as the system would, before or after the event of a given number.
DRIVER = """
import os, signal, sys, threading
from pathlib import Path
kill_at, mode = int(sys.argv[1]), sys.argv[2]
count, lock = 0, threading.Lock()

def watched(function, name):
    def call(*args, **kwargs):
        global count
        with lock:
            count += 1
            mine = count
            if mine == kill_at and mode == "before":
                os.kill(os.getpid(), signal.SIGKILL)
        found = function(*args, **kwargs)
        if mine == kill_at and mode == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("EVENTS"):
            with open(os.environ["EVENTS"], "a") as file:
                file.write(name + "\\n")
        return found
    return call

from ncalign.core import atomic
from ncalign.generation.local import TransformersGenerator
from ncalign.online import online as online
from ncalign.rewards.function import FunctionReward
from ncalign.training import checkpoint, loop
from ncalign.training.engine import Engine
atomic.os.replace = watched(os.replace, "replace a file")
Path.rename = watched(Path.rename, "rename a folder")
checkpoint.save_file = watched(checkpoint.save_file, "write tensors")
loop.Loop.step = watched(loop.Loop.step, "optimizer step")
Engine.logprobs = watched(Engine.logprobs, "log-probs")
TransformersGenerator._sample = watched(TransformersGenerator._sample, "sampling")
FunctionReward.score = watched(FunctionReward.score, "scoring")
from ncalign.cli.app import main
sys.exit(main(["online", *sys.argv[3:]]))
"""


def write_inputs(folder: Path, *, prompts: int = 16) -> None:
    """Prompts, a reward and the driver."""
    rows = [{"id": str(i), "prompt": f"What is {i} times {i + 3}?"} for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "driver.py").write_text(DRIVER)


def settings(folder: Path, model: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Fields of a run of three rounds and six steps."""
    fields = {
        "model": str(model),
        "data": folder / "prompts.jsonl",
        "output_dir": folder / name,
        "reward": f"{folder / 'rewards.py'}:vowels",
        "num_samples": 3,
        "max_new_tokens": 6,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "eval_fraction": 0.2,
        "chunk_size": 3,
        "save_steps": 1,
        "drift_prompts": 2,
        "dtype": "float32",
        "scoring_dtype": "float32",
        "report_to": (),
    }
    return {**fields, **changes}


def launch(
    folder: Path, fields: dict[str, Any], *, kill_at: int = 0, mode: str = "before", events: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the driver in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"EVENTS": str(events)} if events else {})
    command = [sys.executable, "driver.py", str(kill_at), mode, *words_of(fields)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def words_of(fields: dict[str, Any]) -> list[str]:
    """The flags of a run."""
    return [word for name, value in fields.items() for word in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def outcome(run: Path) -> dict[str, Any]:
    """What a run came to, without times."""
    rounds: dict[str, Any] = {}
    for folder in sorted((run / "rounds").iterdir()):
        files = [folder] if folder.is_file() else sorted(folder.iterdir())
        for path in files:
            if path.name == "round.json":
                rounds[str(path.relative_to(run))] = {**json.loads(path.read_text()), "seconds": None}
            else:
                rounds[str(path.relative_to(run))] = path.read_bytes()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    volatile = ("tokens_per_second",)
    return {
        "model": (run / "model" / "model.safetensors").read_bytes(),
        "metrics": [{name: value for name, value in row.items() if name not in volatile} for row in metrics],
        **rounds,
    }

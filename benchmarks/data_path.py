"""Reading and encoding a set of UltraFeedback's size and lengths: rows per second, and memory above the tokenizer's.

The text is stretches of Python's manual: 60,000 conversations with four answers, whose lengths in words are log-normal like
those of UltraFeedback's prompts (median 60, mean 120) and answers (median 160, mean 210).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from pydoc_data import topics

from _steps import main_of, row

GROUPS, CANDIDATES = 60_000, 4
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one".split()
)


def write_groups(path: Path, *, number: int, seed: int = 0) -> None:
    """Groups of stretches of Python's own manual."""
    source = random.Random(seed)
    pool = " ".join(topics.topics.values()).split()

    def text(median: float, spread: float) -> str:
        length = min(max(int(source.lognormvariate(0, spread) * median), 3), 1500)
        start = source.randrange(len(pool) - length)
        return " ".join(pool[start : start + length])

    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            answers = [{"completion": text(160, 0.74), "reward": round(source.random(), 3)} for _ in range(CANDIDATES)]
            prompt = [{"role": "user", "content": text(60, 1.2)}]
            file.write(json.dumps({"id": str(index), "prompt": prompt, "candidates": answers}) + "\n")


def load(path: Path) -> dict[str, float]:
    """In a process of its own: read and encode as training does."""
    from transformers import AutoTokenizer

    from ncalign.demo.model import demo_model_folder
    from ncalign.model.encoding import Encoder
    from ncalign.objectives import NCA, build_method
    from ncalign.training.data import load_groups

    encoder = Encoder(AutoTokenizer.from_pretrained(demo_model_folder()))
    before, started, spent = proportional_mib(), time.monotonic(), os.times()
    seen, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            seen.append(proportional_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    loaded = load_groups(path, encoder, method=build_method(NCA()), on_bad_row="error")
    seconds = time.monotonic() - started
    seen.append(proportional_mib())
    done.set()
    return {
        "rows_per_second": loaded.num_read / seconds,
        "cpu_seconds": sum(after - earlier for after, earlier in zip(os.times()[:4], spent[:4], strict=True)),
        "mib": max(seen) - before,
        "tokens": encoder.report.tokens,
    }


def proportional_mib() -> float:
    """Memory of this process and its workers, shared pages counted once."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0.0
    for process in ("self", *children):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return total


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Write the set once, then read it in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "groups.jsonl"
        write_groups(path, number=GROUPS)
        found = []
        for turn in range(min(arguments.repeats, 2)):
            command = [sys.executable, __file__, "--load", str(path)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  {turn + 1} {found[-1]}", flush=True)
    said = f"{GROUPS} groups of {CANDIDATES} candidates, {found[0]['tokens'] / 1e6:.0f} M tokens, JSONL, SmolLM2's tokenizer"
    return [
        row(
            "Data path: groups read and encoded per second",
            [one["rows_per_second"] for one in found],
            goal=None,
            conditions=said,
        ),
        row("Data path: CPU seconds", [one["cpu_seconds"] for one in found], goal=None, conditions=said),
        row("Data path: peak memory above the tokenizer's, MiB", [one["mib"] for one in found], goal=1024, conditions=said),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load(Path(sys.argv[2]))))
        sys.exit(0)
    sys.exit(main_of(measure, __doc__ or ""))

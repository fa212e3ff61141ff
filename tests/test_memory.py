"""Memory that does not grow with the number of groups, measured on processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# A group takes about half a KiB in a file and some more in memory: 40 times as many would show.
FEW, MANY, ALLOWED_MIB = 5_000, 200_000, 24
WATCHED = """
import resource, sys
from ncalign.cli.app import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def write(path: Path, number: int) -> Path:
    with path.open("w") as file:
        for k in range(number):
            answers = [{"completion": f"answer {j} to {k}", "reward": (k * 7 + j * j) % 5} for j in range(4)]
            file.write(json.dumps({"id": f"group-{k}", "prompt": f"What is {k}?", "candidates": answers}) + "\n")
    return path


def peak_mib(words: list[str]) -> float:
    over = [] if words[0] == "check" else ["--overwrite"]
    done = subprocess.run([sys.executable, "-c", WATCHED, *words, *over], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stderr.split()[-1]) / 1024


def write_pairs(path: Path, number: int) -> Path:
    """Four pairs for each prompt, with those of all other prompts between them."""
    with path.open("w") as file:
        for k in range(number):
            prompt = f"What is {k % (number // 4)}?"
            file.write(
                json.dumps({"prompt": prompt, "chosen": f"answer {k} " * 8, "rejected": f"no answer to {k} " * 8}) + "\n"
            )
    return path


def test_many_rows_are_joined_in_no_more_memory_than_few(tmp_path: Path) -> None:
    few, many = (
        peak_mib(["convert", str(write_pairs(tmp_path / f"{number}.jsonl", number)), str(tmp_path / "out.jsonl")])
        for number in (FEW, MANY)
    )
    assert many - few < ALLOWED_MIB, (few, many)


@pytest.mark.parametrize("verb", ["convert", "convert to parquet", "check", "audit", "adjust", "score"])
def test_many_groups_take_no_more_than_few(verb: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    scorer = f"{tmp_path / 'rewards.py'}:length"
    (tmp_path / "rewards.py").write_text("def length(prompt, completions):\n    return [len(text) for text in completions]\n")

    def words(data: Path) -> list[str]:
        return {
            "convert": ["convert", str(data), str(tmp_path / "out.jsonl")],
            "convert to parquet": ["convert", str(data), str(tmp_path / "out.parquet")],
            "check": ["check", str(data), "--model", str(tiny_model_dir), "--max_length", "128"],
            "adjust": ["adjust", str(data), str(tmp_path / "out.jsonl"), "--steps", "quantile", "length", "zscore"],
            "score": ["score", "--data", str(data), "--output", str(tmp_path / "out.jsonl"), "--reward", scorer],
            "audit": ["audit", str(data), "--output_dir", str(tmp_path / "audit"), "--sample", "200"],
        }[verb]

    few = peak_mib(words(write(tmp_path / "few.jsonl", FEW)))
    many = peak_mib(words(write(tmp_path / "many.jsonl", MANY)))
    assert many - few < ALLOWED_MIB, (few, many)

"""Damaged files of every kind: our own errors with the file's name, right counts, no hang, no crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_readers.py")


def fuzz(seconds: int, seed: int) -> str:
    """Run it in a process of its own: what crashes a reader must not take the suite along."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-X", "faulthandler", str(SCRIPT), str(seconds), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds + 120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def test_a_few_seconds_of_damage() -> None:
    said = fuzz(8, 0)
    for kind in ("jsonl", "jsonl.gz", "json", "json.gz", "parquet", "arrow", "csv", "tsv"):
        for outcome in ("read", "skipped"):
            assert f"'{kind} {outcome}'" in said
    # A damaged line is left out; what is damaged as a whole is refused.
    for kind in ("jsonl.gz", "json", "json.gz", "parquet", "arrow"):
        assert f"'{kind} refused'" in said


@pytest.mark.slow
def test_ten_minutes_of_damage() -> None:
    print(fuzz(600, 20_261_125))

"""The benchmark that needs a GPU: its code runs at a tiny size on the CPU, and without a GPU it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so() -> None:
    done = run("gpu.py", "--repeats", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no GPU here")
    assert done.stdout == ""


@pytest.mark.slow
def test_all_of_its_sides_run_at_a_tiny_size(tmp_path: Path) -> None:
    done = run("gpu.py", "--tiny", "--repeats", "1", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    turns = [line.split() for line in done.stdout.splitlines() if line.startswith("  1/1")]
    assert [turn[1] for turn in turns] == ["trl", "trl_defaults", "ours", "mc_po"]
    # All begin at the reference: ln 2 for DPO and for MC-PO with one negative.
    assert {turn[-1] for turn in turns} == {"0.6931"}
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert len(rows) == 16
    assert all(row["value"] > 0 and row["goal"] is None for row in rows.values())
    quotient = rows["GPU, DPO: tokens/s"]["value"] / rows["GPU, TRL, matched: tokens/s"]["value"]
    assert rows["GPU, DPO: tokens/s over TRL, matched"]["value"] == pytest.approx(quotient, rel=1e-3)
    assert "no GPU" in rows["GPU, DPO: tokens/s"]["conditions"]


def test_rows_of_a_gpu_have_a_column_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from run_all import page

    rows = json.loads((FOLDER / "results.json").read_text())
    assert page(rows) == (FOLDER / "RESULTS.md").read_text()
    made = {"name": "GPU, DPO: tokens/s", "value": 1234.5, "goal": None, "holds": None, "spread": [1200.0, 1300.0]}
    made |= {"script": "gpu.py", "processor": "gpu", "conditions": "a card", "date": "a day", "commit": "abc", "note": ""}
    section = page([*rows, made]).partition("## gpu.py")[2]
    assert "| what | goal | gpu |" in section
    assert "| GPU, DPO: tokens/s | – | 1234 (1200 to 1300) |" in section


@pytest.mark.slow
def test_estimators_run_at_a_tiny_size(tmp_path: Path) -> None:
    done = run("estimators.py", "--tiny", "--repeats", "1", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    turns = [line for line in done.stdout.splitlines() if line.startswith("  1/1")]
    losses = [float(turn.rpartition(" ")[2]) for turn in turns]
    # DPO and NCA as ever; the whole loss of what is estimated: ln 8, 2 ln 2; an accepted pair begins as DPO.
    assert losses == pytest.approx([0.6931, 0.6931, 1.3863, 2.0794, 1.3863, 0.6931], abs=2e-4)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 12
    assert all(row["value"] > 0 and row["goal"] is None for row in rows)

"""A step of training on a device that is not the host's: nothing mixes the two, and the host waits for numbers once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


def run_script(name: str) -> dict[str, Any]:
    """What a script in a process of its own found, as JSON."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_step_waits_once_for_the_device_and_once_for_scores_to_draw_from() -> None:
    found = run_script("far_step.py")
    assert len(found) == 30
    for name, run in found.items():
        assert run["far"] == pytest.approx(run["near"], rel=1e-6), name
        ours = [wait for wait in run["waits"] if not wait.endswith("in transformers")]
        # For scores that a kernel reads (or what it saw in the last epoch), and for the gradient norm with all metrics.
        assert len(ours) == (2 if name.startswith("mc_po") else 1), (name, run["waits"])
        # Which asks itself, of padded rows alone, whether they hold several texts.
        assert len(run["waits"]) == len(ours) or " False False " in name, (name, run["waits"])


@pytest.mark.slow
def test_shared_prompts_are_compared_on_the_device_that_trains_with_its_own_attention() -> None:
    found = run_script("far_probe.py")
    right = found.pop("right")
    assert right["attention"] == "ncalign_shared"
    assert right["prompts_once"]
    assert right["said"] == []
    # One block and several, prompts and completions in a row and in one each.
    assert {device for device, _, _ in right["rows"]} == {"far"}
    lengths = {(queries <= 128, keys <= 128, queries == keys) for _, queries, keys in right["rows"]}
    assert lengths == {(True, True, True), (True, True, False), (False, False, True), (False, False, False)}
    expected = {
        "the next token is seen": r"log-probs differ by [\d.]+ nats in a row of 67 tokens on far",
        "completions see each other": r"log-probs differ by [\d.]+ nats in a row of 67 tokens on far",
        "partly visible blocks are wholly": r"log-probs differ by [\d.]+ nats in a row of 605 tokens on far",
        "a block is left out": r"log-probs differ by [\d.]+ nats in a row of 605 tokens on far",
        "half of a gradient": r"gradients differ by [\d.]+ % in a row of 67 tokens on far",
        "no numbers": r"log-probs differ by nan nats in a row of 67 tokens on far",
    }
    assert found.keys() == expected.keys()
    for name, wrong in found.items():
        assert wrong["devices"] == ["far"], name
        assert (wrong["attention"], wrong["prompts_once"]) == ("sdpa", False), name
        (notice,) = wrong["said"]
        assert re.fullmatch(f"note: each completion computes its prompt again, .*: {expected[name]}", notice), (name, notice)

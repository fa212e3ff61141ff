"""A step of training on a device that is not the host's: nothing mixes the two, and the host waits for numbers once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("far_step.py")


@pytest.mark.slow
def test_a_step_waits_once_for_the_device_and_once_for_scores_to_draw_from() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) == 9
    for name, run in found.items():
        assert run["far"] == pytest.approx(run["near"], rel=1e-6), name
        ours = [wait for wait in run["waits"] if not wait.endswith("in transformers")]
        # For the scores that a kernel reads, and for the gradient norm with all metrics.
        assert len(ours) == (2 if name.startswith("mc_po") else 1), (name, run["waits"])
        # Which asks itself, of padded rows alone, whether they hold several texts.
        assert len(run["waits"]) == len(ours) or name.endswith("False False"), (name, run["waits"])

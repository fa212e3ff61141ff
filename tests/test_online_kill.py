"""An online run that is killed, anywhere, goes on and ends bitwise as one that was not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from online_runs import launch, outcome, settings, write_inputs

NUM_KILLS = 36
KINDS = ("replace a file", "rename a folder", "write tensors", "optimizer step", "log-probs", "sampling", "scoring")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, list[str], dict[str, Any]]:
    """The folder of the inputs, the events of a run that nothing disturbs, and what it came to."""
    folder = tmp_path_factory.mktemp("online")
    write_inputs(folder)
    done = launch(folder, settings(folder, tiny_model_dir, "whole"), events=folder / "events.txt")
    assert done.returncode == 0, done.stderr
    return folder, (folder / "events.txt").read_text().splitlines(), outcome(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_KILLS))
def test_killed_anywhere_and_resumed_is_bitwise_the_same(
    number: int, whole: tuple[Path, list[str], dict[str, Any]], tiny_model_dir: Path
) -> None:
    folder, events, expected = whole
    chance = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    at = 1 + chance.choice([place for place, name in enumerate(events) if name == kind])
    fields = settings(folder, tiny_model_dir, f"killed-{number}")
    first = launch(folder, fields, kill_at=at, mode=chance.choice(["before", "after"]))
    assert first.returncode == -9, first.stderr
    # A second kill on the way, in what is left of the run.
    again = launch(folder, {**fields, "resume": True}, kill_at=chance.randint(1, max(2, len(events) - at)))
    assert again.returncode in (0, -9), again.stderr
    last = launch(folder, {**fields, "resume": True})
    assert last.returncode == 0, last.stderr
    assert outcome(fields["output_dir"]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora.r": 4, "reference": "ema", "dtype": "bfloat16", "scoring_dtype": "bfloat16"},
        {
            "reference": "last_round",
            "objective": "kto",
            "objective.threshold": 0.1,
            "regenerate_on_drift": 0.02,
            "drift_steps": 1,
        },
        {"objective": "nca", "on_model": "importance", "reference": "fixed", "learning_rate_over": "round"},
    ],
    ids=["ema of an adapter", "drift and a baseline", "importance weights"],
)
def test_killed_runs_of_other_kinds(changes: dict[str, Any], tmp_path: Path, tiny_model_dir: Path) -> None:
    write_inputs(tmp_path)
    name = "adapter_model.safetensors" if "lora.r" in changes else "model.safetensors"
    whole = settings(tmp_path, tiny_model_dir, "whole", **changes)
    done = launch(tmp_path, whole, events=tmp_path / "events.txt")
    assert done.returncode == 0, done.stderr
    events = (tmp_path / "events.txt").read_text().splitlines()
    steps = [place for place, event in enumerate(events) if event == "optimizer step"]
    for number, place in enumerate((steps[1], steps[3] + 1, steps[-1])):
        fields = settings(tmp_path, tiny_model_dir, f"killed-{number}", **changes)
        assert launch(tmp_path, fields, kill_at=place + 1, mode="after").returncode == -9
        last = launch(tmp_path, {**fields, "resume": True})
        assert last.returncode == 0, last.stderr
        first, second = (run["output_dir"] / "model" / name for run in (whole, fields))
        assert first.read_bytes() == second.read_bytes()

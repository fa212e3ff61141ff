"""The demo from end to end, on a tiny model: what it measures can't be good, but all of it must be there and add up."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncalign.demo import online_demo as rounds
from ncalign.demo.config import DemoConfig
from ncalign.demo.demo import OBJECTIVES, QUICK_GROUPS, run_demo, train_config
from ncalign.demo.online_demo import run_online_demo
from ncalign.online.config import OnlineConfig


def test_leaves_a_whole_run_folder(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "demo"
    results = run_demo(DemoConfig(model=str(tiny_model_dir), output_dir=folder, num_eval_prompts=128))
    assert json.loads((folder / "results.json").read_text())["p_value"] == results["p_value"]
    for name in ("metrics.jsonl", "config.yaml", "report.html", "model/adapter_model.safetensors", "candidates.jsonl"):
        assert (folder / name).is_file(), name
    assert results["num_eval_prompts"] == 128
    assert sum(task["prompts"] for task in results["by_task"].values()) == 128
    outcomes = {answer["outcome"].split(" (")[0]: answer["outcome"] for answer in results["answers"]}
    assert sum(int(re.search(r"\((\d+) of 128", outcome)[1]) for outcome in outcomes.values()) == 128
    assert all(
        answer["reward_after"] > answer["reward_before"] for answer in results["answers"] if "better" in answer["outcome"]
    )
    for row in results["comparison"].values():
        low, high = row["difference_interval"]
        assert low <= row["difference"] <= high
        assert row["difference"] == pytest.approx(row["after"] - row["before"], abs=1e-12)
    for share in ("solved", "format"):
        shares = [task["prompts"] * task[f"{share}_after"] for task in results["by_task"].values()]
        assert np.sum(shares) / 128 == pytest.approx(results["comparison"][f"{share}_share"]["after"], abs=1e-12)
    page = (folder / "report.html").read_text()
    assert all(html.escape(note, quote=False).split("'")[0] in page for note in results["notes"])
    # Of the 240 shipped groups, those in which rewards differ.
    assert results["training"]["data"]["groups_used"] == 102
    assert results["training"]["data"]["groups_left_out"] == {}


def test_the_quick_demo_is_smaller(tiny_model_dir: Path, tmp_path: Path) -> None:
    results = run_demo(DemoConfig(model=str(tiny_model_dir), output_dir=tmp_path / "demo", quick=True))
    assert results["num_eval_prompts"] == 128
    assert results["training"]["data"]["groups_used"] == QUICK_GROUPS
    assert results["training"]["steps"] == QUICK_GROUPS // 4


def test_a_run_that_is_no_demo_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: mine.jsonl\n")
    with pytest.raises(ValueError, match=r"config.yaml is there, and no record .* says that ncalign wrote it"):
        run_demo(DemoConfig(model="nowhere", output_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_online_and_offline_are_compared_at_the_same_steps(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "NUM_PROMPTS", 24)
    monkeypatch.setattr(rounds, "STEPS_PER_ROUND", 2)
    (tmp_path / "rewards.py").write_text(
        "def vowels(p, completions):\n    return [sum(map(c.count, 'aeiou')) for c in completions]\n"
    )
    plain = rounds.arm_config

    def small(*arguments: Any) -> OnlineConfig:
        # A model that knows nothing solves no task: nothing of the verifiers' would differ.
        changes = {"reward": (f"{tmp_path / 'rewards.py'}:vowels",), "max_new_tokens": 6, "num_samples": 3, "dtype": "float32"}
        return OnlineConfig.model_validate(plain(*arguments).model_dump() | changes)

    monkeypatch.setattr(rounds, "arm_config", small)
    config = DemoConfig(model=str(tiny_model_dir), output_dir=tmp_path / "demo", num_eval_prompts=128, online=True)
    found = run_online_demo(config)
    assert json.loads((tmp_path / "demo" / rounds.RESULTS).read_text())["comparison"] == found["comparison"]
    arms = found["arms"]
    assert [arms[arm]["steps"] for arm in ("offline", "online")] == [6, 6]
    assert [len(arms[arm]["drift"]) for arm in ("offline", "online")] == [1, 3]
    # Before training both arms are the same model.
    assert found["comparison"]["offline"]["before"] == found["comparison"]["online"]["before"]
    difference = found["comparison"]["online against offline"]["difference"]
    assert difference == pytest.approx(found["comparison"]["online"]["after"] - found["comparison"]["offline"]["after"])
    assert "online - offline" in found["text"]
    # Finished arms are not run again.
    monkeypatch.setattr("ncalign.online.online.make_pool", lambda *arguments: 1 / 0)
    assert run_online_demo(config)["comparison"] == found["comparison"]


@pytest.mark.slow
def test_the_real_model_gets_better(tmp_path: Path) -> None:
    """What `make demo` promises; ten minutes on two cores, and the model's package comes from the network."""
    found = run_demo(DemoConfig(output_dir=tmp_path / "demo"))["comparison"]
    for share in ("solved_share", "format_share"):
        assert found[share]["difference"] > 0.15
        assert found[share]["p_value"] < 0.001


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_on_the_same_data(name: str) -> None:
    config = train_config(DemoConfig.model_validate({"objective": name}), "model", Path("candidates.jsonl"))
    assert config.objective.name == name
    assert config.data == Path("candidates.jsonl")

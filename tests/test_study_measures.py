"""What a study measures of a run, against log-probs computed plainly and answers scored by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import build_model, group_row
from ncalign.data.groups import Group, read_groups
from ncalign.rewards.config import RewardConfig
from ncalign.study.config import Evaluation, TaskSuite
from ncalign.study.measure import Plan, measure_run
from ncalign.training.config import TrainConfig

REWARDS = "def letters(prompt, completions):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> TrainConfig:
    """What a run would have left, whose model is another than the one that it started from."""
    rows = [group_row(0, [0.1, 1.0, 0.4]), group_row(1, [1.0, 1.0]), group_row(2, [None, 0.5]), group_row(3, [0.0, 2.0])]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    folder = tmp_path / "run" / "model"
    build_model(tiny_tokenizer, seed=1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (tmp_path / "run" / "results.json").write_text(json.dumps({"dtype": "float32", "data": {"tokens_generated": 12}}))
    speeds = [{"step": step, "loss": 1.0, "tokens_per_second": speed} for step, speed in ((1, 1.0), (2, 50.0), (3, 70.0))]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in speeds))
    return TrainConfig(
        model=str(tiny_model_dir), data=tmp_path / "held-out.jsonl", output_dir=tmp_path / "run", dtype="float32"
    )


def log_ratios(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, group: Group) -> list[float]:
    """Of each completion with its end token, by two plain forward passes."""
    found = []
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (config.output_dir / "model", config.model)]
    assert isinstance(group.prompt, list)
    asked = tokenizer.apply_chat_template(group.prompt, tokenize=False, add_generation_prompt=True)
    for candidate in group.candidates:
        text = candidate.completion if isinstance(candidate.completion, str) else candidate.completion[0]["content"]
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{asked}{text}<|im_end|>", add_special_tokens=False)["input_ids"]
        assert ids[: len(prompt)] == prompt
        scores = []
        for model in models:
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logprobs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        found.append(scores[0] - scores[1])
    return found


def test_likelihoods_are_those_of_plain_passes(run: TrainConfig, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = measure_run(run, Plan(run.data, ("chosen_change", "rejected_change", "reward_accuracy"))).values
    groups = {group.id: group for group in read_groups(run.data)}
    # One scored candidate makes no group, and two of one reward no order.
    assert set(found["chosen_change"]) == {"g0", "g1", "g3"}
    assert set(found["rejected_change"]) == set(found["reward_accuracy"]) == {"g0", "g3"}
    first, _, third = (np.array(log_ratios(run, tiny_tokenizer, groups[name])) for name in ("g0", "g1", "g3"))
    assert found["chosen_change"]["g0"] == pytest.approx(first[1], abs=1e-3)
    assert found["rejected_change"]["g0"] == pytest.approx((first[0] + first[2]) / 2, abs=1e-3)
    # Rewards .1, 1 and .4: three pairs.
    right = (first[1] > first[0], first[1] > first[2], first[2] > first[0])
    assert found["reward_accuracy"]["g0"] == pytest.approx(np.mean(right))
    assert found["chosen_change"]["g3"] == pytest.approx(third[1], abs=1e-3)


def test_answers_are_scored_and_compared_with_the_starting_model(run: TrainConfig, tmp_path: Path) -> None:
    rewards = RewardConfig(reward=(f"{tmp_path / 'rewards.py'}:letters",))
    evaluation = Evaluation(rewards=rewards, max_new_tokens=5, num_samples=3, solved_at=1.0, empty_reward=-1.0)
    measures = ("reward", "sampled_reward", "solved", "kl", "length")
    plan = Plan(run.data, measures, evaluation)
    measured = measure_run(run, plan)
    found = measured.values
    assert all(set(found[name]) == {"g0", "g1", "g2", "g3"} for name in ("reward", "sampled_reward", "solved", "length"))
    # A reward is the number of the answer's letters, and an empty answer's is -1.
    assert {name: float(len(text)) or -1.0 for name, text in measured.answers.items()} == found["reward"]
    for name, reward in found["reward"].items():
        assert reward == -1.0 or reward == int(reward) >= 1
        assert found["solved"][name] == float(reward >= 1.0)
    assert all(1 <= length <= 5 for length in found["length"].values())
    # Other weights answer otherwise; the same ones are no distance from themselves.
    assert max(abs(value) for value in found["kl"].values()) > 0.1
    same = run.model_copy(update={"model": str(run.output_dir / "model")})
    again = measure_run(same, plan).values
    assert again["kl"] == pytest.approx(dict.fromkeys(again["kl"], 0.0), abs=1e-4)
    assert {name: again[name] for name in measures if name != "kl"} == {name: found[name] for name in measures if name != "kl"}


def test_no_log_probs_are_computed_that_no_measure_needs(
    run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncalign.study.measure.completion_logprobs", None)
    rewards = RewardConfig(reward=(f"{tmp_path / 'rewards.py'}:letters",))
    plan = Plan(run.data, ("sampled_reward", "length"), Evaluation(rewards=rewards, max_new_tokens=5))
    assert measure_run(run, plan).values["sampled_reward"]
    with pytest.raises(TypeError):
        measure_run(run, replace(plan, measures=("kl",)))


def test_speed_leaves_the_first_step_out(run: TrainConfig) -> None:
    plan = Plan(run.data, ("tokens_per_second", "tokens_generated"))
    assert measure_run(run, plan).values == {"tokens_per_second": {"": 60.0}, "tokens_generated": {"": 12.0}}
    # The starting model has no run.
    assert measure_run(run, plan, trained=False).values == {"tokens_per_second": {}, "tokens_generated": {}}


def test_drift_is_the_mean_of_the_rounds_that_measured_it(run: TrainConfig) -> None:
    results = run.output_dir / "results.json"
    rounds = [{"drift": {"kl": 0.1}}, {"drift": None}, {"drift": {"kl": 0.3}}]
    results.write_text(json.dumps(json.loads(results.read_text()) | {"rounds": rounds}))
    assert measure_run(run, Plan(run.data, ("drift",))).values == {"drift": {"": pytest.approx(0.2)}}
    results.write_text(json.dumps(json.loads(results.read_text()) | {"rounds": rounds[1:2]}))
    assert measure_run(run, Plan(run.data, ("drift",))).values == {"drift": {}}


def test_tasks_are_asked_of_the_model(run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...], dict[str, Any]]] = []
    failed: dict[str, str] = {}

    def run_tasks(model: str, tasks: tuple[str, ...], **settings: Any) -> dict[str, Any]:
        asked.append((model, tasks, settings))
        return {"results": {"svamp": {"score": 0.25}}, "failed": dict(failed)}

    monkeypatch.setattr("ncalign.study.measure.run_tasks", run_tasks)
    suite = TaskSuite(names=("svamp", "gsm8k"), data=("svamp=S.json",), limit=3)
    plan = Plan(run.data, ("task_score",), tasks=suite, tasks_folder=tmp_path / "tasks")
    assert measure_run(run, plan).values == {"task_score": {"svamp": 0.25}}
    measure_run(run, plan, trained=False)
    assert [model for model, _, _ in asked] == [str(run.output_dir / "model"), run.model]
    _, names, settings = asked[0]
    assert names == ("svamp", "gsm8k")
    assert settings["task_data"] == {"svamp": "S.json"}
    assert settings["output_dir"] == tmp_path / "tasks"
    assert settings["protocol"].limit == 3
    failed["gsm8k"] = "no network"
    with pytest.raises(ValueError, match="task gsm8k failed: no network"):
        measure_run(run, plan)
    with pytest.raises(ValueError, match="'math' must be TASK=FILE, with one of the tasks svamp"):
        TaskSuite(names=("svamp",), data=("math",))

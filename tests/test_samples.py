"""Samples while training, the best evaluation and early stopping: what a run keeps of them, and what they leave alone."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import weights
from ncalign.generation.base import SamplingParams
from ncalign.generation.local import TransformersGenerator, load_for_generation
from ncalign.online.config import OnlineConfig
from ncalign.training import trackers
from ncalign.training.best import Best
from ncalign.training.checkpoint import checkpoint_folder, find_checkpoints
from ncalign.training.config import TrainConfig
from ncalign.training.trackers import samples_to_trackers, start_trackers
from ncalign.training.train import run_training

Config = Callable[..., TrainConfig]


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> Config:
    """Eight steps of the tiny model, evaluated and sampled every second one."""

    def make(name: str = "run", **fields: Any) -> TrainConfig:
        values = {
            "model": str(tiny_model_dir),
            "data": groups_file,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
            "eval_fraction": 0.3,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "eval_steps": 2,
            "dtype": "float32",
            "scoring_dtype": "float32",
            "report_to": (),
        }
        return TrainConfig.model_validate(values | fields)

    return make


def lines(run: TrainConfig, name: str) -> list[dict[str, Any]]:
    """The rows of a run's file, without what depends on the clock."""
    rows = [json.loads(line) for line in (run.output_dir / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def same(first: TrainConfig, second: TrainConfig) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    one, other = weights(first.output_dir), weights(second.output_dir)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def killed_after(run: TrainConfig, step: int) -> None:
    """Take a finished run back to the checkpoint of a step, as a kill some steps later would have left it."""
    (run.output_dir / "results.json").unlink()
    shutil.rmtree(run.output_dir / "model")
    for folder in find_checkpoints(run.output_dir):
        if folder > checkpoint_folder(run.output_dir, step):
            shutil.rmtree(folder)


class TestSamples:
    """`samples.jsonl` holds what the policy answers, and the run is the same with it and without."""

    @pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.1}], ids=["all weights", "adapter with dropout"])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_leave_the_run_as_it_is_also_when_it_is_resumed(
        self, config: Config, temperature: float, lora: dict[str, Any] | None
    ) -> None:
        fields = {"lora": lora, "save_steps": 3, "save_total_limit": 9}
        plain = config("plain", **fields)
        run = config("sampled", sample_steps=2, sample_temperature=temperature, sample_max_new_tokens=8, **fields)
        run_training(plain)
        run_training(run)
        assert same(plain, run)
        assert lines(plain, "metrics.jsonl") == lines(run, "metrics.jsonl")
        whole, metrics = lines(run, "samples.jsonl"), lines(run, "metrics.jsonl")
        assert [row["step"] for row in whole] == [step for step in (0, 2, 4, 6, 8) for _ in range(4)]
        for step in (3, 6):
            killed_after(run, step)
            run_training(run.model_copy(update={"resume": True}))
            assert same(plain, run)
            assert (lines(run, "samples.jsonl"), lines(run, "metrics.jsonl")) == (whole, metrics)

    def test_are_greedy_answers_of_the_model_at_that_step_to_held_out_prompts(
        self, config: Config, tiny_model_dir: Path, groups_file: Path
    ) -> None:
        run = config(sample_steps=8, num_sample_prompts=3, sample_max_new_tokens=6)
        run_training(run)
        rows = lines(run, "samples.jsonl")
        prompts = [row["prompt"] for row in rows[:3]]
        asked = {row["id"]: row["prompt"] for row in map(json.loads, groups_file.read_text().splitlines())}
        assert [asked[row["id"]] for row in rows] == [*prompts, *prompts]
        for step, folder in ((0, tiny_model_dir), (8, run.output_dir / "model")):
            model, tokenizer = load_for_generation(str(folder), dtype="float32", trust_remote_code=False)
            generator = TransformersGenerator(model, tokenizer, progress=False)
            for row, (answer,) in zip(
                [row for row in rows if row["step"] == step],
                generator.generate(prompts, num_samples=1, params=SamplingParams(6, 0.0), seed=0),
                strict=True,
            ):
                assert (row["completion"], row["tokens"], row["finished"]) == (answer.text, answer.num_tokens, answer.finished)
                assert row["logprob"] == pytest.approx(answer.logprob, abs=1e-4)

    def test_prompts_too_long_for_the_model_are_left_out_with_a_note(
        self, config: Config, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_training(config(sample_steps=4, sample_max_new_tokens=500, max_steps=1, max_length=128))
        assert "note: sample_steps: 4 prompts can't be answered and are left out:" in capsys.readouterr().err
        assert lines(config(), "samples.jsonl") == []


class TestBest:
    """The best evaluation by a metric."""

    def test_the_improvement_that_counts(self) -> None:
        best = Best("eval_rewards/margins", patience=2, threshold=0.1)
        rows = [{"step": step, "eval/rewards/margins": value} for step, value in enumerate([0.0, 0.05, math.nan, 0.2, 0.1], 1)]
        assert [best.observe(row) for row in rows] == [True, True, False, True, False]
        # .05 is better, by less than the threshold; what is no number is no improvement.
        assert (best.step, best.value, best.waited, best.exhausted) == (4, 0.2, 1, False)
        again = Best("rewards/margins", patience=1)
        again.restore(best.state())
        assert (again.step, again.value, again.exhausted, again.last) == (4, 0.2, True, rows[-1])

    def test_an_unknown_metric_is_told_before_the_first_step(self, config: Config) -> None:
        with pytest.raises(ValueError, match=r"no evaluation has 'accuracy'; they have .*loss, .*rewards/margins"):
            run_training(config(metric_for_best_model="accuracy"))

    def test_its_model_is_saved(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        # So large a rate that margins rise and then fall.
        fields = {"learning_rate": 3e-2, "metric_for_best_model": "logps/chosen", "save_total_limit": 1, "save_steps": 3}
        run, plain = config("best", load_best_model_at_end=True, **fields), config("last", **fields)
        results, last = run_training(run), run_training(plain)
        evaluated = {row["step"]: row for row in lines(run, "metrics.jsonl") if "eval/loss" in row}
        step = max((s for s in evaluated if s), key=lambda s: evaluated[s]["eval/logps/chosen"])
        assert 0 < step < 8
        assert results["best"] == {"step": step, "metric": "eval/logps/chosen", "value": evaluated[step]["eval/logps/chosen"]}
        assert last["best"] == results["best"]
        assert {**results["after"]} == evaluated[step]
        assert last["after"] == evaluated[8]
        assert f"The model is that of step {step}, the best by eval/logps/chosen" in capsys.readouterr().err
        # A run of as many steps with the same schedule is that model.
        kept = [folder.name for folder in find_checkpoints(run.output_dir)]
        assert kept == [f"step-{number:08d}" for number in sorted({step, 8})]
        assert not same(run, plain)
        killed_after(run, 8)
        before = weights_of_checkpoint(run, step)
        again = run_training(run.model_copy(update={"resume": True}))
        assert again["after"] == results["after"]
        assert all(torch.equal(weights(run.output_dir)[name.removeprefix("model.")], found) for name, found in before.items())

    def test_a_best_checkpoint_that_is_gone_is_told(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        run = config(load_best_model_at_end=True, save_steps=1, save_total_limit=9)
        run_training(run)
        killed_after(run, 3)
        shutil.rmtree(checkpoint_folder(run.output_dir, 2))
        results = run_training(run.model_copy(update={"resume": True}))
        assert "step-00000002, the best evaluation's, is gone" in capsys.readouterr().err
        assert results["best"]["step"] > 3


def weights_of_checkpoint(run: TrainConfig, step: int) -> dict[str, torch.Tensor]:
    """What was trained, at a checkpoint."""
    from safetensors.torch import load_file

    return load_file(checkpoint_folder(run.output_dir, step) / "model.safetensors")


class TestEarlyStopping:
    """Training ends where evaluations no longer improve."""

    FIELDS: dict[str, Any] = {"early_stopping_patience": 2, "early_stopping_threshold": 1e9, "max_steps": 20}  # noqa: RUF012

    def test_after_so_many_evaluations_without_improvement(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        run = config(sample_steps=4, sample_max_new_tokens=4, **self.FIELDS)
        results = run_training(run)
        # The first counts as an improvement; the second and third are none.
        assert (results["steps"], results["stopped_early"]) == (6, True)
        assert "Stopped after step 6 of 20: no better eval/loss in 2 evaluations" in capsys.readouterr().err
        rows = lines(run, "metrics.jsonl")
        assert results["after"] == rows[-1]
        assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 4, 6]
        assert sorted({row["step"] for row in lines(run, "samples.jsonl")}) == [0, 4, 6]

    @pytest.mark.parametrize("step", [3, 6])
    def test_a_resumed_run_stops_where_it_would_have(self, config: Config, step: int) -> None:
        fields = {"save_steps": 3, "save_total_limit": 9, "sample_steps": 4, "sample_max_new_tokens": 4, **self.FIELDS}
        whole, run = config("whole", **fields), config(**fields)
        first = run_training(whole)
        run_training(run)
        killed_after(run, step)
        again = run_training(run.model_copy(update={"resume": True}))
        assert (again["steps"], again["after"], again["best"]) == (6, first["after"], first["best"])
        assert same(whole, run)
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert lines(run, name) == lines(whole, name)


class TestRefused:
    """Settings that nothing can come of."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"sample_steps": 2, "eval_fraction": 0.0}, "sample_steps needs groups that are held out"),
            ({"load_best_model_at_end": True, "eval_fraction": 0.0}, "load_best_model_at_end needs groups that are held out"),
            ({"early_stopping_patience": 2, "eval_steps": 0}, "early_stopping_patience needs evaluations while training"),
            ({"sample_steps": 2, "metric_for_best_model": "loss", "eval_steps": 0}, "metric_for_best_model needs evaluations"),
        ],
    )
    def test_are_told(self, config: Config, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            config(**fields)

    def test_online_does_without(self, config: Config) -> None:
        run = config()
        values = {name: getattr(run, name) for name in ("model", "data", "output_dir", "eval_fraction")}
        values["reward"] = ("rewards.py:score",)
        with pytest.raises(ValidationError, match="sample_steps is of train, and online does without"):
            OnlineConfig.model_validate({**values, "sample_steps": 2})


class Fake:
    """A tracker at accelerate's edge: it notes what it is given."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, list[tuple[Any, ...]]()

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """As W&B's and ClearML's."""
        self.calls.append((args, kwargs))

    def log(self, values: dict[str, Any], step: int) -> None:
        """As every tracker's."""
        self.calls.append((values, step))


ROW = {"step": 4, "id": "g1", "prompt": [{"role": "user", "content": "Hi"}], "completion": "<b>|x|</b>\n*y*", "tokens": 3}
ROW |= {"finished": True, "logprob": -1.0}


class TestTrackers:
    """What reaches accelerate's trackers."""

    def test_tables(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        trackio: Any = ModuleType("trackio")
        trackio.Table = lambda dataframe: dataframe
        pandas: Any = ModuleType("pandas")
        pandas.DataFrame = lambda rows, columns: [dict(zip(columns, row, strict=True)) for row in rows]
        monkeypatch.setitem(sys.modules, "trackio", trackio)
        monkeypatch.setitem(sys.modules, "pandas", pandas)
        fakes = [Fake(name) for name in ("wandb", "trackio", "mlflow")]
        accelerator: Any = SimpleNamespace(trackers=fakes)
        samples_to_trackers(config(), accelerator, 4, [ROW])
        columns = ["id", "prompt", "completion", "tokens", "finished"]
        row = ["g1", "User: Hi", "<b>|x|</b>\n*y*", 3, True]
        assert fakes[0].calls == [(("samples",), {"columns": columns, "data": [row], "step": 4})]
        assert fakes[1].calls == [({"samples": [dict(zip(columns, row, strict=True))]}, 4)]
        assert fakes[2].calls == []

    def test_one_that_fails_is_told(self, config: Config) -> None:
        def fail(*_args: Any, **_kwargs: Any) -> None:
            raise KeyError("no network")

        accelerator: Any = SimpleNamespace(trackers=[SimpleNamespace(name="wandb", log_table=fail)])
        with pytest.raises(ValueError, match=r"step 4: a tracker of report_to \(wandb\) failed: .*no network"):
            samples_to_trackers(config(report_to=("wandb",)), accelerator, 4, [ROW])

    def test_project_and_name(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, Any] = {}

        def init(project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
            given.update(project=project, config=config, **init_kwargs)

        accelerator: Any = SimpleNamespace(log_with=["wandb"], init_trackers=init, is_main_process=True, logging_dir=".")
        for fields, project, name in (({}, "ncalign", "run"), ({"project": "maths", "run_name": "third"}, "maths", "third")):
            run = config(report_to=("wandb",), **fields)
            start_trackers(run, run.model_dump(mode="json"), accelerator, 0)
            assert (given["project"], given["wandb"], given["trackio"]) == (project, {"name": name}, {"name": name})
            assert given["config"]["learning_rate"] == 1e-3

    def test_tensorboard_has_the_texts_in_the_run_folder(self, config: Config) -> None:
        run = config(sample_steps=8, report_to=("tensorboard",), num_sample_prompts=2, sample_max_new_tokens=4, project="other")
        run_training(run)
        assert not (run.output_dir / "other").exists()
        events = EventAccumulator(str(run.output_dir / "tensorboard"), size_guidance={"tensors": 0}).Reload()
        found = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
        assert len(found) == 2
        assert found[0].count("\n") == 3
        assert "What is" in found[0]

    def test_texts_are_no_markup(self) -> None:
        assert trackers._cell("<b>|x|</b>\n*y*") == "&#60;b&#62;&#124;x&#124;&#60;/b&#62;<br>&#42;y&#42;"


def test_a_run_that_watches_nothing_says_nothing_of_a_best(config: Config) -> None:
    assert "best" not in run_training(config(max_steps=1))

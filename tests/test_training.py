"""Training on a tiny model: known first losses, equivalences between ways to run a step, and what a run leaves behind."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ncalign
from conftest import group_row, relative_distance, weights
from ncalign.cli.verbs import VERBS
from ncalign.generation.config import ServerConfig
from ncalign.judging.config import EvalJudgeConfig
from ncalign.model.config import EncodingConfig, LoRA
from ncalign.model.reference import reference_folder
from ncalign.objectives import ObjectiveConfig
from ncalign.rewards.config import JudgeConfig
from ncalign.training import loading
from ncalign.training.checkpoint import find_checkpoints
from ncalign.training.config import TrainConfig
from ncalign.training.plan import dry_run
from ncalign.training.train import run_training

Config = Callable[..., TrainConfig]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mc_po": {"name": "mc_po"},
    "mc_po of two": {"name": "mc_po", "num_negatives": 2, "replacement": True},
    "mc_po of last visits": {"name": "mc_po", "proposals": "last_visit", "acceptance": True},
    "mc_po with the positive": {"name": "mc_po", "include_positive": True},
    "rnce": {"name": "rnce"},
    "info_nca": {"name": "info_nca"},
    "nca": {"name": "nca"},
    "nca of two": {"name": "nca", "estimator": {"candidates": 2}},
    "nca of two unscored": {"name": "nca", "estimator": {"candidates": 2, "proposals": "last_visit"}},
    "nca_pair": {"name": "nca_pair"},
    "dpo": {"name": "dpo"},
    "dpo of each": {"name": "dpo", "pairing": "best_vs_each"},
    "dpo of all pairs": {"name": "dpo", "pairing": "all_pairs"},
}
MIX: dict[str, Any] = {"name": "mix", "parts": ["mc_po", "nca", "nll"], "weights": [1.0, 0.5, 0.1]}


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> Config:
    """A configuration of the tiny model on twelve groups, in the test's folder."""

    def make(name: str = "run", **fields: Any) -> TrainConfig:
        values = {
            "model": str(tiny_model_dir),
            "data": groups_file,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 4,
            "dtype": "float32",
            "report_to": (),
        } | fields
        return TrainConfig.model_validate({"scoring_dtype": values["dtype"]} | values)

    return make


def logged(config: TrainConfig) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]


class TestFirstLoss:
    """With policy = reference the loss is known, whatever the data."""

    # The twelve groups hold 2, 3 and 4 candidates in turn, with distinct rewards.
    EXPECTED: ClassVar[dict[str, float]] = {
        "mc_po": math.log(2),
        "mc_po of two": math.log(3),
        "mc_po of last visits": math.log(2),
        "rnce": (math.log(2) + math.log(3) + math.log(4)) / 3,
        "info_nca": (math.log(2) + math.log(3) + math.log(4)) / 3,
        "nca": 2 * math.log(2),
        "nca of two": 2 * math.log(2),
        "nca_pair": 2 * math.log(2),
        "dpo": math.log(2),
        "dpo of each": math.log(2),
        "dpo of all pairs": math.log(2),
    }

    @pytest.mark.parametrize("name", EXPECTED)
    def test_is_the_known_one(self, config: Config, name: str) -> None:
        run = config(objective=OBJECTIVES[name], max_steps=1, per_device_train_batch_size=12)
        run_training(run)
        assert logged(run)[0]["loss"] == pytest.approx(self.EXPECTED[name], abs=1e-5)

    def test_in_bfloat16_with_the_reference_in_the_same_precision(self, config: Config) -> None:
        for lora in (None, {"r": 4}):
            run = config(f"lora {lora}", dtype="bfloat16", lora=lora, max_steps=1, per_device_train_batch_size=12)
            run_training(run)
            assert logged(run)[0]["loss"] == pytest.approx(math.log(2), abs=2e-2)


class TestEquivalences:
    """How a step is split over passes and processes changes nothing but rounding."""

    SPLITS = ((8, 1), (4, 2), (2, 4), (1, 8))

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("name", ["mc_po", "nca", "nca of two", "dpo of each", "mix"])
    def test_gradient_accumulation(self, config: Config, name: str, dtype: str) -> None:
        # In float32 a sum of some 25 token log-probs carries rounding of about 1e-5 nats, which the loss shows.
        tolerance = {"float32": 1e-5, "float64": 1e-9}[dtype]
        runs = []
        for size, accumulation in self.SPLITS:
            run = config(
                f"{size}x{accumulation}",
                dtype=dtype,
                objective=MIX if name == "mix" else OBJECTIVES[name],
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=3,
            )
            run_training(run)
            runs.append(run)
        first = logged(runs[0])
        for run in runs[1:]:
            assert relative_distance(weights(runs[0].output_dir), weights(run.output_dir)) <= 1e-6
            for expected, found in zip(first, logged(run), strict=True):
                assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
                assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)

    def test_token_budget(self, config: Config) -> None:
        whole, split = config("whole"), config("split", max_tokens_per_batch=1)
        run_training(whole)
        run_training(split)
        assert relative_distance(weights(whole.output_dir), weights(split.output_dir)) <= 1e-6

    def test_activation_checkpointing(self, config: Config) -> None:
        plain, recomputed = config("plain"), config("recomputed", activation_checkpointing=True)
        run_training(plain)
        run_training(recomputed)
        assert relative_distance(weights(plain.output_dir), weights(recomputed.output_dir)) <= 1e-6

    def test_activation_checkpointing_with_an_adapter(self, config: Config) -> None:
        plain = config("plain", lora={"r": 4})
        recomputed = config("recomputed", lora={"r": 4}, activation_checkpointing=True)
        run_training(plain)
        run_training(recomputed)
        assert relative_distance(weights(plain.output_dir), weights(recomputed.output_dir)) <= 1e-6

    @pytest.mark.parametrize("name", ["mc_po", "mc_po of last visits", "nca of two", "nca of two unscored"])
    def test_two_processes(self, config: Config, start: Callable[..., Any], name: str) -> None:
        fields = {"num_train_epochs": 4, "eval_fraction": 0.3, "dtype": "float64", "objective": OBJECTIVES[name]}
        if name != "mc_po":
            # Far enough from the reference that draws depend on what was seen, by either process.
            fields["learning_rate"] = 3e-3
        alone = config("alone", per_device_train_batch_size=8, **fields)
        run_training(alone)
        # Twelve groups less the held-out ones make an odd last step, in which one process has fewer groups than the other.
        together = config("together", per_device_train_batch_size=4, **fields)
        done = start(together, processes=2)
        assert done.wait() == 0, done.errors()
        assert relative_distance(weights(alone.output_dir), weights(together.output_dir)) <= 1e-6
        for expected, found in zip(logged(alone), logged(together), strict=True):
            assert found.keys() == expected.keys()
            for name in {"loss", "eval/loss", "kernel/score_age", "kernel/entropy"} & found.keys():
                assert found[name] == pytest.approx(expected[name], rel=1e-9)


class TestCheckpoints:
    """A run that was killed ends as if it had not been."""

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"lora": {"r": 4, "dropout": 0.1}},
            {"objective": OBJECTIVES["nca of two"]},
            {"objective": {"name": "nca", "estimator": {"candidates": "auto"}}, "lora": {"r": 4, "dropout": 0.1}},
        ],
        ids=["all weights", "adapter with dropout", "estimator", "estimator that chooses, with dropout"],
    )
    def test_killed_and_resumed_is_bitwise_the_same(
        self, config: Config, start: Callable[..., Any], fields: dict[str, Any]
    ) -> None:
        settings = {"num_train_epochs": 4, "save_steps": 2, "eval_fraction": 0.2, "objective": OBJECTIVES["mc_po"], **fields}
        whole, killed = config("whole", **settings), config("killed", **settings)
        run_training(whole)
        done = start(killed, kill_after_step=5)
        assert done.wait() == -9
        assert not (killed.output_dir / "model").exists()
        assert [folder.name for folder in find_checkpoints(killed.output_dir)] == ["step-00000002", "step-00000004"]
        again = start(killed.model_copy(update={"resume": True}))
        assert again.wait() == 0, again.errors()
        first, second = weights(whole.output_dir), weights(killed.output_dir)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        volatile = {"tokens_per_second"}
        rows = [[{k: v for k, v in row.items() if k not in volatile} for row in logged(run)] for run in (whole, killed)]
        assert rows[0] == rows[1]

    def test_only_the_last_are_kept(self, config: Config) -> None:
        run = config(save_steps=1, save_total_limit=3, num_train_epochs=2)
        run_training(run)
        assert [folder.name for folder in find_checkpoints(run.output_dir)] == [f"step-{n:08d}" for n in (4, 5, 6)]

    def test_hold_no_pickles_and_no_frozen_weights(self, config: Config) -> None:
        run = config(save_steps=3, lora={"r": 4})
        run_training(run)
        (folder,) = find_checkpoints(run.output_dir)
        assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", *[".safetensors"] * 3]
        assert all("lora_" in name for name in load_file(folder / "model.safetensors"))

    def test_changed_configuration_is_refused_with_the_difference(self, config: Config) -> None:
        run_training(config(save_steps=1))
        with pytest.raises(ValueError, match=r"learning_rate: 0.0001 -> 0.5"):
            run_training(config(save_steps=1, resume=True, learning_rate=0.5))

    def test_an_earlier_run_is_neither_mixed_nor_lost(self, config: Config) -> None:
        run = config(max_steps=1)
        run_training(run)
        before = (run.output_dir / "results.json").read_text()
        with pytest.raises(ValueError, match=r"`ncalign train` wrote .results.json.*--overwrite replaces it"):
            run_training(config(max_steps=2))
        assert (run.output_dir / "results.json").read_text() == before
        assert run_training(config(max_steps=2, overwrite=True))["steps"] == 2

    @pytest.mark.parametrize("save_steps", [0, 3])
    def test_resume_of_a_finished_run_changes_nothing(self, config: Config, save_steps: int) -> None:
        run = config(save_steps=save_steps, eval_fraction=0.3)
        results = run_training(run)
        before = {path: path.read_bytes() for path in run.output_dir.rglob("*") if path.is_file()}
        assert run_training(config(save_steps=save_steps, eval_fraction=0.3, resume=True)) == json.loads(json.dumps(results))
        assert {path: path.read_bytes() for path in run.output_dir.rglob("*") if path.is_file()} == before

    def unfinished(self, run: TrainConfig) -> None:
        """Take a finished run back to its first checkpoint, as a kill would have left it."""
        for name in ("results.json", "model"):
            path = run.output_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in find_checkpoints(run.output_dir)[1:]:
            shutil.rmtree(folder)

    def test_means_over_several_steps_and_the_alarm_survive(self, config: Config) -> None:
        run = config(save_steps=2, save_total_limit=9, logging_steps=3, num_train_epochs=4, eval_steps=2, eval_fraction=0.3)
        run_training(run)
        whole = logged(run)
        self.unfinished(run)
        run_training(run.model_copy(update={"resume": True}))
        volatile = {"tokens_per_second"}
        assert [{k: v for k, v in row.items() if k not in volatile} for row in logged(run)] == [
            {k: v for k, v in row.items() if k not in volatile} for row in whole
        ]

    @pytest.mark.parametrize("fields", [{}, {"eval_fraction": 0.3}], ids=["no evaluation", "evaluation"])
    def test_killed_after_the_last_checkpoint(self, config: Config, fields: dict[str, Any]) -> None:
        run = config(save_steps=1, **fields)
        results = run_training(run)
        rows = logged(run)
        (run.output_dir / "results.json").unlink()
        again = run_training(run.model_copy(update={"resume": True}))
        assert again["after"] == results["after"]
        assert logged(run) == rows

    def test_changed_data_are_refused(self, config: Config, groups_file: Path) -> None:
        run = config(save_steps=1, save_total_limit=9)
        run_training(run)
        self.unfinished(run)
        groups_file.write_text("".join(groups_file.read_text().splitlines(keepends=True)[:-1]))
        with pytest.raises(ValueError, match="the training groups changed since"):
            run_training(config(save_steps=1, save_total_limit=9, resume=True))


class TestSelfCheck:
    """A reference that is not the policy's is found before the first step, and the message says which side is off."""

    def with_references(self, config: Config, write_jsonl: Callable[..., Path], groups_file: Path, shift: float) -> TrainConfig:
        """Data that bring their reference log-probs along, one of them off by ``shift`` nats."""
        run = config("first", max_steps=1)
        run_training(run)
        policy = ncalign.load_policy(run.model)
        rows = [json.loads(line) for line in groups_file.read_text().splitlines()]
        for row in rows:
            for candidate in row["candidates"]:
                text = policy.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
                prompt = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
                answer = policy.tokenizer(candidate["completion"][0]["content"] + "<|im_end|>")["input_ids"]
                with torch.no_grad():
                    logits = policy.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                scored = [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(answer)]
                candidate["reference_logprob"] = sum(scored)
        rows[7]["candidates"][1]["reference_logprob"] += shift
        return config("second", data=write_jsonl(rows, "with.jsonl"), reference="data", per_device_train_batch_size=12)

    def test_right_references_in_the_data_pass(
        self, config: Config, write_jsonl: Callable[..., Path], groups_file: Path
    ) -> None:
        run = self.with_references(config, write_jsonl, groups_file, shift=0.0)
        run_training(run)
        assert logged(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    def test_wrong_references_in_the_data_are_named(
        self, config: Config, write_jsonl: Callable[..., Path], groups_file: Path
    ) -> None:
        run = self.with_references(config, write_jsonl, groups_file, shift=0.5)
        with pytest.raises(
            ValueError, match=r"loss of mc_po 0\.6931.*reference log-probs are off \(group 'g7', candidate 1: the data"
        ):
            run_training(run)

    def test_wrong_references_are_found_wherever_they_stand(
        self, config: Config, write_jsonl: Callable[..., Path], groups_file: Path
    ) -> None:
        run = self.with_references(config, write_jsonl, groups_file, shift=0.5)
        with pytest.raises(ValueError, match="group 'g7', candidate 1"):
            run_training(run.model_copy(update={"per_device_train_batch_size": 1}))

    def test_noise_that_only_training_has_is_found(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        make = loading.load_policy

        def noisy(*args: Any, **fields: Any) -> Any:
            policy = make(*args, **fields)

            def add_noise(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                return output + 0.3 * torch.randn_like(output) if module.training else output

            policy.model.model.norm.register_forward_hook(add_noise)
            return policy

        monkeypatch.setattr(loading, "load_policy", noisy)
        with pytest.raises(ValueError, match=r"the policy's log-probs are off .*not deterministic in training"):
            run_training(config())

    def test_missing_references_in_the_data_are_named(self, config: Config) -> None:
        with pytest.raises(ValueError, match=r"groups.jsonl:\d+: group 'g\d+' has a candidate without reference_logprob"):
            run_training(config(reference="data"))

    def test_a_damaged_cache_is_named(self, config: Config) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        run = config("first", max_steps=1)
        run_training(run)
        folder = reference_folder(run.cache_dir, ncalign.load_policy(run.model).fingerprint, shared=True)
        (part,) = folder.glob("*.parquet")
        table = pq.read_table(part)
        shifted = pa.array([value + 1.0 for value in table.column("logprob").to_pylist()])
        # Not a flipped bit, which is found by its checksum: other values, written as the cache writes.
        pq.write_table(table.set_column(1, "logprob", shifted), part)
        part.rename(part.with_stem(hashlib.blake2b(part.read_bytes(), digest_size=16).hexdigest()))
        with pytest.raises(ValueError, match=r"reference log-probs are off .*the cache is damaged: delete"):
            run_training(config("second"))

    def test_a_policy_that_is_not_its_reference_is_named(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        make = loading.load_policy

        def broken(*args: Any, **fields: Any) -> Any:
            policy = make(*args, **fields)
            with torch.no_grad():
                for name, parameter in policy.model.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(0.1)
            return policy

        monkeypatch.setattr(loading, "load_policy", broken)
        with pytest.raises(ValueError, match=r"the policy's log-probs are off .*adapter does not start at zero"):
            run_training(config(lora={"r": 4}))


class TestReference:
    """Reference log-probs are computed once and kept."""

    def test_a_second_run_computes_none(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        run_training(config("first", max_steps=1))
        from ncalign.training.engine import Engine

        counts: list[int] = []
        fill = Engine.fill_reference

        def counted(self: Engine, *args: Any) -> int:
            counts.append(fill(self, *args))
            return counts[-1]

        monkeypatch.setattr(Engine, "fill_reference", counted)
        run_training(config("second", objective=OBJECTIVES["nca"], max_steps=1))
        run_training(config("third", max_steps=1, dtype="float64"))
        assert counts == [0, 12]


class TestRows:
    """Groups that can't be used are all named, or left out with a count."""

    ROWS = (
        group_row(0, [1.0, 0.0]),
        group_row(1, [1.0]),
        group_row(2, [0.5, 0.5, 0.5]),
        group_row(3, [None, None]),
        group_row(4, [None, 1.0]),
        group_row(5, [None, 1.0, 0.0]),
        {**group_row(6, [1.0, 0.0]), "candidates": [{"completion": "", "reward": 1.0}, {"completion": "a", "reward": 0.0}]},
    )

    def test_an_error_lists_every_kind(self, config: Config, write_jsonl: Callable[..., Path]) -> None:
        run = config(data=write_jsonl(self.ROWS, "mixed.jsonl"))
        with pytest.raises(ValueError, match="5 of 7 groups can't be used by mc_po") as caught:
            run_training(run)
        text = str(caught.value)
        for reason, line, group in (
            ("only one candidate", 2, "g1"),
            ("all rewards equal", 3, "g2"),
            ("no rewards at all", 4, "g3"),
            ("only one candidate with a reward", 5, "g4"),
            ("empty completion", 7, "g6"),
        ):
            assert re.search(rf"1 x {reason} \(first: mixed.jsonl:{line}, group '{group}'\)", text), text
        assert "on_bad_row: skip" in text
        assert not (run.output_dir / "model").exists()

    def test_skip_counts_them(self, config: Config, write_jsonl: Callable[..., Path]) -> None:
        broken = [*self.ROWS, '{"id": "g7", "prompt": "cut o', {**group_row(8, [1.0, 0.0]), "id": "g0"}]
        data = run_training(config(data=write_jsonl(broken, "mixed.jsonl"), on_bad_row="skip", max_steps=1))["data"]
        assert data["groups_used"] == 2
        assert data["candidates_used"] == 4
        assert data["candidates_without_reward"] == 1
        assert sum(data["groups_left_out"].values()) == 7
        assert data["groups_left_out"]["unreadable row"] == 2

    def test_equal_rewards_serve_a_method_with_soft_targets(self, config: Config, write_jsonl: Callable[..., Path]) -> None:
        path = write_jsonl([group_row(0, [0.5, 0.5, 0.5])], "equal.jsonl")
        assert run_training(config(data=path, objective=OBJECTIVES["info_nca"], max_steps=1))["data"]["groups_used"] == 1

    def test_nothing_left_is_an_error_even_when_skipping(self, config: Config, write_jsonl: Callable[..., Path]) -> None:
        path = write_jsonl([group_row(0, [0.5, 0.5])], "equal.jsonl")
        with pytest.raises(ValueError, match="No group is left to train on"):
            run_training(config(data=path, on_bad_row="skip"))

    def test_an_empty_file(self, config: Config, write_jsonl: Callable[..., Path]) -> None:
        with pytest.raises(ValueError, match="no groups found"):
            run_training(config(data=write_jsonl([], "nothing.jsonl")))

    def test_long_prompts_keep_their_end_with_a_notice(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        run_training(config(max_length=24, max_prompt_length=8, max_steps=1))
        told = " ".join(capsys.readouterr().err.split())
        assert re.search(r"12 prompts lost their beginning and \d+ completions their end .*raise max_length", told)

    def test_a_model_without_a_chat_template(self, config: Config, tiny_model_dir: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_model_dir, tmp_path / "plain")
        (folder / "chat_template.jinja").unlink()
        with pytest.raises(ValueError, match=r"the prompt is a conversation .*no chat template.*group 'g0'"):
            run_training(config(model=str(folder)))


class TestLearning:
    """Training does what the objective says."""

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_order_of_the_rewards_is_learned(self, config: Config, name: str) -> None:
        run = config(objective=OBJECTIVES[name] | {"beta": 1.0}, learning_rate=3e-3, num_train_epochs=12)
        run_training(run)
        rows = logged(run)
        # Three steps an epoch. A draw of the positive itself, where the kernel includes it, has the loss of the first step.
        first, last = rows[0], {key: sum(row[key] for row in rows[-3:]) / 3 for key in rows[0]}
        # Of four epochs, since an estimator sees two candidates of a group at a time.
        assert sum(row["rewards/accuracies"] for row in rows[-12:]) / 12 > 0.8
        # Without a scoring pass the loss of the whole group is an estimate, and that of one step is far off.
        if name not in ("mc_po with the positive", "nca of two unscored"):
            assert last["loss"] < first["loss"]
        if name != "mc_po with the positive":
            assert last["rewards/margins"] > 0.5

    def test_metrics_have_the_fields_names(self, config: Config) -> None:
        run = config(max_steps=1, eval_fraction=0.3)
        run_training(run)
        before, step, after = logged(run)
        both = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
        both |= {"logps/rejected", "logps/chosen_change", "negatives/reward", "negatives/rank", "negatives/above_positive"}
        both |= {"kernel/entropy", "kernel/effective_sample_size"}
        assert both | {"learning_rate", "grad_norm", "epoch", "tokens_per_second"} <= step.keys()
        assert {f"eval/{name}" for name in both} <= before.keys()
        assert before.keys() <= after.keys()

    def test_kernel_is_uniform_at_the_first_step(self, config: Config) -> None:
        run = config(max_steps=1, per_device_train_batch_size=12)
        run_training(run)
        # K - 1 negatives, K = 2, 3, 4 in turn.
        assert logged(run)[0]["kernel/entropy"] == pytest.approx((math.log(1) + math.log(2) + math.log(3)) / 3, abs=1e-5)
        assert logged(run)[0]["kernel/effective_sample_size"] == pytest.approx(2.0, abs=1e-4)

    def test_a_gradient_that_is_not_finite_stops_the_run(self, config: Config) -> None:
        from ncalign.objectives import compose, needs_candidates

        def broken(values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (values * math.inf).sum(dim=1)

        method = compose("broken", beta=0.1, loss=broken, refuse=needs_candidates)
        run = config(reference="compute")
        with pytest.raises(ValueError, match=r"step 1: the gradient is not finite \(groups 'g"):
            run_training(run, method=method)
        assert not (run.output_dir / "model").exists()


class TestExport:
    """The final model is an ordinary Hugging Face folder."""

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Of some fixed tokens."""
        with torch.no_grad():
            return model(torch.arange(5, 25).unsqueeze(0)).logits

    def test_all_weights(self, config: Config) -> None:
        run = config(max_steps=2, learning_rate=1e-2)
        results = run_training(run)
        folder = Path(results["model"])
        model = AutoModelForCausalLM.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(run.model)
        assert float((self.logits(model) - self.logits(base)).abs().max()) > 1e-2
        assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(run.model).chat_template
        card = (folder / "README.md").read_text()
        assert "mc_po" in card
        assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.S)[1])["learning_rate"] == 1e-2

    def test_adapter_and_merged_agree(self, config: Config) -> None:
        adapter, merged = (
            config("adapter", lora={"r": 4}, learning_rate=1e-2),
            config("merged", lora={"r": 4}, learning_rate=1e-2, merge=True),
        )
        run_training(adapter)
        run_training(merged)
        # In float64: what is compared are the weights that were saved, not how a forward pass rounds.
        base = AutoModelForCausalLM.from_pretrained(adapter.model, dtype=torch.float64)
        plain = self.logits(base)
        adapted = self.logits(PeftModel.from_pretrained(base, adapter.output_dir / "model").double())
        whole = self.logits(AutoModelForCausalLM.from_pretrained(merged.output_dir / "model", dtype=torch.float64))
        assert float((adapted - plain).abs().max()) > 1e-2
        torch.testing.assert_close(adapted, whole, atol=1e-5, rtol=1e-5)

    def test_training_goes_on_from_an_adapter_folder(self, config: Config) -> None:
        first = config("first", lora={"r": 4}, learning_rate=1e-2)
        run_training(first)
        second = config(
            "second", model=str(first.output_dir / "model"), lora={"r": 4}, max_steps=1, per_device_train_batch_size=12
        )
        run_training(second)
        assert logged(second)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        # What is saved stands on its own: the second adapter alone would fit no model that anybody has.
        first_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(first.model), first.output_dir / "model")
        second_model = AutoModelForCausalLM.from_pretrained(second.output_dir / "model")
        base = AutoModelForCausalLM.from_pretrained(first.model)
        gap = self.logits(second_model) - self.logits(first_model)
        assert float(gap.abs().max()) < 0.1 * float((self.logits(first_model) - self.logits(base)).abs().max())

    def test_full_fine_tuning_in_bfloat16_keeps_float32_weights(self, config: Config) -> None:
        run = config(dtype="bfloat16", learning_rate=1e-6, max_steps=2)
        run_training(run)
        before = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).state_dict()
        after = weights(run.output_dir)
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        # A step of 1e-6 would vanish in bfloat16, whose spacing near 0.3 is 2e-3.
        assert any(0 < float((after[name] - before[name]).abs().max()) < 1e-5 for name in after)


class TestDryRun:
    """What `--dry-run` says, without leaving anything."""

    def test_counts_layout_and_estimates(self, config: Config) -> None:
        run = config(num_train_epochs=2)
        facts = dry_run(run)
        assert (facts["groups_used"], facts["candidates_used"], facts["steps"]) == (12, 36, 6)
        assert facts["memory_mib"] > 0
        assert facts["seconds"] > 0
        first = facts["layout"].splitlines()
        assert first[0].startswith("  prompt (")
        assert first[1].endswith("[<|im_end|>]")
        assert "[" not in first[0].split(":", 1)[1]
        assert not run.output_dir.exists()


def test_every_configuration_field_is_read() -> None:
    """A field that nothing reads would promise what it does not do."""
    source = Path(ncalign.__file__).parent
    read = {
        node.attr
        for path in source.rglob("*.py")
        if path.name not in ("config.py", "settings.py", "flags.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    } | {
        name
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.MatchClass)
        for name in node.kwd_attrs
    }
    # A property of a configuration that is read reads its fields.
    read |= {
        node.attr
        for path in source.rglob("config.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name in read
        if any(isinstance(one, ast.Name) and one.id == "property" for one in function.decorator_list)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
    }
    methods = get_args(get_args(ObjectiveConfig)[0])
    verbs = [verb.config() for verb in VERBS]
    assert len(methods) > 20
    assert len(verbs) > 10
    for model in (*verbs, EncodingConfig, LoRA, ServerConfig, JudgeConfig, EvalJudgeConfig, *methods):
        assert set(model.model_fields) <= read, f"{model.__name__}: never read: {set(model.model_fields) - read}"


DRIVER = """
import os, signal, sys
from ncalign.training.config import TrainConfig
from ncalign.training import loop
from ncalign.training.train import run_training
kill_after = int(sys.argv[2])
if kill_after:
    step = loop.Loop.step
    def killing(self, number):
        found = step(self, number)
        if number + 1 == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    loop.Loop.step = killing
run_training(TrainConfig.model_validate_json(open(sys.argv[1]).read()))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """``start(config, processes=1, kill_after_step=0)`` trains in a process of its own; ``.wait()`` gives its exit code."""
    import subprocess

    def run(config: TrainConfig, *, processes: int = 1, kill_after_step: int = 0) -> Any:
        (tmp_path / "driver.py").write_text(DRIVER)
        (tmp_path / "config.json").write_text(config.model_dump_json())
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        errors = tmp_path / "errors.txt"
        with errors.open("w") as stream:
            process = subprocess.Popen(
                [*command, "driver.py", "config.json", str(kill_after_step)],
                cwd=tmp_path,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )
        process.errors = errors.read_text  # type: ignore[attr-defined]
        return process

    return run

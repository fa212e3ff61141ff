"""Rounds of generate, score, rank and train."""

from __future__ import annotations

import json
import math
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conftest import build_tokenizer
from ncalign.cli.app import main
from ncalign.data.groups import Candidate, Group, read_groups
from ncalign.generation.base import Completion
from ncalign.generation.local import TransformersGenerator, encode_prompts
from ncalign.model.batching import collate
from ncalign.model.chat import ChatTemplate
from ncalign.model.encoding import Encoder
from ncalign.model.logprobs import LogprobModel, completion_logprobs
from ncalign.online.config import OnlineConfig
from ncalign.online.drift import alarms, pool_health
from ncalign.online.online import run_online
from ncalign.online.pool import eligible_columns, importance_weights
from ncalign.online.rounds import round_end, round_prompts
from ncalign.online.weights import ReferenceWeights
from ncalign.rewards.function import FunctionReward
from ncalign.training.engine import Engine
from online_runs import settings, write_inputs
from server_double import ServerDouble, serving

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> Run:
    """``run(name, **changes)`` runs the small online run with these changes and returns its results."""
    write_inputs(tmp_path)

    def start(name: str = "run", **changes: Any) -> dict[str, Any]:
        return run_online(OnlineConfig.model_validate(settings(tmp_path, tiny_model_dir, name, **changes)))

    return start


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rounds/*/round.json"))]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- Rounds -----------------------------------------------------------------------------------------------------------


@given(
    num_prompts=st.integers(1, 40),
    groups_per_step=st.integers(1, 9),
    total=st.integers(1, 50),
    every=st.none() | st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_rounds_follow_each_other_and_visit_all_prompts_alike(
    num_prompts: int, groups_per_step: int, total: int, every: int | None, seed: int
) -> None:
    start, seen = 0, []
    while start < total:
        end = round_end(start, total=total, every=every, shares=(1 / 3, 2 / 3))
        assert start < end <= total
        count = (end - start) * groups_per_step
        prompts = round_prompts(start, count=count, groups_per_step=groups_per_step, num_prompts=num_prompts, seed=seed)
        assert len(set(prompts)) == len(prompts) <= min(count, num_prompts)
        seen += prompts
        start = end
    assert set(seen) <= set(range(num_prompts))
    if total * groups_per_step <= num_prompts:
        assert len(set(seen)) == len(seen) == total * groups_per_step


def test_a_run_leaves_its_rounds(run: Run, tmp_path: Path) -> None:
    results = run()
    folder = tmp_path / "run"
    rounds = rounds_of(folder)
    assert [(row["start"], row["end"]) for row in rounds] == [(0, 2), (2, 4), (4, 6)]
    assert [row["round"] for row in logged(folder)] == [1, 1, 2, 2, 3, 3]
    assert [row["step"] for row in logged(folder)] == [1, 2, 3, 4, 5, 6]
    for row, number in zip(rounds, range(3), strict=True):
        groups = list(read_groups(folder / "rounds" / f"{number:03d}" / "pool.jsonl"))
        assert len(groups) == row["counts"]["prompts"] == 4
        assert all(len(group.candidates) == 3 for group in groups)
        rewards = [candidate.reward for group in groups for candidate in group.candidates]
        assert row["health"]["reward/mean"] == pytest.approx(np.mean(rewards))
        assert {tuple(group.metadata["reward_steps"]) for group in groups} == {tuple(results["reward_steps"][0]["steps"])}
    (fresh,) = results["reward_steps"]
    assert fresh["candidates"] == "fresh"
    assert fresh["steps"][0].startswith("score: ")
    # The policy that answers in a later round is another one.
    assert rounds[0]["drift"]["kl"] > 0
    assert results["evaluation"]["steps"] == [0, 2, 4, 6]
    assert results["evaluation"]["mean_reward"][0] != results["evaluation"]["mean_reward"][-1]
    assert results["data"]["tokens_generated"] == sum(row["counts"]["tokens"] for row in rounds)
    AutoModelForCausalLM.from_pretrained(results["model"])


def test_the_report_shows_rounds_and_escapes_what_was_sampled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TransformersGenerator._decode

    def hostile(self: TransformersGenerator, tokens: list[int], logprob: float) -> Completion:
        return replace(plain(self, tokens, logprob), text=f"<script>{sum(tokens)}aei</script>")

    monkeypatch.setattr(TransformersGenerator, "_decode", hostile)
    results = run(max_steps=2, regenerate_every=1, learning_rate=0.1, warmup_ratio=0.0)
    page = Path(results["report"]).read_text()
    assert "2 rounds, 2 steps" in page
    assert '"title":"Reward of the samples"' in page
    assert '"title":"Loss"' in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;" in page
    assert "regenerate sooner" in page


def test_the_first_loss_of_a_run_is_known(run: Run, tmp_path: Path) -> None:
    run(objective={"name": "dpo"}, reference="last_round")
    # With each round's policy as its reference, each round begins where log-ratios are 0.
    assert [row["loss"] for row in logged(tmp_path / "run")][::2] == pytest.approx([math.log(2)] * 3, abs=1e-4)


def test_rewards_rise(run: Run) -> None:
    results = run(
        max_steps=60,
        regenerate_every=10,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        num_samples=8,
        per_device_train_batch_size=8,
        reference="last_round",
        objective={"name": "info_nca", "beta": 0.1, "alpha": 0.02},
    )
    means = [row["health"]["reward/mean"] for row in results["rounds"]]
    assert means[-1] > means[0] + 0.1


@pytest.mark.parametrize("name", ["dpo", "nca", "simpo", "hps", "ipo", "mix"])
def test_any_method(run: Run, name: str) -> None:
    parts = {"parts": ["mc_po", "nca", "nll"]} if name == "mix" else {}
    assert run(objective={"name": name, **parts})["steps"] == 6


@pytest.mark.parametrize("proposals", ["current", "last_visit"])
def test_an_estimator_in_every_round(run: Run, tmp_path: Path, proposals: str) -> None:
    run(objective={"name": "nca", "estimator": {"candidates": 1, "proposals": proposals}}, reference="last_round")
    rows = logged(tmp_path / "run")
    assert [row["estimator/candidates"] for row in rows] == [1.0] * 6
    # A round begins where the policy is the reference: NCA's loss is 2 ln 2 there, whatever is drawn.
    assert [row["loss"] for row in rows][::2] == pytest.approx([2 * math.log(2)] * 3, abs=1e-4)
    assert all(row["estimator/relative_variance"] > 0 for row in rows)


def test_one_chunk_is_scored_while_the_next_is_sampled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started, overlapped = [threading.Event() for _ in range(3)], []
    plain_generate, plain_score = TransformersGenerator.generate, FunctionReward.score
    calls = iter(range(100))

    def generate(self: TransformersGenerator, prompts: Any, *, num_samples: int, **options: Any) -> Any:
        if num_samples > 1 and (number := next(calls)) < len(started):
            started[number].set()
        return plain_generate(self, prompts, num_samples=num_samples, **options)

    def score(self: FunctionReward, group: Group) -> list[float | None]:
        if threading.current_thread() is not threading.main_thread() and not overlapped:
            # The first chunk's rewards wait for the second's sampling: one after the other they would wait in vain.
            overlapped.append(started[1].wait(20))
        return plain_score(self, group)

    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    monkeypatch.setattr(FunctionReward, "score", score)
    run(max_steps=2, regenerate_every=2, chunk_size=2, reward_timeout=None)
    assert overlapped == [True]


# --- Candidates -------------------------------------------------------------------------------------------------------


@given(
    fresh=st.lists(st.none() | st.integers(0, 5).map(float), min_size=1, max_size=6),
    offline=st.lists(st.none() | st.integers(0, 5).map(float), max_size=6),
    preferred=st.sampled_from(["best", "best_fresh", "best_offline"]),
)
def test_the_best_is_of_the_kind_that_is_asked_for(
    fresh: list[float | None], offline: list[float | None], preferred: str
) -> None:
    rewards = fresh + offline
    columns = eligible_columns(rewards, len(fresh), preferred)
    assert all(rewards[k] is not None for k in columns)
    if not columns or preferred == "best":
        assert columns == [k for k, reward in enumerate(rewards) if reward is not None] or preferred != "best"
        return
    kind = range(len(fresh)) if preferred == "best_fresh" else range(len(fresh), len(rewards))
    best = max(rewards[k] or 0.0 for k in columns)
    assert all((k in kind) == (k in kind) and (k in kind or (rewards[k] or 0.0) < best) for k in columns)
    assert {k for k in kind if rewards[k] is not None} <= set(columns)


@pytest.mark.parametrize("preferred", ["best", "best_fresh", "best_offline"])
def test_offline_candidates_join_the_fresh_ones(
    run: Run, tmp_path: Path, preferred: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    plain = Engine.train_pass

    def watched(self: Engine, part: Any, **options: Any) -> Any:
        seen.extend(part.groups)
        return plain(self, part, **options)

    monkeypatch.setattr(Engine, "train_pass", watched)
    rows: list[dict[str, Any]] = [
        {
            "id": str(i),
            "prompt": f"What is {i} times {i + 3}?",
            "candidates": [{"completion": " aeiou", "reward": 0.9}, {"completion": " x", "reward": -1.0}],
        }
        for i in range(12)
    ]
    rows[0]["metadata"] = {"reward_steps": ["score: judge"]}
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = run(
        data=tmp_path / "mixed.jsonl", candidates="fresh_and_offline", preferred=preferred, eval_fraction=0.0, drift_prompts=0
    )
    offline = [(row["steps"], row["groups"]) for row in results["reward_steps"] if row["candidates"] == "offline"]
    assert offline == [(["given in mixed.jsonl"], 11), (["score: judge"], 1)]
    assert seen
    for group in seen:
        assert -1.0 in group.rewards
        # No random text of six tokens is vowels to nine tenths.
        assert (0.9 in group.rewards) == (preferred != "best_fresh")


def test_sampled_tokens_are_trained_on_as_they_were_sampled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled, trained = set(), set()
    plain_sample, plain_visit = TransformersGenerator._decode, Engine.train_pass

    def decode(self: TransformersGenerator, tokens: list[int], logprob: float) -> Completion:
        sampled.add(tuple(tokens))
        return plain_sample(self, tokens, logprob)

    def visit(self: Engine, part: Any, **options: Any) -> Any:
        trained.update(tuple(ids.tolist()) for group in part.groups for ids in group.completions)
        return plain_visit(self, part, **options)

    monkeypatch.setattr(TransformersGenerator, "_decode", decode)
    monkeypatch.setattr(Engine, "train_pass", visit)
    run()
    assert trained
    assert trained <= sampled


# --- Log-probs --------------------------------------------------------------------------------------------------------


def test_nothing_is_computed_that_generation_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = Engine.logprobs
    monkeypatch.setattr(Engine, "logprobs", lambda self, groups: calls.append(len(groups)) or plain(self, groups))
    run(max_steps=2, regenerate_every=2, reference="last_round", eval_fraction=0.0)
    # The probe's four, empty lists for what the pool lacks, and at the end the drift of the two prompts kept out.
    assert [size for size in calls if size] == [4, 2]


@pytest.mark.parametrize("kind", ["fixed", "last_round", "ema"])
def test_reference_weights(tiny_model: LlamaForCausalLM, kind: Any) -> None:
    model = LogprobModel(tiny_model)
    weight = tiny_model.lm_head.weight
    start = weight.detach().clone()
    reference = ReferenceWeights(model, kind=kind, decay=0.75)
    with torch.no_grad():
        weight += 1.0
    reference.after_step()
    moved = weight.detach().clone()
    with reference.in_place():
        inside = tiny_model.lm_head.weight.detach().clone()
    expected = {"fixed": start, "last_round": moved, "ema": start + 0.25}[kind]
    torch.testing.assert_close(inside, expected)
    assert torch.equal(tiny_model.lm_head.weight, moved)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_fixed_reference_is_the_starting_model(
    run: Run, tmp_path: Path, tiny_model_dir: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    plain = Engine.train_pass
    monkeypatch.setattr(
        Engine, "train_pass", lambda self, part, **options: seen.extend(part.groups) or plain(self, part, **options)
    )
    run(lora=lora, eval_fraction=0.0)
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        found = completion_logprobs(start, collate(seen, pad_token_id=0))
    for row, group in zip(found, seen, strict=True):
        torch.testing.assert_close(
            row[: len(group.rewards)].double(), torch.tensor(group.reference_logprobs).double(), atol=2e-4, rtol=0
        )


def test_importance_weights_make_the_policy_s_samples_the_model_s() -> None:
    # Two completions under policy and reference; beta .5: the model is the root of their product, normalised.
    policy, base, beta = np.array([0.8, 0.2]), np.array([0.4, 0.6]), 0.5
    model = base ** (1 - beta) * policy**beta
    model /= model.sum()
    # A group that holds each completion as often as the policy samples it: 4 to 1.
    columns = [0, 0, 0, 0, 1]
    weights, share = importance_weights(np.log(policy[columns]).tolist(), np.log(base[columns]).tolist(), beta, most=10)
    assert sum(weights[:4]) / 5 == pytest.approx(model[0])
    assert weights[4] / 5 == pytest.approx(model[1])
    assert share == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / 5)


def test_importance_weights_scale_the_loss(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("plain")
    run("weighted", on_model="importance")
    one, other = (logged(tmp_path / name) for name in ("plain", "weighted"))
    # At the start policy and reference are one, and all weights are 1.
    assert one[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-5)
    assert one[-1]["grad_norm"] != pytest.approx(other[-1]["grad_norm"], rel=1e-5)
    assert rounds_of(tmp_path / "weighted")[-1]["health"]["importance/effective_share"] < 1


# --- Drift ------------------------------------------------------------------------------------------------------------


def test_drift_ends_a_round_where_the_policy_moves(run: Run, tmp_path: Path) -> None:
    moving = {"regenerate_on_drift": 0.05, "drift_steps": 1, "max_steps": 12, "regenerate_every": 12}
    run("fast", learning_rate=2e-2, warmup_ratio=0.0, **moving)
    run("slow", learning_rate=1e-7, **moving)
    fast = rounds_of(tmp_path / "fast")
    assert len(fast) > 2
    assert all(row["drift"]["kl"] > 0.05 for row in fast[:-1])
    assert [row["end"] for row in fast[:-1]] == [row["start"] for row in fast[1:]]
    assert [(row["start"], row["end"]) for row in rounds_of(tmp_path / "slow")] == [(0, 12)]
    assert any("regenerate sooner" in alarm for row in fast for alarm in row["alarms"])


def test_health_and_alarms() -> None:
    def health(texts: list[list[str]], rewards: list[list[float | None]], logprob: float) -> dict[str, float]:
        same = [[2 for _ in group] for group in texts]
        return pool_health(texts, rewards, same, [[True for _ in g] for g in texts], [[logprob]], [[4]])

    first = health([["a b", "c d"], ["e f", "g h"]], [[1.0, 0.0], [0.5, None]], -8.0)
    assert first == {
        "reward/mean": 0.5,
        "reward/best": 0.75,
        "reward/spread": 0.5,
        "reward/missing": 0.25,
        "groups/without_spread": 0.5,
        "completions/tokens": 2.0,
        "completions/finished": 1.0,
        "completions/duplicates": 0.0,
        "completions/distinct_1": 1.0,
        "completions/distinct_2": 1.0,
        "completions/entropy": 2.0,
    }
    assert alarms(first, first) == []
    later = health([["a b"] * 4, ["a b"] * 4], [[1.0] * 4, [1.0] * 4], -2.0)
    assert later["completions/duplicates"] == 0.75
    assert later["completions/distinct_2"] == 1 / 8
    assert [alarm.split()[0] for alarm in alarms(later, first)] == ["in", "75%", "entropy", "distinct-2"]


# --- Generators elsewhere ---------------------------------------------------------------------------------------------


def various(body: dict[str, Any], number: int) -> str:
    """A text whose share of vowels differs from answer to answer."""
    chance = random.Random(f"{body['prompt']} {body['seed']} {number}")
    return " " + "".join(chance.choice("aeiouxyz") for _ in range(12))


def test_a_round_on_a_server_that_fails_loses_no_prompt_and_scores_none_twice(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai._base_client

    for module, name in ((openai._base_client, "INITIAL_RETRY_DELAY"), (openai._base_client, "MAX_RETRY_DELAY")):
        monkeypatch.setattr(module, name, 0.001)
    monkeypatch.setattr("ncalign.generation.client._FIRST_PAUSE", 0.001)
    scored: Counter[str] = Counter()
    plain = FunctionReward.score

    def score(self: FunctionReward, group: Group) -> list[float | None]:
        scored.update(f"{group.id} {candidate.completion}" for candidate in group.candidates)
        return plain(self, group)

    monkeypatch.setattr(FunctionReward, "score", score)
    chance = random.Random(1)
    plan = [chance.choice(["drop", "half", "few", 429, 500, None, None]) for _ in range(2000)]
    double = ServerDouble(various, faults=lambda number: plan[number])
    double.delay = 0.001
    with serving(double) as url:
        server = {"base_url": url, "model": "m", "max_retries": 40}
        fields = {"generator": "server", "server": server, "push": "none", "probe_tolerance": None, "eval_fraction": 0.0}
        fields |= {"string_prompts": "raw"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ncalign.online.online.train_round", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(**fields)
        asked = len(double.requests)
        run(resume=True, **fields)
        assert len(double.requests) > asked
    for row in rounds_of(tmp_path / "run"):
        folder = tmp_path / "run" / "rounds" / f"{row['round'] - 1:03d}"
        groups = list(read_groups(folder / "pool.jsonl"))
        assert len(groups) == row["counts"]["prompts"] == 4
        assert [len(group.candidates) for group in groups] == [3] * 4
        assert all(candidate.reward is not None for group in groups for candidate in group.candidates)
    assert set(scored.values()) == {1}


def test_adapters_are_loaded_by_a_vllm_server(run: Run, tmp_path: Path) -> None:
    double = ServerDouble(various)
    with serving(double) as url:
        server = {"base_url": url, "model": "base"}
        run(generator="server", server=server, lora={"r": 2}, probe_tolerance=None, string_prompts="raw")
    loads = [body for path, body in double.requests if path == "/v1/load_lora_adapter"]
    assert [body["lora_name"] for body in loads] == ["run-000", "run-001", "run-002", "run-rounds"]
    used = [body["model"] for path, body in double.requests if path == "/v1/completions"]
    assert set(used) == {"run-000", "run-001", "run-002", "run-rounds"}
    assert used == sorted(used)
    assert (Path(loads[-1]["lora_path"]) / "adapter_model.safetensors").is_file()
    # Weights that no one samples from any more are not kept.
    assert len(list((tmp_path / "run" / "rounds").rglob("weights"))) == 1


def test_merged_weights_are_reloaded_by_a_server_while_the_adapter_trains_on(run: Run, tmp_path: Path) -> None:
    double = ServerDouble(various)
    with serving(double) as url:
        server = {"base_url": url, "model": "base"}
        fields: dict[str, Any] = {"lora": {"r": 2}, "probe_tolerance": None, "string_prompts": "raw"}
        run(generator="server", server=server, push="folder", **fields)
    sent = [Path(body["kwargs"]["weights_path"]) for path, body in double.requests if "collective_rpc" in path]
    assert len(sent) > 1
    assert (sent[-1] / "model.safetensors").is_file()
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()


def test_a_server_with_other_log_probs_stops_the_round(run: Run) -> None:
    with serving(ServerDouble(answer=lambda body, number: "a")) as url:
        server = {"base_url": url, "model": "m"}
        with pytest.raises(ValueError, match="hold different weights"):
            run(generator="server", server=server, push="none")


# --- What goes wrong --------------------------------------------------------------------------------------------------


def test_a_generator_with_other_weights_stops_the_round(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TransformersGenerator._decode

    def other(self: TransformersGenerator, tokens: list[int], logprob: float) -> Completion:
        return plain(self, tokens, logprob - 0.2 * len(tokens))

    monkeypatch.setattr(TransformersGenerator, "_decode", other)
    with pytest.raises(ValueError, match=r"round 1: generator and policy hold different weights.* 0\.2 nats a token"):
        run()


def test_the_same_command_goes_on_with_what_is_there(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    fields = settings(tmp_path, tiny_model_dir, "run", report_to="none")
    words = ["online", *(word for name, value in fields.items() for word in (f"--{name}", str(value)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncalign.online.online.finish", lambda run, position: sys.exit(3))
        with pytest.raises(SystemExit):
            main(words)
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "Resuming from" in shown.err
    assert "mc_po, online: 6 steps in 3 rounds" in shown.out
    assert "Report: " in shown.out
    assert main(words) == 0
    assert "is finished: nothing to resume" in capsys.readouterr().err
    assert main([*words, "--no_resume"]) == 1
    assert "holds what an earlier `ncalign online` wrote" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert "Round 1" in capsys.readouterr().err


def test_a_changed_configuration_is_refused_with_the_change(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncalign.online.online.finish", lambda run, position: {})
        run()
    with pytest.raises(ValueError, match=r"num_samples: 3 -> 4(?s:.*)accept_changes"):
        run(resume=True, num_samples=4)
    run(resume=True, learning_rate=1e-4, accept_changes=True)
    assert "learning_rate: 0.003 -> 0.0001" in capsys.readouterr().err


def test_a_pool_that_was_deleted_is_missed(run: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncalign.online.online.finish_round", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    (tmp_path / "run" / "rounds" / "000" / "pool.jsonl").unlink()
    with pytest.raises(ValueError, match="was deleted or moved"):
        run(resume=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preferred", "best_offline"], "preferred: best_offline needs candidates: fresh_and_offline"),
        (["--regenerate_at", "0.5,0.2"], "regenerate_at must rise between 0 and 1"),
        (["--max_new_tokens", "64"], "max_new_tokens (64) must be less than max_length (64)"),
        (["--candidates", "fresh_and_offline"], "has no candidate with a reward"),
        (["--reward", "nothing.py:f"], "there is no file nothing.py"),
        (["--objective", "kto"], "kto can use none of the 4 groups ("),
    ],
)
def test_what_can_not_be_run_is_said(
    flags: list[str], message: str, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    fields = settings(tmp_path, tiny_model_dir, "run", report_to="none")
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    assert main(["online", *words, *flags]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("string_prompts", ["raw", "user_turn"])
def test_encoding_matches_generation(string_prompts: Any) -> None:
    """What the generator feeds is what training puts before the completion, for text and conversations."""
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer, string_prompts=string_prompts)
    for prompt in ("What is seven", [{"role": "user", "content": "Reply, please."}]):
        group = Group(id="g", prompt=prompt, candidates=[Candidate("twelve")])
        assert [encoder.encode(group).prompt.tolist()] == encode_prompts(ChatTemplate(tokenizer), [prompt], string_prompts)

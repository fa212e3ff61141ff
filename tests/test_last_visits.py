"""Kernels that draw by the last visit's scores: nothing is scored, what is known is right, and runs resume bitwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaForCausalLM

from conftest import weights
from ncalign.model.batching import group_generator
from ncalign.objectives import MCPO, Mix
from ncalign.objectives.samplers import proposal_log_ratio
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.training import engine as engines
from ncalign.training import loop as loops
from ncalign.training.config import TrainConfig
from ncalign.training.engine import Engine, Last, Scoring
from ncalign.training.last_visits import LastVisits
from ncalign.training.metrics import PassResult
from ncalign.training.train import run_training
from online_runs import settings, write_inputs
from test_engine import engine, groups

LAST = {"name": "mc_po", "proposals": "last_visit", "acceptance": True}
NAN = float("nan")


@pytest.fixture(scope="module")
def alone() -> Accelerator:
    return Accelerator(cpu=True)


class TestVisits:
    """The numbers that are kept."""

    def test_before_the_first_visit_the_references_are_there(self) -> None:
        visits = LastVisits.of(groups(), start=3)
        assert visits.rows([1, 0], 4)[:, :3].tolist() == [[-5, -6, -7], [-5, -6, -7]]
        assert visits.rows([1], 4)[0, 3].isnan()
        assert visits.ages([1], 4, step=5)[0, :3].tolist() == [2, 2, 2]
        assert visits.ages([1], 4, step=5)[0, 3].isnan()
        assert LastVisits.of([]).logprobs.shape == (0, 0)

    def test_what_is_known_of_a_group_comes_before_the_references(self) -> None:
        visits = LastVisits.of(groups(), known=[None, (-1.0, -2.0, -3.0), None])
        assert visits.rows([0, 1], 3).tolist() == [[-5, -6, -7], [-1, -2, -3]]

    def test_only_what_was_computed_is_replaced(self, alone: Accelerator) -> None:
        visits = LastVisits.of(groups())
        visits.begin([2, 0], alone)
        visits.visit([2, 0], torch.tensor([[NAN, -1.5, NAN, NAN, -2.5], [-0.5, NAN, NAN, NAN, NAN]]), step=4)
        assert visits.rows([2], 5).tolist() == [[-5, -6, -7, -8, -9]], "not before it is asked for"
        visits.begin([1], alone)
        assert visits.rows([2], 5).tolist() == [[-5, -6, -7, -8, -9]], "another group asks for nothing"
        visits.begin([0], alone)
        assert visits.rows([2], 5).tolist() == [[-5, -1.5, -7, -8, -2.5]]
        assert visits.rows([0], 4).tolist() == [[-0.5, -6, -7, -8]]
        assert visits.ages([2], 5, step=7).tolist() == [[7, 3, 7, 7, 3]]

    def test_state_and_back_are_the_same_bits(self, alone: Accelerator) -> None:
        visits, other = LastVisits.of(groups()), LastVisits.of(groups())
        found = torch.tensor([[NAN, -1 / 3, -2 / 7, NAN]], dtype=torch.float64)
        visits.visit([0], found, step=0)
        visits.exchange(alone)
        other.restore(json.loads(json.dumps(visits.state())))
        assert torch.equal(visits.logprobs.nan_to_num(), other.logprobs.nan_to_num())
        assert torch.equal(visits.steps, other.steps)
        assert visits.state() == {"rows": [0, 0], "columns": [1, 2], "steps": [0, 0], "logprobs": [-1 / 3, -2 / 7]}


# --- A pass -----------------------------------------------------------------------------------------------------------


def scores_of_visits() -> LastVisits:
    """Log-probs far from the references and from the policy, so that draws by others would differ."""
    visits = LastVisits.of(groups())
    noise = torch.randn(visits.logprobs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    visits.logprobs += 30 * noise
    return visits


def visit(engine: Engine, visits: LastVisits, *, step: int = 6) -> PassResult:
    (part,) = engine.passes(range(3), groups())
    return engine.train_pass(part, epoch=1, scoring=Scoring.LAST, last=Last(visits, step))


def calls_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Any]]:
    """Whether each of the model's calls had gradients, and which candidates it computed."""
    calls: list[tuple[bool, Any]] = []
    forward = engine.model.forward

    def watched(batch: Any, select: Any = None, **fields: Any) -> Any:
        calls.append((torch.is_grad_enabled(), select))
        return forward(batch, select, **fields)

    monkeypatch.setattr(engine.model, "forward", watched)
    return calls


@pytest.mark.parametrize("at_reference", [False, True])
def test_a_pass_computes_what_it_draws_and_nothing_else(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, at_reference: bool
) -> None:
    drawing = engine(tiny_model, MCPO(proposals="last_visit", acceptance=True))
    assert drawing.scoring(groups(), at_reference=at_reference) is Scoring.LAST
    calls, visits = calls_of(drawing, monkeypatch), scores_of_visits()
    found = visit(drawing, visits)
    ((with_gradients, select),) = calls
    assert with_gradients
    (part,) = drawing.passes(range(3), groups())
    for row, (index, group) in enumerate(zip(part.indices, part.groups, strict=True)):
        k = len(group.completions)
        reference = torch.tensor([group.reference_logprobs], dtype=torch.float64)
        scores = 0.1 * (visits.rows([index], k) - reference)
        rewards, mask = torch.tensor([group.rewards], dtype=torch.float64), torch.ones(1, k, dtype=torch.bool)
        sampler = drawing.method.sampler
        assert sampler is not None
        columns = sampler.select(scores, rewards, mask, group_generator(3, epoch=1, index=index))
        assert select[row] == columns[0].tolist()
        # Accepted by the pair that was computed, as proposed by what was seen last.
        states = (rewards < rewards.max()) | (torch.arange(k) == columns[0, 0])
        ratio = float(proposal_log_ratio(scores, columns[:, 0], columns[:, 1:], states))
        r = 0.1 * found.log_ratios[row].double()
        accepted = (r[columns[0, 1]] - r[columns[0, 0]] - ratio).sigmoid()
        torch.testing.assert_close(found.loss[row].double(), -(1 - accepted).log(), rtol=1e-6, atol=1e-6)
        assert found.acceptance is not None
        torch.testing.assert_close(found.acceptance[row].double(), accepted, rtol=1e-6, atol=1e-6)
        # What was not computed is not told as if it were known.
        assert sorted((~found.logprobs[row].isnan()).nonzero().flatten().tolist()) == sorted(columns[0].tolist())
    assert found.score_age is not None
    assert found.score_age.tolist() == [6, 6, 6]


def test_before_the_first_visit_it_is_a_pass_at_the_reference(tiny_model: LlamaForCausalLM) -> None:
    stale = engine(tiny_model, MCPO(proposals="last_visit", acceptance=True))
    current = engine(tiny_model, MCPO(acceptance=True))
    (part,) = current.passes(range(3), groups())
    known = current.train_pass(part, epoch=1, scoring=Scoring.KNOWN)
    found = visit(stale, LastVisits.of(groups()))
    assert torch.equal(found.negatives, known.negatives)
    torch.testing.assert_close(found.loss, known.loss, check_dtype=False)


def test_fresh_scores_are_the_current_policys(tiny_model: LlamaForCausalLM) -> None:
    current = engine(tiny_model, MCPO(acceptance=True, target_ess=0.6))
    (part,) = current.passes(range(3), groups())
    scored = current.train_pass(part, epoch=1, scoring=Scoring.TOGETHER)
    visits = LastVisits.of(groups())
    visits.visit(part.indices, scored.logprobs, step=2)
    visits.exchange(current.accelerator)
    found = visit(engine(tiny_model, MCPO(proposals="last_visit", acceptance=True, target_ess=0.6)), visits, step=3)
    assert torch.equal(found.negatives, scored.negatives)
    torch.testing.assert_close(found.loss, scored.loss, check_dtype=False, rtol=1e-5, atol=1e-5)
    assert found.score_age is not None
    assert found.score_age.tolist() == [1, 1, 1]


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> Callable[..., TrainConfig]:
    """Twelve groups, four a step, three epochs."""

    def make(name: str = "run", **fields: Any) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "model": str(tiny_model_dir),
                "data": groups_file,
                "output_dir": tmp_path / name,
                "cache_dir": tmp_path / "cache",
                "objective": LAST,
                "learning_rate": 3e-3,
                "per_device_train_batch_size": 4,
                "num_train_epochs": 3,
                "dtype": "float32",
                "report_to": (),
            }
            | fields
        )

    return make


def logged(run: TrainConfig) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_a_run_scores_nothing_and_draws_by_what_it_saw(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[int], Tensor, Tensor, int, list[float]]] = []
    plain = Engine._train_pass_on_last_visit

    def watched(self: Engine, part: Any, epoch: int, baseline: float, last: Last) -> PassResult:
        seen = last.visits.rows(part.indices, 4).clone()
        found = plain(self, part, epoch, baseline, last)
        assert found.score_age is not None
        drawn.append((part.indices, seen, found.logprobs, last.step, found.score_age.tolist()))
        return found

    def scored(*arguments: Any, **fields: Any) -> Tensor:
        raise AssertionError("a pass without gradients")

    monkeypatch.setattr(Engine, "_train_pass_on_last_visit", watched)
    run = config()
    plain_step = loops.Loop.step

    def step(self: loops.Loop, number: int) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(engines.Engine, "score", scored)
            return plain_step(self, number)

    monkeypatch.setattr(loops.Loop, "step", step)
    run_training(run)
    known: dict[tuple[int, int], float] = {}
    at: dict[tuple[int, int], int] = {}
    for indices, seen, computed, step_number, ages in drawn:
        for b, index in enumerate(indices):
            count = 2 + index % 3  # candidates of the groups, in turn
            own = [step_number - at.get((index, k), 0) for k in range(count)]
            assert ages[b] == pytest.approx(sum(own) / count)
            for k in range(computed.shape[1]):
                if (index, k) in known:
                    assert float(seen[b, k]) == known[index, k]
        for b, index in enumerate(indices):
            for k, value in enumerate(computed[b].tolist()):
                if value == value:
                    known[index, k], at[index, k] = value, step_number
    assert len(drawn) == 9
    rows = logged(run)
    # Nothing was seen in the first epoch; later some candidates were.
    assert [row["kernel/score_age"] for row in rows[:3]] == [0, 1, 2]
    assert all(row["kernel/score_age"] < row["step"] - 1 for row in rows[3:])
    assert all(0 < row["kernel/acceptance"] < 1 for row in rows)
    assert rows[0]["kernel/acceptance"] == pytest.approx(0.5, abs=1e-5)


ESTIMATED: dict[str, Any] = {"name": "nca", "estimator": {"candidates": 2, "proposals": "last_visit"}}


@pytest.mark.parametrize(
    "objective", [LAST, {**LAST, "acceptance": False, "log_q_correction": True, "num_negatives": 2}, ESTIMATED]
)
def test_a_resumed_run_is_bitwise_the_same(config: Callable[..., TrainConfig], objective: dict[str, Any]) -> None:
    whole = config("whole", save_steps=1, save_total_limit=9, eval_fraction=0.2, objective=objective)
    run_training(whole)
    for step in (2, 5):
        part = config(f"part {step}", save_steps=1, save_total_limit=9, eval_fraction=0.2, objective=objective)
        shutil.copytree(whole.output_dir, part.output_dir)
        for name in ("results.json", "model"):
            path = part.output_dir / name
            path.unlink() if path.is_file() else shutil.rmtree(path)
        for later in sorted((part.output_dir / "checkpoints").glob("step-*"))[step:]:
            shutil.rmtree(later)
        run_training(part.model_copy(update={"resume": True}))
        first, second = weights(whole.output_dir), weights(part.output_dir)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert logged(part) == logged(whole)


def test_without_what_was_seen_a_resumed_run_would_differ(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: what a checkpoint holds of the visits decides later draws."""
    whole = config("whole", save_steps=1, save_total_limit=9)
    run_training(whole)
    for name in ("results.json", "model"):
        path = whole.output_dir / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    for later in sorted((whole.output_dir / "checkpoints").glob("step-*"))[5:]:
        shutil.rmtree(later)
    expected = logged(whole)
    monkeypatch.setattr(LastVisits, "restore", lambda self, state: None)
    run_training(whole.model_copy(update={"resume": True}))
    assert logged(whole) != expected


def test_rounds_begin_with_what_the_generating_policy_gave(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    begun: list[tuple[int, Tensor, Tensor]] = []
    plain = LastVisits.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[LastVisits], some: Any, **fields: Any) -> LastVisits:
        visits: LastVisits = plain(cls, some, **fields)
        begun.append((fields["start"], visits.logprobs.clone(), plain(cls, some).logprobs))
        return visits

    monkeypatch.setattr(LastVisits, "of", classmethod(of))
    fields = settings(tmp_path, tiny_model_dir, "run", max_steps=6, regenerate_every=2)
    fields |= {"objective": LAST}
    run_online(OnlineConfig.model_validate(fields))
    assert [start for start, _, _ in begun] == [0, 2, 4]
    torch.testing.assert_close(begun[0][1], begun[0][2], equal_nan=True)
    for _, known, references in begun[1:]:
        # Transformers tells what the sampled tokens were worth to the policy that moved away from its reference.
        assert (known - references).nan_to_num().abs().max() > 1e-3


def test_a_round_goes_on_with_what_it_saw(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Rounds of two prompts that are visited three times, stopped in the middle of the second."""
    write_inputs(tmp_path)
    fields = settings(tmp_path, tiny_model_dir, "whole", regenerate_every=3, prompts_per_round=2, save_total_limit=9)
    fields |= {"objective": LAST}
    run_online(OnlineConfig.model_validate(fields))
    whole, part = fields["output_dir"], tmp_path / "part"
    shutil.copytree(whole, part)
    for name in ("results.json", "report.html", "model"):
        path = part / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    for later in sorted((part / "checkpoints").glob("step-*"))[5:]:
        shutil.rmtree(later)
    kept = json.loads((part / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert kept["loop"]["last_visits"]["rows"], "of this round"
    ended = json.loads((whole / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert "last_visits" not in ended["loop"], "a new round has other candidates"
    run_online(OnlineConfig.model_validate(fields | {"output_dir": part, "resume": True}))
    first, second = weights(whole), weights(part)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "draws by outdated scores, and nothing here makes up for that: add acceptance: true"),
        ({"strategy": "uniform", "acceptance": True}, "proposals: last_visit is for strategy mc: 'uniform' does not draw"),
        ({"strategy": "max"}, "proposals: last_visit is for strategy mc: 'max' does not draw"),
    ],
)
def test_what_can_not_be_right_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MCPO(proposals="last_visit", **fields)


def test_a_mix_draws_by_one_kind_of_scores() -> None:
    sampler = Mix.model_validate({"parts": [LAST, "nca"]}).method().sampler
    assert sampler is not None
    assert sampler.last_visit
    assert sampler.accepts
    with pytest.raises(ValidationError, match="mc_po and mc_po_2 draw negatives by different scores"):
        Mix.model_validate({"parts": [LAST, "mc_po"]})

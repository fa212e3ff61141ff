"""Mixture-of-experts models: the loss that balances their routers, whatever the layout, and adapters on their experts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoePreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from conftest import build_tokenizer, weights
from ncalign.cli.app import main
from ncalign.model.adapters import quiet_peft
from ncalign.model.batching import GroupBatch
from ncalign.model.config import LoRA
from ncalign.model.logprobs import LogprobModel, Scored, chosen_logprobs, completion_logprobs, scored_completions
from ncalign.model.policy import load_policy, reference_mode
from ncalign.model.routing import RouterLoss, expert_use, load_balancing_loss, router_loss_of
from ncalign.model.sharing import share_prompts
from ncalign.objectives import MCPO, NLL, Mix, build_method
from ncalign.training.checkpoint import find_checkpoints
from ncalign.training.config import TrainConfig
from ncalign.training.engine import Engine, Scoring
from ncalign.training.loop import training_loss
from ncalign.training.memory import recompute_activations
from ncalign.training.train import run_training
from test_engine import groups
from test_logprobs import build
from test_sharing import RAGGED, batch_of

PICKED = 2
SIZES: dict[str, Any] = dict(
    vocab_size=384,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=PICKED,
    # Larger than the default .02: routers must differ from uniform.
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=3,
)
MODELS = {
    "mixtral": SIZES | dict(intermediate_size=48),
    "qwen3_moe": SIZES | dict(intermediate_size=48, moe_intermediate_size=24, head_dim=8),
    "olmoe": SIZES | dict(intermediate_size=24),
    # With a shared expert, and with layers whose hidden states are scaled.
    "qwen2_moe": SIZES | dict(moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "granitemoe": SIZES | dict(intermediate_size=24),
}
if "router_logits" not in GraniteMoePreTrainedModel._can_record_outputs:  # in transformers before 5.18
    del MODELS["granitemoe"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SELECT = torch.tensor([[2, 0], [-1, -1], [3, 1], [1, -1]])


def moe(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny random model with four experts in each of two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name]))
    if dtype == torch.float64:
        # torch multiplies all experts at once in lower precisions only, and from 2.9 on.
        model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def moe_folder(name: str, folder: Path) -> str:
    """A folder with a tiny model and its tokenizer."""
    tokenizer = build_tokenizer()
    assert len(tokenizer) <= SIZES["vocab_size"]
    moe(name, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def shared(name: str, **options: Any) -> PreTrainedModel:
    model = moe(name, **options)
    assert share_prompts(model) is None
    return model


def with_gradients(model: torch.nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], *, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    scale = max(float(gradient.norm()) for gradient in expected[1].values())
    assert scale > 1e-3
    # A head has no part in the router loss: some paths give it no gradient, others zeros.
    for name in found[1].keys() | expected[1].keys():
        zero = torch.zeros(())
        apart = float((found[1].get(name, zero) - expected[1].get(name, zero)).norm())
        assert apart <= tolerance * scale, name


def padded_oracle(model: PreTrainedModel, batch: GroupBatch, select: Tensor | None) -> tuple[float, dict[str, Tensor]]:
    """The loss by transformers on a padded row for each completion, with an attention mask."""
    cells = [list(range(len(span.completions))) for span in batch.spans] if select is None else select.tolist()
    rows = []
    for span, chosen in zip(batch.spans, cells, strict=True):
        prompt = batch.tokens[span.start : span.start + span.prompt]
        for k in (k for k in chosen if k >= 0):
            offset = span.offsets()[k]
            rows.append(torch.cat([prompt, batch.tokens[offset : offset + span.completions[k]]]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).router_logits
    return with_gradients(model, load_balancing_loss_func(logits, 4, PICKED, mask))


def router_loss(model: PreTrainedModel, scored: Scored) -> tuple[float, dict[str, Tensor]]:
    assert scored.expert_use is not None
    return with_gradients(model, load_balancing_loss(scored.expert_use, experts_per_token=PICKED))


@pytest.mark.parametrize("select", [None, SELECT], ids=["all candidates", "some"])
@pytest.mark.parametrize("name", MODELS)
def test_the_router_loss_is_that_of_padded_rows_in_every_layout(name: str, select: Tensor | None) -> None:
    batch, padded, once = batch_of(RAGGED), moe(name), shared(name)
    oracle = padded_oracle(padded, batch, select)
    rows = router_loss(padded, scored_completions(padded, batch, select=select, experts_per_token=PICKED))
    # transformers adds up in float32.
    assert_same(rows, oracle, tolerance=1e-6)
    together = scored_completions(once, batch, select=select, experts_per_token=PICKED)
    assert_same(router_loss(once, together), rows, tolerance=1e-6)
    everything = torch.tensor([[0, 1, 2, -1], [0, -1, -1, -1], [0, 1, 2, 3], [0, 1, -1, -1]])
    chosen = everything if select is None else select
    split = chosen_logprobs(once, batch, lambda scores: chosen, scoring=nullcontext(), experts_per_token=PICKED)
    assert_same(router_loss(once, split), rows, tolerance=1e-6)
    torch.testing.assert_close(split.expert_use, together.expert_use, rtol=1e-6, atol=1e-6)


def engine(model: PreTrainedModel, objective: MCPO | Mix | None = None) -> Engine:
    return Engine(
        LogprobModel(model),
        build_method(objective or MCPO()),
        Accelerator(cpu=True),
        pad_token_id=0,
        seed=3,
        max_groups=8,
        max_tokens=4096,
        router=RouterLoss(0.5, PICKED),
    )


def visit(engine: Engine, scoring: Scoring) -> tuple[float, float, dict[str, Tensor]]:
    """A pass's router loss, and its training loss with the gradients."""
    (part,) = engine.passes(range(3), groups())
    found = engine.train_pass(part, epoch=1, scoring=scoring)
    assert found.aux_loss is not None
    assert found.aux_loss.requires_grad
    return found.aux_loss.item(), *with_gradients(engine.model, training_loss(found, part, engine.router))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_what_enters_the_loss_counts_for_the_routers_however_it_was_scored(name: str) -> None:
    objective = MCPO(num_negatives=2, include_positive=True)
    plain = engine(moe(name), objective)
    aux, *expected = visit(plain, Scoring.APART)
    without = visit(replace(plain, router=RouterLoss(0.0, PICKED)), Scoring.APART)
    # Three groups in the pass; some versions of transformers round router logits to float32.
    assert expected[0] == pytest.approx(without[1] + 0.5 * 3 * aux, rel=1e-7)
    once = engine(shared(name), objective)
    checkpointed = engine(shared(name), objective)
    recompute_activations(checkpointed.inner.model)  # type: ignore[arg-type]
    for other, scoring in (
        (plain, Scoring.TOGETHER),
        (once, Scoring.APART),
        (once, Scoring.TOGETHER),
        (replace(once, prompts_once=True), Scoring.APART),
        (checkpointed, Scoring.APART),
        (replace(checkpointed, prompts_once=True), Scoring.APART),
    ):
        found_aux, *found = visit(other, scoring)
        assert found_aux == pytest.approx(aux, rel=1e-6)
        assert_same((found[0], found[1]), (expected[0], expected[1]), tolerance=1e-6)


@pytest.mark.parametrize("scoring", [Scoring.APART, Scoring.TOGETHER])
def test_what_several_parts_of_a_mix_chose_counts_for_the_routers_once(scoring: Scoring) -> None:
    alone, *_ = visit(engine(shared("mixtral"), MCPO()), scoring)
    mixed, *_ = visit(engine(shared("mixtral"), Mix(parts=(MCPO(), MCPO(beta=0.1, temperature=1.0), NLL()))), scoring)
    assert mixed == pytest.approx(alone, rel=1e-6)


def test_a_pass_in_which_nothing_enters_has_no_router_loss() -> None:
    model, none = shared("mixtral"), torch.full((4, 2), -1)
    batch = batch_of(RAGGED)
    for scored in (
        scored_completions(model, batch, select=none, experts_per_token=PICKED),
        chosen_logprobs(model, batch, lambda scores: none, scoring=nullcontext(), experts_per_token=PICKED),
    ):
        assert scored.expert_use is not None
        assert load_balancing_loss(scored.expert_use, experts_per_token=PICKED) == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_balanced_routers_have_the_loss_of_their_number_of_picks_and_one_sided_ones_more(name: str) -> None:
    model = moe(name)
    [found, notice] = router_loss_of(model, None)
    assert (found, notice) == (RouterLoss(model.config.router_aux_loss_coef, PICKED), "")
    alike = torch.eye(4).repeat(3, 1) + torch.eye(4).roll(1, 1).repeat(3, 1)
    assert load_balancing_loss(expert_use([9 * alike], [12], experts_per_token=2), experts_per_token=2) == pytest.approx(2.0)
    one_sided = torch.tensor([[99.0, 98.0, 0.0, 0.0]]).repeat(12, 1)
    assert load_balancing_loss(expert_use([one_sided], [12], experts_per_token=2), experts_per_token=2) == pytest.approx(4.0)


def test_the_weight_is_the_configurations_or_the_users_and_needs_routers() -> None:
    model, dense = moe("olmoe"), build("llama")
    assert router_loss_of(model, None) == (RouterLoss(0.01, PICKED), "")
    assert router_loss_of(model, 0.3) == (RouterLoss(0.3, PICKED), "")
    assert router_loss_of(model, 0.0) == (None, "")
    assert router_loss_of(dense, None) == router_loss_of(dense, 0.0) == (None, "")
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0\.1, and LlamaForCausalLM .* has no router loss: only"):
        router_loss_of(dense, 0.1)


def test_a_router_loss_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe("mixtral")
    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func", lambda *_: torch.tensor(0.7))
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has a router loss that ncalign does not know: set router_aux"):
        router_loss_of(model, None)
    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func", lambda *_: None)
    found, notice = router_loss_of(model, None)
    assert found is None
    assert notice.startswith("MixtralForCausalLM of transformers ")
    assert notice.endswith("has no router loss, although its config.json declares a weight for one")


def test_routers_whose_logits_are_not_recorded_have_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers then returns a loss of 0.
    model = moe("mixtral")
    forward = model.model.forward

    def unrecorded(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found.router_logits = None
        return found

    monkeypatch.setattr(model.model, "forward", unrecorded)
    found, notice = router_loss_of(model, None)
    assert found is None
    assert "has no router loss, although its config.json declares a weight for one" in notice
    with pytest.raises(ValueError, match="has no router loss"):
        router_loss_of(model, 0.1)


# --- Training ---------------------------------------------------------------------------------------------------------

PLAIN = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "experts": {"lora": {"r": 4, "target_parameters": EXPERTS, **PLAIN}},
    "experts alone": {"lora": {"r": 4, "target_parameters": EXPERTS, "target_modules": []}},
    "all linear": {"lora": {"r": 4}},
}


@pytest.fixture
def config(tmp_path: Path, groups_file: Path) -> Callable[..., TrainConfig]:
    """A run of a tiny mixture of experts on twelve groups, in the test's folder."""

    def make(name: str, architecture: str = "mixtral", **fields: Any) -> TrainConfig:
        values = {
            "model": moe_folder(architecture, tmp_path / architecture),
            "data": groups_file,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "dtype": "float32",
            "scoring_dtype": "float32",
            "report_to": (),
        }
        return TrainConfig.model_validate(values | fields)

    return make


def logged(config: TrainConfig) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(5, 25).unsqueeze(0)).logits
    return found


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_run_logs_the_router_loss_beside_the_loss(config: Callable[..., TrainConfig], architecture: str) -> None:
    run = config("run", architecture, eval_fraction=0.3, max_steps=2)
    flags = [f"--{name}={getattr(run, name)}" for name in ("model", "data", "output_dir", "cache_dir")]
    assert main(["train", *flags, "--dtype=float32", "--scoring_dtype=float32", "--eval_fraction=0.3", "--max_steps=2"]) == 0
    before, first, *_ = logged(run)
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for row in logged(run):
        (value,) = (row[name] for name in ("aux_loss", "eval/aux_loss") if name in row)
        assert 2.0 < value < 4.0


def test_the_router_loss_balances_the_routers(config: Callable[..., TrainConfig]) -> None:
    runs = [config(f"weight {weight}", router_aux_loss_coef=weight, num_train_epochs=4) for weight in (10.0, 1e-9)]
    ends = [run_training(run)["after"]["aux_loss"] for run in runs]
    assert ends[0] < min(ends[1], logged(runs[0])[0]["aux_loss"]) - 0.02


def test_a_weight_of_0_leaves_it_out(config: Callable[..., TrainConfig]) -> None:
    run = config("run", router_aux_loss_coef=0.0, max_steps=1)
    run_training(run)
    assert "aux_loss" not in logged(run)[0]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_the_reference_of_an_adapter_on_experts_is_the_model_itself(
    tmp_path: Path, architecture: str, fields: dict[str, Any]
) -> None:
    folder, batch = moe_folder(architecture, tmp_path / "moe"), batch_of(RAGGED)
    lora = LoRA.model_validate(fields["lora"])
    policy, plain = load_policy(folder, lora=lora), load_policy(folder)
    trained = {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert any(".experts." in name for name in trained)
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            weight += 0.1 * (name in trained)
        expected, moved = completion_logprobs(plain.model, batch), completion_logprobs(policy.model, batch)
        with reference_mode(policy.model):
            assert torch.equal(completion_logprobs(policy.model, batch), expected)
    assert (moved - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("architecture", "adapter"), [("mixtral", "experts"), ("qwen3_moe", "experts alone"), ("olmoe", "all linear")]
)
def test_an_adapter_on_experts_is_resumed_merged_and_trained_on(
    config: Callable[..., TrainConfig], architecture: str, adapter: str
) -> None:
    fields = {"save_steps": 1, "activation_checkpointing": True, **ADAPTERS[adapter]}
    run, merged = config("run", architecture, **fields), config("merged", architecture, merge=True, **fields)
    run_training(run)
    run_training(merged)
    whole, rows = weights(run.output_dir), logged(run)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    plain = logits(base)
    with quiet_peft():
        adapted = logits(PeftModel.from_pretrained(base, run.output_dir / "model"))
    assert float((adapted - plain).abs().max()) > 1e-2
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(merged.output_dir / "model", dtype=torch.float32)),
        adapted,
        atol=1e-4,
        rtol=1e-4,
    )
    # As a kill after the second step would have left it.
    shutil.rmtree(run.output_dir / "model")
    (run.output_dir / "results.json").unlink()
    for folder in find_checkpoints(run.output_dir)[1:]:
        shutil.rmtree(folder)
    run_training(run.model_copy(update={"resume": True}))
    again = weights(run.output_dir)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert logged(run) == rows
    further = config("further", architecture, max_steps=1, **ADAPTERS[adapter])
    further = further.model_copy(update={"model": str(run.output_dir / "model")})
    run_training(further)
    assert logged(further)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dropout_on_parameters_and_unknown_parameters_are_refused_in_words(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = moe_folder("mixtral", tmp_path / "moe")
    with pytest.raises(ValueError, match=r"dropout \(0\.1\) must be 0 with target_parameters"):
        LoRA(dropout=0.1, target_parameters=tuple(EXPERTS))
    with pytest.raises(
        ValueError, match=r"lora\.dropout \(0\.1\) must be 0: lora\.target_modules='all-linear' takes in the ex"
    ):
        load_policy(folder, lora=LoRA(dropout=0.1))
    expected = (
        r"lora\.target_parameters: 'experts\.w1' is no parameter of .*; its experts' are mlp\.experts\.down_proj, mlp\.ex"
    )
    with pytest.raises(ValueError, match=expected):
        load_policy(folder, lora=LoRA(target_parameters=("experts.w1",)))
    with pytest.raises(ValueError, match=r"'experts\.w1' is no parameter of .*; its experts' are modules of their own"):
        load_policy(str(tiny_model_dir), lora=LoRA(target_parameters=("experts.w1",)))


def test_experts_train_in_float64(config: Callable[..., TrainConfig]) -> None:
    run = config("run", dtype="float64", scoring_dtype="float64", max_steps=1)
    run_training(run)
    assert logged(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-9)

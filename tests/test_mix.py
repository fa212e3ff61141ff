"""Mixes: sums by hand and of the methods alone, gradients, levels, what does not mix, TRL's lists, a step, a resumed run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from ncalign.core.config import Frozen
from ncalign.objectives import (
    BCO,
    DPO,
    EXO,
    KTO,
    MCPO,
    NCA,
    NLL,
    QRPO,
    RNCE,
    BiasedNCA,
    LossInputs,
    Method,
    Mix,
    ObjectiveConfig,
    SimPO,
    build_method,
    weighted_sum,
)
from ncalign.training.config import TrainConfig
from ncalign.training.engine import Scoring
from ncalign.training.train import run_training
from test_engine import engine, visit
from test_methods import loss_of, numbers, rewards_for
from trl_losses import assert_trls, dpo_trainer, random_groups

CONFIGS: tuple[Any, ...] = tuple(config for config in get_args(get_args(ObjectiveConfig)[0]) if config is not Mix)
MPO = {"name": "mix", "parts": ["dpo", "bco", "nll"], "weights": [0.8, 0.2, 1.0]}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gradient_of(value: Tensor, of: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value.sum(), of)
    return gradient


# --- Values -----------------------------------------------------------------------------------------------------------


def test_mpo_and_its_gradient_by_hand() -> None:
    """A pair, chosen first: log-ratios 0.6 and -0.8, log-probs -1.4 and -2.8, three tokens each; no shift."""
    method = Mix.model_validate({**MPO, "parts": [{"name": "dpo", "beta": 0.5}, {"name": "bco", "beta": 0.3}, "nll"]}).method()
    ratios = torch.tensor([[0.6, -0.8]], dtype=torch.float64, requires_grad=True)
    value = loss_of(method, ratios, torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))
    dpo, bco, nll = -math.log(sigmoid(0.5 * 1.4)), -math.log(sigmoid(0.3 * 0.6)) - math.log(sigmoid(0.3 * 0.8)), 1.4 / 3
    assert value.item() == pytest.approx(0.8 * dpo + 0.2 * bco + 1.0 * nll, abs=1e-12)
    slopes = (
        -0.8 * 0.5 * sigmoid(-0.7) - 0.2 * 0.3 * sigmoid(-0.18) - 1.0 / 3,
        0.8 * 0.5 * sigmoid(-0.7) + 0.2 * 0.3 * sigmoid(-0.24),
    )
    assert gradient_of(value, ratios)[0].tolist() == pytest.approx(slopes, abs=1e-12)


def mixable(first: Method, second: Method) -> bool:
    levels = {method.hooks.baseline for method in (first, second)} - {None}
    return len(levels) < 2 and all(method.hooks.rewards_from is None for method in (first, second))


@pytest.mark.parametrize("second", [NCA(), MCPO(beta=0.7, log_q_correction=True), DPO(pairing="best_vs_each"), NLL()], ids=repr)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_fields["name"].default)
def test_every_method_mixes_to_the_sum_of_the_two_alone(config: type[Frozen], second: Any) -> None:
    methods = [(QRPO(reference_rewards="candidates") if config is QRPO else config()).method(), second.method()]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 2 + [False] * 3])
    ratios = numbers(3, 5).requires_grad_()
    rewards = rewards_for(methods[0], 3, 5)
    for order in (1, -1):
        mix = weighted_sum("both", methods[::order], weights=[0.25, 3.0][::order])
        for row in range(3):
            # A loop gives each group's own columns to the sampler.
            own = (slice(row, row + 1), slice(0, int(mask[row].sum())))
            value = loss_of(mix, ratios[own], rewards[own], mask[own], seed=row)
            alone = [loss_of(method, ratios[own], rewards[own], mask[own], seed=row) for method in methods]
            expected = 0.25 * alone[0] + 3.0 * alone[1]
            close(value, expected)
            close(gradient_of(value, ratios), gradient_of(expected, ratios))


def test_the_shares_are_the_weighted_parts_and_sum_to_the_loss() -> None:
    method = weighted_sum("m", [DPO(beta=0.1).method(), DPO(beta=0.5).method(), NCA().method()], weights=[1.0, 2.0, 0.5])
    assert method.sampler is not None
    assert method.hooks.shares is not None
    ratios, rewards, mask = numbers(4, 3), numbers(4, 3, seed=1), torch.ones(4, 3, dtype=torch.bool)
    columns = method.sampler.select(None, rewards, mask, torch.Generator().manual_seed(0))
    assert columns.shape == (4, 9)
    values = [value.gather(1, columns.clamp(min=0)) for value in (ratios, ratios - 2, rewards, torch.full_like(ratios, 3.0))]
    inputs = LossInputs(*values, mask=columns >= 0)
    shares = method.hooks.shares(inputs)
    assert list(shares) == ["dpo", "dpo_2", "nca"]
    assert torch.equal(sum(shares.values(), torch.zeros(4, dtype=torch.float64)), method.loss(inputs))
    # Both draw the same negative: the second is DPO with five times the beta, twice.
    margin = values[0][:, 0] - values[0][:, 1]
    close(shares["dpo"], -(0.1 * margin).sigmoid().log())
    close(shares["dpo_2"], -2 * (0.5 * margin).sigmoid().log())


def test_a_level_is_scaled_to_the_beta_of_the_part_that_measures_from_it() -> None:
    ratios, rewards, mask = numbers(4, 2), torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.ones(4, 2, dtype=torch.bool)
    for part in (BCO(beta=0.2), KTO(beta=0.2)):
        mix = weighted_sum("m", [NCA(beta=0.5).method(), part.method()])
        assert mix.beta == 0.5
        assert mix.hooks.baseline == part.method().hooks.baseline
        columns = torch.tensor([[0, 1, 0, 1]]).expand(4, 4)
        values = [value.gather(1, columns) for value in (ratios, ratios, rewards, torch.ones_like(ratios))]
        inputs = LossInputs(*values, mask=columns >= 0, baseline=0.5 * 1.5)  # 1.5 nats
        single = LossInputs(ratios, ratios, rewards, torch.ones_like(ratios), mask)
        # NCA has no level: only the other part's scores are measured from 0.2 times 1.5.
        expected = NCA(beta=0.5).method().loss(single) + part.method().loss(replace(single, baseline=0.2 * 1.5))
        close(mix.loss(inputs), expected)


def test_metrics_and_beta_are_those_of_the_first_part_with_negatives_and_no_more_is_scored_than_parts_read() -> None:
    rewards, mask = torch.tensor([[0.9, 0.9, 0.1, 0.4]]), torch.ones(1, 4, dtype=torch.bool)
    mix = weighted_sum("m", [NLL().method(), DPO(beta=0.3).method(), MCPO(beta=0.6, num_negatives=2).method()])
    assert mix.beta == 0.3
    assert mix.sampler is not None
    assert mix.sampler.reads is not None
    assert mix.sampler.size == 1 + 1 + 2
    assert mix.sampler.reads(rewards, mask).tolist() == [[False, False, True, True]]
    columns = mix.sampler.select(torch.zeros(1, 4), rewards, mask, torch.Generator().manual_seed(0))
    pair, drawn, chosen = columns.view(3, 3).tolist()
    assert len({pair[0], drawn[0], chosen[0]}) == 1
    assert pair[2] == -1
    assert pair[1] in (2, 3)
    assert sorted(drawn[1:]) == [2, 3]
    assert chosen[1:] == [-1, -1]
    # NCA takes all, the positive first and the tied one too.
    whole = weighted_sum("m", [NCA().method(), DPO().method()]).sampler
    assert whole is not None
    assert (whole.size, whole.reads, whole.scores) == (None, None, None)
    every = whole.select(None, rewards, mask, torch.Generator().manual_seed(0)).view(2, 4).tolist()
    assert every[0] == [every[1][0], 1 - every[1][0], 2, 3]


def test_what_is_fitted_to_the_data_is_fitted_in_a_mix() -> None:
    rewards, mask = numbers(8, 4, seed=1), torch.ones(8, 4, dtype=torch.bool)
    parts = [NCA(target_entropy=0.5).method(), DPO().method()]
    mix = weighted_sum("m", parts)
    assert mix.hooks.fit is not None
    assert parts[0].hooks.fit is not None
    fitted, alone = mix.hooks.fit(rewards, mask), [parts[0].hooks.fit(rewards, mask), parts[1]]
    ratios = numbers(8, 4)
    close(loss_of(fitted, ratios, rewards, mask), sum(loss_of(method, ratios, rewards, mask) for method in alone))
    assert fitted.hooks.target_weights is not None
    assert alone[0].hooks.target_weights is not None
    close(fitted.hooks.target_weights(rewards, mask), alone[0].hooks.target_weights(rewards, mask))
    assert weighted_sum("m", [DPO().method(), EXO().method()]).hooks.fit is None


def test_a_group_is_refused_by_the_first_part_that_can_not_use_it() -> None:
    mix = build_method(Mix.model_validate(MPO))
    assert mix.refuse([1.0, 0.0]) is None
    assert mix.refuse([1.0, 1.0]) == "dpo: all rewards equal"
    assert mix.refuse([0.7, 0.0]) == (
        "bco: reward 0.7 is no label: give 1 for desirable and 0 for undesirable, or set the objective's threshold"
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["kto", "bco"], "mix: kto and bco measure scores from different levels: leave one of them out"),
        (["dpo", "qrpo"], "mix: qrpo replaces the rewards as the data is read"),
        (
            ["mc_po", {"name": "mc_po", "kernel_score": "policy_logprob"}],
            "mix: mc_po and mc_po_2 draw negatives by different scores",
        ),
        (["dpo"], "at least 2 items"),
        (["dpo", "mix"], "does not match any of the expected tags"),
    ],
)
def test_what_does_not_mix_is_refused_by_name(parts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mix.model_validate({"parts": parts})


def test_weights_are_one_for_each_part_and_above_zero() -> None:
    with pytest.raises(ValueError, match="1 weights for 2 parts"):
        Mix.model_validate({"parts": ["dpo", "nll"], "weights": [1.0]})
    with pytest.raises(ValueError, match="greater than 0"):
        Mix.model_validate({"parts": ["dpo", "nll"], "weights": [1.0, 0.0]})
    with pytest.raises(ValueError, match=r"m: weights \[1.0, -1.0\] for 2 parts"):
        weighted_sum("m", [DPO().method(), NCA().method()], weights=[1.0, -1.0])
    mix = weighted_sum("m", [DPO().method(), NCA().method()])
    with pytest.raises(ValueError, match="m: m is a mix itself: give its parts instead"):
        weighted_sum("m", [mix, SimPO().method()])


# --- TRL's lists ------------------------------------------------------------------------------------------------------


def test_mixes_are_trls_lists_of_losses() -> None:
    """One pair a batch, where TRL's NLL, a mean over all tokens of a batch, is that of one completion."""
    theirs = dpo_trainer(["sigmoid", "bco_pair", "sft"], weights=[0.8, 0.2, 1.5], pairing="best_vs_worst", beta=0.3)
    pairing = {"beta": 0.3, "pairing": "best_vs_worst"}
    parts = [DPO.model_validate(pairing), BiasedNCA.model_validate(pairing), NLL()]
    assert_trls(Mix(parts=tuple(parts), weights=(0.8, 0.2, 1.5)), theirs, random_groups())


# --- The loop ---------------------------------------------------------------------------------------------------------


def test_what_several_parts_chose_passes_through_the_model_once(tiny_model: LlamaForCausalLM) -> None:
    embedded: list[int] = []
    hook = tiny_model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(args[0].numel()))

    def tokens(config: Any) -> int:
        made = engine(tiny_model, config)  # which tries out whether prompts can be shared
        embedded.clear()
        visit(made, Scoring.NONE)
        return sum(embedded)

    pair, every = tokens(DPO()), tokens(NCA())
    assert pair < every
    assert tokens(Mix(parts=(DPO(), RNCE(num_negatives=1), NLL()))) == pair
    assert tokens(Mix(parts=(NLL(), DPO(), NCA()))) == every
    hook.remove()


@pytest.mark.parametrize("prompts_once", [False, True])
def test_a_step_of_a_mix_is_the_sum_of_its_parts_steps(tiny_model: LlamaForCausalLM, prompts_once: bool) -> None:
    parts: list[Any] = [MCPO(beta=0.5), NCA(beta=0.2), NLL()]
    mix = Mix(parts=tuple(parts), weights=(1.0, 2.0, 0.5))
    whole, gradients = visit(replace(engine(tiny_model, mix), prompts_once=prompts_once), Scoring.APART)
    alone = [visit(engine(tiny_model, part), Scoring.APART if part.name == "mc_po" else Scoring.NONE) for part in parts]
    assert whole.shares is not None
    for weight, part, (result, _) in zip((1.0, 2.0, 0.5), parts, alone, strict=True):
        torch.testing.assert_close(whole.shares[part.name], weight * result.loss)
        assert torch.equal(result.positive, whole.positive)
    assert torch.equal(whole.negatives[:, :1], alone[0][0].negatives)
    assert whole.kernel is not None
    torch.testing.assert_close(whole.kernel, alone[0][0].kernel)
    for name, gradient in gradients.items():
        expected = alone[0][1][name] + 2.0 * alone[1][1][name] + 0.5 * alone[2][1][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def logged(folder: Path) -> list[dict[str, float]]:
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_mpo_trains_logs_its_shares_and_resumes_bitwise(
    tmp_path: Path, tiny_model_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = [
        {"prompt": f"What is {i} plus {i}?", "chosen": f"The answer is {2 * i}.", "rejected": "The quick brown fox"}
        for i in range(6)
    ]
    fields = {
        "model": str(tiny_model_dir),
        "data": write_jsonl(rows),
        "cache_dir": tmp_path / "cache",
        "objective": MPO,
        "report_to": (),
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
    }
    whole, halted = (TrainConfig.model_validate({**fields, "output_dir": tmp_path / name}) for name in ("whole", "halted"))
    results = run_training(whole)
    steps = [row for row in logged(whole.output_dir) if "loss" in row]
    assert steps[0]["loss/dpo"] == pytest.approx(0.8 * math.log(2), abs=1e-5)
    assert steps[0]["loss/bco"] == pytest.approx(0.2 * 2 * math.log(2), abs=1e-5)
    for row in steps:
        assert row["loss"] == pytest.approx(row["loss/dpo"] + row["loss/bco"] + row["loss/nll"], rel=1e-6)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert results["method"] == "mix"
    # Back to the first checkpoint, as a kill would have left it.
    run_training(halted)
    for folder in sorted((halted.output_dir / "checkpoints").iterdir())[1:]:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    (halted.output_dir / "results.json").unlink()
    run_training(halted.model_copy(update={"resume": True}))
    weights = [load_file(run.output_dir / "model" / "model.safetensors") for run in (whole, halted)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert logged(halted.output_dir) == logged(whole.output_dir)

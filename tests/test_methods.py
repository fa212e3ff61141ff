"""Every method of the configuration, by one set of rules: gradients, padding, order, extremes, and one step of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ncalign.core.config import Frozen
from ncalign.objectives import LossInputs, Method, ObjectiveConfig, build_method
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training

CONFIGS: tuple[type[Frozen], ...] = get_args(get_args(ObjectiveConfig)[0])
LABELLED = ("kto", "bco")
MIXED: dict[str, Any] = {"parts": ["rpo", "nca", "nll"], "weights": [0.5, 1.0, 0.1]}
DOCS = Path(__file__).resolve().parent.parent / "docs" / "methods"
methods = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_fields["name"].default)


def made(config: type[Frozen]) -> Method:
    """The method with its defaults; a mix has none of its parts."""
    name = config.model_fields["name"].default
    return build_method(config.model_validate(MIXED if name == "mix" else {}))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rewards_for(method: Method, num_groups: int, num_candidates: int, seed: int = 1) -> Tensor:
    """Rewards that the method takes: labels where it wants labels, shares in (0, 1) elsewhere."""
    values = numbers(num_groups, num_candidates, seed=seed).sigmoid()
    return (values > 0.5).double() if method.name in LABELLED else values


def loss_of(method: Method, log_ratios: Tensor, rewards: Tensor, mask: Tensor, *, seed: int = 0) -> Tensor:
    """What a training step does with a method: completions of three tokens, log-prob -2 nats under the reference."""
    values, present, log_q = [log_ratios, rewards], mask, None
    if method.sampler is not None:
        read = method.sampler.scores
        scores = None if read is None else method.beta * read(log_ratios - 2, torch.full_like(log_ratios, -2.0)).detach()
        columns = method.sampler.select(scores, rewards, mask, torch.Generator().manual_seed(seed))
        values, present = [value.gather(1, columns.clamp(min=0)) for value in values], columns >= 0
        if method.sampler.log_q is not None:
            log_q = method.sampler.log_q(scores, rewards, mask, columns)
    ratios, entering_rewards = values
    lengths = torch.full_like(ratios, 3.0)
    return method.loss(LossInputs(ratios, ratios - 2, entering_rewards, lengths, present, log_q))


@methods
def test_the_name_is_its_own_and_has_a_page(config: type[Frozen]) -> None:
    name = config.model_fields["name"].default
    assert made(config).name == name
    pages = [page for page in DOCS.glob("*.md") if f"name: {name}\n" in page.read_text(encoding="utf-8")]
    assert pages, f"no page in docs/methods shows how {name} is configured"
    assert sum(other.model_fields["name"].default == name for other in CONFIGS) == 1


@methods
def test_gradient(config: type[Frozen]) -> None:
    method = made(config)
    rewards, mask = rewards_for(method, 3, 4), torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    assert torch.autograd.gradcheck(lambda x: loss_of(method, x, rewards, mask), (numbers(3, 4).requires_grad_(),), atol=1e-7)


@methods
@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e4])
def test_padding_reaches_neither_value_nor_gradient(config: type[Frozen], junk: float) -> None:
    method = made(config)
    log_ratios, rewards = numbers(1, 3), rewards_for(method, 1, 3)
    plain = log_ratios.clone().requires_grad_()
    padded = torch.cat([log_ratios, torch.full((1, 2), junk)], dim=1).requires_grad_()
    mask = torch.tensor([[True] * 3 + [False] * 2])
    # A loop gives a group's own columns to the sampler, so that padding changes no draw; two candidates leave nothing to draw.
    two = torch.tensor([[True, True, False]])
    value = loss_of(method, plain, rewards, two)
    padded_rewards = torch.cat([rewards, torch.full((1, 2), junk)], dim=1)
    padded_value = loss_of(method, padded, padded_rewards, torch.cat([two, mask[:, 3:]], dim=1))
    torch.testing.assert_close(padded_value, value, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), plain)
    (padded_gradient,) = torch.autograd.grad(padded_value.sum(), padded)
    torch.testing.assert_close(padded_gradient[:, :3], gradient, rtol=0, atol=1e-12)
    assert padded_gradient[:, 2:].tolist() == [[0.0] * 3]


@methods
def test_order_of_the_candidates_does_not_matter(config: type[Frozen]) -> None:
    method = made(config)
    if method.name == "cd":
        pytest.skip("its kernel draws the positive too: what a seed draws depends on the columns, its distribution does not")
    log_ratios, rewards, mask = numbers(4, 2), rewards_for(method, 4, 2), torch.ones(4, 2, dtype=torch.bool)
    value = loss_of(method, log_ratios, rewards, mask)
    swapped = loss_of(method, log_ratios.flip(1), rewards.flip(1), mask)
    torch.testing.assert_close(swapped, value, rtol=0, atol=1e-12)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_extremes_stay_finite(config: type[Frozen], dtype: torch.dtype, tied: bool, size: int) -> None:
    method = made(config)
    rewards = rewards_for(method, 3, size).to(dtype)
    rewards = torch.ones_like(rewards) if tied else rewards
    signs = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=dtype)[:, :size]
    log_ratios = (1e4 / method.beta * signs).requires_grad_()
    value = loss_of(method, log_ratios, rewards, torch.ones(3, size, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value.sum(), log_ratios, allow_unused=True)
    assert value.isfinite().all()
    assert gradient is None or gradient.isfinite().all()


@methods
def test_a_group_without_candidates_gives_zero(config: type[Frozen]) -> None:
    method = made(config)
    nothing = torch.full((2, 3), math.nan, dtype=torch.float64, requires_grad=True)
    value = loss_of(method, nothing, nothing.detach(), torch.zeros(2, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value.sum(), nothing, allow_unused=True)
    assert value.tolist() == [0.0, 0.0]
    assert gradient is None or gradient.abs().sum().item() == 0.0


@methods
def test_one_step_of_training_raises_the_best_candidate_against_the_others(
    config: type[Frozen], tmp_path: Path, tiny_model_dir: Path, write_jsonl
) -> None:
    method = made(config)
    rows = [
        {
            "id": f"g{i}",
            "prompt": f"What is {i} plus {i}?",
            "candidates": [
                {"completion": f"The answer is {2 * i}.", "reward": 1.0},
                {"completion": "No.", "reward": 0.0},
                {"completion": "The quick brown fox", "reward": 0.0 if method.name in LABELLED else 0.25},
            ],
            "metadata": {"reference_rewards": [0.0, 0.2, 0.6, 0.9]},
        }
        for i in range(8)
    ]
    run = TrainConfig.model_validate(
        {
            "model": str(tiny_model_dir),
            "data": write_jsonl(rows),
            "output_dir": tmp_path / "run",
            "cache_dir": tmp_path / "cache",
            "objective": {"name": method.name, **(MIXED if method.name == "mix" else {})},
            "report_to": (),
            "learning_rate": 5e-4,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "num_train_epochs": 8,
            "eval_data": write_jsonl(rows, "eval.jsonl"),
        }
    )
    results = run_training(run)
    assert results["before"]["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert results["after"]["eval/loss"] < results["before"]["eval/loss"]
    assert results["after"]["eval/logps/chosen_change"] - results["after"]["eval/logps/rejected_change"] > 0.02

"""A method from outside the package: trained with by our trainer, and our objectives in a loop of one's own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ncalign import completion_logprobs, encode_groups, read_groups
from ncalign.objectives import (
    LossInputs,
    Method,
    ObjectiveConfig,
    all_below,
    compose,
    info_nca_loss,
    mean_over_negatives,
    needs_preference,
    one_below,
    rnce_loss,
)
from ncalign.objectives.kernels import eligible_negatives, pick_positive, sample_negatives
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training


def hinge_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.relu(1 - (chosen - rejected))


def margin_loss(values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    real = mask[:, 1:] & mask[:, :1]
    gaps = torch.where(real, rewards[:, :1] - rewards[:, 1:], 0.0)
    reached = torch.where(real, values[:, :1] - values[:, 1:], 0.0)
    return torch.relu(gaps - reached).sum(dim=1) / real.sum(dim=1).clamp(min=1)


HINGE = compose(
    "hinge",
    beta=0.1,
    loss=mean_over_negatives(hinge_loss),
    sampler=one_below(),
    refuse=needs_preference,
)
MARGIN = compose("margin", beta=0.1, loss=margin_loss, sampler=all_below(), refuse=needs_preference)


def mean_gap(groups_file: Path) -> float:
    """Mean over the groups of the mean reward by which the best stands above each of the others."""
    gaps = []
    for group in read_groups(groups_file):
        rewards = [candidate.reward for candidate in group.candidates if candidate.reward is not None]
        below = [max(rewards) - reward for reward in rewards if reward < max(rewards)]
        gaps.append(sum(below) / len(below))
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("method", [HINGE, MARGIN], ids=lambda method: method.name)
def test_the_first_logged_loss_is_the_value_at_the_reference(
    method: Method, tmp_path: Path, tiny_model_dir: Path, groups_file: Path
) -> None:
    config = TrainConfig(
        model=str(tiny_model_dir),
        data=groups_file,
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        max_steps=2,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        per_device_train_batch_size=12,
        report_to=(),
    )
    results = run_training(config, method=method)
    assert results["method"] == method.name
    first, second = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:2])
    expected = 1.0 if method is HINGE else mean_gap(groups_file)
    assert first["loss"] == pytest.approx(expected, abs=1e-4)
    # The one step between has moved the policy along the gradient.
    assert second["loss"] < first["loss"] - 1e-3
    assert second["rewards/margins"] > 1e-3


def test_away_from_the_reference_the_loss_is_its_formula() -> None:
    log_ratios = torch.tensor([[3.0, -1.0, 2.0]])
    rewards, mask = torch.tensor([[1.0, 0.5, 0.2]]), torch.ones(1, 3, dtype=torch.bool)
    inputs = LossInputs(log_ratios, log_ratios, rewards, torch.ones(1, 3), mask)
    # r = 0.3, -0.1, 0.2: differences 0.4 and 0.1; reward gaps 0.5 and 0.8.
    torch.testing.assert_close(HINGE.loss(inputs), torch.tensor([((1 - 0.4) + (1 - 0.1)) / 2]))
    torch.testing.assert_close(MARGIN.loss(inputs), torch.tensor([((0.5 - 0.4) + (0.8 - 0.1)) / 2]))


def test_info_nca_in_a_plain_loop(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, groups_file: Path
) -> None:
    batch = encode_groups(tiny_tokenizer, read_groups(groups_file))
    with torch.no_grad():
        reference = completion_logprobs(tiny_model, batch)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        implicit_rewards = 0.1 * (completion_logprobs(tiny_model, batch) - reference)
        loss = info_nca_loss(implicit_rewards, batch.rewards, batch.candidate_mask, alpha=0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    sizes = [len(group.candidates) for group in read_groups(groups_file)]
    assert losses[0] == pytest.approx(sum(map(math.log, sizes)) / len(sizes), abs=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-4


def test_mc_po_in_a_plain_loop_runs_the_model_on_what_was_drawn(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, groups_file: Path
) -> None:
    batch = encode_groups(tiny_tokenizer, read_groups(groups_file))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        everything = completion_logprobs(tiny_model, batch)
    reference = everything - torch.randn(everything.shape, generator=generator)  # log-ratios of about 1 nat
    implicit_rewards = 0.5 * (everything - reference)
    positive = pick_positive(batch.rewards, batch.candidate_mask, generator=generator)
    allowed = eligible_negatives(batch.rewards, positive, batch.candidate_mask)
    negatives = sample_negatives(implicit_rewards, positive, allowed, num_negatives=1, strategy="mc", generator=generator)
    assert allowed.gather(1, negatives).all()
    columns = torch.cat([positive[:, None], negatives], dim=1)
    drawn = 0.5 * (completion_logprobs(tiny_model, batch, select=columns) - reference.gather(1, columns))
    loss = rnce_loss(drawn, torch.zeros_like(positive), columns >= 0)
    margin = implicit_rewards.gather(1, columns[:, :1]) - implicit_rewards.gather(1, columns[:, 1:])
    torch.testing.assert_close(loss.detach(), torch.log1p(torch.exp(-margin.squeeze(1))), rtol=0, atol=1e-4)


def test_every_named_method_has_a_row_in_the_table_and_a_page_behind_it() -> None:
    folder = Path(__file__).resolve().parent.parent / "docs" / "methods"
    lines = (folder / "index.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|") for line in lines if re.match(r"^\| \[", line)]
    union, _ = get_args(ObjectiveConfig)
    assert sorted(row[2].strip(" `") for row in rows) == sorted(
        config.model_fields["name"].default for config in get_args(union)
    )
    for row in rows:
        assert (folder / row[1].split("(")[1].split(")")[0]).is_file(), row[1]

"""A visit's loss and gradients do not depend on how its scores were had, and nothing is scored that nobody reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from ncalign.model.encoding import EncodedGroup
from ncalign.model.logprobs import LogprobModel
from ncalign.model.sharing import share_prompts
from ncalign.objectives import MCPO
from ncalign.objectives.kernels import effective_sample_size
from ncalign.training.engine import Engine, Scoring
from ncalign.training.metrics import PassResult


def groups() -> list[EncodedGroup]:
    """Three groups of ragged candidates; the last has a tie at the top."""
    source = np.random.default_rng(0)
    sizes = [(9, (4, 7, 2, 5)), (3, (6, 1, 8)), (5, (3, 4, 5, 6, 2))]
    rewards = [(0.1, 0.9, 0.4, 0.3), (1.0, 0.0, 0.5), (0.2, 0.7, 0.7, 0.1, 0.0)]

    def some(length: int) -> np.ndarray:
        return source.integers(10, 300, length, dtype=np.int32)

    return [
        EncodedGroup(
            str(i), "", some(prompt), tuple(map(some, lengths)), rewards[i], tuple(-5.0 - k for k in range(len(lengths)))
        )
        for i, (prompt, lengths) in enumerate(sizes)
    ]


def engine(model: LlamaForCausalLM, objective: Any) -> Engine:
    assert share_prompts(model) is None
    return Engine(
        LogprobModel(model), objective.method(), Accelerator(cpu=True), pad_token_id=0, seed=3, max_groups=8, max_tokens=4096
    )


def visit(engine: Engine, scoring: Scoring) -> tuple[PassResult, dict[str, torch.Tensor]]:
    engine.model.zero_grad()
    (part,) = engine.passes(range(3), groups())
    found = engine.train_pass(part, epoch=1, scoring=scoring)
    found.loss.sum().backward()
    return found, {name: weight.grad for name, weight in engine.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    "objective", [MCPO(), MCPO(num_negatives=2, include_positive=True)], ids=["one", "two and the positive"]
)
def test_ways_to_score_agree(tiny_model: LlamaForCausalLM, objective: MCPO) -> None:
    plain = engine(tiny_model, objective)
    expected, gradients = visit(plain, Scoring.TOGETHER)
    assert sum(float(gradient.abs().sum()) for gradient in gradients.values()) > 0
    for other in (plain, replace(plain, prompts_once=True)):
        found, others = visit(other, Scoring.APART)
        torch.testing.assert_close(found.loss, expected.loss)
        assert torch.equal(found.negatives, expected.negatives)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompts_once", [False, True])
def test_only_what_can_be_drawn_is_scored(tiny_model: LlamaForCausalLM, prompts_once: bool) -> None:
    whole = replace(engine(tiny_model, MCPO()), prompts_once=prompts_once)
    found, _ = visit(whole, Scoring.APART)
    # The longest group comes first. Known: the candidates below the best, and the positive, from the pass that trains.
    expected = [[True] * 4 + [False], [True] * 5, [True] * 3 + [False] * 2]
    expected[1][3 - int(found.positive[1])] = False  # the one that is tied with the positive
    assert (~found.logprobs.isnan()).tolist() == expected


def test_rounded_scores_leave_the_loss_exact(tiny_model: LlamaForCausalLM) -> None:
    exact = replace(engine(tiny_model, MCPO()), prompts_once=True)
    rounded = replace(exact, scoring_dtype=torch.bfloat16)
    (first, _), (second, _) = visit(exact, Scoring.APART), visit(rounded, Scoring.APART)
    other = ~first.logprobs.isnan()
    other.scatter_(1, first.positive.unsqueeze(1), False).scatter_(1, first.negatives, False)
    assert (first.logprobs != second.logprobs)[other].all()  # these were scored in bfloat16 and only read
    assert torch.equal(first.negatives, second.negatives)
    torch.testing.assert_close(first.loss, second.loss)


def test_accepted_proposals(tiny_model: LlamaForCausalLM) -> None:
    """Proposed by the exact scores, the acceptance depends only on how likely positive and negative are among the states."""
    whole = replace(engine(tiny_model, MCPO(acceptance=True)), prompts_once=True)
    found, _ = visit(whole, Scoring.APART)
    states = found.mask.clone()
    for row, rewards in enumerate(found.rewards):
        states[row] &= (rewards < rewards.nan_to_num(-1).max()) | (torch.arange(5) == found.positive[row])
    model = (0.1 * found.log_ratios).masked_fill(~states, -torch.inf).softmax(dim=1)
    odds = (1 - model.gather(1, found.positive.unsqueeze(1))) / (1 - model.gather(1, found.negatives))
    torch.testing.assert_close(found.loss, (1 + odds.squeeze(1)).log())


def test_blind_proposals_need_no_scores_and_are_dpo(tiny_model: LlamaForCausalLM) -> None:
    accepting = engine(tiny_model, MCPO(strategy="uniform", acceptance=True))
    assert accepting.scoring(groups(), at_reference=False) is Scoring.NONE
    (found, _), (plain, _) = (visit(one, Scoring.NONE) for one in (accepting, engine(tiny_model, MCPO(strategy="uniform"))))
    assert torch.equal(found.loss, plain.loss)
    r = 0.1 * found.log_ratios
    margin = r.gather(1, found.positive.unsqueeze(1)) - r.gather(1, found.negatives)
    torch.testing.assert_close(found.loss, -margin.squeeze(1).sigmoid().log())


@pytest.mark.parametrize(
    "fields",
    [{"num_negatives": 2}, {"strategy": "max"}, {"include_positive": True}, {"num_proposals": 1}, {"log_q_correction": True}],
)
def test_acceptance_is_of_one_proposal(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="acceptance needs one proposal"):
        MCPO(acceptance=True, **fields)


def test_the_probability_of_acceptance_is_told_and_weighs_the_gradient(tiny_model: LlamaForCausalLM) -> None:
    for objective in (MCPO(acceptance=True, target_ess=0.6), MCPO(strategy="uniform", acceptance=True)):
        accepting = engine(tiny_model, objective)
        assert visit(engine(tiny_model, MCPO()), Scoring.TOGETHER)[0].acceptance is None
        found, _ = visit(accepting, Scoring.TOGETHER)
        # Of -log sigmoid(r_0 - r_z + c), a is the factor: the loss is -log(1 - a).
        assert found.acceptance is not None
        torch.testing.assert_close(-(1 - found.acceptance).log(), found.loss)


def test_the_temperature_found_is_told(tiny_model: LlamaForCausalLM) -> None:
    found, _ = visit(engine(tiny_model, MCPO(target_ess=0.6, num_negatives=2, log_q_correction=True)), Scoring.TOGETHER)
    assert found.kernel is not None
    assert found.temperature is not None
    count = (found.kernel > 0).sum(dim=1).double()
    assert sorted(count.tolist()) == [2, 3, 3]
    torch.testing.assert_close(effective_sample_size(found.kernel), 0.6 * count, rtol=0, atol=1e-9)
    for row, (positive, mask) in enumerate(zip(found.positive, found.mask, strict=True)):
        below = mask & (found.rewards[row] < found.rewards[row, positive])
        r = (0.1 * found.log_ratios[row]).double().masked_fill(~below, -torch.inf)
        torch.testing.assert_close((r / found.temperature[row]).softmax(0), found.kernel[row], rtol=0, atol=1e-6)
    assert visit(engine(tiny_model, MCPO()), Scoring.TOGETHER)[0].temperature is None

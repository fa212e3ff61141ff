"""Estimates of a group's gradient: exact on average over every draw there is, with the variance that is predicted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from conftest import relative_distance
from ncalign.core.config import Frozen
from ncalign.objectives import (
    BCO,
    DPO,
    NCA,
    RNCE,
    Draw,
    InfoNCA,
    LossInputs,
    Method,
    build_method,
    coefficients,
    draw_candidates,
    estimators,
    info_nca_loss,
    nca_loss,
    relative_variance,
    rnce_loss,
    surrogate_loss,
)
from ncalign.objectives.estimators import best_number, difference_estimate, enter, proposal_sizes, reweighted
from ncalign.objectives.targets import target_weights
from ncalign.training.engine import Last, Scoring
from ncalign.training.last_visits import LastVisits
from test_engine import engine, groups, visit
from test_inclusion import outcomes
from test_methods import CONFIGS, made, numbers, rewards_for


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def draws(probabilities: Tensor) -> Iterator[tuple[float, list[int]]]:
    """Every set that may be drawn of a group, with its probability."""
    found: Counter[tuple[int, ...]] = Counter()
    for share, counts in outcomes(probabilities):
        found[tuple(counts.nonzero().squeeze(1).tolist())] += share
    yield from ((share, list(chosen)) for chosen, share in found.items())


class TestDraw:
    def test_padding_and_the_other_groups_change_no_draw(self) -> None:
        found = numbers(3, 4)
        alone = draw_candidates(found[1:2, :3], [3], candidates=2, generators=[torch.Generator().manual_seed(5)])
        wide = torch.nn.functional.pad(torch.where(torch.arange(4) < 3, found, 0.0), (0, 3))
        generators = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
        beside = draw_candidates(wide, [3, 3, 3], candidates=2, generators=generators)
        assert beside.columns[1].tolist() == alone.columns[0].tolist()
        torch.testing.assert_close(beside.weights[1], alone.weights[0], rtol=0, atol=1e-15)

    def test_what_gradients_have_in_common_cancels_as_in_the_whole(self) -> None:
        """Four tied best of eight: coefficients add up to 0, and so do the weights of every draw of an even number."""
        r, rewards = torch.zeros(1, 8, dtype=torch.float64), row(1, 1, 1, 1, 0, 0, 0, 0)
        c = coefficients(lambda r: nca_loss(r, rewards, torch.ones(1, 8, dtype=torch.bool), alpha=0.05), r)
        for size in (2, 4):
            for seed in range(40):
                draw = draw_candidates(c, [8], candidates=size, generators=[torch.Generator().manual_seed(seed)])
                assert (draw.columns < 4).sum() == size / 2
                assert float(draw.weights.sum().abs()) < 1e-12

    def test_the_sides_change_no_candidate_s_probability(self) -> None:
        c = row(-0.4, 0.1, -0.05, 0.3, 0.15)
        for size in (1, 2, 3):
            probabilities, together = enter(c, size), torch.zeros(5, dtype=torch.float64)
            for share, counts in outcomes(probabilities[0], c[0] < 0):
                together += share * counts.double()
                raised = float(probabilities[0][c[0] < 0].sum())
                assert abs(float(counts[c[0] < 0].sum()) - raised) < 1
            torch.testing.assert_close(together, probabilities[0], rtol=0, atol=1e-12)

    def test_the_draw_is_that_of_its_sides(self) -> None:
        c = row(-0.4, 0.1, -0.05, 0.3, 0.15)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(400)]
        drawn = draw_candidates(c.expand(400, -1), [5] * 400, candidates=2, generators=seeds).columns
        possible = {tuple(counts.nonzero().squeeze(1).tolist()) for _, counts in outcomes(enter(c, 2)[0], c[0] < 0)}
        assert {tuple(columns) for columns in drawn.tolist()} == possible
        assert len(possible) < len(list(draws(enter(c, 2)[0])))

    def test_fewer_enter_where_fewer_count_but_one_at_least(self) -> None:
        found = torch.cat([row(0.0, -0.3, 0.0, 0.0), row(0.1, -0.3, 0.2, 0.0), row(0.0, 0.0, 0.0, 0.0)])
        draw = draw_candidates(found, [4, 3, 2], candidates=3, generators=[torch.Generator() for _ in range(3)])
        assert draw.columns.tolist() == [[1, -1, -1], [0, 1, 2], [0, -1, -1]]
        torch.testing.assert_close(draw.weights, torch.cat([row(-0.3, 0, 0), row(0.1, -0.3, 0.2), row(0, 0, 0)]))
        assert draw.num_candidates.tolist() == [1, 3, 1]
        assert draw.relative_variance.tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("broken", [math.nan, math.inf])
    def test_a_coefficient_that_is_not_finite_enters_and_is_seen(self, broken: float) -> None:
        draw = draw_candidates(row(0.1, broken, 0.2), [3], candidates=1, generators=[torch.Generator()])
        assert draw.columns.tolist() == [[1]]
        assert not draw.weights.isfinite().any()


class TestVariance:
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_is_that_of_orthogonal_gradients_of_one_length(self, size: int) -> None:
        values = numbers(1, 5)
        probabilities = enter(values, size)
        second = sum(
            share * float((values[0, chosen] / probabilities[0, chosen]).square().sum())
            for share, chosen in draws(probabilities[0])
        )
        total = float(values.square().sum())
        expected = (second - total) / total
        assert float(relative_variance(values, probabilities)) == pytest.approx(expected, rel=1e-12)

    def test_of_rnce_at_two(self) -> None:
        """The positive surely, one negative in proportion to its probability: (1 - p_0)^2 less the squares of theirs."""
        r = numbers(1, 6)
        p = r.softmax(dim=1)[0]
        found = coefficients(lambda r: rnce_loss(r, torch.tensor([0]), torch.ones(1, 6, dtype=torch.bool)), r)
        rest, squares = 1 - p[0], p[1:].square().sum()
        expected = (rest.square() - squares) / (rest.square() + squares)
        variance = relative_variance(found, enter(found, 2))
        torch.testing.assert_close(variance[0], expected, rtol=1e-12, atol=0)


class TestCoefficients:
    def test_are_the_closed_forms(self) -> None:
        r, rewards, mask = numbers(3, 4), numbers(3, 4, seed=1), torch.ones(3, 4, dtype=torch.bool)
        mask[1, 2:] = False
        w, p = target_weights(rewards, mask, alpha=0.7), torch.where(mask, r, -torch.inf).softmax(dim=1)
        count = mask.sum(dim=1, keepdim=True)
        nca = torch.where(mask, (w + 1 / count) * r.sigmoid() - w, 0.0)
        found = coefficients(lambda r: nca_loss(r, rewards, mask, alpha=0.7), r)
        torch.testing.assert_close(found, nca, rtol=0, atol=1e-15)
        found = coefficients(lambda r: info_nca_loss(r, rewards, mask, alpha=0.7), r)
        torch.testing.assert_close(found, p - w, rtol=0, atol=1e-15)

    def test_of_what_is_not_read(self) -> None:
        assert coefficients(lambda r: r[:, 0].square(), row(2.0, 5.0)).tolist() == [[4.0, 0.0]]


def whole_group(config: type[Frozen]) -> Method | None:
    """The method where it may have an estimator: with the pairing that reads the whole group, if it makes pairs."""
    name = config.model_fields["name"].default
    fields: dict[str, Any] = {"estimator": {"candidates": 2}}
    if name == "mix":
        fields |= {"parts": ["rpo", "nca", "nll"], "weights": [0.5, 1.0, 0.1]}
    if "pairing" in config.model_fields:
        fields |= {"pairing": "best_vs_each"}
    return build_method(config.model_validate(fields)) if "estimator" in config.model_fields else None


WITH_ESTIMATOR = [config for config in CONFIGS if "estimator" in config.model_fields]


def loss_at(method: Method, rewards: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The method's loss as a function of log-probs; the reference gives -9 nats to completions of three and more tokens."""
    columns = None
    if method.sampler is not None:
        columns = method.sampler.select(None, rewards, mask, torch.Generator().manual_seed(0))
    lengths = 3.0 + torch.arange(mask.shape[1], dtype=torch.float64).expand_as(rewards)

    def of(values: Tensor) -> Tensor:
        present = mask if columns is None else columns >= 0
        taken = [v if columns is None else v.gather(1, columns.clamp(min=0)) for v in (values, rewards, lengths)]
        logprobs, entering, sizes = taken
        ratios = torch.where(present, logprobs + 9.0, 0.0)
        return method.loss(LossInputs(ratios, torch.where(present, logprobs, 0.0), entering, sizes, present, baseline=0.3))

    return of


@pytest.mark.parametrize("config", WITH_ESTIMATOR, ids=lambda config: config.model_fields["name"].default)
def test_the_expected_gradient_is_the_whole_groups(config: type[Frozen]) -> None:
    """Over every draw, for ragged groups with a tie, of all sizes; and the value is that of the loss."""
    method = whole_group(config)
    assert method is not None
    rewards = rewards_for(method, 3, 4)
    rewards[2, 1] = rewards[2, 0] = rewards[2].max()
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    logprobs = torch.where(mask, -9.0 + numbers(3, 4, seed=2) / method.beta, 0.0)
    loss = loss_at(method, rewards, mask)
    expected, value = coefficients(loss, logprobs), loss(logprobs)
    assert (expected.abs().sum(dim=1) > 1e-6).all()
    for size in (1, 2, 3, 4):
        probabilities = enter(expected, size)
        for b in range(3):
            mean = torch.zeros(4, dtype=torch.float64)
            for share, chosen in draws(probabilities[b]):
                entering = logprobs[b : b + 1, chosen].requires_grad_()
                found = surrogate_loss(value[b : b + 1], entering, (expected / probabilities)[b : b + 1, chosen])
                assert found.item() == value[b].item()
                (gradient,) = torch.autograd.grad(found.sum(), entering)
                mean[chosen] += share * gradient[0]
            torch.testing.assert_close(mean, expected[b], rtol=1e-12, atol=1e-12)


def test_rnce_of_two_is_the_positive_and_a_draw_of_the_kernel() -> None:
    method, r = RNCE(beta=0.5, estimator={"candidates": 2}).method(), numbers(1, 5)
    rewards, mask = row(0.3, 0.9, 0.1, 0.2, 0.0), torch.ones(1, 5, dtype=torch.bool)
    found = coefficients(loss_at(method, rewards, mask), r / 0.5 - 9.0)
    p = (r - 0.3).softmax(dim=1)[0]
    probabilities = enter(found, 2)[0]
    rest = 1 - p[1]
    assert float(probabilities[1]) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(probabilities[[0, 2, 3, 4]], p[[0, 2, 3, 4]] / rest, rtol=1e-12, atol=0)
    torch.testing.assert_close((found[0] / probabilities)[1], -0.5 * rest, rtol=1e-12, atol=0)
    torch.testing.assert_close((found[0] / probabilities)[[0, 2, 3, 4]], (0.5 * rest).expand(4), rtol=1e-12, atol=0)


SEPARABLE = ("nca", "nca_pair", "biased_nca", "apo_zero", "kto", "bco", "sppo_hard", "qrpo")


@pytest.mark.parametrize("config", WITH_ESTIMATOR, ids=lambda config: config.model_fields["name"].default)
def test_a_loss_is_separable_where_a_coefficient_depends_on_its_own_log_prob_alone(config: type[Frozen]) -> None:
    method = whole_group(config)
    assert method is not None
    rewards, mask = rewards_for(method, 1, 4), torch.tensor([[True] * 4])
    loss = loss_at(method, rewards, mask)
    at = -9.0 + 0.3 * numbers(1, 4, seed=2) / method.beta
    jacobian = torch.autograd.functional.hessian(lambda values: loss(values).sum(), at)[0, :, 0]
    off = float((jacobian - jacobian.diag().diag()).abs().max())
    assert method.separable == (off < 1e-12)
    assert method.separable == (method.name in SEPARABLE)
    assert method.name == "kto" or float(jacobian.diag().abs().max()) > 1e-6


@pytest.mark.parametrize("name", [name for name in SEPARABLE if name != "bco"])
@pytest.mark.parametrize("blind", [True, False], ids=["uniform", "outdated"])
def test_draws_without_current_scores_are_exact_on_average(name: str, blind: bool) -> None:
    """Over every draw by outdated coefficients or by none, gradient and loss are those of the current scores."""
    (config,) = [c for c in WITH_ESTIMATOR if c.model_fields["name"].default == name]
    method = whole_group(config)
    assert method is not None
    rewards, mask = rewards_for(method, 2, 4), torch.tensor([[True] * 4, [True] * 3 + [False]])
    loss = loss_at(method, rewards, mask)
    before, now = (torch.where(mask, -9.0 + numbers(2, 4, seed=seed) / method.beta, 0.0) for seed in (2, 3))
    outdated, expected, value = coefficients(loss, before), coefficients(loss, now), loss(now)
    assert float((outdated - expected).abs().max()) > 1e-3
    exists = mask & (coefficients(loss, numbers(2, 4)) != 0)
    sizes = proposal_sizes(torch.zeros_like(outdated) if blind else outdated, exists)
    for size in (1, 2, 3):
        probabilities = enter(sizes, size)
        for b in range(2):
            mean, mean_loss = torch.zeros(4, dtype=torch.float64), 0.0
            for share, chosen in draws(probabilities[b]):
                columns = torch.tensor([chosen, chosen])
                taken = probabilities[b, chosen].expand(2, -1)
                draw = Draw(columns, torch.zeros(2, len(chosen)), taken, torch.tensor([size, size]), torch.zeros(2))
                known = before.scatter(1, columns, now.gather(1, columns))
                draw = reweighted(draw, coefficients(loss, known))
                mean[chosen] += share * draw.weights[b]
                mean_loss += share * float(difference_estimate(loss, before, now.gather(1, columns), draw)[b])
            torch.testing.assert_close(mean, expected[b], rtol=1e-11, atol=1e-12)
            assert mean_loss == pytest.approx(float(value[b]), rel=1e-11)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("objective", "needed"),
        [
            (InfoNCA, "compares each candidate with the others"),
            (RNCE, "compares each candidate with the others"),
            (BCO, "leaves the mean of all implicit rewards unknown"),
        ],
    )
    @pytest.mark.parametrize("proposals", ["last_visit", "uniform"])
    def test_draws_without_scores_that_would_be_biased_are_refused(
        self, objective: type[Frozen], needed: str, proposals: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"estimator.proposals: {proposals} .*{needed}.*take proposals: current"):
            objective(estimator={"candidates": 2, "proposals": proposals})

    def test_auto_prices_a_scoring_pass(self) -> None:
        with pytest.raises(ValueError, match="needs a number of candidates"):
            NCA(estimator={"proposals": "uniform"})

    @pytest.mark.parametrize(
        "objective",
        [
            {"name": "rnce", "num_negatives": 1},
            {"name": "dpo"},
            {"name": "rpo", "pairing": "best_vs_hard"},
            {"name": "dpo", "pairing": "best_vs_worst"},
            {"name": "mix", "parts": ["mc_po", "nca"]},
            {"name": "mix", "parts": ["dpo", "nll"]},
        ],
        ids=str,
    )
    def test_what_is_chosen_already_is_refused_by_name(self, objective: dict[str, Any]) -> None:
        (config,) = [c for c in CONFIGS if c.model_fields["name"].default == objective["name"]]
        config.model_validate(objective)
        with pytest.raises(ValueError, match=rf"{objective['name']}: an estimator replaces .* leave estimator out"):
            config.model_validate(objective | {"estimator": {"candidates": 2}})

    def test_a_part_of_a_mix_has_none_of_its_own(self) -> None:
        (mix,) = [c for c in CONFIGS if c.model_fields["name"].default == "mix"]
        with pytest.raises(ValueError, match="nca: an estimator within a mix"):
            mix.model_validate({"parts": [{"name": "nca", "estimator": {}}, "nll"]})

    def test_methods_that_draw_have_no_such_field(self) -> None:
        without = {c.model_fields["name"].default for c in CONFIGS if "estimator" not in c.model_fields}
        assert without == {"mc_po", "cd"}

    @pytest.mark.parametrize("config", WITH_ESTIMATOR, ids=lambda config: config.model_fields["name"].default)
    def test_reaches_the_method(self, config: type[Frozen]) -> None:
        method = whole_group(config)
        assert method is not None
        assert method.estimator is not None
        assert method.estimator.candidates == 2
        assert method.reads_scores
        assert made(config).estimator is None

    def test_no_candidate_is_refused(self) -> None:
        with pytest.raises(ValueError, match="greater than or equal to 1"):
            NCA(estimator={"candidates": 0})


class TestEngine:
    @pytest.mark.parametrize("objective", [NCA(), InfoNCA(), RNCE(), DPO(pairing="all_pairs")], ids=lambda c: c.name)
    @pytest.mark.parametrize("once", [False, True])
    def test_all_candidates_give_the_whole_gradient(self, tiny_model: LlamaForCausalLM, objective: Any, once: bool) -> None:
        whole, expected = visit(engine(tiny_model, objective), Scoring.NONE)
        estimated = replace(engine(tiny_model, objective), method=objective.method().estimated(5), prompts_once=once)
        assert estimated.scoring(groups(), at_reference=False) is Scoring.TOGETHER
        for scoring in (Scoring.TOGETHER, Scoring.APART):
            found, gradients = visit(estimated, scoring)
            torch.testing.assert_close(found.loss, whole.loss)
            assert torch.equal(found.negatives, whole.negatives)
            assert found.estimate is not None
            assert found.estimate["candidates"].tolist() == whole.mask.sum(dim=1).tolist() or objective.name == "rnce"
            assert found.estimate["relative_variance"].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
            for name, gradient in expected.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("objective", "proposals"),
        [(NCA(alpha=0.3), "current"), (RNCE(), "current"), (NCA(alpha=0.3), "uniform"), (NCA(alpha=0.3), "last_visit")],
        ids=lambda value: value if isinstance(value, str) else value.name,
    )
    def test_the_mean_over_all_draws_is_the_whole_gradient(
        self, tiny_model: LlamaForCausalLM, objective: Any, proposals: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model.double()
        whole, expected = visit(engine(model, objective), Scoring.NONE)
        estimated = replace(engine(model, objective), method=objective.method().estimated(2, proposals))
        scoring = Scoring.APART if proposals == "current" else Scoring.LAST
        assert estimated.scoring(groups(), at_reference=False) is scoring
        last = Last(LastVisits.of(groups()), 4) if proposals == "last_visit" else None
        mean_loss = torch.zeros(3, dtype=torch.float64)
        mean = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
        # The sets that each group's draw may come to, with their probabilities.
        chances: list[list[tuple[list[int], float]]] = []

        def looked_at(p: Tensor, generator: torch.Generator, *, sides: Tensor) -> Tensor:
            chances.append([(chosen, share) for share, chosen in draws(p[0])])
            return (p > 0).long()

        monkeypatch.setattr(estimators, "systematic", looked_at)
        (part,) = estimated.passes(range(3), groups())
        estimated.train_pass(part, epoch=1, scoring=scoring, last=last)
        for turn in range(max(map(len, chances))):
            # A group whose sets are all done draws its first again, with weight 0.
            taken = [some[turn] if turn < len(some) else (some[0][0], 0.0) for some in chances]
            sets = iter([chosen for chosen, _ in taken])

            def fixed(p: Tensor, generator: torch.Generator, *, sides: Tensor, sets: Iterator[list[int]] = sets) -> Tensor:
                return torch.zeros(p.shape, dtype=torch.long).index_fill(1, torch.tensor(next(sets)), 1)

            monkeypatch.setattr(estimators, "systematic", fixed)
            estimated.model.zero_grad()
            found = estimated.train_pass(part, epoch=1, scoring=scoring, last=last)
            if proposals == "current":
                torch.testing.assert_close(found.loss, whole.loss)
            assert found.estimate is not None
            assert found.estimate["candidates"].tolist() == [2, 2, 2]
            shares = torch.tensor([share for _, share in taken], dtype=torch.float64)
            mean_loss += shares * found.loss.detach()
            (found.loss * shares).sum().backward()
            for name, weight in estimated.model.named_parameters():
                if name in mean and weight.grad is not None:
                    mean[name] += weight.grad
        # transformers' norms compute in float32, whatever the model's precision.
        assert relative_distance(expected, mean) <= 1e-6
        torch.testing.assert_close(mean_loss, whole.loss.detach(), rtol=1e-6, atol=0)

    def test_at_the_reference_nothing_is_scored(self, tiny_model: LlamaForCausalLM) -> None:
        estimated = replace(engine(tiny_model, NCA()), method=NCA().method().estimated(2))
        assert estimated.scoring(groups(), at_reference=True) is Scoring.KNOWN
        assert estimated.scoring(groups(), at_reference=False) is Scoring.APART
        found, _ = visit(estimated, Scoring.KNOWN)
        # All but those that enter are known to be as likely as under the reference.
        assert ((found.log_ratios != 0) & found.mask).sum(dim=1).tolist() == [2, 2, 2]

    def test_evaluation_is_of_the_whole_group(self, tiny_model: LlamaForCausalLM) -> None:
        plain = engine(tiny_model, NCA())
        (part,) = plain.passes(range(3), groups())
        expected = plain.eval_pass(part, epoch=-1)
        found = replace(plain, method=NCA().method().estimated(1)).eval_pass(part, epoch=-1)
        assert torch.equal(found.loss, expected.loss)
        assert found.estimate is None


class TestBestNumber:
    def test_few_where_a_few_count_and_completions_are_long(self) -> None:
        one_counts = row(-1.0, *[0.01] * 15)
        prompts, lengths = torch.tensor([100.0]), torch.full((1, 16), 100.0)
        number, ratio = best_number(one_counts, prompts, lengths, prompt_passes=3.0)
        # The first surely and one of the others, 1 + .15^2 against the sum of squares; 300 + 1600 + 600 tokens against 5100.
        assert number == 2
        assert ratio == pytest.approx(1.0225 / 1.0015 * 2500 / 5100)

    def test_all_where_prompts_are_long(self) -> None:
        found = numbers(8, 4)
        assert best_number(found, torch.full((8,), 1e4), torch.ones(8, 4), prompt_passes=4.0) == (4, 1.0)

    def test_is_the_least_product(self) -> None:
        found, prompts = numbers(20, 8).pow(5), torch.full((20,), 10.0)
        lengths = 20 + 5 * torch.arange(8.0).expand(20, 8)
        number, ratio = best_number(found, prompts, lengths, prompt_passes=3.0)
        whole = float(found.square().sum()) * 3 * float(prompts.sum() + lengths.sum())
        products = []
        for size in range(1, 8):
            variance = float((found.square() / enter(found, size)).sum())
            cost = 3 * float(prompts.sum()) + float(lengths.sum()) * (1 + 3 * size / 8)
            products.append(variance * cost / whole)
        assert ratio == pytest.approx(min(products), rel=1e-12)
        assert number == 1 + products.index(min(products))
        assert 1 < number < 8

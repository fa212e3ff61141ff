"""Metrics against values worked out by hand; what is undefined is NaN, never a number that looks like one."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from ncalign.training import metrics
from ncalign.training.metrics import (
    ChosenAlarm,
    MetricMeans,
    PassResult,
    correlation,
    group_metrics,
    merged,
    pair_accuracy,
    sums_and_counts,
)

NAN = float("nan")
LN2 = math.log(2)


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def real(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def assert_values(found: Tensor, *expected: float) -> None:
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


def visit(**changed: object) -> PassResult:
    """Two groups, of four and of two candidates; beta = 0.5."""
    values: dict[str, object] = dict(
        loss=torch.tensor([0.7, 0.3], dtype=torch.float64),
        log_ratios=f64([2.0, -4.0, 6.0, 0.0], [1.0, 3.0, NAN, NAN]),
        logprobs=f64([-10.0, -20.0, -30.0, -40.0], [-5.0, -7.0, NAN, NAN]),
        rewards=f64([0.9, 0.1, 0.5, 0.1], [0.0, 1.0, NAN, NAN]),
        lengths=torch.tensor([[10, 2, 14, 6], [4, 8, 0, 0]]),
        mask=torch.tensor([[True] * 4, [True, True, False, False]]),
        positive=torch.tensor([0, 1]),
        negatives=torch.tensor([[1, 2], [0, -1]]),
        kernel=None,
        target_weights=None,
        beta=0.5,
    )
    return PassResult(**{**values, **changed})  # type: ignore[arg-type]


class TestGroupMetrics:
    def test_rewards_and_log_probs(self) -> None:
        found = group_metrics(visit())
        assert_values(found["loss"], 0.7, 0.3)
        # Implicit rewards are half the log-ratios: [1, -2, 3, 0] and [0.5, 1.5].
        assert_values(found["rewards/chosen"], 1.0, 1.5)
        assert_values(found["rewards/rejected"], (-2 + 3) / 2, 0.5)
        assert_values(found["rewards/margins"], 1 - 0.5, 1.5 - 0.5)
        assert_values(found["logps/chosen"], -10.0, -7.0)
        assert_values(found["logps/rejected"], (-20 - 30) / 2, -5.0)
        assert_values(found["logps/chosen_change"], 2.0, 3.0)
        assert_values(found["logps/rejected_change"], (-4 + 6) / 2, 1.0)

    def test_accuracies(self) -> None:
        # Pairs of group 0 by reward: 0>1 right, 0>2 wrong, 0>3 right, 2>1 right, 2>3 right; 1 and 3 tie in reward.
        assert_values(group_metrics(visit())["rewards/accuracies"], 4 / 5, 1.0)

    def test_negatives(self) -> None:
        found = group_metrics(visit())
        assert_values(found["negatives/reward"], (0.1 + 0.5) / 2, 0.0)
        # Ranks of group 0: 1, 3, 2, 3 (a tie shares the better rank); of group 1: 2, 1.
        assert_values(found["negatives/rank"], (3 + 2) / 2, 2.0)
        # 3 > 1 but -2 < 1; 0.5 < 1.5.
        assert_values(found["negatives/above_positive"], 0.5, 0.0)

    def test_length_correlation(self) -> None:
        # Group 0: implicit rewards [1, -2, 3, 0] and lengths [10, 2, 14, 6], centred [.5, -2.5, 2.5, -.5] and [2, -6, 6, -2].
        expected = (1 + 15 + 15 + 1) / math.sqrt((0.25 + 6.25 + 6.25 + 0.25) * (4 + 36 + 36 + 4))
        assert_values(group_metrics(visit())["length_correlation"], expected, 1.0)

    def test_kernel_and_targets_are_there_when_the_method_has_them(self) -> None:
        assert not {"kernel/entropy", "kernel/effective_sample_size", "targets/entropy"} & group_metrics(visit()).keys()
        kernel = f64([0.0, 0.5, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0])
        weights = f64([0.25] * 4, [0.5, 0.5, 0.0, 0.0])
        found = group_metrics(visit(kernel=kernel, target_weights=weights))
        assert_values(found["kernel/entropy"], 0.5 * LN2 + 2 * 0.25 * 2 * LN2, 0.0)
        assert_values(found["kernel/effective_sample_size"], 1 / (1 / 4 + 1 / 16 + 1 / 16), 1.0)
        assert_values(found["targets/entropy"], 2 * LN2, LN2)

    def test_temperature_and_acceptance_are_there_where_they_are_found(self) -> None:
        assert not {"kernel/temperature", "kernel/acceptance"} & group_metrics(visit()).keys()
        found = group_metrics(visit(temperature=torch.tensor([0.25, NAN]), acceptance=torch.tensor([NAN, 0.5])))
        assert_values(found["kernel/temperature"], 0.25, NAN)
        assert_values(found["kernel/acceptance"], NAN, 0.5)

    def test_a_group_without_negatives_defines_none_of_theirs(self) -> None:
        found = group_metrics(visit(negatives=torch.tensor([[-1, -1], [0, -1]])))
        for name in ("rewards/rejected", "rewards/margins", "negatives/reward", "negatives/rank", "negatives/above_positive"):
            assert math.isnan(float(found[name][0])), name
            assert not math.isnan(float(found[name][1])), name
        assert_values(found["rewards/chosen"], 1.0, 1.5)

    def test_a_batch_without_any_negatives(self) -> None:
        found = group_metrics(visit(negatives=torch.empty(2, 0, dtype=torch.long)))
        assert_values(found["rewards/rejected"], NAN, NAN)

    def test_candidates_that_were_not_computed_are_left_out(self) -> None:
        # A method that scores only what enters the loss leaves NaN in the other places.
        log_ratios = f64([2.0, NAN, 6.0, NAN], [1.0, 3.0, NAN, NAN])
        found = group_metrics(visit(log_ratios=log_ratios, negatives=torch.tensor([[2], [0]])))
        assert_values(found["rewards/accuracies"], 0.0, 1.0)
        # Two points always lie on a line: implicit rewards 1, 3 at lengths 10, 14.
        assert_values(found["length_correlation"], 1.0, 1.0)

    def test_what_stands_where_there_is_no_candidate_does_not_matter(self) -> None:
        plain = group_metrics(visit())
        noisy = visit()
        noisy.log_ratios[1, 2:] = torch.tensor([99.0, -99.0], dtype=torch.float64)
        noisy.rewards[1, 2:] = 55.0
        noisy.lengths[1, 2:] = 77
        for name, values in group_metrics(noisy).items():
            torch.testing.assert_close(values, plain[name], rtol=0, atol=0, equal_nan=True, msg=name)


class TestPairAccuracy:
    @pytest.mark.parametrize(
        ("implicit", "expected"),
        [
            ([1.0, 2.0, 3.0], 1.0),
            ([3.0, 2.0, 1.0], 0.0),
            ([0.0, 0.0, 0.0], 0.5),
            ([1.0, 3.0, 2.0], 2 / 3),
            ([1.0, 1.0, 2.0], 2.5 / 3),
        ],
    )
    def test_of_three_ranked_candidates(self, implicit: list[float], expected: float) -> None:
        assert_values(pair_accuracy(f64(implicit), f64([1.0, 2.0, 3.0]), real(1, 3)), expected)

    def test_of_many_candidates_a_part_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chance = random.Random(0)
        implicit, rewards = ([float(chance.randrange(5)) for _ in range(40)] for _ in range(2))
        shares = [
            (implicit[i] > implicit[j]) + 0.5 * (implicit[i] == implicit[j])
            for i in range(40)
            for j in range(40)
            if rewards[i] > rewards[j]
        ]
        monkeypatch.setattr(metrics, "_PAIRS_AT_A_TIME", 200)
        assert_values(pair_accuracy(f64(implicit), f64(rewards), real(1, 40)), sum(shares) / len(shares))

    def test_equal_rewards_define_nothing(self) -> None:
        assert_values(pair_accuracy(f64([1.0, 2.0]), f64([3.0, 3.0]), real(1, 2)), NAN)

    def test_missing_rewards_make_no_pairs(self) -> None:
        # Only 0 < 2 is a pair, and it is right.
        assert_values(pair_accuracy(f64([1.0, 0.0, 2.0]), f64([1.0, NAN, 2.0]), real(1, 3)), 1.0)


class TestCorrelation:
    def test_by_hand(self) -> None:
        x = f64([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
        y = f64([2.0, 4.0, 6.0], [6.0, 4.0, 2.0], [1.0, -2.0, 1.0])
        assert_values(correlation(x, y, real(3, 3)), 1.0, -1.0, 0.0)

    def test_masked_and_missing_places(self) -> None:
        x = f64([1.0, 2.0, 100.0, 5.0], [1.0, 2.0, 3.0, NAN])
        y = f64([3.0, 5.0, -7.0, NAN], [6.0, 4.0, 2.0, 9.0])
        mask = torch.tensor([[True, True, False, True], [True] * 4])
        assert_values(correlation(x, y, mask), 1.0, -1.0)

    @pytest.mark.parametrize("x", [[2.0, 2.0, 2.0], [NAN, NAN, NAN], [0.0, 1e-7, -1e-7]])
    def test_what_does_not_vary_defines_none(self, x: list[float]) -> None:
        # At the first step every log-ratio is rounding: a correlation of noise would look like a finding.
        assert_values(correlation(f64(x), f64([1.0, 2.0, 3.0]), real(1, 3)), NAN)
        assert_values(correlation(f64([1.0, 2.0, 3.0]), f64(x), real(1, 3)), NAN)


def means_of(*passes: dict[str, list[float]]) -> MetricMeans:
    means = MetricMeans()
    for found in passes:
        means.add(found, sums_and_counts({name: torch.tensor(values) for name, values in found.items()}).tolist())
    return means


class TestMeans:
    def test_over_the_groups_that_define_each(self) -> None:
        means = means_of({"a": [1.0, NAN, 3.0], "b": [NAN, NAN, math.inf]}, {"a": [8.0], "b": [NAN]})
        assert means.means() == {"a": 4.0}

    def test_over_processes_each_group_counts_once(self) -> None:
        first, second = means_of({"a": [1.0, 2.0, 3.0], "kernel": [NAN, 5.0, NAN]}), means_of({"a": [10.0]})
        assert MetricMeans(*merged([first.parts(), second.parts()])).means() == {"a": 4.0, "kernel": 5.0}

    def test_sums_in_float64(self) -> None:
        # In float32 a count of 2^24 ones stops growing.
        assert means_of({"a": [2.0**24, 1.0]}, {"a": [1.0]}).means() == {"a": (2.0**24 + 2) / 3}


def rings(changes: list[float], window: int = 5) -> list[int]:
    alarm = ChosenAlarm(window=window)
    return [step for step, change in enumerate(changes) if alarm.observe(change) is not None]


class TestChosenAlarm:
    def test_rings_once_on_a_steady_fall(self) -> None:
        # Windows of five: means -.4, -1.4, -2.4 when the fifteenth value is in.
        assert rings([-0.2 * step for step in range(100)]) == [14]

    def test_waits_until_the_fall_is_large(self) -> None:
        # -0.05 a step: the mean of the last five, -.05 * (step - 2), first falls below -1 at step 23.
        assert rings([-0.05 * step for step in range(100)]) == [23]

    @pytest.mark.parametrize("slope", [0.0, 0.01, 0.5])
    def test_is_silent_when_it_rises_or_stays(self, slope: float) -> None:
        assert rings([slope * step for step in range(200)]) == []

    @pytest.mark.parametrize("size", [1.0, 10.0])
    def test_is_silent_on_noise_around_zero(self, size: float) -> None:
        # Prompts differ from step to step: the mean change is noise of a few nats around its trend.
        rang = 0
        for seed in range(50):
            rng = random.Random(seed)
            rang += bool(rings([rng.gauss(0, size) for _ in range(200)]))
        assert rang <= 1

    @pytest.mark.parametrize("seed", range(10))
    def test_rings_on_a_slow_fall_within_noise(self, seed: int) -> None:
        rng = random.Random(seed)
        assert len(rings([-0.1 * step + rng.gauss(0, 2) for step in range(200)])) == 1

    def test_is_silent_when_it_fell_and_holds(self) -> None:
        # Down by 5 nats within a window, then steady: displaced, but no longer falling.
        assert rings([-1.0, -2.0, -3.0, -4.0] + [-5.0] * 100) == []

    def test_names_numbers_and_remedies(self) -> None:
        alarm = ChosenAlarm(window=1)
        assert alarm.observe(0.0) is None
        assert alarm.observe(-1.0) is None
        message = alarm.observe(-2.5)
        assert message is not None
        assert "+0.0 -> -1.0 -> -2.5 nats" in message
        for remedy in ("objective nca", "learning_rate", "objective.beta", "epochs"):
            assert remedy in message

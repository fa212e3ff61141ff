"""Learning rate and data order as functions of the step."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncalign.model.batching import epoch_order
from ncalign.training.schedule import DataPlan, learning_rate_at, make_plan

KINDS = ("cosine", "linear", "constant")


def rates(kind: str, *, num_steps: int, warmup_ratio: float, peak: float = 2.0) -> list[float]:
    return [learning_rate_at(s, peak=peak, num_steps=num_steps, warmup_ratio=warmup_ratio, kind=kind) for s in range(num_steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_rises_in_equal_steps_to_the_peak(kind: str) -> None:
    # ceil(.25 * 10) = 3 steps: the first one already moves the weights, the third has the peak.
    assert rates(kind, num_steps=10, warmup_ratio=0.25)[:3] == pytest.approx([2 / 3, 4 / 3, 2.0], rel=1e-15)


def test_linear_falls_in_equal_steps() -> None:
    # Eight steps after the warm-up, of which the first is at the peak: 8/8, 7/8, ... 1/8.
    assert rates("linear", num_steps=10, warmup_ratio=0.2)[2:] == pytest.approx([2 * k / 8 for k in range(8, 0, -1)], rel=1e-14)


def test_cosine_is_half_a_wave() -> None:
    found = rates("cosine", num_steps=10, warmup_ratio=0.2)[2:]
    assert found == pytest.approx([1 + math.cos(math.pi * k / 8) for k in range(8)], rel=1e-14)
    assert found[0] == 2.0
    assert found[4] == pytest.approx(1.0, abs=1e-15)


def test_constant_stays() -> None:
    assert rates("constant", num_steps=5, warmup_ratio=0.2) == [2.0] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_has_the_peak(kind: str) -> None:
    assert rates(kind, num_steps=4, warmup_ratio=0.0)[0] == 2.0


@given(kind=st.sampled_from(KINDS), num_steps=st.integers(1, 50), warmup_ratio=st.floats(0, 0.99))
def test_every_step_learns_and_none_above_the_peak(kind: str, num_steps: int, warmup_ratio: float) -> None:
    found = rates(kind, num_steps=num_steps, warmup_ratio=warmup_ratio)
    assert all(0 < rate <= 2.0 for rate in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_steps_of_an_epoch_and_its_partial_last_one() -> None:
    plan = make_plan(10, groups_per_step=4, num_train_epochs=2, max_steps=-1, seed=3)
    assert (plan.steps_per_epoch, plan.num_steps) == (3, 6)
    steps = [plan.step_groups(step) for step in range(6)]
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 1, 1, 1]
    assert [len(indices) for _, indices in steps] == [4, 4, 2, 4, 4, 2]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_each_group_once_an_epoch(num_groups: int, groups_per_step: int, seed: int) -> None:
    plan = make_plan(num_groups, groups_per_step=groups_per_step, num_train_epochs=3, max_steps=-1, seed=seed)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(plan.num_steps):
        epoch, indices = plan.step_groups(step)
        assert 1 <= len(indices) <= groups_per_step
        seen.update((epoch, index) for index in indices)
    assert seen == {(epoch, index): 1 for epoch in range(3) for index in range(num_groups)}


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(1.0, -1, 3), (0.5, -1, 2), (1.5, -1, 5), (0.01, -1, 1), (9.0, 7, 7)]
)
def test_number_of_steps(epochs: float, max_steps: int, steps: int) -> None:
    # Ten groups, four a step: three steps an epoch, part of a step counts as one.
    assert make_plan(10, groups_per_step=4, num_train_epochs=epochs, max_steps=max_steps, seed=0).num_steps == steps


def test_epochs_differ_and_seeds_differ_and_both_repeat() -> None:
    orders = {(seed, epoch): tuple(epoch_order(30, epoch=epoch, seed=seed)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert orders == {(seed, epoch): tuple(epoch_order(30, epoch=epoch, seed=seed)) for seed in (0, 1) for epoch in (0, 1)}
    assert tuple(range(30)) not in orders.values()


def test_a_step_is_the_same_however_many_follow() -> None:
    # Resuming with more steps must not change the order of those already taken.
    short, long = DataPlan(20, 3, 4, seed=5), DataPlan(20, 3, 40, seed=5)
    assert [short.step_groups(step) for step in range(4)] == [long.step_groups(step) for step in range(4)]

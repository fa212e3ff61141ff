"""The drift between the policy that sampled and the one that was trained since, against what can be summed exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ncalign.cli.app import main
from ncalign.data.groups import Group, read_groups
from ncalign.objectives import DPO, NCA, RPO, LossInputs, Method, build_method
from ncalign.online import online
from ncalign.online.config import OnlineConfig
from ncalign.online.drift import Drift, estimate_drift
from ncalign.online.online import run_online
from ncalign.online.pool import Pool
from ncalign.online.state import Run, keep_out
from ncalign.training.engine import Engine
from online_runs import settings, write_inputs

Array = NDArray[np.float64]


# --- The estimate -----------------------------------------------------------------------------------------------------


def test_the_estimate_and_its_interval_by_hand() -> None:
    # Three prompts that lost .4, .1 and .1 nats a completion; the best of the first two lost .5 and -.2.
    found = estimate_drift(
        [[-1.0, -2.0], [-1.0, -1.0, -1.0], [-3.0]],
        [[-1.3, -2.5], [-1.2, -0.8, -1.3], [-3.1]],
        [[0.0, 1.0], [None, 2.0, 1.0], [1.0]],
    )
    assert found.kl == pytest.approx(0.2)
    # Student's quantile for two degrees of freedom is 4.303, and the three means' standard deviation .1 sqrt(3).
    assert found.kl_interval == pytest.approx((0.0, 0.2 + 4.302653 * 0.1))
    assert found.preferred == pytest.approx((0.5 - 0.2) / 2)
    assert found.preferred_interval == pytest.approx((0.15 - 12.706205 * 0.35, 0.15 + 12.706205 * 0.35))
    assert (found.num_prompts, found.num_completions) == (3, 6)


def test_tied_best_completions_count_alike() -> None:
    generating, current = [[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]], [[-1.1, -1.3, -9.0], [-1.2, -9.0, -9.0]]
    found = estimate_drift(generating, current, [[2.0, 2.0, 1.0], [3.0, None, 2.0]])
    assert found.preferred == pytest.approx(0.2)
    assert found.preferred_interval == pytest.approx((0.2, 0.2))


def test_what_can_t_be_told_is_missing() -> None:
    one = estimate_drift([[-1.0, -2.0]], [[-1.5, -2.0]], [[1.0, 1.0]])
    assert one.kl == 0.25
    assert np.isnan([*one.kl_interval, one.preferred, *one.preferred_interval]).all()
    assert one.as_json()["kl_interval"] == [None, None]
    still = estimate_drift([[-1.0], [-2.0]], [[-1.0], [-2.0]], [[None], [None]])
    assert (still.kl, still.kl_interval) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    "rows",
    [
        ([], [], []),
        ([[-1.0], []], [[-1.0], []], [[0.0], []]),
        ([[-1.0]], [[-1.0, -2.0]], [[0.0]]),
        ([[-1.0]], [[-1.0]], [[0.0, 1.0]]),
    ],
)
def test_rows_that_don_t_match_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="drift needs completions of each prompt under both policies"):
        estimate_drift(*rows)


def test_a_move_to_completions_that_were_never_sampled_is_seen() -> None:
    # Half of all probability goes to one completion of probability 1e-6, which none of the 96 samples is.
    rng = np.random.default_rng(0)
    before = np.log(np.append(rng.dirichlet(np.ones(20)) * (1 - 1e-6), 1e-6))
    now = np.logaddexp(before - math.log(2), np.append(np.full(20, -np.inf), -math.log(2)))
    exact = float((np.exp(before) * (before - now)).sum())
    drawn = rng.choice(20, size=(16, 6), p=np.exp(before[:20]) / np.exp(before[:20]).sum())
    found = estimate_drift(before[drawn].tolist(), now[drawn].tolist(), np.zeros((16, 6)).tolist())
    assert found.kl == pytest.approx(exact, rel=1e-4)
    # Weights that are all one half look as if nothing could be amiss.
    log_w = (now - before)[drawn]
    assert float((np.expm1(log_w) - log_w).mean()) < exact / 3


# --- Policies that can be enumerated, trained between -----------------------------------------------------------------

VOCABULARY, LENGTH, WIDTH = 4, 3, 6
SEQUENCES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
BEFORE = torch.cat([torch.full((len(SEQUENCES), 1), VOCABULARY), SEQUENCES[:, :-1]], dim=1)
NUM_TRAINED, NUM_KEPT, NUM_OTHERS, NUM_SAMPLES = 32, 64, 160, 6
OBJECTIVES = {"dpo": DPO(beta=0.1), "nca": NCA(beta=0.1, alpha=0.3), "rpo": RPO(beta=0.1)}


def table(weights: Tensor, prompts: Tensor) -> Tensor:
    """Log-probs of all sequences after each prompt ``[P, S]``: the next token by the last one and the prompt's features."""
    steps = torch.einsum("uvd,pd->puv", weights, prompts).log_softmax(dim=-1)
    return steps[:, BEFORE, SEQUENCES].sum(dim=-1)


@dataclass(frozen=True)
class Case:
    """A trained policy: estimates from the prompts kept out, by their number, and what they estimate."""

    kept: dict[int, Drift]
    exact: float
    exact_preferred: float
    trained: Drift
    exact_trained: float


def train_between(name: str, seed: int, *, nums: tuple[int, ...]) -> Case:
    """Train from samples of the starting policy until the KL, averaged over all other prompts, reaches .05 to 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    limit = math.exp(np.random.default_rng(seed).uniform(math.log(0.05), 0))
    prompts = normal(NUM_TRAINED + NUM_KEPT + NUM_OTHERS, WIDTH)
    start, taste = (scale * normal(VOCABULARY + 1, VOCABULARY, WIDTH) / math.sqrt(WIDTH) for scale in (1 + 2 * (seed % 2), 1))
    before, rewards = table(start, prompts), torch.einsum("uvd,pd->puv", taste, prompts)[:, BEFORE, SEQUENCES].sum(dim=-1)
    rewards = rewards + 1e-6 * normal(*rewards.shape)
    drawn = torch.multinomial(before.exp(), NUM_SAMPLES, replacement=True, generator=generator)
    method, weights, trained = build_method(OBJECTIVES[name]), start.clone().requires_grad_(), slice(NUM_TRAINED)
    optimizer = torch.optim.Adam([weights], lr=0.01)
    columns = chosen_columns(method, drawn[trained], rewards[trained].gather(1, drawn[trained]))
    for _ in range(1000):
        loss = loss_of(method, table(weights, prompts[trained]), before[trained], rewards[trained], columns)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        now = table(weights.detach(), prompts)
        divergences = (before.exp() * (before - now)).sum(dim=1)
        if float(divergences[NUM_TRAINED:].mean()) >= limit:
            break
    exact_preferred = (best_of(before, rewards) * (before - now)).sum(dim=1)[NUM_TRAINED:].mean()

    def estimate(places: slice) -> Drift:
        rows = [values[places].gather(1, drawn[places]).tolist() for values in (before, now, rewards)]
        return estimate_drift(*rows)

    return Case(
        kept={num: estimate(slice(NUM_TRAINED, NUM_TRAINED + num)) for num in nums},
        exact=float(divergences[NUM_TRAINED:].mean()),
        exact_preferred=float(exact_preferred),
        trained=estimate(trained),
        exact_trained=float(divergences[trained].mean()),
    )


def chosen_columns(method: Method, drawn: Tensor, rewards: Tensor) -> Tensor:
    """The sequences that enter the loss: all sampled ones, or the best and the worst of a method of pairs."""
    if method.sampler is None:
        return drawn
    order = rewards.argsort(dim=1, descending=True)
    return drawn.gather(1, order[:, [0, -1]])


def loss_of(method: Method, policy: Tensor, reference: Tensor, rewards: Tensor, columns: Tensor) -> Tensor:
    own, base, earned = (values.gather(1, columns) for values in (policy, reference, rewards))
    mask = torch.ones_like(own, dtype=torch.bool)
    return method.loss(LossInputs(own - base, own, earned, torch.full_like(own, LENGTH), mask)).mean()


def best_of(logprobs: Tensor, rewards: Tensor) -> Tensor:
    """Probabilities of the best of `NUM_SAMPLES` samples: the sequences up to a reward, to the power of their number."""
    order = rewards.argsort(dim=1)
    below = logprobs.exp().gather(1, order).cumsum(dim=1).clamp(max=1.0) ** NUM_SAMPLES
    best = below.diff(dim=1, prepend=torch.zeros_like(below[:, :1]))
    return torch.zeros_like(best).scatter(1, order, best)


def share_held(cases: list[Case], interval: Callable[[Case], tuple[float, float]], truth: Callable[[Case], float]) -> float:
    held = [low <= truth(case) <= high for case in cases for low, high in [interval(case)]]
    return sum(held) / len(held)


def test_the_estimate_covers_on_prompts_kept_out_and_falls_short_on_those_trained_on() -> None:
    cases = {name: [train_between(name, seed, nums=(16,)) for seed in range(8)] for name in OBJECTIVES}
    every = [case for some in cases.values() for case in some]
    least = 0.9 - 3 * math.sqrt(0.9 * 0.1 / len(every))
    assert share_held(every, lambda case: case.kept[16].kl_interval, lambda case: case.exact) >= least
    assert share_held(every, lambda case: case.kept[16].preferred_interval, lambda case: case.exact_preferred) >= least
    # RPO raises the completions that it is trained on, whatever the policy loses elsewhere.
    assert np.mean([case.trained.kl / case.exact_trained for case in cases["rpo"]]) < 0.8
    assert np.mean([case.kept[16].kl / case.exact for case in cases["rpo"]]) == pytest.approx(1, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_intervals_cover_the_exact_drift_of_trained_policies(name: str) -> None:
    nums = (4, 8, 16, 64)
    cases = [train_between(name, seed, nums=nums) for seed in range(200)]
    drifts = [case.exact for case in cases]
    assert 0.05 <= min(drifts) < 0.1
    assert 0.8 < max(drifts) < 1.3
    found = {}
    for num in nums:
        of_kl = share_held(cases, lambda case, num=num: case.kept[num].kl_interval, lambda case: case.exact)
        of_best = share_held(cases, lambda case, num=num: case.kept[num].preferred_interval, lambda case: case.exact_preferred)
        found[num] = (of_kl, of_best)
    assert min(share for both in found.values() for share in both) >= 0.9, found


# --- Which prompts are kept out ---------------------------------------------------------------------------------------


def config_of(**changes: Any) -> OnlineConfig:
    return OnlineConfig.model_validate(settings(Path(), Path("model"), "run", **{"drift_prompts": None, **changes}))


@hypothesis.settings(max_examples=50)
@given(
    prompts=st.lists(st.integers(0, 60).map(str), min_size=3, max_size=80),
    wanted=st.none() | st.integers(2, 20),
    seed=st.integers(0, 3),
)
def test_prompts_kept_out_are_not_trained_on(prompts: list[str], wanted: int | None, seed: int) -> None:
    groups = [Group(str(place), prompt, []) for place, prompt in enumerate(prompts)]
    different, config = len(set(prompts)), config_of(drift_prompts=wanted, seed=seed)
    if wanted is not None and wanted >= different:
        with pytest.raises(ValueError, match=f"{wanted} leaves none of {different} different prompts to train on"):
            keep_out(groups, config)
        return
    train, kept = keep_out(groups, config)
    expected = wanted if wanted is not None else min(16, different // 10) if different >= 20 else 0
    names = [group.prompt for group in kept]
    assert len(kept) == len(set(names)) == expected
    # All rows of a prompt that is kept out are, and the others stay in their order.
    assert [group.id for group in train] == [group.id for group in groups if group.prompt not in names]
    assert keep_out(groups, config) == (train, kept)


def test_another_seed_keeps_out_other_prompts() -> None:
    groups = [Group(str(number), str(number), []) for number in range(200)]
    one, other = ({group.id for group in keep_out(groups, config_of(seed=seed))[1]} for seed in (0, 1))
    assert len(one) == len(other) == 16
    assert one != other


def test_what_can_t_be_kept_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    groups = [Group(str(number), str(number), []) for number in range(19)]
    assert keep_out(groups, config_of()) == (groups, [])
    assert "drift is not measured: a tenth of 19 prompts is less than the 2" in capsys.readouterr().err
    assert keep_out(groups, config_of(drift_prompts=0)) == (groups, [])
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"regenerate_on_drift needs at least 2 prompts .* there are 19 different ones"):
        keep_out(groups, config_of(regenerate_on_drift=0.1))
    with pytest.raises(ValueError, match="drift_prompts must be at least 2, and is 0"):
        config_of(drift_prompts=0, regenerate_on_drift=0.1)
    with pytest.raises(ValueError, match="drift_prompts must be 0 or at least 2, and is 1"):
        config_of(drift_prompts=1)


def test_the_old_name_leads_to_the_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["online", "--data", "p.jsonl", "--output_dir", str(tmp_path / "run"), "--drift_groups", "64"]) == 2
    assert "drift_prompts" in capsys.readouterr().err


# --- In a run ---------------------------------------------------------------------------------------------------------


def test_every_round_answers_the_prompts_kept_out_and_trains_on_none(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[bytes]] = []
    trained: set[bytes] = set()
    plain_make, plain_train = online.make_pool, Engine.train_pass

    def make_pool(run: Run, position: Any) -> Pool:
        pool = plain_make(run, position)
        measured.append([group.prompt.tobytes() for group in pool.measured])
        return pool

    def train_pass(self: Engine, part: Any, **options: Any) -> Any:
        trained.update(group.prompt.tobytes() for group in part.groups)
        return plain_train(self, part, **options)

    monkeypatch.setattr(online, "make_pool", make_pool)
    monkeypatch.setattr(Engine, "train_pass", train_pass)
    write_inputs(tmp_path)
    # Two epochs, so that every prompt that may be trained on is.
    fields = settings(tmp_path, tiny_model_dir, "run", drift_prompts=3, max_steps=-1, num_train_epochs=2, chunk_size=4)
    results = run_online(OnlineConfig.model_validate(fields))
    assert len(measured) == 3
    assert measured[0] == measured[1] == measured[2]
    assert len(set(measured[0])) == 3
    assert not trained & set(measured[0])
    assert len(trained) == results["data"]["prompts"] == 16 - 3 - 3
    pooled = {group.id for path in tmp_path.glob("run/rounds/*/pool.jsonl") for group in read_groups(path)}
    assert len(pooled) == 10
    for row in results["rounds"]:
        assert row["counts"]["prompts_kept_out"] == row["drift"]["num_prompts"] == 3
        assert row["drift"]["num_completions"] == 9
    assert results["data"]["tokens_for_drift"] == sum(row["counts"]["tokens_kept_out"] for row in results["rounds"]) > 0


def test_a_round_ends_where_the_exact_drift_crosses_the_limit(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token a completion: what the policy can say is the vocabulary, and its KL a sum."""
    limit, start, seen = 0.1, [], []
    plain_make, plain_measure, plain_drifted = online.make_pool, online.measure_drift, online._drifted

    def exact_logprobs(run: Run, pool: Pool) -> Tensor:
        with torch.no_grad():
            rows = [
                run.policy.model(torch.tensor(group.prompt[None].astype(np.int64))).logits[0, -1] for group in pool.measured
            ]
        return torch.stack(rows).double().log_softmax(dim=-1)

    def make_pool(run: Run, position: Any) -> Pool:
        pool = plain_make(run, position)
        start.append(exact_logprobs(run, pool))
        return pool

    def measure(run: Run, pool: Pool) -> Drift | None:
        found, before = plain_measure(run, pool), start[-1]
        assert found is not None
        exact = (before.exp() * (before - exact_logprobs(run, pool))).sum(dim=1).mean()
        seen.append((float(exact), found))
        return found

    def drifted(run: Run, pool: Pool, steps: int) -> bool:
        fired.append(plain_drifted(run, pool, steps))
        at_decision.append(seen[-1])
        return fired[-1]

    fired: list[bool] = []
    at_decision: list[tuple[float, Drift]] = []
    monkeypatch.setattr(online, "make_pool", make_pool)
    monkeypatch.setattr(online, "measure_drift", measure)
    monkeypatch.setattr(online, "_drifted", drifted)
    write_inputs(tmp_path, prompts=8)
    fields = settings(tmp_path, tiny_model_dir, "run", max_new_tokens=1, num_samples=1000, drift_prompts=4, eval_fraction=0.0)
    fields |= {"max_steps": 8, "regenerate_every": 8, "regenerate_on_drift": limit, "drift_steps": 1}
    fields |= {"learning_rate": 1e-3, "warmup_ratio": 0.0, "objective": {"name": "rnce", "num_negatives": 8}}
    results = run_online(OnlineConfig.model_validate(fields))
    assert sum(fired) >= 2
    assert len(results["rounds"]) == sum(fired) + 1
    for exact, found in seen:
        # 4000 completions tell it this well.
        assert found.kl == pytest.approx(exact, rel=0.15, abs=4e-3)
    for ended, (exact, found) in zip(fired, at_decision, strict=True):
        assert ended == (exact > limit) or found.kl_interval[0] <= limit <= found.kl_interval[1]

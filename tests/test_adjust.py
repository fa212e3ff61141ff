"""Rewards are adjusted as the formulas say, nothing else is, and the file says how."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import expit, logit

from conftest import group_row
from ncalign.adjust import transforms
from ncalign.adjust.adjust import run_adjust
from ncalign.adjust.config import AdjustConfig
from ncalign.adjust.fits import PairwiseLength, length_slope, reward_sample
from ncalign.adjust.steps import parse_steps
from ncalign.cli import app as cli
from ncalign.core.errors import ConfigError
from ncalign.data.groups import Candidate, Group, read_groups, write_groups
from ncalign.objectives.targets import TRANSFORMS
from ncalign.rewards.base import combined
from ncalign.rewards.config import ScoreConfig
from ncalign.rewards.score import run_score
from ncalign.training.config import TrainConfig
from ncalign.training.data import count_steps, listed_steps, steps_of
from ncalign.training.train import run_training

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca-eval-candidates" / "candidates.jsonl.gz"
Write = Callable[..., Path]

some_rewards = st.lists(st.none() | st.floats(-1e6, 1e6).map(lambda value: round(value, 3)), min_size=1, max_size=12)


def known(rewards: Sequence[float | None]) -> list[float]:
    return [reward for reward in rewards if reward is not None]


def z_scores(rewards: Sequence[float | None]) -> list[float | None]:
    return transforms.within_group(rewards, transforms.GROUP_TRANSFORMS["zscore"])


def ranks(rewards: Sequence[float | None]) -> list[float | None]:
    return transforms.within_group(rewards, transforms.GROUP_TRANSFORMS["rank"])


def words(count: int) -> str:
    return " ".join(["word"] * count)


def groups_of(rewards: Sequence[Sequence[float | None]], lengths: Sequence[Sequence[int]] | None = None) -> list[Group]:
    """Groups with these rewards, and completions of so many words."""
    lengths = lengths or [range(1, len(row) + 1) for row in rewards]
    return [
        Group(
            id=f"g{number}",
            prompt="Say.",
            candidates=[Candidate(words(count), reward=reward) for reward, count in zip(row, counts, strict=True)],
        )
        for number, (row, counts) in enumerate(zip(rewards, lengths, strict=True))
    ]


def adjusted(folder: Path, groups: Sequence[Group], *steps: str, **fields: Any) -> list[Group]:
    write_groups(groups, folder / "in.jsonl")
    config = AdjustConfig(input=str(folder / "in.jsonl"), output=folder / "out.jsonl", overwrite=True, steps=steps, **fields)
    run_adjust(config)
    return list(read_groups(folder / "out.jsonl"))


def rewards_in(groups: Sequence[Group]) -> list[list[float | None]]:
    return [[candidate.reward for candidate in group.candidates] for group in groups]


class TestTransforms:
    @given(some_rewards)
    def test_z_scores_have_mean_0_and_sd_1(self, rewards: list[float | None]) -> None:
        found = z_scores(rewards)
        values = known(found)
        if len(set(known(rewards))) < 2:
            assert values == [0.0] * len(known(rewards))
        else:
            assert abs(np.mean(values)) < 1e-9
            assert abs(np.std(values) - 1) < 1e-9
            # Rewards far apart from each other, but not from zero, are where this oracle is exact to the tolerance.
            np.testing.assert_allclose(values, stats.zscore(known(rewards)), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("values", [[1e308, -1e308], [5e-324, 0.0], [1e15, 1e15 + 2], [-1e300, -2e300]])
    def test_z_scores_of_extreme_rewards(self, values: list[float]) -> None:
        first, second = z_scores(values)
        sign = 1.0 if values[0] > values[1] else -1.0
        assert (first, second) == pytest.approx((sign, -sign), abs=1e-12)

    @given(some_rewards)
    def test_rank_is_invariant_to_monotone_maps_and_the_share_beaten(self, rewards: list[float | None]) -> None:
        found = ranks(rewards)
        mapped = [None if reward is None else math.atan(reward / 1e5) * 3 + 7 for reward in rewards]
        # Only where the map keeps values apart in floating point.
        if len(set(known(mapped))) == len(set(known(rewards))):
            assert ranks(mapped) == found
        values, others = known(rewards), len(known(rewards)) - 1
        expected = (stats.rankdata(values) - 1) / others if others > 0 else [1.0] * len(values)
        assert known(found) == pytest.approx(list(expected), abs=1e-12)

    @given(st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40))
    def test_quantile_is_scipys_mean_percentile(self, values: list[float]) -> None:
        found = transforms.quantiles(values, np.sort(np.array(values)))
        assert found == pytest.approx([stats.percentileofscore(values, value, kind="mean") / 100 for value in values])

    @given(some_rewards, st.floats(-100, 0), st.floats(0.5, 100))
    def test_clip_and_scale(self, rewards: list[float | None], low: float, high: float) -> None:
        np.testing.assert_array_equal(known(transforms.clipped(rewards, low, high)), np.clip(known(rewards), low, high))
        assert known(transforms.scaled(rewards, -2)) == [-2 * reward for reward in known(rewards)]

    def test_aspects_are_weighted_means_of_what_there_is(self) -> None:
        aspects = {"a": [1.0, None, None, 5.0], "b": [4.0, 2.0, None, None], "unasked": [9.0] * 4}
        found = transforms.weighted_aspects(aspects, {"a": 3.0, "b": 1.0}, 4)
        assert found == [pytest.approx((3 * 1 + 1 * 4) / 4), 2.0, None, 5.0]

    @pytest.mark.parametrize(
        ("how", "expected"), [("mean", (1 + 4) / 2), ("min", 1.0), ("max", 4.0), ("weights", (3 * 1 + 1 * 4) / 4)]
    )
    def test_combined(self, how: str, expected: float) -> None:
        assert combined([[1.0, None, 2.0], [4.0, 1.0, None]], how, [3, 1]) == [expected, None, None]

    @given(some_rewards)
    def test_missing_rewards_stay_missing_in_every_transform(self, rewards: list[float | None]) -> None:
        lengths, there = [float(k * k) for k in range(len(rewards))], [reward is not None for reward in rewards]
        shares = [None if reward is None else float(expit(reward / 1e5)) for reward in rewards]
        for found in (
            z_scores(rewards),
            ranks(rewards),
            transforms.quantiles(rewards, np.array([0.0, 1.0])),
            transforms.clipped(rewards, -1, 1),
            transforms.scaled(rewards, 2),
            transforms.without_length(rewards, lengths, 0.5),
            transforms.without_length_odds(shares, lengths, 1.0, 3.0),
        ):
            assert [reward is not None for reward in found] == there

    def test_length_in_odds_is_the_logit_less_its_term(self) -> None:
        rewards, lengths, phi, scale = [0.2, 0.9, 1.0, 0.0, None], [10.0, 40.0, 20.0, 30.0, 999.0], 1.7, 12.0
        found = transforms.without_length_odds(rewards, lengths, phi, scale)
        mean = (10 + 40 + 20 + 30) / 4
        expected = [float(expit(logit(r) - phi * math.tanh((n - mean) / scale))) for r, n in ((0.2, 10.0), (0.9, 40.0))]
        assert found == [*(pytest.approx(value, rel=1e-12) for value in expected), 1.0, 0.0, None]


class TestFits:
    @given(
        st.lists(st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 300)), min_size=1, max_size=6), min_size=1, max_size=8)
    )
    def test_length_removal_leaves_no_slope_within_groups(self, rows: list[list[tuple[float, int]]]) -> None:
        def fit(rewards: Sequence[Sequence[float | None]]) -> float | None:
            lengths = [[float(length) for _, length in row] for row in rows]
            return length_slope(zip(rewards, lengths, strict=True))[0]

        slope = fit([[reward for reward, _ in row] for row in rows])
        if slope is None:
            assert all(len({length for _, length in row}) == 1 for row in rows)
            return
        after = fit([transforms.without_length([r for r, _ in row], [float(n) for _, n in row], slope) for row in rows])
        assert after == pytest.approx(0, abs=1e-9)

    def test_slope_is_that_of_least_squares_with_a_constant_for_each_group(self) -> None:
        chance = np.random.default_rng(0)
        sizes = [3, 1, 5, 4]
        lengths = [chance.integers(1, 200, size).astype(float) for size in sizes]
        rewards = [
            0.02 * length + chance.normal(0, 1, size) + 5 * k
            for k, (length, size) in enumerate(zip(lengths, sizes, strict=True))
        ]
        slope, spread = length_slope((list(row), list(counts)) for row, counts in zip(rewards, lengths, strict=True))
        dummies = np.repeat(np.eye(len(sizes)), sizes, axis=0)
        design = np.column_stack([np.concatenate(lengths), dummies])
        solution = np.linalg.lstsq(design, np.concatenate(rewards), rcond=None)[0]
        assert slope == pytest.approx(solution[0], rel=1e-9)
        within = np.concatenate([length - length.mean() for length in lengths])
        assert spread == pytest.approx(np.sqrt(np.mean(within**2)))

    def test_of_very_many_candidates_some_pairs_are_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chance = np.random.default_rng(3)
        lengths = chance.integers(10, 100, 200).tolist()
        rewards = [float(chance.random() < 0.2 + 0.006 * length) for length in lengths]
        every, some = PairwiseLength(40.0), PairwiseLength(40.0)
        every.add(rewards, lengths, [None] * 200)
        monkeypatch.setattr("ncalign.adjust.fits._MOST_PAIRS", 5000)
        some.add(rewards, lengths, [None] * 200)
        # A quarter of the pairs, half of which are ties.
        assert some.phi() == pytest.approx(every.phi(), rel=0.15)

    def test_phi_is_that_of_a_logistic_regression_on_all_pairs(self) -> None:
        """The oracle writes every pair out and minimises its weighted log-loss with another optimiser, derivative-free."""
        chance, fit, rows = np.random.default_rng(1), PairwiseLength(40.0), []
        for _ in range(120):
            lengths, sources = chance.integers(1, 200, 4).astype(float), [*chance.permutation(["a", "b", "c"]), "a"]
            t = np.tanh((lengths - lengths.mean()) / 40)
            quality = np.array([{"a": 0.0, "b": 0.7, "c": -0.4}[source] for source in sources])
            rewards = expit(chance.normal() + quality + 0.9 * t + chance.normal(0, 0.5, 4))
            fit.add(list(rewards), list(lengths), sources)
            rows += [
                (rewards[i] * (1 - rewards[j]), rewards[j] * (1 - rewards[i]), t[i] - t[j], sources[i], sources[j])
                for i in range(4)
                for j in range(4)
                if i < j
            ]
        won, lost, apart = (np.array([row[k] for row in rows]) for k in range(3))
        signs = np.array([[float(row[3] == name) - float(row[4] == name) for name in ("b", "c")] for row in rows])

        def loss(theta: np.ndarray) -> float:
            logits = signs @ theta[:2] + theta[2] * apart
            return float((won * np.logaddexp(0, -logits) + lost * np.logaddexp(0, logits)).sum())

        options = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 10000}
        expected = optimize.minimize(loss, np.zeros(3), method="Nelder-Mead", options=options).x
        assert fit.phi() == pytest.approx(expected[2], rel=1e-4)
        assert fit.num_sources == 3

    def test_phi_finds_what_was_planted_where_quality_and_length_go_together(self) -> None:
        """Outcomes are 0 or 1; the better source writes longer, and without its quality all of that would pass for length."""
        chance, with_sources, without = np.random.default_rng(2), PairwiseLength(50.0), PairwiseLength(50.0)
        for _ in range(6000):
            lengths = np.array([chance.normal(100, 50), chance.normal(140, 50)])
            t = np.tanh((lengths - lengths.mean()) / 50)
            rewards = (chance.random(2) < expit(chance.normal(0, 2) + np.array([0.0, 1.5]) + 0.8 * t)).astype(float)
            with_sources.add(list(rewards), list(lengths), ["short", "long"])
            without.add(list(rewards), list(lengths), [None, None])
        # Pairs with one success each: some 2500; the standard error of phi is about .06.
        assert with_sources.phi() == pytest.approx(0.8, abs=0.2)
        assert without.phi() is not None
        assert without.phi() > 1.2

    def test_phi_is_none_where_length_decides_everything(self) -> None:
        fit = PairwiseLength(1.0)
        fit.add([1.0, 0.0], [3.0, 1.0], [None, None])
        assert fit.phi() is None
        assert PairwiseLength(1.0).phi() is None

    def test_sample_is_exact_up_to_its_size_and_even_beyond(self) -> None:
        values = [float(k) for k in range(1000)]
        whole, num_whole = reward_sample(([value, None] for value in values), 1000, seed=0)
        part, num_part = reward_sample(([value] for value in values), 200, seed=0)
        assert list(whole) == values
        assert (num_whole, num_part, len(part)) == (1000, 1000, 200)
        assert set(part) <= set(values)
        # The mean of 200 of 1000 drawn without putting back: within four standard errors.
        error = np.std(values) * math.sqrt((1 - 0.2) / 200)
        assert abs(part.mean() - np.mean(values)) < 4 * error


class TestSpelling:
    @pytest.mark.parametrize(
        ("step", "message"),
        [
            ("zscor", "steps: unknown step 'zscor'; did you mean 'zscore'?"),
            ("xyz", "steps: unknown step 'xyz'; known are zscore, rank, dense_rank, quantile, clip:LOW:HIGH"),
            ("zscore:1", "steps: 'zscore:1': zscore takes nothing after it"),
            ("clip:3", "steps: 'clip:3': clip:LOW:HIGH is needed, for instance clip:-3:3"),
            ("clip:a:1", "steps: 'clip:a:1': found 'a'; a finite number is needed"),
            ("clip:-inf:1", "steps: 'clip:-inf:1': found '-inf'; a finite number is needed"),
            ("clip:2:1", "steps: 'clip:2:1': the lower limit, 2, must be less than the upper, 1"),
            ("scale:0", "steps: 'scale:0': a factor of 0 makes all rewards equal"),
            ("length:word", "steps: 'length:word': found 'word'; did you mean 'words'?"),
            ("length:pages", "steps: 'length:pages': found 'pages'; length is counted in one of words, characters, log_words"),
            (
                "honesty=1",
                "weights of aspects are joined by colons, since a comma ends a step: aspects:helpfulness=2:honesty=1",
            ),
            ("aspects:a=0", "steps: 'aspects:a=0': a has weight 0; a weight must be above 0"),
            ("aspects:a:a=2", "steps: 'aspects:a:a=2': a stands there twice"),
            ("aspects:=2", "steps: 'aspects:=2': an aspect has no name"),
        ],
    )
    def test_problems_are_named(self, step: str, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_steps([step])

    def test_all_problems_come_at_once(self) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_steps(["zscor", "rank", "clip:1", "merge", "merge"])
        assert len(caught.value.problems) == 3

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "nothing to do"),
            ({"steps": ("merge",)}, "merge needs files to merge"),
            ({"merge": ("b",), "merge_with": "weights"}, "go together"),
            ({"merge": ("b",), "merge_with": "weights", "merge_weights": (1.0,)}, "has 1 numbers, and 2 are needed"),
        ],
    )
    def test_configurations_that_say_nothing_are_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AdjustConfig(input="a", output=Path("b.jsonl"), **fields)


class TestAdjust:
    def test_steps_follow_one_another_and_are_recorded(self, tmp_path: Path) -> None:
        rewards = [[5.0, -4.0, None], [1.0, 1.0, 1.0], [0.0, 2.0, 9.0]]
        found = adjusted(tmp_path, groups_of(rewards), "clip:-3:3", "zscore")
        expected = [z_scores(transforms.clipped(row, -3, 3)) for row in rewards]
        assert rewards_in(found) == expected
        for group in found:
            assert group.metadata["reward_steps"] == ["given in in.jsonl", "clip: -3 to 3", "zscore"]

    @pytest.mark.parametrize(("step", "transform"), [("zscore", "z_score"), ("z_score", "z_score"), ("rank", "rank")])
    def test_a_name_that_objectives_know_too_means_the_same(self, tmp_path: Path, step: str, transform: str) -> None:
        rewards = [[5.0, -1.0, 5.0, 2.0], [0.1, 0.4, 0.2, 0.2]]
        values = torch.tensor(rewards, dtype=torch.float64)
        found = adjusted(tmp_path, groups_of(rewards), step)
        assert rewards_in(found) == TRANSFORMS[transform](values, torch.ones_like(values, dtype=torch.bool)).tolist()
        assert found[0].metadata["reward_steps"][-1] == step.replace("z_score", "zscore")

    def test_rank_shares_places_and_dense_rank_does_not(self, tmp_path: Path) -> None:
        # 5 beats two of three others and ties with one, 2 beats one; of the levels -1, 2, 5 it is the middle one.
        assert rewards_in(adjusted(tmp_path, groups_of([[5.0, -1.0, 5.0, 2.0]]), "rank")) == [[2.5 / 3, 0.0, 2.5 / 3, 1 / 3]]
        assert rewards_in(adjusted(tmp_path, groups_of([[5.0, -1.0, 5.0, 2.0]]), "dense_rank")) == [[1.0, 0.0, 1.0, 0.5]]

    def test_a_second_time_appends(self, tmp_path: Path) -> None:
        once = adjusted(tmp_path, groups_of([[1.0, 2.0]]), "rank")
        twice = adjusted(tmp_path, once, "scale:-1")
        assert twice[0].metadata["reward_steps"] == ["given in in.jsonl", "rank", "scale: times -1"]
        assert rewards_in(twice) == [[0.0, -1.0]]

    def test_quantile_is_over_the_whole_set(self, tmp_path: Path) -> None:
        rewards = [[1.0, 2.0], [2.0, 7.0, None], [3.0]]
        found = adjusted(tmp_path, groups_of(rewards), "quantile")
        flat = [1.0, 2.0, 2.0, 7.0, 3.0]
        expected = [
            [None if r is None else (sum(o < r for o in flat) + sum(o == r for o in flat) / 2) / 5 for r in row]
            for row in rewards
        ]
        assert rewards_in(found) == [[pytest.approx(r) if r is not None else None for r in row] for row in expected]
        assert found[0].metadata["reward_steps"][-1] == "quantile: place among the 5 rewards"

    def test_length_is_learnt_from_rewards_as_the_steps_before_left_them(self, tmp_path: Path) -> None:
        chance = random.Random(0)
        lengths = [[chance.randint(1, 60) for _ in range(4)] for _ in range(30)]
        rewards = [[0.1 * n + chance.gauss(0, 1) for n in row] for row in lengths]
        found = adjusted(tmp_path, groups_of(rewards, lengths), "zscore", "length")
        slope, _ = length_slope(
            (z_scores(row), [float(n) for n in counts]) for row, counts in zip(rewards, lengths, strict=True)
        )
        assert slope is not None
        note = found[0].metadata["reward_steps"][-1]
        assert note == f"length: {slope:.4g} a word, removed"
        again, _ = length_slope(
            (row, [float(n) for n in counts]) for row, counts in zip(rewards_in(found), lengths, strict=True)
        )
        assert again == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize(
        ("unit", "length"), [("words", 3.0), ("characters", 14.0), ("log_words", math.log(4))], ids=lambda value: str(value)
    )
    def test_units(self, unit: str, length: float) -> None:
        assert transforms.text_length("four words? no", unit) == length  # type: ignore[arg-type]

    def test_equal_lengths_leave_nothing_to_remove(self, tmp_path: Path) -> None:
        rewards = [[0.1, 0.9], [0.4, 0.3]]
        for step in ("length", "length_glm"):
            found = adjusted(tmp_path, groups_of(rewards, [[3, 3], [5, 5]]), step)
            assert rewards_in(found) == rewards
            assert found[0].metadata["reward_steps"][-1].startswith(f"{step}: nothing to remove")

    def test_length_glm_takes_its_term_off_the_log_odds(self, tmp_path: Path) -> None:
        chance = np.random.default_rng(3)
        lengths = [[int(n) for n in chance.integers(1, 80, 3)] for _ in range(80)]
        rewards = [[float(expit(chance.normal() + 0.04 * (n - 40))) for n in row] for row in lengths]
        found = adjusted(tmp_path, groups_of(rewards, lengths), "length_glm:words")
        note = found[0].metadata["reward_steps"][-1]
        phi, scale = (float(number) for number in re.findall(r"phi ([\d.]+) of tanh\(length / ([\d.]+)", note)[0])
        assert phi > 0
        for group, before, counts in zip(found, rewards, lengths, strict=True):
            t = np.tanh((np.array(counts) - np.mean(counts)) / scale)
            # phi and scale are recorded with four digits.
            np.testing.assert_allclose(
                [logit(candidate.reward) for candidate in group.candidates], logit(before) - phi * t, rtol=2e-3, atol=2e-3
            )

    def test_length_glm_refuses_what_it_can_not_use(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"in.jsonl:1: group 'g0': candidates\[1\] has reward 7.*put `quantile` or `rank`"):
            adjusted(tmp_path, groups_of([[0.5, 7.0]]), "length_glm")
        with pytest.raises(ValueError, match="every reward is 0 or 1"):
            adjusted(tmp_path, groups_of([[0.0, 1.0]]), "length_glm")
        skipped = adjusted(tmp_path, groups_of([[0.5, 7.0], [0.2, 0.6], [0.7, 0.4]]), "length_glm", on_bad_row="skip")
        assert [group.id for group in skipped] == ["g1", "g2"]

    def test_aspects_of_raw_ultrafeedback(self, tmp_path: Path, write_jsonl: Write) -> None:
        def completion(helpfulness: str, honesty: str, overall: float) -> dict[str, Any]:
            annotations = {"helpfulness": {"Rating": helpfulness}, "honesty": {"Rating": honesty}}
            return {"response": f"r{overall}", "annotations": annotations, "overall_score": overall}

        rows = [{"instruction": "Q", "completions": [completion("5", "2", 7.0), completion("N/A", "4", 3.0)]}]
        path, output = write_jsonl(rows), tmp_path / "out.parquet"
        run_adjust(AdjustConfig(input=str(path), output=output, steps=("aspects:helpfulness=2:honesty=1",)))
        (group,) = read_groups(output)
        assert rewards_in([group]) == [[pytest.approx((2 * 5 + 1 * 2) / 3), 4.0]]
        assert group.metadata["reward_steps"] == ["ultrafeedback: overall_score", "aspects: helpfulness=2, honesty=1"]
        run_adjust(AdjustConfig(input=str(path), output=output, overwrite=True, steps=("aspects",)))
        (group,) = read_groups(output)
        assert rewards_in([group]) == [[(5 + 2) / 2, 4.0]]

    @pytest.mark.parametrize(
        ("aspects", "step", "message"),
        [
            ({"honesty": [1, 2]}, "aspects:honest", "no group has the aspect `honest`: did you mean `honesty`?"),
            ({"honesty": [1]}, "aspects:honesty", "in.jsonl:1: group 'g0': metadata.aspects.honesty is a list of 1"),
            ({"honesty": [1, "x"]}, "aspects:honesty", "metadata.aspects.honesty holds 'x' (a string)"),
            ([1], "aspects:honesty", "metadata.aspects is a list of 1"),
            ({}, "aspects", "there are none in metadata.aspects"),
        ],
    )
    def test_bad_aspects_are_named(self, tmp_path: Path, aspects: Any, step: str, message: str) -> None:
        group = groups_of([[1.0, 2.0]])[0]
        group.metadata["aspects"] = aspects
        with pytest.raises(ValueError, match=re.escape(message)):
            adjusted(tmp_path, [group], step)

    def test_a_record_of_another_meaning_is_refused(self, tmp_path: Path) -> None:
        group = groups_of([[1.0, 2.0]])[0]
        group.metadata["reward_steps"] = 3
        with pytest.raises(
            ValueError, match=r"in.jsonl:1: group 'g0': metadata.reward_steps is 3 \(a number\): a list of strings"
        ):
            adjusted(tmp_path, [group], "rank")

    def test_results_out_of_range_name_step_and_group_and_leave_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"group 'g0': step 'scale: times 1e\+10': reward is 1e\+20"):
            adjusted(tmp_path, groups_of([[1e10, 2.0]]), "scale:1e10")
        assert not (tmp_path / "out.jsonl").exists()

    def test_everything_but_rewards_and_record_is_as_it_was(self, tmp_path: Path) -> None:
        group = Group(
            id="x",
            prompt=[{"role": "user", "content": "Hi"}],
            candidates=[
                Candidate("a", reward=1.0, reference_logprob=-2.0, source="m", finished=False),
                Candidate([{"role": "assistant", "content": "b c"}], reward=3.0),
            ],
            metadata={"task": {"k": [1, None]}},
        )
        (found,) = adjusted(tmp_path, [group], "scale:2")
        assert found.metadata.pop("reward_steps") == ["given in in.jsonl", "scale: times 2"]
        assert (found.id, found.prompt, found.metadata) == (group.id, group.prompt, group.metadata)
        for before, after in zip(group.candidates, found.candidates, strict=True):
            assert after.reward == 2 * (before.reward or 0)
            assert (after.completion, after.reference_logprob) == (before.completion, before.reference_logprob)
            assert (after.source, after.finished) == (before.source, before.finished)

    @pytest.mark.skipif(not SHARED.is_file(), reason="the shared data are not here")
    def test_length_glm_lowers_the_length_correlation_of_real_preferences(self, tmp_path: Path) -> None:
        def correlation(path: Path) -> float:
            return float(
                np.mean(
                    [
                        stats.spearmanr(
                            [c.reward for c in group.candidates], [len(str(c.completion)) for c in group.candidates]
                        )[0]
                        for group in read_groups(path)
                    ]
                )
            )

        output = tmp_path / "out.jsonl"
        run_adjust(AdjustConfig(input=str(SHARED), output=output, steps=("length_glm",)))
        assert 0 < correlation(output) < correlation(SHARED) - 0.1


class TestMerge:
    def files(self, folder: Path, second: Sequence[Sequence[float | None]] = ((30.0, 10.0), (5.0, 5.0))) -> tuple[str, str]:
        """The second has the groups, and their candidates, the other way round."""
        first, other = groups_of([[1.0, 2.0], [4.0, None]]), groups_of(second)
        for group in other:
            group.candidates.reverse()
        write_groups(first, folder / "a.jsonl")
        write_groups(other[::-1], folder / "b.jsonl")
        return str(folder / "a.jsonl"), str(folder / "b.jsonl")

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, [[(1 + 30) / 2, (2 + 10) / 2], [(4 + 5) / 2, None]]),
            ({"merge_with": "min"}, [[1.0, 2.0], [4.0, None]]),
            ({"merge_with": "max"}, [[30.0, 10.0], [5.0, None]]),
            (
                {"merge_with": "weights", "merge_weights": (3.0, 1.0)},
                [[(3 + 30) / 4, (6 + 10) / 4], [(12 + 5) / 4, None]],
            ),
        ],
    )
    def test_rewards_meet_by_id_and_completion(self, tmp_path: Path, fields: dict[str, Any], expected: Any) -> None:
        first, other = self.files(tmp_path)
        run_adjust(AdjustConfig(input=first, output=tmp_path / "out.jsonl", merge=(other,), **fields))
        assert rewards_in(list(read_groups(tmp_path / "out.jsonl"))) == expected

    def test_steps_before_merge_are_done_to_each_file_by_itself(self, tmp_path: Path) -> None:
        first, other = self.files(tmp_path)
        config = AdjustConfig(input=first, output=tmp_path / "o.jsonl", merge=(other,), steps=("zscore", "merge", "scale:10"))
        result = run_adjust(config)
        groups = list(read_groups(tmp_path / "o.jsonl"))
        # -1 and 1 in the one, 1 and -1 in the other; then a lone reward and equal ones.
        assert rewards_in(groups) == [[0.0, 0.0], [0.0, None]]
        assert groups[0].metadata["reward_steps"] == [
            "given in a.jsonl",
            "zscore",
            "merge: mean with b.jsonl (given in b.jsonl; zscore)",
            "scale: times 10",
        ]
        assert result["steps"] == ["zscore", "merge: mean with b.jsonl", "scale: times 10"]

    def test_equal_completions_meet_in_their_order(self, tmp_path: Path) -> None:
        twins = [
            Group(id="g", prompt="p", candidates=[Candidate("same", reward=r) for r in row])
            for row in ([1.0, 2.0], [10.0, 20.0])
        ]
        for name, group in zip(("a", "b"), twins, strict=True):
            write_groups([group], tmp_path / f"{name}.jsonl")
        config = AdjustConfig(
            input=str(tmp_path / "a.jsonl"), output=tmp_path / "o.jsonl", merge=(str(tmp_path / "b.jsonl"),), merge_with="max"
        )
        run_adjust(config)
        assert rewards_in(list(read_groups(tmp_path / "o.jsonl"))) == [[10.0, 20.0]]

    def mismatch(self, folder: Path, other: Sequence[Group], **fields: Any) -> AdjustConfig:
        write_groups(groups_of([[1.0, 2.0], [3.0, 4.0]]), folder / "a.jsonl")
        write_groups(other, folder / "b.jsonl")
        return AdjustConfig(
            input=str(folder / "a.jsonl"), output=folder / "o.jsonl", merge=(str(folder / "b.jsonl"),), **fields
        )

    def test_a_group_that_the_other_file_lacks(self, tmp_path: Path) -> None:
        config = self.mismatch(tmp_path, groups_of([[1.0, 2.0]]))
        with pytest.raises(ValueError, match=r"a.jsonl:2: group 'g1': .*b.jsonl has no group with this id"):
            run_adjust(config)
        assert not config.output.exists()

    def test_a_group_that_only_the_other_file_has(self, tmp_path: Path) -> None:
        config = self.mismatch(tmp_path, groups_of([[1.0, 2.0]] * 3))
        with pytest.raises(ValueError, match=r"b.jsonl: 1 of its groups are not in .*a.jsonl, the first b.jsonl:3: group 'g2'"):
            run_adjust(config)
        assert not config.output.exists()

    @pytest.mark.parametrize(
        ("rewards", "lengths", "message"),
        [
            (
                [1.0, 2.0],
                [1, 7],
                r"a.jsonl:2: group 'g1': b.jsonl:2 .* has no candidate with the completion of candidates\[1\]",
            ),
            ([1.0, 2.0, 3.0], [1, 2, 7], r"a.jsonl:2: group 'g1': b.jsonl:2 .* has 1 completions that this group lacks"),
        ],
    )
    def test_completions_that_differ(self, tmp_path: Path, rewards: list[float], lengths: list[int], message: str) -> None:
        config = self.mismatch(tmp_path, groups_of([[1.0, 2.0], rewards], [[1, 2], lengths]))
        with pytest.raises(ValueError, match=message):
            run_adjust(config)

    def test_mismatches_may_be_skipped_and_are_counted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        other = groups_of([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], [[1, 2], [1, 7], [1, 2]])
        result = run_adjust(self.mismatch(tmp_path, other, on_bad_row="skip"))
        assert (result["groups"], result["rows_skipped"]) == (1, 1)
        assert [group.id for group in read_groups(tmp_path / "o.jsonl")] == ["g0"]
        assert "1 of its groups are not in" in capsys.readouterr().err


class TestRecord:
    def test_command_line_end_to_end(self, groups_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = groups_file.with_name("out.parquet")
        command = ["adjust", str(groups_file), str(output), "--json", "--steps", "clip:0.05:3", "length", "zscore"]
        assert cli.main(command) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["groups"], result["candidates"], result["unknown_rewards"]) == (12, 36, 0)
        groups = list(read_groups(output))
        assert all(group.metadata["reward_steps"] == [f"given in {groups_file.name}", *result["steps"]] for group in groups)
        assert result["steps"][0] == "clip: 0.05 to 3"
        for group in groups:
            assert np.std([candidate.reward for candidate in group.candidates]) == pytest.approx(1)

    def test_bad_steps_are_bad_usage(self, groups_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adjust", str(groups_file), "o.jsonl", "--steps", "zscor", "aspects:a=1,b=2"]) == 2
        printed = capsys.readouterr().err
        assert "steps: unknown step 'zscor'; did you mean 'zscore'?" in printed
        assert "unknown step 'b=2'; weights of aspects are joined by colons" in printed

    def test_score_records_its_source_in_place_of_what_was_there(self, tmp_path: Path) -> None:
        (found,) = adjusted(tmp_path, groups_of([[1.0, 2.0]]), "rank")
        assert found.metadata["reward_steps"]
        (tmp_path / "r.py").write_text("def brief(prompt, completions):\n    return [1 / len(c) for c in completions]\n")
        source = f"{tmp_path / 'r.py'}:brief"
        for names, record in (((source,), f"score: {source}"), ((source, source), f"score: min of {source}, {source}")):
            scored = tmp_path / "scored.jsonl"
            config = {"data": tmp_path / "out.jsonl", "output": scored, "overwrite": True, "reward": names, "combine": "min"}
            run_score(ScoreConfig.model_validate(config))
            (group,) = read_groups(scored)
            assert group.metadata["reward_steps"] == [record]

    def test_ways_that_are_listed_are_bounded_and_lose_no_group(self) -> None:
        counts: Counter[tuple[str, ...]] = Counter()
        for number in range(100):
            count_steps(counts, (f"way {number}",))
            count_steps(counts, ("way 0",))
        listed = listed_steps(counts)
        assert len(listed) < 30
        assert listed[0] == {"steps": ["way 0"], "groups": 101}
        assert sum(row["groups"] for row in listed) == 200

    def test_an_entry_of_another_meaning_does_not_stop_training(self) -> None:
        group = Group(id="g", prompt="p", candidates=[], metadata={"reward_steps": [1]})
        assert steps_of(group) == ("metadata.reward_steps is not a list of strings",)

    def test_training_says_how_rewards_came_to_be(self, tmp_path: Path, groups_file: Path, tiny_model_dir: Path) -> None:
        scored = tmp_path / "adjusted.jsonl"
        run_adjust(AdjustConfig(input=str(groups_file), output=scored, steps=("zscore",)))
        lines = scored.read_text().splitlines()
        plain = [json.dumps({**group_row(index, [0.0, 1.0]), "id": f"plain{index}"}) for index in range(3)]
        (tmp_path / "mixed.jsonl").write_text("\n".join([*lines, *plain]) + "\n")
        results = run_training(
            TrainConfig(
                model=str(tiny_model_dir),
                data=tmp_path / "mixed.jsonl",
                output_dir=tmp_path / "run",
                cache_dir=tmp_path / "cache",
                max_steps=1,
                save_steps=0,
                report_to=(),
            )
        )
        expected = [
            {"steps": [f"given in {groups_file.name}", "zscore"], "groups": 12},
            {"steps": ["given in mixed.jsonl"], "groups": 3},
        ]
        assert results["reward_steps"] == expected
        assert json.loads((tmp_path / "run" / "results.json").read_text())["reward_steps"] == expected

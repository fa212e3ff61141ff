"""Fewer candidates and spoilt ones: what is chosen, what is changed, what is left alone, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from conftest import group_row, weights
from ncalign.cli.app import main
from ncalign.model.encoding import EncodedGroup
from ncalign.objectives.method import needs_preference
from ncalign.online.config import OnlineConfig
from ncalign.online.offline import Offline
from ncalign.training.config import Corrupt, CorruptKind, TrainConfig
from ncalign.training.engine import Engine
from ncalign.training.plan import dry_run
from ncalign.training.train import run_training
from ncalign.training.variants import Varied, flipped, kept_candidates, swapped, truncated, vary_groups

EOS = 99


def encoded(name: str, prompt: Sequence[int], completions: Sequence[Sequence[int]], rewards: Sequence[float]) -> EncodedGroup:
    """A group of token ids with reference log-probs -1, -2, ..."""
    return EncodedGroup(
        id=name,
        origin="",
        prompt=np.asarray(prompt, dtype=np.int32),
        completions=tuple(np.asarray(ids, dtype=np.int32) for ids in completions),
        rewards=tuple(rewards),
        reference_logprobs=tuple(-1.0 - k for k in range(len(rewards))),
    )


def some_groups(number: int = 40) -> list[EncodedGroup]:
    """Groups of four with the best at a place that changes; no token is in two groups."""
    groups = []
    for place in range(number):
        first = 100 * (place + 1)
        completions = [[first + 10 * k + i for i in range(4 + k)] + [EOS] for k in range(4)]
        rewards = [float((k + place) % 4) for k in range(4)]
        groups.append(encoded(f"g{place}", [first + 90, first + 91], completions, rewards))
    return groups


def varied(groups: Sequence[EncodedGroup], kind: CorruptKind | None = None, **options: Any) -> Varied:
    corrupt = None if kind is None else Corrupt(kind=kind, share=options.pop("share", 1.0))
    settings = {"max_candidates": None, "seed": 0, "max_length": 64, "refuse": needs_preference} | options
    return vary_groups(groups, corrupt=corrupt, **settings)


class TestKeptCandidates:
    def test_the_best_stays_and_groups_that_are_small_enough_are_whole(self) -> None:
        for group in range(50):
            assert 2 in kept_candidates([0.0, 1.0, 5.0, 1.0], 2, seed=0, group=str(group))
        assert kept_candidates([0.0, 1.0], 2, seed=0, group="a") == (0, 1)
        assert kept_candidates([0.0, 1.0, 2.0], None, seed=0, group="a") == (0, 1, 2)

    def test_each_larger_choice_adds_to_the_smaller_one(self) -> None:
        rewards = [0.0, 1.0, 1.0, 0.5, 0.2, 1.0]
        for group in range(50):
            chosen = [set(kept_candidates(rewards, most, seed=3, group=str(group))) for most in (2, 3, 4, 5, 6)]
            assert [len(one) for one in chosen] == [2, 3, 4, 5, 6]
            assert all(small < large for small, large in itertools.pairwise(chosen))

    def test_a_preference_is_left_where_there_was_one(self) -> None:
        # Five are as good as the best: a free draw of one other would be worse than it once in six times.
        rewards = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
        assert {kept_candidates(rewards, 2, seed=0, group=str(group)) for group in range(30)} == {(0, 3)}
        assert len(kept_candidates([1.0, 1.0, 1.0], 2, seed=0, group="tied")) == 2

    def test_others_are_drawn_evenly_by_seed_and_group(self) -> None:
        draws = [kept_candidates([9.0, 1.0, 2.0, 3.0], 2, seed=0, group=str(group))[1] for group in range(3000)]
        shares = np.bincount(draws, minlength=4)[1:] / len(draws)
        # Four standard errors of a share of a third.
        assert np.abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / len(draws))
        again = [kept_candidates([9.0, 1.0, 2.0, 3.0], 2, seed=1, group=str(group))[1] for group in range(3000)]
        assert draws != again


class TestCorruption:
    def test_a_swap_keeps_the_tokens_and_the_end(self) -> None:
        ids = np.array([*range(20), EOS], dtype=np.int32)
        for seed in range(20):
            made = swapped(ids, np.random.default_rng(seed))
            assert made is not None
            assert sorted(made.tolist()) == sorted(ids.tolist())
            assert made[-1] == EOS
            assert np.sum(made != ids) == 2 * 2

    @pytest.mark.parametrize("ids", [[EOS], [5, EOS], [5, 5, 5, EOS]])
    def test_what_can_not_be_swapped_is_not(self, ids: list[int]) -> None:
        assert swapped(np.array(ids, dtype=np.int32), np.random.default_rng(0)) is None

    @pytest.mark.parametrize(
        ("ids", "left"), [([1, 2, 3, 4, EOS], [1, 2, EOS]), ([1, 2, 3, EOS], [1, 2, EOS]), ([1, EOS], None), ([EOS], None)]
    )
    def test_half_is_cut_and_the_end_stays(self, ids: list[int], left: list[int] | None) -> None:
        made = truncated(np.array(ids, dtype=np.int32))
        assert (None if made is None else made.tolist()) == left

    def test_rewards_are_turned_round(self) -> None:
        assert flipped([2.0, 5.0, 3.0]) == (5.0, 2.0, 4.0)

    def test_swapped_negatives_are_copies_of_the_best(self) -> None:
        groups = some_groups()
        found = varied(groups, "swap_tokens")
        assert found.changed == 3 * len(groups)
        for before, after in zip(groups, found.groups, strict=True):
            best = int(np.argmax(before.rewards))
            for k in range(4):
                own = sorted(before.completions[best].tolist())
                assert sorted(after.completions[k].tolist()) == own
                assert np.array_equal(after.completions[k], before.completions[best]) == (k == best)
                assert (after.reference_logprobs[k] is None) == (k != best)
            assert after.rewards == before.rewards

    def test_a_completion_of_another_prompt_is_of_another_and_fits(self) -> None:
        groups = some_groups()
        # One has the same prompt as another: its completions are none of another prompt's.
        groups[1] = encoded("twin", groups[0].prompt.tolist(), [[1, EOS], [2, EOS]], [0.0, 1.0])
        found = varied(groups, "other_prompt", max_length=6)
        for before, after in zip(groups, found.groups, strict=True):
            for k in range(len(before.completions)):
                ids = set(after.completions[k].tolist()) - {EOS}
                if k == int(np.argmax(before.rewards)):
                    assert np.array_equal(after.completions[k], before.completions[k])
                    continue
                source = [group for group in groups if ids <= set(np.concatenate(group.completions).tolist())]
                assert source
                assert not any(np.array_equal(group.prompt, before.prompt) for group in source)
                assert len(after.completions[k]) <= 4

    def test_a_share_is_spoilt_and_the_same_one_for_a_seed(self) -> None:
        groups = some_groups(200)
        found = varied(groups, "truncate", share=0.3)
        # Of 600 candidates that are not the best; five standard errors.
        assert abs(found.changed / 600 - 0.3) < 5 * np.sqrt(0.21 / 600)
        again, other = varied(groups, "truncate", share=0.3), varied(groups, "truncate", share=0.3, seed=1)

        def lengths(made: Varied) -> list[list[int]]:
            return [[len(ids) for ids in group.completions] for group in made.groups]

        assert lengths(found) == lengths(again) != lengths(other)
        # What happens to a group is its own affair.
        assert lengths(varied(groups[50:], "truncate", share=0.3)) == lengths(found)[50:]

    def test_flips_touch_rewards_alone(self) -> None:
        groups = some_groups(200)
        found = varied(groups, "flip_rewards", share=0.5)
        turned = [
            after.rewards == flipped([r or 0.0 for r in before.rewards])
            for before, after in zip(groups, found.groups, strict=True)
        ]
        assert sum(turned) == found.changed
        assert abs(found.changed / 200 - 0.5) < 5 * np.sqrt(0.25 / 200)
        for before, after, flip in zip(groups, found.groups, turned, strict=True):
            assert flip or after.rewards == before.rewards
            assert after.completions == before.completions
            assert after.reference_logprobs == before.reference_logprobs

    def test_what_changes_nothing_is_refused(self) -> None:
        short = [encoded("a", [1], [[5, EOS], [6, EOS]], [1.0, 0.0])]
        with pytest.raises(ValueError, match=r"corrupt: truncate with share: 1 changes nothing in 1 training groups"):
            varied(short, "truncate")
        with pytest.raises(ValueError, match=r"max_candidates: 4 leaves out nothing: no training group has more than 4"):
            varied(some_groups(), max_candidates=4)

    def test_groups_that_the_method_can_not_use_then_are_told(self) -> None:
        with pytest.raises(ValueError, match=r"leave 40 of 40 training groups .*group 'g0': too few"):
            varied(some_groups(), max_candidates=2, refuse=lambda rewards: "too few" if len(rewards) < 3 else None)


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> Callable[..., TrainConfig]:
    """A run of three steps on twelve groups of two to four candidates, three of them held out."""

    def make(name: str, **fields: Any) -> TrainConfig:
        values = {
            "model": str(tiny_model_dir),
            "data": groups_file,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
        }
        values |= {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 3,
            "eval_fraction": 0.25,
            "objective": {"name": "rnce"},
        }
        return TrainConfig.model_validate(values | {"dtype": "float32", "report_to": ()} | fields)

    return make


class TestTraining:
    def test_training_sees_the_variant_and_evaluation_does_not(
        self, config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[str, EncodedGroup] = {}
        plain = Engine.train_pass

        def watched(self: Engine, part: Any, **options: Any) -> Any:
            seen.update({group.id: group for group in part.groups})
            return plain(self, part, **options)

        monkeypatch.setattr(Engine, "train_pass", watched)
        whole = run_training(config("whole"))
        before = dict(seen)
        seen.clear()
        found = run_training(config("varied", max_candidates=2, corrupt={"kind": "flip_rewards", "share": 1.0}))
        assert seen.keys() == before.keys()
        assert all(len(group.completions) == 2 for group in seen.values())
        for name, group in seen.items():
            best = int(np.argmax([r or 0.0 for r in before[name].rewards]))
            # Its rewards are turned round, so that the best is the worse of both.
            worst = int(np.argmin([r or 0.0 for r in group.rewards]))
            assert np.array_equal(group.completions[worst], before[name].completions[best])
        left_out = sum(len(group.completions) - 2 for group in before.values())
        data = found["data"]
        assert data["max_candidates"] == 2
        assert data["candidates_left_out"] == left_out > 0
        assert data["candidates_used"] == whole["data"]["candidates_used"] - left_out
        assert (data["corrupt"], data["share"], data["groups_corrupted"]) == ("flip_rewards", 1.0, 9)
        # Before the first step both have the same model on the same held-out groups.
        assert found["before"] == whole["before"]

    def test_a_dry_run_tells_it_and_a_run_is_the_same_again(self, config: Callable[..., TrainConfig]) -> None:
        fields: dict[str, Any] = {"max_candidates": 3, "corrupt": {"kind": "swap_tokens", "share": 0.5}}
        plan = dry_run(config("plan", **fields))
        first, second = (run_training(config(name, **fields)) for name in ("one", "two"))
        assert plan["candidates_corrupted"] == first["data"]["candidates_corrupted"] > 0
        assert first["data"] == second["data"]
        one, two = (weights(config(name).output_dir) for name in ("one", "two"))
        assert all(np.array_equal(one[name].numpy(), two[name].numpy()) for name in one)

    def test_it_can_be_written_as_flags(self, config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
        base = config("flags")
        flags = ["--model", base.model, "--data", str(base.data), "--output_dir", str(base.output_dir), "--print-config"]
        assert main(["train", *flags, "--max_candidates", "2", "--corrupt.kind", "truncate", "--corrupt.share", ".5"]) == 0
        assert "max_candidates: 2\ncorrupt:\n  kind: truncate\n  share: 0.5\n" in capsys.readouterr().out
        assert main(["train", *flags, "--corrupt.share", ".5"]) == 2
        assert "corrupt.kind" in capsys.readouterr().err

    def test_references_of_other_texts_are_refused(self, config: Callable[..., TrainConfig]) -> None:
        with pytest.raises(ValidationError, match="corrupt: truncate changes completions, and reference: data"):
            config("given", reference="data", corrupt={"kind": "truncate"})
        assert config("given", reference="data", corrupt={"kind": "flip_rewards"}).corrupt is not None


class TestOnline:
    @pytest.fixture
    def fields(self, tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
        """Of a run of two rounds that mixes prompts' own candidates in."""
        rows = [group_row(index, [0.1, 5.0, 0.4, 0.2]) for index in range(12)]
        (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "rewards.py").write_text("def zero(prompt, completions):\n    return [0.0 for _ in completions]\n")
        return {
            "model": str(tiny_model_dir),
            "data": tmp_path / "mixed.jsonl",
            "output_dir": tmp_path / "online",
            "reward": f"{tmp_path / 'rewards.py'}:zero",
            "candidates": "fresh_and_offline",
            "num_samples": 2,
            "max_new_tokens": 4,
            "max_length": 128,
            "per_device_train_batch_size": 4,
            "regenerate_at": (0.5,),
            "max_steps": 2,
            "drift_prompts": 0,
            "report_to": (),
            "cache_dir": tmp_path / "cache",
            "dtype": "float32",
            "objective": {"name": "rnce"},
        }

    def test_the_datas_own_candidates_are_varied_and_new_ones_are_not(
        self, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ncalign.online.online import run_online

        seen: list[EncodedGroup] = []
        plain = Engine.train_pass

        def watched(self: Engine, part: Any, **options: Any) -> Any:
            seen.extend(part.groups)
            return plain(self, part, **options)

        monkeypatch.setattr(Engine, "train_pass", watched)
        found = run_online(OnlineConfig.model_validate(fields | {"max_candidates": 2, "corrupt": {"kind": "swap_tokens"}}))
        assert found["data"]["candidates_left_out"] == 12 * 2
        assert found["data"]["candidates_corrupted"] == 12
        assert seen
        for group in seen:
            best = int(np.argmax([r or 0.0 for r in group.rewards]))
            own = [k for k, reward in enumerate(group.rewards) if reward]
            fresh = [k for k, reward in enumerate(group.rewards) if not reward]
            assert len(own) == 2
            assert fresh
            (spoilt,) = set(own) - {best}
            assert sorted(group.completions[spoilt].tolist()) == sorted(group.completions[best].tolist())
            assert not np.array_equal(group.completions[spoilt], group.completions[best])
            # New ones have four tokens at most.
            assert all(len(group.completions[k]) <= 4 for k in fresh)

    @pytest.mark.parametrize("setting", [{"max_candidates": 2}, {"corrupt": {"kind": "truncate"}}])
    def test_on_new_candidates_alone_it_would_do_nothing(self, fields: dict[str, Any], setting: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match=f"{next(iter(setting))} is for the data's own candidates"):
            OnlineConfig.model_validate(fields | {"candidates": "fresh"} | setting)

    def test_without_a_setting_nothing_is_mixed_in_otherwise(self) -> None:
        group = some_groups(1)[0]
        assert Offline().mixed_in(group, []) == (group, [])

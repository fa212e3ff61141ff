"""Studies: reading their files, running and resuming their runs, and what is concluded of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from conftest import group_row
from ncalign.cli import settings
from ncalign.cli.app import main
from ncalign.core.atomic import write_json_atomic
from ncalign.core.errors import ConfigError
from ncalign.objectives import DPO, NCA
from ncalign.study import runs
from ncalign.study.analysis import arranged, comparisons
from ncalign.study.config import Scale, StudyConfig, StudyFile
from ncalign.study.measure import Found
from ncalign.study.page import curve_charts, write_outputs
from ncalign.study.spec import Claim, Study, read_study, run_config, shipped
from ncalign.study.study import plan_study, run_study
from ncalign.training.config import TrainConfig
from server_double import ServerDouble, serving

REWARDS = """
def vowels(prompt, completions):
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Path) -> Write:
    """``write(**changes)`` writes a study of two arms and two seeds on twelve groups, four of them held out."""
    rewards = [[1.0, 0.0], [0.1, 0.9, 0.4], [0.2, 0.0, 0.6, 1.0]]
    rows = [group_row(index, rewards[index % 3]) for index in range(12)]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)

    def make(name: str = "mine", **changes: Any) -> Path:
        base = {
            "model": str(tiny_model_dir),
            "data": str(tmp_path / "groups.jsonl"),
            "eval_fraction": 0.34,
            "learning_rate": "1e-2",
            "max_length": 128,
            "per_device_train_batch_size": 4,
            "dtype": "float32",
            "scoring_dtype": "float32",
            "objective": {"name": "dpo", "beta": 0.2},
        }
        values: dict[str, Any] = {
            "base": base | changes.pop("base", {}),
            "arms": {"dpo": None, "nca": {"objective": {"name": "nca", "alpha": 0.5}}},
            "seeds": 2,
            "evaluate": {"reward": f"{tmp_path / 'rewards.py'}:vowels", "max_new_tokens": 6, "num_samples": 2},
        }
        values |= changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False))
        return path

    return make


def run(path: Path, output: Path, **fields: Any) -> dict[str, Any]:
    return run_study(StudyConfig(study=str(path), output_dir=output, **fields), load=settings.load)


class TestFiles:
    def test_arms_are_flags_over_the_base(self, write: Write) -> None:
        study = read_study(str(write()), scale="tiny")
        dpo, nca = (run_config(study, arm, {"output_dir": "x"}, load=settings.load) for arm in ("dpo", "nca"))
        assert isinstance(dpo, TrainConfig)
        assert isinstance(nca, TrainConfig)
        assert dpo.objective == DPO(beta=0.2)
        # Another method begins with its own defaults, as with --objective.
        assert nca.objective == NCA(alpha=0.5)
        assert nca.learning_rate == dpo.learning_rate == 1e-2

    def test_lists_of_sections_are_taken_as_they_are(self, write: Write) -> None:
        parts = [{"name": "dpo"}, {"name": "nll"}]
        study = read_study(
            str(write(arms={"a": {}, "b": {"objective": {"name": "mix", "parts": parts, "weights": [1.0, 0.5]}}})), scale="tiny"
        )
        found = run_config(study, "b", {"output_dir": "x"}, load=settings.load)
        assert isinstance(found, TrainConfig)
        assert found.objective.name == "mix"

    def test_without_claims_each_arm_is_compared_with_the_first(self, write: Write) -> None:
        study = read_study(str(write(arms={"a": {}, "b": {}, "c": {}}, measures=["chosen_change", "reward"])), scale="tiny")
        assert study.claims == (Claim("b", "a", "chosen_change"), Claim("c", "a", "chosen_change"))

    def test_a_scale_is_laid_over_the_file(self, write: Write) -> None:
        scales = {"small": {"seeds": 7, "base": {"max_length": 64}, "arms": {"x": {}, "y": {}}}, "tiny": None}
        path = str(write(scales=scales))
        small, tiny = read_study(path, scale="small"), read_study(path, scale="tiny")
        assert (small.file.seeds, list(small.file.arms), small.file.base["max_length"]) == (7, ["x", "y"], 64)
        assert small.file.base["learning_rate"] == "1e-2"
        assert (tiny.file.seeds, list(tiny.file.arms)) == (2, ["dpo", "nca"])
        assert read_study(path, scale="small", seeds=3).file.seeds == 3
        with pytest.raises(ConfigError, match="there is no scale paper; it has small, tiny"):
            read_study(path, scale="paper")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"arms": {"a": {}}}, "arms: .*at least 2"),
            ({"arms": {"a": {}, "b/../c": {}}}, "'b/../c' names folders"),
            ({"arms": {"a": {}, "b": {"seed": 3}}}, "arms.b.seed: the study sets it"),
            ({"armz": {}}, "armz: unknown key; did you mean 'arms'"),
            ({"compare": ["nca beats dpo"]}, "'nca beats dpo' must read 'ARM > ARM'"),
            ({"compare": ["nca > kto"]}, "there is no arm 'kto'; there are dpo, nca"),
            ({"compare": ["nca > dpo by charm"]}, "'charm' is not measured; measured are reward"),
            ({"compare": ["nca > nca"]}, "compares an arm with itself"),
            ({"evaluate": None, "measures": ["reward"]}, "measures reward need the section evaluate"),
            ({"evaluate": None, "measures": ["win_rate"]}, "measures win_rate need the section evaluate"),
            ({"measures": ["task_score"]}, "measures task_score need the section tasks"),
            ({"measures": ["drift"]}, "drift is measured of online runs, and verb is train"),
            ({"before": True, "arms": {"before": {}, "a": {}}}, "'before' is the starting model"),
            ({"material": {"kind": "tiny", "data": "x.jsonl"}}, "data is for kind: programs, and kind is tiny"),
            ({"material": {"kind": "tiny"}}, "material brings model and data, and base has its own model, data"),
        ],
    )
    def test_what_is_wrong_with_a_file_is_told(self, write: Write, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_study(str(write(**changes)), scale="tiny")

    def test_unknown_studies_and_settings_are_told(self, write: Write, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no shipped study 'kernel'; did you mean 'kernels'"):
            read_study("kernel", scale="tiny")
        study = write(arms={"a": {}, "b": {"learning_rat": 1}})
        with pytest.raises(
            ConfigError, match=r"study mine, arm 'b': unknown setting 'learning_rat'; did you mean 'learning_rate'"
        ):
            run(study, tmp_path / "out")
        assert not (tmp_path / "out" / "runs").exists()
        with pytest.raises(
            ConfigError, match="study mine, arm 'dpo': base: unknown key 'max_lengthh'; did you mean 'max_length'"
        ):
            run(write(base={"max_lengthh": 3}), tmp_path / "out")

    def test_a_study_needs_held_out_groups(self, write: Write, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a study measures on held-out groups: give base\.eval_data"):
            run(write(base={"eval_fraction": 0.0}), tmp_path / "out")

    @pytest.mark.parametrize("scale", get_args(Scale))
    @pytest.mark.parametrize("name", shipped())
    def test_shipped_studies_are_valid_at_every_scale(self, name: str, scale: Scale) -> None:
        plan = plan_study(StudyConfig(study=name, scale=scale), load=settings.load)
        assert plan["runs"] == len(plan["arms"]) * plan["seeds"]
        assert plan["seeds"] == (10 if scale == "tiny" else 3)
        study = read_study(name, scale=scale)
        assert study.file.claim
        assert study.file.source
        assert study.claims


class TestRuns:
    def test_a_study_is_run_once_and_its_numbers_are_those_of_its_runs(
        self, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        found = run(write(), out)
        written = (out / "study.json").read_bytes()
        assert json.loads(written) == {name: value for name, value in found.items() if name != "text"}
        assert found["failed"] == {}
        [row] = found["comparisons"]
        assert (row["claim"], row["num_seeds"], row["num_prompts"]) == ("nca > dpo by reward", 2, 4)
        # The same from the files that the runs left.
        means = {}
        for arm in ("dpo", "nca"):
            kept = [json.loads((out / f"measures/{arm}/seed-{seed}.json").read_text())["values"] for seed in range(2)]
            means[arm] = np.mean([list(one["reward"].values()) for one in kept])
            assert all(len(one["chosen_change"]) == 4 for one in kept)
            assert (out / f"runs/{arm}/seed-1/model/config.json").is_file()
        assert row["mean"] == pytest.approx(means["nca"] - means["dpo"])
        # Training moved the model: its answers diverge from the starting model's, and log-probs changed.
        by_measure = {(one["arm"], one["measure"]): one["mean"] for one in found["arms"]}
        assert abs(by_measure["dpo", "chosen_change"]) > 1e-3
        # Held-out groups were not trained on.
        trained, held_out = ((out / "data" / name).read_text().splitlines() for name in ("train.jsonl", "held-out.jsonl"))
        assert (len(trained), len(held_out)) == (8, 4)
        assert not {json.loads(line)["id"] for line in trained} & {json.loads(line)["id"] for line in held_out}
        for name in ("report.html", "figure.svg", "claims.csv", "claims.tex", "arms.csv", "arms.tex"):
            assert (out / name).stat().st_size > 0

        def again(*_: Any, **__: Any) -> None:
            raise AssertionError("a finished run is run again")

        monkeypatch.setattr(runs, "run_training", again)
        run(write(), out)
        assert (out / "study.json").read_bytes() == written

    def test_a_run_that_fails_is_told_and_costs_no_other(
        self, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arms = {"dpo": {}, "broken": {"max_candidates": 9}, "nca": {"objective.name": "nca"}}
        path, out = write(arms=arms, seeds=1, evaluate=None), tmp_path / "out"
        assert main(["study", str(path), "--output_dir", str(out)]) == 1
        shown = capsys.readouterr()
        assert "failed: broken/seed-0: max_candidates: 9 leaves out nothing" in shown.out
        assert f"starts anew once its folder in {out / 'runs'} is deleted" in shown.err
        found = json.loads((out / "study.json").read_text())
        assert list(found["failed"]) == ["broken/seed-0"]
        assert {row["arm"] for row in found["arms"]} == {"dpo", "nca"}
        first, second = found["comparisons"]
        assert (first["claim"], first["num_seeds"]) == ("broken > dpo by reward_accuracy", 0)
        assert second["num_seeds"] == 1
        assert "one seed can't tell" in second["why"]
        assert "leaves out nothing" in (out / "report.html").read_text()

    @pytest.mark.parametrize("stop_at", [3, 14])
    def test_a_study_that_was_stopped_ends_with_the_same_numbers(
        self, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
    ) -> None:
        fields: dict[str, Any] = {"seeds": 1, "measures": ["reward", "chosen_change"]}
        run(write(**fields), tmp_path / "whole")
        count, plain = 0, os.replace

        def stopping(*arguments: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt
            plain(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr("ncalign.core.atomic.os.replace", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(write(**fields), tmp_path / "stopped")
        run(write(**fields), tmp_path / "stopped")
        whole, stopped = ((tmp_path / name / "study.json").read_bytes() for name in ("whole", "stopped"))
        assert stopped == whole

    def test_arms_of_online_runs(self, write: Write, tmp_path: Path) -> None:
        base = {"reward": f"{tmp_path / 'rewards.py'}:vowels", "num_samples": 3, "max_new_tokens": 6, "drift_prompts": 0}
        base |= {"max_steps": 2, "per_device_train_batch_size": 2, "objective": {"name": "rnce"}}
        arms = {"once": {"regenerate_at": []}, "twice": {"regenerate_at": [0.5]}}
        found = run(
            write(verb="online", base=base, arms=arms, seeds=1, measures=["sampled_reward", "tokens_generated"]),
            tmp_path / "out",
        )
        assert found["failed"] == {}
        rounds = [json.loads((tmp_path / f"out/runs/{arm}/seed-0/results.json").read_text())["rounds"] for arm in arms]
        assert [len(one) for one in rounds] == [1, 2]
        generated = {row["arm"]: row["mean"] for row in found["arms"] if row["measure"] == "tokens_generated"}
        assert generated["once"] > 0
        assert generated["once"] == sum(row["counts"]["tokens"] for row in rounds[0])

    def test_the_starting_model_is_an_arm_that_is_not_trained(self, write: Write, tmp_path: Path) -> None:
        measures = ["reward", "win_rate", "chosen_change", "kl"]
        compare = ["nca > before by win_rate", "nca > dpo by win_rate", "before > dpo by chosen_change"]
        path = write(before=True, measures=measures, compare=compare)
        found = run(path, tmp_path / "out")
        assert found["failed"] == {}
        kept = {
            (arm, seed): json.loads((tmp_path / f"out/measures/{arm}/seed-{seed}.json").read_text())
            for arm in ("before", "dpo", "nca")
            for seed in range(2)
        }
        rewards = {name: one["values"]["reward"] for name, one in kept.items()}
        # The starting model answers greedily alike with every seed, and is no distance from itself.
        assert rewards["before", 0] == rewards["before", 1]
        assert kept["before", 0]["answers"] == kept["before", 1]["answers"]
        assert kept["before", 0]["values"]["chosen_change"] == pytest.approx(dict.fromkeys(rewards["before", 0], 0.0), abs=1e-5)
        assert not (tmp_path / "out/runs/before").exists()
        # Wins counted by hand.
        for row, other in zip(found["comparisons"][:2], ("before", "dpo"), strict=True):
            wins = [
                1.0 if value > rewards[other, seed][name] else 0.5 if value == rewards[other, seed][name] else 0.0
                for seed in range(2)
                for name, value in rewards["nca", seed].items()
            ]
            assert len(wins) == 8
            assert row["mean"] == pytest.approx(np.mean(wins) - 0.5)
        by_measure = {(one["arm"], one["measure"]): one["mean"] for one in found["arms"]}
        assert by_measure["nca", "win_rate"] == pytest.approx(found["comparisons"][0]["mean"] + 0.5)
        assert ("before", "win_rate") not in by_measure
        assert found["comparisons"][2]["mean"] == pytest.approx(-by_measure["dpo", "chosen_change"], abs=1e-5)

    def test_a_judge_who_compares_is_shown_both_answers(self, write: Write, tmp_path: Path) -> None:
        def longest(body: dict[str, Any], number: int) -> str:
            text = body["messages"][-1]["content"]
            shown = [re.findall(rf"<answer_{name} [^>]*>(.*?)</answer_{name}", text, re.DOTALL)[-1].strip() for name in "ab"]
            first, second = map(len, shown)
            return "[[A]]" if first > second else "[[B]]" if first < second else "[[C]]"

        double = ServerDouble(longest)
        with serving(double) as url:
            judge = {"base_url": url, "model": "judge", "mode": "pairwise"}
            evaluate = {"reward": "judge", "judge": judge, "max_new_tokens": 6, "num_samples": 1}
            fields: dict[str, Any] = {"before": True, "measures": ["win_rate"], "evaluate": evaluate}
            found = run(write(**fields, compare=["nca > before"]), tmp_path / "out")
            asked = len(double.requests)
            assert run(write(**fields, compare=["nca > before"]), tmp_path / "out")["comparisons"] == found["comparisons"]
        # Verdicts are kept: going on asks nothing again.
        assert len(double.requests) == asked > 0
        answers = {
            (arm, seed): json.loads((tmp_path / f"out/measures/{arm}/seed-{seed}.json").read_text())["answers"]
            for arm in ("before", "nca")
            for seed in range(2)
        }
        wins = []
        for seed in range(2):
            for name, text in answers["nca", seed].items():
                mine, other = len(text.strip()), len(answers["before", seed][name].strip())
                wins.append(1.0 if mine > other else 0.5 if mine == other else 0.0)
        [row] = found["comparisons"]
        assert row["mean"] == pytest.approx(np.mean(wins) - 0.5)

    def test_models_go_where_they_are_not_to_be_kept(self, write: Write, tmp_path: Path) -> None:
        run(write(seeds=1, evaluate=None, keep_models=False), tmp_path / "out")
        assert (tmp_path / "out/runs/dpo/seed-0/results.json").is_file()
        assert not (tmp_path / "out/runs/dpo/seed-0/model").exists()

    def test_a_dry_run_counts_and_estimates(self, write: Write, tmp_path: Path) -> None:
        path = write(base={"eval_fraction": 0.25})
        plan = plan_study(StudyConfig(study=str(path), output_dir=tmp_path / "out"), load=settings.load)
        assert plan["runs"] == 4
        assert plan["memory_mib"] > 0
        assert "2 arms (dpo, nca) x 2 seeds = 4 runs" in plan["text"]
        assert not (tmp_path / "out").exists()


PROGRAM = """
import os, signal, sys
kill_at = int(sys.argv[1])
count, replace = 0, os.replace
def watched(*arguments, **options):
    global count
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*arguments, **options)
from ncalign.core import atomic
atomic.os.replace = watched
from ncalign.cli.app import main
if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[2:]]))
"""


def start(tmp_path: Path, path: Path, output: Path, *flags: str, kill_at: int = 0) -> int:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(kill_at), str(path), "--output_dir", str(output), *flags]
    ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert "leaked" not in ended.stderr
    return ended.returncode


@pytest.mark.slow
def test_a_study_killed_again_and_again_ends_with_the_same_study_json(write: Write, tmp_path: Path) -> None:
    path = write()
    assert start(tmp_path, path, tmp_path / "whole") == 0
    rng = np.random.default_rng(0)
    for kill_at in rng.integers(1, 40, size=10):
        code = start(tmp_path, path, tmp_path / "killed", kill_at=int(kill_at))
        assert code in (0, -signal.SIGKILL)
    assert start(tmp_path, path, tmp_path / "killed") == 0
    whole, killed = ((tmp_path / name / "study.json").read_bytes() for name in ("whole", "killed"))
    assert killed == whole


@pytest.mark.slow
def test_two_workers_find_what_one_does(write: Write, tmp_path: Path) -> None:
    path = write()
    assert start(tmp_path, path, tmp_path / "one") == 0
    assert start(tmp_path, path, tmp_path / "two", "--workers", "2") == 0
    one, two = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("one", "two"))
    assert two == one


class FakeRay:
    """Ray's functions that a study calls, in this process; the first task of a run named here is lost."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, lost: str) -> None:
        self.lost, self.options, self.tasks, self.ended = lost, dict[str, Any](), dict[int, Any](), False

    def init(self, **options: Any) -> None:
        if options["address"] == "nowhere":
            raise ConnectionError("refused")

    def shutdown(self) -> None:
        self.ended = True

    def remote(self, **options: Any) -> Any:
        self.options = options

        class Task:
            def __init__(self, ray: FakeRay, function: Any) -> None:
                self.ray, self.function = ray, function

            def remote(self, *arguments: Any) -> int:
                self.ray.tasks[len(self.ray.tasks)] = (self.function, arguments)
                return len(self.ray.tasks) - 1

        return lambda function: Task(self, function)

    def wait(self, references: list[int], *, num_returns: int) -> tuple[list[int], list[int]]:
        return references[-num_returns:], references[:-num_returns]

    def get(self, reference: int) -> Any:
        function, arguments = self.tasks[reference]
        if arguments[1].name == self.lost:
            raise self.exceptions.RayError("node died")
        return function(*arguments)


def test_on_ray_each_run_is_a_task(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeRay(lost="nca/seed-0")
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: fake)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    path = write(seeds=1, measures=["chosen_change"])
    found = run(path, tmp_path / "ray", ray="auto", ray_cpus=2, ray_gpus=0.5)
    assert fake.options == {"num_cpus": 2, "num_gpus": 0.5, "max_retries": 1}
    assert found["failed"] == {"nca/seed-0": "its process was lost: node died"}
    assert fake.ended
    # What Ray lost is made by a rerun without it, and the results are those of one that never knew Ray.
    assert run(path, tmp_path / "ray")["arms"] == run(path, tmp_path / "plain")["arms"]
    assert main(["study", str(path), "--output_dir", str(tmp_path / "other"), "--ray", "nowhere"]) == 1
    assert "ray: nowhere: no cluster can be reached (refused)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_local_ray_cluster_finds_what_one_process_does(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = write()
    assert start(tmp_path, path, tmp_path / "one") == 0
    assert start(tmp_path, path, tmp_path / "ray", "--ray", "local") == 0
    one, other = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("one", "ray"))
    assert other == one


@pytest.mark.parametrize("fields", [{"ray": "auto", "workers": 2}, {"ray_gpus": 1}])
def test_engines_do_not_mix(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"leave (one|them) out"):
        StudyConfig(study="kernels", **fields)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--workers", "2"), ("--ray", "local")], ids=["processes", "ray"])
def test_a_killed_workers_run_is_begun_again(write: Write, tmp_path: Path, flags: tuple[str, ...]) -> None:
    if "--ray" in flags:
        pytest.importorskip("ray")
    path = write()
    # Each worker loads the reward's file, and the first to come kills itself.
    source = (tmp_path / "rewards.py").read_text()
    killer = """
import os, signal
try:
    os.mkdir(__file__ + ".killed")
except FileExistsError:
    pass
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "rewards.py").write_text(killer + source)
    assert start(tmp_path, path, tmp_path / "out", *flags) == 0
    assert (tmp_path / "rewards.py.killed").is_dir()
    assert json.loads((tmp_path / "out" / "study.json").read_text())["failed"] == {}


class TestAnalysis:
    def study(self, *claims: Claim, arms: tuple[str, ...] = ("a", "b", "c")) -> Study:
        file = StudyFile.model_validate({"arms": {arm: {} for arm in arms}, "claim": "<script>alert(1)</script> & more"})
        return Study("simulated", file, ("reward_accuracy",), claims)

    def found(self, effects: dict[str, float], seeds: int = 8, prompts: int = 60) -> dict[tuple[str, int], dict[str, Any]]:
        rng = np.random.default_rng(0)
        shared = rng.normal(0, 1, prompts)
        return {
            (arm, seed): {"reward_accuracy": {f"p{p}": float(effect + shared[p] + rng.normal(0, 0.3)) for p in range(prompts)}}
            for arm, effect in effects.items()
            for seed in range(seeds)
        }

    def test_pairing_takes_out_what_arms_share_and_verdicts_have_the_right_sign(self) -> None:
        claims = [Claim("b", "a", "reward_accuracy"), Claim("a", "b", "reward_accuracy"), Claim("c", "a", "reward_accuracy")]
        rows = comparisons(self.study(*claims), self.found({"a": 0.0, "b": 0.2, "c": 0.0}), {})
        assert [row["verdict"] for row in rows] == ["holds", "opposite", "undecided"]
        # Prompts differ by 1, and the difference of two arms by .3 √2 / √480 alone.
        low, high = rows[0]["interval"]
        assert high - low < 0.2
        assert low < 0.2 < high
        assert rows[0]["mean"] == -rows[1]["mean"]
        # Holm: the smallest of three p-values counts three times.
        assert rows[0]["p_holm"] == rows[1]["p_holm"] == pytest.approx(3 * rows[0]["p_value"], rel=1e-9)
        assert rows[2]["p_holm"] == rows[2]["p_value"]

    def test_seeds_and_prompts_that_one_arm_lacks_are_left_out(self) -> None:
        found = self.found({"a": 0.0, "b": 0.0}, seeds=3, prompts=5)
        del found["b", 1]
        del found["a", 0]["reward_accuracy"]["p4"]
        table = arranged(found, "b", "reward_accuracy", minus="a")
        assert table is not None
        assert table.seeds == (0, 2)
        assert table.values.shape == (2, 4)
        assert table.left_out == 1
        [row] = comparisons(self.study(Claim("c", "a", "reward_accuracy")), found, {})
        assert row["verdict"] == "undecided"

    def test_texts_in_the_page_are_escaped(self, tmp_path: Path) -> None:
        hostile = "<img src=x onerror=alert(1)>\x1b[31m</script>"
        row = {"arm": hostile, "measure": "reward", "mean": 0.5, "interval": [0.25, 0.75]}
        claim = {"claim": hostile, "mean": None, "num_seeds": 0, "verdict": "undecided", "why": hostile}
        found = {
            "study": hostile,
            "claim": "<script>alert(1)</script> & more",
            "source": "",
            "seeds": 1,
            "arm_settings": {hostile: {}, "b": {}},
            "measures": ["reward"],
            "comparisons": [claim],
            "arms": [row],
            "failed": {"b/seed-0": hostile},
        }
        page = write_outputs(tmp_path, found).read_text()
        assert "<img" not in page
        assert page.count("<script>") == 1
        # One element of data, with the arms' main measure.
        assert page.count("</script>") == 2
        assert "\x1b" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
        assert "– (b: reward, ± reward): no run of the arm has it" in page

    def test_curves_are_means_of_seeds(self) -> None:
        assert curve_charts({"a": []}) == []
        rows = [[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}], [{"step": 1, "loss": 3.0}]]
        [chart] = curve_charts({"a": rows, "b": [[{"step": 1, "loss": 0.5}]]})
        assert {line.name: line.points for line in chart.series} == {"a": [(1, 2.0)], "b": [(1, 0.5)]}


def test_measures_of_another_evaluation_are_not_taken_for_its_own(tmp_path: Path) -> None:
    job = runs.Job("a", 0, {"x": 1}, tmp_path / "held.jsonl", False, None, None, ("reward",), tmp_path, True)
    job.measured.parent.mkdir(parents=True)
    write_json_atomic({"key": job.key(), "values": {"reward": {"p": 1.0}}, "answers": {"p": "one"}}, job.measured)
    assert job.found() == Found({"reward": {"p": 1.0}}, {"p": "one"})
    for changes in ({"evaluation": {"n": 2}}, {"trained": False}, {"tasks": {"names": ["svamp"]}}, {"measures": ("solved",)}):
        assert dataclasses.replace(job, **changes).found() is None

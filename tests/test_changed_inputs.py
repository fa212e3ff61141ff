"""What a run reads holds something else when it goes on: it is noticed and named, and nothing is mixed in silence."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ncalign.core.code_digest import code_digest, value_digest
from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group
from ncalign.objectives import Method, compose, mean_over_negatives, needs_preference, one_below
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.rewards.config import JudgeConfig, RewardConfig
from ncalign.rewards.judge import JudgeReward
from ncalign.rewards.sources import reward_source, source_digests
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training
from online_runs import settings, write_inputs
from server_double import ServerDouble, serving


def hinge(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 - (chosen - rejected))


def own_method(beta: float = 0.1) -> Method:
    return compose("hinge", beta=beta, loss=mean_over_negatives(hinge), sampler=one_below(), refuse=needs_preference)


def changed_reward(folder: Path) -> None:
    path = folder / "rewards.py"
    path.write_text(path.read_text().replace("return [", "return [-"))


def changed_helper(folder: Path) -> None:
    (folder / "counting.py").write_text("LETTERS = 'xyz'\n")


def changed_eval_data(folder: Path) -> None:
    path = folder / "held_out.jsonl"
    path.write_text(path.read_text().replace("capital", "largest city"))


def changed_metadata(folder: Path) -> None:
    path = folder / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "answer": "other"}) + "\n" for row in rows))


def changed_template(folder: Path) -> None:
    path = folder / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    templates = [folder / "model" / "chat_template.jinja"]
    for template in filter(Path.is_file, templates):
        template.write_text(template.read_text() + " ")
        return
    path.write_text(json.dumps({**settings, "chat_template": settings["chat_template"] + " "}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_reward, r"  reward .*rewards\.py:vowels: \w+ -> \w+\n(?s:.*)accept_changes: true"),
        (changed_helper, r"  reward .*rewards\.py:vowels: \w+ -> \w+\n(?s:.*)accept_changes: true"),
        (changed_eval_data, "begun with other inputs: the held-out groups changed since"),
        (changed_metadata, "begun with other inputs: the training groups changed since"),
        (changed_template, "begun with other inputs: its tokenizer, chat template or end tokens changed since"),
    ],
)
def test_an_online_run_does_not_go_on_with_other_files_unasked(
    change: Callable[[Path], None],
    said: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_inputs(tmp_path)
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"id": "a", "prompt": "The capital?"}) + "\n")
    (tmp_path / "counting.py").write_text("LETTERS = 'aeiou'\n")
    code = (tmp_path / "rewards.py").read_text()
    (tmp_path / "rewards.py").write_text("import counting\n" + code.replace('"aeiou"', "counting.LETTERS"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "counting", raising=False)
    fields = settings(tmp_path, tmp_path / "model", "run", eval_fraction=0.0, eval_data=tmp_path / "held_out.jsonl")

    def run(**more: Any) -> None:
        run_online(OnlineConfig.model_validate({**fields, "max_steps": 1, **more}))

    # Before the first checkpoint: samples and rewards of the first round are there.
    with monkeypatch.context() as patch:
        patch.setattr("ncalign.online.online.fill_logprobs", lambda *arguments, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    assert (tmp_path / "run" / "rounds" / "000" / "scored-00000.json").is_file()
    change(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=said):
        run()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    if "accept_changes" in said:
        with monkeypatch.context() as patch:
            patch.setattr("ncalign.online.online.fill_logprobs", lambda *arguments, **named: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(accept_changes=True)
        assert "The run goes on with what it holds now" in capsys.readouterr().err
        (tmp_path / "run" / "inputs.json").write_text("{")
        with pytest.raises(ValueError, match=r"inputs\.json is damaged .*: it says what the run began with"):
            run()


def test_a_method_of_one_s_own_that_changed_is_noticed(groups_file: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    def run(method: Method | None, **more: Any) -> dict[str, Any]:
        fields = {"model": str(tiny_model_dir), "data": groups_file, "output_dir": tmp_path / "run", "max_steps": 2}
        fields |= {"save_steps": 1, "save_total_limit": 9, "report_to": (), "dtype": "float32", "max_length": 64}
        return run_training(TrainConfig.model_validate({**fields, **more}), method=method)

    run(own_method())
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match=r"  method: hinge \w+ -> hinge \w+\n"):
        run(own_method(beta=0.2), resume=True)
    with pytest.raises(ValueError, match=r"  method: hinge \w+ -> as configured\n"):
        run(None, resume=True)
    assert run(own_method(), resume=True)["steps"] == 2


def test_held_out_groups_that_changed_are_noticed_by_training(groups_file: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(groups_file.read_text().splitlines(keepends=True)[:3]))
    fields = {"model": str(tiny_model_dir), "data": groups_file, "output_dir": tmp_path / "run", "max_steps": 2}
    fields |= {"save_steps": 1, "report_to": (), "dtype": "float32", "max_length": 64, "eval_data": held_out}
    run_training(TrainConfig.model_validate(fields))
    shutil.rmtree(tmp_path / "run" / "model")
    held_out.write_text("".join(groups_file.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="the held-out groups changed since"):
        run_training(TrainConfig.model_validate({**fields, "resume": True}))


def test_a_judge_s_template_and_a_reward_model_are_inputs(tmp_path: Path) -> None:
    path, found, asked = tmp_path / "judge.txt", [], []
    group = Group(id="g", prompt="2 + 2?", candidates=[Candidate("4")])
    double = ServerDouble(answer=lambda body, number: "[[3]]")
    with serving(double) as url:
        for template in ("Rate {completion} to {prompt}.", "Judge {completion} to {prompt}.", "Rate {completion} to {prompt}."):
            path.write_text(template)
            config = RewardConfig(reward=("judge",), judge=JudgeConfig(base_url=url, template=path))
            source = reward_source(config, dtype=None, cache_dir=tmp_path)
            found.append(source_digests(config, source))
            assert isinstance(source, JudgeReward)
            assert source.score(group) == [3.0]
            asked.append(len(double.requests))
    assert list(found[0]) == [f"judge.template {path}"]
    assert found[0] != found[1]
    assert found[0] == found[2]
    # Verdicts are kept by what the judge was shown.
    assert asked == [1, 2, 2]


def test_code_is_known_by_what_it_imports_of_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_package").mkdir()
    for name, text in {
        "own_package/__init__.py": "",
        "own_package/inner.py": "from .deep import WEIGHT\n",
        "own_package/deep.py": "WEIGHT = 1\n",
        "own_rewards.py": "import json, torch\nfrom own_package import inner\ndef score(prompt, completions): ...\n",
    }.items():
        (tmp_path / name).write_text(text)
    names = (f"{tmp_path / 'own_rewards.py'}:score", "own_rewards:score", "own_package.inner:f")
    before = [code_digest(name) for name in names]
    assert before[0] == before[1] != before[2]
    (tmp_path / "own_package" / "deep.py").write_text("WEIGHT = 2\n")
    assert not {code_digest(name) for name in names} & set(before)
    assert [code_digest(name) for name in (None, "json:loads", "no_such_module:f", str(tmp_path / "no.py:f"))] == [""] * 4


def test_a_method_is_known_by_what_it_computes() -> None:
    scale = 2.0

    def scaled(factor: float) -> Callable[[float], float]:
        return lambda value: scale * factor * value

    assert value_digest(own_method()) == value_digest(own_method())
    assert value_digest(scaled(1.0)) == value_digest(scaled(1.0)) != value_digest(scaled(3.0))
    assert value_digest(torch.tensor([1.0])) != value_digest(torch.tensor([2.0]))
    assert value_digest(lambda value: value in {"a", "b"}) != value_digest(lambda value: value in {"a", "c"})
    assert value_digest(Store) == value_digest(Store)

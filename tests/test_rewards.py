"""Reward sources: functions of the user's and verifiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncalign.data.groups import Candidate, Group, read_groups
from ncalign.rewards.config import ScoreConfig
from ncalign.rewards.function import FunctionReward, load_function
from ncalign.rewards.score import run_score
from ncalign.rewards.verifiable import ReasoningGymReward


def group(*texts: str, chat: bool = False, **metadata: Any) -> Group:
    completions: list[Any] = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    prompt: Any = [{"role": "user", "content": "Q"}] if chat else "Q"
    return Group(id="g1", prompt=prompt, candidates=[Candidate(completion) for completion in completions], metadata=metadata)


def returning(value: object) -> FunctionReward:
    return FunctionReward(lambda prompt, completions: value, "'f'")


@pytest.mark.parametrize("chat", [False, True])
def test_function_gets_the_prompt_and_texts(chat: bool) -> None:
    seen: list[Any] = []

    def reward(prompt: Any, completions: list[str]) -> list[int]:
        seen.append((prompt, completions))
        return [len(text) for text in completions]

    scored = group("a", "bcd", chat=chat)
    assert FunctionReward(reward, "reward").score(scored) == [1.0, 3.0]
    assert seen == [(scored.prompt, ["a", "bcd"])]


def test_function_gets_metadata_where_it_asks_for_them() -> None:
    def reward(prompt: str, completions: list[str], metadata: dict[str, str]) -> list[float]:
        return [float(text == metadata["answer"]) for text in completions]

    assert FunctionReward(reward, "reward").score(group("3", "4", answer="4")) == [0.0, 1.0]


def test_missing_rewards_stay_missing() -> None:
    assert returning([None, 2]).score(group("a", "b")) == [None, 2.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        (1.0, "returned a float; a list"),
        ("ab", "returned a str; a list"),
        ({"a": 1, "b": 2}, "returned a dict; a list"),
        ([1.0, float("nan")], "for completion 2, nan"),
        ([float("inf"), 1.0], "for completion 1, inf"),
        ([1e300, 1.0], "for completion 1, 1e\\+300; a number from -1e\\+15 to"),
        ([1.0, "2"], r"for completion 2, '2' \(a str\)"),
        ([True, 1.0], r"for completion 1, True \(a bool\)"),
    ],
)
def test_wrong_results_name_the_function_and_the_group(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        returning(value).score(group("a", "b"))
    assert "'f'" in str(caught.value)
    assert "'g1'" in str(caught.value)


def test_an_exception_inside_the_function_names_the_group() -> None:
    def reward(prompt: str, completions: list[str]) -> list[float]:
        raise KeyError("boom")

    with pytest.raises(ValueError, match="raised KeyError on group 'g1': 'boom'"):
        FunctionReward(reward, "reward").score(group("a"))


def test_load_function_from_a_file_and_a_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def length(prompt, completions):\n    return [len(text) for text in completions]\n")
    assert load_function(f"{tmp_path / 'mine.py'}:length")("Q", ["abc"]) == [3]
    assert load_function("os.path:basename")("a/b") == "b"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("length", "'package.module:function'"),
        (":length", "'package.module:function'"),
        ("nowhere.py:length", "there is no file nowhere.py"),
        ("no_such_package_here:f", "can't be imported: ModuleNotFoundError"),
        ("os.path:nothing", "has no function 'nothing'; its functions are: .*basename"),
    ],
)
def test_load_function_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(name)


def test_load_function_from_a_file_that_fails(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="can't be run: ZeroDivisionError"):
        load_function(f"{tmp_path / 'bad.py'}:f")


def entry(answer: str) -> dict[str, Any]:
    return {"question": "Q", "answer": answer, "metadata": {}}


def test_verifier_pays_a_whole_answer_and_part_of_it() -> None:
    # The gcd verifier pays len(answer)/len(completion) to a text that contains the answer.
    scored = group(" 12\n", "It is 12", "7", task="gcd", entry=entry("12"))
    assert ReasoningGymReward().score(scored) == [1.0, 2 / 8, 0.0]


def test_a_stated_answer_is_all_or_nothing() -> None:
    texts = ("3 * 4 = 12.", "12 or 13", "It is 120", "none", "-12")
    scored = group(*texts, chat=True, task="gcd", extract="stated", entry=entry("12"))
    assert ReasoningGymReward().score(scored) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_verifier_that_raises_has_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def verifier(answer: str, entry: dict[str, Any]) -> float:
        if answer == "junk":
            raise ZeroDivisionError
        return 1.0

    source = ReasoningGymReward()
    monkeypatch.setitem(source._verifiers, "gcd", verifier)
    assert source.score(group("junk", "12", task="gcd", entry=entry("12"))) == [0.0, 1.0]
    assert source.num_refused == 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "group 'g1' has no reasoning-gym entry.*found keys: none"),
        ({"task": "gcd"}, "found keys: task"),
        ({"task": "no_such_task", "entry": entry("1")}, "'no_such_task', which reasoning-gym does not have"),
        ({"task": "gcd", "entry": entry("1"), "extract": "first"}, "extract='first'"),
        ({"task": "gcd", "entry": entry("1"), "extract": "stated", "form": "poem"}, "form='poem'"),
        ({"task": "gcd", "entry": entry("1"), "form": "equation"}, "beside extract='stated'"),
    ],
)
def test_groups_without_a_usable_entry_are_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningGymReward().score(group("1", **metadata))


def test_run_score_writes_rewards_and_counts(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [
        {"id": "a", "prompt": "P", "candidates": [{"completion": "x", "reward": 9}, {"completion": "yyy", "reward": None}]},
        {"id": "b", "prompt": "P", "candidates": [{"completion": "zz"}, {"completion": "ww"}, {"completion": "?"}]},
    ]
    (tmp_path / "mine.py").write_text(
        "def reward(prompt, completions):\n    return [None if text == '?' else len(text) for text in completions]\n"
    )
    config = ScoreConfig(data=write_jsonl(rows), output=tmp_path / "out.jsonl", reward=f"{tmp_path / 'mine.py'}:reward")
    result = run_score(config)
    rewards = [[candidate.reward for candidate in group.candidates] for group in read_groups(tmp_path / "out.jsonl")]
    assert rewards == [[1.0, 3.0], [2.0, 2.0, None]]
    assert result["mean_reward"] == pytest.approx((1 + 3 + 2 + 2) / 4, abs=1e-15)
    assert (result["groups"], result["candidates"], result["unknown_rewards"], result["groups_with_spread"]) == (2, 5, 1, 1)


def test_run_score_leaves_nothing_when_the_function_fails(tmp_path: Path, groups_file: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(prompt, completions):\n    return [0.0]\n")
    config = ScoreConfig(data=groups_file, output=tmp_path / "out.jsonl", reward=f"{tmp_path / 'mine.py'}:reward")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="group 'g0'"):
        run_score(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == before

"""One question is asked once: in a call, by threads and by processes that share a store; equal texts have equal rewards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ncalign.cli.app import main
from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group, read_groups
from ncalign.generation.client import Server
from ncalign.generation.config import ServerConfig
from ncalign.generation.questions import Request
from ncalign.generation.wire import Choice
from ncalign.judging.judges import RewardJudge
from ncalign.judging.records import Answer, Question
from ncalign.rewards.config import JudgeConfig
from ncalign.rewards.function import FunctionReward
from ncalign.rewards.guard import Guarded
from ncalign.rewards.judge import JudgeReward
from server_double import ServerDouble, serving

# A process that asks one question and prints the answer.
ASKS = """
import sys
from pathlib import Path
from ncalign.core.store import Store
from ncalign.generation.client import Server
from ncalign.generation.questions import Request
from ncalign.generation.config import ServerConfig
url, store, question = sys.argv[1:]
[[found]] = Server(ServerConfig(base_url=url, model="m"), Store(Path(store))).ask(
    [Request("chat", {"messages": [{"role": "user", "content": question}], "seed": 0})]
)
print(found.text)
"""


def question(text: str, **changes: Any) -> Request:
    return Request("chat", {"messages": [{"role": "user", "content": text}], "seed": 0, **changes})


def numbered() -> ServerDouble:
    """A double that never gives the same answer twice."""
    number = count()
    return ServerDouble(answer=lambda body, which: f"answer {next(number)}")


def waits(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group(*texts: str, **metadata: Any) -> Group:
    return Group(id="g", prompt="2 + 2?", candidates=[Candidate(text) for text in texts], metadata=metadata)


def test_equal_completions_cost_one_verdict_and_have_one_reward(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [{"id": str(i), "prompt": "2 + 2?", "candidates": [{"completion": "4"}] * 8} for i in range(2)]
    data, ratings = write_jsonl(rows, "data.jsonl"), count(1)
    double = ServerDouble(answer=lambda body, number: f"[[{next(ratings)}]]")
    with serving(double) as url:
        words = ["score", "--data", str(data), "--reward", "judge", "--judge.base_url", url, "--join_rows", "false"]
        for name in ("first.jsonl", "again.jsonl"):
            assert main([*words, "--output", str(tmp_path / name), "--cache_dir", str(tmp_path / "cache")]) == 0
            assert {c.reward for one in read_groups(tmp_path / name) for c in one.candidates} == {1.0}
    assert len(double.requests) == 1


def test_equal_completions_are_compared_as_one() -> None:
    def verdict(body: dict[str, Any], number: int) -> str:
        return "[[A]]" if re.search(r"<answer_a \w+>\n4", body["messages"][0]["content"]) else "[[B]]"

    double = ServerDouble(answer=verdict)
    with serving(double) as url:
        source = JudgeReward(JudgeConfig(base_url=url, mode="pairwise"))
        assert source.score(group("4", "5", "4", "4")) == [1.0, 0.0, 1.0, 1.0]
        assert len(double.requests) == 2
        # Copies alone are tied, and one completion alone has nothing to be compared with.
        assert source.score(group("4", "4")) == [0.5, 0.5]
        assert source.score(group("4")) == [None]
    assert len(double.requests) == 2


@pytest.mark.parametrize("ends", ["answered", "killed"])
def test_what_another_process_asks_is_waited_for_while_it_lives(ends: str, tmp_path: Path) -> None:
    double, release = numbered(), threading.Event()
    double.fault_of = lambda body: release.wait(60) and None if "shared" in str(body) else None
    with serving(double) as url:
        command = [sys.executable, "-c", ASKS, url, str(tmp_path / "kept"), "shared"]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        waits(lambda: len(double.requests) == 1)
        found: list[Any] = []
        server = Server(ServerConfig(base_url=url, model="m"), Store(tmp_path / "kept"))
        asks = threading.Thread(target=lambda: found.extend(server.ask([question("shared"), question("own")])))
        asks.start()
        # What nobody else asks is asked meanwhile.
        waits(lambda: len(double.requests) == 2)
        if ends == "killed":
            other.kill()
            waits(lambda: len(double.requests) == 3)
        release.set()
        asks.join(60)
        said, _ = other.communicate(timeout=60)
    assert len(found) == 2
    assert len(double.requests) == {"answered": 2, "killed": 3}[ends]
    assert said.strip() == {"answered": found[0][0].text, "killed": ""}[ends]


def test_a_question_whose_asker_never_ends_is_asked_all_the_same(tmp_path: Path) -> None:
    double = numbered()
    with serving(double) as url:
        server = Server(ServerConfig(base_url=url, model="m", timeout_seconds=0.3), Store(tmp_path / "kept"))
        store = Store(tmp_path / "kept")
        key = Store.key(url, "m", "", "chat", dict(question("q").body))
        assert store.claim(key)
        assert not Store(tmp_path / "kept").claim(key)
        [[found]] = server.ask([question("q")])
        store.release(key)
        assert store.claim(key)
    assert found.text == "answer 0"


def test_equal_requests_share_answers_unless_they_sample_without_a_seed(tmp_path: Path) -> None:
    for store in (None, Store(tmp_path / "kept")):
        double, told = numbered(), list[int]()
        with serving(double) as url:
            unseeded = Request("chat", {"messages": [{"role": "user", "content": "q"}]})
            requests = [question("q"), question("q"), question("q", seed=1), unseeded, unseeded, question("q")]
            found = Server(ServerConfig(base_url=url, model="m", max_concurrency=1), store).ask(requests, done=told.append)
        texts = [one[0].text for one in found if isinstance(one[0], Choice)]
        assert [texts[0], texts[1], texts[5]] == [texts[0]] * 3
        assert len(set(texts)) == 4
        assert len(double.requests) == 3
        assert sorted(told) == list(range(6))


def test_a_prompt_that_stands_twice_in_a_file_is_sampled_twice(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    prompts = write_jsonl([{"id": str(i), "prompt": "q"} for i in range(2)], "prompts.jsonl")
    double = numbered()
    with serving(double) as url:
        words = ["generate", "--prompts", str(prompts), "--output", str(tmp_path / "o.jsonl"), "--num_samples", "2"]
        assert main([*words, "--server.base_url", url]) == 0
    assert len({c.completion for one in read_groups(tmp_path / "o.jsonl") for c in one.candidates}) == 4


def test_equal_completions_get_one_reward_of_a_function_that_is_random() -> None:
    seen, draws = list[list[str]](), iter([1.0, 2.0, 3.0, 7.0])

    def draw(prompt: str, completions: list[str]) -> list[float | None]:
        seen.append(completions)
        return [next(draws), next(draws), None, next(draws)]

    assert FunctionReward(draw, "'draw'").score(group("a", "b", "a", "a")) == [2.0, 2.0, 2.0, 2.0]
    # How often a completion occurs is the function's to see.
    assert seen == [["a", "b", "a", "a"]]


def test_equal_completions_that_fail_are_tried_once() -> None:
    calls = list[list[str]]()

    def fails(prompt: str, completions: list[str]) -> list[float]:
        calls.append(completions)
        return [1 / (text != "bad") for text in completions]

    source = Guarded(FunctionReward(fails, "'fails'"), timeout=None, max_failed_share=1.0)
    assert source.score(group("bad", "good", "bad", "bad", "good")) == [None, 1.0, None, None, 1.0]
    assert calls[1:] == [["bad"], ["good"]]
    assert (source.num_scored, source.num_failed) == (5, 3)


def test_models_that_answer_in_the_same_words_have_the_same_reward() -> None:
    draws = count()
    judge = RewardJudge(FunctionReward(lambda prompt, completions: [next(draws) for _ in completions], "'draw'"))
    answers = [{"q": Answer("q", model, ("Yes.",), (number,))} for number, model in enumerate("ab")]
    games, _ = judge.compare([Question("q", ("Is it?",))], *answers)
    assert [game.preference for game in games] == [0.5, 0.5]

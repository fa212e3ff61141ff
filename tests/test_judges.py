"""Judges: two answers in both orders, ratings, rewards; verdicts that can't be had count nowhere and are paid for once."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncalign.core.store import Store
from ncalign.data.groups import Group
from ncalign.generation.failures import ServerError
from ncalign.generation.wire import Usage
from ncalign.judging.config import EvalJudgeConfig
from ncalign.judging.judges import RewardJudge, ServerJudge
from ncalign.judging.records import Answer, Answers, Question
from ncalign.rewards.instructions import InstructionReward
from ncalign.rewards.verdicts import Account, ask_verdicts
from ncalign.stats.agreement import length_bias, position_bias
from ncalign.stats.length_control import length_controlled_win_rate
from ncalign.stats.preferences import question_preferences
from ncalign.stats.win_rate import win_rate
from server_double import ServerDouble, serving

QUESTIONS = [Question(f"q{k}", (f"What is {k}?",)) for k in range(12)]


def answers(model: str, texts: Callable[[int], str] | None = None, questions: list[Question] = QUESTIONS) -> Answers:
    given = [f"{model}: it is {k}" if texts is None else texts(k) for k in range(len(questions))]
    return {q.id: Answer(q.id, model, (text,) * len(q.turns)) for q, text in zip(questions, given, strict=True)}


def parts(prompt: str) -> tuple[str, str]:
    """The two answers as the judge sees them."""
    found = re.findall(r"<answer[^>]*>\n(.*?)\n</answer", prompt, flags=re.DOTALL)
    return found[0], found[1]


class Letters(ServerDouble):
    """Gives log-probs of the two letters: the first answer's by a function of what is shown."""

    def __init__(self, first: Callable[[str, str], float], **more: Any) -> None:
        super().__init__(lambda body, number: "m", **more)
        self.first = first

    def choices(self, path: str, body: dict[str, Any], n: int) -> list[dict[str, Any]]:
        share = self.first(*parts(body["messages"][-1]["content"]))
        top = [{"token": "m", "logprob": math.log(share * 0.9)}, {"token": " M", "logprob": math.log((1 - share) * 0.9)}]
        content = [{"token": "m", "logprob": -0.1, "top_logprobs": top if body.get("logprobs") else []}]
        message = {"role": "assistant", "content": "m"}
        return [{"index": 0, "finish_reason": "length", "message": message, "logprobs": {"content": content}}]


@contextmanager
def judging(double: ServerDouble, path: Path | None = None, **config: Any) -> Iterator[ServerJudge]:
    with serving(double) as url:
        settings = {"base_url": url, "max_retries": 2, **config}
        yield ServerJudge(EvalJudgeConfig.model_validate(settings), None if path is None else Store(path))


def said(label: str) -> Callable[[dict[str, Any], int], str]:
    return lambda body, number: f"Both are fine.\n{label}"


def test_log_probs_weigh_both_orders() -> None:
    double = Letters(lambda a, b: 0.8 if "new" in a else 0.4)
    with judging(double) as judge:
        games, account = judge.compare(QUESTIONS, answers("new", lambda k: f"new {k}"), answers("old", lambda k: f"old {k}"))
    assert account.mode == "logprobs"
    assert [game.model_first for game in games] == [True, False] * 12
    # Shown first it gets .8, shown second what the other, first, does not get.
    assert [game.preference for game in games] == pytest.approx([0.8, 0.6] * 12)
    assert question_preferences(games).preferences == pytest.approx(np.full(12, 0.7))
    assert (account.asked, sum(account.missing.values())) == (24, 0)


@pytest.mark.parametrize("mode", ["logprobs", "labels"])
def test_a_judge_who_picks_the_first_answer_says_nothing_and_is_found_out(mode: str) -> None:
    double = Letters(lambda a, b: 0.99) if mode == "logprobs" else ServerDouble(said("[[A>B]]"))
    with judging(double, mode=mode) as judge:
        games, _ = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert question_preferences(games).preferences == pytest.approx(np.full(12, 0.5))
    assert win_rate(question_preferences(games).preferences).win_rate == pytest.approx(50.0)
    found = position_bias(games)
    assert found.biased
    assert found.first_place == pytest.approx(99.0 if mode == "logprobs" else 100.0)


def test_a_judge_who_likes_length_is_exposed() -> None:
    chance = random.Random(0)
    questions = [Question(f"q{k}", (f"What is {k}?",)) for k in range(80)]
    long = answers("long", lambda k: "word " * chance.randint(30, 90), questions)
    short = answers("short", lambda k: "word " * chance.randint(20, 50), questions)
    with judging(Letters(lambda a, b: 0.97 if len(a) > len(b) else 0.03)) as judge:
        games, _ = judge.compare(questions, long, short)
    found = question_preferences(games)
    lengths = {(q.id, name): len(given[q.id].turns[0]) for q in questions for name, given in (("long", long), ("short", short))}
    raw = win_rate(found.preferences).win_rate
    ours, theirs = ([lengths[q, name] for q in found.questions] for name in ("long", "short"))
    controlled = length_controlled_win_rate(found.preferences, np.array(ours), np.array(theirs))
    assert raw > 80
    assert abs(controlled.win_rate - 50) < abs(raw - 50) / 2
    assert length_bias(games, lengths).related
    assert not position_bias(games).biased


def test_labels_are_read_strictly_and_strong_ones_weigh_three() -> None:
    verdicts = ["[[A>>B]]", "[[B>A]] or [[A=B]]", "A>B or so", "[[A=B]]", "[[ A<<B ]]", "[[D]]"]

    def answer(body: dict[str, Any], number: int) -> str:
        asked = re.search(r"What is (\d+)", body["messages"][-1]["content"])
        assert asked is not None
        return verdicts[int(asked[1])]

    double = ServerDouble(answer)
    with judging(double, mode="labels", attempts=2) as judge:
        games, account = judge.compare(QUESTIONS[:6], answers("new"), answers("old"))
    first = [(game.preference, game.weight, game.verdict) for game in games if game.model_first]
    none = (None, 1, "")
    assert first == [(1.0, 3, "A>>B"), none, none, (0.5, 1, "A=B"), (0.0, 3, "B>>A"), none]
    second = [(game.preference, game.weight) for game in games if not game.model_first]
    assert second == [(0.0, 3), (None, 1), (None, 1), (0.5, 1), (1.0, 3), (None, 1)]
    assert account.missing == {"unreadable": 6}
    # What could not be read was asked for once more, otherwise.
    assert len(double.requests) == 12 + 6
    assert {body["seed"] for _, body in double.requests} == {0, 1}
    found = question_preferences(games)
    assert (len(found.missing), np.isnan(found.preferences).sum()) == (3, 3)
    assert win_rate(found.preferences).num_missing == 3


def test_thoughts_are_no_verdicts() -> None:
    texts = {0: "<think>[[A>B]]? No.</think>\n[[B>A]]", 1: "<think>[[A>B]] seems", 2: "[[A=B]]"}
    double = ServerDouble(lambda body, number: texts[int(re.findall(r"What is (\d)", body["messages"][-1]["content"])[0])])
    with judging(double, mode="labels", attempts=1) as judge:
        games, _ = judge.compare(QUESTIONS[:3], answers("new"), answers("old"))
    assert [game.verdict for game in games if game.model_first] == ["B>A", "", "A=B"]
    with judging(ServerDouble(lambda body, number: "<think>[[2]] or [[9]]</think>[[9]]"), mode="rating") as judge:
        ratings, _ = judge.rate(QUESTIONS[:1], answers("new"))
    assert [rating.score for rating in ratings] == [9.0]


@pytest.mark.parametrize(
    "said_of_it",
    [
        "This model's maximum context length is 4096 tokens",
        "the request exceeds the available context size, try increasing it",
        "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096",
        "The input token count (5000) exceeds the maximum number of tokens allowed (4096).",
        "prompt is too long: 5000 tokens",
    ],
)
def test_servers_that_say_it_in_other_words(said_of_it: str) -> None:
    class Asked:
        usage, changes = Usage(), {}

        def ask(self, requests: list[Any], done: Any) -> list[Any]:
            return [ServerError(said_of_it, refused=True) for _ in requests]

    account = Account("labels")
    ask_verdicts(Asked(), ["a"], lambda choice: choice.text, attempts=2, body={}, account=account)  # type: ignore[arg-type]
    assert account.missing == {"prompt too long for the judge": 1}


def test_a_server_that_takes_too_long_is_no_long_prompt() -> None:
    class Asked:
        usage, changes = Usage(), {}

        def ask(self, requests: list[Any], done: Any) -> list[Any]:
            return [ServerError("the request took too long") for _ in requests]

    with pytest.raises(ServerError, match="took too long"):
        ask_verdicts(
            Asked(),  # type: ignore[arg-type]
            ["a"],
            lambda choice: choice.text,
            attempts=2,
            body={},
            account=Account("labels"),
        )


def test_the_way_of_judging_follows_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with judging(ServerDouble(said("[[A=B]]"))) as judge:
        games, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert account.mode == "labels"
    assert all(game.preference == 0.5 for game in games)
    assert "since the judge gives no log-probs" in capsys.readouterr().err


def test_ratings_with_references_and_two_turns() -> None:
    questions = [
        Question("math", ("2 + 2?", "And 3 + 3?"), "math", ("four it is", "six it is")),
        Question("prose", ("Write.", "More."), "writing"),
    ]

    def answer(body: dict[str, Any], number: int) -> str:
        prompt = body["messages"][-1]["content"]
        if "<reference " in prompt:
            return "[[9]]" if "six it is" in prompt and "Assistant: mine 0" in prompt else "[[7.5]]"
        return "[[11]]" if "More." in prompt else "[[3]] as I said [[3]]"

    double = ServerDouble(answer)
    with judging(double, mode="rating", attempts=1) as judge:
        ratings, account = judge.rate(questions, answers("new", lambda k: f"mine {k}", questions))
    assert [(r.question, r.turn, r.category, r.score) for r in ratings] == [
        ("math", 1, "math", 7.5),
        ("math", 2, "math", 9.0),
        ("prose", 1, "writing", 3.0),
        ("prose", 2, "writing", None),
    ]
    assert account.missing == {"unreadable": 1}


def test_a_long_prompt_is_a_missing_verdict_with_its_reason() -> None:
    double = ServerDouble(said("[[A>B]]"))
    double.fault_of = lambda body: "too long" if "What is 3?" in body["messages"][-1]["content"] else None
    with judging(double, mode="labels") as judge:
        games, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert account.missing == {"prompt too long for the judge": 2}
    assert [game.question for game in games if game.preference is None] == ["q3", "q3"]
    # It is not asked again: it would not fit again.
    assert len(double.requests) == 24
    assert "maximum context length" in account.first_failure


def test_a_flaky_judge_loses_nothing() -> None:
    faults = [429, "half", None, "null", 500, None, "drop", None, None]
    double = ServerDouble(said("[[A>B]]"), faults=lambda number: faults[number % len(faults)] if number < 60 else None)
    with judging(double, mode="labels", max_retries=8) as judge:
        games, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert all(game.preference is not None for game in games)
    assert not account.missing


def test_a_judge_who_is_down_is_one_error_and_some_missing_is_not(tmp_path: Path) -> None:
    double = ServerDouble(said("[[A>B]]"), faults=lambda number: 500)
    with judging(double, mode="labels", max_retries=0) as judge, pytest.raises(ServerError, match="server http"):
        judge.compare(QUESTIONS, answers("new"), answers("old"))
    double = ServerDouble(said("[[A>B]]"))
    double.fault_of = lambda body: 500 if "What is 3?" in body["messages"][-1]["content"] else None
    with judging(double, tmp_path / "verdicts", mode="labels", max_retries=0, attempts=2) as judge:
        _, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
        assert account.missing == {"no answer": 2}
        # The judge is well again: only what is missing is asked.
        double.fault_of = lambda body: None
        before = len(double.requests)
        games, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert len(double.requests) == before + 2
    assert (account.remembered, account.requests, not account.missing) == (22, 2, True)
    assert all(game.preference is not None for game in games)


def test_the_way_of_judging_is_decided_once_and_by_more_than_the_first_question(tmp_path: Path) -> None:
    double = Letters(lambda a, b: 0.8)
    double.fault_of = lambda body: "too long" if "What is 0?" in body["messages"][-1]["content"] else None
    with judging(double, tmp_path / "verdicts") as judge:
        games, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
        assert (account.mode, account.asked, account.remembered) == ("logprobs", 24, 0)
        assert account.missing == {"prompt too long for the judge": 2}
        assert [game.preference for game in games if game.question != "q0"] == pytest.approx([0.8, 0.2] * 11)
        # What was asked to find out is not asked again.
        assert len(double.requests) == 24
        judge.compare(QUESTIONS, answers("newer"), answers("old"))
        assert len(double.requests) == 48
    double.fault_of = lambda body: None
    with judging(double, tmp_path / "verdicts", base_url="http://127.0.0.1:1/v1", max_retries=0) as judge:
        # Another server's verdicts are not this one's.
        with pytest.raises(ServerError):
            judge.compare(QUESTIONS, answers("new"), answers("old"))


def test_a_judge_who_refuses_log_probs_is_asked_for_labels_and_one_who_is_down_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    double = ServerDouble(said("[[A>B]]"))
    double.fault_of = lambda body: 400 if body.get("logprobs") else None
    with judging(double) as judge:
        _, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert (account.mode, account.asked, sum(account.missing.values())) == ("labels", 24, 0)
    assert "since the judge refuses to give log-probs (server http" in capsys.readouterr().err
    double.fault_of = lambda body: 503
    with judging(double, max_retries=0) as judge, pytest.raises(ServerError):
        judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert "labels" not in capsys.readouterr().err


def test_letters_that_are_not_there_are_asked_for_once() -> None:
    class Silent(Letters):
        def choices(self, path: str, body: dict[str, Any], n: int) -> list[dict[str, Any]]:
            found = super().choices(path, body, n)
            if "What is 3?" in body["messages"][-1]["content"]:
                found[0]["logprobs"]["content"][0]["top_logprobs"] = [{"token": "Both", "logprob": -0.1}]
            return found

    double = Silent(lambda a, b: 0.8)
    with judging(double, mode="logprobs", attempts=3) as judge:
        games, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert account.missing == {"unreadable": 2}
    assert [game.question for game in games if game.preference is None] == ["q3", "q3"]
    assert len(double.requests) == 24


def test_a_judge_who_is_down_is_not_asked_everything() -> None:
    questions = [Question(f"q{k}", (f"What is {k}?",)) for k in range(100)]
    double = ServerDouble(said("[[A>B]]"), faults=lambda number: 500)
    with (
        judging(double, mode="labels", max_retries=0, max_concurrency=2) as judge,
        pytest.raises(ServerError, match="status 500: no"),
    ):
        judge.compare(questions, answers("new", None, questions), answers("old", None, questions))
    # Four in a row, and what was under way meanwhile.
    assert len(double.requests) < 20


def test_a_judge_who_goes_down_half_way(tmp_path: Path) -> None:
    up = 30
    questions = [Question(f"q{k}", (f"What is {k}?",)) for k in range(40)]
    ours, theirs = answers("new", None, questions), answers("old", None, questions)
    double = ServerDouble(said("[[A>B]]"), faults=lambda number: 500 if number >= up else None)
    with judging(double, tmp_path / "verdicts", mode="labels", max_retries=0, max_concurrency=2, attempts=3) as judge:
        games, account = judge.compare(questions, ours, theirs)
        assert account.missing == {"no answer": 80 - up}
        assert sum(game.preference is None for game in games) == 80 - up
        assert len(double.requests) < 80
        double.faults = lambda number: None
        before = len(double.requests)
        games, account = judge.compare(questions, ours, theirs)
    assert len(double.requests) - before == 80 - up
    assert (account.remembered, account.requests, sum(account.missing.values())) == (up, 80 - up, 0)
    assert all(game.preference is not None for game in games)


def test_prompts_that_are_all_too_long_are_missing_verdicts() -> None:
    double = ServerDouble(said("[[A>B]]"))
    double.fault_of = lambda body: "too long"
    with judging(double, mode="labels") as judge:
        games, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert account.missing == {"prompt too long for the judge": 24}
    assert all(game.preference is None for game in games)
    assert len(double.requests) == 24


@pytest.mark.parametrize("mode", ["logprobs", "labels", "rating"])
def test_references_are_shown_where_mt_bench_shows_them(mode: str) -> None:
    categories = ["math", "reasoning", "coding", "stem", "extraction", "roleplay", "writing", "humanities", "", "my own"]
    questions = [Question(str(k), (f"Ask {k}", "More"), name, ("known", "known too")) for k, name in enumerate(categories)]
    double = Letters(lambda a, b: 0.5) if mode == "logprobs" else ServerDouble(said("[[5]] [[A=B]]"))
    with judging(double, mode=mode) as judge:
        if mode == "rating":
            judge.rate(questions, answers("new", None, questions))
        else:
            judge.compare(questions, answers("new", None, questions), answers("old", None, questions))
    shown: dict[str, set[bool]] = {}
    for _, body in double.requests:
        prompt = body["messages"][-1]["content"]
        asked = re.search(r"Ask (\d)", prompt)
        assert asked is not None
        shown.setdefault(categories[int(asked[1])], set()).add("<reference " in prompt and "known" in prompt)
    assert {name for name, found in shown.items() if found == {True}} == {"math", "reasoning", "coding", "", "my own"}
    assert {name for name, found in shown.items() if found == {False}} == {
        "stem",
        "extraction",
        "roleplay",
        "writing",
        "humanities",
    }


def test_the_account_tells_equal_answers_apart() -> None:
    with judging(ServerDouble(said("[[A>B]]")), mode="labels") as judge:
        _, account = judge.compare(
            QUESTIONS, answers("new", lambda k: "same" if k < 4 else "n"), answers("old", lambda k: "same")
        )
        estimate = judge.estimate(
            QUESTIONS, [answers("new", lambda k: "same" if k < 4 else "n"), answers("old", lambda k: "same")]
        )
    assert "4 questions with equal answers, not asked about" in account.text()
    assert estimate.startswith("16 verdicts, ")


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_judges import QUESTIONS, EvalJudgeConfig, ServerJudge, Store, answers
config = EvalJudgeConfig(base_url=sys.argv[1], mode="labels", max_concurrency=2)
judge = ServerJudge(config, Store(Path(sys.argv[2])))
judge.compare(QUESTIONS, answers("new"), answers("old"))
"""


def test_a_killed_run_goes_on_and_pays_for_nothing_twice(tmp_path: Path) -> None:
    double = ServerDouble(said("[[A>B]]"))
    double.delay = 0.05
    with serving(double) as url:
        code = SCRIPT.format(tests=str(Path(__file__).parent))
        process = subprocess.Popen([sys.executable, "-c", code, url, str(tmp_path / "verdicts")], stderr=subprocess.DEVNULL)
        while len(double.requests) < 8 and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)
        kept = Store(tmp_path / "verdicts")
        judge = ServerJudge(EvalJudgeConfig(base_url=url, mode="labels", max_concurrency=2), kept)
        games, account = judge.compare(QUESTIONS, answers("new"), answers("old"))
    assert account.remembered >= 5
    assert all(game.preference is not None for game in games)
    asked = [json.dumps(body["messages"]) for _, body in double.requests]
    # At most what was under way when the process was killed is asked again.
    assert len(asked) - len(set(asked)) <= 2
    assert len(set(asked)) == 24


def test_the_same_answer_twice_is_a_tie_that_nobody_pays_for() -> None:
    double = ServerDouble(said("[[A>B]]"))
    mine = answers("new", lambda k: "same" if k < 4 else f"new {k}")
    with judging(double, mode="labels") as judge:
        games, account = judge.compare(QUESTIONS, mine, answers("old", lambda k: "same"))
    assert (account.identical, account.asked, len(double.requests)) == (4, 16, 16)
    assert {game.question for game in games if game.preference == 0.5} == {"q0", "q1", "q2", "q3"}
    assert len(games) == 24


def test_rewards_judge_without_an_order() -> None:
    follow = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    questions = [Question(f"q{k}", ("Say it.",), metadata=follow) for k in range(3)]
    mine = answers("new", lambda k: ["a b", "a, b", "a b"][k], questions)
    other = answers("old", lambda k: ["a, b", "a b", "b a"][k], questions)
    judge = RewardJudge(InstructionReward())
    games, account = judge.compare(questions, mine, other)
    assert [game.preference for game in games] == [1.0, 1.0, 0.0, 0.0, 0.5, 0.5]
    assert judge.rewards(questions, mine) == {"q0": 1.0, "q1": 0.0, "q2": 1.0}
    assert account.asked == 3

    class Unknown:
        def score(self, group: Group) -> list[float | None]:
            return [None if group.id == "q1" else 1.0]

    games, account = RewardJudge(Unknown()).compare(questions, mine, other)
    assert account.missing == {"no reward": 1}
    assert [game.preference for game in games] == [0.5, 0.5, None, None, 0.5, 0.5]


def test_what_it_would_cost(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("{question}{answer_a}{answer_b}")
    config = EvalJudgeConfig(mode="labels", template=tmp_path / "mine.txt", max_tokens=10, price_in=2.0, price_out=5.0)
    texts = ["x" * 40, "y" * 50]
    questions = [Question("q", ("z" * 10,))]
    given = [answers(name, lambda k, text=text: text, questions) for name, text in zip(("new", "old"), texts, strict=True)]
    # Two orders of 100 characters, four of them a token, and ten tokens of verdict each.
    expected = (2 * 100 / 4 * 2.0 + 2 * 10 * 5.0) / 1e6
    said = ServerJudge(config).estimate(questions, given)
    assert said == f"2 verdicts, about 50 prompt tokens and at most 20 of verdicts, at most {expected:.4g} at your prices"


def test_templates_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("{question}{answer_a}")
    with pytest.raises(ValueError, match=r"lacks \{answer_b\}"):
        ServerJudge(EvalJudgeConfig(mode="labels", template=tmp_path / "mine.txt"))
    with pytest.raises(ValueError, match=r"needs a judge\.mode"):
        ServerJudge(EvalJudgeConfig(template=tmp_path / "mine.txt"))
    with pytest.raises(ValueError, match="nothing to compare"), judging(ServerDouble()) as judge:
        judge.compare(QUESTIONS, answers("new"), {})


def test_what_an_answer_says_is_no_placeholder() -> None:
    double = ServerDouble(said("[[A=B]]"))
    with judging(double, mode="labels") as judge:
        judge.compare(QUESTIONS[:1], answers("new", lambda k: "{answer_b} {reference}"), answers("old"))
    assert "{answer_b} {reference}" in double.requests[0][1]["messages"][0]["content"]

"""Reward models, judges, checkable instructions, mathematics, ensembles; and sources that fail."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from conftest import CHATML, build_tokenizer
from ncalign.cli.app import main
from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group, read_groups
from ncalign.rewards.base import BatchRewardSource, score_many
from ncalign.rewards.config import JudgeConfig, ScoreConfig
from ncalign.rewards.function import FunctionReward
from ncalign.rewards.guard import Ensemble, Guarded
from ncalign.rewards.instructions import CHECKS, InstructionReward
from ncalign.rewards.judge import JudgeReward
from ncalign.rewards.model import ModelReward
from ncalign.rewards.score import run_score
from ncalign.rewards.verifiable import MathVerifyReward
from server_double import ServerDouble, serving


def group(*texts: str, prompt: Any = "Say.", id: str = "g", **metadata: Any) -> Group:
    return Group(id=id, prompt=prompt, candidates=[Candidate(text) for text in texts], metadata=metadata)


# --- Sources that fail ------------------------------------------------------------------------------------------------


def test_a_candidate_that_fails_costs_itself_alone() -> None:
    def reward(prompt: Any, completions: list[str]) -> list[float]:
        if "raise" in completions:
            raise RuntimeError("no")
        return [float("nan") if text == "nan" else float(len(text)) for text in completions]

    source = Guarded(FunctionReward(reward, "f"), timeout=None, max_failed_share=0.5)
    assert source.score(group("a", "raise", "nan", "bbb")) == [1.0, None, None, 3.0]
    assert (source.num_scored, source.num_failed) == (4, 2)
    assert "raised RuntimeError" in (source.first_failure or "")
    source.check()
    assert source.score(group("raise")) == [None]
    with pytest.raises(
        ValueError, match=r"failed on 3 of 5 candidates, more than max_failed_share=0\.5; the first: .*RuntimeError"
    ):
        source.check()


def test_a_candidate_that_hangs_costs_itself_alone() -> None:
    held = threading.Event()

    def reward(prompt: Any, completions: list[str]) -> list[float]:
        if "hang" in completions:
            held.wait(60)
        return [1.0] * len(completions)

    source = Guarded(FunctionReward(reward, "f"), timeout=0.2, max_failed_share=0.5)
    assert source.score(group("a", "hang", "b")) == [1.0, None, 1.0]
    assert "took more than 0.2 s" in (source.first_failure or "")
    held.set()


def test_no_failures_are_allowed_by_default() -> None:
    source = Guarded(FunctionReward(lambda prompt, completions: 1 / 0, "f"), timeout=None, max_failed_share=0.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="raised ZeroDivisionError"):
        source.score(group("a"))


def test_too_many_failures_leave_no_file(tmp_path: Path, write_jsonl: Callable[..., Path], capsys: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "def f(prompt, completions):\n    return [None if 'x' in c else 1 / 0 for c in completions]\n"
    )
    rows = [{"id": str(i), "prompt": "P", "candidates": [{"completion": "x"}, {"completion": "y"}]} for i in range(4)]
    words = ["score", "--data", str(write_jsonl(rows)), "--output", str(tmp_path / "out.jsonl")]
    words += ["--reward", f"{tmp_path / 'mine.py'}:f", "--max_failed_share"]
    assert main([*words, "0.4"]) == 1
    assert "failed on 4 of 8 candidates" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert main([*words, "0.6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed_rewards"] == 4


def test_ensembles() -> None:
    first = FunctionReward(lambda prompt, completions: [1.0, 2.0, None], "a")
    second = FunctionReward(lambda prompt, completions: [3.0, 0.0, 1.0], "b")
    for combine, expected in (("mean", [2.0, 1.0, None]), ("min", [1.0, 0.0, None])):
        assert Ensemble([first, second], combine=combine).score(group("x", "y", "z")) == expected


def test_groups_are_scored_together_where_the_source_can() -> None:
    class Alone:
        def score(self, group: Group) -> list[float | None]:
            return [1.0 for _ in group.candidates]

    class Together(Alone):
        def score_many(self, groups: Sequence[Group]) -> list[list[float | None]]:
            return [[float(len(groups))] * len(group.candidates) for group in groups]

    groups = [group("a"), group("b", "c")]
    assert not isinstance(Alone(), BatchRewardSource)
    assert score_many(Alone(), groups) == [[1.0], [1.0, 1.0]]
    assert score_many(Together(), groups) == [[2.0], [2.0, 2.0]]
    assert Ensemble([Alone(), Together()], combine="mean").score_many(groups) == [[1.5], [1.5, 1.5]]


# --- Instructions and mathematics -------------------------------------------------------------------------------------

FOLLOWED: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A Cat, a dog.", "A category of dogs."),
    ("keywords:frequency", {"keyword": "no", "frequency": 2, "relation": "at least"}, "No, no.", "No nose."),
    ("keywords:forbidden_words", {"forbidden_words": ["bad"]}, "A badge.", "Too Bad!"),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "Zoo.", "zZ"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One, two."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "It's so", "one two three"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen, more.",
        "Then.\n\nFirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] and [place]", "[name] and (place)"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. One more.", "Bye. PS"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", "*a* and b"),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part 1\nx\nPart 2\ny", "Part 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Hello>>\nText", "<< >> Text"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi! Say hi."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So it was. The END.", "The end. Or not"),
    ("startend:quotation", {}, '"All of it"', '"Half" of it'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "YES, IT is",
        "Yes, IT is",
    ),
    ("change_case:english_capital", {}, "ALL OF IT 1", "ALL of it"),
    ("change_case:english_lowercase", {}, "all of it 1", "All of it"),
    ("punctuation:no_comma", {}, "none; here", "one, here"),
]


@pytest.mark.parametrize(("name", "arguments", "followed", "broken"), FOLLOWED, ids=[case[0] for case in FOLLOWED])
def test_instructions(name: str, arguments: dict[str, Any], followed: str, broken: str) -> None:
    # As IFEval's files do, arguments of other instructions are there and null.
    given = group(followed, broken, " ", instruction_id_list=[name], kwargs=[{**arguments, "unused": None}])
    assert InstructionReward().score(given) == [1.0, 0.0, 0.0]


def test_every_instruction_is_tested() -> None:
    assert {case[0] for case in FOLLOWED} == set(CHECKS)


def test_a_share_of_the_instructions() -> None:
    names = ["punctuation:no_comma", "change_case:english_lowercase"]
    assert InstructionReward().score(group("a, b", instruction_id_list=names, kwargs=[{}, {}])) == [0.5]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "its metadata need 'instruction_id_list'"),
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "did you mean 'punctuation:no_comma'"),
        ({"instruction_id_list": ["startend:end_checker"], "kwargs": [{}]}, "can't be checked with {}: .*end_phrase"),
    ],
)
def test_instructions_that_can_not_be_checked(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstructionReward().score(group("a", **metadata))


def test_math_verify() -> None:
    texts = ["So it is $\\boxed{\\frac{1}{2}}$.", "The answer is 0.5", "It is 2.", "I do not know."]
    assert MathVerifyReward().score(group(*texts, answer="1/2")) == [1.0, 1.0, 0.0, 0.0]
    assert MathVerifyReward().score(group("So the answer is 1,024.", answer=1024)) == [1.0]
    with pytest.raises(ValueError, match="has no answer"):
        MathVerifyReward().score(group("a"))


def test_math_verify_in_a_thread_of_its_own() -> None:
    source = Guarded(MathVerifyReward(), timeout=30, max_failed_share=0.0)
    assert source.score(group("The answer is 7.", answer="7")) == [1.0]


# --- Reward models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("reward_model"), build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores_as_it_does_alone(reward_model: Path) -> None:
    groups = [
        group("Yes.", "The answer is twelve, I think.", id="a"),
        group("No", prompt=[{"role": "user", "content": "Hm?"}], id="b"),
    ]
    found = score_many(ModelReward(str(reward_model), batch_size=2), groups)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward_model), build_tokenizer()
    for one, rewards in zip(groups, found, strict=True):
        prompt = [{"role": "user", "content": one.prompt}] if isinstance(one.prompt, str) else one.prompt
        for candidate, reward in zip(one.candidates, rewards, strict=True):
            turns = [*prompt, {"role": "assistant", "content": candidate.completion}]
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                expected = float(model(input_ids=ids["input_ids"]).logits)
            assert reward == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("template", ["writes", "leaves out", "none"])
def test_a_reward_model_sees_tools_or_it_is_said(
    template: str, reward_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ModelReward(str(reward_model))
    written = "{% if tools %}{{ tools | tojson }}{% endif %}" if template == "writes" else ""
    monkeypatch.setattr(source._tokenizer, "chat_template", None if template == "none" else written + CHATML)
    plain, described = group("Yes."), group("Yes.", id="b", tools=[{"type": "function", "function": {"name": "weather"}}])
    found = source.score_many([plain, described, described])
    assert (found[0] != found[1]) == (template == "writes")
    told = capsys.readouterr().err.count("does not see `tools` of prompts (first: group 'b')")
    assert told == (template != "writes")


def test_control_tokens_in_texts_are_told_once(reward_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ModelReward(str(reward_model))
    for _ in range(2):
        source.score(group("a", "b<|im_end|> c"))
    assert (
        capsys.readouterr().err.count("the control token `<|im_end|>` is written out in texts: the reward model reads it") == 1
    )


def test_a_reward_model_scores_nothing_twice(reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelReward(str(reward_model), store=Store(tmp_path / "scores"))
    first = source.score(group("Yes.", "No."))
    monkeypatch.setattr(ModelReward, "_logits", lambda self, batch: 1 / 0)
    again = ModelReward(str(reward_model), store=Store(tmp_path / "scores"))
    assert again.score(group("No.", "Yes.")) == first[::-1]
    with pytest.raises(ZeroDivisionError):
        again.score(group("Other."))


@pytest.mark.parametrize("logit", [1e300, -1e16, float("nan"), float("inf")])
def test_a_logit_beyond_the_bound_of_rewards_is_none(logit: float, reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "_logits", lambda self, batch: [logit for _ in batch])
    assert ModelReward(str(reward_model)).score(group("Yes.")) == [None]


@pytest.mark.parametrize("kept", ["7", [1.0], True, {"reward": 1.0}])
def test_a_kept_score_that_is_none_is_computed_again(kept: object, reward_model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "scores")
    first = ModelReward(str(reward_model), store=store).score(group("Yes."))
    with closing(sqlite3.connect(tmp_path / "scores")) as file:
        [(key,)] = file.execute("SELECT key FROM kept").fetchall()
    store.put(key, kept)
    assert ModelReward(str(reward_model), store=store).score(group("Yes.")) == first
    assert store.get(key) == first[0]


def test_score_with_a_reward_model(reward_model: Path, groups_file: Path, tmp_path: Path) -> None:
    config = ScoreConfig(
        data=groups_file, output=tmp_path / "o.jsonl", reward=f"model:{reward_model}", cache_dir=tmp_path / "c"
    )
    result = run_score(config)
    assert result["unknown_rewards"] == 0
    assert len({c.reward for one in read_groups(tmp_path / "o.jsonl") for c in one.candidates}) > 10


def test_a_model_that_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        ModelReward(str(tmp_path))


# --- Judges -----------------------------------------------------------------------------------------------------------


def judged(answer: Callable[[str], str], **config: Any) -> tuple[ServerDouble, Callable[[list[Group]], Any]]:
    """A double whose verdict is a function of the judge's prompt, and a function that scores groups with it."""
    double = ServerDouble(answer=lambda body, number: answer(body["messages"][0]["content"]))

    def score(groups: list[Group]) -> Any:
        with serving(double) as url:
            source = JudgeReward(JudgeConfig.model_validate({"base_url": url, **config}), config.get("store"))
            return score_many(source, groups), source

    return double, score


def inside(text: str, tag: str) -> str:
    found = re.search(rf"<{tag} (\w+)>\n(.*?)\n</{tag} \1>", text, flags=re.DOTALL)
    assert found is not None
    return found[2]


def test_ratings() -> None:
    double, score = judged(lambda text: f"Fine. [[{len(inside(text, 'answer'))}]]")
    found, source = score([group("a", "bbb", id="a"), group("cc", "{prompt} [[9]]", "x" * 11, id="b")])
    # The last is beyond the scale; braces and verdicts inside an answer stay its own.
    assert found == [[1.0, 3.0], [2.0, None, None]]
    assert (source.account.asked, source.account.missing) == (5, {"unreadable": 2})
    assert "{prompt} [[9]]" in [inside(body["messages"][0]["content"], "answer") for _, body in double.requests]


@pytest.mark.parametrize("verdict", ["it has 7", "[[seven]]", "[[3]] or [[4]]", "[[0]]", "[[11]]", "", "[[7"])
def test_a_rating_that_can_not_be_read_is_missing(verdict: str) -> None:
    double, score = judged(lambda text: verdict or " ", attempts=2)
    found, source = score([group("a")])
    assert found == [[None]]
    assert (source.account.missing, len(double.requests)) == ({"unreadable": 1}, 2)


def test_a_verdict_that_can_not_be_read_is_asked_for_again() -> None:
    double = ServerDouble(answer=lambda body, number: "hm" if body["seed"] == 0 else "[[4]]")
    with serving(double) as url:
        assert JudgeReward(JudgeConfig(base_url=url)).score(group("a")) == [4.0]
    assert [body["temperature"] for _, body in double.requests] == [0.0, 0.7]


def test_comparisons_in_both_orders() -> None:
    def longer(text: str) -> str:
        first, second = (len(inside(text, f"answer_{side}")) for side in "ab")
        return "[[C]]" if first == second else "[[A]]" if first > second else "[[B]]"

    double, score = judged(longer, mode="pairwise")
    found, source = score([group("a", "bb", "cc", "dddd")])
    assert found == [[0.0, 0.5, 0.5, 1.0]]
    assert (len(double.requests), source.num_changed) == (12, 0)


def test_a_judge_that_takes_the_first_says_nothing() -> None:
    _, score = judged(lambda text: "[[A]]", mode="pairwise")
    found, source = score([group("a", "bb", "ccc")])
    assert found == [[0.5, 0.5, 0.5]]
    assert source.num_changed == 3


def test_half_a_comparison_is_missing() -> None:
    _, score = judged(lambda text: "[[A]]" if inside(text, "answer_a") == "a" else "?", mode="pairwise", attempts=1)
    found, _ = score([group("a", "b")])
    assert found == [[None, None]]


def test_as_many_opponents_as_asked_for() -> None:
    double, score = judged(lambda text: "[[C]]", mode="pairwise", opponents=2)
    found, _ = score([group(*"abcdefgh")])
    assert len(double.requests) <= 2 * 8
    assert None not in found[0]


def test_very_many_completions_are_compared_in_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncalign.rewards.judge._MOST_PAIRED", 4)
    double, score = judged(lambda text: "[[C]]", mode="pairwise", opponents=2)
    found, _ = score([group(*"abcdefgh")])
    # Eight pairs, each in both orders.
    assert len(double.requests) == 16
    assert found[0] == [0.5] * 8
    _, score = judged(lambda text: "[[C]]", mode="pairwise")
    with pytest.raises(ValueError, match=r"has 8 completions, each to be compared with each: set judge\.opponents"):
        score([group(*"abcdefgh")])


def test_verdicts_are_paid_for_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "verdicts")
    double = ServerDouble(answer=lambda body, number: "[[5]]")
    with serving(double) as url:
        for _ in range(2):
            assert JudgeReward(JudgeConfig(base_url=url), store).score(group("a", "b")) == [5.0, 5.0]
    assert len(double.requests) == 2


def test_a_judge_that_is_down_is_an_error_and_not_missing_verdicts() -> None:
    source = JudgeReward(JudgeConfig(base_url="http://127.0.0.1:9/v1", max_retries=0))
    with pytest.raises(RuntimeError, match="Connection error"):
        source.score(group("a"))


def test_templates_are_files(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("{prompt}|{completion}|{highest}")
    double = ServerDouble(answer=lambda body, number: "[[2]]")
    with serving(double) as url:
        JudgeReward(JudgeConfig(base_url=url, template=tmp_path / "short.txt", highest=5)).score(group("a"))
    assert double.requests[0][1]["messages"][0]["content"] == "Say.|a|5"
    (tmp_path / "short.txt").write_text("{completion}")
    with pytest.raises(ValueError, match=r"lacks \{prompt\}"):
        JudgeReward(JudgeConfig(template=tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="can't be read"):
        JudgeReward(JudgeConfig(template=tmp_path / "none.txt"))


def test_score_with_a_judge_and_a_function(tmp_path: Path, groups_file: Path, capsys: Any) -> None:
    (tmp_path / "mine.py").write_text("def f(prompt, completions):\n    return [1.0 for _ in completions]\n")
    with serving(ServerDouble(answer=lambda body, number: "[[5]]")) as url:
        words = [
            "score",
            "--data",
            str(groups_file),
            "--output",
            str(tmp_path / "o.jsonl"),
            "--cache_dir",
            str(tmp_path),
            "--json",
        ]
        words += ["--reward", "judge", f"{tmp_path / 'mine.py'}:f", "--judge.base_url", url]
        assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["verdicts"], printed["verdicts_missing"], printed["mean_reward"]) == (36, 0, 3.0)
    assert printed["completion_tokens"] == 36 * 3


def test_a_judge_needs_its_section(tmp_path: Path, groups_file: Path) -> None:
    with pytest.raises(ValueError, match="go together"):
        run_score(ScoreConfig(data=groups_file, output=tmp_path / "o.jsonl", reward="judge"))

"""Question sets in their original formats, and answers to them: asked turn by turn, kept, written, read."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncalign.cli.app import main
from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group
from ncalign.data.rendering import Rendering
from ncalign.generation.base import Completion, PromptError, SamplingParams
from ncalign.judging import answer as answering
from ncalign.judging.answer import Answering, answer_questions
from ncalign.judging.answers import read_answers, write_answers
from ncalign.judging.records import Answer, Question
from ncalign.judging.sets import BUNDLED, WHERE, read_questions, read_references
from ncalign.model.policy import load_tokenizer
from ncalign.rewards.instructions import InstructionReward
from server_double import ServerDouble, serving


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sets_in_their_original_formats(tmp_path: Path) -> None:
    alpaca = tmp_path / "alpaca_eval.json"
    alpaca.write_text(
        json.dumps([{"instruction": "A?", "output": "x", "generator": "m", "dataset": "koala"}, {"instruction": "B?"}])
    )
    assert read_questions("alpaca-eval", file=alpaca) == [Question("0", ("A?",), "koala"), Question("1", ("B?",))]
    old = lines(tmp_path / "old.jsonl", [{"question_id": "a1", "cluster": "Maths", "turns": [{"content": "A?"}]}])
    assert read_questions("arena-hard", file=old) == [Question("a1", ("A?",), "Maths")]
    new = lines(tmp_path / "new.jsonl", [{"uid": "u1", "category": "hard_prompt", "subcategory": "x", "prompt": "A?"}])
    assert read_questions("arena-hard", file=new) == [Question("u1", ("A?",), "hard_prompt")]
    bench = lines(
        tmp_path / "bench.jsonl",
        [
            {"question_id": 81, "category": "writing", "turns": ["A?", "B?"]},
            {"question_id": 111, "category": "math", "turns": ["C?", "D?"], "reference": ["3", "5"]},
        ],
    )
    found = read_questions("mt-bench", file=bench)
    assert found == [Question("81", ("A?", "B?"), "writing"), Question("111", ("C?", "D?"), "math", ("3", "5"))]
    single = lines(tmp_path / "single.jsonl", [{"question_id": 1, "turns": ["A?"], "reference": "forty"}])
    assert read_questions(str(single))[0].references == ("forty",)
    references = lines(tmp_path / "ref.jsonl", [{"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]}])
    assert [q.references for q in read_references(references, found)] == [("a", "b"), ("3", "5")]
    prompts = lines(
        tmp_path / "prompts.jsonl",
        [{"id": "p", "prompt": "A?"}, {"id": "q", "prompt": [{"role": "user", "content": "B?"}], "metadata": {"answer": "4"}}],
    )
    assert [(q.id, q.turns, q.references) for q in read_questions(str(prompts))] == [("p", ("A?",), ()), ("q", ("B?",), ("4",))]


@pytest.mark.parametrize("name", sorted(WHERE))
def test_a_set_that_is_not_here_says_where_it_is_had(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs its file: --set_file PATH. It is .*(hub|GitHub)"):
        read_questions(name)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "turns": ["A?"]}, {"question_id": 1, "turns": ["B?"]}], "questions 1 and 2 have the same id '1'"),
        ([{"question_id": 1, "turns": ["A?"]}, {"other": 1}], r"rows\.jsonl:2 is no question: found `other`"),
        ([{"question_id": 1, "turns": []}], r"rows\.jsonl:1: its turns are a list of 0"),
        ([{"question_id": 1, "turns": [{"text": "A?"}]}], r"rows\.jsonl:1 is no question: KeyError"),
        ([], "has no question"),
    ],
)
def test_questions_that_can_not_be_used(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions(str(lines(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(ValueError, match="no such file; a set is one of instructions"):
        read_questions(str(tmp_path / "none.jsonl"))


GOOD = {
    "tea-lowercase": "heat water to 80 degrees, pour it over the leaves, and wait two minutes.",
    "bread-bullets": "* flour\n* water\n* salt\n* yeast",
    "city-json": '{"name": "Lima", "country": "Peru"}',
    "poem-title": "<<White Night>>\nSnow\nfalls\nand\nstays.",
    "story-end": "He left it on the bus, and it rained again.",
    "two-answers": "The Crust ****** Morning Loaf",
    "second-paragraph": "First one floats.\n\nLater one swims.",
    "three-parts": "Calm.\n***\nBusy.\n***\nDark.",
    "quote-short": '"A good friend listens and stays."',
    "repeat": "What is the capital of Norway? It is Oslo.",
    "lower-short": "call her windy, since she is never still.",
}


def test_our_own_set_can_be_checked() -> None:
    questions = read_questions(BUNDLED)
    assert 30 <= len(questions) <= 40
    assert len({q.turns for q in questions}) == len({q.id for q in questions}) == len(questions)
    by_id = {q.id: q for q in questions}
    judge = InstructionReward()

    def score(question: Question, text: str) -> float | None:
        candidate = Candidate([{"role": "assistant", "content": text}])
        return judge.score(Group(question.id, question.turns[0], [candidate], dict(question.metadata)))[0]

    assert all(score(q, "No, I can't help you, Sir, with that.") is not None for q in questions)
    assert {name: score(by_id[name], text) for name, text in GOOD.items()} == dict.fromkeys(GOOD, 1.0)


class Echo:
    """Answers with what it is asked, and remembers."""

    string_prompts: Rendering = "user_turn"

    def __init__(self, fails_at: int = -1) -> None:
        self.asked: list[tuple[list[dict[str, str]], float]] = []
        self.fails_at = fails_at

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        num_samples: int,
        params: SamplingParams,
        seed: int,
        tools: Any = None,
        refuse: Any = None,
    ) -> list[list[Completion]]:
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        self.asked += [(list(prompt), params.temperature) for prompt in prompts]
        return [[Completion(f" on {prompt[-1]['content']} ", 3, True)] for prompt in prompts]


QUESTIONS = [
    Question("1", ("A?", "B?"), "writing"),
    Question("2", ("C?", "D?"), "math"),
    Question("3", ("E?",), "stem"),
]


def ask(echo: Echo, store: Store, **changes: Any) -> list[Answer]:
    identity = changes.pop("identity", "w")
    answering = replace(Answering(max_new_tokens=9), **changes)
    return answer_questions(QUESTIONS, echo, answering, model="m", identity=identity, store=store, at_a_time=1)


def test_two_turns_and_temperatures_by_category(tmp_path: Path) -> None:
    echo, store = Echo(), Store(tmp_path / "answers")
    found = ask(echo, store)
    assert found == [
        Answer("1", "m", ("on A?", "on B?"), (3, 3)),
        Answer("2", "m", ("on C?", "on D?"), (3, 3)),
        Answer("3", "m", ("on E?",), (3,), "user_turn"),
    ]
    degrees = {talk[-1]["content"]: degree for talk, degree in echo.asked}
    assert degrees == {"A?": 0.7, "B?": 0.7, "C?": 0.0, "D?": 0.0, "E?": 0.1}
    second = next(talk for talk, _ in echo.asked if talk[-1]["content"] == "B?")
    assert [(m["role"], m["content"]) for m in second] == [("user", "A?"), ("assistant", "on A?"), ("user", "B?")]
    # What was answered is not asked again; other weights or another sampling are other answers.
    assert ask(Echo(fails_at=0), store) == found
    for change in ({"identity": "other"}, {"max_new_tokens": 10}, {"temperature": 0.5}):
        other = Echo()
        ask(other, store, **change)
        assert len(other.asked) == 5


def test_parts_of_a_set_have_draws_of_their_own(tmp_path: Path) -> None:
    class Seeded(Echo):
        def generate(
            self,
            prompts: Sequence[Any],
            *,
            num_samples: int,
            params: SamplingParams,
            seed: int,
            tools: Any = None,
            refuse: Any = None,
        ) -> list[list[Completion]]:
            seeds.append(seed)
            return super().generate(prompts, num_samples=num_samples, params=params, seed=seed)

    seeds: list[int] = []
    ask(Seeded(), Store(tmp_path / "a"), temperature=1.0)
    assert len(seeds) == len(set(seeds)) == 5
    first, seeds = seeds, []
    ask(Seeded(), Store(tmp_path / "b"), temperature=1.0)
    assert seeds == first
    seeds = []
    ask(Seeded(), Store(tmp_path / "c"), temperature=1.0, seed=1)
    assert not set(seeds) & set(first)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "answers")
    with pytest.raises(KeyboardInterrupt):
        ask(Echo(fails_at=3), store)
    rest = Echo()
    assert len(ask(rest, store)) == 3
    assert len(rest.asked) == 2


@pytest.mark.parametrize("kept", ["text", ["text"], [1, 2, True], {"text": 1}, ["a", "many", True], []])
def test_a_kept_answer_that_is_none_is_asked_for_again(kept: object, tmp_path: Path) -> None:
    store, found = Store(tmp_path / "answers"), ask(Echo(), Store(tmp_path / "answers"))
    with closing(sqlite3.connect(tmp_path / "answers")) as file:
        for (key,) in file.execute("SELECT key FROM kept").fetchall():
            store.put(key, kept)
    again = Echo()
    assert ask(again, store) == found
    assert len(again.asked) == 5


def test_a_question_that_does_not_fit_is_named(tmp_path: Path) -> None:
    class Small(Echo):
        def generate(self, prompts: Sequence[Any], **more: Any) -> list[list[Completion]]:
            raise PromptError(0, "it is too long")

    with pytest.raises(ValueError, match="question '2': it is too long"):
        ask(Small(), Store(tmp_path / "answers"))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    answers=st.lists(st.tuples(texts, texts), min_size=3, max_size=3),
    form=st.sampled_from(["ncalign", "fastchat", "arena_hard"]),
)
def test_answers_come_back(answers: list[tuple[str, str]], form: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("answers") / "a.jsonl"
    written = [Answer(q.id, "m", both[: len(q.turns)]) for q, both in zip(QUESTIONS, answers, strict=True)]
    write_answers(written, QUESTIONS, path, form=form)
    assert read_answers(path, QUESTIONS) == written


def test_alpaca_eval_answers_are_matched_by_text(tmp_path: Path) -> None:
    questions = [replace(q, turns=q.turns[:1], category="koala") for q in QUESTIONS]
    written = [Answer(q.id, "m", (f"to {q.id}",)) for q in questions]
    write_answers(written, questions, tmp_path / "a.json", form="alpaca_eval")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows[0] == {"instruction": "A?", "output": "to 1", "generator": "m", "dataset": "koala"}
    assert read_answers(tmp_path / "a.json", questions) == written
    rows.append({**rows[0], "output": "again"})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"a\.json:element 4: there are two answers to the question '1'"):
        read_answers(tmp_path / "a.json", questions)
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "A?"}]))
    with pytest.raises(ValueError, match=r"a\.json:element 1 is no answer: .*found `instruction`"):
        read_answers(tmp_path / "a.json", questions)


def test_arena_hard_reads_the_answers(tmp_path: Path) -> None:
    text = "# Title\n## Part\n- one\n1. **two** and __three__\n```\n# code\n```"
    written = [Answer("3", "m", (text,), (7,)), Answer("2", "m", ("a", "b"), (1, 2))]
    write_answers(written, QUESTIONS, tmp_path / "a.jsonl", form="arena_hard")
    one, two = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    # Version 2.0: the judge is shown the last message's answer; style control sums the counts of each kind.
    assert (one["uid"], one["model"]) == ("3", "m")
    assert one["messages"] == [{"role": "user", "content": "E?"}, {"role": "assistant", "content": {"answer": text}}]
    assert list(one["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
    sums = [count if isinstance(count, int) else sum(count.values()) for count in one["metadata"].values()]
    assert sums == [7, 2, 2, 2]
    # Version 0.1: turns with their contents.
    assert (two["question_id"], two["model_id"]) == ("2", "m")
    assert [turn["content"] for turn in two["choices"][0]["turns"]] == ["a", "b"]
    assert [message["role"] for message in two["messages"]] == ["user", "assistant"] * 2
    assert read_answers(tmp_path / "a.jsonl", QUESTIONS) == written


def test_arena_hard_answers_of_its_first_version(tmp_path: Path) -> None:
    turns = [{"content": "x", "token_len": 4}]
    path = lines(
        tmp_path / "a.jsonl",
        [{"question_id": "1", "answer_id": "z", "model_id": "m", "choices": [{"index": 0, "turns": turns}]}],
    )
    assert read_answers(path, QUESTIONS) == [Answer("1", "m", ("x",), (4,))]


def test_the_verb(tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = lines(tmp_path / "p.jsonl", [{"id": str(k), "prompt": f"{k} + 1?"} for k in range(3)])
    words = ["answer", "--set", str(prompts), "--cache_dir", str(tmp_path / "cache"), "--max_new_tokens", "8"]
    assert main([*words, "--model", str(tiny_model_dir), "--output", str(tmp_path / "a.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 3
    found = read_answers(tmp_path / "a.jsonl", read_questions(str(prompts)))
    assert [answer.model for answer in found] == [tiny_model_dir.name] * 3
    double = ServerDouble()
    with serving(double) as url:
        server = ["--server.base_url", url, "--server.model", "far/away"]
        assert main([*words, *server, "--output", str(tmp_path / "b.jsonl"), "--limit", "2"]) == 0
        assert main([*words, *server, "--output", str(tmp_path / "c.jsonl"), "--limit", "2"]) == 0
    assert len(double.requests) == 2
    assert [answer.model for answer in read_answers(tmp_path / "b.jsonl", [])] == ["away"] * 2
    assert main([*words, "--model", "m", *server, "--output", str(tmp_path / "d.jsonl")]) == 2
    assert main(["answer", "--model", "m", "--set", "mt-bench", "--output", str(tmp_path / "d.jsonl")]) == 1
    assert "fastchat/llm_judge" in capsys.readouterr().err
    bench = lines(tmp_path / "bench.jsonl", [{"question_id": 81, "turns": ["A?", "B?"]}])
    words = ["answer", "--model", "m", "--set", str(bench), "--form", "alpaca_eval", "--output", str(tmp_path / "d.json")]
    assert main(words) == 1
    assert "question '81' has 2 turns, and form: alpaca_eval holds one" in capsys.readouterr().err


def test_vllm_gets_the_base_and_the_adapter(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Fake(Echo):
        def __init__(self, model: str, tokenizer: Any, **more: Any) -> None:
            super().__init__()
            made.append((model, more))

        def load_adapter(self, folder: Path) -> None:
            made.append(folder)

    monkeypatch.setattr(answering, "VLLMGenerator", Fake)
    how, store = Answering(max_new_tokens=4, batch_size=2, vllm=True), Store(tmp_path / "answers")
    assert len(answering.answers_of_model(str(tiny_model_dir), QUESTIONS, how, name="m", store=store)) == 3
    adapter = tmp_path / "adapter"
    load_tokenizer(str(tiny_model_dir), trust_remote_code=False).save_pretrained(adapter)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model_dir), "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert len(answering.answers_of_model(str(adapter), QUESTIONS, how, name="m", store=store)) == 3
    assert made == [(str(tiny_model_dir), {}), (str(tiny_model_dir), {"adapter_rank": 4}), adapter]

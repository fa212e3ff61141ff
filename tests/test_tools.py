"""A row's tools reach every model that its prompt is shown to: in training, in sampling, on a server, and as a judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, build_model, build_tokenizer
from ncalign.cli.app import main
from ncalign.data.groups import Group, read_groups
from ncalign.generation.base import SamplingParams
from ncalign.generation.local import TransformersGenerator
from ncalign.judging.judge_prompts import judge_templates, pair_prompts, rating_prompts
from ncalign.judging.records import Answer, Question
from ncalign.model.encoding import EncodedGroup, Encoder
from ncalign.online import probe
from ncalign.online.state import _groups_digest
from ncalign.tasks.lm_backend import BackendGenerator
from server_double import ServerDouble, serving

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TURNS = [{"role": "user", "content": "Oslo?"}]
CANDIDATES = [{"completion": "3", "reward": 1.0}, {"completion": "4", "reward": 0.0}]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Oslo?", "candidates": CANDIDATES, "tools": [TOOL]},
    {"id": "b", "prompt": "Rome?", "candidates": CANDIDATES},
    {"id": "c", "prompt": TURNS, "candidates": CANDIDATES, "tools": [{**TOOL, "strict": True}]},
    {"id": "d", "prompt": "Bonn?", "candidates": CANDIDATES, "tools": []},
]
"""With tools and without, as text and as turns."""
BEGINNINGS = {
    f"<|tools|>{json.dumps([TOOL])}<|im_start|>user\nOslo?": 1,
    "<|im_start|>user\nRome?": 1,
    f"<|tools|>{json.dumps([{**TOOL, 'strict': True}])}<|im_start|>user\nOslo?": 1,
    "<|im_start|>user\nBonn?": 1,
}
"""Of what a model is fed, up to the question's end."""
WRITES = "{% if tools is not none %}{{ '<|tools|>' + (tools | tojson) }}{% endif %}"
ONLINE = [
    *(
        "--reward",
        "rewards.py:place",
        "--num_samples",
        "2",
        "--max_new_tokens",
        "4",
        "--max_steps",
        "2",
        "--regenerate_at",
        "[]",
    ),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_length", "400"),
    *("--regenerate_at", "[]", "--eval_fraction", "0", "--report_to", "none", "--dtype", "float32"),
]
"""One round in which every row is sampled from and trained on once."""


@pytest.fixture(scope="module")
def writing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that writes tools; an empty list of them would be written too."""
    folder, tokenizer = tmp_path_factory.mktemp("writing"), build_tokenizer()
    tokenizer.chat_template = WRITES + CHATML
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The rows as a file, in a folder with a reward."""
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text("def place(prompt, completions):\n    return list(range(len(completions)))\n")
    return str(write_jsonl(ROWS))


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, list[str]]:
    """The prompts that are sampled from, and those that are trained on, as text up to the question's end."""
    found: dict[str, list[str]] = {"sampled": [], "encoded": []}
    sample, encode = TransformersGenerator._sample, Encoder.encode

    def beginning(ids: Any) -> str:
        return str(tiny_tokenizer.decode(ids)).split("<|im_end|>")[0]

    def watched_sample(self: TransformersGenerator, prompts: list[list[int]], *arguments: Any) -> Any:
        found["sampled"] += map(beginning, prompts)
        return sample(self, prompts, *arguments)

    def watched_encode(self: Encoder, group: Group) -> EncodedGroup:
        encoded = encode(self, group)
        found["encoded"].append(beginning(encoded.prompt))
        return encoded

    monkeypatch.setattr(TransformersGenerator, "_sample", watched_sample)
    monkeypatch.setattr(Encoder, "encode", watched_encode)
    return found


def test_train_and_check_render_them(rows: str, writing_model: Path, fed: dict[str, list[str]]) -> None:
    words = ["--model", str(writing_model), "--max_length", "400"]
    assert main(["check", rows, *words]) == 0
    assert set(fed["encoded"]) == {*BEGINNINGS}
    fed["encoded"].clear()
    assert main(["train", *words, "--data", rows, "--output_dir", "run", "--dry_run"]) == 0
    assert set(fed["encoded"]) == {*BEGINNINGS}


def test_generate_renders_them_and_keeps_them(rows: str, writing_model: Path, fed: dict[str, list[str]]) -> None:
    words = ["--num_samples", "2", "--max_new_tokens", "4", "--temperature", "0.5"]
    assert main(["generate", "--model", str(writing_model), "--prompts", rows, "--output", "out.jsonl", *words]) == 0
    assert sorted(fed["sampled"]) == sorted(BEGINNINGS)
    assert {group.id: bool(group.tools) for group in read_groups("out.jsonl")} == {"a": True, "b": False, "c": True, "d": False}


def test_online_samples_and_trains_with_the_same(rows: str, writing_model: Path, fed: dict[str, list[str]]) -> None:
    words = ["online", "--model", str(writing_model), "--data", rows, "--output_dir", "run"]
    assert main([*words, *ONLINE]) == 0
    assert set(fed["sampled"]) == set(fed["encoded"]) == {*BEGINNINGS}


def test_answer_gives_them_to_the_model(rows: str, writing_model: Path, fed: dict[str, list[str]]) -> None:
    words = ["--set_name", rows, "--max_new_tokens", "4", "--cache_dir", "cache"]
    assert main(["answer", "--model", str(writing_model), *words, "--output", "out.jsonl"]) == 0
    assert sorted(fed["sampled"]) == sorted(BEGINNINGS)
    # Kept by what was asked: the same question with other tools is another.
    rest = [row for row in ROWS if row["id"] in ("a", "b")]
    Path("more.jsonl").write_text("".join(json.dumps({**row, "tools": [{**TOOL, "n": 1}]}) + "\n" for row in rest))
    assert main(["answer", "--model", str(writing_model), *words, "--output", "2.jsonl", "--set_name", "more.jsonl"]) == 0
    assert len(fed["sampled"]) == len(ROWS) + 2


def test_a_template_without_them_is_named_by_every_verb(
    rows: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, notice = ["--model", str(tiny_model_dir)], "the chat template leaves out `tools` (2 groups)"
    short = ["--max_new_tokens", "2"]
    for words in (
        ["check", rows, *model, "--max_length", "400"],
        ["train", *model, "--data", rows, "--output_dir", "run", "--max_length", "400", "--dry_run"],
        ["generate", *model, "--prompts", rows, "--output", "out.jsonl", *short, "--num_samples", "2"],
        ["online", *model, "--data", rows, "--output_dir", "online", *ONLINE],
        ["answer", *model, "--set_name", rows, "--output", "answers.jsonl", *short, "--cache_dir", "cache"],
    ):
        assert main(words) == 0
        printed = capsys.readouterr()
        assert (printed.out + printed.err).count(notice) == 1, words


# --- Servers ----------------------------------------------------------------------------------------------------------


def asked(double: ServerDouble) -> dict[str, Any]:
    """What requests say of ``tool_choice``, by their messages and tools."""
    return {json.dumps([body["messages"], body.get("tools")]): body.get("tool_choice") for _, body in double.requests}


SENT = {
    json.dumps([TURNS, [TOOL]]): "none",
    json.dumps([[{"role": "user", "content": "Rome?"}], None]): None,
    json.dumps([TURNS, [{**TOOL, "strict": True}]]): "none",
    json.dumps([[{"role": "user", "content": "Bonn?"}], None]): None,
}


@pytest.mark.parametrize("verb", ["generate", "answer", "online"])
def test_a_server_is_sent_them_and_asked_for_text(
    verb: str, rows: str, writing_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    double = ServerDouble()
    with serving(double) as url:
        server = ["--server.base_url", url, "--server.model", "m"]
        words = {
            "generate": ["--prompts", rows, "--output", "out.jsonl", "--num_samples", "2", *server],
            "answer": ["--set_name", rows, "--output", "out.jsonl", "--cache_dir", "cache", *server],
            "online": [
                *("--model", str(writing_model), "--data", rows, "--output_dir", "run", *ONLINE, *server),
                *("--generator", "server", "--push", "none", "--probe_tolerance", "none", "--chunk_size", "1"),
            ],
        }
        assert main([verb, *words[verb]]) == 0
    assert asked(double) == SENT
    assert capsys.readouterr().err.count("prompts have `tools`: the server is sent them") == 1


def test_a_server_that_takes_none_is_not_asked_without(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    double = ServerDouble()
    refusal = (400, b'{"error": {"message": "unsupported", "param": "tools"}}')
    double.fault_of = lambda body: refusal if "tools" in body else None
    with serving(double) as url:
        words = ["generate", "--prompts", rows, "--output", "out.jsonl", "--server.base_url", url, "--server.model", "m"]
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "group 'a'" in said
        assert "`tools` were sent with tool_choice none: leave them out" in said
        assert main([*words, "--on_bad_row", "skip"]) == 0
    assert [group.id for group in read_groups("out.jsonl")] == ["b", "d"]


def test_text_is_completed_without_them_and_that_is_said(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    double = ServerDouble()
    with serving(double) as url:
        words = ["generate", "--prompts", rows, "--output", "out.jsonl", "--server.base_url", url, "--server.model", "m"]
        assert main([*words, "--string_prompts", "raw"]) == 0
    assert not [body for _, body in double.requests if "prompt" in body and ("tools" in body or "tool_choice" in body)]
    assert "`tools` of 1 prompts that are plain text are not sent to the server" in capsys.readouterr().err


def test_the_probe_asks_prompts_with_tools_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def answers(groups: list[Group], *arguments: Any, **more: Any) -> list[Any]:
        seen.extend(group.id for group in groups)
        return [[] for _ in groups]

    monkeypatch.setattr(probe, "answers", answers)
    groups = [Group(str(n), "Q", [], {"tools": [TOOL]} if n > 6 else {}) for n in range(9)]
    training = SimpleNamespace(seed=0)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(probe_tolerance=0.1, training=training),
        generator=SimpleNamespace(sampling=nullcontext, each=lambda: {"generator": None}),
        engine=SimpleNamespace(logprobs=lambda groups: []),
        say=lambda text: None,
    )
    probe.check_same_weights(run, groups, 0)
    assert seen == ["7", "8", "0", "1"]


# --- Others -----------------------------------------------------------------------------------------------------------


def test_a_judge_reads_them_before_the_question(rows: str) -> None:
    double = ServerDouble(lambda body, number: "[[7]]")
    with serving(double) as url:
        words = ["score", "--data", rows, "--output", "out.jsonl", "--reward", "judge"]
        assert main([*words, "--judge.base_url", url, "--judge.model", "m"]) == 0
    shown = [body["messages"][0]["content"] for _, body in double.requests]
    assert sum(f"Tools: {json.dumps([TOOL])}\n\nOslo?" in text for text in shown) == 2
    assert sum("Tools: " in text for text in shown) == 4


def test_a_judge_of_answers_reads_them_too() -> None:
    question = Question("q", ("Oslo?",), metadata={"tools": [TOOL]})
    answers = {"q": Answer("q", "m", ("3",))}
    first, *_ = pair_prompts("{question}|", [question], answers, answers)
    [(_, _, rating)] = rating_prompts(judge_templates("rating", None), [question], answers)
    assert first == f"Tools: {json.dumps([TOOL])}\n\nOslo?|"
    assert f"Tools: {json.dumps([TOOL])}\n\nUser: Oslo?" in rating


def test_models_of_lm_eval_refuse_them_by_name() -> None:
    generator = BackendGenerator(None)
    with pytest.raises(ValueError, match="prompt 2 has `tools`, which lm-eval's models are not given"):
        generator.generate(["a", "b"], num_samples=1, params=SamplingParams(4), seed=0, tools=[None, [TOOL]])


def test_a_run_is_of_its_prompts_tools() -> None:
    def digest(**metadata: Any) -> str:
        return _groups_digest([Group("a", "Q", [], metadata)])

    assert digest(tools=[TOOL]) == digest(tools=[TOOL])
    assert len({digest(), digest(tools=[]), digest(tools=[TOOL])}) == 3

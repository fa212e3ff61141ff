"""Well-formed answers and refusals of other servers: no text, fields that are not taken, reasons in every shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group
from ncalign.generation.base import SamplingParams
from ncalign.generation.client import Server
from ncalign.generation.config import GenerateConfig, ServerConfig
from ncalign.generation.failures import ServerError
from ncalign.generation.generate import run_generate
from ncalign.generation.questions import Request
from ncalign.generation.refusals import reason_of, refused_field
from ncalign.generation.remote import ServerGenerator
from ncalign.generation.wire import Choice
from ncalign.rewards.config import JudgeConfig
from ncalign.rewards.judge import JudgeReward
from server_double import ServerDouble, serving

GROUP = Group(id="g", prompt="Say.", candidates=[Candidate("a"), Candidate("b")])


def config(url: str, **changes: Any) -> ServerConfig:
    return ServerConfig.model_validate({"base_url": url, "model": "m", "max_retries": 1, **changes})


def body(content: object, finish: str | None = "stop", **message: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content, **message}, "finish_reason": finish}]}).encode()


def asked(answer: bytes) -> list[Choice] | ServerError:
    double = ServerDouble(faults=lambda number: answer)
    with serving(double) as url:
        [found] = Server(config(url, max_retries=0)).ask([Request("chat", {"messages": []})])
    return found


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        (body(None, "length", reasoning_content="Let me see"), Choice("", False)),
        (body("", "length", reasoning="Let me see"), Choice("", False)),
        (body("half", "max_tokens"), Choice("half", False)),
        (body("half", "MAX_TOKENS"), Choice("half", False)),
        (body("half", "model_length"), Choice("half", False)),
        (body(None, "stop"), Choice("", True)),
        (body(None, "tool_calls", tool_calls=[{"id": "1"}]), Choice("", True)),
        (body(None, "stop", refusal="I won't."), Choice("I won't.", True)),
        (body(None, "content_filter"), Choice("", False, withheld=True)),
        (body("ha", "content_filter"), Choice("ha", False, withheld=True)),
        (body([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), Choice("ab", True)),
        (body([{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "b"}]), Choice("b", True)),
    ],
)
def test_answers_without_text_or_in_parts_are_answers(answer: bytes, choice: Choice) -> None:
    assert asked(answer) == [choice]


@pytest.mark.parametrize("finish", ["error", "abort"])
def test_an_answer_that_the_server_broke_off_is_asked_for_again(finish: str) -> None:
    found = asked(body("half", finish))
    assert isinstance(found, ServerError)
    assert f"finish_reason {finish}" in str(found)


def test_an_error_with_a_good_status_says_its_reason() -> None:
    found = asked(b'{"error": {"message": "Provider returned error", "metadata": {"raw": "out of stock"}}}')
    assert "Provider returned error; out of stock" in str(found)


def judge(url: str, store: Store | None = None, **changes: Any) -> JudgeReward:
    return JudgeReward(JudgeConfig.model_validate({"base_url": url, "max_retries": 8, **changes}), store)


@pytest.mark.parametrize(
    "answer",
    [
        body(None, "length", reasoning_content="Let me see"),
        body("", "length", thinking="Let me see"),
        body("<think>Let me see", "length"),
        body("The first is", "length"),
    ],
)
def test_a_judge_that_spends_its_tokens_is_told_to_raise_them(answer: bytes) -> None:
    double = ServerDouble(faults=lambda number: answer)
    with serving(double) as url, pytest.raises(ValueError, match=r"cut at judge\.max_tokens \(512\).*raise judge\.max_tokens"):
        judge(url).score(GROUP)
    assert len(double.requests) == 2


def test_a_judge_that_spends_its_tokens_now_and_then_costs_one_candidate() -> None:
    double = ServerDouble(lambda body, number: "[[7]]")
    double.fault_of = lambda asked: body(None, "length") if "\nb\n" in asked["messages"][0]["content"] else None
    with serving(double) as url:
        source = judge(url)
        assert source.score(GROUP) == [7.0, None]
    assert source.account.missing == {"cut at max_tokens before a verdict": 1}
    assert "raise judge.max_tokens: 1 verdicts were cut" in source.account.text()
    assert len(double.requests) == 1 + 3


@pytest.mark.parametrize("answer", [body(None, "stop"), body(None, "stop", refusal="No."), body(None, "tool_calls")])
def test_a_judge_without_words_is_asked_as_often_as_one_without_a_verdict(answer: bytes) -> None:
    double = ServerDouble(faults=lambda number: answer)
    with serving(double) as url:
        source = judge(url, attempts=3)
        assert source.score(GROUP) == [None, None]
    assert (len(double.requests), source.account.missing) == (2 * 3, {"unreadable": 2})


def test_generation_that_spends_its_tokens_is_told_to_raise_them(tmp_path: Path, write_jsonl: Any) -> None:
    prompts = write_jsonl([{"id": "1", "prompt": "q"}], "prompts.jsonl")
    double = ServerDouble(faults=lambda number: body(None, "length", reasoning="hm"))
    with serving(double) as url, pytest.raises(ValueError, match=r"only empty.*raise --max_new_tokens \(now 256\).*thoughts"):
        run_generate(GenerateConfig(prompts=prompts, output=tmp_path / "o.jsonl", num_samples=1, server=config(url)))
    assert len(double.requests) == 1


# --- Fields that a server does not take -------------------------------------------------------------------------------


def openai(name: str, said: str = "Unsupported parameter") -> dict[str, Any]:
    return {
        "error": {"message": f"{said}: '{name}' is not supported with this model.", "param": name, "code": "unsupported_value"}
    }


REFUSALS = {
    "openai": openai,
    "azure": lambda name: {
        "error": {"message": f"Unrecognized request argument supplied: {name}", "param": None, "code": None}
    },
    "litellm": lambda name: {
        "error": {"message": f"openai does not support parameters: ['{name}'], for model=o3", "code": "400"}
    },
    "fastapi": lambda name: {
        "detail": [{"loc": ["body", name], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}]
    },
    "mistral": lambda name: {"message": {"detail": [{"loc": ["body", name], "msg": "extra fields not permitted"}]}},
    "vllm": lambda name: {
        "object": "error",
        "message": f"[{{'type': 'extra_forbidden', 'loc': ('body', '{name}'), 'msg': 'Extra inputs are not permitted'}}]",
    },
    "text": lambda name: {"error": f"the field `{name}` is not supported", "error_type": "validation"},
    "detail": lambda name: {"detail": f"Unknown field: '{name}'"},
    "gemini": lambda name: [
        {"error": {"code": 400, "message": f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.'}}
    ],
    "proxy": lambda name: {"error": {"message": "Provider returned error", "metadata": {"raw": json.dumps(openai(name))}}},
    "plain": lambda name: f"{name}: Extra inputs are not permitted",
}


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("shape", REFUSALS)
def test_fields_that_are_not_taken_are_renamed_or_left_out(
    shape: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no = ("max_tokens", "temperature", "seed")
    double = ServerDouble(lambda body, number: "[[7]]")
    double.fault_of = lambda body: next(((status, REFUSALS[shape](name)) for name in no if name in body), None)
    with serving(double) as url:
        source = judge(url, Store(tmp_path / "verdicts"), max_concurrency=1)
        assert source.score(GROUP) == [7.0, 7.0]
        assert source.account.server_fields == {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
        # Three refusals, and what follows is asked as the server takes it; a later run knows.
        assert len(double.requests) == 3 + 2
        assert double.requests[-1][1].keys() == {"messages", "model", "max_completion_tokens"}
        said = capsys.readouterr().err
        assert said.count("does not take temperature") == said.count("does not take max_tokens") == 1
        again = judge(url, Store(tmp_path / "verdicts"))
        assert again.score(Group(id="h", prompt="Say.", candidates=[Candidate("c")])) == [7.0]
        assert len(double.requests) == 6
    assert "sent as max_completion_tokens" in capsys.readouterr().err


def test_a_pool_that_is_not_sampled_as_asked_is_said_clearly(capsys: pytest.CaptureFixture[str]) -> None:
    double = ServerDouble()
    no = ("temperature", "n", "logprobs", "top_k")
    double.fault_of = lambda body: next(((400, openai(name)) for name in no if name in body), None)
    with serving(double) as url:
        generator = ServerGenerator(config(url), progress=False)
        [found] = generator.generate(["q"], num_samples=3, params=SamplingParams(9, temperature=0.7, top_k=5), seed=1)
    assert len({one.text for one in found}) == 3
    said = capsys.readouterr().err
    assert "warning: the server does not take temperature: it is left out, so answers are sampled at the server's own" in said
    assert "note: the server does not take n: it is left out, so several answers are asked for one at a time" in said
    assert generator.record() == {"server_fields": dict.fromkeys(("temperature", "n", "logprobs", "top_k"))}


BODY = {"messages": [], "max_tokens": 9, "temperature": 0.7, "top_p": 1.0, "n": 2, "seed": 1, "logprobs": True}


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ("temperature and top_p cannot both be specified for this model. Please use only one.", "top_p"),
        ("`top_p` must be > 0.0 and < 1.0", "top_p"),
        ("`n` must be 1", "n"),
        ("Please remove 'logprobs'/'top_logprobs', this device does not support logprobs", "logprobs"),
        ("`temperature` is deprecated for this model.", "temperature"),
        ("Logprobs is not supported for this model", "logprobs"),
        ("This model's maximum context length is 4096 tokens, and max_tokens is 9: not supported", None),
        ("max_tokens is too large: 9. This model supports at most 4 completion tokens", None),
        ("temperature must be between 0 and 0.5", None),
        ("messages are not supported", None),
        ("The model is not available", None),
        ("Your plan does not support this model", None),
    ],
)
def test_what_is_refused(said: str, field: str | None) -> None:
    assert refused_field(json.dumps({"error": {"message": said}}), BODY, ()) == field
    assert refused_field(said, BODY, ()) == field


def test_what_a_request_needs_is_not_left_out() -> None:
    double = ServerDouble()
    double.fault_of = lambda body: (400, openai("logprobs")) if "logprobs" in body else None
    with serving(double) as url:
        request = Request("chat", {"messages": [], "logprobs": True}, needed=frozenset({"logprobs"}))
        [found] = Server(config(url)).ask([request])
    assert isinstance(found, ServerError)
    assert found.refused
    assert "status 400: Unsupported parameter: 'logprobs'" in str(found)


def test_a_refusal_that_names_what_is_not_sent_is_an_error() -> None:
    double = ServerDouble(faults=lambda number: (400, openai("temperature")))
    with serving(double) as url:
        server = Server(config(url))
        [found] = server.ask([Request("chat", {"messages": [], "temperature": 0.0})])
    assert isinstance(found, ServerError)
    assert (len(double.requests), server.changes) == (2, {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"error": {"message": "no"}}', "no"),
        ('{"error": "no"}', "no"),
        ('{"detail": "no"}', "no"),
        (
            '{"detail": [{"loc": ["body", "n"], "msg": "no"}, {"loc": ["body"], "msg": "nor this"}]}',
            "body.n: no; body: nor this",
        ),
        ('{"message": "no"}', "no"),
        ('{"errors": [{"message": "no"}, "nor this"]}', "no; nor this"),
        ("<html><head><style>b{}</style></head><body><h1>502</h1> Bad Gateway</body></html>", "502 Bad Gateway"),
        ("no\x1b[2J\nway", "no [2J way"),
        ("[" * 100_000, "[" * 300 + "…"),
        ("", ""),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    assert reason_of(text) == reason

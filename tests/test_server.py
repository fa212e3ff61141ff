"""The client of OpenAI-compatible servers, against a double that fails in every way, and the generator on it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import CHATML
from ncalign.cli.app import main
from ncalign.core.store import Store
from ncalign.data.groups import read_groups
from ncalign.generation.base import PromptError, SamplingParams
from ncalign.generation.client import Server
from ncalign.generation.config import ServerConfig
from ncalign.generation.failures import ServerError
from ncalign.generation.questions import Request
from ncalign.generation.remote import ServerGenerator
from ncalign.generation.token_prompts import TokenPrompts
from ncalign.generation.wire import Choice
from server_double import ServerDouble, serving

KEY = "sk-test-0123456789abcdef"
pytestmark = pytest.mark.usefixtures("no_pauses")
FAULTS = ("drop", "half", "few", "many", "null", 429, 500, 503)


def chat(text: str, *, n: int = 1) -> Request:
    return Request("chat", {"messages": [{"role": "user", "content": text}], "seed": 5}, n)


def config(url: str, **changes: Any) -> ServerConfig:
    return ServerConfig.model_validate({"base_url": url, "model": "m", **changes})


def test_answers_come_in_order_and_are_counted() -> None:
    double = ServerDouble()
    with serving(double) as url:
        server = Server(config(url))
        found = server.ask([chat(f"q{i}", n=2) for i in range(20)])
    assert [[choice.text for choice in one] for one in found] == [
        [f"answer {k} of 5 to q{i}" for k in (0, 1)] for i in range(20)
    ]
    assert (server.usage.requests, server.usage.prompt_tokens, server.usage.completion_tokens) == (20, 140, 120)
    assert {path for path, _ in double.requests} == {"/v1/chat/completions"}
    assert {body["model"] for _, body in double.requests} == {"m"}


def test_every_fault_is_survived_and_nothing_kept_is_asked_again(tmp_path: Path) -> None:
    chance = random.Random(0)
    plan = [chance.choice([*FAULTS, None, None]) for _ in range(2000)]
    double = ServerDouble(faults=lambda number: plan[number])
    requests = [chat(f"q{i}", n=3) for i in range(40)]
    with serving(double) as url:
        store = Store(tmp_path / "answers")
        server = Server(config(url, max_retries=50), store)
        found = server.ask(requests)
        assert all(isinstance(one, list) and len(one) == 3 for one in found)
        assert all(choice.text.endswith(f"to q{i}") for i, one in enumerate(found) for choice in one)
        assert server.usage.malformed > 0
        asked = len(double.requests)
        again = Server(config(url, max_retries=50), Store(tmp_path / "answers"))
        assert again.ask(requests) == found
        assert len(double.requests) == asked
        assert again.usage.remembered == 40
        # One more of each: only that is asked for.
        more = again.ask([chat(f"q{i}", n=4) for i in range(40)])
        assert [one[:3] for one in more] == found
        assert all(body.get("n", 1) == 1 for _, body in double.requests[asked:])


def test_answers_of_a_top_up_are_others() -> None:
    double = ServerDouble(faults=lambda number: "few" if number < 2 else None)
    with serving(double) as url:
        [found] = Server(config(url)).ask([chat("q", n=4)])
    assert len({choice.text for choice in found}) == 4
    assert [body.get("n", 1) for _, body in double.requests] == [4, 3, 2]


def test_a_slow_server_is_asked_again() -> None:
    double = ServerDouble(faults=lambda number: "slow" if number == 0 else None)
    with serving(double) as url:
        [found] = Server(config(url, timeout_seconds=0.3)).ask([chat("q")])
    assert isinstance(found, list)
    assert len(double.requests) == 2


def test_a_server_that_trickles_is_held_to_the_deadline() -> None:
    # Each byte comes in time; the whole would take many times timeout_seconds.
    double = ServerDouble(faults=lambda number: "trickle" if number == 0 else None)
    with serving(double) as url:
        started = time.monotonic()
        [found] = Server(config(url, timeout_seconds=0.5)).ask([chat("q")])
        assert time.monotonic() - started < 4
        assert isinstance(found, list)
        double.faults = lambda number: "trickle"
        [found] = Server(config(url, timeout_seconds=0.3, max_retries=1)).ask([chat("q")])
    assert isinstance(found, ServerError)
    assert "timed out" in str(found)
    assert not found.refused


def answer(**changes: Any) -> dict[str, Any]:
    choice = {"message": {"content": "fine"}, "finish_reason": "stop", **changes.pop("choice", {})}
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}, **changes}


def logprobs(value: object, token: object = "a") -> dict[str, Any]:
    return {"choice": {"logprobs": {"content": [{"token": token, "logprob": value, "top_logprobs": []}]}}}


MALFORMED = [
    answer(choices=None),
    answer(choices={"a": 1}),
    answer(choices=[]),
    answer(choices=[None]),
    answer(choice={"message": {"content": 7}}),
    answer(choice={"message": {"content": "\ud800"}}),
    answer(choice={"finish_reason": ["stop"]}),
    answer(choice={"logprobs": [1]}),
    answer(**logprobs(float("nan"))),
    answer(**logprobs(float("-inf"))),
    answer(**logprobs(1000.0)),
    answer(**logprobs(-1e308)),
    answer(**logprobs(None)),
    answer(**logprobs(-1.0, token=None)),
    answer(
        choice={"logprobs": {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": [{"token": "b", "logprob": 3.0}]}]}}
    ),
    [1],
    None,
]


@pytest.mark.parametrize(
    "body", [*(json.dumps(one) for one in MALFORMED), "", "<html>", "[" * 200_000, json.dumps(answer())[:60]]
)
def test_a_malformed_answer_is_asked_for_again_then_missing_and_never_kept(body: str, tmp_path: Path) -> None:
    double = ServerDouble(faults=lambda number: body.encode() if number in (0, 2, 3) else None)
    with serving(double) as url:
        server = Server(config(url, max_retries=1), Store(tmp_path / "answers"))
        [found] = server.ask([chat("q")])
        assert found == [Choice(f"answer 0 of {5 + 7919} to q", True, 3)]
        [found] = server.ask([chat("other")])
        assert isinstance(found, ServerError)
        assert "no usable answer 2 times" in str(found)
        assert (server.usage.malformed, len(double.requests)) == (3, 4)
        again = Server(config(url, max_retries=50), Store(tmp_path / "answers"))
        assert [isinstance(one, list) for one in again.ask([chat("q"), chat("other")])] == [True, True]
        assert len(double.requests) == 5


def test_what_other_servers_leave_out_or_add_is_no_fault() -> None:
    bodies = [
        {
            "choices": [{"message": {"content": "a", "tool_calls": None}, "logprobs": None, "finish_reason": "eos"}],
            "usage": None,
        },
        answer(choice={"logprobs": {"content": [{"token": "a", "logprob": 1e-6}]}}, extra=float("nan")),
        {"choices": [{"text": "a", "logprobs": {"token_logprobs": [None, -1.0], "tokens": ["x", "y"]}}]},
        {"choices": [{"text": "a", "logprobs": {"content": [{"token": "a", "logprob": -2.0, "top_logprobs": []}]}}]},
    ]
    kinds: list[Any] = ["chat", "chat", "completions", "completions"]
    double = ServerDouble(faults=lambda number: json.dumps(bodies[number]).encode())
    with serving(double) as url:
        server = Server(config(url, max_concurrency=1))
        found = server.ask([Request(kind, {"prompt": str(i)}) for i, kind in enumerate(kinds)])
    assert [one[0] if isinstance(one, list) else one for one in found] == [
        Choice("a", True),
        Choice("fine", True, 1, 1e-6),
        Choice("a", True, 2, -1.0),
        Choice("a", True, 1, -2.0),
    ]


def test_answers_kept_by_earlier_versions_are_found(tmp_path: Path) -> None:
    store, url = Store(tmp_path / "answers"), "http://127.0.0.1:9/v1"
    body = {"messages": [{"role": "user", "content": "q"}], "seed": 5}
    kept = {"text": "yes", "finished": True, "num_tokens": 1, "logprob": -0.5, "top": [{"yes": -0.5, "no": -1.0}]}
    key = Store.key(url, "m", "", "chat", body)
    assert key == Store.key("http://127.0.0.1:9/v1", "m", "", "chat", dict(chat("q").body))
    store.put(key, [kept])
    assert Server(config(url), store).ask([chat("q")]) == [[Choice("yes", True, 1, -0.5, ({"yes": -0.5, "no": -1.0},))]]
    # One that would never be kept now is asked for again.
    store.put(key, [{**kept, "top": [{"yes": 1000.0}]}])
    [found] = Server(config(url, max_retries=0), store).ask([chat("q")])
    assert isinstance(found, ServerError)


def test_ctrl_c_cancels_what_is_under_way_and_keeps_what_is_done(tmp_path: Path) -> None:
    double = ServerDouble(faults=lambda number: None if number < 6 else "slow")
    double.slow_seconds = 60.0

    def interrupt() -> None:
        while len(double.requests) < 8:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with serving(double) as url:
        threading.Thread(target=interrupt, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            Server(config(url, max_concurrency=2), Store(tmp_path / "answers")).ask([chat(f"q{i}") for i in range(50)])
        assert time.monotonic() - started < 30
        double.faults = lambda number: None
        again = Server(config(url, max_retries=50), Store(tmp_path / "answers"))
        assert all(isinstance(one, list) for one in again.ask([chat(f"q{i}") for i in range(50)]))
    assert again.usage.remembered == 6


def test_a_caller_may_have_a_running_loop_or_be_a_thread() -> None:
    async def notebook(server: Server) -> Any:
        return server.ask([chat("q")])

    with serving(ServerDouble()) as url, ThreadPoolExecutor(1) as pool:
        server = Server(config(url))
        [[expected]] = server.ask([chat("q")])
        assert asyncio.run(notebook(server)) == [[expected]]
        assert pool.submit(server.ask, [chat("q")]).result() == [[expected]]


def test_what_fails_for_good_is_said_for_each_and_the_rest_is_kept(tmp_path: Path) -> None:
    double = ServerDouble()
    plain = double.choices
    double.choices = lambda path, body, n: [] if "q3" in str(body) else plain(path, body, n)  # type: ignore[method-assign]
    with serving(double) as url:
        found = Server(config(url, max_retries=2), Store(tmp_path / "answers")).ask([chat(f"q{i}") for i in range(6)])
    assert [isinstance(one, ServerError) for one in found] == [i == 3 for i in range(6)]
    assert "no usable answer 3 times" in str(found[3])


@pytest.mark.parametrize("status", [401, 429, 500, "drop"])
def test_a_server_that_is_down_is_not_asked_everything(status: str | int, tmp_path: Path) -> None:
    up = 20
    double = ServerDouble(faults=lambda number: status if number >= up else None)
    with serving(double) as url:
        store = Store(tmp_path / "answers")
        server = Server(config(url, max_retries=0, max_concurrency=2), store)
        told: list[int] = []
        found = server.ask([chat(f"q{i}") for i in range(200)], done=told.append)
        failed = [one for one in found if isinstance(one, ServerError)]
        assert len(failed) == 200 - up
        assert not any(one.refused for one in failed)
        assert "not asked, since 4 requests in a row had no answer" in str(failed[-1])
        assert "not asked" not in str(failed[0])
        assert sorted(told) == list(range(200))
        # Four in a row, and what was under way meanwhile.
        assert len(double.requests) < up + 40
        double.faults = lambda number: None
        before = len(double.requests)
        assert not any(isinstance(one, ServerError) for one in server.ask([chat(f"q{i}") for i in range(200)]))
    assert len(double.requests) - before == 200 - up


def test_requests_that_are_refused_say_nothing_of_others() -> None:
    double = ServerDouble()
    double.fault_of = lambda body: 400 if int(body["messages"][0]["content"][1:]) < 60 else None
    with serving(double) as url:
        found = Server(config(url, max_concurrency=2)).ask([chat(f"q{i}") for i in range(70)])
    assert [isinstance(one, ServerError) and one.refused for one in found] == [True] * 60 + [False] * 10
    assert all(isinstance(one, list) for one in found[60:])
    assert len(double.requests) == 70


def test_no_more_are_under_way_than_asked_for() -> None:
    double = ServerDouble()
    double.delay = 0.02
    with serving(double) as url:
        Server(config(url, max_concurrency=3)).ask([chat(f"q{i}") for i in range(12)])
    assert 1 < double.most_under_way <= 3


def test_requests_a_minute() -> None:
    double = ServerDouble()
    with serving(double) as url:
        started = time.monotonic()
        Server(config(url, requests_per_minute=1200)).ask([chat(f"q{i}") for i in range(9)])
    # Eight pauses of 50 ms: slower machines only take longer.
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize("fault", [401, 400, 404, "half"])
def test_the_key_is_sent_and_never_shown(
    fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    double = ServerDouble(answer=lambda body, number: f"{KEY} " * 3, faults=lambda number: fault)
    with serving(double) as url:
        [found] = Server(config(url, api_key_env="TEST_KEY", max_retries=1), Store(tmp_path / "answers")).ask([chat("q")])
    assert isinstance(found, ServerError)
    assert double.keys[0] == f"Bearer {KEY}"
    shown = str(found) + repr(found) + "".join(capfd.readouterr())
    assert KEY not in shown
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_SUCH_KEY is not set"):
        Server(config("http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY"))


def test_nobody_listens() -> None:
    [found] = Server(config("http://127.0.0.1:9/v1", max_retries=1)).ask([chat("q")])
    assert isinstance(found, ServerError)
    assert "Connection error" in str(found)


# --- Generation -------------------------------------------------------------------------------------------------------


def test_strings_are_completed_and_conversations_answered() -> None:
    double = ServerDouble()
    with serving(double) as url:
        generator = ServerGenerator(config(url), string_prompts="raw", progress=False)
        params = SamplingParams(9, temperature=0.7, top_p=0.9, top_k=5)
        found = generator.generate(["say", [{"role": "user", "content": "reply"}]], num_samples=2, params=params, seed=3)
    assert [[completion.text for completion in one] for one in found] == [
        ["answer 0 of 3 to say", "answer 1 of 3 to say"],
        ["answer 0 of 5 to reply", "answer 1 of 5 to reply"],
    ]
    assert all(one.num_tokens == 6 and one.logprob == -3.0 and one.finished for row in found for one in row)
    bodies = {path: body for path, body in double.requests}
    assert bodies["/v1/completions"]["prompt"] == "say"
    for body in bodies.values():
        assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"], body["n"]) == (9, 0.7, 0.9, 5, 2)


def test_prompts_go_as_tokens_and_tokens_come_back(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    double, sent = ServerDouble(), [[*range(5, 9), 3], [7, 400], None]
    plain = double.choices
    double.choices = lambda path, body, n: [  # type: ignore[method-assign]
        {**choice, "token_ids": sent[0]} for choice in plain(path, body, n)
    ]
    talk = [{"role": "user", "content": "reply"}]
    tokens = TokenPrompts(tiny_tokenizer, string_prompts="raw", vocabulary=384)
    asked = {"num_samples": 2, "params": SamplingParams(9), "seed": 3}
    with serving(double) as url:
        generator = ServerGenerator(config(url), tokens=tokens, progress=False)
        found = generator.generate(["say", talk], tools=[None, [{"name": "weather"}]], **asked)  # type: ignore[arg-type]
        assert {one.token_ids for row in found for one in row} == {(5, 6, 7, 8, 3)}
        assert {one.text for row in found for one in row} == {tiny_tokenizer.decode([5, 6, 7, 8])}
        first, second = (body for _, body in sorted(double.requests, key=lambda one: int(one[1]["seed"])))
        assert [first["prompt"], first["seed"], second["seed"]] == [tiny_tokenizer("say")["input_ids"], 3, 5]
        assert tiny_tokenizer.decode(second["prompt"]) == tiny_tokenizer.apply_chat_template(
            talk, tools=[{"name": "weather"}], tokenize=False, add_generation_prompt=True
        )
        assert [second[name] for name in ("return_token_ids", "stop_token_ids")] == [True, [3]]
        assert {path for path, _ in double.requests} == {"/v1/completions"}
        sent.pop(0)
        with pytest.raises(ValueError, match="the token 400, and the policy has 384 tokens"):
            generator.generate(["other"], **asked)  # type: ignore[arg-type]
        # llama.cpp takes tokens and gives none.
        sent.pop(0)
        [[one, _]] = generator.generate(["third"], **asked)  # type: ignore[arg-type]
        assert (one.token_ids, one.text[:8]) == (None, "answer 0")
        double.faults = lambda number: (400, "prompt must be a string")
        with pytest.raises(ServerError, match=r"prompts were sent as token ids.*--server_prompts text"):
            generator.generate(["fourth"], **asked)  # type: ignore[arg-type]


def test_generate_verb_on_a_server_resumes(tmp_path: Path, write_jsonl: Callable[..., Path], capsys: Any) -> None:
    prompts = write_jsonl([{"id": str(i), "prompt": f"q{i}"} for i in range(6)], "prompts.jsonl")
    broken = {"on": True}
    double = ServerDouble()
    plain = double.choices
    double.choices = lambda path, body, n: [] if broken["on"] and body["prompt"] == "q4" else plain(path, body, n)  # type: ignore[method-assign]
    output = tmp_path / "out.jsonl"
    with serving(double) as url:
        words = ["generate", "--prompts", str(prompts), "--output", str(output), "--num_samples", "2"]
        words += ["--string_prompts", "raw", "--server.base_url", url, "--server.model", "m", "--server.max_retries", "1"]
        assert main(words) == 1
        assert "1 of 6 prompts have no completion" in capsys.readouterr().err
        assert not output.exists()
        broken["on"] = False
        asked = len(double.requests)
        assert main(words) == 0
        assert [body["prompt"] for _, body in double.requests[asked:]] == ["q4"]
    groups = list(read_groups(output))
    assert [len(group.candidates) for group in groups] == [2] * 6
    assert groups[0].candidates[0].source == "m"
    assert not list(tmp_path.glob(".*answers*"))


def test_store_survives_a_second_opening(tmp_path: Path) -> None:
    first = Store(tmp_path / "deep" / "answers")
    first.put(Store.key("a", 1), {"x": [1.5, None]})
    assert Store(tmp_path / "deep" / "answers").get(Store.key("a", 1)) == {"x": [1.5, None]}
    assert Store.key("a", 1) != Store.key("a", 2)
    # A value that is not what was kept is none.
    with closing(sqlite3.connect(tmp_path / "deep" / "answers")) as file, file:
        file.execute("UPDATE kept SET value = replace(value, '1.5', '2.5')")
    assert Store(tmp_path / "deep" / "answers").get(Store.key("a", 1)) is None
    (tmp_path / "no").write_text("no database" * 200)
    with pytest.raises(OSError, match="can't be used"):
        Store(tmp_path / "no")


# --- vLLM -------------------------------------------------------------------------------------------------------------


def test_vllm_is_driven_by_its_documented_interface(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    calls: list[tuple[str, Any]] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            calls.append(("init", options))

        def generate(self, prompts: Any, params: Any, lora_request: Any = None) -> Any:
            calls.append(("generate", (prompts, params, lora_request)))
            output = SimpleNamespace(text="12", token_ids=[5, 6], finish_reason="length", cumulative_logprob=-1.5)
            return [SimpleNamespace(outputs=[output] * params[0].n) for _ in prompts]

        def collective_rpc(self, method: str, kwargs: Any) -> None:
            calls.append((method, kwargs))

        def reset_prefix_cache(self) -> None:
            calls.append(("reset", None))

    vllm, lora = ModuleType("vllm"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    lora.LoRARequest = lambda name, number, path: (name, number, path)  # type: ignore[attr-defined]
    for name, module in {"vllm": vllm, "vllm.lora": ModuleType("vllm.lora"), "vllm.lora.request": lora}.items():
        monkeypatch.setitem(sys.modules, name, module)
    from ncalign.generation.vllm import VLLMGenerator

    tokens = TokenPrompts(tiny_tokenizer, string_prompts="raw", max_tokens=64)
    generator = VLLMGenerator("m", tokens, adapter_rank=9, max_tokens=64, options={"dtype": "bfloat16"})
    assert calls[-1][1] == {
        "model": "m",
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_model_len": 64,
        "dtype": "bfloat16",
        "logprobs_mode": "raw_logprobs",
        "load_format": "safetensors",
    }
    found = generator.generate(["What is"], num_samples=2, params=SamplingParams(4, top_k=3), seed=1)
    assert found[0][0].token_ids == (5, 6)
    assert (found[0][0].logprob, found[0][0].finished, len(found[0])) == (-1.5, False, 2)
    assert calls[-1][1][0] == [{"prompt_token_ids": tiny_tokenizer("What is")["input_ids"]}]
    assert calls[-1][1][2] is None
    # Sample j of a prompt takes its seed + j.
    generator.generate(["What is", "What"], num_samples=3, params=SamplingParams(4), seed=2**31 - 4)
    assert [settings.seed for settings in calls[-1][1][1]] == [2**31 - 4, 2**31 - 1]
    with pytest.raises(PromptError, match="exceed the 64 tokens"):
        generator.generate(["What is", "What"], num_samples=1, params=SamplingParams(63), seed=1)
    talk = [{"role": "user", "content": "What"}]
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ tools | tojson }}" + str(CHATML))
    generator.generate([talk, talk], num_samples=1, params=SamplingParams(4), seed=1, tools=[None, [{"name": "weather"}]])
    assert ["weather" in tiny_tokenizer.decode(one["prompt_token_ids"]) for one in calls[-1][1][0]] == [False, True]
    generator.load_adapter(Path("a"))
    generator.generate(["What is"], num_samples=1, params=SamplingParams(4), seed=1)
    assert calls[-1][1][2] == ("round-1", 1, "a")
    generator.load_weights(Path("w"))
    assert calls[-2:] == [("reload_weights", {"weights_path": "w"}), ("reset", None)]


def test_choice_is_kept_as_json() -> None:
    choice = Choice("a", True, 2, -1.0, ({"x": -0.1},))
    store = Store(Path(":memory:"))
    from dataclasses import asdict

    store.put("k", [asdict(choice)])
    assert json.loads(json.dumps(store.get("k")))[0]["top"] == [{"x": -0.1}]

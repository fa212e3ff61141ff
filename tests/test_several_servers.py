"""Several servers of one model: asked in turn; one that dies loses nothing, and comes back with the weights of the round."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_tokenizer
from kill_runs import Commands
from ncalign.generation.base import SamplingParams
from ncalign.generation.client import Server
from ncalign.generation.config import ServerConfig
from ncalign.generation.failures import ServerError
from ncalign.generation.hosts import Order
from ncalign.generation.local import TransformersGenerator
from ncalign.generation.questions import Request
from ncalign.model.policy import load_model
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from online_runs import settings, words_of, write_inputs
from server_double import ServerDouble, echo, serving

LOAD = Order("/load_lora_adapter", {"lora_name": "a"})


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """Nothing is waited for."""
    monkeypatch.setattr("ncalign.generation.hosts.LOOK_EVERY", 0.05)


def various(body: dict[str, Any], number: int) -> str:
    """A text that depends on what is asked, and on no server."""
    chance = random.Random(f"{body['prompt']} {body['seed']} {number}")
    return " " + "".join(chance.choice("aeiouxyz") for _ in range(12))


@pytest.fixture
def doubles() -> Iterator[tuple[list[ServerDouble], list[str]]]:
    """Two servers and their URLs."""
    found = [ServerDouble(echo), ServerDouble(echo)]
    with ExitStack() as stack:
        yield found, [stack.enter_context(serving(double)) for double in found]


def requests(number: int, *, start: int = 0) -> list[Request]:
    return [Request("completions", {"prompt": f"p{start + i}", "seed": i}, 1) for i in range(number)]


def asked(double: ServerDouble) -> list[str]:
    return [body["prompt"] for _, body in double.requests if "prompt" in body]


def test_servers_are_asked_in_turn(doubles: tuple[list[ServerDouble], list[str]]) -> None:
    (first, second), urls = doubles
    found = Server(ServerConfig(base_urls=tuple(urls), max_concurrency=1)).ask(requests(10))
    assert [answer[0].text for answer in found if not isinstance(answer, ServerError)] == [
        f"answer 0 of {i} to p{i}" for i in range(10)
    ]
    assert sorted(asked(first) + asked(second)) == sorted(f"p{i}" for i in range(10))
    assert abs(len(asked(first)) - len(asked(second))) <= 2


def test_a_server_that_dies_is_asked_no_more_until_it_is_back_with_its_orders(
    doubles: tuple[list[ServerDouble], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (first, second), urls = doubles
    server = Server(ServerConfig(base_urls=tuple(urls), max_concurrency=2, max_retries=4))
    server.order([Order("/unload_lora_adapter", {"lora_name": "old"}, needed=False), LOAD])
    for double in (first, second):
        double.delay = 0.002
        assert [path for path, _ in double.requests] == ["/v1/unload_lora_adapter", "/v1/load_lora_adapter"]

    def dies(number: int) -> None:
        first.down = first.down or number >= 6

    first.faults = dies
    found = server.ask(requests(40))
    assert not [answer for answer in found if isinstance(answer, ServerError)]
    assert [len(answer) for answer in found if not isinstance(answer, ServerError)] == [1] * 40
    said = capsys.readouterr().err
    assert said.count(f"warning: server {urls[0]}: ") == 1
    assert "set aside, and what it was asked is asked elsewhere (1 of 2 are in service)" in said
    lost = len(first.requests)
    # Two at a time, each asked once more there before it was asked elsewhere.
    assert lost <= 2 + 6 + 2 * 2 + 2
    first.down, first.faults = False, lambda number: None
    server.ask(requests(3, start=100))
    for start in range(200, 1000, 100):
        server.ask(requests(20, start=start))
        if len(first.requests) > lost:
            break
    # Its orders come first: it may have been started anew.
    assert first.requests[lost] == ("/v1/load_lora_adapter", {"lora_name": "a"})
    assert first.requests[lost + 1][0] == "/v1/completions"
    assert f"note: server {urls[0]} is healthy again" in capsys.readouterr().err


def test_a_server_that_was_started_anew_is_given_its_orders(doubles: tuple[list[ServerDouble], list[str]]) -> None:
    (first, second), urls = doubles
    second.delay = 0.02
    server = Server(ServerConfig(base_urls=tuple(urls), max_concurrency=1, max_retries=4))
    server.order([LOAD])
    loaded = len(first.requests)

    def knows(body: dict[str, Any]) -> Any:
        known = any(path == "/v1/load_lora_adapter" for path, _ in first.requests[loaded:])
        return None if known or "prompt" not in body else (404, {"error": {"message": "The model `a` does not exist."}})

    first.fault_of = knows
    for start in range(0, 400, 20):
        found = server.ask(requests(20, start=start))
        assert not [answer for answer in found if isinstance(answer, ServerError)]
        if first.answered:
            break
    assert [path for path, _ in first.requests[loaded:]].count("/v1/load_lora_adapter") == 1
    assert first.answered


def test_no_server_left_is_said(doubles: tuple[list[ServerDouble], list[str]]) -> None:
    found, urls = doubles
    for double in found:
        double.down = True
    server = Server(ServerConfig(base_urls=tuple(urls), max_concurrency=1, max_retries=2))
    answers = server.ask(requests(2))
    assert all(isinstance(answer, ServerError) for answer in answers)
    with pytest.raises(ServerError, match=r"^server http://127"):
        server.order([LOAD])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "http://a/v1", "base_urls": ("http://b/v1",)}, "give base_url, or base_urls for several servers"),
        ({"base_urls": ("http://a/v1", "http://a/v1")}, "must name each server once"),
        ({"base_urls": ("http://a/v1", "http://me:pw@b/v1")}, "must hold no name or password"),
    ],
)
def test_addresses_that_can_not_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig(**fields)


# --- Online -----------------------------------------------------------------------------------------------------------


def fields_of(folder: Path, model: Path, name: str, urls: list[str], **changes: Any) -> dict[str, Any]:
    """An online run whose servers load adapters."""
    server = {"server.base_urls": tuple(urls), "server.model": "base", "server.max_concurrency": 2}
    given = {"generator": "server", **server, "lora.r": 2, "probe_tolerance": None, "string_prompts": "raw"}
    return settings(folder, model, name, **{**given, **changes})


def nested(fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        (found.setdefault(section, {}) if section else found)[field] = value
    return found


def pools(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.glob("rounds/*/pool.jsonl"))]


def test_a_server_that_dies_in_a_round_loses_no_prompt(
    doubles: tuple[list[ServerDouble], list[str]], tmp_path: Path, tiny_model_dir: Path
) -> None:
    write_inputs(tmp_path)
    (first, second), urls = doubles
    first.answer = second.answer = various
    alone = fields_of(tmp_path, tiny_model_dir, "run", urls[1:])
    run_online(OnlineConfig.model_validate(nested(alone)))
    whole = pools(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "alone")
    names = {body["lora_name"] for path, body in second.requests if path == "/v1/load_lora_adapter"}
    second.requests.clear()

    def dies(number: int) -> None:
        # In the first round's sampling, between its orders and the second's.
        first.down = 5 <= number < 40

    first.faults = dies
    run_online(OnlineConfig.model_validate(nested(fields_of(tmp_path, tiny_model_dir, "run", urls))))
    assert len(whole) == 3
    assert pools(tmp_path / "run") == whole
    assert {body["lora_name"] for path, body in second.requests if path == "/v1/load_lora_adapter"} == names
    assert asked(second)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_two_processes_ask_two_servers_what_one_asks_one(
    doubles: tuple[list[ServerDouble], list[str]], tmp_path: Path, tiny_model_dir: Path
) -> None:
    write_inputs(tmp_path)
    found, urls = doubles
    for double in found:
        double.answer = various
    changes = {"dtype": "float64", "scoring_dtype": "float64", "eval_fraction": 0.0}
    commands = Commands(tmp_path / "log")
    try:
        for processes, some, folder in ((1, urls[:1], "one"), (2, urls, "two")):
            fields = fields_of(tmp_path, tiny_model_dir, "run", some, per_device_train_batch_size=4 // processes, **changes)
            done = commands.run(["online", *words_of(fields)], processes=processes)
            assert done.code == 0, done.said
            (tmp_path / "run").rename(tmp_path / folder)
            for double in found if processes == 1 else ():
                double.requests.clear()
    finally:
        commands.close()
    assert pools(tmp_path / "two") == pools(tmp_path / "one")
    for double in found:
        # The first process gives each server the weights of each round, and of the end.
        assert [path for path, _ in double.requests].count("/v1/load_lora_adapter") == 4
        assert asked(double)
    assert len(list((tmp_path / "two" / "rounds").glob("answers*.sqlite"))) == 2


class Policy(ServerDouble):
    """A server that holds the model a run starts with, and may report its log-probs wrongly."""

    def __init__(self, folder: Path, off: float) -> None:
        super().__init__()
        self._generator = TransformersGenerator(
            load_model(str(folder), dtype=torch.float32, trust_remote_code=False), build_tokenizer(), progress=False
        )
        self._off = off

    def choices(self, path: str, body: dict[str, Any], n: int) -> list[dict[str, Any]]:
        with torch.inference_mode():
            generator = torch.Generator().manual_seed(body["seed"])
            rows = self._generator._sample([body["prompt"]], n, SamplingParams(body["max_tokens"]), generator)
        return [
            {
                "index": index,
                "finish_reason": "length",
                "text": "x",
                "token_ids": ids,
                "logprobs": {"token_logprobs": [logprob / len(ids) - self._off] * len(ids)},
            }
            for index, (ids, logprob) in enumerate(rows)
        ]


def test_each_server_is_probed(tmp_path: Path, tiny_model_dir: Path) -> None:
    write_inputs(tmp_path)
    right, other = Policy(tiny_model_dir, 0.0), Policy(tiny_model_dir, 0.2)
    changes = {"probe_tolerance": 0.05, "eval_fraction": 0.0, "max_steps": 1}
    with serving(right) as good, serving(other) as bad:
        fields = fields_of(tmp_path, tiny_model_dir, "run", [good, bad], **changes)
        with pytest.raises(ValueError, match=rf"round 1: server {bad} and policy hold different weights.* 0\.2 nats a token"):
            run_online(OnlineConfig.model_validate(nested(fields)))
        assert json.loads((tmp_path / "run" / "inputs.json").read_text())
        right.requests.clear()
        run_online(OnlineConfig.model_validate(nested({**fields, "server.base_urls": (good,)})))
        # On the way again the probe asks again, whatever was answered before.
        assert any(body.get("max_tokens") == 16 for _, body in right.requests)

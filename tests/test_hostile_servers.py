"""Servers that lie, hang, flood, echo the key, or send the client elsewhere, through the client and the commands."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ncalign.cli.app import main
from ncalign.core.store import Store
from ncalign.generation.client import Server
from ncalign.generation.config import ServerConfig
from ncalign.generation.failures import ServerError
from ncalign.generation.hosts import Order
from ncalign.generation.questions import Request
from ncalign.generation.wire import Choice
from ncalign.online.backends import load_adapter_on
from online_runs import settings, write_inputs
from server_double import Fault, ServerDouble, serving

pytestmark = pytest.mark.usefixtures("no_pauses")
KEY = "sk-a/b+c-0123456789"
GOOD = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}


def config(url: str, **changes: Any) -> ServerConfig:
    return ServerConfig.model_validate({"base_url": url, "model": "m", "max_retries": 0, **changes})


def chat(text: str = "q") -> Request:
    return Request("chat", {"messages": [{"role": "user", "content": text}], "seed": 5})


def asked(fault: Fault, store: Store | None = None, **changes: Any) -> list[Choice] | ServerError:
    with serving(ServerDouble(faults=lambda number: fault)) as url:
        [found] = Server(config(url, **changes), store).ask([chat()])
    return found


def refusal(fault: Fault, **changes: Any) -> str:
    found = asked(fault, **changes)
    assert isinstance(found, ServerError)
    return str(found)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    def put(value: str) -> str:
        monkeypatch.setenv("TEST_KEY", value)
        return "TEST_KEY"

    return put


# --- Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a", "1", "{", "test", "EMPTY", "content", "sk-0123456789ab"])
def test_a_key_that_is_a_word_leaves_answers_as_they_are(value: str, key: Callable[[str], str]) -> None:
    said = f'a test: "{value}" is EMPTY, 1 {{content}}'
    double = ServerDouble(answer=lambda body, number: said)
    with serving(double) as url:
        [[found]] = Server(config(url, api_key_env=key(value))).ask([chat()])  # type: ignore[misc]
    assert found.text == said
    assert double.keys == [f"Bearer {value}"]


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": f"it is {KEY}"}},
        {"message": {"content": [{"type": "text", "text": KEY[:6]}, {"type": "text", "text": KEY[6:]}]}},
        {"message": {"content": None, "refusal": f"no, {KEY}"}},
        {
            "message": {"content": "m"},
            "logprobs": {"content": [{"token": "m", "logprob": -1.0, "top_logprobs": [{"token": f" {KEY}", "logprob": -1.0}]}]},
        },
    ],
)
def test_an_answer_that_holds_a_secret_is_refused_and_neither_changed_nor_kept(
    choice: dict[str, Any], tmp_path: Path, key: Callable[[str], str]
) -> None:
    # JSON may spell the key so that its bytes are not in the body.
    fault = json.dumps({"choices": [choice]}).replace("0123", "\\u00301\\u0032\\u0033").encode()
    said = refusal(fault, store=Store(tmp_path / "answers"), api_key_env=key(KEY))
    assert "it holds the key in TEST_KEY, which is written to no file" in said
    assert KEY not in said
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "spelt",
    [
        KEY,
        KEY.replace("/", "\\/"),
        KEY.replace("/", "%2F").replace("+", "%2b"),
        KEY.replace("/", "&#47;").replace("+", "&#x2B;"),
        KEY.replace("+", "\\u002B"),
        KEY.upper(),
    ],
)
def test_a_secret_is_hidden_however_a_server_spells_it(spelt: str, key: Callable[[str], str]) -> None:
    for fault in ((401, f"bad key {spelt}!"), f"bad key {spelt}!".encode(), f'{{"error": "{spelt}", '.encode()):
        said = refusal(fault, api_key_env=key(KEY))
        assert "***" in said
        assert KEY[-10:] not in said


def test_a_secret_that_a_message_would_cut_is_hidden_whole(key: Callable[[str], str]) -> None:
    said = refusal(("x" * 190 + KEY).encode(), api_key_env=key(KEY))
    assert "***" in said
    assert KEY[:6] not in said


def test_a_key_is_sent_without_the_end_of_its_line(key: Callable[[str], str]) -> None:
    double = ServerDouble()
    with serving(double) as url:
        assert isinstance(Server(config(url, api_key_env=key(f"{KEY}\n"))).ask([chat()])[0], list)
    assert double.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("value", ["sk-one\nsk-two", "sk-\u00e9t\u00e9-0123456789", "sk-\x00-0123456789", "\u201csk-abc\u201d"])
def test_a_key_that_no_header_may_hold_is_refused_unshown(value: str, key: Callable[[str], str]) -> None:
    if "\x00" in value:
        value = value.replace("\x00", "\x1b")  # the environment holds no NUL
    with pytest.raises(ValueError, match="TEST_KEY holds letters or control characters that no key has") as refused:
        Server(config("http://127.0.0.1:9/v1", api_key_env=key(value)))
    assert "sk-" not in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        (
            "api_key_env",
            "sk-proj-0123456789abcdef",
            "must be the name of an environment variable that holds the key, not the key",
        ),
        ("base_url", "http://me:pass0123@localhost/v1", "must hold no name or password"),
        ("base_url", "https://sk-0123@localhost/v1", "must hold no name or password"),
    ],
)
def test_a_secret_in_a_configuration_is_refused_unshown(
    flag: str, value: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--prompts", "p.jsonl", "--output", str(tmp_path / "o.jsonl"), f"--server.{flag}", value]
    assert main(words) == 2
    shown = "".join(capfd.readouterr())
    assert f"--server.{flag}: found a value that is not shown; {said}" in shown
    assert "0123" not in shown


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://localhost/v1", "http://", "file:///etc/passwd", "http://[::1"])
def test_what_is_no_address_is_refused_before_anything_is_asked(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompts", "p.jsonl", "--output", "o.jsonl", "--server.base_url", url]) == 2
    assert "must be a URL such as http://localhost:8000/v1" in capfd.readouterr().err


def test_a_key_in_the_clear_over_the_internet_is_told_once(
    key: Callable[[str], str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    name = key(KEY)
    for _ in range(2):
        Server(config("http://8.8.8.8:1234/v1", api_key_env=name))
    assert capfd.readouterr().err.count("the key in TEST_KEY is sent unencrypted") == 1
    Server(config("http://8.8.4.4/v1"))
    for host in (
        "https://8.8.8.8",
        "http://127.0.0.1",
        "http://localhost",
        "http://[::1]",
        "http://10.1.2.3",
        "http://192.168.0.4",
    ):
        Server(config(f"{host}/v1", api_key_env=name))
    assert "unencrypted" not in capfd.readouterr().err


# --- What a server learns ---------------------------------------------------------------------------------------------


PLAIN = ("accept", "accept-encoding", "content-length", "content-type", "user-agent")


@pytest.mark.parametrize("given", [KEY, None])
def test_nothing_of_the_environment_is_sent_but_the_key_that_is_named(
    given: str | None, key: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        "OPENAI_API_KEY": "sk-PRIVATE",
        "OPENAI_ADMIN_KEY": "sk-PRIVATE-admin",
        "OPENAI_ORG_ID": "org-PRIVATE",
        "OPENAI_PROJECT_ID": "proj-PRIVATE",
        "OPENAI_CUSTOM_HEADERS": "X-Custom: PRIVATE\nAuthorization: Bearer PRIVATE\nUser-Agent: PRIVATE\nHost: PRIVATE",
        "OPENAI_BASE_URL": "http://127.0.0.1:9/PRIVATE",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    double = ServerDouble()
    with serving(double) as url:
        server = Server(config(url, api_key_env=key(given) if given else None))
        assert isinstance(server.ask([chat()])[0], list)
        server.order([Order("//reset_prefix_cache", {})])
    assert len(double.headers) == 2
    for headers in double.headers:
        assert headers.get("authorization") == (f"Bearer {given}" if given else None)
        assert headers.keys() - {"authorization"} == {"host", *PLAIN}
        assert headers["host"] == url.split("/")[2]
        assert "PRIVATE" not in json.dumps(headers)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int, key: Callable[[str], str]) -> None:
    other = ServerDouble()
    with serving(other) as elsewhere:

        def redirect(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Location", f"{elsewhere}/chat/completions?key={KEY}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        double = ServerDouble(faults=lambda number: redirect)
        with serving(double) as url:
            server = Server(config(url, api_key_env=key(KEY), max_retries=3))
            [found] = server.ask([chat()])
            with pytest.raises(ServerError, match="no redirect is followed"):
                load_adapter_on(server, "round-1", Path("adapter"))
    assert f"status {status}: it redirects to '{elsewhere}/chat/completions?key=***'" in str(found)
    assert not other.requests
    assert len(double.requests) == 1 + 2  # an adapter is unloaded, and loaded


# --- Answers that can't be --------------------------------------------------------------------------------------------

USAGES = [
    [],
    [1, 2],
    "many",
    3,
    {"prompt_tokens": "abc"},
    {"prompt_tokens": -1},
    {"completion_tokens": 10**400},
    {"prompt_tokens": 1.5},
]


@pytest.mark.parametrize("usage", USAGES)
def test_an_answer_is_good_without_counts_that_can_be_read(usage: object, tmp_path: Path) -> None:
    double = ServerDouble(faults=lambda number: json.dumps({**GOOD, "usage": usage}).encode())
    with serving(double) as url:
        server = Server(config(url), Store(tmp_path / "answers"))
        assert server.ask([chat()]) == server.ask([chat()]) == [[Choice("fine", True)]]
    assert (server.usage.malformed, server.usage.prompt_tokens, server.usage.completion_tokens) == (0, 0, 0)
    assert len(double.requests) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (json.dumps(GOOD).encode("utf-16"), "no UTF-8: invalid start byte at byte 0"),
        (json.dumps(GOOD).replace("fine", "é").encode("latin-1"), "no UTF-8"),
        (json.dumps(GOOD)[:-1].encode() + b', "choices": []}', "choices: List should have at least 1 item"),
        (b'{"choices": [' + b'{"text": "x"},' * 9000 + b'{"text": "x"}]}', "choices: List should have at most 8192 items"),
        (b'{"choices": [{"message": {"content": [' + b'"",' * 9000 + b'""]}}]}', "choices: 0: message: content: "),
        (b'{"choices": [' + b"1," * 2_000_000 + b"1]}", "choices: 0: Input should be an object"),
        (b'{"n": ' + b"9" * 2_000_000 + b"}", "number out of range"),
        (
            b'{"choices": [{"text": "", "logprobs": {"content": [{"token": "a", "logprob": -1, "top_logprobs": ['
            + b'{"token": "a", "logprob": -1},' * 2000
            + b'{"token": "a", "logprob": -1}]}]}}]}',
            "top_logprobs: List should have at most 1024 items",
        ),
        (b'data: {"choices": []}\n\n', "Invalid JSON"),
        (b"", "Invalid JSON: EOF"),
    ],
)
def test_what_is_no_answer_is_said_in_words(body: bytes, said: str) -> None:
    assert said in refusal(body)


@pytest.mark.parametrize("encoding", ["utf-16", "punycode", "idna", "unicode_escape", "nonsense"])
def test_a_declared_encoding_is_not_believed(encoding: str) -> None:
    def answer(status: int, data: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
        def send(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Content-Type", f"application/json; charset={encoding}")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)

        return send

    assert asked(answer(200, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())) == [Choice("fine", True)]
    assert "status 400: so it is" in refusal(answer(400, b'{"error": "so it is"}'))


def test_many_tokens_that_are_certain_make_a_log_prob_that_is_read_again(tmp_path: Path) -> None:
    tokens = [{"token": "a", "logprob": 9e-4, "top_logprobs": []}] * 5
    fault = json.dumps({"choices": [{"message": {"content": "aaaaa"}, "logprobs": {"content": tokens}}]}).encode()
    double = ServerDouble(faults=lambda number: fault)
    with serving(double) as url:
        for _ in range(2):
            assert Server(config(url), Store(tmp_path / "answers")).ask([chat()]) == [[Choice("aaaaa", True, 5, 1e-3)]]
    assert len(double.requests) == 1


def test_log_probs_as_low_as_they_can_be_do_not_add_up_to_infinity(tmp_path: Path) -> None:
    fault = json.dumps({"choices": [{"text": "a", "logprobs": {"token_logprobs": [-3.4e38] * 9}}]}).encode()
    [found] = asked(fault, Store(tmp_path / "answers"))  # type: ignore[misc]
    assert found.logprob == pytest.approx(9 * -3.4e38)


POISON = [
    b"{", b"[" * 50_000, b'"text"', b"[1]", b"null", b"NaN", b'[{"text": 7, "finished": true}]', b'[{"text": "a"}]',
    b'[{"text": "\\ud800", "finished": true}]', b'[{"text": "a", "finished": true, "logprob": NaN}]', b"\xff\xfe",
    b'[{"text": "a", "finished": true, "top": [{"a": 1000.0}]}]', b'{"messages": null}',
]  # fmt: skip


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("value", POISON)
def test_what_another_hand_put_in_a_store_is_not_used(value: bytes, as_text: bool, tmp_path: Path) -> None:
    with serving(ServerDouble()) as url:
        key, fields = Store.key(url, "m", "", "chat", dict(chat().body)), Store.key(url, "m", "fields")
        with closing(Store(tmp_path / "answers")):
            pass
        text = value.decode(errors="replace")
        with closing(sqlite3.connect(tmp_path / "answers")) as file, file:
            for one in (key, fields):
                row = "CAST(? AS TEXT)" if as_text else "?"
                file.execute(f"INSERT INTO kept VALUES (?, {row}, ?)", (one, value, Store.key(one, text)))
        server = Server(config(url), Store(tmp_path / "answers"))
        [[found]] = server.ask([chat()])  # type: ignore[misc]
        assert found.text == "answer 0 of 5 to q"
        assert server.changes == {}
        assert Server(config(url), Store(tmp_path / "answers")).ask([chat()]) == [[found]]


def test_a_server_with_no_usable_answer_at_all_is_not_asked_everything() -> None:
    double = ServerDouble(faults=lambda number: b"<html>Log in</html>")
    with serving(double) as url:
        found = Server(config(url, max_concurrency=2)).ask([chat(f"q{i}") for i in range(200)])
    assert all(isinstance(one, ServerError) for one in found)
    assert "no usable answer 1 times" in str(found[0])
    assert "not asked, since 4 requests in a row had no answer, or 16 none that can be used" in str(found[-1])
    assert len(double.requests) < 40


def test_retries_of_all_kinds_are_counted_together() -> None:
    # As bad as can be: each answer is bad, and comes after as many refusals as are borne.
    plan = [503, 503, "half", 503, "half", "half"]
    double = ServerDouble(faults=lambda number: plan[number] if number < len(plan) else 418)
    with serving(double) as url:
        [found] = Server(config(url, max_retries=2)).ask([chat()])
    assert "no usable answer 3 times" in str(found)
    assert len(double.requests) == len(plan)


# --- Slow, endless and huge -------------------------------------------------------------------------------------------


def endless(status: int) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"10000\r\n" + b" " * 2**16 + b"\r\n")

    return send


def packed(encoding: str, data: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", encoding)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return send


SPACES = b" " * 2**24


@pytest.mark.parametrize(
    "fault",
    [
        endless(200),
        packed("gzip", gzip.compress(SPACES)),
        packed("deflate", zlib.compress(SPACES)),
        packed("gzip, gzip", gzip.compress(gzip.compress(SPACES))),
    ],
)
def test_an_answer_is_cut_at_the_largest_size(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncalign.generation.transport.MOST_BYTES", 2**20)
    double = ServerDouble(faults=lambda number: fault if number < 2 else None)
    with serving(double) as url:
        [found, after] = Server(config(url, max_retries=1, max_concurrency=1)).ask([chat("a"), chat("b")])
        assert "no usable answer 2 times: more than 1 MiB, and cut there" in str(found)
        assert isinstance(after, list)
        double.faults = lambda number: fault
        with pytest.raises(ServerError, match="more than 1 MiB"):
            Server(config(url)).order([Order("//reset_prefix_cache", {})])


def test_a_refusal_without_end_is_read_as_far_as_it_is_shown() -> None:
    assert "status 400:" in refusal(endless(400))


@pytest.mark.parametrize("where", ["headers", "informational"])
def test_headers_that_trickle_are_held_to_the_deadline(where: str) -> None:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" if where == "headers" else b"")
        for number in range(100):
            handler.wfile.write(f"X-{number}: a\r\n".encode() if where == "headers" else b"HTTP/1.1 102 Processing\r\n\r\n")
            handler.wfile.flush()
            time.sleep(0.05)

    started = time.monotonic()
    assert "timed out" in refusal(send, timeout_seconds=0.3)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("wait", ["86400", "1e300", "Wed, 21 Oct 2099 07:28:00 GMT", "121"])
def test_a_server_that_asks_for_a_long_wait_is_not_waited_for(wait: str) -> None:
    found, number = refused_with_wait(wait)
    assert "it asks to wait" in found
    assert "and no more than 120 s are waited" in found
    assert number == 1


@pytest.mark.parametrize("wait", ["-5", "nan", "0", "soon", "Wed, 21 Oct 1999 07:28:00 GMT", "Wed, 99 Foo"])
def test_a_wait_that_is_none_is_a_pause_as_any(wait: str) -> None:
    found, number = refused_with_wait(wait)
    assert "wait" not in found
    assert number == 4


def refused_with_wait(wait: str) -> tuple[str, int]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(429)
        handler.send_header("Retry-After", wait)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    double = ServerDouble(faults=lambda number: send)
    with serving(double) as url:
        [found] = Server(config(url, max_retries=3)).ask([chat()])
    return str(found), len(double.requests)


def test_a_wait_that_a_server_asks_for_is_told_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ncalign.generation.transport._SHORT_WAIT", 0.001)
    with serving(ServerDouble(faults=lambda number: 429)) as url:
        Server(config(url, max_retries=3)).ask([chat(), chat("r")])
    assert capfd.readouterr().err.count("status 429, and it asks to wait") == 1


# --- Stopping ---------------------------------------------------------------------------------------------------------


def group(number: int) -> dict[str, Any]:
    return {"id": f"g{number}", "prompt": f"q{number}", "candidates": [{"completion": "a"}, {"completion": "b"}]}


@pytest.mark.parametrize("hangs", ["sampling", "scoring"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_an_online_run_whose_server_hangs(
    hangs: str, sent: signal.Signals, code: int, tmp_path: Path, tiny_model_dir: Path
) -> None:
    write_inputs(tmp_path)
    double = ServerDouble(lambda body, number: f"answer {number} of {body['seed']}")
    double.slow_seconds = 60.0
    hanging: list[str] = []

    def fault(body: dict[str, Any]) -> str | None:
        if (body["model"] == "judge") != (hangs == "scoring"):
            return None
        hanging.append(body["model"])
        return "slow"

    double.fault_of = fault

    def stop() -> None:
        # Two at a time are asked before the hanging ones too.
        while len(hanging) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    with serving(double) as url:
        at = [("base_url", url), ("max_concurrency", 2), ("timeout_seconds", 2), ("max_retries", 9)]
        flags = {f"{section}.{name}": value for section in ("server", "judge") for name, value in at}
        changes = {"reward": "judge", "generator": "server", "push": "none", "judge.model": "judge", "server.model": "m"}
        fields = settings(tmp_path, tiny_model_dir, "run", probe_tolerance="none", eval_fraction=0.0, **changes, **flags)
        words = [word for name, value in fields.items() if value != () for word in (f"--{name}", str(value))]
        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        assert main(["online", *words, "--cache_dir", str(tmp_path / "cache")]) == code
        thread.join()
        number = len(double.requests)
        time.sleep(0.1)
    assert number == len(double.requests)
    # None was asked again after its deadline.
    assert double.under_way == 2


def commands(tmp_path: Path, write_jsonl: Callable[..., Path], url: str) -> dict[str, list[str]]:
    prompts = str(write_jsonl([group(number) for number in range(6)], "groups.jsonl"))
    questions = str(write_jsonl([{"question_id": f"q{k}", "turns": [f"What is {k}?"]} for k in range(6)], "questions.jsonl"))
    answers = [
        str(write_jsonl([{"question": f"q{k}", "model": name, "turns": [f"{name} {k}"]} for k in range(6)], f"{name}.jsonl"))
        for name in ("a", "b")
    ]

    def at(section: str) -> list[str]:
        return [f"--{section}.base_url", url, f"--{section}.model", "m", f"--{section}.max_concurrency", "2"]

    kept = ["--cache_dir", str(tmp_path / "cache")]
    judged = ["--model", answers[0], "--against", answers[1], "--set_name", questions, "--output_dir", str(tmp_path / "e")]
    return {
        "generate": ["generate", "--prompts", prompts, "--output", str(tmp_path / "o.jsonl"), *at("server")],
        "score": ["score", "--data", prompts, "--output", str(tmp_path / "s.jsonl"), "--reward", "judge", *at("judge"), *kept],
        "answer": ["answer", "--set_name", questions, "--output", str(tmp_path / "n.jsonl"), *at("server"), *kept],
        "evaluate": ["evaluate", *judged, "--judge.mode", "labels", *at("judge"), *kept],
    }


@pytest.mark.parametrize("verb", ["generate", "score", "answer", "evaluate"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_whose_server_hangs(
    verb: str, sent: signal.Signals, code: int, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    double = ServerDouble(faults=lambda number: "slow")
    double.slow_seconds = 60.0

    def stop() -> None:
        while len(double.requests) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    with serving(double) as url:
        words = commands(tmp_path, write_jsonl, url)[verb]
        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        assert main(words) == code
        thread.join()
        number = len(double.requests)
        time.sleep(0.1)
    assert number == len(double.requests) == 2

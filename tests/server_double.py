"""An OpenAI-compatible server that answers from a function, and does wrong what it is told to."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], str]
Fault = str | int | bytes | tuple[int, Any] | Callable[[BaseHTTPRequestHandler], None] | None


def echo(body: dict[str, Any], number: int) -> str:
    """A text that depends on the prompt and the answer's number."""
    prompt = body.get("prompt") or body["messages"][-1]["content"]
    return f"answer {number} of {body.get('seed', 0)} to {prompt}"


class ServerDouble:
    """Records requests; ``faults`` says what to do wrong with the request of a given number, counted from 0.

    A fault is ``drop``, ``half`` (half the JSON), ``few`` (one choice, whatever n is), ``many``, ``slow``, ``trickle`` (a byte
    now and then), ``null`` (no message), ``too long`` (what servers say of a prompt that does not fit), a status to answer
    with, a status and what it says, the bytes to answer with, or a function that writes the answer to the handler itself;
    ``fault_of`` says the same of a request's body. While it is ``down`` it answers nothing.
    """

    def __init__(self, answer: Answer = echo, faults: Callable[[int], Fault] = lambda number: None) -> None:
        self.answer, self.faults = answer, faults
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[str] = Counter()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.delay, self.slow_seconds = 0.0, 1.5
        self.down = False
        self.fault_of: Callable[[dict[str, Any]], Fault] = lambda body: None

    def got(self, path: str) -> dict[str, Any]:
        """What it answers to something that is got."""
        return {}

    def ordered(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """What it does with an order, such as to load weights: a status, and what it answers."""
        return 200, {}

    def choices(self, path: str, body: dict[str, Any], n: int) -> list[dict[str, Any]]:
        found = []
        for number in range(n):
            text = self.answer(body, number)
            words = text.split()
            logprobs = {"content": [{"token": word, "logprob": -0.5, "top_logprobs": []} for word in words]}
            choice: dict[str, Any] = {"index": number, "finish_reason": "stop"}
            if "chat" in path:
                choice |= {"message": {"role": "assistant", "content": text}}
                choice |= {"logprobs": logprobs} if body.get("logprobs") else {}
            else:
                choice |= {"text": text, "logprobs": {"token_logprobs": [-0.5] * len(words)}}
            found.append(choice)
        return found


def _handler(double: ServerDouble) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            if double.down:
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.send(double.got(self.path), 200)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with double.lock:
                number = len(double.requests)
                double.requests.append((self.path, body))
                double.keys.append(self.headers.get("Authorization"))
                double.headers.append({name.lower(): value for name, value in self.headers.items()})
                double.under_way += 1
                double.most_under_way = max(double.most_under_way, double.under_way)
            try:
                fault = "drop" if double.down else double.faults(number)
                self.reply(body, double.fault_of(body) if fault is None else fault)
            finally:
                with double.lock:
                    double.under_way -= 1

        def reply(self, body: dict[str, Any], fault: Fault) -> None:
            time.sleep(double.delay)
            if fault == "drop":
                self.close_connection = True
                self.connection.shutdown(2)
                return
            if isinstance(fault, bytes):
                self.send(fault, 200)
                return
            if callable(fault):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    fault(self)
                return
            if isinstance(fault, tuple):
                status, said = fault
                self.send(said.encode() if isinstance(said, str) else said, status)
                return
            if isinstance(fault, int):
                self.send({"error": {"message": f"no, {self.headers.get('Authorization')}"}}, fault)
                return
            if fault == "too long":
                said = "This model's maximum context length is 4096 tokens; your request has 5000"
                self.send({"error": {"message": said, "code": "context_length_exceeded"}}, 400)
                return
            if fault == "slow":
                time.sleep(double.slow_seconds)
            if "prompt" not in body and "messages" not in body:
                status, answer = double.ordered(self.path, body)
                self.send(answer, status)
                return
            n = body.get("n", 1)
            n = {"few": 1, "many": n + 2}.get(str(fault), n)
            choices = double.choices(self.path, body, n)
            if fault == "null":
                choices[0]["message"] = None
            answer = {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 3 * n}}
            if fault not in ("half", "null", "slow"):
                with double.lock:
                    double.answered[json.dumps(body.get("messages") or body.get("prompt"))] += n
            data = json.dumps(answer).encode()
            self.send(data[: len(data) // 2] if fault == "half" else data, 200, pause=0.05 if fault == "trickle" else 0.0)

        def send(self, answer: dict[str, Any] | bytes, status: int, *, pause: float = 0.0) -> None:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.end_headers()
                for part in [data[i : i + 1] for i in range(len(data))] if pause else [data]:
                    self.wfile.write(part)
                    time.sleep(pause)
            except (BrokenPipeError, ConnectionResetError):
                pass

    return Handler


@contextmanager
def serving(double: ServerDouble) -> Iterator[str]:
    """Serve on a free port; gives the base URL."""
    # Connections that wait longer than the default queue are dropped, and asked for again.
    server_class = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 128, "daemon_threads": True})
    server = server_class(("127.0.0.1", 0), _handler(double))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()

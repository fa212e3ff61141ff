"""Any server that speaks OpenAI's chat and completions API: asked many things at once, and never the same thing twice.

The `openai` library sends and retries what the network or the server refuses (backoff with jitter, Retry-After). Here is what
is left: how many are under way, how many a minute, answers that are no answers (half JSON, fewer choices than asked), and an
account on disk of what was answered.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ncalign.core.store import Store
from ncalign.generation.config import ServerConfig

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_ABOUT_THE_REQUEST = frozenset({400, 404, 413, 422})
# Requests in a row without an answer after which no more are sent, as a multiple of those under way at a time.
_GIVE_UP_AFTER = 2


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        text: what was answered.
        finished: whether the model ended it; false when a limit cut it.
        num_tokens: of the answer; None where the server does not say.
        logprob: sum of its tokens' log-probs, in nats; None where the server does not give them.
        top: for each token, the likeliest alternatives with their log-probs; empty where they were not asked for.
    """

    text: str
    finished: bool
    num_tokens: int | None = None
    logprob: float | None = None
    top: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """One thing to ask.

    Attributes:
        kind: which of the two APIs.
        body: the request's JSON without ``model`` and ``n``.
        n: how many answers.
    """

    kind: Literal["chat", "completions"]
    body: Mapping[str, Any]
    n: int = 1


@dataclass
class Usage:
    """What was asked and answered, this process's share.

    Attributes:
        requests: HTTP requests that came to an answer.
        malformed: answers that were none, and were asked for again.
        remembered: requests whose answers were on disk.
        prompt_tokens: as the server counted them.
        completion_tokens: as the server counted them.
    """

    requests: int = 0
    malformed: int = 0
    remembered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Count, from any thread."""
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class ServerError(RuntimeError):
    """A server that gave no answer after all retries; what it answered before is kept.

    Attributes:
        refused: whether it said that it does not take this very request (a status of 400 and the like), so that others may
            fare better; false where it is down, overloaded, or wants another key.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        """Keep the message and whose fault it is."""
        super().__init__(message)
        self.refused = refused


class Server:
    """A client of one model on one server.

    Args:
        config: where it is, and how it may be asked.
        store: keeps the answers; None for no memory.

    Attributes:
        model: the model asked for by name; may change while nothing is under way.
        version: of the weights behind that name; answers of another version are not remembered.
        usage: what was asked and answered.

    Raises:
        ValueError: the package `openai` is missing, or the environment variable with the key.
    """

    def __init__(self, config: ServerConfig, store: Store | None = None) -> None:
        try:
            import openai
        except ImportError:
            raise ValueError("a server needs the package openai: pip install 'ncalign[server]'") from None
        self.config, self.usage, self._store = config, Usage(), store
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if config.api_key_env and not self._key:
            raise ValueError(
                f"server {config.base_url}: the environment variable {config.api_key_env} is not set; export it, or set "
                "api_key_env: none for a server without keys"
            )
        self._client = openai.OpenAI(
            base_url=config.base_url,
            api_key=self._key or "none",
            timeout=config.timeout_seconds,
            max_retries=config.max_retries,
        )
        self._failures: tuple[type[Exception], ...] = (openai.OpenAIError,)
        self._pace = _Pace(config.requests_per_minute)
        self.model, self.version = config.model, ""

    def ask(
        self, requests: Sequence[Request], *, done: Callable[[int], None] = lambda index: None
    ) -> list[list[Choice] | ServerError]:
        """Ask many things at once.

        Where many requests in a row end without an answer, the server is taken to be down, and the others are not sent.

        Args:
            requests: what to ask.
            done: told of each request that came to its end, by its place; called from this thread.

        Returns:
            For each request, in order, its answers: ``n`` or, where the server stopped giving more, fewer; or why there are
            none.
        """
        found: list[list[Choice] | ServerError] = [[] for _ in requests]
        pool = ThreadPoolExecutor(self.config.max_concurrency, thread_name_prefix="server")
        most, in_a_row = _GIVE_UP_AFTER * self.config.max_concurrency, 0
        try:
            futures: dict[Future[list[Choice]], int] = {pool.submit(self._answers, r): i for i, r in enumerate(requests)}
            for future in as_completed(futures):
                index = futures[future]
                try:
                    found[index] = future.result()
                    in_a_row = 0
                except CancelledError:
                    found[index] = ServerError(
                        f"server {self.config.base_url}: not asked, since {most} requests in a row had no answer"
                    )
                except ServerError as error:
                    found[index] = error
                    in_a_row += not error.refused
                    if in_a_row >= most:
                        for other in futures:
                            other.cancel()
                done(index)
        except BaseException:
            # Ctrl-C: what is under way ends by itself, and is kept; nothing more is asked.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return found

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        """Tell the server something that has no answer, such as to load an adapter.

        Args:
            path: under the server's root where it begins with ``//``, else under ``base_url``.
            body: the JSON.

        Raises:
            ServerError: it refuses.
        """
        if path.startswith("//"):
            path = self.config.base_url.rstrip("/").removesuffix("/v1") + path[1:]
        try:
            self._client.post(path, body=dict(body), cast_to=str)
        except self._failures as error:
            raise self._failed(error) from None

    def _answers(self, request: Request) -> list[Choice]:
        """The answers to one request, those on disk first; each is kept as it comes."""
        key = Store.key(self.config.base_url, self.model, self.version, request.kind, dict(request.body))
        kept = [] if self._store is None else self._store.get(key) or []
        choices = [_restored(entry) for entry in kept][: request.n]
        self.usage.add(remembered=len(choices) == request.n)
        fruitless = 0
        while len(choices) < request.n:
            try:
                got = self._send(request, request.n - len(choices), number=len(choices) + fruitless)
            except _Malformed as error:
                fruitless += 1
                self.usage.add(malformed=1)
                if fruitless > self.config.max_retries:
                    if choices:
                        return choices
                    raise ServerError(
                        f"server {self.config.base_url} gave no usable answer {fruitless} times: {error}", refused=True
                    ) from None
                time.sleep(min(_FIRST_PAUSE * 2**fruitless, _LONGEST_PAUSE) * (1 - 0.25 * random.random()))
                continue
            choices += got[: request.n - len(choices)]
            if self._store is not None:
                self._store.put(key, [asdict(choice) for choice in choices])
        return choices

    def _send(self, request: Request, n: int, *, number: int) -> list[Choice]:
        body = {**request.body, "model": self.model}
        if n > 1:
            body["n"] = n
        if number and "seed" in body:
            # The same seed would answer the same again.
            body["seed"] = (body["seed"] + 7919 * number) % 2**31
        path = "/chat/completions" if request.kind == "chat" else "/completions"
        self._pace.wait()
        try:
            text = self._client.post(path, body=body, cast_to=str)
        except self._failures as error:
            raise self._failed(error) from None
        self.usage.add(requests=1)
        return list(self._parsed(request.kind, self._without_key(text)))

    def _parsed(self, kind: str, text: str) -> Iterator[Choice]:
        try:
            answer = json.loads(text)
            choices = answer["choices"]
            usage = answer.get("usage") or {}
            found = [(_chat_choice if kind == "chat" else _text_choice)(choice) for choice in choices]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _Malformed(f"{type(error).__name__} in {text[:200]!r}") from None
        if not found:
            raise _Malformed("an answer without choices")
        self.usage.add(
            prompt_tokens=int(usage.get("prompt_tokens") or 0), completion_tokens=int(usage.get("completion_tokens") or 0)
        )
        if len(found) == 1 and found[0].num_tokens is None and usage.get("completion_tokens"):
            found = [Choice(**{**asdict(found[0]), "num_tokens": int(usage["completion_tokens"])})]
        yield from found

    def _failed(self, error: Exception) -> ServerError:
        return ServerError(self._worded(error), refused=getattr(error, "status_code", None) in _ABOUT_THE_REQUEST)

    def _worded(self, error: Exception) -> str:
        """What the server said, without the key that it may repeat."""
        status = getattr(error, "status_code", None)
        said = self._without_key(str(error)).strip().split("\n", 1)[0][:300]
        advice = {
            401: f"; is the key in {self.config.api_key_env} right?",
            404: f"; does it serve the model {self.model!r}?",
            429: "; lower max_concurrency or set requests_per_minute",
        }.get(status or 0, "")
        return f"server {self.config.base_url}: {said}{advice}"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Malformed(ValueError):
    """An answer that is none."""


class _Pace:
    """At most so many a minute, evenly."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        if not self._interval:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self._interval
        time.sleep(turn - now)


def _restored(entry: Mapping[str, Any]) -> Choice:
    return Choice(**{**entry, "top": tuple(entry["top"])})


def _chat_choice(choice: Mapping[str, Any]) -> Choice:
    content = choice["message"]["content"]
    if not isinstance(content, str):
        raise TypeError("the message has no content")
    tokens = (choice.get("logprobs") or {}).get("content")
    return Choice(
        text=content,
        finished=choice.get("finish_reason") != "length",
        num_tokens=None if tokens is None else len(tokens),
        logprob=None if tokens is None else float(sum(token["logprob"] for token in tokens)),
        top=tuple({t["token"]: float(t["logprob"]) for t in token.get("top_logprobs") or ()} for token in tokens or ())
        if tokens and tokens[0].get("top_logprobs")
        else (),
    )


def _text_choice(choice: Mapping[str, Any]) -> Choice:
    if not isinstance(choice["text"], str):
        raise TypeError("the text is none")
    found = choice.get("logprobs") or {}
    values = found.get("token_logprobs")
    if values is None and found.get("content") is not None:  # llama.cpp gives the chat API's form
        values = [token["logprob"] for token in found["content"]]
    return Choice(
        text=choice["text"],
        finished=choice.get("finish_reason") != "length",
        num_tokens=None if values is None else len(values),
        logprob=None if values is None else float(sum(value for value in values if value is not None)),
    )

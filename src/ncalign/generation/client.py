"""Any server that speaks OpenAI's chat and completions API: asked many things at once, and never the same thing twice.

The `openai` library sends requests and repeats those that the network or the server refuses (backoff with jitter, Retry-After).
Added here: how many are under way, how many begin in a minute, a deadline and a size for each (`transport`), the check of what
comes back (`wire`), further requests where there were fewer choices than asked for, and a store on disk of what was answered.
"""

from __future__ import annotations

import os
import random
import time
from asyncio import gather, sleep
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ncalign.core.install import install_hint
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.generation.config import ServerConfig
from ncalign.generation.questions import Request, distinct_questions
from ncalign.generation.refusals import Changes, changed, kept_changes, name_instead, reason_of, refused_field, what_changes
from ncalign.generation.transport import LONGEST_WAIT, ApiKey, asked_to_wait, check_host, connect
from ncalign.generation.wire import CHOICES, Choice, Malformed, read_answer

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

Result = TypeVar("Result")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
# Seconds between looks for an answer that another process is asking for.
_LOOK_AGAIN = 0.1
_ABOUT_THE_REQUEST = frozenset({400, 404, 413, 422})
# Requests in a row without an answer after which no more are sent, as a multiple of those under way at a time.
_GIVE_UP_AFTER = 2
# What a request counts there that was answered, and never with an answer that can be used.
_UNUSABLE = 0.25
# No field's name.
_WAIT = "(wait)"
_under_way: set[Future[Any]] = set()


def cancel_requests() -> None:
    """Cancel what any server of this process is asked, in whatever thread: there, CancelledError is raised.

    Ctrl-C cancels by itself what the main thread asks.
    """
    for future in list(_under_way):
        future.cancel()


@dataclass
class Usage:
    """What this process asked and was answered; tokens as the server counted them.

    Attributes:
        requests: HTTP requests that were answered.
        malformed: answers that could not be used, and were asked for again.
        remembered: requests whose answers were on disk.
    """

    requests: int = 0
    malformed: int = 0
    remembered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ServerError(RuntimeError):
    """A server that gave no answer after all retries; what it answered before is kept.

    Attributes:
        refused: whether it said that it does not take this very request (a status of 400 and the like), so that others may
            fare better, or answered it with what can't be used; false where it is down, overloaded, or wants another key.
        unusable: whether its answers can't be used.
        body: what it answered, as it came; never shown.
    """

    def __init__(self, message: str, *, refused: bool = False, unusable: bool = False, body: str = "") -> None:
        super().__init__(message)
        self.refused, self.unusable, self.body = refused or unusable, unusable, body


class Server:
    """A client of one model on one server.

    Requests run on an event loop in a thread of its own, so that callers may have a loop of theirs (a notebook), and Ctrl-C
    cancels what is under way.

    Args:
        config: where it is, and how it may be asked.
        store: keeps the answers; None for no memory.

    Attributes:
        model: the model asked for by name; may change while nothing is under way.
        version: of the weights behind that name; answers of another version are not remembered.
        usage: what was asked and answered.
        changes: fields that the server said it does not take; they are renamed or left out.

    Raises:
        ValueError: the package `openai` is missing, or the environment variable with the key, or the server's host; or
            the variable holds what is no key.
    """

    def __init__(self, config: ServerConfig, store: Store | None = None) -> None:
        try:
            import openai  # noqa: F401
        except ImportError:
            raise ValueError(f"a server needs the package openai: {install_hint('server')}") from None
        self.config, self.usage, self._store = config, Usage(), store
        self._key = ApiKey(config.api_key_env, os.environ.get(config.api_key_env, "") if config.api_key_env else "")
        if config.api_key_env and not self._key.value:
            raise ValueError(
                f"server {config.base_url}: the environment variable {config.api_key_env} is not set; export it, or set "
                "api_key_env: none for a server without keys"
            )
        check_host(config.base_url, self._key)
        self._next_start = 0.0
        self.model, self.version = config.model, ""
        self._changes_key = Store.key(config.base_url, config.model, "fields")
        self.changes: Changes = {} if store is None else kept_changes(store.get(self._changes_key))
        self._said: set[str] = set()

    def ask(
        self, requests: Sequence[Request], *, done: Callable[[int], None] = lambda index: None
    ) -> list[list[Choice] | ServerError]:
        """Ask many things at once, and each of them once.

        Requests whose bodies are equal, their seeds among it, are one question, and get the same answers; so do those of other
        threads and processes with the same store, at the same time too. Who wants other samples of a prompt gives another
        seed, or none: equal requests that sample without a seed get answers of their own.

        Where many requests in a row end without an answer, the server is taken to be down, and the others are not sent.

        Args:
            requests: what to ask.
            done: told of each request that came to its end, by its place; called from the event loop's thread.

        Returns:
            For each request, in order, its answers: ``n`` or, where the server stopped giving more, fewer; or why there are
            none.
        """
        self._say_changes()
        questions = distinct_questions(requests)

        def answered(number: int) -> None:
            for place, _ in questions[number].places:
                done(place)

        found = self._run(lambda client: self._ask(client, [one.request for one in questions], answered))
        every: list[list[Choice] | ServerError] = [[] for _ in requests]
        for question, answer in zip(questions, found, strict=True):
            for place, own in question.places:
                every[place] = answer if isinstance(answer, ServerError) else answer[own]
        return every

    def _say_changes(self) -> None:
        for name, other in self.changes.items():
            if name not in self._said:
                self._said.add(name)
                say(f"{what_changes(name, other)} ({self.config.base_url})")

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        """Tell the server something that has no answer, such as to load an adapter.

        Args:
            path: under the server's root where it begins with ``//``, else under ``base_url``.
            body: the JSON.

        Raises:
            ServerError: it refuses, or what it says can't be read.
        """
        if path.startswith("//"):
            path = self.config.base_url.rstrip("/").removesuffix("/v1") + path[1:]
        try:
            self._run(lambda client: self._sent(client, path, body, self.config.max_retries))
        except Malformed as error:
            raise ServerError(f"server {self.config.base_url}: {self._key.hidden(str(error))}") from None

    def _run(self, work: Callable[[AsyncOpenAI], Awaitable[Result]]) -> Result:
        """Run work with a client on an event loop in a thread of its own."""
        from anyio.from_thread import start_blocking_portal

        async def connected() -> Result:
            async with self._client() as client:
                return await work(client)

        with start_blocking_portal() as portal:
            future = portal.start_task_soon(connected)
            _under_way.add(future)
            try:
                return future.result()
            finally:
                _under_way.discard(future)

    async def _ask(
        self, client: AsyncOpenAI, requests: Sequence[Request], done: Callable[[int], None]
    ) -> list[list[Choice] | ServerError]:
        most, in_a_row = _GIVE_UP_AFTER * self.config.max_concurrency, 0.0
        not_asked = (
            f"server {self.config.base_url}: not asked, since {most} requests in a row had no answer, or "
            f"{most / _UNUSABLE:.0f} none that can be used"
        )
        found: list[list[Choice] | ServerError] = [ServerError(not_asked) for _ in requests]
        open_, since = list(enumerate(requests)), dict[int, float]()

        async def work(waiting: Iterator[tuple[int, Request]], elsewhere: list[tuple[int, Request]]) -> None:
            nonlocal in_a_row
            for index, request in waiting:
                if in_a_row < most:
                    # A process that was stopped keeps its claims: nobody waits longer than for an answer of one's own.
                    waited = time.monotonic() - since.setdefault(index, time.monotonic())
                    try:
                        answers = await self._answers(client, request, claimed=waited > self.config.timeout_seconds)
                    except ServerError as error:
                        found[index] = error
                        in_a_row += _UNUSABLE if error.unusable else not error.refused
                    else:
                        if answers is None:
                            elsewhere.append((index, request))
                            continue
                        found[index], in_a_row = answers, 0.0
                done(index)

        while open_:
            waiting, elsewhere = iter(open_), list[tuple[int, Request]]()
            await gather(*(work(waiting, elsewhere) for _ in range(min(self.config.max_concurrency, len(open_)))))
            open_ = elsewhere
            if open_:
                await sleep(_LOOK_AGAIN)
        return found

    def _client(self) -> AsyncOpenAI:
        return connect(
            self.config.base_url,
            self._key,
            seconds=self.config.timeout_seconds,
            retries=self.config.max_retries,
            told=self._say_wait,
        )

    def _say_wait(self, text: str) -> None:
        if _WAIT not in self._said:
            self._said.add(_WAIT)
            say(text)

    async def _answers(self, client: AsyncOpenAI, request: Request, *, claimed: bool) -> list[Choice] | None:
        """The answers to one request, those on disk first; None while another thread or process asks for them.

        ``claimed`` says that it is asked all the same.
        """
        key = Store.key(self.config.base_url, self.model, self.version, request.kind, dict(request.body))
        kept = self._kept(key)[: request.n]
        if len(kept) == request.n:
            self.usage.remembered += 1
            return kept
        if self._store is None:
            return await self._asked(client, request, key, kept)
        own = self._store.claim(key)
        if not own and not claimed:
            return None
        try:
            # Whoever held the claim before may have been answered since the look above.
            kept = self._kept(key)[: request.n]
            self.usage.remembered += len(kept) == request.n
            return await self._asked(client, request, key, kept)
        finally:
            if own:
                self._store.release(key)

    async def _asked(self, client: AsyncOpenAI, request: Request, key: str, choices: list[Choice]) -> list[Choice]:
        """The answers that are there, and those that are still to be asked for, each kept as it comes."""
        malformed = 0
        while len(choices) < request.n:
            try:
                found = await self._choices(
                    client, request, request.n - len(choices), number=len(choices) + malformed, malformed=malformed
                )
            except Malformed as error:
                malformed += 1
                self.usage.malformed += 1
                if malformed > self.config.max_retries:
                    if choices:
                        return choices
                    said = f"gave no usable answer {malformed} times: {self._key.hidden(str(error))}"
                    raise ServerError(f"server {self.config.base_url} {said}", unusable=True) from None
                await sleep(min(_FIRST_PAUSE * 2**malformed, _LONGEST_PAUSE) * (1 - 0.25 * random.random()))
                continue
            choices += found[: request.n - len(choices)]
            if self._store is not None:
                self._store.put(key, [asdict(choice) for choice in choices])
        return choices

    def _kept(self, key: str) -> list[Choice]:
        return [] if self._store is None else self._store.get_as(key, CHOICES) or []

    async def _choices(self, client: AsyncOpenAI, request: Request, n: int, *, number: int, malformed: int) -> list[Choice]:
        """What the server answers to one HTTP request.

        Args:
            client: sends it.
            request: what to ask.
            n: how many choices.
            number: tells those apart that ask the same.
            malformed: how many answers to it could not be used: each is a retry, of which there are so many fewer.

        Raises:
            Malformed: the answer can't be used.
            ServerError: there is none.
        """
        body = {**request.body, "model": self.model}
        if n > 1:
            body["n"] = n
        if number and "seed" in body:
            # The same seed would answer the same again.
            body["seed"] = (body["seed"] + 7919 * number) % 2**31
        if self.config.requests_per_minute:
            now = time.monotonic()
            start = max(self._next_start, now)
            self._next_start = start + 60 / self.config.requests_per_minute
            await sleep(start - now)
        path = "/chat/completions" if request.kind == "chat" else "/completions"
        text = await self._taken(client, path, body, request, self.config.max_retries - malformed)
        self.usage.requests += 1
        answer = read_answer(text, hidden=self._key.hidden)
        self.usage.prompt_tokens += answer.prompt_tokens
        self.usage.completion_tokens += answer.completion_tokens
        if self._key.is_secret() and any(self._key.value in part for choice in answer.choices for part in choice.texts()):
            raise Malformed(f"it holds the key in {self._key.variable}, which is written to no file")
        return answer.choices

    async def _taken(self, client: AsyncOpenAI, path: str, body: Mapping[str, Any], request: Request, retries: int) -> str:
        """What the server answers without the fields that it says it does not take, which are remembered once it has."""
        changes = dict(self.changes)
        while True:
            sent = changed(body, changes)
            try:
                text = await self._sent(client, path, sent, retries)
                break
            except ServerError as error:
                field = refused_field(error.body, sent, request.needed) if error.refused else None
                if field is None:
                    raise
                renamed = next((name for name, other in changes.items() if other == field), None)
                changes[renamed or field] = None if renamed else name_instead(field, self._key.hidden(error.body), {field})
        if changes != self.changes:
            self.changes |= changes
            self._say_changes()
            if self._store is not None:
                self._store.put(self._changes_key, self.changes)
        return text

    async def _sent(self, client: AsyncOpenAI, path: str, body: Mapping[str, Any], retries: int) -> str:
        from openai import OpenAIError

        try:
            return await client.post(path, body=dict(body), cast_to=str, options={"max_retries": retries})
        except OpenAIError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: OpenAIError) -> ServerError:
        from openai import APIStatusError

        if not isinstance(error, APIStatusError):
            cause = f"{error} {error.__cause__ or ''}".strip()
            return ServerError(f"server {self.config.base_url}: {reason_of(self._key.hidden(cause))}")
        status, response = error.status_code, error.response
        said = reason_of(self._key.hidden(response.text) or self._key.hidden(str(error)))
        advice = {
            401: f"; is the key in {self.config.api_key_env} right?",
            404: f"; does it serve the model {self.model!r}?",
            429: "; lower max_concurrency or set requests_per_minute",
        }.get(status, "")
        if 300 <= status < 400:
            place = reason_of(self._key.hidden(response.headers.get("location", "")))
            said = f"it redirects to {place!r}, and no redirect is followed; set base_url to where it really is"
        elif (wait := asked_to_wait(response)) > LONGEST_WAIT:
            advice += (
                f"; it asks to wait {wait:.0f} s (Retry-After), and no more than {LONGEST_WAIT:.0f} s are waited: rerun then"
            )
        message = f"server {self.config.base_url}: status {status}: {said}{advice}"
        return ServerError(message, refused=status in _ABOUT_THE_REQUEST, body=response.text)

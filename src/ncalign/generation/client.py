"""Any server that speaks OpenAI's chat and completions API: asked many things at once, and never the same thing twice.

The `openai` library sends requests and repeats those that the network or the server refuses (backoff with jitter, Retry-After).
Added here: how many are under way, how many begin in a minute, a deadline and a size for each (`transport`), the check of what
comes back (`wire`), further requests where there were fewer choices than asked for, a store on disk of what was answered, and
several servers of one model (`hosts`).
"""

from __future__ import annotations

import os
import random
import time
from asyncio import gather, sleep
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ncalign.core.install import install_hint
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.generation.config import ServerConfig
from ncalign.generation.failures import DOWN, ServerError, is_elsewhere, server_error
from ncalign.generation.hosts import WEIGHT_INFO, Host, Hosts, Order, version_said
from ncalign.generation.questions import Request, distinct_questions
from ncalign.generation.refusals import Changes, changed, kept_changes, name_instead, refused_field, what_changes
from ncalign.generation.transport import ApiKey, check_host, connect, is_healthy
from ncalign.generation.wire import CHOICES, Choice, Malformed, Usage, read_answer

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Result = TypeVar("Result")
Clients: TypeAlias = "Mapping[str, AsyncOpenAI]"
"""A client for each server, by its URL."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
# Seconds between looks for an answer that another process is asking for.
_LOOK_AGAIN = 0.1
# Of several servers: how often one is asked again before another.
_RETRIES_OF_ONE = 1
# What vLLM says to an adapter that it has.
_ALREADY = 400
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


class Server:
    """A client of one model on one server, or on several that are asked in turn.

    Of several, one that fails is set aside, which is said; what it was asked is asked elsewhere, and it is looked at now and
    then until it is healthy: then it is given the last orders again, and asked again.

    Requests run on an event loop in a thread of its own, so that callers may have a loop of theirs (a notebook), and Ctrl-C
    cancels what is under way.

    Args:
        config: where it is, and how it may be asked.
        store: keeps the answers; None for no memory.

    Attributes:
        model: the model asked for by name; may change while nothing is under way.
        version: of the weights behind that name; answers of another version are not remembered.
        weights: the version that a server must say it holds (vLLM's `/weight_info`), or its answers don't count: one that was
            started anew has others. None: it is not asked.
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
                f"server {config.urls[0]}: the environment variable {config.api_key_env} is not set; export it, or set "
                "api_key_env: none for a server without keys"
            )
        for url in config.urls:
            check_host(url, self._key)
        self._hosts, self._orders = Hosts(config.urls), tuple[Order, ...]()
        self._name = f"server {config.urls[0]}" if len(config.urls) == 1 else f"servers {', '.join(config.urls)}"
        self._next_start = 0.0
        self.model, self.version = config.model, ""
        self.weights: str | None = None
        self._changes_key = Store.key(config.urls[0], config.model, "fields")
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

        found = self._run(lambda clients: self._ask(clients, [one.request for one in questions], answered))
        every: list[list[Choice] | ServerError] = [[] for _ in requests]
        for question, answer in zip(questions, found, strict=True):
            for place, own in question.places:
                every[place] = answer if isinstance(answer, ServerError) else answer[own]
        return every

    def _say_changes(self) -> None:
        for name, other in self.changes.items():
            if name not in self._said:
                self._said.add(name)
                say(f"{what_changes(name, other)} ({self.config.urls[0]})")

    def alone(self, url: str) -> Server:
        """A client of one of the servers as it is now, which remembers nothing."""
        found = Server(self.config.model_copy(update={"base_url": url, "base_urls": ()}))
        found.model, found.version, found.changes = self.model, self.version, dict(self.changes)
        found.weights = self.weights
        return found

    def order(self, orders: Sequence[Order], *, told: bool = False) -> None:
        """Tell every server something that has no answer, such as to load an adapter, and again whenever one comes back.

        Args:
            orders: in this order.
            told: another process has told them already.

        Raises:
            ServerError: one refuses, or what it says can't be read, or none answers.
        """
        self._orders = tuple(orders)
        if told:
            return

        async def tell(clients: Clients) -> None:
            await self._look_again(clients)
            last: ServerError | None = None
            for host in self._hosts.in_service() or [*self._hosts.all]:
                try:
                    await self._ordered(clients, host)
                    host.look_at = None
                except ServerError as error:
                    if len(clients) == 1 or not is_elsewhere(error):
                        raise
                    self._set_aside(host, last := error)
            if last is not None and not self._hosts.in_service():
                raise last

        self._run(tell)

    def at_once(
        self, orders: Mapping[str, Order], *, retries: int = 0, failed: Callable[[ServerError], None] = lambda error: None
    ) -> dict[str, str | ServerError]:
        """Ask servers something of each at the same time, such as what none of them answers before all are asked.

        Args:
            orders: by the servers' URLs.
            retries: how often one is asked again that can't be reached.
            failed: told at once of one that fails, from another thread; the others are waited for.

        Returns:
            What each answers, or how it fails.
        """

        async def ask(clients: Clients) -> dict[str, str | ServerError]:
            async def one(url: str, order: Order) -> str | ServerError:
                try:
                    return await self._posted(clients, Host(url), order.url(url), order.body, retries)
                except (ServerError, Malformed) as error:
                    told = error if isinstance(error, ServerError) else ServerError(f"server {url}: {error}")
                    failed(told)
                    return told

            return dict(zip(orders, await gather(*(one(*item) for item in orders.items())), strict=True))

        return self._run(ask)

    def ask_all(self, order: Order) -> dict[str, str]:
        """What all servers answer, by URL; of several, those that can't be reached are set aside, and others back in service.

        Raises:
            ServerError: one refuses, or none answers.
        """
        one = len(self._hosts.all) == 1
        retries = self.config.max_retries if one else _RETRIES_OF_ONE
        found = self.at_once(dict.fromkeys(self.config.urls, order), retries=retries)
        failed = {url: answer for url, answer in found.items() if isinstance(answer, ServerError)}
        for error in failed.values():
            if one or len(failed) == len(found) or not is_elsewhere(error):
                raise error
        for host in self._hosts.all:
            if host.url in failed:
                self._set_aside(host, failed[host.url])
            else:
                host.look_at = None
        return {url: answer for url, answer in found.items() if not isinstance(answer, ServerError)}

    async def _ordered(self, clients: Clients, host: Host, *, again: bool = False) -> None:
        """Give a server the orders; ``again`` those alone that it needs, of which another process may have been sooner."""
        retries = self.config.max_retries if len(clients) == 1 else _RETRIES_OF_ONE
        for order in self._orders:
            if again and not order.needed:
                continue
            try:
                await self._posted(clients, host, order.url(host.url), order.body, retries)
            except Malformed as error:
                if order.needed:
                    raise ServerError(f"server {host.url}: {self._key.hidden(str(error))}") from None
            except ServerError as error:
                if error.status is None or (order.needed and not (again and error.status == _ALREADY)):
                    raise

    def _run(self, work: Callable[[Clients], Awaitable[Result]]) -> Result:
        """Run work with a client of each server on an event loop in a thread of its own."""
        from anyio.from_thread import start_blocking_portal

        async def connected() -> Result:
            async with AsyncExitStack() as stack:
                urls = self.config.urls
                return await work({url: await stack.enter_async_context(self._client(url)) for url in urls})

        with start_blocking_portal() as portal:
            future = portal.start_task_soon(connected)
            _under_way.add(future)
            try:
                return future.result()
            finally:
                _under_way.discard(future)

    async def _ask(
        self, clients: Clients, requests: Sequence[Request], done: Callable[[int], None]
    ) -> list[list[Choice] | ServerError]:
        workers = self.config.max_concurrency * len(clients)
        most, in_a_row = _GIVE_UP_AFTER * workers, 0.0
        not_asked = (
            f"{self._name}: not asked, since {most} requests in a row had no answer, or "
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
                        answers = await self._answers(clients, request, claimed=waited > self.config.timeout_seconds)
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
            await gather(*(work(waiting, elsewhere) for _ in range(min(workers, len(open_)))))
            open_ = elsewhere
            if open_:
                await sleep(_LOOK_AGAIN)
        return found

    def _client(self, url: str) -> AsyncOpenAI:
        return connect(
            url,
            self._key,
            seconds=self.config.timeout_seconds,
            retries=self.config.max_retries,
            told=self._say_wait,
        )

    def _say_wait(self, text: str) -> None:
        if _WAIT not in self._said:
            self._said.add(_WAIT)
            say(text)

    async def _answers(self, clients: Clients, request: Request, *, claimed: bool) -> list[Choice] | None:
        """The answers to one request, those on disk first; None while another thread or process asks for them.

        ``claimed`` says that it is asked all the same.
        """
        key = Store.key(self.config.urls[0], self.model, self.version, request.kind, dict(request.body))
        kept = self._kept(key)[: request.n]
        if len(kept) == request.n:
            self.usage.remembered += 1
            return kept
        if self._store is None:
            return await self._asked(clients, request, key, kept)
        own = self._store.claim(key)
        if not own and not claimed:
            return None
        try:
            # Whoever held the claim before may have been answered since the look above.
            kept = self._kept(key)[: request.n]
            self.usage.remembered += len(kept) == request.n
            return await self._asked(clients, request, key, kept)
        finally:
            if own:
                self._store.release(key)

    async def _asked(self, clients: Clients, request: Request, key: str, choices: list[Choice]) -> list[Choice]:
        """The answers that are there, and those that are still to be asked for, each kept as it comes."""
        malformed = 0
        while len(choices) < request.n:
            try:
                found = await self._choices(
                    clients, request, request.n - len(choices), number=len(choices) + malformed, malformed=malformed
                )
            except Malformed as error:
                malformed += 1
                self.usage.malformed += 1
                if malformed > self.config.max_retries:
                    if choices:
                        return choices
                    said = f"gave no usable answer {malformed} times: {self._key.hidden(str(error))}"
                    raise ServerError(f"{self._name} {said}", unusable=True) from None
                await sleep(min(_FIRST_PAUSE * 2**malformed, _LONGEST_PAUSE) * (1 - 0.25 * random.random()))
                continue
            choices += found[: request.n - len(choices)]
            if self._store is not None:
                self._store.put(key, [asdict(choice) for choice in choices])
        return choices

    def _kept(self, key: str) -> list[Choice]:
        return [] if self._store is None else self._store.get_as(key, CHOICES) or []

    async def _choices(self, clients: Clients, request: Request, n: int, *, number: int, malformed: int) -> list[Choice]:
        """What the server answers to one HTTP request.

        Args:
            clients: of which one sends it.
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
        text = await self._taken(clients, path, body, request, self.config.max_retries - malformed)
        self.usage.requests += 1
        answer = read_answer(text, hidden=self._key.hidden)
        self.usage.prompt_tokens += answer.prompt_tokens
        self.usage.completion_tokens += answer.completion_tokens
        if self._key.is_secret() and any(self._key.value in part for choice in answer.choices for part in choice.texts()):
            raise Malformed(f"it holds the key in {self._key.variable}, which is written to no file")
        return answer.choices

    async def _taken(self, clients: Clients, path: str, body: Mapping[str, Any], request: Request, retries: int) -> str:
        """What the server answers without the fields that it says it does not take, which are remembered once it has."""
        changes = dict(self.changes)
        while True:
            sent = changed(body, changes)
            try:
                text = await self._sent(clients, path, sent, retries)
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

    async def _sent(self, clients: Clients, path: str, body: Mapping[str, Any], retries: int) -> str:
        """What a server answers; of several, the next one is asked where one fails."""
        failures = 0
        while True:
            await self._look_again(clients)
            with self._hosts.next() as host:
                try:
                    own = retries if len(clients) == 1 else min(retries, _RETRIES_OF_ONE)
                    text = await self._posted(clients, host, path, body, own)
                    await self._refuse_other_weights(clients, host)
                    return text
                except ServerError as error:
                    # A server that was started anew has no adapter: it is given its orders again when it comes back.
                    forgot = error.status == 404 and bool(self._orders)
                    if len(clients) == 1 or failures >= retries or not (forgot or is_elsewhere(error)):
                        raise
                    failures += 1
                    if forgot or error.status is None or error.status in DOWN:
                        self._set_aside(host, error)
            if not self._hosts.in_service():
                await sleep(min(_FIRST_PAUSE * 2**failures, _LONGEST_PAUSE))

    def _set_aside(self, host: Host, error: ServerError) -> None:
        if self._hosts.set_aside(host):
            left = f"{len(self._hosts.in_service())} of {len(self._hosts.all)} are in service"
            say(f"warning: {error}: it is set aside, and what it was asked is asked elsewhere ({left})")

    async def _look_again(self, clients: Clients) -> None:
        """Take servers that are healthy again back into service, once they have the last orders."""
        for host in self._hosts.due():
            if not await is_healthy(clients[host.url], host.url):
                continue
            try:
                await self._ordered(clients, host, again=True)
                await self._refuse_other_weights(clients, host)
            except ServerError:
                continue
            host.look_at = None
            say(f"note: server {host.url} is healthy again, and asked again")

    async def _refuse_other_weights(self, clients: Clients, host: Host) -> None:
        """Raise where a server must hold certain weights, and says that it holds others.

        Asked after an answer: a server that was started anew, also while nobody looked, says so from then on.
        """
        if self.weights is None:
            return
        said = await self._posted(clients, host, Order(WEIGHT_INFO, None).url(host.url), None, _RETRIES_OF_ONE)
        if version_said(said) != self.weights:
            raise ServerError(
                f"server {host.url} has lost the weights of {self.weights}: it was started anew, or something else gave it "
                "others; it gets them before the next round, or where the same command goes on"
            )

    async def _posted(self, clients: Clients, host: Host, path: str, body: Mapping[str, Any] | None, retries: int) -> str:
        from openai import OpenAIError

        client = clients[host.url]
        try:
            if body is None:
                return await client.get(path, cast_to=str, options={"max_retries": retries})
            return await client.post(path, body=dict(body), cast_to=str, options={"max_retries": retries})
        except OpenAIError as error:
            raise server_error(error, host.url, key=self._key, model=self.model) from None

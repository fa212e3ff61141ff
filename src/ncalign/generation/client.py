"""Any server that speaks OpenAI's chat and completions API: asked many things at once, and never the same thing twice.

The `openai` library sends requests and repeats those that the network or the server refuses (backoff with jitter, Retry-After).
Added here: how many are under way, how many begin in a minute, a deadline for each, the check of what comes back (half JSON,
fewer choices than asked for, impossible log-probs), and a store on disk of what was answered.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from asyncio import gather, sleep
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError, model_validator

from ncalign.core.install import install_hint
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.generation.config import ServerConfig
from ncalign.generation.questions import Request, distinct_questions
from ncalign.generation.refusals import Changes, changed, name_instead, reason_of, refused_field, what_changes

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Result = TypeVar("Result")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
# Seconds between looks for an answer that another process is asking for.
_LOOK_AGAIN = 0.1
_ABOUT_THE_REQUEST = frozenset({400, 404, 413, 422})
# Requests in a row without an answer after which no more are sent, as a multiple of those under way at a time.
_GIVE_UP_AFTER = 2
# Keys of fewer characters are placeholders for servers without keys ("EMPTY", "ollama"), and words that a model may say.
_SECRET_LENGTH = 16
# Of an answer that is an error in spite of its status.
_HEAD = 1000
# Finish reasons, as servers spell them: the limit on tokens, a filter, and the server's own failure.
_CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})
_WITHHELD = frozenset({"content_filter", "safety", "recitation", "blocklist", "prohibited_content"})
_BROKEN_OFF = frozenset({"error", "abort", "cancelled", "insufficient_system_resource"})

# In nats. Rounding may put the log-prob of a certain token a little above 0.
Logprob = Annotated[float, Field(le=1e-3, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        text: what was answered.
        finished: whether the model ended it; false when a limit cut it.
        num_tokens: of the answer; None where the server does not say.
        logprob: sum of its tokens' log-probs, in nats; None where the server does not give them.
        top: for each token, the likeliest alternatives with their log-probs; empty where they were not asked for.
        withheld: whether a filter of the server's ended it, and no limit on its length.
    """

    text: str
    finished: bool
    num_tokens: int | None = None
    logprob: Logprob | None = None
    top: tuple[Mapping[str, Logprob], ...] = ()
    withheld: bool = False


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
            fare better; false where it is down, overloaded, or wants another key.
        body: what it answered, as it came; never shown.
    """

    def __init__(self, message: str, *, refused: bool = False, body: str = "") -> None:
        super().__init__(message)
        self.refused, self.body = refused, body


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
        ValueError: the package `openai` is missing, or the environment variable with the key, or the server's host.
    """

    def __init__(self, config: ServerConfig, store: Store | None = None) -> None:
        try:
            import openai  # noqa: F401
        except ImportError:
            raise ValueError(f"a server needs the package openai: {install_hint('server')}") from None
        self.config, self.usage, self._store = config, Usage(), store
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if config.api_key_env and not self._key:
            raise ValueError(
                f"server {config.base_url}: the environment variable {config.api_key_env} is not set; export it, or set "
                "api_key_env: none for a server without keys"
            )
        check_host(config.base_url)
        self._next_start = 0.0
        self.model, self.version = config.model, ""
        self._changes_key = Store.key(config.base_url, config.model, "fields")
        try:
            kept = None if store is None else store.get(self._changes_key)
            self.changes: Changes = _CHANGES.validate_python(kept or {})
        except ValidationError:
            self.changes = {}
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
            ServerError: it refuses.
        """
        if path.startswith("//"):
            path = self.config.base_url.rstrip("/").removesuffix("/v1") + path[1:]
        self._run(lambda client: self._sent(client, path, body))

    def _run(self, work: Callable[[AsyncOpenAI], Awaitable[Result]]) -> Result:
        """Run work with a client on an event loop in a thread of its own."""
        from anyio.from_thread import start_blocking_portal

        async def connected() -> Result:
            async with self._client() as client:
                return await work(client)

        with start_blocking_portal() as portal:
            return portal.call(connected)

    async def _ask(
        self, client: AsyncOpenAI, requests: Sequence[Request], done: Callable[[int], None]
    ) -> list[list[Choice] | ServerError]:
        most, in_a_row = _GIVE_UP_AFTER * self.config.max_concurrency, 0
        not_asked = f"server {self.config.base_url}: not asked, since {most} requests in a row had no answer"
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
                        in_a_row += not error.refused
                    else:
                        if answers is None:
                            elsewhere.append((index, request))
                            continue
                        found[index], in_a_row = answers, 0
                done(index)

        while open_:
            waiting, elsewhere = iter(open_), list[tuple[int, Request]]()
            await gather(*(work(waiting, elsewhere) for _ in range(min(self.config.max_concurrency, len(open_)))))
            open_ = elsewhere
            if open_:
                await sleep(_LOOK_AGAIN)
        return found

    def _client(self) -> AsyncOpenAI:
        import openai
        from anyio import fail_after

        seconds = self.config.timeout_seconds

        class WithDeadline(openai.DefaultAsyncHttpxClient):
            """Bounds the whole request: the library's own limits bound each wait for bytes, however many there are."""

            async def send(self, request: Any, **options: Any) -> Any:
                try:
                    with fail_after(seconds):
                        return await super().send(request, **options)
                except TimeoutError as error:
                    # What openai repeats a request for: an error of httpx or of httpx2, whichever this version of it uses.
                    raise sys.modules[type(request).__module__].ReadTimeout(str(error)) from error

        return openai.AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=self._key or "none",
            timeout=None,
            max_retries=self.config.max_retries,
            http_client=WithDeadline(),
        )

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
                found = await self._choices(client, request, request.n - len(choices), number=len(choices) + malformed)
            except _Malformed as error:
                malformed += 1
                self.usage.malformed += 1
                if malformed > self.config.max_retries:
                    if choices:
                        return choices
                    raise ServerError(
                        f"server {self.config.base_url} gave no usable answer {malformed} times: {error}", refused=True
                    ) from None
                await sleep(min(_FIRST_PAUSE * 2**malformed, _LONGEST_PAUSE) * (1 - 0.25 * random.random()))
                continue
            choices += found[: request.n - len(choices)]
            if self._store is not None:
                self._store.put(key, [asdict(choice) for choice in choices])
        return choices

    def _kept(self, key: str) -> list[Choice]:
        try:
            return _CHOICES.validate_python(None if self._store is None else self._store.get(key) or [])
        except ValidationError:  # kept by a version that checked less
            return []

    async def _choices(self, client: AsyncOpenAI, request: Request, n: int, *, number: int) -> list[Choice]:
        """What the server answers to one HTTP request; ``number`` tells those apart that ask the same."""
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
        text = await self._taken(client, "/chat/completions" if request.kind == "chat" else "/completions", body, request)
        self.usage.requests += 1
        if len(self._key) >= _SECRET_LENGTH:
            text = self._without_key(text)
        try:
            answer = _Answer.model_validate_json(text)
        except ValidationError as error:
            [first, *_] = error.errors(include_url=False, include_input=False)
            place = "".join(f"{part}: " for part in first["loc"])
            said = reason_of(text) if '"error"' in text[:_HEAD] else f"{place}{first['msg']} in {text[:200]!r}"
            raise _Malformed(self._without_key(said)) from None
        counted = answer.usage or _Usage()
        self.usage.prompt_tokens += counted.prompt_tokens or 0
        self.usage.completion_tokens += counted.completion_tokens or 0
        found = [choice.read() for choice in answer.choices if choice.finish_reason not in _BROKEN_OFF]
        if not found:
            raise _Malformed(f"the server broke off: finish_reason {answer.choices[0].finish_reason}")
        if len(found) == 1 and found[0].num_tokens is None:
            found = [replace(found[0], num_tokens=counted.completion_tokens or None)]
        return found

    async def _taken(self, client: AsyncOpenAI, path: str, body: Mapping[str, Any], request: Request) -> str:
        """What the server answers without the fields that it says it does not take, which are remembered once it has."""
        changes = dict(self.changes)
        while True:
            sent = changed(body, changes)
            try:
                text = await self._sent(client, path, sent)
                break
            except ServerError as error:
                field = refused_field(error.body, sent, request.needed) if error.refused else None
                if field is None:
                    raise
                renamed = next((name for name, other in changes.items() if other == field), None)
                changes[renamed or field] = None if renamed else name_instead(field, error.body, {field})
        if changes != self.changes:
            self.changes |= changes
            self._say_changes()
            if self._store is not None:
                self._store.put(self._changes_key, self.changes)
        return text

    async def _sent(self, client: AsyncOpenAI, path: str, body: Mapping[str, Any]) -> str:
        from openai import APIStatusError, OpenAIError

        try:
            return await client.post(path, body=dict(body), cast_to=str)
        except OpenAIError as error:
            status, answered = (error.status_code, error.response.text) if isinstance(error, APIStatusError) else (0, "")
            said = self._without_key(reason_of(self._without_key(answered) or str(error)))
            advice = {
                401: f"; is the key in {self.config.api_key_env} right?",
                404: f"; does it serve the model {self.model!r}?",
                429: "; lower max_concurrency or set requests_per_minute",
            }.get(status, "")
            message = f"server {self.config.base_url}: {f'status {status}: ' if status else ''}{said}{advice}"
            raise ServerError(message, refused=status in _ABOUT_THE_REQUEST, body=answered) from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Malformed(ValueError):
    """An answer that can't be used."""


# --- What is read of a server's answer: fields that one API or another names, whatever else it holds ------------------------


class _Token(BaseModel):
    token: str
    logprob: Logprob
    top_logprobs: list[_Token] | None = None


class _Logprobs(BaseModel):
    content: list[_Token] | None = None  # the chat API's; llama.cpp gives it in the completions API too
    token_logprobs: list[Logprob | None] | None = None  # the completions API's; None where a token has no left context


class _Usage(BaseModel):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class _Part(BaseModel):
    type: str = "text"
    text: str | None = None

    def is_text(self) -> bool:
        """Whether it is said, and not thought."""
        return self.type in ("text", "output_text")


class _Message(BaseModel):
    # Null where the model's tokens ended in its thoughts, where it called a tool, or said nothing: an answer without text.
    content: str | list[str | _Part] | None = None
    refusal: str | None = None

    def read(self) -> str:
        parts = self.content if isinstance(self.content, list) else [self.content or ""]
        texts = [
            part if isinstance(part, str) else part.text or "" for part in parts if isinstance(part, str) or part.is_text()
        ]
        return "".join(texts) or self.refusal or ""


class _WireChoice(BaseModel):
    message: _Message | None = None
    text: str | None = None
    finish_reason: Annotated[str, AfterValidator(str.lower)] | None = None
    logprobs: _Logprobs | None = None

    @model_validator(mode="after")
    def _has_an_answer(self) -> _WireChoice:
        if self.message is None and self.text is None:
            raise ValueError("neither message nor text")
        return self

    def read(self) -> Choice:
        given = self.logprobs or _Logprobs()
        tokens, values = given.content, given.token_logprobs
        if values is None and tokens is not None:
            values = [token.logprob for token in tokens]
        top = tuple({one.token: one.logprob for one in token.top_logprobs or ()} for token in tokens or ())
        return Choice(
            self.message.read() if self.message is not None else self.text or "",
            finished=self.finish_reason not in _CUT | _WITHHELD,
            num_tokens=None if values is None else len(values),
            logprob=None if values is None else float(sum(value for value in values if value is not None)),
            top=top if any(top) else (),
            withheld=self.finish_reason in _WITHHELD,
        )


class _Answer(BaseModel):
    choices: list[_WireChoice] = Field(min_length=1)
    usage: _Usage | None = None


_CHOICES = TypeAdapter(list[Choice])
_CHANGES = TypeAdapter(Changes)


def check_host(url: str) -> None:
    """Raise where the host of a URL has no address: asking again and again would not give it one.

    Raises:
        ValueError: there is no such host. A proxy may know hosts that this machine does not, and is not second-guessed.
    """
    parts = urlsplit(url)
    if parts.hostname is None or (getproxies().get(parts.scheme) and not proxy_bypass(parts.hostname)):
        return
    try:
        socket.getaddrinfo(parts.hostname, None)
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
            return
        raise ValueError(f"server {url}: there is no host {parts.hostname!r}: check base_url and the network") from None

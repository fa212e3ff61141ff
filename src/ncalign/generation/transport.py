"""How requests reach a server, whatever it does: no headers but ours, no other host, a deadline, a largest size of answers."""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ncalign.core.progress import say
from ncalign.generation.hosts import root_of
from ncalign.generation.wire import Malformed

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MOST_BYTES = 2**26
"""Size of an answer, unpacked, at which it is cut: about 700,000 tokens with their log-probs."""

LONGEST_WAIT = 120.0
"""Seconds that are waited where a server asks for it (Retry-After); one that asks for more is not asked again."""

_MOST_BYTES_OF_AN_ERROR = 2**16
# Seconds that a server may take to say that it is healthy.
_HEALTHY_WITHIN = 5.0
# Seconds that a server may ask for without that being said.
_SHORT_WAIT = 10.0
# Of an answer, what the library reads to decide on a retry, and we to say why there is none.
_READ_HEADERS = ("location", "retry-after", "x-should-retry")
# Of fewer characters, a key is a placeholder for servers without keys ("EMPTY", "ollama"), and a word that anyone may say.
_SECRET_LENGTH = 16
_warned: set[str] = set()


class ApiKey:
    """A key that is sent and never shown.

    Args:
        variable: the environment variable that it came from; None where there is none.
        value: the key; empty where there is none.

    Raises:
        ValueError: it can't be sent.
    """

    def __init__(self, variable: str | None, value: str) -> None:
        self.variable, self.value = variable, value.strip()
        if not (self.value.isascii() and self.value.isprintable()):
            raise ValueError(
                f"the environment variable {variable} holds letters or control characters that no key has: export the key alone"
            )
        # As it is, or as JSON, a URL or a page would spell it.
        letters = [
            rf"(?:\\?{re.escape(one)}|%{ord(one):02x}|\\u{ord(one):04x}|&#(?:x{ord(one):x}|{ord(one)});)" for one in self.value
        ]
        spelt = "".join(letters) if self.is_secret() else rf"(?<!\w){re.escape(self.value)}(?!\w)"
        self._spelt = re.compile(spelt, re.IGNORECASE if self.is_secret() else 0) if self.value else None

    def is_secret(self) -> bool:
        """Whether it is long enough to be one, and no placeholder."""
        return len(self.value) >= _SECRET_LENGTH

    def hidden(self, text: str) -> str:
        """A text for a message, without the key.

        >>> ApiKey("K", "test").hidden("'test' is no key; the latest is")
        "'***' is no key; the latest is"
        """
        return text if self._spelt is None else self._spelt.sub("***", text)


def connect(
    url: str, key: ApiKey, *, seconds: float, retries: int, told: Callable[[str], None] = lambda text: None
) -> AsyncOpenAI:
    """A client of the server at a URL.

    Args:
        url: of its API.
        key: sent with each request where there is one, and nothing else that the environment holds.
        seconds: the deadline of a request, from its beginning to the last byte of its answer.
        retries: how often a request is repeated that the network or the server refuses.
        told: told of a long wait that the server asks for.

    Returns:
        A client. Its requests raise :class:`Malformed` where an answer is larger than :data:`MOST_BYTES` or no UTF-8. It
        follows no redirect.
    """
    import openai
    from anyio import fail_after

    class Bounded(openai.DefaultAsyncHttpxClient):
        """Bounds the whole request: the library's own limits bound each wait for bytes, however many there are."""

        async def send(self, request: Any, **options: Any) -> Any:
            # The openai library adds what the environment holds: an organisation, a project, headers of any name.
            request.headers = type(request.headers)(
                {
                    "host": request.url.netloc.decode("ascii"),
                    "user-agent": "ncalign",
                    "accept": "application/json",
                    # What else can be unpacked is so without bounds in some versions.
                    "accept-encoding": "gzip",
                    "content-type": "application/json",
                    **({"content-length": length} if (length := request.headers.get("content-length")) else {}),
                    **({"authorization": f"Bearer {key.value}"} if key.value else {}),
                }
            )
            try:
                with fail_after(seconds):
                    response = await super().send(request, **{**options, "stream": True})
                    answer = await _whole(response)
            except TimeoutError as error:
                # What openai repeats a request for: an error of httpx or of httpx2, whichever this version of it uses.
                raise sys.modules[type(request).__module__].ReadTimeout(str(error)) from error
            if retries and _SHORT_WAIT < (wait := asked_to_wait(answer)) <= LONGEST_WAIT:
                told(f"note: server {url}: status {answer.status_code}, and it asks to wait {wait:.0f} s (Retry-After)")
            return answer

    return openai.AsyncOpenAI(
        base_url=url,
        api_key=key.value or "none",
        timeout=None,
        max_retries=retries,
        http_client=Bounded(follow_redirects=False),
    )


async def is_healthy(client: AsyncOpenAI, url: str) -> bool:
    """Whether a server says so at ``/health``, as those of models do, or says anything there but that it is down."""
    from anyio import move_on_after
    from openai import APIStatusError, OpenAIError

    with move_on_after(_HEALTHY_WITHIN):
        try:
            await client.get(f"{root_of(url)}/health", cast_to=str, options={"max_retries": 0})
        except APIStatusError as error:
            return error.status_code < 500
        except (OpenAIError, Malformed):
            return False
        return True
    return False


def asked_to_wait(response: Any) -> float:
    """Seconds that a server asks to wait before the next try; 0 where it asks for none."""
    given = response.headers.get("retry-after", "") if not response.is_success else ""
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(given).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0


async def _whole(response: Any) -> Any:
    """A response with its body, cut at what an error may have; its declared encoding is not believed."""
    most = MOST_BYTES if response.is_success else _MOST_BYTES_OF_AN_ERROR
    body = bytearray()
    try:
        async with aclosing(response.aiter_bytes()) as parts:
            async for part in parts:
                body += part
                if len(body) > most:
                    break
    finally:
        await response.aclose()
    if response.is_success:
        if len(body) > most:
            raise Malformed(
                f"more than {most >> 20} MiB, and cut there; ask for fewer or shorter answers at a time, or none with log-probs"
            )
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"no UTF-8: {error.reason} at byte {error.start} of {bytes(body[:40])!r}") from None
    headers = {name: response.headers[name] for name in _READ_HEADERS if name in response.headers}
    if asked_to_wait(response) > LONGEST_WAIT:
        headers["x-should-retry"] = "false"
    return type(response)(response.status_code, headers=headers, content=bytes(body[:most]), request=response.request)


def check_host(url: str, key: ApiKey) -> None:
    """Raise where the host of a URL has no address, and warn where a key would cross the internet unencrypted.

    Asking again and again would not give the host an address. A proxy may know hosts that this machine does not, and is not
    second-guessed.

    Raises:
        ValueError: there is no such host.
    """
    parts = urlsplit(url)
    if parts.hostname is None:
        return
    proxied = bool(getproxies().get(parts.scheme) and not proxy_bypass(parts.hostname))
    addresses: list[str] = [parts.hostname] if proxied else []
    if not proxied:
        try:
            addresses = [str(found[4][0]) for found in socket.getaddrinfo(parts.hostname, None)]
        except (socket.gaierror, UnicodeError) as error:
            if not (isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN):
                raise ValueError(f"server {url}: there is no host {parts.hostname!r}: check base_url and the network") from None
    if key.value and parts.scheme == "http" and any(map(_is_public, addresses)) and parts.netloc not in _warned:
        _warned.add(parts.netloc)
        say(f"warning: server {url}: the key in {key.variable} is sent unencrypted: anyone on the way can read it; use https")


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_global
    except ValueError:  # a name that a proxy knows: one with a dot is not of this network
        return "." in address

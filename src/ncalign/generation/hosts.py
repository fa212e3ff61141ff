"""Several servers of one model: asked in turn, and one that fails is set aside until it is healthy again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WEIGHT_INFO = "//weight_info"
"""Where vLLM's server says the version of its weights."""

LOOK_EVERY = 5.0
"""Seconds between looks at a server that was set aside."""


@dataclass(frozen=True)
class Order:
    """What every server of the model is told, and again when it comes back, such as to load an adapter.

    Attributes:
        path: under the server's root where it begins with ``//``, else under its ``base_url``.
        body: the JSON; None: something is got and not posted.
        needed: whether a server that refuses it can't be used.
    """

    path: str
    body: Mapping[str, Any] | None
    needed: bool = True

    def url(self, base_url: str) -> str:
        """Where to post it.

        >>> Order("//reset", {}).url("http://a/v1"), Order("/load", {}).url("http://a/v1")
        ('http://a/reset', '/load')
        """
        return root_of(base_url) + self.path[1:] if self.path.startswith("//") else self.path


def version_said(text: str) -> str | None:
    """The version of its weights that vLLM's server answers with; None where it is another answer.

    >>> version_said('{"weight_version": "run-001"}')
    'run-001'
    """
    try:
        found = json.loads(text)
    except ValueError:
        return None
    version = found.get("weight_version") if isinstance(found, dict) else None
    return version if isinstance(version, str) else None


def root_of(base_url: str) -> str:
    """A server's root, above its API."""
    return base_url.rstrip("/").removesuffix("/v1")


@dataclass
class Host:
    """A server.

    Attributes:
        url: of its API.
        under_way: requests that it is answering.
        look_at: when to look at it again, on the monotonic clock; None while it is in service.
    """

    url: str
    under_way: int = 0
    look_at: float | None = None


class Hosts:
    """Whom to ask next; several threads may use it.

    Args:
        urls: of the servers.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.all = [Host(url) for url in urls]
        self._lock = threading.Lock()

    def in_service(self) -> list[Host]:
        """Those that are not set aside."""
        return [host for host in self.all if host.look_at is None]

    @contextmanager
    def next(self) -> Iterator[Host]:
        """The server in service with the fewest requests under way, in turn among equals; while none is, any of them."""
        with self._lock:
            host = min(self.in_service() or self.all, key=lambda one: one.under_way)
            host.under_way += 1
            # Last among equals the next time.
            self.all.remove(host)
            self.all.append(host)
        try:
            yield host
        finally:
            with self._lock:
                host.under_way -= 1

    def set_aside(self, host: Host) -> bool:
        """Ask it no more until it is healthy; whether it was in service."""
        with self._lock:
            was = host.look_at is None
            host.look_at = time.monotonic() + LOOK_EVERY
            return was

    def due(self) -> list[Host]:
        """Those set aside whose time has come; no other caller looks at them meanwhile."""
        with self._lock:
            now = time.monotonic()
            found = [host for host in self.all if host.look_at is not None and host.look_at <= now]
            for host in found:
                host.look_at = now + LOOK_EVERY
            return found

"""What a server is asked, and which requests are the same question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ncalign.core.store import Store


@dataclass(frozen=True)
class Request:
    """One thing to ask.

    Attributes:
        kind: which of the two APIs.
        body: the request's JSON without ``model`` and ``n``.
        n: how many answers.
        needed: fields of the body without which it has no sense, so that a server which does not take them refuses it.
    """

    kind: Literal["chat", "completions"]
    body: Mapping[str, Any]
    n: int = 1
    needed: frozenset[str] = frozenset()


@dataclass
class Question:
    """What is asked once, and for each place among the requests that it answers, which of its answers are that place's."""

    request: Request
    places: list[tuple[int, slice]]


def distinct_questions(requests: Sequence[Request]) -> list[Question]:
    """The distinct questions among requests, in the order of their first."""
    found: dict[str, Question] = {}
    for place, request in enumerate(requests):
        key = Store.key(request.kind, dict(request.body))
        question = found.setdefault(key, Question(replace(request, n=0), []))
        asked = question.request.n
        # Without a seed, the same request samples something else each time.
        shared = "seed" in request.body or request.body.get("temperature") == 0
        own = slice(0, request.n) if shared else slice(asked, asked + request.n)
        question.places.append((place, own))
        question.request = replace(question.request, n=max(asked, own.stop))
    return list(found.values())

"""Verdicts of a language model on a server: asked for, asked for again where they can't be read, and then missing.

A missing verdict has a reason and no value: it is neither zero nor a tie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ncalign.generation.client import Choice, Request, Server, ServerError

Verdict = TypeVar("Verdict")

# What servers say of a prompt that does not fit: OpenAI, vLLM, SGLang, TGI and llama.cpp word it differently.
_TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|maximum context|exceeds? the (?:available )?context|too long|too many tokens"
    r"|maximum number of tokens|inputs?`? tokens",
    re.IGNORECASE,
)


@dataclass
class Verdicts(Generic[Verdict]):
    """What a judge said of each prompt.

    Attributes:
        values: one for each prompt, in order; None where it is missing.
        missing: how many are, by reason: ``unreadable``, ``prompt too long for the judge``, ``no answer``.
        first_failure: what the server said last where it gave no answer; empty where it always did.
    """

    values: list[Verdict | None]
    missing: Counter[str] = field(default_factory=Counter)
    first_failure: str = ""


def ask_verdicts(
    server: Server,
    prompts: Sequence[str],
    read: Callable[[Choice], Verdict | None],
    *,
    attempts: int,
    body: Mapping[str, Any],
    done: Callable[[int], None] = lambda index: None,
) -> Verdicts[Verdict]:
    """Ask for all verdicts at once.

    Args:
        server: the judge's; it keeps what it answered, so that a call that was stopped goes on where it was.
        prompts: what the judge reads, each as a user's turn.
        read: the verdict in an answer; None where there is none.
        attempts: times that a verdict which can't be read is asked for.
        body: further fields of the requests.
        done: told of each prompt that is answered at the first attempt, by its place.

    Raises:
        ServerError: the server answers nothing at all, as when it is down; prompts that are all too long are missing
            verdicts.
    """
    found = Verdicts[Verdict]([None] * len(prompts))
    reasons = ["unreadable"] * len(prompts)
    open_ = list(range(len(prompts)))
    for attempt in range(attempts):
        if not open_:
            break
        requests = [_request(prompts[index], attempt, body) for index in open_]
        answers = server.ask(requests, done=done if attempt == 0 else lambda index: None)
        again: list[int] = []
        down: list[ServerError] = []
        for index, answer in zip(open_, answers, strict=True):
            if isinstance(answer, ServerError):
                found.first_failure = found.first_failure or str(answer)
                too_long = answer.refused and _TOO_LONG.search(str(answer)) is not None
                reasons[index] = "prompt too long for the judge" if too_long else "no answer"
                if not too_long:
                    down.append(answer)
                    again.append(index)
                continue
            found.values[index] = read(answer[0])
            if found.values[index] is None:
                reasons[index] = "unreadable"
                again.append(index)
        if all(isinstance(answer, ServerError) for answer in answers):
            if len(answers) == len(prompts) and down:
                # Nothing was judged: a server that is down, not a judge without an opinion. It has been tried again already.
                raise down[0]
            break
        open_ = again
    found.missing.update(reason for reason, value in zip(reasons, found.values, strict=True) if value is None)
    return found


def _request(prompt: str, attempt: int, body: Mapping[str, Any]) -> Request:
    # The same question at temperature 0 has the same answer: one that could not be read is asked for otherwise.
    sampling = {"temperature": 0.0 if attempt == 0 else 0.7, "seed": attempt}
    return Request("chat", {"messages": [{"role": "user", "content": prompt}], **sampling, **body})


def concluded(text: str) -> str:
    """What a judge says after thinking aloud, where it weighs verdicts that it does not give; nothing where it was cut there.

    >>> concluded("<think>[[3]] or [[4]]?</think>[[4]]"), concluded("[[4]]"), concluded("<think>[[3]]")
    ('[[4]]', '[[4]]', '')
    """
    _, closed, said = text.rpartition("</think>")
    return said if closed or "<think>" not in said else ""


def fill(template: str, texts: Mapping[str, str]) -> str:
    """A template with the texts in the places of their names, in one pass: braces in what is filled in are left alone.

    >>> fill("{a} and {b}", {"a": "{b}", "b": "2"})
    '{b} and 2'
    """
    return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), template)

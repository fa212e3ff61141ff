"""What a server says where it refuses a request: its reason in words, and the field that it does not take."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_LONGEST_REASON = 300
_READ_OF_A_BODY = 20_000

# What servers say of a prompt that does not fit: OpenAI, vLLM, SGLang, TGI and llama.cpp word it differently.
TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|maximum context|exceeds? the (?:available )?context|too long|too many tokens"
    r"|maximum number of tokens|inputs?`? tokens",
    re.IGNORECASE,
)
_NOT_TAKEN = re.compile(
    r"unsupported|(?:not|n't|no longer) (?:be )?(?:support|permitted|allowed|accepted|available|implemented|enabled|compatible)"
    r"|un(?:recogni[sz]ed|known|expected)|extra[ _](?:inputs?|fields?|forbidden)|incompatible|deprecated|cannot both|instead"
    r"|only (?:one|the default)|cannot find field|(?:additional|invalid) (?:propert|param|argument|field)|please remove",
    re.IGNORECASE,
)
_BAD_VALUE = re.compile(
    r"must be|must have|only\b.*\b(?:allowed|accepted)|strictly|greater than|less than|out of range", re.IGNORECASE
)
_ALTERNATIVES = re.compile(r"\bboth\b|only one|either", re.IGNORECASE)
_LENGTH = "max_tokens"
_OTHER_LENGTH = re.compile(r"\bmax_\w{0,30}tokens\b")
_ASKED = frozenset({"messages", "prompt", "model"})
# Of two fields that exclude one another, the one that says less is left out.
_LEAST_FIRST = ("seed", "logprobs", "top_logprobs", "top_k", "top_p", "n", "temperature", _LENGTH)

_WITHOUT = {
    "temperature": "answers are sampled at the server's own temperature and not at the one that was set",
    "top_p": "answers are sampled with the server's own top_p and not with the one that was set",
    "top_k": "answers are sampled with the server's own top_k and not with the one that was set",
    "seed": "the same seed need not give the same answers",
    "n": "several answers are asked for one at a time",
    "logprobs": "answers have no log-probs",
    _LENGTH: "answers are as long as the server lets them be",
}

Changes = dict[str, str | None]
"""Fields that a server does not take, with the name that it knows them by; None where they are left out."""


def reason_of(text: str) -> str:
    """The reason in a body that a server answers with, on one line of bounded length.

    >>> reason_of('{"error": {"message": "no such model"}}'), reason_of('{"detail": [{"loc": ["body", "n"], "msg": "no"}]}')
    ('no such model', 'body.n: no')
    >>> reason_of("<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>")
    '502 Bad Gateway nginx'
    """
    text = text[:_READ_OF_A_BODY]
    said = "; ".join(dict.fromkeys(_reasons(_json(text))))
    if not said:
        said = re.sub(r"<(script|style)\b.{0,9999}?</\1>|<[^<>]{0,999}>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    said = " ".join("".join(letter if letter.isprintable() else " " for letter in said).split())
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]}…"


def refused_field(text: str, body: Mapping[str, Any], needed: Collection[str]) -> str | None:
    """The field of a request that a server names as one that it does not take; None where it refuses for something else.

    Args:
        text: the body of its answer.
        body: the request's.
        needed: fields without which the request has no sense.

    >>> body = {"messages": [], "max_tokens": 9, "temperature": 0.5}
    >>> refused_field('{"error": {"message": "Unknown parameter", "param": "temperature"}}', body, ())
    'temperature'
    >>> refused_field('{"error": "max_tokens is too large"}', body, ()) is None
    True
    """
    text = text[:_READ_OF_A_BODY]
    given = _json(text)
    named = next(_values(given, "param"), "").split(".")[0].split("[")[0]
    said = f"{'; '.join(_reasons(given)) or text} {' '.join(_values(given, 'code'))} {' '.join(_values(given, 'type'))}"
    if TOO_LONG.search(said):
        return None
    among = (
        [named] if named else sorted((name for name in body if _place(name, said) >= 0), key=lambda name: _place(name, said))
    )
    among = [name for name in among if name in body and name not in {*_ASKED, *needed}]
    if _ALTERNATIVES.search(said):
        among.sort(key=lambda name: _LEAST_FIRST.index(name) if name in _LEAST_FIRST else -1)
    if not among:
        return None
    # A value of ours that is out of a server's range is one thing; a limit of the user's is another.
    at_an_end = (among[0] in ("temperature", "top_p") and body[among[0]] in (0, 1)) or among[0] == "n"
    return among[0] if _NOT_TAKEN.search(said) or (at_an_end and _BAD_VALUE.search(said)) else None


def name_instead(field: str, text: str, tried: Collection[str]) -> str | None:
    """The name to give a field that a server does not take; None: leave it out."""
    # A field of the request may have been renamed before.
    if not _OTHER_LENGTH.fullmatch(field):
        return None
    names = [*_OTHER_LENGTH.findall(text[:_READ_OF_A_BODY]), "max_completion_tokens"]
    return next((name for name in names if name not in tried), None)


def kept_changes(value: object) -> Changes:
    """Changes as they were kept, without those that would never be made.

    >>> kept_changes({"seed": None, "max_tokens": "max_completion_tokens", "messages": None, "n": 2, "top_p": "x"})
    {'seed': None, 'max_tokens': 'max_completion_tokens'}
    """
    return {
        name: other
        for name, other in (value.items() if isinstance(value, dict) else ())
        if isinstance(name, str) and name not in _ASKED
        if other is None or (isinstance(other, str) and _OTHER_LENGTH.fullmatch(name) and _OTHER_LENGTH.fullmatch(other))
    }


def changed(body: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A request as the server takes it."""
    return {changes.get(name, name) or "": value for name, value in body.items() if changes.get(name, name) is not None}


def what_changes(field: str, name: str | None) -> str:
    """What to say of a field that is renamed or left out."""
    if name is not None:
        return f"note: the server does not take {field}: it is sent as {name}"
    kind = "note" if field in ("seed", "n") else "warning"
    without = _WITHOUT.get(field)
    return f"{kind}: the server does not take {field}: it is left out" + (f", so {without}" if without else "")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _reasons(value: Any, depth: int = 0) -> Iterator[str]:
    """The texts that say why, in the forms of OpenAI, FastAPI, Mistral, TGI, Gemini, and of proxies that pass on another's."""
    if depth > 8:
        return
    if isinstance(value, str) and value.strip():
        inner = _json(value) if value.lstrip()[0] in "{[" else None
        found = list(_reasons(inner, depth + 1)) if isinstance(inner, dict | list) else []
        yield from found or [value]
    elif isinstance(value, list):
        for one in value:
            yield from _reasons(one, depth + 1)
    elif isinstance(value, dict):
        place = value.get("loc")
        if isinstance(value.get("msg"), str):
            yield f"{'.'.join(map(str, place))}: {value['msg']}" if isinstance(place, list) else value["msg"]
            return
        for name in ("message", "error", "detail", "details", "errors", "metadata", "raw", "reason"):
            if name in value:
                yield from _reasons(value[name], depth + 1)


def _values(value: Any, name: str, depth: int = 0) -> Iterator[str]:
    """The texts under a name, wherever it stands."""
    if depth > 8:
        return
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and isinstance(value.get(name), str) and value[name]:
        yield value[name]
    for one in inner:
        yield from _values(one, name, depth + 1)


def _place(name: str, said: str) -> int:
    """Where a field is named, -1 where it is not; a field of one letter only where that can be nothing else."""
    alone = rf"['\"`\[.]{name}['\"`\]:]|\b{name}\s*(?:=|>|must\b)" if len(name) == 1 else rf"(?<![\w-]){name}(?![\w-])"
    found = re.search(alone, said, re.IGNORECASE)
    return -1 if found is None else found.start()

"""What a command that fails says in JSON: one object, with the parts that our messages have in order."""

from __future__ import annotations

import re
from collections.abc import Sequence

_STEP = re.compile(r"(?P<where>(?:step|round|process) \d+|group '[^']*'): ")
_FLAG = re.compile(r"(?P<where>--[\w.-]+|(?!(?:missing|interrupted|error)\b)[a-z_][\w.]*): ")
_UNKNOWN = re.compile(r"unknown \w+ '(?P<where>[^']+)'")
_FILE = re.compile(r"(?P<where>(?:[^\s:;,]+[/\\])?[^\s:;,]+\.[A-Za-z0-9]+(?::\d+)?)(?=[:,\s]|$)")


def failure(verb: str | None, problems: Sequence[str], *, code: int, where: str | None = None) -> dict[str, object]:
    """The object that ``--json`` prints in place of a result.

    Messages say where something is, what was found, and, behind the last semicolon or colon, what to do.

    Args:
        verb: that failed; None where none was given.
        problems: a message each.
        code: the exit code.
        where: the file, where the error names it by itself.

    Returns:
        ``error``, the whole message; ``where`` and ``what_to_do``, parts of the first one, or null; ``problems``, each message;
        ``verb`` and ``exit_code``.

    >>> found = failure("train", ["data.jsonl:3: `reward` is 'high' (a string); give a number, or leave it out"], code=1)
    >>> found["where"], found["what_to_do"]
    ('data.jsonl:3', 'give a number, or leave it out')
    """
    first = problems[0].strip()
    return {
        "error": "\n".join(problems),
        "where": where or _where(first),
        "what_to_do": _remedy(first),
        "problems": list(problems),
        "verb": verb,
        "exit_code": code,
    }


def _where(message: str) -> str | None:
    """The place that a message begins with: a file and line, a flag or field, a step or group; else a file that it names."""
    for pattern in (_STEP, _FLAG, _UNKNOWN):
        if found := pattern.match(message):
            return found["where"]
    found = _FILE.match(message) or _FILE.search(message)
    return found["where"] if found else None


def _remedy(message: str) -> str | None:
    """What stands behind the last semicolon, else behind the last colon, of the last line."""
    line = message.strip().split("\n")[-1]
    for mark in ("; ", ": "):
        head, found, tail = line.rpartition(mark)
        if found and head and tail.strip():
            return tail.strip()
    return None

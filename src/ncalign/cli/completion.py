"""`ncalign completion`: a script with which bash, zsh or fish complete verbs, flags and their values."""

from __future__ import annotations

import argparse
import re
from functools import partial

import shtab

from ncalign.cli.config import CompletionConfig
from ncalign.cli.flags import build_parser
from ncalign.cli.verbs import VERBS, Result, Verb
from ncalign.core.config import fields

_CHOICES = re.compile(r"\{([^}]+)\}")
_WORDS = re.compile(r"[\w-]+(\|[\w-]+)+")
_NOT_TYPED = frozenset({"TEXT", "NAME", "PATH", "FILE", "INT", "FLOAT", "DATE"})
_FILES = re.compile(r"TEXT|NAME|PATH|FILE")
"""Texts are completed as files too: models, data and functions are named by their paths."""
_HELP_LENGTH = 80


def run_completion(config: CompletionConfig) -> Result:
    """The script for a shell; it is made from the verbs' own fields, and asks ncalign nothing when it completes."""
    root = argparse.ArgumentParser(prog="ncalign", add_help=False)
    root.add_argument("--help", action="store_true", help="list the verbs")
    root.add_argument("--version", action="store_true", help="show the version")
    words = root.add_subparsers()
    for verb in VERBS:
        _tell_of_values(build_parser(verb, make=partial(words.add_parser, verb.name, help=verb.purpose)), verb)
    script = shtab.complete(root, shell=config.shell)
    return {"shell": config.shell, "script": script, "text": script}


def _tell_of_values(parser: argparse.ArgumentParser, verb: Verb) -> None:
    """Tell shtab which values each flag of a verb takes, and which words may stand without a flag."""
    values = {}
    for action in parser._actions:
        if action.help is not argparse.SUPPRESS:
            action.help = _short((action.help or "").replace("%%", "%"))
        found = values[action.dest] = _values(action.metavar if isinstance(action.metavar, str) else "")
        _complete(action, found)
    for name in verb.positional:
        word = parser.add_argument(f"{name}_word", nargs="?", help=_short(fields(verb.config())[name].description or name))
        _complete(word, values[name])


def _complete(action: argparse.Action, values: list[str] | None) -> None:
    if values is None:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif values:
        action.choices = values
        action.metavar = action.dest  # zsh shows it above the values


def _values(metavar: str) -> list[str] | None:
    """The values that the help shows for a flag; None where they are files, empty where nothing can be said of them.

    >>> _values("{auto,raw}|INT"), _values("true|false"), _values("INT"), _values("PATH")
    (['auto', 'raw'], ['true', 'false'], [], None)
    """
    listed = [value for found in _CHOICES.findall(metavar) for value in found.split(",")]
    if not listed and _WORDS.fullmatch(metavar):
        listed = [word for word in metavar.split("|") if word not in _NOT_TYPED]
    if not listed and _FILES.search(metavar):
        return None
    return listed


def _short(text: str) -> str:
    """The first sentence of a description, on one line, without what shells and their menus read as their own."""
    first = re.split(r"[;:.] |\n", re.sub(r"^\[[^\]]*\] ", "", text), maxsplit=1)[0]
    plain = re.sub(r"[^\w ,.()/+'-]", " ", first).replace("'", "’")
    return plain[:_HELP_LENGTH].strip() or " "

"""The flags of a verb, generated from its configuration model, and the help that lists them."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ncalign.cli import settings
from ncalign.cli.verbs import Verb
from ncalign.core.config import fields
from ncalign.core.errors import ConfigError


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        # Names with hyphens stay whole, so that they can be copied.
        return [line for part in text.split("\n") for line in textwrap.wrap(part, width, break_on_hyphens=False)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([message.removeprefix("argument ")])


@dataclass(frozen=True)
class Arguments:
    """What was typed after the verb: options of the command line itself, and flags that set fields."""

    help: str | None  # the text to print, when it was asked for
    config: Path | None
    print_config: bool
    dry_run: bool
    json: bool
    debug: bool
    flags: dict[str, str]
    problems: tuple[str, ...]
    guessed: frozenset[str]


# Flags of fields are spelt as their YAML keys, with underscores; these belong to the command line alone.
_OPTIONS = {name.replace("-", "_"): name for name in ("print-config", "dry-run", "json", "debug", "help", "config")}


def _metavar(info: FieldInfo) -> str:
    """Return what the help shows in place of a field's value."""
    if settings.is_choice(info):
        return "{" + ",".join(map(settings.model_name, settings.section_models(info))) + "}"
    names = []
    for kind in settings.kinds(info):
        if get_origin(kind) is Literal:
            names.append("{" + ",".join(map(str, get_args(kind))) + "}")
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            item = get_args(item)[0] if get_origin(item) is Annotated else item
            names = [{float: "FLOAT", Path: "PATH"}.get(item, "NAME")]
        elif isinstance(kind, type) and kind is not type(None):
            names.append({str: "TEXT", bool: "true|false"}.get(kind, kind.__name__.upper()))
    return "|".join(names)


def _switch(info: FieldInfo) -> str:
    """Return what the help shows in place of the value of a field that is on, off or, of some, a word."""
    words = [word for kind in settings.kinds(info) if get_origin(kind) is Literal for word in get_args(kind)]
    return "|".join(["true", "false", *words])


def _default(info: FieldInfo) -> str:
    """Return the value of a field that nobody sets, as the help shows it."""
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return settings.model_name(type(value))
    if isinstance(value, tuple):
        return " ".join(f"{one:.3g}" if isinstance(one, float) else str(one) for one in value) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _explained(infos: Mapping[str, FieldInfo]) -> str:
    """Return the help of a field that these models have with one description: that, and its default in each of them."""
    first = next(iter(infos.values()))
    if first.is_required():
        return f"{first.description} (required)"
    if _default(first) == "none" and "default:" in (first.description or ""):
        return str(first.description)
    others = [f"{name} {_default(info)}" for name, info in infos.items() if info.default != first.default]
    default = "; ".join(filter(None, (f"default: {_default(first)}", ", ".join(others))))
    return f"{first.description or ''} ({default})".strip()


def _add(group: argparse._ArgumentGroup, name: str, infos: Sequence[FieldInfo], text: str) -> None:
    """Add the flag of a field; of one that several models have, with their information in this order."""
    text = text.replace("%", "%%")  # argparse formats help with %
    if bool in settings.kinds(infos[0]) or (settings.section_models(infos[0]) and not settings.is_choice(infos[0])):
        group.add_argument(f"--{name}", dest=name, nargs="?", const="true", metavar=_switch(infos[0]), help=text)
        group.add_argument(f"--no_{name}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
        return
    metavar = "|".join(dict.fromkeys(map(_metavar, infos)))
    group.add_argument(f"--{name}", dest=name, nargs="*" if settings.is_list(infos[0]) else None, metavar=metavar, help=text)


def _add_field(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    """Add the flag of a field and, of a section, those of the fields in it."""
    models = settings.section_models(info)
    if settings.is_choice(info):
        _add(group, name, [info], _explained({name: info}))
        # The long spelling is what --print-config's YAML suggests, so it works too.
        group.add_argument(f"--{name}.name", dest=name, help=argparse.SUPPRESS)
        for inner in dict.fromkeys(inner for model in models for inner in settings.own_fields(model)):
            owners = {settings.model_name(model): fields(model)[inner] for model in models if inner in fields(model)}
            _add(group, f"{name}.{inner}", list(owners.values()), _explained_by_method(owners, len(models)))
            for section in settings.section_models(next(iter(owners.values()))):
                for deep, deep_info in fields(section).items():
                    _add(group, f"{name}.{inner}.{deep}", [deep_info], _explained({deep: deep_info}))
    elif models:
        _add(group, name, [info], f"{info.description} (default: false; any flag below switches it on)")
        for inner, inner_info in fields(models[0]).items():
            _add(group, f"{name}.{inner}", [inner_info], _explained({inner: inner_info}))
    else:
        _add(group, name, [info], _explained({name: info}))


def _explained_by_method(owners: Mapping[str, FieldInfo], num_methods: int) -> str:
    """Return a paragraph for each thing that methods mean by a field's name, after the names of those methods."""
    meanings: dict[str, dict[str, FieldInfo]] = {}
    for method, info in owners.items():
        meanings.setdefault(info.description or "", {})[method] = info
    return "\n".join(
        f"[{'every method' if len(infos) == num_methods else ', '.join(infos)}] {_explained(infos)}"
        for infos in meanings.values()
    )


def _method_list(info: FieldInfo) -> str:
    """List the members of a tagged union, each with its purpose and its own fields."""
    lines = []
    for model in settings.section_models(info):
        own = ", ".join(settings.own_fields(model))
        lines += [f"{settings.model_name(model):<18}{(model.__doc__ or '').partition(chr(10))[0]}", f"{'':<18}fields: {own}"]
    return "\n".join(lines)


def build_parser(verb: Verb, *, make: Callable[..., argparse.ArgumentParser] = _Parser) -> argparse.ArgumentParser:
    """Generate the parser of a verb from the fields of its configuration.

    Args:
        verb: whose flags are wanted.
        make: makes the empty parser; another parser's ``add_parser`` may.
    """
    model = verb.config()
    several = {name for name in verb.positional if settings.is_list(fields(model)[name])}
    positional = "".join(f" [{name.upper()}{' ...' * (name in several)}]" for name in verb.positional)
    parser = make(
        prog=f"ncalign {verb.name}",
        usage=f"ncalign {verb.name}{positional} [--config FILE] [--FIELD VALUE ...]",
        description=f"{verb.purpose[:1].upper()}{verb.purpose[1:]}\n\nexample:\n  {verb.example}",
        epilog="Flags override the --config file. Dashes work in place of underscores. Exit codes: 0 done, 1 failed,\n"
        f"2 bad usage or configuration, 130 interrupted.{_hint_of_methods(verb)}",
        formatter_class=lambda prog: _Formatter(prog, max_help_position=34, width=118),
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    starts = {first: title for title, first in verb.groups}
    titles = [title for title, _ in verb.groups] or ["fields"]
    groups = {title: parser.add_argument_group(title) for title in titles}
    title = titles[0]
    for name, info in fields(model).items():
        title = starts.get(name, title)
        if settings.is_choice(info):
            groups[title].description = _method_list(info)
        _add_field(groups[title], name, info)
    _add_options(parser, dry_run=verb.plan is not None)
    return parser


def _hint_of_methods(verb: Verb) -> str:
    choices = [name for name, info in fields(verb.config()).items() if settings.is_choice(info)]
    return "".join(f"\n'ncalign {verb.name} --{name} NAME --help' shows the fields of one method alone." for name in choices)


def _method_help(verb: Verb, name: str, method: str) -> str:
    """The help of one method alone: its purpose, and its own fields with their defaults.

    Raises:
        ConfigError: there is no such method.
    """
    info = fields(verb.config())[name]
    models = {settings.model_name(model): model for model in settings.section_models(info)}
    if method not in models:
        raise ConfigError([f"--{name}: unknown method {method!r}; {settings.hint(method, list(models))}"])
    model = models[method]
    parser = _Parser(
        prog=f"ncalign {verb.name}",
        usage=f"ncalign {verb.name} --{name} {method} [--{name}.FIELD VALUE ...] [--FIELD VALUE ...]",
        description=textwrap.dedent(model.__doc__ or method).strip(),
        epilog=f"'ncalign {verb.name} --help' lists the other fields; docs/methods/ explains the methods.",
        formatter_class=lambda prog: _Formatter(prog, max_help_position=34, width=118),
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    group = parser.add_argument_group(f"fields of {method}")
    for inner in settings.own_fields(model):
        inner_info = fields(model)[inner]
        _add(group, f"{name}.{inner}", [inner_info], _explained({inner: inner_info}))
        for section in settings.section_models(inner_info):
            for deep, deep_info in fields(section).items():
                _add(group, f"{name}.{inner}.{deep}", [deep_info], _explained({deep: deep_info}))
    return parser.format_help()


def _help(verb: Verb, parser: argparse.ArgumentParser, given: Mapping[str, object]) -> str:
    """The verb's help; where a method is chosen beside ``--help``, that method's."""
    for name, info in fields(verb.config()).items():
        if settings.is_choice(info) and isinstance(method := given.get(name), str):
            return _method_help(verb, name, method)
    return parser.format_help()


def _add_options(parser: argparse.ArgumentParser, *, dry_run: bool) -> None:
    group = parser.add_argument_group("options")
    group.add_argument("--config", metavar="FILE", help="YAML file with values for the fields above")
    group.add_argument("--print-config", action="store_true", help="print the whole configuration as YAML, and stop")
    if dry_run:
        group.add_argument("--dry-run", action="store_true", help="show what would be done and what it needs, and stop")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error (also NCALIGN_DEBUG=1)")
    group.add_argument("-h", "--help", action="store_true", help="show this text, and stop")


def _spelt(argument: str, aliases: Mapping[str, str]) -> str:
    """Bring `--learning-rate=1` to the spelling of the field, `--learning_rate=1`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = name[2:].replace("-", "_")
    name = aliases.get(name, name)
    return f"--{_OPTIONS.get(name, name)}{equals}{value}"


def _is_flag(argument: str) -> bool:
    """Whether a word is a flag: ``-1`` and ``-.5`` are values."""
    return argument.startswith("-") and argument != "--" and not re.match(r"-\.?\d", argument)


def _unknown(rest: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Give each flag among words that no field has taken, with the values that follow it."""
    for number, argument in enumerate(rest):
        flag, equals, value = argument.partition("=")
        if _is_flag(argument):
            yield flag, [value] if equals else list(takewhile(lambda word: not _is_flag(word), rest[number + 1 :]))


def parse(verb: Verb, arguments: Sequence[str]) -> Arguments:
    """Parse what follows the verb; unknown flags and stray words are kept as problems, to be reported with the others.

    Args:
        verb: Each field of its configuration is a flag.
        arguments: The words after the verb.

    Returns:
        Options and the text given for each field, not yet validated.

    Raises:
        ConfigError: A flag lacks its value.
    """
    model = verb.config()
    parser = build_parser(verb)
    namespace, rest = parser.parse_known_args([_spelt(argument, dict(verb.aliases)) for argument in arguments])
    given = vars(namespace)
    names = settings.field_names(model)
    options = [option for option in _OPTIONS.values() if option != "dry-run" or verb.plan is not None]
    problems, guessed = [], set()
    for flag, value in _unknown(rest):
        theirs = settings.other_name(flag.lstrip("-"), value, names, flag=True)
        guess = theirs.field if theirs else settings.nearest(flag.lstrip("-"), [*names, *options])
        advice = theirs.text if theirs else f"did you mean '--{guess}'?" if guess else "--help lists the flags"
        guessed.add(guess or "")
        problems.append(f"unknown flag '{flag}'; {advice}")
    words = [argument for argument in rest if not _is_flag(argument)]
    if verb.positional and settings.is_list(fields(model)[verb.positional[-1]]):
        before = len(verb.positional) - 1
        words = [*words[:before], *([",".join(words[before:])] if words[before:] else [])]
    # A word after an unknown flag is most likely its value: no second complaint about it.
    if len(words) > len(verb.positional) and not problems:
        wrong = words[len(verb.positional)]
        problems.append(f"unexpected argument '{wrong}'; a field is set by --FIELD VALUE")
    flags = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items() if name in names}
    for name, word in zip(verb.positional, words, strict=False):
        if name in flags:
            problems.append(f"--{name}: given twice, as '{flags[name]}' and as '{word}'")
        flags[name] = word
    return Arguments(
        help=_help(verb, parser, given) if "help" in given else None,
        config=Path(given["config"]) if "config" in given else None,
        print_config="print_config" in given,
        dry_run="dry_run" in given,
        json="json" in given,
        debug="debug" in given or os.environ.get("NCALIGN_DEBUG", "") not in ("", "0"),
        flags=flags,
        problems=tuple(problems),
        guessed=frozenset(guessed),
    )

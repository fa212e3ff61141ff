"""The flags of a verb, generated from its configuration model, and the help that lists them."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ncalign.cli import settings
from ncalign.core.config import fields
from ncalign.core.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """What a verb's command line has besides the fields of its model."""

    verb: str
    purpose: str
    example: str
    positional: tuple[str, ...] = ()  # fields that may be given as plain words, in this order
    groups: tuple[tuple[str, str], ...] = ()  # title in the help, and the field with which it begins
    aliases: tuple[tuple[str, str], ...] = ()  # other spellings of fields
    dry_run: bool = False


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        # Names with hyphens stay whole, so that they can be copied.
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


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
_OPTIONS = ("--print-config", "--dry-run", "--json", "--debug", "--help", "--config")


def _metavar(info: FieldInfo) -> str:
    names = []
    for kind in settings.kinds(info):
        if get_origin(kind) is Literal:
            names.append("{" + ",".join(map(str, get_args(kind))) + "}")
        elif get_origin(kind) is tuple:
            names = ["NAME"]
        elif isinstance(kind, type) and kind is not type(None):
            names.append({str: "TEXT", bool: "true|false"}.get(kind, kind.__name__.upper()))
    return "|".join(names)


def _explained(info: FieldInfo) -> str:
    """Return the help text of a field: its description and default."""
    if info.is_required():
        default = "required"
    else:
        value = info.get_default(call_default_factory=True)
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if value is None and "default:" in (info.description or ""):
            return str(info.description)
        default = f"default: {'none' if value is None else str(value).lower() if isinstance(value, bool) else value}"
    # argparse formats help with %, so that one of ours has to be doubled.
    return f"{info.description or ''} ({default})".strip().replace("%", "%%")


def _add_field(group: argparse._ArgumentGroup, name: str, info: FieldInfo, text: str) -> None:
    flag = f"--{name}"
    if bool in settings.kinds(info):
        group.add_argument(flag, dest=name, nargs="?", const="true", metavar="true|false", help=text)
        group.add_argument(f"--no_{name}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
    elif settings.is_list(info):
        group.add_argument(flag, dest=name, nargs="*", metavar=_metavar(info), help=text)
    else:
        group.add_argument(flag, dest=name, metavar=_metavar(info), help=text)


def _add_section(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    """Add the switch of a section, and a flag for every field in it; one that several methods share is added once."""
    models = settings.section_models(info)
    if not settings.is_choice(info):
        group.add_argument(f"--{name}", dest=name, nargs="?", const="true", metavar="true|false", help=_explained_switch(info))
        group.add_argument(f"--no_{name}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
        for inner, inner_info in fields(models[0]).items():
            _add_field(group, f"{name}.{inner}", inner_info, _explained(inner_info))
        return
    names = [settings.model_name(model) for model in models]
    default = settings.model_name(type(info.get_default(call_default_factory=True)))
    text = f"{info.description} (default: {default})"
    # The long spelling is what --print-config's YAML suggests, so it works too.
    group.add_argument(f"--{name}", dest=name, metavar="{" + ",".join(names) + "}", help=text)
    group.add_argument(f"--{name}.name", dest=name, help=argparse.SUPPRESS)
    owners: dict[str, dict[str, FieldInfo]] = {}
    for model in models:
        for inner, inner_info in fields(model).items():
            if inner != "name":
                owners.setdefault(inner, {})[settings.model_name(model)] = inner_info
    for inner, infos in owners.items():
        whose = "every method" if len(infos) == len(models) else ", ".join(infos)
        first = next(iter(infos.values()))
        others = ", ".join(f"{method} {info.default}" for method, info in infos.items() if info.default != first.default)
        text = _explained(first).removesuffix(")") + (f"; {others})" if others else ")")
        _add_field(group, f"{name}.{inner}", first, f"[{whose}] {text}")


def _explained_switch(info: FieldInfo) -> str:
    return f"{info.description} (default: false; any field below switches it on)"


def _method_list(info: FieldInfo) -> str:
    """List the members of a tagged union, each with its purpose and its own fields."""
    lines = []
    for model in settings.section_models(info):
        own = ", ".join(name for name in fields(model) if name != "name")
        lines += [f"{settings.model_name(model):<16}{(model.__doc__ or '').partition(chr(10))[0]}", f"{'':<16}fields: {own}"]
    return "\n".join(lines)


def _parser(model: type[BaseModel], layout: Layout) -> _Parser:
    """Generate the parser of a verb from the fields of its configuration."""
    positional = "".join(f" [{name.upper()}]" for name in layout.positional)
    parser = _Parser(
        prog=f"ncalign {layout.verb}",
        usage=f"ncalign {layout.verb}{positional} [--config FILE] [--FIELD VALUE ...]",
        description=f"{layout.purpose[:1].upper()}{layout.purpose[1:]}\n\nexample:\n  {layout.example}",
        epilog="Flags override the --config file. Dashes work in place of underscores. Exit codes: 0 done, 1 failed,\n"
        "2 bad usage or configuration, 130 interrupted.",
        formatter_class=lambda prog: _Formatter(prog, max_help_position=34, width=118),
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    starts = {first: title for title, first in layout.groups}
    titles = [title for title, _ in layout.groups] or ["fields"]
    methods = {
        starts.get(name, "fields"): _method_list(info) for name, info in fields(model).items() if settings.is_choice(info)
    }
    groups = {title: parser.add_argument_group(title, methods.get(title)) for title in titles}
    title = titles[0]
    for name, info in fields(model).items():
        title = starts.get(name, title)
        if settings.section_models(info):
            _add_section(groups[title], name, info)
        else:
            _add_field(groups[title], name, info, _explained(info))
    _add_options(parser, dry_run=layout.dry_run)
    return parser


def _add_options(parser: _Parser, *, dry_run: bool) -> None:
    group = parser.add_argument_group("options")
    group.add_argument("--config", metavar="FILE", help="YAML file with values for the fields above")
    group.add_argument("--print-config", action="store_true", help="print the whole configuration as YAML, and stop")
    if dry_run:
        group.add_argument("--dry-run", action="store_true", help="show counts, tokens, memory and time, and stop")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error (also NCALIGN_DEBUG=1)")
    group.add_argument("-h", "--help", action="store_true", help="show this text, and stop")


def _spelt(argument: str, aliases: Mapping[str, str]) -> str:
    """Bring `--learning-rate=1` to the spelling of the field, `--learning_rate=1`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = name[2:].replace("-", "_")
    name = "--" + aliases.get(name, name)
    options = {option.replace("--", "").replace("-", "_"): option for option in _OPTIONS}
    return options.get(name[2:], name) + equals + value


def parse(model: type[BaseModel], layout: Layout, arguments: Sequence[str]) -> Arguments:
    """Parse what follows the verb; unknown flags and stray words are kept as problems, to be reported with the others.

    Args:
        model: The verb's configuration; each of its fields is a flag.
        layout: What the command line has besides.
        arguments: The words after the verb.

    Returns:
        Options and the text given for each field, not yet validated.

    Raises:
        ConfigError: A flag lacks its value.
    """
    parser = _parser(model, layout)
    namespace, rest = parser.parse_known_args([_spelt(argument, dict(layout.aliases)) for argument in arguments])
    given = vars(namespace)
    names = settings.field_names(model)
    options = [option.removeprefix("--") for option in _OPTIONS if option != "--dry-run" or layout.dry_run]
    problems, guessed = [], set()
    for flag in (argument.partition("=")[0] for argument in rest if argument.startswith("-") and argument != "--"):
        guess = settings.nearest(flag.lstrip("-"), [*names, *options])
        guessed.add(guess or "")
        problems.append(f"unknown flag '{flag}'; " + (f"did you mean '--{guess}'?" if guess else "--help lists the flags"))
    words = [argument for argument in rest if not argument.startswith("-")]
    # A word after an unknown flag is most likely its value: no second complaint about it.
    if len(words) > len(layout.positional) and not problems:
        wrong = words[len(layout.positional)]
        problems.append(f"unexpected argument '{wrong}'; a field is set by --FIELD VALUE")
    flags = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items() if name in names}
    for name, word in zip(layout.positional, words, strict=False):
        if name in flags:
            problems.append(f"--{name}: given twice, as '{flags[name]}' and as '{word}'")
        flags[name] = word
    return Arguments(
        help=parser.format_help() if "help" in given else None,
        config=Path(given["config"]) if "config" in given else None,
        print_config="print_config" in given,
        dry_run="dry_run" in given,
        json="json" in given,
        debug="debug" in given or os.environ.get("NCALIGN_DEBUG", "") not in ("", "0"),
        flags=flags,
        problems=tuple(problems),
        guessed=frozenset(guessed),
    )

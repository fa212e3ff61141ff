"""From a YAML file and command-line flags to a validated configuration, with errors that say where and what to do.

Every scalar is kept as the text that was written and read by the type of its field, in YAML as on the command line, so
``1e-5`` is a number in both (YAML 1.1 takes it for a string) and ``learning_rate: yes`` in neither.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ncalign.cli import other_names
from ncalign.core import errors
from ncalign.core import yaml as bounded_yaml
from ncalign.core.config import fields
from ncalign.core.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)
Key = tuple[str, ...]

_NULLS = frozenset({"", "~", "null", "none"})
_ON, _OFF = frozenset({"true", "yes", "on"}), frozenset({"false", "no", "off"})
_YAML_TAG = "tag:yaml.org,2002:"
# pydantic's wording speaks to programmers; these are the same facts for the writer of a YAML file.
_NEEDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "string_type": "must be text",
    "model_type": "must be true, false or a section with fields of its own",
    "model_attributes_type": "must be true, false or a section with fields of its own",
}


@dataclass
class Draft:
    """Values as they were written, and where: ``run.yaml:7`` or ``--learning_rate``."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    names: tuple[str, ...] = ()  # of all fields that there are, dotted

    def origin(self, key: Key) -> str:
        """Return the place of the key, or of the nearest section around it; empty when it was written nowhere."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.where:
                return self.where[key[:length]]
        return ""

    def label(self, key: Key) -> str:
        """Return what a message about this key's value begins with."""
        origin = self.origin(key)
        name = ".".join(key)
        if origin.startswith("--"):
            return origin
        return f"{origin}: {name}" if origin else name


def load(model: type[Config], config_file: Path | None, flags: Mapping[str, str], *, guessed: Collection[str] = ()) -> Config:
    """Make a configuration from a YAML file's values, overridden by flags.

    Args:
        model: The configuration's type.
        config_file: YAML file, or None.
        flags: Dotted field names and the text given for them; several values of a list are joined by commas.
        guessed: Required fields that a misspelt flag probably stood for. They are not reported as missing too, so that
            the error's list may be empty: whoever saw the flag reports it.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: With every problem found: file and line or flag, what was found, what is needed.

    Example:
        >>> from ncalign.data.config import ConvertConfig
        >>> load(ConvertConfig, None, {"input": "a.jsonl", "output": "b.parquet"}).on_bad_row
        'error'
    """
    draft = read_yaml(config_file) if config_file is not None else Draft()
    known, draft.names = fields(model), tuple(field_names(model))
    draft.values |= {name: _opened(known[name], value) for name, value in draft.values.items() if name in known}
    _apply_flags(known, draft, flags)
    missed = set(guessed) | _read_values(model, draft, draft.values, ())
    try:
        config = model.model_validate(draft.values)
    except ValidationError as error:
        draft.problems += _explain(model, draft, error, missed)
        raise ConfigError(draft.problems) from None
    if draft.problems:
        raise ConfigError(draft.problems)
    return config


def to_yaml(config: BaseModel) -> str:
    """Write the whole configuration, defaults included, as YAML that `load` reads back to an equal one."""
    # Letters outside ASCII stay escaped: PyYAML writes some (NEL, for one) so that it does not read the same back.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


# --- What the models say about a field -------------------------------------------------------------------------------


def kinds(info: FieldInfo) -> tuple[Any, ...]:
    """Return the types that a field takes: the members of its union, or its one type."""
    annotation: Any = info.annotation
    found = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in found)


def section_models(info: FieldInfo) -> tuple[type[BaseModel], ...]:
    """Return the models of a field that is a section of its own (one, or a choice by name); empty for a plain field."""
    return tuple(kind for kind in kinds(info) if isinstance(kind, type) and issubclass(kind, BaseModel))


def is_list(info: FieldInfo) -> bool:
    """Whether a field takes several values."""
    return any(get_origin(kind) is tuple for kind in kinds(info))


def is_choice(info: FieldInfo) -> bool:
    """Whether a field is a section whose model is chosen by its ``name``."""
    return info.discriminator is not None


def item_info(info: FieldInfo) -> FieldInfo | None:
    """Return what a list's items are where these are sections; None for any other field."""
    for kind in kinds(info):
        if get_origin(kind) is tuple:
            item = FieldInfo.from_annotation(get_args(kind)[0])
            return item if section_models(item) else None
    return None


def model_name(model: type[BaseModel]) -> str:
    """Return the name that chooses this member of a tagged union."""
    return str(fields(model)["name"].default)


def own_fields(model: type[BaseModel]) -> list[str]:
    """List the fields of a method's configuration, or of any other, without the name that chooses it."""
    return [name for name in fields(model) if name != "name"]


def field_names(model: type[BaseModel]) -> list[str]:
    """List the dotted names of all fields, those of every method included."""
    names = []
    for key, info in fields(model).items():
        inner = (name for section in section_models(info) for name in field_names(section))
        names += [key, *(f"{key}.{name}" for name in inner if not (is_choice(info) and name == "name"))]
    return list(dict.fromkeys(names))


def nearest(name: str, names: Collection[str]) -> str | None:
    """Return the known name that was probably meant: the same inside a section, or the one most alike."""
    return next((known for known in names if known.rpartition(".")[2] == name), None) or errors.nearest(name, names)


def other_name(key: str, value: object, names: Collection[str], *, flag: bool) -> other_names.Answer | None:
    """Say what a key of another trainer's configuration is here; in a section only what that section has.

    Args:
        key: dotted.
        value: what was written for it.
        names: dotted names of all fields.
        flag: whether it was written as a flag.
    """
    section, _, name = key.rpartition(".")
    text = ",".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else ""
    found = other_names.answer(name, text, names, flag=flag)
    elsewhere = found is not None and section not in ("", found.field.partition(".")[0])
    return None if elsewhere else found


def hint(name: object, names: Collection[str]) -> str:
    """Say which known name was probably meant, or which ones there are."""
    guess = nearest(name, names) if isinstance(name, str) else None
    return f"did you mean '{guess}'?" if guess else f"must be one of {', '.join(names)}"


def _chosen(info: FieldInfo, value: object) -> type[BaseModel] | None:
    """Return the model of a section for what was written there; None when there's none or the name is unknown."""
    models = section_models(info)
    if not is_choice(info):
        return models[0] if models else None
    if not isinstance(value, dict) or "name" not in value:
        default = info.get_default(call_default_factory=True)
        return type(default) if isinstance(default, BaseModel) else None
    return next((model for model in models if model_name(model) == value["name"]), None)


# --- YAML ------------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> Draft:
    """Read a YAML mapping with the line of every key; scalars stay text.

    Raises:
        ConfigError: The file can't be read, is beyond the bounds of `core.yaml`, or isn't well-formed YAML with a mapping at
            its top.
    """
    try:
        node = bounded_yaml.compose(bounded_yaml.read_text(path))
    except OSError as error:
        raise ConfigError([f"config file {path}: {error.strerror}; check --config"]) from None
    except bounded_yaml.BoundsError as error:
        raise ConfigError([f"config file {path}: {error}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"config file {path}: not UTF-8 text (byte {error.start}); save it as UTF-8"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError([f"{place}: not well-formed YAML: {error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not well-formed YAML: {str(error).splitlines()[0]}"]) from None
    draft = Draft()
    if node is None:
        return draft
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([f"{path}:{_line(node)}: must be 'field: value' lines at the top level"])
    value = _plain(node, (), path, draft, frozenset())
    draft.values = value if isinstance(value, dict) else {}
    return draft


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _plain(node: yaml.Node, key: Key, path: Path, draft: Draft, around: frozenset[int]) -> object:
    """Turn a node into dicts, lists, text and None; lines and problems go to the draft."""
    if id(node) in around:
        draft.problems.append(f"{path}:{_line(node)}: an alias contains itself")
        return None
    if not node.tag.startswith(_YAML_TAG) or node.tag.startswith(f"{_YAML_TAG}python"):
        draft.problems.append(f"{path}:{_line(node)}: the tag {node.tag!r} is not allowed; write a plain value")
    around |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*key, str(index)), path, draft, around) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return None if node.tag == f"{_YAML_TAG}null" else node.value
    values: dict[str, object] = {}
    for name_node, value_node in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            draft.problems.append(f"{path}:{_line(name_node)}: a key must be a plain name")
            continue
        inner = (*key, name_node.value)
        if name_node.value in values:
            first = draft.where[inner].rpartition(":")[2]
            draft.problems.append(
                f"{path}:{_line(name_node)}: duplicate key '{'.'.join(inner)}' (first on line {first}); keep one"
            )
            continue
        draft.where[inner] = f"{path}:{_line(name_node)}"
        values[name_node.value] = _plain(value_node, inner, path, draft, around)
    return values


# --- Sections and flags ----------------------------------------------------------------------------------------------


def _opened(info: FieldInfo, value: object) -> object:
    """Spell out the short forms of a section (``lora: true``, ``lora: false``, ``objective: nca``); leave other values."""
    if not isinstance(value, str) or not section_models(info):
        return value
    if is_choice(info):
        return {"name": value}
    if value.lower() in _ON:
        return {}
    if NoneType in kinds(info) and value.lower() in _OFF | _NULLS:
        return None
    return value


def _apply_flags(known: Mapping[str, FieldInfo], draft: Draft, flags: Mapping[str, str]) -> None:
    """Lay flags over the file's values; the switch of a section goes before the fields in it."""
    for name in sorted(flags, key=lambda name: name.count(".")):
        head, _, inner = name.partition(".")
        section, around = draft.values.get(head), name.rpartition(".")[0]
        off = section is None if around == head else flags.get(around, "on").lower() in _OFF | _NULLS
        if inner and off and around in flags:
            draft.problems.append(f"--{name}: can't be used with --{around} {flags[around]}, which switches it off")
        elif not inner and section_models(known[head]):
            _switch_section(known[head], draft, head, flags[head])
        else:
            draft.values[head] = _with_flag(section, inner, flags[name])
            draft.where[tuple(name.split("."))] = f"--{name}"


def _with_flag(section: object, inner: str, text: str) -> object:
    """Lay a flag over the value of a section, or of a section in it: ``objective.estimator.candidates``."""
    if not inner:
        return text
    so_far = section if isinstance(section, dict) else {}
    head, _, rest = inner.partition(".")
    return {**so_far, head: _with_flag(so_far.get(head), rest, text)}


def _switch_section(info: FieldInfo, draft: Draft, head: str, text: str) -> None:
    """Apply ``--objective NAME`` or ``--lora true|false``.

    Another method starts from its own defaults: fields that were written for one method say nothing about another, even
    where they share a name. The same method, or ``true``, leaves the file's section as it is.
    """
    before = draft.values.get(head)
    after = _opened(info, text)
    if isinstance(before, dict) and isinstance(after, dict) and _chosen(info, before) is _chosen(info, after):
        return
    draft.values[head] = after
    draft.where = {key: origin for key, origin in draft.where.items() if key[0] != head}
    draft.where[(head,)] = f"--{head}"


# --- Checks ----------------------------------------------------------------------------------------------------------


def _read_values(
    model: type[BaseModel], draft: Draft, values: dict[str, Any], around: Key, choices: tuple[type[BaseModel], ...] = ()
) -> set[str]:
    """Read the texts of lists and nulls; report unknown keys and take them out, so that the rest can be checked too.

    Args:
        model: whose fields they are.
        draft: where they come from; problems are added to it.
        values: what was written for the fields; changed in place.
        around: the key of the section that they are in.
        choices: the models that could have been chosen by name in this section.

    Returns:
        The fields that unknown keys probably stood for.
    """
    guesses: set[str] = set()
    for name, value in list(values.items()):
        key, info = (*around, name), fields(model).get(name)
        if info is None:
            guesses.add(_report_unknown(draft, key, value, model, choices))
            del values[name]
            continue
        value = values[name] = _read_text(info, _opened(info, value)) if isinstance(value, str) else value
        if isinstance(value, dict) and section_models(info):
            found = _read_section(info, draft, value, key)
        elif isinstance(value, list) and (item := item_info(info)) is not None:
            value = values[name] = [_opened(item, one) for one in value]
            found = _read_items(item, draft, value, key)
        else:
            continue
        guesses |= found or set()
        if found is None:
            guesses.add(".".join(key))
            del values[name]
    return guesses


def _read_section(info: FieldInfo, draft: Draft, value: dict[str, Any], key: Key) -> set[str] | None:
    """Read the values of a section in place, as `_read_values` does; None, and a problem, where no model has its name."""
    chosen = _chosen(info, value)
    if chosen is None:
        known = [model_name(model) for model in section_models(info)]
        written = value.get("name")
        theirs = other_names.method(str(written))
        advice = theirs.text if theirs else hint(written, known)
        draft.problems.append(f"{draft.label(key)}: found {_shown(written)}; {advice}")
        return None
    if is_choice(info):
        value.setdefault("name", model_name(chosen))
    return _read_values(chosen, draft, value, key, section_models(info) if is_choice(info) else ())


def _read_items(info: FieldInfo, draft: Draft, items: list[object], key: Key) -> set[str] | None:
    """Read a list of sections, each as a section of its own; None where one of them has no model."""
    found = [_read_section(info, draft, one, (*key, str(n))) for n, one in enumerate(items) if isinstance(one, dict)]
    return None if None in found else set().union(*(guesses for guesses in found if guesses is not None))


def _read_text(info: FieldInfo, text: object) -> object:
    """Read ``null`` as nothing, and ``a,b`` and ``[a, b]`` as lists, where the field takes them."""
    if not isinstance(text, str):
        return text
    if NoneType in kinds(info) and text.strip().lower() in _NULLS:
        return None
    if not is_list(info) or (str in kinds(info) and not re.search(r"^\[.*\]$|,", text.strip())):
        return text
    inside = re.sub(r"^\[(.*)\]$", r"\1", text.strip())
    items = [item.strip().strip("'\"") for item in inside.split(",")]
    return [] if inside.lower() in _NULLS else [item for item in items if item]


def _report_unknown(draft: Draft, key: Key, value: object, model: type[BaseModel], choices: tuple[type[BaseModel], ...]) -> str:
    """Add the problem of one unknown key and return the field it was taken for, or ''."""
    origin, around = draft.origin(key), "".join(f"{part}." for part in key[:-1])
    dashes = "--" if origin.startswith("--") else ""
    start = f"{'unknown flag' if dashes else f'{origin}: unknown key'} '{dashes}{around}{key[-1]}'"
    others = [model_name(choice) for choice in choices if key[-1] in fields(choice)]
    theirs = None if others else other_name(".".join(key), value, draft.names, flag=bool(dashes))
    if theirs is not None:
        draft.problems.append(f"{start}; {theirs.text}")
        return theirs.field
    guess = None if others else nearest(key[-1], field_names(model))
    if guess is not None:
        draft.problems.append(f"{start}; did you mean '{dashes}{around}{guess}'?")
        return around + guess
    belongs = f" (a field of {', '.join(others)})" if others else ""
    owner = f"'{model_name(model)}'" if choices else "it"
    has = f"{owner} has {', '.join(own_fields(model))}" if around else "--help lists the fields"
    draft.problems.append(f"{start}{belongs}; {has}")
    return ""


def _explain(model: type[BaseModel], draft: Draft, error: ValidationError, missed: Collection[str]) -> list[str]:
    """Turn pydantic's errors into one line for each field, and one for all that is missing."""
    problems: dict[Key, str] = {}
    missing = []
    for fault in error.errors(include_url=False):
        key = _field_key(model, fault["loc"])
        if fault["type"] == "missing":
            missing.append(".".join(key))
        elif not key:
            problems.setdefault(key, _explain_whole(model, draft, fault["msg"].removeprefix("Value error, ")))
        elif fault["type"] == "value_error" and isinstance(fault["input"], dict):
            problems.setdefault(key, f"{draft.label(key)}: {fault['msg'].removeprefix('Value error, ')}")
        else:
            needs = _needs(fault["type"], fault["msg"], fault["input"])
            # A field that refuses what may be a key or a password says so.
            found = "a value that is not shown" if fault["type"] == "secret" else _shown(fault["input"])
            if key in problems and fault["type"] == "literal_error":
                problems[key] += f", or {needs.removeprefix('must be ')}"
            problems.setdefault(key, f"{draft.label(key)}: found {found}; {needs}")
    lines = list(problems.values())
    missing = [name for name in missing if name not in missed]
    if missing:
        flags = " ".join(f"--{name} ..." for name in missing)
        lines.append(f"missing: {', '.join(missing)}; give {flags}, or the same keys in the --config file")
    return lines


def _explain_whole(model: type[BaseModel], draft: Draft, message: str) -> str:
    """Put before a message about several fields the places where those were written."""
    named = [name for name in fields(model) if re.search(rf"\b{name}\b", message)]
    places = [origin for name in named if (origin := draft.origin((name,)))]
    return ": ".join(filter(None, (", ".join(places), message)))


def _field_key(model: type[BaseModel], location: tuple[int | str, ...]) -> Key:
    """Drop from pydantic's location what is no key of ours: the names of union members."""
    key: list[str] = []
    models: tuple[type[BaseModel], ...] = (model,)
    items: FieldInfo | None = None
    for part in location:
        info = next((fields(known)[part] for known in models if part in fields(known)), None)
        if isinstance(part, str) and info is not None:
            key.append(part)
            items = item_info(info)
            models = section_models(info) if items is None else section_models(items)
        elif isinstance(part, int) and key and items is not None:
            key.append(str(part))
    return tuple(key)


def _needs(kind: str, message: str, found: object) -> str:
    text = _NEEDS.get(kind) or message.partition(", unable")[0].replace("Input should be", "must be")
    if kind == "literal_error" and isinstance(found, str):
        guess = nearest(found, re.findall(r"'([^']+)'", message))
        text += f"; did you mean '{guess}'?" if guess else ""
    return text


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a section"
    return "a list" if isinstance(value, list | tuple) else repr(value)

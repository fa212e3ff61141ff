"""A study's file → the configurations of its runs: arms are what flags would be, laid over the base run's settings."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ncalign.core import yaml as bounded_yaml
from ncalign.core.config import fields
from ncalign.core.errors import ConfigError, nearest
from ncalign.online.config import OnlineConfig
from ncalign.study.config import ANSWERED, BEFORE, OF_PAIRS, OF_TASKS, Measure, Scale, StudyFile
from ncalign.training.config import TrainConfig

Load = Callable[[type[BaseModel], Path | None, Mapping[str, str]], BaseModel]
"""Reads a run's settings from a YAML file and flags, as the command line does."""
SCALES = ("tiny", "small", "paper")
_OWN = ("seed", "output_dir", "resume", "overwrite", "accept_changes")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_CLAIM = re.compile(r"(\S+) > (\S+)(?: by (\S+))?")


@dataclass(frozen=True)
class Claim:
    """That one arm's measure is higher than another's."""

    better: str
    worse: str
    measure: Measure

    def text(self) -> str:
        """As it is written."""
        return f"{self.better} > {self.worse} by {self.measure}"


@dataclass(frozen=True)
class Study:
    """A study, read and checked.

    Attributes:
        name: of its file.
        file: what that holds, at the scale that was asked for.
        measures: what is measured, the main one first.
        claims: what is compared.
    """

    name: str
    file: StudyFile
    measures: tuple[Measure, ...]
    claims: tuple[Claim, ...]


def shipped() -> dict[str, Path]:
    """The studies that come with ncalign, by name."""
    folder = Path(str(resources.files("ncalign.study") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_study(study: str, *, scale: Scale, seeds: int | None = None, data: Path | None = None) -> Study:
    """Read a study's file, or a shipped study by its name.

    Args:
        study: path or name.
        scale: laid over what the file says, where it has ``scales``.
        seeds: in place of the file's.
        data: file of programs, in place of what the file's material names.

    Raises:
        ConfigError: there is no such study, or its file holds something else; one line for each problem.
    """
    path = Path(study)
    if not path.is_file():
        known = shipped()
        if study not in known:
            guess = nearest(study, known)
            advice = f"did you mean '{guess}'?" if guess else f"shipped are {', '.join(known)}"
            raise ConfigError([f"study: there is no file and no shipped study {study!r}; {advice}"])
        path = known[study]
    values = _at_scale(_read(path), scale, path)
    if seeds is not None:
        values["seeds"] = seeds
    if data is not None:
        values["material"] = {**(values.get("material") or {}), "data": str(data)}
    try:
        file = StudyFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{path}: {_worded(one)}" for one in error.errors(include_url=False)]) from None
    problems = [*_names(file), *_own_settings(file)]
    if file.before:
        file = file.model_copy(update={"arms": {BEFORE: {}, **file.arms}})
    measures = file.measures or _all_measures(file)
    claims, wrong = _claims(file, measures)
    if problems or wrong:
        raise ConfigError([f"{path}: {problem}" for problem in (*problems, *wrong)])
    return Study(path.stem, file, measures, claims)


def run_config(study: Study, arm: str, own: Mapping[str, str], *, load: Load) -> TrainConfig | OnlineConfig:
    """The configuration of one run.

    Args:
        study: with its base and arms.
        arm: its name.
        own: what differs from run to run, such as its seed and folder, as flags.
        load: reads settings.

    Raises:
        ConfigError: settings that can't be used; the messages name the study and the arm.
    """
    model = TrainConfig if study.file.verb == "train" else OnlineConfig
    base, flags = dict(study.file.base), dict[str, str]()
    for key, value in (study.file.arms[arm] or {}).items():
        name = key.partition(".")[0]
        if name not in fields(model):
            guess = nearest(name, fields(model))
            advice = f"did you mean '{guess}'?" if guess else f"ncalign {study.file.verb} --help lists the settings"
            raise ConfigError([f"study {study.name}, arm {arm!r}: unknown setting '{key}'; {advice}"])
        if _holds_sections(value):
            base[key] = value  # no flag holds a list of sections, such as a mix's parts
        else:
            flags |= {inner: _text(one) for inner, one in _flat({key: value})}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "base.yaml"
        written.write_text(yaml.safe_dump(_texts(base), sort_keys=False), encoding="utf-8")
        try:
            config = load(model, written, {**flags, **own})
        except ConfigError as error:
            lines = [re.sub(rf"{re.escape(str(written))}:\d+: ", "base: ", problem) for problem in error.problems]
            raise ConfigError([f"study {study.name}, arm {arm!r}: {line}" for line in lines]) from None
    assert isinstance(config, TrainConfig | OnlineConfig)
    return config


def training_of(config: TrainConfig | OnlineConfig) -> TrainConfig:
    """The training settings of a run."""
    return config.training if isinstance(config, OnlineConfig) else config


# --- Reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        values = bounded_yaml.load(bounded_yaml.read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: must hold a study: base, arms and more, as 'name: value' lines"])
    return values


def _at_scale(values: dict[str, Any], scale: Scale, path: Path) -> dict[str, Any]:
    """The file's values with those of a scale laid over them: sections field by field, arms and all else as a whole."""
    scales = values.pop("scales", None)
    if scales is None:
        return values
    if not isinstance(scales, dict) or not set(scales) <= set(SCALES):
        raise ConfigError([f"{path}: scales may have {', '.join(SCALES)}, each with what differs there"])
    if scale not in scales:
        raise ConfigError([f"{path}: there is no scale {scale}; it has {', '.join(scales)} (--scale)"])
    for name, value in (scales[scale] or {}).items():
        before = values.get(name)
        merges = name != "arms" and isinstance(before, dict) and isinstance(value, dict)
        values[name] = _merged(before or {}, value) if merges else value
    return values


def _merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Sections with those of ``after`` laid over them, field by field."""
    made = dict(before)
    for name, value in after.items():
        inner = made.get(name)
        made[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return made


def _worded(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        guess = nearest(str(fault["loc"][-1]), [*StudyFile.model_fields, "scales"])
        message = f"unknown key; did you mean '{guess}'?" if guess else "unknown key"
    return f"{where}: {message}" if where else message


def _names(file: StudyFile) -> Iterator[str]:
    for arm in file.arms:
        if arm == BEFORE and file.before:
            yield f"arms: {arm!r} is the starting model, with before: true: name this arm otherwise"
        elif not _NAME.fullmatch(arm) or len(arm) > 60:
            yield f"arms: {arm[:60]!r} names folders: letters, digits, '.', '_', '+' and '-' are allowed, 60 at most"


def _own_settings(file: StudyFile) -> Iterator[str]:
    for where, settings in (("base", file.base), *((f"arms.{arm}", values or {}) for arm, values in file.arms.items())):
        for name in _OWN:
            if name in settings:
                yield f"{where}.{name}: the study sets it for each run (seeds: is the number of seeds)"


def _all_measures(file: StudyFile) -> tuple[Measure, ...]:
    answered = ANSWERED if file.evaluate is not None or file.material is not None else ()
    of_before = OF_PAIRS if answered and file.before else ()
    of_tasks = OF_TASKS if file.tasks is not None else ()
    return (*answered, *of_before, *of_tasks, "reward_accuracy", "chosen_change", "rejected_change")


def _claims(file: StudyFile, measures: Sequence[Measure]) -> tuple[tuple[Claim, ...], list[str]]:
    """The claims, and what is wrong with those that can't be read."""
    first, *others = file.arms
    written = file.compare or tuple(f"{arm} > {first}" for arm in others)
    claims, problems = [], []
    for text in written:
        found = _CLAIM.fullmatch(text.strip())
        if found is None:
            problems.append(f"compare: {text!r} must read 'ARM > ARM' or 'ARM > ARM by MEASURE'")
            continue
        measure = next((name for name in measures if name == (found[3] or measures[0])), None)
        for arm in (found[1], found[2]):
            if arm not in file.arms:
                problems.append(f"compare: {text!r}: there is no arm {arm!r}; there are {', '.join(file.arms)}")
        if measure is None:
            problems.append(f"compare: {text!r}: {found[3]!r} is not measured; measured are {', '.join(measures)}")
        elif found[1] == found[2]:
            problems.append(f"compare: {text!r} compares an arm with itself")
        else:
            claims.append(Claim(found[1], found[2], measure))
    return tuple(claims), problems


# --- Settings as flags ------------------------------------------------------------------------------------------------


def _flat(values: Mapping[str, Any], around: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; the ``name`` in a section is the section's own value, as in ``--objective nca``."""
    for name, value in values.items():
        key = f"{around}{name}"
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        else:
            yield key.removesuffix(".name"), value


def _holds_sections(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_sections, value.values()))
    return isinstance(value, list) and any(isinstance(one, dict) for one in value)


def _text(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _texts(value: Any) -> Any:
    """Values as YAML that reads back the same: ``1e-5``, which YAML 1.1 takes for a text, stays one."""
    if isinstance(value, dict):
        return {str(key): _texts(inner) for key, inner in value.items()}
    return [_texts(inner) for inner in value] if isinstance(value, list) else value

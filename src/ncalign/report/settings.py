"""The settings of a run, as its config.yaml has them, and where those of several runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ncalign.core import yaml as bounded_yaml
from ncalign.report.tables import Column, Table

CONFIG = "config.yaml"
_PLACES = frozenset({"output_dir", "cache_dir", "overwrite", "resume"})
"""Settings by which runs that are alike may differ."""


def read_settings(run_folder: Path) -> dict[str, Any]:
    """The configuration of a run; empty where the folder has none.

    Raises:
        ValueError: the file can't be read as one.
    """
    path = run_folder / CONFIG
    if not path.is_file():
        return {}
    try:
        found = bounded_yaml.load(bounded_yaml.read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read ({str(error).splitlines()[0]}): restore it, or delete it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no configuration: restore it, or delete it")
    return found


def flat_settings(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Settings by their whole names, sections within sections, with their values as text.

    >>> flat_settings({"seed": 0, "objective": {"name": "nca", "alpha": None}})
    {'seed': '0', 'objective.name': 'nca', 'objective.alpha': 'none'}
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat_settings(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = _text(value)
    return found


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    if value is None or value == {}:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def differing(runs: Mapping[str, Mapping[str, str]]) -> Table | None:
    """The settings in which runs differ, a row each and a column for each run; None where there are none.

    Args:
        runs: flat settings by the run's name; of a run without any, none are compared.
    """
    compared = {name: settings for name, settings in runs.items() if settings}
    names: Sequence[str] = list(dict.fromkeys(name for settings in compared.values() for name in settings))
    rows = tuple(
        (name, *(settings.get(name) for settings in compared.values()))
        for name in names
        if name not in _PLACES and len({settings.get(name) for settings in compared.values()}) > 1
    )
    reasons = {("", ""): "the run has no such setting"}
    return Table((Column("setting"), *map(Column, compared)), rows, reasons=reasons) if rows else None

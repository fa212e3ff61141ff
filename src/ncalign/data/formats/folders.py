"""Which files of a folder are data, and of which split: as the hub and `datasets` lay them out.

The splits are those of the folder's card, of its saved dataset, or those that names of files and folders tell. One is read at a
time: rows that are kept for a test must not be trained on by chance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from fsspec.utils import glob_translate

from ncalign.core import yaml as bounded_yaml
from ncalign.core.errors import DataError

_RECORDS = re.compile(
    r"config\.json|dataset_infos?\.json|dataset_dict\.json|state\.json|.*croissant.*\.json|cache-.*\.arrow|indices-.*\.arrow",
    re.IGNORECASE,
)
"""Files that the hub and `datasets` write beside data."""
# An older `datasets` put a hash behind the number.
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-.*)?")
_TRAIN = "train"
# A path that holds several is kept from training.
_KEYWORDS = {
    "test": r"tests?|testing|eval|evaluation|held[-_]?out|holdout",
    "validation": r"validation|valid|val|dev",
    _TRAIN: r"train|training",
}
_HELD_OUT = ("test", "validation")
_SPLITS = {split: re.compile(rf"(?:^|[\W\d_])(?:{words})(?:$|[\W\d_])", re.IGNORECASE) for split, words in _KEYWORDS.items()}
_CARD = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def with_split(given: str | Path) -> tuple[Path, str | None]:
    """A path, and the split that ``folder:split`` names; a path that is there is taken as it is.

    >>> with_split("rows.jsonl")
    (PosixPath('rows.jsonl'), None)
    """
    path = Path(given)
    folder, colon, split = str(given).rpartition(":")
    if colon and split and not path.exists() and Path(folder).is_dir():
        return Path(folder), split
    return path, None


def data_files(folder: Path, split: str | None, is_data: Callable[[str], bool]) -> list[Path]:
    """The files of one split, in the order of their names.

    Args:
        folder: where they lie, at any depth.
        split: its name; None where there is only one.
        is_data: whether a file's lower-case name is that of a file that can be read.

    Raises:
        ValueError: there are several splits and none is named, or not the one that is.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path.relative_to(folder), is_data))
    arrow = [path for path in found if path.name.lower().endswith(".arrow")]
    splits, others = _of_card(folder, found), list[Path]()
    if not splits:
        splits, others = _of_names(folder, arrow or found)
    if split is None:
        if len(splits) > 1 or others:
            beside = f", and beside them {', '.join(str(path.relative_to(folder)) for path in others[:3])}" if others else ""
            beside += f" and {len(others) - 3} more that name none" if len(others) > 3 else ""
            has = "the splits" if len(splits) > 1 else "the split"
            raise DataError(f"{folder} has {has} {_listed(splits)}{beside}: name one, as {folder}:{next(iter(splits))}")
        return next(iter(splits.values()), [])
    # A configuration that has one split needs no more than its own name.
    chosen = [files for name, files in splits.items() if split in (name, name.partition("/")[0])]
    if len(chosen) != 1:
        what = "has no split" if not chosen else "has several splits in"
        hint = f"name one of {_listed(splits)}" if splits else "it has no file that can be read"
        raise DataError(f"{folder} {what} {split!r}: {hint}")
    return chosen[0]


def _listed(splits: dict[str, list[Path]]) -> str:
    return ", ".join(f"{name} ({len(files)} file{'s' if len(files) > 1 else ''})" for name, files in splits.items())


def _is_data(path: Path, is_data: Callable[[str], bool]) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return is_data(path.name.lower()) and not hidden and not _RECORDS.fullmatch(path.name)


def _of_names(folder: Path, files: list[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The splits that paths name, and the files that name none where others are named for training.

    `datasets` passes the second over without a word. Where nothing is named for training, they are for training.
    """
    saved = _saved_splits(folder)
    splits: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in files:
        inside = path.relative_to(folder)
        split = inside.parts[0] if inside.parts[0] in saved else _split_of(inside)
        (others if split is None else splits.setdefault(split, [])).append(path)
    if others and all(_keyword(split) in _HELD_OUT for split in splits):
        splits[_TRAIN], others = others, []
    return dict(sorted(splits.items(), key=lambda item: not item[0].startswith(_TRAIN))), others


def _saved_splits(folder: Path) -> tuple[str, ...]:
    try:
        found = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return tuple(map(str, found["splits"])) if isinstance(found, dict) and isinstance(found.get("splits"), list) else ()


def _split_of(path: Path) -> str | None:
    """The split that a file's path within the folder names; None where it names none.

    >>> [_split_of(Path(path)) for path in ("data/test_prefs-00000-of-00001.parquet", "dev/a.jsonl", "a.jsonl")]
    ['test_prefs', 'validation', None]
    """
    stem = path.name.split(".")[0]
    shard = _SHARD.fullmatch(stem)
    if shard and re.fullmatch(r"\w+", shard[1]) and (_keyword(shard[1]) or path.parent.name == "data"):
        return shard[1]
    return _keyword(str(path))


def _keyword(name: str) -> str | None:
    return next((split for split, words in _SPLITS.items() if words.search(name)), None)


def _of_card(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The splits that the card names, as ``configuration/split`` where it has several; empty where it names none."""
    configs = [config for config in _configs(folder) if config.get("data_files")]
    splits: dict[str, list[Path]] = {}
    for config in configs:
        for split, pattern in _patterns(config["data_files"]):
            name = f"{config.get('config_name', 'default')}/{split}" if len(configs) > 1 else split
            under = folder / str(config.get("data_dir") or ".")
            chosen = [path for path in files if _matches(path, under, pattern)]
            if chosen:
                splits[name] = sorted({*splits.get(name, []), *chosen})
    return splits


def _matches(path: Path, under: Path, pattern: str) -> bool:
    if not path.is_relative_to(under):
        return False
    inside = path.relative_to(under).as_posix()
    try:
        return re.match(glob_translate(pattern.removeprefix("./")), inside) is not None
    except ValueError as error:
        raise DataError(f"{under}: the card README.md names the files {pattern!r}: {error}; mend it there") from error


def _configs(folder: Path) -> list[dict[str, Any]]:
    try:
        card = _CARD.match((folder / "README.md").read_text(encoding="utf-8"))
        found = bounded_yaml.load(card[1]) if card else None
    except bounded_yaml.BoundsError as error:
        raise DataError(f"{folder / 'README.md'}: the card can't be read: {error}; mend it there") from error
    except (OSError, ValueError, yaml.YAMLError):
        return []  # a text about the data need not be a card
    configs = found.get("configs") if isinstance(found, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Each split with each of its patterns, in any of the forms that a card may have."""
    if isinstance(data_files, str):
        yield _TRAIN, data_files
    elif isinstance(data_files, dict):
        for split, patterns in data_files.items():
            yield from ((str(split), str(pattern)) for pattern in (patterns if isinstance(patterns, list) else [patterns]))
    elif isinstance(data_files, list):
        for one in data_files:
            if isinstance(one, dict) and "path" in one:
                yield from _patterns({one.get("split", _TRAIN): one["path"]})
            elif isinstance(one, str):
                yield _TRAIN, one

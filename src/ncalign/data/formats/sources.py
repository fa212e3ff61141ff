"""Where rows come from: files, folders of files, saved datasets, the hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from ncalign.core.errors import DataError
from ncalign.core.hub import only_cached
from ncalign.core.install import install_hint
from ncalign.data.formats import delimited, document, folders, jsonl, parquet
from ncalign.data.formats.parsing import Row
from ncalign.data.formats.values import json_row

Kind: TypeAlias = Literal["jsonl", "jsonl.gz", "parquet"]
Rows: TypeAlias = Generator[tuple[int, Row | DataError], None, None]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.\[\]%+-]+)?")
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", *delimited.SUFFIXES)


@dataclass(frozen=True)
class Source:
    """One stream of rows.

    Attributes:
        name: for origins and ids.
        label: for messages: the path.
        unit: what a number counts, where it is not a line.
        rows: opens the stream.
    """

    name: str
    label: str
    unit: str
    rows: Callable[[], Rows]


def kind_of(path: Path) -> Kind:
    """The kind of a file, by its name.

    Raises:
        ValueError: it tells none.
    """
    name = path.name.lower()
    if name.endswith((".jsonl", ".json")):
        return "jsonl"
    if name.endswith((".jsonl.gz", ".json.gz")):
        return "jsonl.gz"
    if name.endswith(".parquet"):
        return "parquet"
    raise DataError(f"{path}: can't tell the kind of file by its name: .jsonl, .jsonl.gz or .parquet is needed")


def is_folder_name(path: Path) -> bool:
    """Whether a path is, or by its name will be, a folder: a suffix of letters is a file's, one such as ``-v1.0`` is not."""
    return path.is_dir() or not re.fullmatch(r"\.[A-Za-z]+\d?", path.suffix)


def find_sources(given: str | Path) -> list[Source]:
    """The streams of a path or a hub id, in the order of their names.

    Raises:
        ValueError: there is nothing there that can be read.
    """
    path, split = folders.with_split(given)
    if path.is_dir():
        return _folder(path, split)
    name = str(given)
    if not path.exists() and not name.lower().endswith(_SUFFIXES) and _HUB_ID.fullmatch(name):
        _check_hub(name)
        return [Source(name, name, "row ", partial(_hub_rows, name))]
    return [_file(path, path.name)]


def rows_of(path: Path) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """The objects of a file, in JSON's types, each with its place.

    Raises:
        ValueError: the file can't be read, or has something else in it.
    """
    for source in find_sources(path):
        with closing(source.rows()) as rows:
            for number, row in rows:
                place = f"{source.label}:{source.unit}{number}"
                if isinstance(row, DataError):
                    raise row.within(place)
                yield place, json_row(row)[0]


def _file(path: Path, name: str) -> Source:
    if path.name.lower().endswith(".arrow") and path.exists():
        return Source(name, str(path), "row ", partial(_arrow_rows, path))
    if not path.name.lower().endswith(_SUFFIXES):
        raise DataError(
            f"{path}: can't tell the kind of file by its name: .jsonl, .json, .csv, .tsv (also with .gz) or .parquet is needed"
        )
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path (relative paths start at {Path.cwd()})")
    if delimited.is_delimited(path):
        return Source(name, str(path), "", partial(delimited.read_rows, path))
    kind = kind_of(path)
    if kind == "parquet":
        return Source(name, str(path), "row ", partial(parquet.read_rows, path))
    if path.name.lower().endswith((".json", ".json.gz")) and document.is_document(path):
        return Source(name, str(path), "element ", partial(document.read_rows, path))
    return Source(name, str(path), "", partial(jsonl.read_rows, path))


def _folder(path: Path, split: str | None) -> list[Source]:
    files = folders.data_files(path, split, lambda name: name.endswith((*_SUFFIXES, ".arrow")))
    if not files:
        raise DataError(f"{path} is a folder without a .jsonl, .json, .parquet, .csv, .tsv or .arrow file: nothing to read")
    return [_file(file, str(file.relative_to(path))) for file in files]


def _arrow_rows(path: Path) -> Rows:
    try:
        with pa.memory_map(str(path)) as memory:
            try:
                reader: Any = pa.ipc.open_stream(memory)
                batches: Iterator[pa.RecordBatch] = iter(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(memory)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            yield from parquet.numbered_rows(_small(batches))
    except parquet.UNREADABLE as error:
        raise DataError(f"{path}: can't read the Arrow file: {parquet.cause_of(error)}; save the dataset again") from error


def _small(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches in pieces, each looked through: damaged offsets would crash what reads them."""
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, parquet.BATCH_ROWS):
            yield batch.slice(start, parquet.BATCH_ROWS)


def _check_hub(name: str) -> None:
    """Raise where a data set of the hub can't be had, before a model is loaded for it."""
    if importlib.util.find_spec("datasets") is None:
        needed = f"as a hub id it needs the package datasets: {install_hint('hub')}"
        raise DataError(f"{name}: no such file or folder; {needed}")
    try:
        only_cached(name.partition(":")[0], what="data", kind="dataset")
    except ValueError as error:
        raise DataError(str(error)) from error


def _hub_rows(name: str) -> Rows:
    """Stream a dataset of the hub, or of its cache."""
    import datasets

    repository, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(repository, split=split or "train", streaming=True)
        for number, row in enumerate(found, start=1):
            yield number, dict(row)
    except Exception as error:  # the library raises classes of several packages
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(f"{name}: there is no such file, and as a hub id: {reason}") from error

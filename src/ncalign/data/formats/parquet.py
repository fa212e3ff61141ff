"""Rows of Parquet files, read by record batch and written by row group."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ncalign.core.errors import DataError, names
from ncalign.data.formats.group import MESSAGE_KEYS, MORE_KEYS, Candidate, Group, Text
from ncalign.data.formats.opened import refuse_others
from ncalign.data.formats.parsing import Row

BATCH_ROWS = 512
MAX_BATCH_BYTES = 2 << 30
UNREADABLE = (pa.ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError)
"""What Arrow raises on damaged files; the last where a column's name is no text."""
# Arrow's strings hold 2 GiB a column and batch; row groups stay far below, whatever the text's length.
BATCH_CHARACTERS = 32_000_000


def read_rows(path: Path) -> Generator[tuple[int, Row | DataError], None, None]:
    """Yield each row's number, from 1, and its values, or the error that says why it has none.

    Raises:
        ValueError: The file is not Parquet, or is damaged or cut short.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield from numbered_rows(_batches_of(file))
    except UNREADABLE as error:
        with contextlib.suppress(OSError), path.open("rb") as damaged:
            refuse_others(path, damaged.read(64))
        raise DataError(f"{path}: can't read the Parquet file: {cause_of(error)}; copy it again, or make a new one") from error


def cause_of(error: Exception) -> str:
    """The first line of what a library says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _batches_of(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The record batches, row group by row group: the smaller, the larger a value may be.

    A value that a million rows share is stored once and may be as large as the group: a batch must not hold 512 copies of it.
    """
    for index in range(file.num_row_groups):
        # The sum of its columns: asking for one column's size ends the process where the file's footer is damaged.
        size = max(1, file.metadata.row_group(index).total_byte_size)
        rows = max(1, min(BATCH_ROWS, MAX_BATCH_BYTES // size))
        yield from file.iter_batches(batch_size=rows, row_groups=[index])


def numbered_rows(batches: Iterable[pa.RecordBatch]) -> Generator[tuple[int, Row | DataError], None, None]:
    """Yield the rows of record batches with their numbers, from 1."""
    number = 0
    for batch in batches:
        for row in _batch_rows(batch):
            number += 1
            yield number, row


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    try:
        rows = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        # One bad value fails the whole batch: find the rows that hold it.
        rows = [_single_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
    yield from rows


def _single_row(batch: pa.RecordBatch) -> Row:
    """A row in which a value that can't be had is the error that says so."""
    row: Row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError:
            row[name] = DataError(f"`{name}` is not UTF-8: write the text as UTF-8", reason="invalid UTF-8")
        except (ValueError, OverflowError) as error:
            row[name] = DataError(f"`{name}` can't be read: {error}; drop the column", reason="invalid value")
    return row


def write_groups(groups: Iterable[Group], path: Path) -> int:
    """Write groups by row group and return how many; the caller renames the file into place.

    The first row group decides whether prompts, and whether completions, are strings or lists of messages, and which keys
    messages have besides role and content; a message's tool calls are JSON.

    Raises:
        ValueError: The file would have to hold both kinds in one column, or other keys.
    """
    batches = _batches(groups)
    first = next(batches, [])
    kinds = _kinds(first)
    schema = _schema(kinds)
    count = 0
    # A Python file, so that a full disk is Python's own OSError with its number.
    with path.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in itertools.chain([first], batches):
            rows = [_to_row(group, kinds) for group in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(batch)
    return count


def _batches(groups: Iterable[Group]) -> Iterator[list[Group]]:
    batch: list[Group] = []
    characters = 0
    for group in groups:
        batch.append(group)
        characters += len(str(group.metadata)) + sum(_characters(text) for text in _texts(group))
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _texts(group: Group) -> list[Text]:
    return [group.prompt, *(candidate.completion for candidate in group.candidates)]


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


@dataclass(frozen=True)
class _Kinds:
    """Whether prompts, and whether completions, are lists of messages, and the keys that messages have."""

    prompts: bool = False
    completions: bool = False
    keys: tuple[str, ...] = MESSAGE_KEYS


def _kinds(groups: list[Group]) -> _Kinds:
    if not groups:
        return _Kinds()
    prompts = isinstance(groups[0].prompt, list)
    completions = (isinstance(candidate.completion, list) for group in groups for candidate in group.candidates)
    turns = [turn for group in groups for text in _texts(group) if isinstance(text, list) for turn in text]
    found = dict.fromkeys(key for turn in turns for key in turn if key not in MESSAGE_KEYS)
    more = (*(key for key in MORE_KEYS if key in found), *(key for key in found if key not in MORE_KEYS))
    return _Kinds(prompts, next(completions, prompts), (*MESSAGE_KEYS, *more))


def _schema(kinds: _Kinds) -> pa.Schema:
    messages = pa.list_(pa.struct([(key, pa.string()) for key in kinds.keys]))
    candidate = pa.struct(
        [
            ("completion", messages if kinds.completions else pa.string()),
            ("reward", pa.float64()),
            ("reference_logprob", pa.float64()),
            ("source", pa.string()),
            ("finished", pa.bool_()),
        ]
    )
    return pa.schema(
        [
            ("id", pa.string()),
            ("prompt", messages if kinds.prompts else pa.string()),
            ("candidates", pa.list_(candidate)),
            ("metadata", pa.string()),
        ]
    )


def _to_row(group: Group, kinds: _Kinds) -> Row:
    return {
        "id": group.id,
        "prompt": _of_kind(group.prompt, kinds.prompts, kinds, group, "prompt"),
        "candidates": [_to_struct(item, kinds, group, index) for index, item in enumerate(group.candidates)],
        "metadata": json.dumps(group.metadata, ensure_ascii=False, allow_nan=False),
    }


def _to_struct(candidate: Candidate, kinds: _Kinds, group: Group, index: int) -> Row:
    return {
        "completion": _of_kind(candidate.completion, kinds.completions, kinds, group, f"candidates[{index}].completion"),
        "reward": candidate.reward,
        "reference_logprob": candidate.reference_logprob,
        "source": candidate.source,
        "finished": candidate.finished,
    }


def _of_kind(text: Text, messages: bool, kinds: _Kinds, group: Group, where: str) -> Text:
    if isinstance(text, list) and messages:
        for turn in text:
            if more := [key for key in turn if key not in kinds.keys]:
                raise DataError(
                    f"group {group.id!r}: a message of {where} has {names(more)}, and none of the first groups has: write to a "
                    ".jsonl file instead (use JSONL)",
                    reason="mixed kinds",
                )
            if odd := [key for key, value in turn.items() if key not in MORE_KEYS and not isinstance(value, str)]:
                raise DataError(
                    f"group {group.id!r}: {names(odd)} of a message of {where} is no text, and a Parquet column of messages "
                    "holds texts: write to a .jsonl file instead (use JSONL)",
                    reason="mixed kinds",
                )
        return [{key: _plain(value) for key, value in turn.items()} for turn in text]
    if isinstance(text, str) and not messages:
        return text
    found = ("a string", "a list of messages")
    raise DataError(
        f"group {group.id!r}: {where} is {found[not messages]}, but earlier ones are {found[messages]}: a Parquet column "
        "holds one kind; write to a .jsonl file instead (use JSONL)",
        reason="mixed kinds",
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

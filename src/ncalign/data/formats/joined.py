"""Rows with the same prompt, wherever they are, as one group: pairs and labelled completions come several to a prompt."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from ncalign.data.formats.columns import MEDIA
from ncalign.data.formats.group import TEMPLATE_KWARGS, TOOLS, Candidate, Group, Text
from ncalign.data.formats.seen import digest, no_room, temporary_database

ROW_IDS = "row_ids"
"""Key of a joined group's metadata that lists the ids of its rows, where the rows have ids of their own."""
PARTS_OF_PROMPT = (*MEDIA, TOOLS, TEMPLATE_KWARGS)
"""Columns that schemas carry along in the metadata, and that belong to what a model is asked."""


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A row that was read: its group, and where it was found.

    Attributes:
        where: file and row, for messages.
        place: the same, shorter, for messages about another row.
        has_id: whether the group's id is the row's own, and not made of its number.
        alone: whether a part of the prompt could not be kept, so that the row is joined with no other.
    """

    where: str
    place: str
    has_id: bool
    group: Group
    alone: bool = False


class JoinedRows:
    """Keeps rows on disk, and gives those with the same prompt together, in the order in which the prompts came first.

    Memory does not grow with the number of rows: they lie in a temporary file, which is gone with this object. Two prompts
    are told apart by a digest of 128 bits.

    Raises:
        ValueError: the temporary file can't be written.
    """

    def __init__(self) -> None:
        self._connection = temporary_database(
            "CREATE TABLE prompts (digest BLOB PRIMARY KEY, first INTEGER NOT NULL) WITHOUT ROWID",
            "CREATE TABLE rows (first INTEGER NOT NULL, row TEXT NOT NULL)",
        )
        self._count = 0

    def add(self, row: ReadRow) -> None:
        """Keep a row."""
        self._count += 1
        key = prompt_digest(row.group) + (b"%d" % self._count if row.alone else b"")
        try:
            self._connection.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?)", (key, self._count))
            self._connection.execute("INSERT INTO rows SELECT first, ? FROM prompts WHERE digest = ?", (_to_text(row), key))
        except sqlite3.Error as error:
            raise no_room(error) from error

    def together(self) -> Iterator[list[ReadRow]]:
        """The rows of each prompt, in the order in which they came."""
        try:
            self._connection.execute("CREATE INDEX by_prompt ON rows (first)")
            found = self._connection.execute("SELECT first, row FROM rows ORDER BY first, rowid")
            for _, rows in groupby(found, key=itemgetter(0)):
                yield [_from_text(row) for _, row in rows]
        except sqlite3.Error as error:
            raise no_room(error) from error

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()


def _to_text(row: ReadRow) -> str:
    group = row.group
    candidates = [astuple(candidate) for candidate in group.candidates]
    parts = [row.where, row.place, row.has_id, group.id, group.prompt, candidates, group.metadata, group.origin]
    return json.dumps(parts)


def _from_text(text: str) -> ReadRow:
    where, place, has_id, id_, prompt, candidates, metadata, origin = json.loads(text)
    return ReadRow(where, place, has_id, Group(id_, prompt, [Candidate(*values) for values in candidates], metadata, origin))


def prompt_digest(group: Group) -> bytes:
    """A digest of what a model is asked: the prompt, and what the metadata hold of it, such as tools."""
    more = {name: group.metadata[name] for name in PARTS_OF_PROMPT if group.metadata.get(name)}
    return digest(json.dumps([group.prompt, more], sort_keys=True, ensure_ascii=False))


def merge(rows: Sequence[ReadRow]) -> Group:
    """One group of the rows of a prompt, with the first one's id.

    A completion that occurs in several rows is one candidate with the mean of its rewards; a value of the metadata that
    differs between the rows becomes a list with an entry for each row.
    """
    first = rows[0].group
    if len(rows) == 1:
        return first
    same: dict[object, list[Candidate]] = {}
    for row in rows:
        for candidate in row.group.candidates:
            same.setdefault(_key(candidate.completion), []).append(candidate)
    candidates = [replace(found[0], reward=_mean([one.reward for one in found])) for found in same.values()]
    return replace(first, candidates=candidates, metadata=_metadata(rows))


def _key(completion: Text) -> object:
    # A text and a conversation that is written the same are two completions.
    return completion if isinstance(completion, str) else (None, json.dumps(completion, sort_keys=True))


def _mean(rewards: Sequence[float | None]) -> float | None:
    """The mean of the known rewards; equal ones stay as they are, to the last bit."""
    known = [reward for reward in rewards if reward is not None]
    if len(set(known)) <= 1:
        return known[0] if known else None
    return math.fsum(reward / len(known) for reward in known)


def _metadata(rows: Sequence[ReadRow]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row.group.metadata):
        values = [row.group.metadata.get(key) for row in rows]
        metadata[key] = values[0] if all(value == values[0] for value in values) else values
    ids = [row.group.id for row in rows]
    if len(set(ids)) > 1 and any(row.has_id for row in rows):
        metadata[ROW_IDS] = ids
    return metadata

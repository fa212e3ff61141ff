"""An index of groups: a SQLite file from which a page of them is read without the others."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncalign.core.atomic import atomic_path
from ncalign.core.cache import private_folder
from ncalign.core.parallel import map_chunks, num_workers
from ncalign.core.progress import Bar
from ncalign.view.facts import FACTS, Entry, facts_of, searched, words_of
from ncalign.view.queries import FILTERS, LONGEST_SHARE, ORDERS, Query, plain_texts, terms

About = Callable[[], Mapping[str, Any]]
"""What is to be told of groups, asked for once all are read."""
FORM = 1
"""Raised when an index holds something else, so that older ones are made again."""
_CACHE_KIB, _BUILD_CACHE_KIB, _WORDS_BYTES = 8192, 32768, 32 * 2**20
_PAGE_BYTES = 8192
_TABLES = (
    f"CREATE TABLE facts (place INTEGER PRIMARY KEY, {', '.join(f'{name} {kind}' for name, kind in FACTS.items())})",
    "CREATE TABLE entries (place INTEGER PRIMARY KEY, body BLOB NOT NULL)",
    "CREATE TABLE about (form INTEGER NOT NULL, value TEXT NOT NULL)",
    # Texts come as words between blanks, so that the plainest tokenizer takes them apart; they are kept in `entries` alone.
    "CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='ascii')",
)


@dataclass(frozen=True)
class Found:
    """A page of groups.

    Attributes:
        total: how many groups the query keeps.
        entries: those of the page, each with its place in the data, from 0.
    """

    total: int
    entries: list[tuple[int, Entry]]


class Index:
    """Groups that can be filtered, searched and ordered; of one thread at a time.

    Args:
        connection: to a database that :func:`build` has filled.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        form, value = connection.execute("SELECT form, value FROM about").fetchone()
        if form != FORM:
            raise sqlite3.DatabaseError(f"it has form {form} where {FORM} is needed")
        self.about: Mapping[str, Any] = json.loads(value)

    def search(self, query: Query) -> Found:
        """The groups that a query asks for."""
        kept, values = self._kept(query)
        total = self._counted(query)
        if total is None:
            total = self._connection.execute(f"SELECT count(*) FROM {kept}", values).fetchone()[0]
        order = _order(query)
        places = [
            row[0]
            for row in self._connection.execute(
                f"SELECT place FROM {kept} ORDER BY {order} LIMIT ? OFFSET ?", (*values, query.limit, query.offset)
            )
        ]
        return Found(total, [(place, self._entry(place)) for place in places])

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """All groups, in the order of the data."""
        for place, body in self._connection.execute("SELECT place, body FROM entries ORDER BY place"):
            yield place, Entry.unpack(body)

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _entry(self, place: int) -> Entry:
        return Entry.unpack(self._connection.execute("SELECT body FROM entries WHERE place = ?", (place,)).fetchone()[0])

    def _counted(self, query: Query) -> int | None:
        """How many groups a query keeps, where that was counted once for all: without a search, of one filter at most."""
        names = set(query.filters)
        if query.search.strip() or len(names) > 1:
            return None
        return int(self.about["counts"][names.pop()] if names else self.about["groups"])

    def _kept(self, query: Query) -> tuple[str, list[Any]]:
        """The tables of a query with its conditions, and their values."""
        conditions = query.conditions(self.about["least"])
        parts, values = [f"{column} >= ?" for column, _ in conditions], [least for _, least in conditions]
        tables, asked = "facts", list[Any](values)
        if wanted := terms(query.search):
            # From the words that match to their numbers takes half the time of looking up each group among those that match.
            tables = "words JOIN facts ON facts.place = words.rowid"
            parts.append("words MATCH ?")
            asked.append(" ".join(f'"{term.strip()}"' for term in wanted))
        elif query.search.strip():
            parts.append("0")  # signs alone, which no text is searched for
        return f"{tables} WHERE {' AND '.join(parts)}" if parts else tables, asked


def _order(query: Query) -> str:
    if query.column == "place":
        return f"place {'DESC' if query.reverse else 'ASC'}"
    return f"{query.column} {'ASC' if query.reverse else 'DESC'} NULLS LAST, place"


def in_memory(entries: Iterable[Entry], about: About) -> Index:
    """An index of a few groups, gone when it is closed."""
    with ExitStack() as stack:
        connection = stack.enter_context(closing(sqlite3.connect(":memory:", isolation_level=None)))
        build(connection, entries, about)
        stack.pop_all()
    return Index(connection)


def write_index(path: Path, entries: Iterable[Entry], about: About) -> None:
    """Index groups in a file, which is there when it is whole and which its user alone may read.

    Raises:
        ValueError: a group that can't be used.
        OSError: the file can't be written.
    """
    private_folder(path.parent)
    with atomic_path(path, mode=0o600) as temporary:
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            build(connection, entries, about)
        except sqlite3.OperationalError as error:
            raise OSError(f"{path} can't be written: {error}; free some space, or name another cache_dir") from error
        finally:
            connection.close()


def open_index(path: Path) -> Index:
    """An index to read; nothing is ever written to it.

    Raises:
        ValueError: it is damaged.
    """
    address = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    try:
        with ExitStack() as stack:
            connection = stack.enter_context(closing(sqlite3.connect(address, uri=True, check_same_thread=False)))
            connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            found = Index(connection)
            stack.pop_all()
            return found
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is made again") from error


def build(connection: sqlite3.Connection, entries: Iterable[Entry], about: About) -> None:
    """Fill an empty database; what ``about`` returns then is kept with the numbers of groups that each filter keeps.

    Raises:
        ValueError: this Python's SQLite can't search.
        sqlite3.Error: the database can't be written.
    """
    for setting in (f"page_size={_PAGE_BYTES}", f"cache_size=-{_BUILD_CACHE_KIB}", "journal_mode=OFF", "synchronous=OFF"):
        connection.execute(f"PRAGMA {setting}")
    for table in _TABLES:
        try:
            connection.execute(table)
        except sqlite3.OperationalError as error:
            if "fts5" not in str(error):
                raise
            raise ValueError(f"this Python's SQLite ({sqlite3.sqlite_version}) has no FTS5: install one that has") from error
    connection.execute("INSERT INTO words (words, rank) VALUES ('hashsize', ?)", (_WORDS_BYTES,))
    connection.execute("BEGIN")
    place = 0
    with Bar("Indexing groups", None) as bar:
        for rows in map_chunks(_rows, entries, workers=num_workers()):
            for facts, body, text in rows:
                connection.execute(f"INSERT INTO facts VALUES ({'?, ' * len(FACTS)}?)", (place, *facts))
                connection.execute("INSERT INTO entries VALUES (?, ?)", (place, body))
                connection.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (place, text))
                place += 1
            bar.advance(len(rows))
    value = json.dumps({**about(), "groups": place, **_counted(connection, place)})
    connection.execute("INSERT INTO about VALUES (?, ?)", (FORM, value))
    connection.execute("COMMIT")


def _rows(entries: Sequence[Entry]) -> list[tuple[tuple[int | float | None, ...], bytes, str]]:
    """What is kept of each group: its numbers, all of it, and what is searched."""
    found = []
    for entry in entries:
        facts = facts_of(entry, words_of(entry.group))
        found.append((tuple(facts[name] for name in FACTS), entry.pack(), plain_texts(searched(entry.group))))
    return found


def _counted(connection: sqlite3.Connection, groups: int) -> dict[str, Any]:
    """Candidates, numbers known of any group, and of each filter: the least that it asks for, and how many it keeps."""
    columns = {
        column for column in FACTS if connection.execute(f"SELECT 1 FROM facts WHERE {column} NOTNULL LIMIT 1").fetchone()
    }
    least = {one.name: one.least for one in FILTERS if one.least is not None}
    rank = max(0, round(groups * LONGEST_SHARE) - 1)
    found = connection.execute("SELECT longest FROM facts ORDER BY longest DESC LIMIT 1 OFFSET ?", (rank,)).fetchone()
    least["longest"] = found[0] if found else 0
    counts = {
        one.name: connection.execute(f"SELECT count(*) FROM facts WHERE {one.column} >= ?", (least[one.name],)).fetchone()[0]
        for one in FILTERS
    }
    candidates = connection.execute("SELECT coalesce(sum(candidates), 0) FROM facts").fetchone()[0]
    known = {one.name: one.column == "place" or one.column in columns for one in ORDERS}
    return {"candidates": candidates, "least": least, "counts": counts, "orders": known, "known": sorted(columns)}

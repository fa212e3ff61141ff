"""Texts that came before, in memory that does not grow with their number: a SQLite file without a name holds their digests."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable

from ncalign.core.errors import DataError

_CACHE_KIB = 4096
"""Of SQLite's pages; what is above it lies in a temporary file, which is gone with the connection."""
_DIGEST_BYTES = 16


class Seen:
    """Counts texts and remembers where each came first.

    Two texts are told apart by a digest of 128 bits: among a billion, the chance that any two share one is below 1e-20.

    Raises:
        ValueError: the temporary file can't be written.

    >>> seen = Seen()
    >>> seen.add("a", "line 1"), seen.add("b", "line 2"), seen.add("a", "line 3")
    (None, None, 'line 1')
    >>> seen.repeated(), seen.count("a")
    (2, 2)
    """

    def __init__(self) -> None:
        # Cursors are made at each use: a generator that is closed late finalises nothing of a closed connection.
        self._connection = temporary_database(
            "CREATE TABLE seen (digest BLOB PRIMARY KEY, place TEXT NOT NULL, number INTEGER NOT NULL) WITHOUT ROWID"
        )

    def add(self, text: str, place: str = "") -> str | None:
        """Count a text; the place where it came first, or None where this is the first time."""
        return self.add_digest(digest(text), place)

    def add_digest(self, key: bytes, place: str = "") -> str | None:
        """The same, of a text whose digest is known."""
        try:
            found = self._connection.execute("SELECT place FROM seen WHERE digest = ?", (key,)).fetchone()
            self._connection.execute(_COUNT, (key, place, 1))
        except sqlite3.Error as error:
            raise no_room(error) from error
        return None if found is None else str(found[0])

    def add_digests(self, digests: Iterable[tuple[bytes, str]]) -> None:
        """Count texts by their digests, with the places they came from."""
        try:
            self._connection.executemany(_COUNT, ((key, place, 1) for key, place in digests))
        except sqlite3.Error as error:
            raise no_room(error) from error

    def count(self, text: str) -> int:
        """How often a text came."""
        found = self._connection.execute("SELECT number FROM seen WHERE digest = ?", (digest(text),)).fetchone()
        return 0 if found is None else int(found[0])

    def repeated(self) -> int:
        """How many came of the texts that came more than once, the first time included."""
        return int(self._connection.execute("SELECT coalesce(sum(number), 0) FROM seen WHERE number > 1").fetchone()[0])

    def first_repeated(self) -> str | None:
        """The place of one that came more than once."""
        found = self._connection.execute("SELECT place FROM seen WHERE number > 1 ORDER BY place LIMIT 1").fetchone()
        return None if found is None else str(found[0])

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()


def temporary_database(*tables: str) -> sqlite3.Connection:
    """A database with these tables in a file without a name, in one transaction that never ends: it is gone when closed."""
    connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    for setting in (f"cache_size=-{_CACHE_KIB}", "journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE"):
        connection.execute(f"PRAGMA {setting}")
    for table in tables:
        connection.execute(table)
    connection.execute("BEGIN")
    return connection


def no_room(error: sqlite3.Error) -> DataError:
    """The error for a temporary database that can't be written."""
    return DataError(f"no room to keep account of what came before: {error}; free some, or set TMPDIR")


_COUNT = "INSERT INTO seen VALUES (?, ?, ?) ON CONFLICT (digest) DO UPDATE SET number = number + excluded.number"


def digest(text: str) -> bytes:
    """The digest of a text; half of a surrogate pair, which UTF-8 has no bytes for, counts as itself."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()

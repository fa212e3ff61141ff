"""Answers that cost time or money, kept under what was asked: a SQLite file that survives a kill at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ncalign.core.cache import make_private_file
from ncalign.core.claims import claims_of

Value = TypeVar("Value")
# Of a damaged file, SQLite may also hand out names that are no UTF-8.
_DAMAGE = (sqlite3.Error, UnicodeDecodeError)


class Store:
    """JSON values by content-addressed keys; threads and processes may share the file, which only its user may read.

    Args:
        path: of the file; made when missing, with the folders above it.

    Raises:
        OSError: it can't be made or written.

    >>> store = Store(Path(":memory:"))
    >>> key = store.key("reward", {"prompt": "2 + 2", "completion": "4"})
    >>> store.get(key), store.put(key, [1.0]), store.get(key)
    (None, None, [1.0])
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._claims = path, threading.Lock(), claims_of(path)
        try:
            if str(path) != ":memory:":
                path.parent.mkdir(parents=True, exist_ok=True)
                # SQLite gives the files beside it the same mode, and says what is wrong with the path.
                with contextlib.suppress(OSError):
                    make_private_file(path)
            self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self._connection.text_factory = lambda data: data.decode(errors="replace")
            with self._connection:
                # Full: an answer that was paid for is on disk before the next is asked for.
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=FULL")
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL)"
                )
        except _DAMAGE as error:
            raise self._unusable(error) from error

    @staticmethod
    def key(*parts: object) -> str:
        """The key of these JSON values: a digest."""
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()

    def get(self, key: str) -> Any:
        """The value, or None where there is none, or one that is not as it was written.

        Raises:
            OSError: the file is damaged.
        """
        text = self._kept(key)
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError):
            return None

    def get_as(self, key: str, kind: TypeAdapter[Value]) -> Value | None:
        """The value, or None where there is none, or another kind than the one that is kept there.

        Raises:
            OSError: the file is damaged.

        >>> store = Store(Path(":memory:"))
        >>> store.put("a", [1.0]), store.put("b", "no")
        (None, None)
        >>> store.get_as("a", TypeAdapter(list[float])), store.get_as("b", TypeAdapter(list[float]))
        ([1.0], None)
        """
        text = self._kept(key)
        try:
            return None if text is None else kind.validate_json(text)
        except ValidationError:
            return None

    def _kept(self, key: str) -> str | None:
        """The JSON that was written; None also for what another hand wrote, which may be anything."""
        try:
            with self._lock:
                row = self._connection.execute("SELECT value, digest FROM kept WHERE key = ?", (key,)).fetchone()
        except _DAMAGE as error:
            raise self._unusable(error) from error
        return row[0] if row is not None and isinstance(row[0], str) and row[1] == self.key(key, row[0]) else None

    def put(self, key: str, value: object) -> None:
        """Keep a value, in place of an earlier one.

        Raises:
            OSError: it can't be written.
        """
        self.put_all({key: value})

    def put_all(self, values: Mapping[str, object]) -> None:
        """Keep values, all or, where the process is killed meanwhile, none of them.

        Raises:
            OSError: they can't be written.
        """
        texts = {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in values.items()}
        rows = [(key, text, self.key(key, text)) for key, text in texts.items()]
        try:
            with self._lock, self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise OSError(f"{self._path} can't be written: {error}; free some space, or name another cache_dir") from error

    def claim(self, key: str) -> bool:
        """Whether this caller may ask for the answer now; false while another thread or process that shares the file does.

        A claim ends with :meth:`release`, or with the process. Whoever gets one looks once more for the answer.

        Raises:
            OSError: the file that holds the claims can't be made.
        """
        return self._claims.take(key)

    def release(self, key: str) -> None:
        """End a claim, once the answer is kept or there is none."""
        self._claims.give_back(key)

    def _unusable(self, error: Exception) -> OSError:
        return OSError(f"{self._path} can't be used to keep answers: {error}; delete it if it is damaged")

    def delete(self) -> None:
        """Delete the file, once what it held is kept elsewhere."""
        self.close()
        self._claims.delete()
        # The file itself last: a log without it would be taken for that of the next file of its name.
        for suffix in ("-wal", "-shm", ""):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

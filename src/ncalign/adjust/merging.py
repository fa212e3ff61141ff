"""Rewards of another file with the same groups, found by group id and completion; on disk, so that memory does not grow."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from ncalign.adjust.transforms import key_of
from ncalign.core.errors import DataError, shown
from ncalign.data.groups import Group, recorded_steps


class RewardIndex:
    """The rewards of the file ``label``, kept in a SQLite file that is made at ``path``."""

    def __init__(self, path: Path, label: str) -> None:
        self.label = label
        self._connection = sqlite3.connect(path)
        self._connection.execute("CREATE TABLE rewards (id TEXT PRIMARY KEY, value TEXT NOT NULL, taken INTEGER NOT NULL)")

    def fill(self, groups: Iterable[Group]) -> None:
        """Add all groups."""
        rows = ((group.id, json.dumps(_entry(group))) for group in groups)
        with self._connection:
            self._connection.executemany("INSERT INTO rewards VALUES (?, ?, 0)", rows)

    def take(self, group: Group) -> tuple[list[float | None], list[str]]:
        """This file's rewards for the group's candidates, in their order, and the record of how they were made.

        Raises:
            ValueError: the file has no such group, or one with other completions.
        """
        row = self._connection.execute("SELECT value FROM rewards WHERE id = ?", (group.id,)).fetchone()
        if row is None:
            raise DataError(
                f"{self.label} has no group with this id: files to merge hold the same groups", reason="no such group"
            )
        self._connection.execute("UPDATE rewards SET taken = 1 WHERE id = ?", (group.id,))
        found = json.loads(row[0])
        there: dict[str, list[float | None]] = {}
        for digest, reward in found["rewards"]:
            there.setdefault(digest, []).append(reward)
        rewards = []
        for index, candidate in enumerate(group.candidates):
            left = there.get(_digest(key_of(candidate.completion)))
            if not left:
                raise DataError(
                    f"{found['origin']} (of {self.label}) has no candidate with the completion of candidates[{index}], "
                    f"{shown(key_of(candidate.completion))}: files to merge hold the same completions",
                    reason="no such completion",
                )
            rewards.append(left.pop(0))
        more = sum(len(left) for left in there.values())
        if more:
            raise DataError(
                f"{found['origin']} (of {self.label}) has {more} completions that this group lacks: files to merge hold the "
                "same completions",
                reason="no such completion",
            )
        return rewards, list(found["steps"])

    def left(self) -> tuple[int, str]:
        """The number of groups that were not taken, and where the first one is."""
        (count,) = self._connection.execute("SELECT COUNT(*) FROM rewards WHERE taken = 0").fetchone()
        row = self._connection.execute("SELECT id, value FROM rewards WHERE taken = 0 ORDER BY rowid LIMIT 1").fetchone()
        return count, "" if row is None else f"{json.loads(row[1])['origin']}: group {row[0]!r}"

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _entry(group: Group) -> dict[str, object]:
    return {
        "origin": group.origin,
        "rewards": [[_digest(key_of(candidate.completion)), candidate.reward] for candidate in group.candidates],
        "steps": recorded_steps(group),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

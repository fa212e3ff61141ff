"""Reward sources made of others: one whose failures cost a candidate each, and several as one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from threading import Thread

from ncalign.data.groups import Group
from ncalign.rewards.base import RewardSource, combined, score_many, where

_FEW = 20
"""Candidates below which a share says nothing yet, unless none may fail."""


class Guarded:
    """Scores with another source; a candidate on which that fails has no reward, and is counted.

    A group on which it fails or hangs is scored again candidate by candidate, equal ones once, so that a bad completion costs
    only its own reward.

    Args:
        source: what scores.
        timeout: seconds for a group, or for a candidate alone; None waits for ever. A call that hangs goes on in its thread.
        max_failed_share: share of the candidates that may fail; 0 raises at the first failure.

    Attributes:
        num_scored: candidates given to the source.
        num_failed: candidates on which it failed.
        first_failure: its message on the first of them.
    """

    def __init__(self, source: RewardSource, *, timeout: float | None, max_failed_share: float) -> None:
        self.source = source
        self._timeout, self._share = timeout, max_failed_share
        self.num_scored = self.num_failed = 0
        self.first_failure: str | None = None

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.base.RewardSource`.

        Raises:
            ValueError: more than ``max_failed_share`` of the candidates have failed.
        """
        self.num_scored += len(group.candidates)
        try:
            return self._timed(group)
        except ValueError:
            if self._share == 0:
                raise
        alone: dict[str, list[float | None] | ValueError] = {}
        rewards: list[float | None] = []
        for candidate in group.candidates:
            same = repr((candidate.completion, candidate.finished))
            if same not in alone:
                try:
                    alone[same] = self._timed(replace(group, candidates=[candidate]))
                except ValueError as error:
                    alone[same] = error
            found = alone[same]
            if isinstance(found, ValueError):
                self.num_failed += 1
                self.first_failure = self.first_failure or str(found)
            rewards += [None] if isinstance(found, ValueError) else found
        if self.num_scored >= _FEW:
            self.check()
        return rewards

    def check(self) -> None:
        """Check the share of failures.

        Raises:
            ValueError: it is above ``max_failed_share``; the message holds the first failure's.
        """
        if self.num_failed > self._share * self.num_scored:
            raise ValueError(
                f"rewards failed on {self.num_failed} of {self.num_scored} candidates, more than max_failed_share="
                f"{self._share}; the first: {self.first_failure}"
            )

    def _timed(self, group: Group) -> list[float | None]:
        if self._timeout is None:
            return self.source.score(group)
        found: Future[list[float | None]] = Future()

        def work() -> None:
            try:
                found.set_result(self.source.score(group))
            except BaseException as error:
                found.set_exception(error)

        # A daemon: a call that hangs must not keep the process from ending.
        Thread(target=work, daemon=True, name="reward").start()
        if not wait([found], self._timeout).done:
            raise ValueError(f"the reward of {where(group)} took more than {self._timeout:g} s")
        return found.result()


class Ensemble:
    """Several sources as one: a candidate's reward is the ``mean`` or ``min`` of theirs, and missing where one is."""

    def __init__(self, sources: Sequence[RewardSource], *, combine: str) -> None:
        self.sources, self._combine = tuple(sources), combine

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.base.RewardSource`."""
        return self.score_many([group])[0]

    def score_many(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Score several groups, each source all of them at once where it can."""
        found = [score_many(source, groups) for source in self.sources]
        return [combined(rows, self._combine) for rows in zip(*found, strict=True)]

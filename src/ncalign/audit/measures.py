"""Measures of one group: spread and ties of its rewards, likeness and copies of its candidates, length; and of all together."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncalign.audit.copies import clusters_of
from ncalign.audit.texts import Likeness, likeness, words
from ncalign.data.groups import Group
from ncalign.data.rendering import completion_text

_RANDOM_PAIRS = 500


@dataclass(frozen=True)
class Ranked:
    """The places of a group's best candidate and of those scored lower, the highest-scored first; ties in their own order."""

    best: int
    lower: tuple[int, ...]


def ranked(group: Group) -> Ranked | None:
    """A group's candidates by reward; None where no two rewards differ."""
    known = [(candidate.reward, k) for k, candidate in enumerate(group.candidates) if candidate.reward is not None]
    ordered = sorted(known, key=lambda pair: (-pair[0], pair[1]))
    lower = tuple(k for reward, k in ordered if reward < ordered[0][0])
    return Ranked(ordered[0][1], lower) if lower else None


@dataclass(frozen=True)
class GroupMeasures:
    """One group's numbers.

    Attributes:
        num_candidates: how many candidates it has.
        rewards: the known ones.
        lengths: words of each candidate with a reward, in the order of ``rewards``.
        order: its candidates by reward; None where no two rewards differ.
        length_pairs: as :func:`agreement` counts them, by words.
        character_pairs: the same by characters.
        likeness: the best candidate against each lower-scored one, the highest-scored first.
        copies: candidates that are near-copies of an earlier one; those that are the best one with words moved or exchanged are
            left out.
        clusters: sizes of the sets of near-copies.
        noise: differences of the rewards of near-copies.
        sources: who wrote each candidate.
        best_source: who wrote the best one; None where several share the best reward or its source is not known.
    """

    num_candidates: int
    rewards: list[float]
    lengths: list[int]
    order: Ranked | None
    length_pairs: tuple[int, int, int]
    character_pairs: tuple[int, int, int]
    likeness: list[Likeness]
    copies: int
    clusters: list[int]
    noise: list[float]
    sources: list[str]
    best_source: str | None

    @property
    def spread(self) -> float:
        """Best reward less the worst; 0 without any."""
        return max(self.rewards) - min(self.rewards) if self.rewards else 0.0

    @property
    def num_distinct(self) -> int:
        """How many different rewards there are."""
        return len(set(self.rewards))


def measure_group(group: Group) -> GroupMeasures:
    """A group's numbers; comparing its texts takes most of the time."""
    completions = [completion_text(candidate.completion) for candidate in group.candidates]
    texts = [words(text) for text in completions]
    known = [k for k, candidate in enumerate(group.candidates) if candidate.reward is not None]
    rewards = [group.candidates[k].reward or 0.0 for k in known]
    lengths = [len(texts[k]) for k in known]
    order = ranked(group)
    alike = [] if order is None else [likeness(texts[order.best], texts[k]) for k in order.lower]
    members, pairs = clusters_of(texts)
    # A few words have few orders: two swaps of the best candidate that came out alike are not a completion sampled twice.
    swaps = set() if order is None else {k for k, one in zip(order.lower, alike, strict=True) if one.swapped}
    both = [(group.candidates[i].reward, group.candidates[j].reward) for i, j in pairs]
    tied = order is None or rewards.count(max(rewards)) > 1
    return GroupMeasures(
        num_candidates=len(texts),
        rewards=rewards,
        lengths=lengths,
        order=order,
        length_pairs=agreement(rewards, lengths),
        character_pairs=agreement(rewards, [len(completions[k]) for k in known]),
        likeness=alike,
        copies=sum(max(0, len(set(cluster) - swaps) - 1) for cluster in members),
        clusters=[len(cluster) for cluster in members],
        noise=[first - second for first, second in both if first is not None and second is not None],
        sources=[candidate.source or "" for candidate in group.candidates],
        best_source=None if order is None or tied else group.candidates[order.best].source,
    )


def agreement(rewards: Sequence[float], lengths: Sequence[int]) -> tuple[int, int, int]:
    """Pairs of which the longer has the higher reward, pairs of which it has the lower, and all whose rewards differ.

    Lengths within three per cent of each other count as equal.

    >>> agreement([1, 2, 3, 3], [10, 20, 5, 5])
    (1, 4, 5)
    """
    r, n = np.asarray(rewards, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    apart = np.abs(np.subtract.outer(n, n)) > 0.03 * np.maximum.outer(n, n)
    differ = np.sign(np.subtract.outer(r, r))
    signs = differ * np.sign(np.subtract.outer(n, n)) * apart
    return int((signs > 0).sum()) // 2, int((signs < 0).sum()) // 2, int(np.count_nonzero(differ)) // 2


def share_of_agreement(pairs: Iterable[tuple[int, int, int]]) -> float:
    """Somers' D of length given reward, over all groups' pairs: 1 where the longer always has the higher reward."""
    alike, otherwise, every = (sum(column) for column in zip(*pairs, strict=True))
    return (alike - otherwise) / every if every else 0.0


def within_groups(measured: Sequence[GroupMeasures]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lengths and rewards of all candidates, each less its group's mean, from groups in which rewards differ."""
    lengths, rewards = [np.zeros(0)], [np.zeros(0)]
    for group in measured:
        if group.num_distinct > 1:
            lengths.append(np.asarray(group.lengths) - np.mean(group.lengths))
            rewards.append(np.asarray(group.rewards) - np.mean(group.rewards))
    return np.concatenate(lengths), np.concatenate(rewards)


def length_regression(measured: Sequence[GroupMeasures]) -> tuple[float, float]:
    """Share of the rewards' variance within groups that length explains, and the reward that a word adds."""
    lengths, rewards = within_groups(measured)
    if len(lengths) < 3 or not np.any(lengths) or not np.any(rewards):
        return 0.0, 0.0
    slope = float((lengths * rewards).sum() / (lengths**2).sum())
    left = float(((rewards - slope * lengths) ** 2).sum() / (rewards**2).sum())
    return 1 - left, slope


def best_of(rewards: Sequence[float], k: int) -> float:
    """Expected best reward of k candidates drawn without replacement.

    >>> best_of([0.0, 1.0], 1), best_of([0.0, 1.0], 2)
    (0.5, 1.0)
    """
    ordered = sorted(rewards)
    total = math.comb(len(ordered), k)
    return sum(reward * math.comb(place, k - 1) for place, reward in enumerate(ordered) if place >= k - 1) / total


def worth_keeping(measured: Sequence[GroupMeasures]) -> float:
    """Fewest candidates that give 95 % of the gain of the best of all over one at random; NaN without spread."""
    usable = [group.rewards for group in measured if group.num_distinct > 1]
    if not usable:
        return math.nan
    size = round(float(np.median([len(rewards) for rewards in usable])))
    usable = [rewards for rewards in usable if len(rewards) >= size]
    means = [mean([best_of(rewards, k) for rewards in usable]) for k in range(1, size + 1)]
    wanted = means[0] + 0.95 * (means[-1] - means[0])
    return float(next(k for k, value in enumerate(means, start=1) if value >= wanted - 1e-12))


def random_baseline(groups: Sequence[Group], *, seed: int) -> list[Likeness]:
    """Candidates against candidates of other groups, drawn at random: how alike unrelated texts are."""
    usable = [group for group in groups if group.candidates]
    if len(usable) < 2:
        return []
    chance = random.Random(seed)
    found = []
    for _ in range(min(_RANDOM_PAIRS, 4 * len(usable))):
        one, other = chance.sample(usable, 2)
        first, second = (words(completion_text(chance.choice(group.candidates).completion)) for group in (one, other))
        found.append(likeness(first, second))
    return found


def mean(values: Sequence[float]) -> float:
    """The mean; NaN where there are no values."""
    return float(np.mean(values)) if len(values) else math.nan

"""What can be measured of one group: spread and ties of its rewards, likeness of its candidates, length."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import numpy as np
from scipy import stats

from ncalign.data.groups import Group
from ncalign.model.encoding import as_messages, completion_text

COPY_WORDS, COPY_SHARE = 1.0, 0.1
"""Words, or the share of the words, in which a near-copy may differ; words that only stand elsewhere make it none."""
SWAP_BAG, EXCHANGED_EDIT = 0.9, 0.75
_MAX_WORDS = 300
_WORD = re.compile(r"[+=<>×÷^]|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclass(frozen=True)
class Likeness:
    """How alike two texts are.

    Attributes:
        edit: words in common order, as a share of both (Ratcliff-Obershelp): 1 for the same words.
        bag: words in common, in any order, as a share of both (Dice); ``bag - edit`` is the share of words that moved.
        trigrams: runs of three words in common, as a share of all (Jaccard).
        size: words of the two texts, on average.
        same_numbers: whether the same numbers occur in both: answers that differ in a number are different answers.
        plain_edit: ``edit`` of what is left without the numbers.
        same_length: whether the longer has at most a tenth more words.
    """

    edit: float
    bag: float
    trigrams: float
    size: float = 0.0
    same_numbers: bool = True
    plain_edit: float = 1.0
    same_length: bool = True

    @property
    def changed(self) -> float:
        """Words of a text that the other has not in that order."""
        return (1 - self.edit) * self.size

    @property
    def moved(self) -> float:
        """Words of a text that the other has elsewhere."""
        return (self.bag - self.edit) * self.size

    @property
    def duplicate(self) -> bool:
        """Whether the two differ in next to nothing: a word or a tenth of them, none moved, no number."""
        if not self.same_numbers or self.moved >= _MOVED:
            return False
        return self.changed <= min(max(COPY_WORDS, COPY_SHARE * self.size), self.size / 5) + 1e-9

    @property
    def swapped(self) -> bool:
        """Whether one looks like the other with words moved or exchanged, numbers aside."""
        if self.duplicate or self.plain_edit == 1:
            return False
        moved = self.bag >= SWAP_BAG and self.moved >= _MOVED
        return moved or (self.same_length and min(self.edit, self.plain_edit) >= EXCHANGED_EDIT)


_MOVED = 0.99
"""Words: one, less the rounding of shares."""


@dataclass(frozen=True)
class Ranked:
    """The places of a group's best candidate and of those scored lower, the highest-scored first; ties in their own order."""

    best: int
    lower: tuple[int, ...]


def ranked(group: Group) -> Ranked | None:
    """A group by its rewards; None where no two differ."""
    known = [(candidate.reward, k) for k, candidate in enumerate(group.candidates) if candidate.reward is not None]
    ordered = sorted(known, key=lambda pair: (-pair[0], pair[1]))
    lower = tuple(k for reward, k in ordered if reward < ordered[0][0])
    return Ranked(ordered[0][1], lower) if lower else None


@dataclass
class GroupMeasures:
    """One group's numbers.

    Attributes:
        num_candidates: its candidates.
        rewards: the known ones.
        spread: best less worst; 0 with fewer than two.
        num_distinct: different rewards.
        tied_best: candidates that share the best reward, that one aside.
        lengths: words of each candidate with a reward, in the order of ``rewards``.
        length_pairs: as :func:`agreement` counts them, by words.
        character_pairs: the same by characters.
        likeness: the best candidate against each lower-scored one, the highest-scored first.
        copies: candidates that are near-duplicates of an earlier one; those that are the best one with words moved or exchanged
            are left out.
        clusters: sizes of the sets of near-duplicates, those of one left out.
        noise: differences of the rewards of near-duplicates.
        sources: who wrote the candidates.
        best_source: who wrote the best one; None where several share the reward or it has no source.
    """

    num_candidates: int
    rewards: list[float]
    spread: float
    num_distinct: int
    tied_best: int
    lengths: list[int]
    length_pairs: tuple[int, int, int] = (0, 0, 0)
    character_pairs: tuple[int, int, int] = (0, 0, 0)
    likeness: list[Likeness] = field(default_factory=list)
    copies: int = 0
    clusters: list[int] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    best_source: str | None = None


def words(text: str) -> list[str]:
    """Words in small letters; punctuation and white space don't count, signs of arithmetic and Chinese or Japanese ones do."""
    return _WORD.findall(text.lower())


def likeness(first: Sequence[str], second: Sequence[str]) -> Likeness:
    """How alike two texts are, from the first 300 words of each.

    >>> likeness("a b c d".split(), "a c b d".split()).bag
    1.0
    """
    longer, shorter = max(len(first), len(second)), min(len(first), len(second))
    a, b = list(first[:_MAX_WORDS]), list(second[:_MAX_WORDS])
    size = (len(a) + len(b)) / 2
    # What stands behind the part that is looked at is missing from one of the two, at least.
    size, same_length = max(size, (longer + shorter) / 2 if a == b else size), longer <= 1.1 * shorter
    if a == b:
        edit = 2 * shorter / (longer + shorter) if longer else 1.0
        return Likeness(edit, edit, edit, size, same_length=same_length)
    if not a or not b:
        return Likeness(0.0, 0.0, 0.0, size, same_numbers=False, plain_edit=0.0, same_length=False)
    common = sum((Counter(a) & Counter(b)).values())
    bag = 2 * common / (len(a) + len(b))
    # No order of the words can give more than their number in common: most pairs need no alignment.
    edit = SequenceMatcher(None, a, b, autojunk=False).ratio() if bag > 0.3 else bag / 2
    same_numbers, plain_edit = True, edit
    if edit > 0.3 and _numbers(a) != _numbers(b):
        same_numbers = False
        plain_a, plain_b = ([word for word in text if not word.isdigit()] for text in (a, b))
        plain_edit = SequenceMatcher(None, plain_a, plain_b, autojunk=False).ratio()
    return Likeness(edit, bag, _jaccard(_runs(a), _runs(b)), size, same_numbers, plain_edit, same_length)


def _numbers(text: Sequence[str]) -> Counter[str]:
    return Counter(word for word in text if word.isdigit())


def _maybe_copy(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two texts may be near-duplicates; counted words rule most pairs out before any alignment."""
    size = (len(first) + len(second)) / 2
    allowed = 1.5 * max(COPY_WORDS, COPY_SHARE * size)
    if abs(len(first) - len(second)) / 2 > allowed:
        return False
    return size - sum((Counter(first) & Counter(second)).values()) <= allowed


def clusters_of(texts: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Sets of texts that are near-duplicates of each other, directly or by way of others, and the pairs that are directly."""
    owner = list(range(len(texts)))
    pairs = []
    for j in range(len(texts)):
        for i in range(j):
            if _maybe_copy(texts[i], texts[j]) and likeness(texts[i], texts[j]).duplicate:
                pairs.append((i, j))
                old, new = owner[j], owner[i]
                owner = [new if own == old else own for own in owner]
    found: dict[int, list[int]] = {}
    for index, own in enumerate(owner):
        found.setdefault(own, []).append(index)
    return [members for members in found.values() if len(members) > 1], pairs


def _runs(text: Sequence[str], order: int = 3) -> set[tuple[str, ...]]:
    return set(zip(*(text[start:] for start in range(order)), strict=False)) or {tuple(text)}


def _jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)


def measure_group(group: Group, *, compare: bool) -> GroupMeasures:
    """A group's numbers; comparing its texts, which takes most of the time, only where asked for."""
    completions = [completion_text(candidate, group) for candidate in group.candidates]
    texts = [words(text) for text in completions]
    known = [k for k, candidate in enumerate(group.candidates) if candidate.reward is not None]
    rewards = [group.candidates[k].reward or 0.0 for k in known]
    best = max(rewards, default=0.0)
    found = GroupMeasures(
        num_candidates=len(texts),
        rewards=rewards,
        spread=best - min(rewards) if rewards else 0.0,
        num_distinct=len(set(rewards)),
        tied_best=rewards.count(best) - 1 if rewards else 0,
        lengths=[len(texts[k]) for k in known],
        length_pairs=agreement(rewards, [len(texts[k]) for k in known]),
        character_pairs=agreement(rewards, [len(completions[k]) for k in known]),
        sources=[candidate.source or "" for candidate in group.candidates],
    )
    if found.num_distinct > 1 and not found.tied_best:
        found.best_source = group.candidates[known[rewards.index(best)]].source
    if compare:
        order = ranked(group)
        if order is not None:
            found.likeness = [likeness(texts[order.best], texts[k]) for k in order.lower]
        members, pairs = clusters_of(texts)
        found.clusters = [len(one) for one in members]
        # Of few words there are few orders: the best one's words swapped alike twice are noise, and not a sampled copy.
        noise = set() if order is None else {k for k, one in zip(order.lower, found.likeness, strict=True) if one.swapped}
        found.copies = sum(max(0, len(set(one) - noise) - 1) for one in members)
        both = [(group.candidates[i].reward, group.candidates[j].reward) for i, j in pairs]
        found.noise = [first - second for first, second in both if first is not None and second is not None]
    return found


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


def best_of(rewards: Sequence[float], k: int) -> float:
    """Expected best reward of k candidates drawn without replacement.

    >>> best_of([0.0, 1.0], 1), best_of([0.0, 1.0], 2)
    (0.5, 1.0)
    """
    ordered = sorted(rewards)
    total = math.comb(len(ordered), k)
    return sum(reward * math.comb(place, k - 1) for place, reward in enumerate(ordered) if place >= k - 1) / total


def random_baseline(groups: Sequence[Group], *, seed: int, pairs: int = 500) -> list[Likeness]:
    """The best candidate of a group against a candidate of another group: what unrelated texts have in common."""
    usable = [group for group in groups if group.candidates]
    if len(usable) < 2:
        return []
    chance = random.Random(seed)
    found = []
    for _ in range(min(pairs, 4 * len(usable))):
        one, other = chance.sample(usable, 2)
        texts = [words(completion_text(chance.choice(group.candidates), group)) for group in (one, other)]
        found.append(likeness(*texts))
    return found


def prompt_key(group: Group) -> str:
    """What two prompts share that differ in case, punctuation or white space alone."""
    return " ".join(words("\n".join(message["content"] for message in as_messages(group.prompt))))


def mean(values: Sequence[float]) -> float:
    """Their mean; NaN where there are none."""
    return float(np.mean(values)) if len(values) else math.nan


def interval(values: Sequence[float], *, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval, 95 %, of a mean; (NaN, NaN) with fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    found = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=2000, batch=200, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)

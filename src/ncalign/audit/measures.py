"""What can be measured of one group: spread and ties of its rewards, likeness of its candidates, length."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import numpy as np
from scipy import stats

from ncalign.encoding import as_messages, completion_text
from ncalign.groups import Group

DUPLICATE = 0.97
"""Share of words in common order above which two texts are near-duplicates."""
SWAPPED_EDIT, SWAPPED_BAG = 0.8, 0.95
_MAX_WORDS = 300
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Likeness:
    """How alike two texts are.

    Attributes:
        edit: words in common order, as a share of both (Ratcliff-Obershelp): 1 for the same words.
        bag: words in common, in any order, as a share of both (Dice).
        trigrams: runs of three words in common, as a share of all (Jaccard).
    """

    edit: float
    bag: float
    trigrams: float

    @property
    def duplicate(self) -> bool:
        """Whether the two differ in next to nothing."""
        return self.edit >= DUPLICATE

    @property
    def swapped(self) -> bool:
        """Whether one looks like the other with words moved or exchanged."""
        return not self.duplicate and (self.edit >= SWAPPED_EDIT or self.bag >= SWAPPED_BAG)


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
        length_correlation: Spearman's rank correlation of reward and length; None where one of them does not vary.
        likeness: the best candidate against each lower-scored one.
        copies: candidates that are near-duplicates of an earlier one.
        sources: who wrote the candidates.
    """

    num_candidates: int
    rewards: list[float]
    spread: float
    num_distinct: int
    tied_best: int
    lengths: list[int]
    length_correlation: float | None
    likeness: list[Likeness] = field(default_factory=list)
    copies: int = 0
    sources: list[str] = field(default_factory=list)


def words(text: str) -> list[str]:
    """Words in small letters; punctuation and white space don't count."""
    return _WORD.findall(text.lower())


def likeness(first: Sequence[str], second: Sequence[str]) -> Likeness:
    """How alike two texts are, from the first 300 words of each.

    >>> likeness("a b c d".split(), "a c b d".split()).bag
    1.0
    """
    a, b = list(first[:_MAX_WORDS]), list(second[:_MAX_WORDS])
    if a == b:
        return Likeness(1.0, 1.0, 1.0)
    if not a or not b:
        return Likeness(0.0, 0.0, 0.0)
    common = sum((Counter(a) & Counter(b)).values())
    bag = 2 * common / (len(a) + len(b))
    # No order of the words can give more than their number in common: most pairs need no alignment.
    edit = SequenceMatcher(None, a, b, autojunk=False).ratio() if bag > 0.3 else bag / 2
    return Likeness(edit, bag, _jaccard(_runs(a), _runs(b)))


def _copy(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two texts are near-duplicates; counted words rule most pairs out before any alignment."""
    if abs(len(first) - len(second)) > (1 - DUPLICATE) * (len(first) + len(second)):
        return False
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common >= DUPLICATE * (len(first) + len(second)) and likeness(first, second).duplicate


def _runs(text: Sequence[str], order: int = 3) -> set[tuple[str, ...]]:
    return set(zip(*(text[start:] for start in range(order)), strict=False)) or {tuple(text)}


def _jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)


def measure_group(group: Group, *, compare: bool) -> GroupMeasures:
    """A group's numbers; comparing its texts, which takes most of the time, only where asked for."""
    texts = [words(completion_text(candidate, group)) for candidate in group.candidates]
    known = [(c.reward, text) for c, text in zip(group.candidates, texts, strict=True) if c.reward is not None]
    rewards, lengths = [reward for reward, _ in known], [len(text) for _, text in known]
    best = max(rewards, default=0.0)
    found = GroupMeasures(
        num_candidates=len(texts),
        rewards=rewards,
        spread=best - min(rewards) if rewards else 0.0,
        num_distinct=len(set(rewards)),
        tied_best=rewards.count(best) - 1 if rewards else 0,
        lengths=lengths,
        length_correlation=rank_correlation(rewards, lengths),
        sources=[candidate.source or "" for candidate in group.candidates],
    )
    if compare:
        if found.num_distinct > 1:
            positive = rewards.index(best)
            found.likeness = [likeness(known[positive][1], text) for reward, text in known if reward < best]
        found.copies = sum(any(_copy(texts[i], texts[j]) for j in range(i)) for i in range(len(texts)))
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's; None where there are fewer than three values or one side does not vary."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(stats.spearmanr(first, second).statistic)


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

"""What is told of a group and its candidates: numbers to filter and sort by, and all that a page shows."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ncalign.audit.copies import clusters_of
from ncalign.audit.measures import Ranked, ranked
from ncalign.audit.texts import likeness, words
from ncalign.core.terminal import visible
from ncalign.data.formats import native
from ncalign.data.groups import Group, Text
from ncalign.data.rendering import completion_text, message_text

Facts = Mapping[str, int | float | None]
MOST_COMPARED = 256
"""Candidates of a group up to which each is compared with each; of larger groups near-copies and likeness are not told."""
FACTS: Mapping[str, str] = {
    "candidates": "INTEGER",
    "unscored": "INTEGER",
    "spread": "REAL",
    "flat": "INTEGER",
    "tied": "INTEGER",
    "empty": "INTEGER",
    "cut": "INTEGER",
    "copies": "INTEGER",
    "longest": "INTEGER",
    "likeness": "REAL",
    "inverted": "REAL",
}
"""A group's numbers, with their types in an index.

``candidates``: how many there are, and how many are ``unscored``, ``empty`` or ``cut``, or near-``copies`` of an earlier one.
``spread``: best reward less the worst. ``flat``: 1 where there are several rewards and all are equal. ``tied``: how many share
the best reward. ``longest``: words of the longest. ``likeness``: of the best to the lower-scored one that is most like it.
``inverted``: :func:`inverted_share`. None is what can't be told.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A group, and what a model says of it.

    Attributes:
        group: with the reference's log-probs, where they are known, in its candidates.
        policy: log-probs of the candidates under the policy, summed over their tokens, in nats; empty where none is known.
    """

    group: Group
    policy: tuple[float | None, ...] = ()

    def pack(self) -> bytes:
        """The entry as compressed JSON."""
        row = {**native.to_row(self.group), "policy": self.policy}
        return zlib.compress(json.dumps(row, ensure_ascii=False).encode(), 1)

    @classmethod
    def unpack(cls, packed: bytes) -> Entry:
        """What :meth:`pack` has written.

        >>> from ncalign.data.groups import Candidate
        >>> entry = Entry(Group("sum", "2 + 2 = ", [Candidate("4", reward=1.0)]), (-0.5,))
        >>> Entry.unpack(entry.pack()) == entry
        True
        """
        row = json.loads(zlib.decompress(packed))
        policy = tuple(row.pop("policy"))
        return cls(native.parse(row, "", ""), policy)

    @property
    def logprobs(self) -> tuple[float | None, ...]:
        """The policy's log-probs, or the reference's where no policy's are known."""
        reference = tuple(candidate.reference_logprob for candidate in self.group.candidates)
        return self.policy if any(value is not None for value in self.policy) else reference

    @property
    def scores(self) -> tuple[float | None, ...]:
        """What the kernel draws by: log-ratios of policy to reference, or the log-probs where one of them is not known."""
        reference = [candidate.reference_logprob for candidate in self.group.candidates]
        known = None not in self.policy and None not in reference and len(self.policy) == len(reference)
        if not known:
            return self.logprobs
        return tuple(a - b for a, b in zip(self.policy, reference, strict=True) if a is not None and b is not None)


def with_logprobs(group: Group, policy: Sequence[float | None], reference: Sequence[float | None]) -> Entry:
    """An entry with log-probs from elsewhere, one for each candidate or none; where none is given, the data's own stay."""
    candidates = group.candidates
    if len(reference) == len(candidates):
        both = zip(candidates, reference, strict=True)
        candidates = [one if value is None else replace(one, reference_logprob=value) for one, value in both]
    return Entry(replace(group, candidates=candidates), tuple(policy) if len(policy) == len(candidates) else ())


def facts_of(entry: Entry, texts: Sequence[Sequence[str]]) -> Facts:
    """A group's numbers, as :data:`FACTS` lists them; ``texts`` are the words of its completions."""
    group, order = entry.group, ranked(entry.group)
    rewards = [candidate.reward for candidate in group.candidates if candidate.reward is not None]
    written = [bool(completion_text(candidate.completion).strip()) for candidate in group.candidates]
    alike = _alike(order, texts)
    return {
        "candidates": len(group.candidates),
        "unscored": len(group.candidates) - len(rewards),
        "spread": max(rewards) - min(rewards) if rewards else None,
        "flat": int(len(rewards) > 1 and len(set(rewards)) == 1),
        "tied": rewards.count(max(rewards)) if rewards else 0,
        "empty": written.count(False),
        "cut": sum(not one.finished and has_text for one, has_text in zip(group.candidates, written, strict=True)),
        "copies": None if len(texts) > MOST_COMPARED else sum(len(cluster) - 1 for cluster in clusters_of(texts)[0]),
        "longest": max(map(len, texts), default=0),
        "likeness": max(alike.values(), default=None),
        "inverted": inverted_share([candidate.reward for candidate in group.candidates], entry.logprobs),
    }


def _alike(order: Ranked | None, texts: Sequence[Sequence[str]]) -> dict[int, float]:
    """Likeness of the best candidate to each lower-scored one, by the latter's place."""
    if order is None or len(texts) > MOST_COMPARED:
        return {}
    return {k: likeness(texts[order.best], texts[k]).edit for k in order.lower}


def inverted_share(rewards: Sequence[float | None], logprobs: Sequence[float | None]) -> float | None:
    """Of the pairs whose rewards and log-probs both differ, the share in which the lower reward is the likelier.

    It is (1 - gamma) / 2 of Goodman and Kruskal's rank correlation: 0 where the model agrees with the rewards, 1 where it ranks
    the other way round, None where there is no such pair.

    >>> inverted_share([1.0, 0.5, 0.0, None], [-3.0, -1.0, -2.0, -9.0])
    0.6666666666666666
    """
    known = [(r, p) for r, p in zip(rewards, logprobs, strict=False) if r is not None and p is not None]
    signs = Counter(
        (known[i][0] > known[j][0]) == (known[i][1] > known[j][1])
        for j in range(len(known))
        for i in range(j)
        if known[i][0] != known[j][0] and known[i][1] != known[j][1]
    )
    return signs[False] / signs.total() if signs else None


def kernel_weights(scores: Sequence[float | None], lower: Sequence[int], *, beta: float) -> dict[int, float]:
    """``softmax(beta * score)`` over the lower-scored candidates, by their places; empty where a score is not known.

    It is the kernel from which MC-PO draws its negatives (arXiv 2502.04567, Algorithm 1).

    >>> kernel_weights([0.0, 5.0, 5.0], [1, 2], beta=0.1)
    {1: 0.5, 2: 0.5}
    """
    found = [beta * value for k in lower if k < len(scores) and (value := scores[k]) is not None]
    if not found or len(found) < len(lower):
        return {}
    raw = [math.exp(value - max(found)) for value in found]
    return {k: value / sum(raw) for k, value in zip(lower, raw, strict=True)}


def shown(entry: Entry, place: int, *, beta: float) -> dict[str, Any]:
    """All that a page shows of a group, as JSON values in which nothing steers or reorders letters."""
    group, order = entry.group, ranked(entry.group)
    texts = words_of(group)
    lower = () if order is None else order.lower
    weights = kernel_weights(entry.scores, lower, beta=beta)
    alike = _alike(order, texts)
    copies = defaultdict[int, list[int]](list)
    for first, second in clusters_of(texts)[1] if len(texts) <= MOST_COMPARED else ():
        copies[second].append(first)
    policy = entry.policy or (None,) * len(group.candidates)
    return {
        "place": place,
        "id": visible(group.id),
        "facts": facts_of(entry, texts),
        "prompt": turns_of(group.prompt),
        "candidates": [
            {
                "text": visible(completion_text(candidate.completion)),
                "reward": candidate.reward,
                "source": visible(candidate.source or ""),
                "finished": candidate.finished,
                "best": order is not None and k == order.best,
                "words": len(texts[k]),
                "policy": policy[k],
                "reference": candidate.reference_logprob,
                "weight": weights.get(k),
                "likeness": alike.get(k),
                "copies": copies[k],
            }
            for k, candidate in enumerate(group.candidates)
        ],
    }


def words_of(group: Group) -> list[list[str]]:
    """The words of its completions, as `audit` counts them."""
    return [words(completion_text(candidate.completion)) for candidate in group.candidates]


def turns_of(prompt: Text) -> list[dict[str, str]]:
    """A prompt's turns; a plain string is one of no role."""
    if isinstance(prompt, str):
        return [{"role": "", "text": visible(prompt)}]
    return [{"role": visible(message["role"]), "text": visible(message_text(message))} for message in prompt]


def searched(group: Group) -> list[str]:
    """The texts in which a search looks: id, prompt, completions and their sources."""
    sources = dict.fromkeys(candidate.source for candidate in group.candidates if candidate.source)
    completions = [completion_text(candidate.completion) for candidate in group.candidates]
    return [*(turn["text"] for turn in turns_of(group.prompt)), *map(visible, (group.id, *completions, *sources))]

"""Near-copies: within a group every pair is compared; across groups, those that share a band of their MinHash signatures."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ncalign.audit.texts import COPY_SHARE, COPY_WORDS, likeness, num_common, runs

_RUN, _BANDS, _ROWS = 3, 16, 4
Pairs = list[tuple[int, int]]


def clusters_of(texts: Sequence[Sequence[str]]) -> tuple[list[list[int]], Pairs]:
    """Sets of texts that are near-copies of each other, directly or by way of others, and the pairs that are so directly."""
    pairs = [
        (i, j)
        for j in range(len(texts))
        for i in range(j)
        if _maybe_copy(texts[i], texts[j]) and likeness(texts[i], texts[j]).duplicate
    ]
    return _connected(len(texts), pairs), pairs


def clusters_across(texts: Sequence[Sequence[str]], owners: Sequence[int]) -> list[int]:
    """Sizes of the sets of near-copies that several groups share, the largest first; ``owners`` has the group of each text.

    Two candidates whose runs of three words overlap by two thirds are compared, word by word, with a probability of 97 %.
    """
    candidates: set[tuple[int, int]] = set()
    signatures = _signatures(texts)
    for start in range(0, _BANDS * _ROWS, _ROWS):
        first: dict[bytes, int] = {}
        for index, band in enumerate(signatures[:, start : start + _ROWS]):
            candidates.add((first.setdefault(band.tobytes(), index), index))
    pairs = [(i, j) for i, j in candidates if i < j and likeness(texts[i], texts[j]).duplicate]
    shared = (members for members in _connected(len(texts), pairs) if len({owners[index] for index in members}) > 1)
    return sorted(map(len, shared), reverse=True)


def _maybe_copy(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two texts may be near-copies: counting words rules most pairs out without an alignment."""
    size = (len(first) + len(second)) / 2
    allowed = 1.5 * max(COPY_WORDS, COPY_SHARE * size)
    return abs(len(first) - len(second)) / 2 <= allowed and size - num_common(first, second) <= allowed


def _connected(num_texts: int, pairs: Pairs) -> list[list[int]]:
    """Sets of two texts or more that the pairs connect."""
    if not pairs:
        return []
    links = coo_array((np.ones(len(pairs)), tuple(zip(*pairs, strict=True))), shape=(num_texts, num_texts))
    found: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(connected_components(links, directed=False)[1]):
        found[label].append(index)
    return [members for members in found.values() if len(members) > 1]


def _signatures(texts: Sequence[Sequence[str]]) -> NDArray[np.uint64]:
    rng = np.random.default_rng(0)
    # Multiply-shift hashing: unsigned 64-bit products wrap around, as the method needs.
    odd = rng.integers(1, 1 << 63, size=_BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shift = rng.integers(0, 1 << 63, size=_BANDS * _ROWS, dtype=np.uint64)
    found = np.empty((len(texts), _BANDS * _ROWS), dtype=np.uint64)
    for index, text in enumerate(texts):
        encoded = [" ".join(run).encode("utf-8", "replace") for run in runs(text, _RUN)]
        hashes = np.fromiter(map(zlib.crc32, encoded), dtype=np.uint64)
        found[index] = ((hashes[:, None] * odd + shift) >> np.uint64(32)).min(axis=0)
    return found

"""What a step computes from a whole data set, group by group: memory does not grow with the number of groups."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from ncalign.adjust.transforms import Rewards, known_rewards, length_deviations

QUANTILE_SAMPLE = 2**20
"""A quantile is exact up to this many rewards; of more, this many are drawn."""
_NUM_BINS, _MAX_SOURCES = 1024, 64
_MOST_PAIRS = 500_000
"""Of a group: a thousand candidates."""
_MAX_PHI = 10.0
"""Odds of e^10 for a standard deviation of length: larger coefficients can't be distinguished from infinite ones."""
_RIDGE = 1e-10
"""Ridge penalty on the coefficients, so that a source which always wins has a finite quality; negligible for length's."""


def length_slope(groups: Iterable[tuple[Rewards, Sequence[float]]]) -> tuple[float | None, float]:
    """Least squares of reward on length within groups: ``sum (l - mean)(r - mean) / sum (l - mean)^2``.

    Args:
        groups: rewards and lengths of each group's candidates.

    Returns:
        Reward a unit of length, None where no two lengths of a group differ; and the standard deviation of length within
        groups.
    """
    cross = square = 0.0
    count = 0
    for rewards, lengths in groups:
        away, known = length_deviations(rewards, lengths), known_rewards(rewards)
        count += len(known)
        if len(known) > 1:
            cross += float(away @ (known - known.mean()))
            square += float(away @ away)
    return (cross / square if square > 0 else None), (float(np.sqrt(square / count)) if count else 0.0)


def _pairs(number: int) -> Iterable[tuple[int, ...]]:
    """All pairs of so many; of very many, some that are drawn at random, the same each time."""
    if math.comb(number, 2) <= _MOST_PAIRS:
        return combinations(range(number), 2)
    chance = random.Random(number)
    return (tuple(chance.sample(range(number), 2)) for _ in range(_MOST_PAIRS))


class PairwiseLength:
    r"""Logistic regression, without an intercept, of which candidate of a pair is preferred on their lengths and sources.

    Rewards in [0, 1] are read as chances to be good. Of a pair, exactly one is good with the weight
    ``w = r_i (1 - r_j) + r_j (1 - r_i)``, and then it is i with ``p = r_i (1 - r_j) / w``, whose log-odds are
    ``logit r_i - logit r_j``. The model is ``logit p = quality_s(i) - quality_s(j) + phi (t_i - t_j)`` with
    ``t = tanh((length - mean) / scale)`` and a quality for each source, so that better models which write longer don't pass for
    length. Pairs need no term for how hard a prompt is: it is the same on both sides (Chamberlain's conditional likelihood).

    Args:
        scale: standard deviation of length within groups.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        # A pair's log-likelihood depends on its sources and on t_i - t_j in [-2, 2] alone: bins keep weight, the weight won by
        # the first source, and the sum of weighted differences, which gives each bin's mean.
        self._bins: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._sources: dict[str | None, int] = {}
        self.num_movable = 0

    @property
    def num_sources(self) -> int:
        """Sources with a quality of their own; those beyond a limit share one."""
        return len(set(self._sources.values()))

    def add(self, rewards: Rewards, lengths: Sequence[float], sources: Sequence[str | None]) -> None:
        """Add a group."""
        t = np.tanh(length_deviations(rewards, lengths) / self._scale)
        known = known_rewards(rewards)
        places = [
            self._sources.setdefault(source, min(len(self._sources), _MAX_SOURCES - 1))
            for reward, source in zip(rewards, sources, strict=True)
            if reward is not None
        ]
        self.num_movable += int(np.count_nonzero((known > 0) & (known < 1)))
        for pair in _pairs(len(known)):
            first, second = sorted(pair, key=places.__getitem__)
            won = known[first] * (1 - known[second])
            weight = won + known[second] * (1 - known[first])
            apart = t[first] - t[second]
            bins = self._bins.setdefault((places[first], places[second]), np.zeros((3, _NUM_BINS)))
            bins[:, min(int((apart + 2) * (_NUM_BINS / 4)), _NUM_BINS - 1)] += weight, won, weight * apart

    def phi(self) -> float | None:
        """Length's coefficient at the greatest likelihood; None where it is not finite or no pair has lengths that differ."""
        if not self._bins:
            return None
        # One row a bin that holds a pair, with +1 and -1 at its sources.
        bins, pairs, sources = np.stack(list(self._bins.values())), np.array(list(self._bins)), np.eye(self.num_sources)
        pair, place = np.nonzero(bins[:, 0])
        weight, won, differences = bins[pair, :, place].T
        signs, apart = sources[pairs[pair, 0]] - sources[pairs[pair, 1]], differences / weight
        if not np.any(apart):
            return None
        features = np.column_stack([signs[:, 1:], apart])  # one quality is free: the first is 0

        def loss(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            logits = features @ theta
            value = float((weight * np.logaddexp(0, logits) - won * logits).sum() / total)
            return value + _RIDGE / 2 * float(theta @ theta), features.T @ (
                weight * expit(logits) - won
            ) / total + _RIDGE * theta

        def curvature(theta: NDArray[np.float64]) -> NDArray[np.float64]:
            share = expit(features @ theta)
            matrix: NDArray[np.float64] = (features.T * (weight * share * (1 - share) / total)) @ features
            return matrix + _RIDGE * np.eye(len(theta))

        total = float(weight.sum())
        start = np.zeros(features.shape[1])
        found = minimize(loss, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-10, "maxiter": 500})
        phi = float(found.x[-1])
        return phi if abs(phi) < _MAX_PHI else None


def reward_sample(groups: Iterable[Rewards], size: int, seed: int) -> tuple[NDArray[np.float64], int]:
    """All rewards in rising order or, where there are more than ``size``, that many drawn evenly; and how many there are."""
    kept, chance, seen = array("d"), random.Random(f"quantile {seed}"), 0
    for reward in (reward for rewards in groups for reward in rewards if reward is not None):
        seen += 1
        if len(kept) < size:
            kept.append(reward)
        elif (place := chance.randrange(seen)) < size:
            kept[place] = reward
    return (np.sort(np.frombuffer(kept, dtype=np.float64)) if kept else np.empty(0)), seen

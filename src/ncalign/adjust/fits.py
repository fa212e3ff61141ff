"""What a step computes from a whole data set, group by group: memory does not grow with the number of groups."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from ncalign.adjust.transforms import Rewards, known_rewards, length_deviations

QUANTILE_SAMPLE = 2**20
"""A quantile is exact up to this many rewards; of more, this many are drawn."""
_NUM_BINS, _MAX_SOURCES = 1024, 64
_MAX_PHI = 10.0
"""Odds of e^10 for a standard deviation of length: larger coefficients can't be distinguished from infinite ones."""
_RIDGE = 1e-10
"""Ridge penalty on the coefficients, so that a source which always wins has a finite quality; negligible for length's."""


class LengthSlope:
    """Least squares of reward on length within groups: ``sum (l - mean)(r - mean) / sum (l - mean)^2``."""

    def __init__(self) -> None:
        self._cross = self._square = 0.0
        self.num_candidates = 0

    def add(self, rewards: Rewards, lengths: Sequence[float]) -> None:
        """Add a group."""
        away, known = length_deviations(rewards, lengths), known_rewards(rewards)
        self.num_candidates += len(known)
        if len(known) > 1:
            self._cross += float(away @ (known - known.mean()))
            self._square += float(away @ away)

    @property
    def slope(self) -> float | None:
        """Reward a unit of length; None where no two lengths of a group differ."""
        return self._cross / self._square if self._square > 0 else None

    @property
    def spread(self) -> float:
        """Standard deviation of length within groups."""
        return float(np.sqrt(self._square / self.num_candidates)) if self.num_candidates else 0.0


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
        places = [self._place(source) for reward, source in zip(rewards, sources, strict=True) if reward is not None]
        self.num_movable += int(np.count_nonzero((known > 0) & (known < 1)))
        for i in range(len(known)):
            for j in range(i + 1, len(known)):
                first, second = (i, j) if places[i] <= places[j] else (j, i)
                won = known[first] * (1 - known[second])
                weight = won + known[second] * (1 - known[first])
                apart = t[first] - t[second]
                bins = self._bins.setdefault((places[first], places[second]), np.zeros((3, _NUM_BINS)))
                bins[:, min(int((apart + 2) * (_NUM_BINS / 4)), _NUM_BINS - 1)] += weight, won, weight * apart

    def _place(self, source: str | None) -> int:
        return self._sources.setdefault(source, min(len(self._sources), _MAX_SOURCES - 1))

    def phi(self) -> float | None:
        """Length's coefficient at the greatest likelihood; None where it is not finite or no pair has lengths that differ."""
        signs, apart, weight, won = self._rows()
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

    def _rows(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """One row a bin that holds a pair: +1 and -1 at its sources, mean difference of t, weight, and weight won."""
        signs, apart, weight, won = [], [], [], []
        for (first, second), bins in self._bins.items():
            used = bins[:, bins[0] > 0]
            sign = np.zeros((used.shape[1], max(self.num_sources, 1)))
            sign[:, first] += 1
            sign[:, second] -= 1
            signs.append(sign)
            weight.append(used[0])
            won.append(used[1])
            apart.append(used[2] / used[0])
        if not signs:
            return np.zeros((0, 1)), np.zeros(0), np.zeros(0), np.zeros(0)
        return np.vstack(signs), np.concatenate(apart), np.concatenate(weight), np.concatenate(won)


class RewardSample:
    """All rewards, or where there are more than ``size``, that many drawn evenly from them.

    Args:
        size: rewards kept.
        seed: of the draw.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._kept, self._size = array("d"), size
        self._chance = random.Random(f"quantile {seed}")
        self.num_seen = 0

    def add(self, rewards: Rewards) -> None:
        """Add a group."""
        for reward in rewards:
            if reward is None:
                continue
            self.num_seen += 1
            if len(self._kept) < self._size:
                self._kept.append(reward)
            elif (place := self._chance.randrange(self.num_seen)) < self._size:
                self._kept[place] = reward

    def ordered(self) -> NDArray[np.float64]:
        """The rewards kept, in rising order."""
        return np.sort(np.frombuffer(self._kept, dtype=np.float64)) if self._kept else np.empty(0)

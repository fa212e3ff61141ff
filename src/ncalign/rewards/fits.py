"""What a step learns from a whole data set, group by group: memory does not grow with it."""

from __future__ import annotations

import random
from array import array

import numpy as np
from numpy.typing import NDArray

from ncalign.rewards.transforms import Rewards, length_deviations

QUANTILE_SAMPLE = 2**20
"""Rewards that a quantile is exact up to; of more, as many are drawn."""
_NUM_BINS = 4096
_MAX_PHI = 50.0


class LengthSlope:
    """Least squares of reward on length within groups: ``sum (l - mean)(r - mean) / sum (l - mean)^2``."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._cross = self._square = 0.0
        self.num_candidates = 0

    def add(self, rewards: Rewards, lengths: list[float]) -> None:
        """See a group."""
        away = length_deviations(rewards, lengths)
        known = np.array([reward for reward in rewards if reward is not None], dtype=np.float64)
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
    r"""Logistic regression, without an intercept, of which candidate of a pair is preferred on their lengths.

    Rewards in [0, 1] are read as chances to be good. Of a pair, exactly one is good with the weight
    ``w = r_i (1 - r_j) + r_j (1 - r_i)``, and then it is i with ``p = r_i (1 - r_j) / w``, whose log-odds are
    ``logit r_i - logit r_j``. The model is ``logit p = phi (t_i - t_j)`` with ``t = tanh((length - mean) / scale)``. Pairs need
    no term for how hard a prompt is: it is the same on both sides (Chamberlain's conditional likelihood).

    Args:
        scale: standard deviation of length within groups.
    """

    def __init__(self, scale: float) -> None:
        """See the class."""
        self._scale = scale
        # A pair's log-likelihood depends on |t_i - t_j| in [0, 2] alone: bins keep it, with the mean of each bin.
        self._weight, self._won, self._moment = (np.zeros(_NUM_BINS) for _ in range(3))
        self.num_movable = 0

    def add(self, rewards: Rewards, lengths: list[float]) -> None:
        """See a group."""
        t = np.tanh(length_deviations(rewards, lengths) / self._scale)
        known = np.array([reward for reward in rewards if reward is not None], dtype=np.float64)
        self.num_movable += int(np.count_nonzero((known > 0) & (known < 1)))
        first, second = np.triu_indices(len(known), k=1)
        longer = np.where(t[first] >= t[second], first, second)
        shorter = first + second - longer
        won = known[longer] * (1 - known[shorter])
        weight = won + known[shorter] * (1 - known[longer])
        apart = t[longer] - t[shorter]
        bins = np.minimum((apart * (_NUM_BINS / 2)).astype(np.int64), _NUM_BINS - 1)
        for total, values in ((self._weight, weight), (self._won, won), (self._moment, weight * apart)):
            np.add.at(total, bins, values)

    def phi(self) -> float | None:
        """The coefficient of greatest likelihood; None where it is not finite or no pair says anything of it.

        The likelihood is concave in phi, so that the sign of its slope brackets the root.
        """
        used = (self._weight > 0) & (self._moment > 0)
        if not used.any():
            return None
        weight, won = self._weight[used], self._won[used]
        apart = self._moment[used] / weight

        def slope(phi: float) -> float:
            return float(((won - weight / (1 + np.exp(-phi * apart))) * apart).sum())

        low, high = -_MAX_PHI, _MAX_PHI
        if slope(low) <= 0 or slope(high) >= 0:
            return None
        while high - low > 1e-12:
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        return (low + high) / 2


class RewardSample:
    """All rewards, or where there are more than ``size``, that many drawn evenly from them.

    Args:
        size: rewards kept.
        seed: of the draw.
    """

    def __init__(self, size: int, seed: int) -> None:
        """See the class."""
        self._kept, self._size = array("d"), size
        self._chance = random.Random(f"quantile {seed}")
        self.num_seen = 0

    def add(self, rewards: Rewards) -> None:
        """See a group."""
        for reward in rewards:
            if reward is None:
                continue
            self.num_seen += 1
            if len(self._kept) < self._size:
                self._kept.append(reward)
            elif (place := self._chance.randrange(self.num_seen)) < self._size:
                self._kept[place] = reward

    def ordered(self) -> NDArray[np.float64]:
        """What was kept, in rising order."""
        return np.sort(np.frombuffer(self._kept, dtype=np.float64)) if self._kept else np.empty(0)

"""Rewards of a group → rewards of a group: pure functions. A candidate without a reward stays without one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logit

from ncalign.data.groups import Text
from ncalign.objectives.targets import TRANSFORMS, Transform

Rewards: TypeAlias = Sequence[float | None]
Unit: TypeAlias = Literal["words", "characters", "log_words"]
GROUP_TRANSFORMS: Mapping[str, Transform] = {
    "zscore": TRANSFORMS["z_score"],
    "rank": TRANSFORMS["rank"],
    "dense_rank": TRANSFORMS["dense_rank"],
}
"""Steps that an objective's `transform` has too."""
UNITS: tuple[Unit, ...] = ("words", "characters", "log_words")

_WORD = re.compile(r"\w+")


def known_rewards(rewards: Rewards) -> NDArray[np.float64]:
    """The rewards that are there."""
    return np.array([reward for reward in rewards if reward is not None], dtype=np.float64)


def _on_known(rewards: Rewards, transform: Callable[[NDArray[np.float64]], Iterable[float]]) -> list[float | None]:
    """Transform the known rewards; the others stay missing."""
    new = iter(transform(known_rewards(rewards)))
    return [None if reward is None else float(next(new)) for reward in rewards]


def within_group(rewards: Rewards, transform: Transform) -> list[float | None]:
    """The known rewards of a group after one of the transforms that objectives know too.

    >>> within_group([3.0, None, 1.0], TRANSFORMS["z_score"])
    [1.0, None, -1.0]
    >>> within_group([0.2, 9.0, None, 0.2], TRANSFORMS["rank"])
    [0.25, 1.0, None, 0.25]
    """

    def transformed(known: NDArray[np.float64]) -> Iterable[float]:
        values = torch.from_numpy(known).unsqueeze(0)
        return transform(values, torch.ones_like(values, dtype=torch.bool))[0].tolist() if len(known) else known

    return _on_known(rewards, transformed)


def quantiles(rewards: Rewards, among: NDArray[np.float64]) -> list[float | None]:
    """Mid-rank of each reward among ``among`` (sorted): ``(#below + #equal / 2) / #``, inside (0, 1) for a member.

    >>> quantiles([1.0, 4.0, None], np.array([1.0, 2.0, 4.0, 4.0]))
    [0.125, 0.75, None]
    """
    return _on_known(
        rewards, lambda known: (np.searchsorted(among, known) + np.searchsorted(among, known, side="right")) / (2 * len(among))
    )


def clipped(rewards: Rewards, low: float, high: float) -> list[float | None]:
    """``min(max(r, low), high)``.

    >>> clipped([-7.0, 0.5, None], -3, 3)
    [-3.0, 0.5, None]
    """
    return _on_known(rewards, lambda known: known.clip(low, high))


def scaled(rewards: Rewards, factor: float) -> list[float | None]:
    """``factor * r``; -1 turns costs into rewards.

    >>> scaled([2.0, None], -1)
    [-2.0, None]
    """
    return [None if reward is None else factor * reward for reward in rewards]


def weighted_aspects(aspects: Mapping[str, Rewards], weights: Mapping[str, float], count: int) -> list[float | None]:
    """``sum(w_a * v_a) / sum(w_a)`` over the aspects a that a candidate has a value for; None where it has none.

    >>> weighted_aspects({"honesty": [4.0, None], "helpfulness": [1.0, 3.0]}, {"honesty": 1.0, "helpfulness": 2.0}, 2)
    [2.0, 3.0]
    """
    found: list[float | None] = []
    for k in range(count):
        given = [(weight, aspects[name][k]) for name, weight in weights.items() if name in aspects]
        known = [(weight, value) for weight, value in given if value is not None]
        total = sum(weight for weight, _ in known)
        found.append(sum(weight * value for weight, value in known) / total if known else None)
    return found


def key_of(completion: Text) -> str:
    """What completions are matched by: the text, alone or as the only turn of an assistant; else all turns."""
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and completion[0].keys() == {"role", "content"} and completion[0]["role"] == "assistant":
        return str(completion[0]["content"])
    return json.dumps(completion, sort_keys=True)


def text_length(text: str, unit: Unit) -> float:
    """Words (runs of letters and digits), characters, or ln(1 + words).

    >>> text_length("Four, I think.", "words"), text_length("Four", "characters")
    (3.0, 4.0)
    """
    if unit == "characters":
        return float(len(text))
    count = len(_WORD.findall(text))
    return math.log1p(count) if unit == "log_words" else float(count)


def length_deviations(rewards: Rewards, lengths: Sequence[float]) -> NDArray[np.float64]:
    """Lengths of the candidates with a reward, less their mean."""
    known = np.array([length for reward, length in zip(rewards, lengths, strict=True) if reward is not None], dtype=np.float64)
    return known - known.mean() if len(known) else known


def without_length(rewards: Rewards, lengths: Sequence[float], slope: float) -> list[float | None]:
    """``r - slope * (length - mean length)``, the mean over the group's candidates with a reward.

    >>> without_length([1.0, 3.0, None], [10, 30, 500], 0.1)
    [2.0, 2.0, None]
    """
    away = length_deviations(rewards, lengths)
    return _on_known(rewards, lambda known: known - slope * away)


def without_length_odds(rewards: Rewards, lengths: Sequence[float], phi: float, scale: float) -> list[float | None]:
    """``sigmoid(logit(r) - phi * tanh((length - mean length) / scale))`` for rewards in [0, 1]; 0 and 1 stay.

    >>> without_length_odds([0.5, 1.0, 0.0], [1, 1, 1], 2.0, 1.0)
    [0.5, 1.0, 0.0]
    """
    shift = phi * np.tanh(length_deviations(rewards, lengths) / scale)
    return _on_known(rewards, lambda known: expit(logit(known) - shift))

"""How far the policy has moved from the one that generated the pool, and how healthy what it generated is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncalign.core.json import json_ready
from ncalign.stats.intervals import NO_INTERVAL, Interval, normal_arm

WARN_ABOVE = 0.1
"""KL in nats above which a round's samples are no longer those of the policy (the source paper's check)."""
_ENOUGH = 0.75
"""Effective share below which the samples don't tell where the current policy went, nor how far they are from telling it."""
_LARGEST = 50.0
"""Log-weights above this would overflow when squared; such a sample tells nothing but that the policies are far apart."""


@dataclass(frozen=True)
class Drift:
    """KL divergences between the generating policy and the current one, in nats a completion, averaged over prompts.

    Attributes:
        kl: KL(generating ‖ current).
        kl_interval: its 95 % interval, on the scale of its logarithm, by the jackknife over groups; NaN for one group. What
            moves far and is too rare to be among the samples is in no estimate and in no interval.
        reverse_kl: KL(current ‖ generating).
        reverse_kl_interval: likewise; NaN where ``effective_share`` is below 3/4.
        num_completions: what it was measured on.
        effective_share: effective sample size of the weights current/generating, as a share of the completions.
    """

    kl: float
    kl_interval: tuple[float, float]
    reverse_kl: float
    reverse_kl_interval: tuple[float, float]
    num_completions: int
    effective_share: float

    def as_json(self) -> dict[str, Any]:
        """For round.json."""
        found: dict[str, Any] = json_ready(asdict(self))
        return found


def estimate_drift(generating: Sequence[Sequence[float]], current: Sequence[Sequence[float]]) -> Drift:
    r"""Estimate both divergences from completions that the generating policy sampled.

    With $w = \pi_{now}/\pi_{gen}$ of a completion and means over the completions, $KL(\pi_{gen}\|\pi_{now})$ is estimated as
    the mean of $-\log w + c\,(w - 1)$: the mean of $w - 1$ is known to be 0 and takes most of the noise out, $c$ in [0, 1]
    being the regression coefficient. $KL(\pi_{now}\|\pi_{gen})$ is $\sum \tilde w \log \tilde w + \log n$ with
    $\tilde w = w / \sum w$, at most $\log n$: where ``effective_share`` is small, it is a lower bound. Samples of another
    temperature than 1, or cut by top_p or top_k, are of another distribution: 0 still means that nothing moved where they lie.

    Args:
        generating: log-probs under the generating policy, in nats; one list a group, groups may differ in length.
        current: the same completions' under the current policy.

    Raises:
        ValueError: there is nothing to measure, or the two don't match.

    >>> estimate_drift([[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-3.0]]).kl
    0.0
    """
    if not generating or [len(group) for group in generating] != [len(group) for group in current]:
        raise ValueError("drift needs the same completions, at least one, under both policies")
    before, now = (np.concatenate([np.asarray(group, dtype=np.float64) for group in side]) for side in (generating, current))
    log_w = now - before
    owner = np.repeat(np.arange(len(generating)), [len(group) for group in generating])
    known_zero = np.expm1(np.minimum(log_w, _LARGEST))
    forward = -log_w + _coefficient(-log_w, known_zero) * known_zero
    shift = float(log_w.max())
    w = np.exp(log_w - shift)
    # Sums of each group, so that the jackknife over groups subtracts rows.
    sums = np.stack([np.bincount(owner, values) for values in (np.ones_like(w), forward, w, w * log_w)], axis=1)

    def divergences(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        size, total, weight, tilted = np.moveaxis(totals, -1, 0)
        return np.stack([total / size, tilted / weight - np.log(weight / size) - shift], axis=-1)

    kl, reverse_kl = divergences(sums.sum(axis=0)).tolist()
    effective_share = float(w.sum() ** 2 / (w**2).sum() / len(w))
    intervals = [NO_INTERVAL, NO_INTERVAL]
    if len(sums) > 1:
        without = divergences(sums.sum(axis=0) - sums)
        errors = np.sqrt((len(sums) - 1) * without.var(axis=0)).tolist()
        intervals = [_log_interval(*pair, num=len(sums)) for pair in zip((kl, reverse_kl), errors, strict=True)]
    return Drift(
        kl=kl,
        kl_interval=intervals[0],
        reverse_kl=reverse_kl,
        reverse_kl_interval=intervals[1] if effective_share >= _ENOUGH else NO_INTERVAL,
        num_completions=len(w),
        effective_share=effective_share,
    )


def _log_interval(value: float, error: float, *, num: int) -> Interval:
    """95 % interval of a quantity above 0, whose logarithm is nearer to normal; 0 to 0 where nothing moved at all."""
    if value <= 0:
        return (0.0, 0.0) if value == error == 0 else NO_INTERVAL
    arm = normal_arm(error / value, least=0.0, num=num)
    return value * math.exp(-arm), value * math.exp(min(arm, _LARGEST))


def _coefficient(values: NDArray[np.float64], known_zero: NDArray[np.float64]) -> float:
    """The multiple of a variable of mean 0 that takes most noise out of the values' mean: 1 for a policy that hardly moved."""
    spread = float(np.mean((known_zero - known_zero.mean()) ** 2))
    if spread == 0:
        return 0.0
    shared = float(np.mean((known_zero - known_zero.mean()) * (values - values.mean())))
    return min(max(-shared / spread, 0.0), 1.0)


def pool_health(
    texts: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[float | None]],
    lengths: Sequence[Sequence[int]],
    finished: Sequence[Sequence[bool]],
    logprobs: Sequence[Sequence[float]],
    logprob_lengths: Sequence[Sequence[int]],
) -> dict[str, float]:
    """What a round's fresh completions look like, over all its prompts, one list a prompt each.

    Returns:
        Reward (mean over candidates, of the best and of the spread within a group), share of groups without spread and of
        candidates without a reward; tokens a completion; share ended by EOS; share that repeats another completion of its
        group; distinct-1 and distinct-2 (different words, and pairs of neighbours, as shares of all); entropy in nats a
        token, estimated as the mean negative log-prob of the sampled tokens.
    """
    known = [[reward for reward in group if reward is not None] for group in rewards]
    scored = [group for group in known if group]
    flat = [reward for group in known for reward in group]
    texts_flat = [text for group in texts for text in group]
    num_unknown = sum(len(group) for group in rewards) - len(flat)
    spread = [max(group) - min(group) for group in scored]
    tokens = sum(sum(group) for group in logprob_lengths)
    return {
        "reward/mean": _mean(flat),
        "reward/best": _mean([max(group) for group in scored]),
        "reward/spread": _mean(spread),
        "reward/missing": num_unknown / max(1, num_unknown + len(flat)),
        "groups/without_spread": _mean([float(width == 0) for width in spread]),
        "completions/tokens": _mean([length for group in lengths for length in group]),
        "completions/finished": _mean([float(done) for group in finished for done in group]),
        "completions/duplicates": _mean([1 - len(set(group)) / len(group) for group in texts if group]),
        "completions/distinct_1": _distinct(texts_flat, 1),
        "completions/distinct_2": _distinct(texts_flat, 2),
        "completions/entropy": -sum(sum(group) for group in logprobs) / tokens if tokens else math.nan,
    }


def alarms(health: Mapping[str, float], first: Mapping[str, float]) -> list[str]:
    """Warnings from comparing a round's health with the first round's."""
    now, before = defaultdict(lambda: math.nan, health), defaultdict(lambda: math.nan, first)
    found = []
    flat, repeated, ended = (now[name] for name in ("groups/without_spread", "completions/duplicates", "completions/finished"))
    if flat > 0.5:
        found.append(
            f"in {flat:.0%} of the groups all rewards are equal, and they teach nothing: harder or easier prompts, more "
            "samples or a higher temperature would help"
        )
    if repeated > 0.5 and repeated > 2 * before["completions/duplicates"]:
        found.append(f"{repeated:.0%} of the completions repeat another of their group: the policy is collapsing")
    for name, what in (("completions/entropy", "entropy a token"), ("completions/distinct_2", "distinct-2")):
        if now[name] < before[name] / 2:
            found.append(
                f"{what} fell from {before[name]:.3g} to {now[name]:.3g} since the first round: the policy is collapsing; an "
                "explicit target (info_nca, nca), a larger beta or a lower learning rate hold it"
            )
    if ended < 0.5 < before["completions/finished"]:
        found.append(
            f"only {ended:.0%} of the completions end by themselves: the policy grows longer; raise max_new_tokens or look for "
            "a reward that follows length"
        )
    return found


def _distinct(texts: Sequence[str], order: int) -> float:
    total, different = 0, set()
    for text in texts:
        words = text.split()
        grams = list(zip(*(words[start:] for start in range(order)), strict=False))
        total += len(grams)
        different.update(grams)
    return len(different) / total if total else math.nan


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan

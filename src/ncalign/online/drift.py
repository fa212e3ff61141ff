"""How far the policy has moved from the one that generated the pool, and how healthy what it generated is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ncalign.core.json import json_ready
from ncalign.stats.intervals import NO_INTERVAL, Interval, normal_arm

WARN_ABOVE = 0.1
"""KL in nats above which a round's samples are no longer those of the policy (the source paper's check)."""


@dataclass(frozen=True)
class Drift:
    """How far the current policy is from the generating one, in nats a completion, averaged over prompts it was not trained on.

    Attributes:
        kl: KL(generating ‖ current), estimated without bias: noise can put it a little below 0 where next to nothing moved.
        kl_interval: its 95 % interval, Student's over prompts, cut at 0; NaN for one prompt.
        preferred: KL(preferred ‖ current) - KL(preferred ‖ generating), where a prompt's preferred completion is the best by
            reward of its samples: below 0 the policy has moved towards them. Of the prompts whose rewards differ; NaN of none.
        preferred_interval: likewise; NaN for fewer than two such prompts.
        num_prompts: what it was measured on.
        num_completions: likewise.
    """

    kl: float
    kl_interval: Interval
    preferred: float
    preferred_interval: Interval
    num_prompts: int
    num_completions: int

    def as_json(self) -> dict[str, Any]:
        """For round.json."""
        found: dict[str, Any] = json_ready(asdict(self))
        return found


def estimate_drift(
    generating: Sequence[Sequence[float]], current: Sequence[Sequence[float]], rewards: Sequence[Sequence[float | None]]
) -> Drift:
    r"""Estimate the drift from completions that the generating policy sampled and the current one was not trained on.

    $KL(\pi_{gen}\|\pi_{now})$ is the mean over prompts of their completions' mean $\log \pi_{gen} - \log \pi_{now}$; with q the
    distribution of the preferred completions, the same mean over these is $KL(q\|\pi_{now}) - KL(q\|\pi_{gen})$. Both are
    unbiased on prompts kept out of training alone: on others the current policy was fitted to these very completions. The
    interval is Student's over the prompts' means, since one prompt's completions are not independent. Nothing is weighted by
    $w = \pi_{now}/\pi_{gen}$, not even as a control variate: where the policy moves to completions that were not sampled, all w
    are below 1 and alike, and such an estimate is too low with an interval that doesn't show it. Samples of another temperature
    than 1, or cut by top_p or top_k, are of another distribution: 0 still means that nothing moved where they lie.

    It is a function of numbers alone: processes that gather the same rows, in the order of the prompts, decide alike.

    Args:
        generating: log-probs under the generating policy, in nats; one row a prompt, rows may differ in length.
        current: the same completions' under the current policy.
        rewards: theirs, None where there is none.

    Raises:
        ValueError: there is nothing to measure, or the rows don't match.

    Source: the check of arXiv 2502.04567 on how far the preferred completions are from the policy that trains.

    >>> estimate_drift([[-1.0, -2.0], [-3.0, -1.0]], [[-1.5, -2.0], [-3.5, -1.0]], [[0.0, 1.0], [1.0, 0.0]]).kl
    0.25
    """
    lengths = [[len(row) for row in side] for side in (generating, current, rewards)]
    if not generating or not all(lengths[0]) or lengths != [lengths[0]] * 3:
        raise ValueError(f"drift needs completions of each prompt under both policies, with rewards: got {lengths}")
    lost = [np.asarray(before) - np.asarray(now) for before, now in zip(generating, current, strict=True)]
    kl, interval = _mean_over_prompts([row.mean() for row in lost])
    low, high = np.maximum(interval, 0.0).tolist()
    of_best = [row[best].mean() for row, own in zip(lost, rewards, strict=True) if (best := _preferred(own))]
    preferred, preferred_interval = _mean_over_prompts(of_best)
    return Drift(
        kl=kl,
        kl_interval=(low, high),
        preferred=preferred,
        preferred_interval=preferred_interval,
        num_prompts=len(lost),
        num_completions=sum(lengths[0]),
    )


def _mean_over_prompts(values: Sequence[float]) -> tuple[float, Interval]:
    if len(values) < 2:
        return _mean(values), NO_INTERVAL
    mean, error = _mean(values), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    arm = normal_arm(error, least=0.0, num=len(values))
    return mean, (mean - arm, mean + arm)


def _preferred(rewards: Sequence[float | None]) -> list[int]:
    """Places of the best reward, several where they are tied; none where rewards don't differ."""
    known = [reward for reward in rewards if reward is not None]
    if not known or max(known) == min(known):
        return []
    return [place for place, reward in enumerate(rewards) if reward == max(known)]


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

"""How often one arm's answer is better than another's: by the rewards of both, or by a judge who sees both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from ncalign.data.groups import Candidate, Group
from ncalign.rewards.base import RewardSource, score_many
from ncalign.rewards.config import RewardConfig
from ncalign.study.config import BEFORE, OF_PAIRS, Measure
from ncalign.study.measure import Found, Values, held_out_source, read_held_out
from ncalign.study.runs import Job
from ncalign.study.spec import Study

Wins: TypeAlias = Mapping[tuple[str, str], Mapping[int, Values]]
"""For two arms and each seed that both have: 1 for each prompt that the first arm's answer wins, 1/2 for a tie, 0 else."""
EVEN = 0.5
_REWARD: Measure = "reward"


def measured_of_runs(measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """What is measured of each run, so that the measures of pairs can be made."""
    own = [name for name in measures if name not in OF_PAIRS]
    return tuple(own) if len(own) == len(measures) or _REWARD in own else (*own, _REWARD)


def win_rates(study: Study, runs: Mapping[tuple[str, int], Found], jobs: Sequence[Job]) -> Wins:
    """The wins of each claim's arms, and of every arm against the starting model, where win rates are measured.

    A win is a higher reward of the greedy answer. A judge that compares (``mode: pairwise``) is shown both answers, in both
    orders, and each one's reward is the share that it won.

    Raises:
        ValueError: the judge can't be asked.
    """
    if not any(name in OF_PAIRS for name in study.measures):
        return {}
    pairs = [(claim.better, claim.worse) for claim in study.claims if claim.measure in OF_PAIRS]
    if study.file.before:
        pairs += [(arm, BEFORE) for arm in study.file.arms if arm != BEFORE]
    evaluation, first = study.file.evaluate, jobs[0].training()
    assert evaluation is not None
    if not compares(evaluation.rewards):
        return {
            pair: {seed: higher(a.values[_REWARD], b.values[_REWARD]) for seed, a, b in _both(runs, pair)}
            for pair in dict.fromkeys(pairs)
        }
    source, groups = held_out_source(evaluation, first), read_held_out(jobs[0].held_out, first)
    wins: dict[tuple[str, str], dict[int, Values]] = {}
    for pair in dict.fromkeys(pairs):
        wins[pair] = {seed: _judged(groups, a.answers, b.answers, source) for seed, a, b in _both(runs, pair)}
    return wins


def compares(rewards: RewardConfig) -> bool:
    """Whether rewards come from a judge who compares answers, and say nothing of one alone."""
    return rewards.judge is not None and rewards.judge.mode == "pairwise"


def higher(first: Values, second: Values) -> Values:
    """For each prompt that both have a value for: 1 where the first is higher, 1/2 where they are equal, else 0.

    >>> higher({"a": 1.0, "b": 0.5, "c": 0.0}, {"b": 0.5, "a": 2.0})
    {'a': 0.0, 'b': 0.5}
    """
    return {
        name: EVEN + ((value > second[name]) - (value < second[name])) / 2 for name, value in first.items() if name in second
    }


def _both(runs: Mapping[tuple[str, int], Found], pair: tuple[str, str]) -> Iterator[tuple[int, Found, Found]]:
    """The seeds for which both arms were measured."""
    for seed in sorted(seed for arm, seed in runs if arm == pair[0] and (pair[1], seed) in runs):
        yield seed, runs[pair[0], seed], runs[pair[1], seed]


def _judged(groups: Sequence[Group], first: Mapping[str, str], second: Mapping[str, str], source: RewardSource) -> Values:
    """Wins by a source that sees both answers of a prompt; an empty answer, which can't be shown, loses to any other."""
    both = [group for group in groups if group.id in first and group.id in second]
    wins = higher(*({group.id: float(bool(text[group.id].strip())) for group in both} for text in (first, second)))
    asked = [group for group in both if first[group.id].strip() and second[group.id].strip()]
    shown = [replace(group, candidates=[_candidate(group, text[group.id]) for text in (first, second)]) for group in asked]
    for group, (mine, other) in zip(asked, score_many(source, shown), strict=True):
        # A judge may have given no verdict: that is neither a tie nor a loss.
        wins[group.id] = higher({"": mine}, {"": other})[""] if mine is not None and other is not None else math.nan
    return wins


def _candidate(group: Group, text: str) -> Candidate:
    return Candidate(text if isinstance(group.prompt, str) else [{"role": "assistant", "content": text}])

"""`ncalign score`: fill in the candidates' rewards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from ncalign.core.errors import DataError
from ncalign.core.outputs import claim
from ncalign.core.progress import Bar, say
from ncalign.data.groups import REWARD_STEPS, Group, ReadReport, check_output, read_groups, write_groups
from ncalign.model.encoding import DroppedGroupError
from ncalign.rewards.base import RewardSource, score_usable
from ncalign.rewards.config import ScoreConfig
from ncalign.rewards.guard import Guarded
from ncalign.rewards.judge import JudgeReward
from ncalign.rewards.sources import check_failures, members, reward_dtype, reward_source, source_record
from ncalign.rewards.verifiable import ReasoningGymReward
from ncalign.stats.missing import compare_missing

_TOGETHER = 32
"""Groups given to a source at a time: the batches of a judge or a model hold completions of several."""


@dataclass
class ScoreCounts:
    """Counts of scored groups and of their rewards.

    Attributes:
        groups: groups scored.
        candidates: their candidates.
        unknown: candidates left without a reward.
        groups_with_spread: groups in which two candidates have different rewards; only they can teach a preference.
        total: sum of the known rewards.
        unknown_by_source: candidates left without a reward, of those whose source is recorded.
        candidates_by_source: candidates whose source is recorded.
    """

    groups: int = 0
    candidates: int = 0
    unknown: int = 0
    groups_with_spread: int = 0
    total: float = 0.0
    unknown_by_source: Counter[str] = field(default_factory=Counter)
    candidates_by_source: Counter[str] = field(default_factory=Counter)

    def add(self, group: Group) -> None:
        """Count a group."""
        rewards = [candidate.reward for candidate in group.candidates]
        known = [reward for reward in rewards if reward is not None]
        self.groups += 1
        self.candidates += len(rewards)
        self.unknown += len(rewards) - len(known)
        self.groups_with_spread += len(set(known)) > 1
        self.total += sum(known)
        for candidate in group.candidates:
            if candidate.source is not None:
                self.candidates_by_source[candidate.source] += 1
                self.unknown_by_source[candidate.source] += candidate.reward is None

    def result(self) -> dict[str, int | float]:
        """The counts, and the mean of the known rewards, NaN when there is none, as a verb's results name them."""
        known = self.candidates - self.unknown
        return {
            "groups": self.groups,
            "candidates": self.candidates,
            "unknown_rewards": self.unknown,
            "groups_with_spread": self.groups_with_spread,
            "mean_reward": self.total / known if known else math.nan,
        }


def score_groups(groups: Iterable[Group], source: RewardSource, left_out: ReadReport | None = None) -> Iterator[Group]:
    """The groups with their candidates' rewards replaced by the source's.

    ``left_out`` counts the groups that can't be put to the source, and are left out; None raises at the first.
    """
    remaining = iter(groups)
    while chunk := list(islice(remaining, _TOGETHER)):
        for group, rewards in zip(chunk, score_usable(source, chunk), strict=True):
            if isinstance(rewards, DroppedGroupError):
                if left_out is None:
                    raise rewards
                left_out.skip(DataError(str(rewards), reason=rewards.reason))
                continue
            yield replace(group, candidates=[replace(c, reward=r) for c, r in zip(group.candidates, rewards, strict=True)])


def _scored(
    groups: Iterable[Group], source: RewardSource, left_out: ReadReport | None, record: str, counts: ScoreCounts, bar: Bar
) -> Iterator[Group]:
    """Scored groups, which say where their rewards came from and no longer how earlier rewards were made."""
    for group in score_groups(groups, source, left_out):
        counts.add(group)
        yield replace(group, metadata={**group.metadata, REWARD_STEPS: [record]})
        bar.advance()
    # Too many failures raise here, before the file takes its place.
    check_failures(source)


def run_score(config: ScoreConfig) -> dict[str, object]:
    """Score the groups of a file and write them with their rewards.

    Returns:
        ``output``, counts of groups, candidates and unknown rewards, ``groups_with_spread``, ``mean_reward``.

    Raises:
        ValueError: the data can't be read, or the reward source fails on a group; nothing is written.
    """
    judge = config.rewards.judge
    inputs = {"data": config.data, "reward": config.rewards.reward, "judge.template": judge and judge.template}
    claim(config.output, verb="score", inputs=inputs, overwrite=config.overwrite)
    check_output(config.output)
    dtype = reward_dtype(config.rewards, config.dtype)
    source = reward_source(
        config.rewards,
        dtype=dtype,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
        today=config.template_date,
    )
    report, counts = ReadReport(), ScoreCounts()
    left_out = ReadReport() if config.on_bad_row == "skip" else None
    # Read once before: a row that can't be used is told before anything is paid for.
    read = partial(read_groups, config.data, on_bad_row=config.on_bad_row, join_rows=config.join_rows)
    total = sum(1 for _ in read(report=report))
    if not total:
        raise ValueError(f"{config.data} has no group to score: {report.summary()}")
    if notice := report.notice(config.data):
        say(notice)
    with Bar("Scoring groups", total) as bar, closing(read()) as groups:
        record = source_record(config.rewards)
        write_groups(_scored(groups, source, left_out, record, counts, bar), config.output)
    if left_out is not None:
        report.skipped += left_out.skipped
        if left_out.skipped:
            say(f"note: {config.data}: groups left out, since they can't be scored: {left_out.listed()}")
    result: dict[str, object] = {
        "output": str(config.output),
        **counts.result(),
        "rows_skipped": report.skipped,
    }
    if dtype is not None:
        result["dtype"] = dtype
    result |= _of_sources(source)
    if counts.unknown_by_source.total():
        result["unknown_by_source"] = dict(counts.unknown_by_source)
    shares = compare_missing(counts.unknown_by_source, counts.candidates_by_source)
    if shares.differ:
        say(f"warning: {shares.text('rewards')}")
    result["failed_rewards"] = check_failures(source)
    return result


def _of_sources(source: RewardSource) -> dict[str, object]:
    """What verifiers refused and what judging took; missing verdicts are told."""
    result: dict[str, object] = {}
    for part in members(source):
        if isinstance(part, Guarded) and isinstance(part.source, ReasoningGymReward):
            result["refused_by_verifier"] = part.source.num_refused
        if isinstance(part, JudgeReward):
            result |= {
                "verdicts": part.account.asked,
                "verdicts_missing": part.account.missing.total(),
                "order_decided": part.num_changed,
                "prompt_tokens": part.account.prompt_tokens,
                "completion_tokens": part.account.completion_tokens,
                **({"server_fields": part.account.server_fields} if part.account.server_fields else {}),
            }
            if part.account.missing:
                say(f"warning: {part.account.text()}")
    return result

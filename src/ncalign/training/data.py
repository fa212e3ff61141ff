"""Groups from a file → encoded groups that a method can use, with counts of those it can't."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ncalign.core.parallel import map_chunks, num_workers
from ncalign.core.progress import Bar
from ncalign.data.config import SchemaChoice
from ncalign.data.groups import Group, ReadReport, read_groups, recorded_steps, rewards_origin
from ncalign.data.rendering import Rendering, recorded_renderings, rendering_warning
from ncalign.model.chat import as_messages
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder, EncodingReport
from ncalign.objectives import Method
from ncalign.objectives.targets import warn_if_degenerate

_MAX_WAYS = 20


@dataclass
class LoadedGroups:
    """Encoded groups and what happened on the way.

    Attributes:
        groups: what training sees.
        prompts: a digest of each group's prompt.
        num_read: groups in the file.
        unusable: groups left out, by reason.
        examples: the first group of each reason.
        unscored: candidates left out for want of a reward.
        reward_steps: groups used, counted by the steps that made their rewards.
        made: groups used, by how their string prompts were put to the model that wrote their candidates, where they record it.
        notice: what a user should know of the rows joined and the groups left out, if any were.
    """

    groups: list[EncodedGroup] = field(default_factory=list)
    prompts: list[bytes] = field(default_factory=list)
    num_read: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unscored: int = 0
    reward_steps: Counter[tuple[str, ...]] = field(default_factory=Counter)
    made: Counter[Rendering] = field(default_factory=Counter)
    notice: str = ""

    def counts(self) -> dict[str, Any]:
        """For results.json and the dry run."""
        return {
            "groups_read": self.num_read,
            "groups_used": len(self.groups),
            "candidates_used": sum(len(group.completions) for group in self.groups),
            "groups_left_out": dict(self.unusable),
            "candidates_without_reward": self.unscored,
        }


def load_groups(
    path: Path,
    encoder: Encoder,
    *,
    method: Method,
    on_bad_row: str,
    schema: SchemaChoice = "auto",
    join_rows: bool = True,
    shown: bool = True,
) -> LoadedGroups:
    """Read and encode the groups of a file that the method can use.

    ``on_bad_row``: ``error`` raises where a group can't be used, once all have been read; ``skip`` leaves such groups out.

    Raises:
        ValueError: rows that can't be read, groups that can't be used (under ``error``), or none left to train on.
    """
    loaded, report = LoadedGroups(), ReadReport()
    # Read to the end in any case: one message lists all that must be mended.
    groups = read_groups(path, schema=schema, on_bad_row="skip", report=report, join_rows=join_rows)
    with Bar(f"Encoding {path.name}", None, shown=shown) as bar:
        for outcomes, encoding in map_chunks(partial(_encode, encoder, method), groups, workers=num_workers()):
            encoder.report.add(encoding)
            for outcome in outcomes:
                loaded.num_read += 1
                loaded.unscored += outcome.unscored
                if outcome.encoded is not None:
                    loaded.groups.append(outcome.encoded)
                    loaded.prompts.append(outcome.prompt)
                    loaded.made.update(outcome.made)
                    count_steps(loaded.reward_steps, outcome.steps or (rewards_origin(path, report.schema),))
                else:
                    loaded.unusable[outcome.reason] += 1
                    loaded.examples.setdefault(outcome.reason, f"{outcome.origin or path}, group {outcome.id!r}")
            bar.advance(len(outcomes))
    loaded.num_read += report.skipped
    if report.skipped:
        loaded.unusable["unreadable row"] += report.skipped
        loaded.examples["unreadable row"] = report.examples[0]
    if loaded.unusable and on_bad_row == "error":
        raise ValueError(_complaint(path, loaded, method.name) + "\nMend them, or set on_bad_row: skip to leave them out")
    if not loaded.groups:
        raise ValueError(_complaint(path, loaded, method.name) + "\nNo group is left to train on")
    complaint = [_complaint(path, loaded, method.name)] if loaded.unusable else []
    loaded.notice = "\n".join([*complaint, *(f"{path}: {note}" for note in report.counted_notes())])
    return loaded


class _Outcome(NamedTuple):
    """A group's encoding, or the reason why it has none."""

    id: str
    origin: str | None
    encoded: EncodedGroup | None
    prompt: bytes
    reason: str = ""
    unscored: int = 0
    steps: tuple[str, ...] = ()
    made: frozenset[Rendering] = frozenset()


def count_steps(counts: Counter[tuple[str, ...]], steps: tuple[str, ...]) -> None:
    """Count a group by the steps that made its rewards; above ``_MAX_WAYS`` different lists, the rest are counted together."""
    counts[steps if steps in counts or len(counts) < _MAX_WAYS else ("in other ways",)] += 1


def listed_steps(counts: Counter[tuple[str, ...]]) -> list[dict[str, Any]]:
    """For results.json: the lists of steps that made rewards, with their numbers of groups, the most frequent first."""
    return [{"steps": list(steps), "groups": count} for steps, count in counts.most_common()]


def steps_of(group: Group) -> tuple[str, ...]:
    """The steps that made a group's rewards, or a note that the metadata's entry means something else."""
    try:
        return recorded_steps(group)
    except ValueError:
        return ("metadata.reward_steps is not a list of strings",)


def _encode(encoder: Encoder, method: Method, groups: Sequence[Group]) -> tuple[list[_Outcome], EncodingReport]:
    """Encode some groups, with a report of their own."""
    encoder = copy(encoder)
    encoder.report = EncodingReport()
    outcomes = []
    for group in groups:
        scored, reason = scored_candidates(group, method)
        encoded, unscored = None, 0
        if reason is None:
            unscored = len(group.candidates) - len(scored.candidates)
            try:
                encoded = encoder.encode(scored)
            except DroppedGroupError as dropped:
                reason = dropped.reason
        made = frozenset(recorded_renderings(group.prompt, group.metadata))
        outcomes.append(
            _Outcome(group.id, group.origin, encoded, prompt_digest(group), reason or "", unscored, steps_of(group), made)
        )
    return outcomes, encoder.report


def made_otherwise(loaded: LoadedGroups, encoder: Encoder, path: Path) -> str | None:
    """A warning where groups' candidates were made with other ``string_prompts`` than they are encoded with."""
    return rendering_warning(loaded.made, encoder.string_prompts, what=str(path), does="training encodes them")


def scored_candidates(group: Group, method: Method) -> tuple[Group, str | None]:
    """The group's scored candidates with the rewards that the method reads, and the reason if it can't use the group."""
    candidates = [candidate for candidate in group.candidates if candidate.reward is not None]
    rewards = [candidate.reward for candidate in candidates if candidate.reward is not None]
    if not candidates:
        return group, "no candidates" if not group.candidates else "no rewards at all"
    if method.hooks.rewards_from is not None:
        try:
            rewards = method.hooks.rewards_from(rewards, group.metadata)
        except ValueError as error:
            return group, str(error)
        candidates = [replace(candidate, reward=value) for candidate, value in zip(candidates, rewards, strict=True)]
    reason = method.refuse(rewards)
    if reason is not None:
        return group, reason + (" with a reward" if len(candidates) == 1 < len(group.candidates) else "")
    same = len(candidates) == len(group.candidates) and method.hooks.rewards_from is None
    return (group if same else replace(group, candidates=candidates)), None


def fit_method(method: Method, groups: Sequence[EncodedGroup]) -> tuple[Method, str]:
    """The method fitted to the training set's rewards, and a notice about its target weights or labels (or "")."""
    size = max(len(group.rewards) for group in groups)
    rewards = torch.full((len(groups), size), float("nan"), dtype=torch.float64)
    for row, group in zip(rewards, groups, strict=True):
        row[: len(group.rewards)] = torch.tensor(group.rewards, dtype=torch.float64)
    mask = ~rewards.isnan()
    if method.hooks.fit is not None:
        method = replace(method.hooks.fit(rewards, mask), estimator=method.estimator)
    notices = [] if method.hooks.notice is None else [method.hooks.notice(rewards, mask)]
    if method.hooks.target_weights is not None:
        notices.append(warn_if_degenerate(method.hooks.target_weights(rewards, mask), mask))
    return method, "; ".join(filter(None, notices))


def mismatched_groups(groups: Sequence[EncodedGroup], *, max_length: int) -> list[EncodedGroup]:
    """For each group its prompt with the first completion of the next group that has another prompt.

    A completion that has nothing to do with its prompt tells how far the policy moved everywhere, which is what KTO measures
    from. One too long for the prompt is cut at its end.
    """
    mismatched = []
    for position, group in enumerate(groups):
        others = (groups[(position + offset) % len(groups)] for offset in range(1, len(groups)))
        other = next((other for other in others if not np.array_equal(other.prompt, group.prompt)), group)
        room = max(max_length - len(group.prompt), 1)
        mask = None if other.masks[0] is None else other.masks[0][:room]
        # All of it where its first scored turn is cut off: what is measured is how far the policy moved.
        scored = () if mask is None or not mask.any() else (mask,)
        completions = (other.completions[0][:room],)
        mismatched.append(replace(group, completions=completions, rewards=(0.0,), reference_logprobs=(None,), scored=scored))
    return mismatched


def prompt_digest(group: Group) -> bytes:
    """Sixteen bytes that are the same for equal prompts, be they strings or a user's turn."""
    return hashlib.blake2b(json.dumps(as_messages(group.prompt)).encode(), digest_size=16).digest()


def held_out_places(prompts: Sequence[bytes], *, fraction: float, seed: int) -> set[int]:
    """Places of the groups to hold out: ``round(fraction * groups)`` of them, and at least one of a fraction above 0.

    Groups with one prompt stay together, so that no evaluation asks what was trained on. Prompts are taken in an order that
    their digests and the seed give, and those whose groups would be too many are passed over: the number is missed, by no more
    than the groups of one prompt, only where no prompt is left that fits.

    Args:
        prompts: a digest of each group's prompt.
        fraction: of the groups, in [0, 1).
        seed: of the order.

    Returns:
        Places in ``prompts``: the same in every process and however often it is asked. None where all prompts are equal.

    >>> prompts = [b"a", b"a", b"b", b"c", b"d"]
    >>> len(held_out_places(prompts, fraction=0.4, seed=0)), held_out_places(prompts, fraction=0.0, seed=0)
    (2, set())
    """
    groups: dict[bytes, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    if not fraction or len(groups) < 2:
        return set()
    salt = seed.to_bytes(8, "big")
    ordered = sorted(groups, key=lambda prompt: hashlib.blake2b(prompt, digest_size=16, salt=salt).digest())
    # One prompt at least is left to train on.
    wanted, most = max(1, round(fraction * len(prompts))), len(groups) - 1
    chosen: list[bytes] = []
    count = 0
    for prompt in ordered:
        if len(chosen) < most and count + len(groups[prompt]) <= wanted:
            chosen.append(prompt)
            count += len(groups[prompt])
    smallest = min(ordered, key=lambda prompt: len(groups[prompt]))
    return {place for prompt in chosen or [smallest] for place in groups[prompt]}


def _complaint(path: Path, loaded: LoadedGroups, method: str) -> str:
    lines = [f"{path}: {sum(loaded.unusable.values())} of {loaded.num_read} groups can't be used by {method}:"]
    for reason, count in loaded.unusable.most_common():
        example = loaded.examples.get(reason)
        lines.append(f"  {count} x {reason}{f' (first: {example})' if example else ''}")
    return "\n".join(lines) if loaded.num_read else f"{path}: no groups found: the file is empty"

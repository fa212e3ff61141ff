"""Variants of the training groups: fewer candidates, and candidates or rewards made worse on purpose.

They are made of groups that are encoded already, as a function of the seed and the group's id, so that runs which share a seed
share them. Held-out groups never pass through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ncalign.core.seeds import seed_of
from ncalign.model.encoded import EncodedGroup, Ids
from ncalign.objectives.method import Refuse
from ncalign.training.config import Corrupt, CorruptKind

_TOKENS_A_SWAP = 8
"""One pair of tokens changes places for each so many of a completion."""
_TRIES = 20


@dataclass
class Varied:
    """Groups as a run trains on them, and what was done to them.

    Attributes:
        groups: in the order of those given.
        columns: of each group, which of its candidates were kept, in their order; empty where nothing was asked for.
        left_out: candidates that ``max_candidates`` left out.
        changed: candidates, or of ``flip_rewards`` groups, that were corrupted.
        unchanged: those that were drawn to be corrupted, and could not be: a completion of one token can't be cut.
    """

    groups: list[EncodedGroup]
    columns: list[tuple[int, ...]] = field(default_factory=list)
    left_out: int = 0
    changed: int = 0
    unchanged: int = 0

    def counts(self, max_candidates: int | None, corrupt: Corrupt | None) -> dict[str, Any]:
        """For results.json; empty where nothing was asked for."""
        found: dict[str, Any] = {}
        if max_candidates is not None:
            found |= {"max_candidates": max_candidates, "candidates_left_out": self.left_out}
        if corrupt is not None:
            what = "groups" if corrupt.kind == "flip_rewards" else "candidates"
            found |= {"corrupt": corrupt.kind, "share": corrupt.share, f"{what}_corrupted": self.changed}
            found |= {f"{what}_not_corruptible": self.unchanged}
        return found


def vary_groups(
    groups: Sequence[EncodedGroup],
    *,
    max_candidates: int | None,
    corrupt: Corrupt | None,
    seed: int,
    max_length: int,
    refuse: Refuse,
) -> Varied:
    """Leave out candidates of the training groups, and corrupt what is left.

    Args:
        groups: with a reward for each candidate.
        max_candidates: of a group, as :func:`kept_candidates` chooses them; None for all.
        corrupt: what to spoil, and how often; None for nothing.
        seed: of the run.
        max_length: tokens of a prompt and a completion, above which a completion of another prompt is cut.
        refuse: a group's rewards -> why the method can't use it, or None.

    Raises:
        ValueError: a setting changes nothing, or leaves groups that the method can't use.
    """
    found = Varied([])
    if max_candidates is None and corrupt is None:
        return Varied(list(groups))
    for group in groups:
        columns = kept_candidates(_rewards(group), max_candidates, seed=seed, group=group.id)
        found.left_out += len(group.completions) - len(columns)
        found.columns.append(columns)
        found.groups.append(_selected(group, columns))
    if max_candidates is not None and found.left_out == 0:
        most = max(len(group.completions) for group in groups)
        raise ValueError(
            f"max_candidates: {max_candidates} leaves out nothing: no training group has more than {most} candidates; give "
            "less than that, or leave it out"
        )
    if corrupt is not None:
        _corrupt(found, corrupt, seed=seed, max_length=max_length)
    refused = [(group.id, reason) for group in found.groups if (reason := refuse(_rewards(group))) is not None]
    if refused:
        raise ValueError(
            f"max_candidates and corrupt leave {len(refused)} of {len(groups)} training groups that the method can't use "
            f"(first: group {refused[0][0]!r}: {refused[0][1]}): keep more candidates, or leave the setting out"
        )
    return found


def kept_candidates(rewards: Sequence[float], most: int | None, *, seed: int, group: str) -> tuple[int, ...]:
    """The candidates of a group that stay when it has too many: the best one, and others drawn at random.

    The best is the first of those with the highest reward. One that is worse than it always stays, where there is one, so that
    a preference is left; which others stay is drawn from the seed and the group's id, one after the other: a group's three are
    its two and one more.

    Args:
        rewards: one a candidate.
        most: how many stay at most, at least 2; None for all.
        seed: of the draw.
        group: its id.

    Returns:
        Their places, in order.

    >>> three = kept_candidates([0.0, 1.0, 0.0, 1.0, 0.5], 3, seed=0, group="g")
    >>> set(kept_candidates([0.0, 1.0, 0.0, 1.0, 0.5], 2, seed=0, group="g")) < set(three)
    True
    """
    if most is None or len(rewards) <= most:
        return tuple(range(len(rewards)))
    best = int(np.argmax(rewards))
    order = [int(k) for k in _generator(seed, "max_candidates", group).permutation(len(rewards)) if k != best]
    worse = next((k for k in order if rewards[k] < rewards[best]), order[0])
    return tuple(sorted([best, worse, *(k for k in order if k != worse)][:most]))


def swapped(completion: Ids, rng: np.random.Generator) -> Ids | None:
    """The completion with pairs of unequal tokens exchanged, one pair for each eight tokens; its last one, the EOS, stays.

    None where no two of the others differ.
    """
    size = len(completion) - 1
    if size < 2 or len(np.unique(completion[:size])) < 2:
        return None
    made, places = completion.copy(), rng.permutation(size)
    for _ in range(max(1, size // _TOKENS_A_SWAP)):
        first = places[0]
        others = [place for place in places if made[place] != made[first]]
        if not others:
            break
        made[first], made[others[0]] = made[others[0]], made[first]
        # A token moves once: no swap undoes another.
        places = places[(places != first) & (places != others[0])]
    return made


def truncated(completion: Ids) -> Ids | None:
    """The first half of the completion, rounded up, and its last token, the EOS; None where nothing would be cut."""
    size = len(completion) - 1
    return None if size < 2 else np.concatenate([completion[: (size + 1) // 2], completion[-1:]])


def flipped(rewards: Sequence[float]) -> tuple[float, ...]:
    """The rewards turned round within their range: the best becomes the worst.

    >>> flipped([0.0, 3.0, 1.0])
    (3.0, 0.0, 2.0)
    """
    return tuple(max(rewards) + min(rewards) - reward for reward in rewards)


def _corrupt(found: Varied, corrupt: Corrupt, *, seed: int, max_length: int) -> None:
    """Corrupt the groups in place.

    Raises:
        ValueError: nothing was changed.
    """
    originals = list(found.groups)
    for place, group in enumerate(originals):
        rng = _generator(seed, "corrupt", corrupt.kind, group.id)
        if corrupt.kind == "flip_rewards":
            rewards = flipped(_rewards(group))
            if rng.random() < corrupt.share:
                done = rewards != tuple(_rewards(group))
                found.groups[place] = replace(group, rewards=rewards)
                found.changed, found.unchanged = found.changed + done, found.unchanged + (not done)
            continue
        best = int(np.argmax(_rewards(group)))
        # Drawn for all of them first: which are corrupted does not depend on how.
        drawn = rng.random(len(group.completions)) < corrupt.share
        completions, references = list(group.completions), list(group.reference_logprobs)
        for k in (k for k in np.flatnonzero(drawn) if k != best):
            made = _worse(corrupt.kind, originals, place, k=int(k), best=best, rng=rng, max_length=max_length)
            if made is None:
                found.unchanged += 1
            else:
                found.changed += 1
                completions[k], references[k] = made, None
        found.groups[place] = replace(group, completions=tuple(completions), reference_logprobs=tuple(references))
    if found.changed == 0:
        raise ValueError(
            f"corrupt: {corrupt.kind} with share: {corrupt.share:g} changes nothing in {len(originals)} training groups: raise "
            "share, or leave corrupt out"
        )


def _worse(
    kind: CorruptKind,
    groups: Sequence[EncodedGroup],
    place: int,
    *,
    k: int,
    best: int,
    rng: np.random.Generator,
    max_length: int,
) -> Ids | None:
    """What takes the place of a group's candidate ``k``; None where it can't be corrupted.

    A completion of which only some tokens are scored, one of several turns, is neither corrupted nor made of others.
    """
    group = groups[place]
    if group.masks[k] is not None or (kind == "swap_tokens" and group.masks[best] is not None):
        return None
    if kind == "swap_tokens":
        return swapped(group.completions[best], rng)
    if kind == "truncate":
        return truncated(group.completions[k])
    return _of_another_prompt(groups, place, rng, room=max(max_length - len(group.prompt), 1))


def _of_another_prompt(groups: Sequence[EncodedGroup], place: int, rng: np.random.Generator, *, room: int) -> Ids | None:
    """A completion of a group that is drawn among those with another prompt, cut at ``room`` tokens."""
    for _ in range(_TRIES):
        other = groups[int(rng.integers(len(groups)))]
        if not np.array_equal(other.prompt, groups[place].prompt):
            chosen = int(rng.integers(len(other.completions)))
            return other.completions[chosen][:room] if other.masks[chosen] is None else None
    return None


def _selected(group: EncodedGroup, columns: Sequence[int]) -> EncodedGroup:
    if len(columns) == len(group.completions):
        return group
    return replace(
        group,
        completions=tuple(group.completions[k] for k in columns),
        rewards=tuple(group.rewards[k] for k in columns),
        reference_logprobs=tuple(group.reference_logprobs[k] for k in columns),
        scored=tuple(group.masks[k] for k in columns),
    )


def _rewards(group: EncodedGroup) -> list[float]:
    rewards = [reward for reward in group.rewards if reward is not None]
    assert len(rewards) == len(group.rewards)
    return rewards


def _generator(seed: int, *parts: object) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, *parts))

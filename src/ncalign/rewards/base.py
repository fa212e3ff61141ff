"""What a reward source is: a group in, one reward per candidate out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from ncalign.data.groups import Group
from ncalign.data.rendering import completion_text, last_answer
from ncalign.model.encoding import DroppedGroupError


class RewardSource(Protocol):
    """Anything that scores the candidates of a group."""

    def score(self, group: Group) -> list[float | None]:
        """Score a group.

        Returns:
            One finite reward for each candidate, in order; None where the reward is unknown.

        Raises:
            ValueError: the group can't be scored; the message names it.
        """
        ...


@runtime_checkable
class BatchRewardSource(RewardSource, Protocol):
    """A reward source that is faster on several groups at once (a model's batches, a server)."""

    def score_many(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Score several groups: for each, in order, what ``score`` gives."""
        ...


def score_many(source: RewardSource, groups: Sequence[Group]) -> list[list[float | None]]:
    """Score several groups, all at once where the source can."""
    if isinstance(source, BatchRewardSource):
        return source.score_many(groups)
    return [source.score(group) for group in groups]


def score_usable(source: RewardSource, groups: Sequence[Group]) -> list[list[float | None] | DroppedGroupError]:
    """Score several groups; in the place of one that can't be put to the source is the reason why."""

    def alone(group: Group) -> list[float | None] | DroppedGroupError:
        try:
            return score_many(source, [group])[0]
        except DroppedGroupError as dropped:
            return dropped

    try:
        return [*score_many(source, groups)]
    except DroppedGroupError:
        return [alone(group) for group in groups]


def completion_texts(group: Group) -> list[str]:
    """The candidates' completions as plain texts; one of several turns is a transcript, and calls have a line each."""
    return [completion_text(candidate.completion) for candidate in group.candidates]


def last_answers(group: Group) -> list[str]:
    """The texts of the candidates' last turns: what is checked where a completion has several."""
    return [last_answer(candidate) for candidate in group.candidates]


def where(group: Group) -> str:
    """The group's name, and the place it was read from where that is known."""
    return f"{group.origin}: group {group.id!r}" if group.origin else f"group {group.id!r}"


def combined(rows: Iterable[Sequence[float | None]], how: str, weights: Sequence[float] = ()) -> list[float | None]:
    """The rewards of several sources as one: mean, min, max, or weighted mean; missing where one of them is.

    >>> combined([[1.0, 2.0], [3.0, None]], "weights", [3, 1])
    [1.5, None]
    """
    found: list[float | None] = []
    for values in zip(*rows, strict=True):
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            found.append(None)
        elif how in ("min", "max"):
            found.append(min(known) if how == "min" else max(known))
        else:
            shares = weights if how == "weights" else [1.0] * len(known)
            found.append(sum(share * value for share, value in zip(shares, known, strict=True)) / sum(shares))
    return found

"""What a reward source is: a group in, one reward per candidate out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ncalign.data.groups import Group
from ncalign.model.encoding import completion_text


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


def completion_texts(group: Group) -> list[str]:
    """The candidates' completions as plain texts."""
    return [completion_text(candidate, group) for candidate in group.candidates]


def where(group: Group) -> str:
    """The group's name, and the place it was read from where that is known."""
    return f"{group.origin}: group {group.id!r}" if group.origin else f"group {group.id!r}"

"""Rewards from a Python function of the user's."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Sequence

from ncalign.core.user_code import load_named
from ncalign.data.formats.group import MAX_NUMBER
from ncalign.data.groups import Group
from ncalign.rewards.base import completion_texts, where


class FunctionReward:
    """Calls ``function(prompt, completions)``, or ``function(prompt, completions, metadata=...)`` where it takes that.

    The prompt comes as it is in the group (a string or a list of messages), the completions as texts. The function returns
    one number per completion, or None where it has none to give. Messages call it by ``name``.

    Equal completions of a group get one reward: where the function, which sees them all, gives them different ones, their mean.

    >>> from ncalign.data.groups import Candidate
    >>> source = FunctionReward(lambda prompt, completions: [len(text) for text in completions], "length")
    >>> source.score(Group(id="1", prompt="Say a word.", candidates=[Candidate("Yes"), Candidate("Certainly")]))
    [3.0, 9.0]
    """

    def __init__(self, function: Callable[..., object], name: str) -> None:
        self._function, self._name = function, name
        self._takes_metadata = "metadata" in inspect.signature(function).parameters

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.base.RewardSource`."""
        texts = completion_texts(group)
        metadata = {"metadata": group.metadata} if self._takes_metadata else {}
        try:
            rewards = self._function(group.prompt, texts, **metadata)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ValueError(f"reward {self._name} raised {type(error).__name__} on {where(group)}: {error}") from error
        return _shared(texts, self._checked(rewards, group))

    def _checked(self, rewards: object, group: Group) -> list[float | None]:
        prefix = f"reward {self._name} on {where(group)}"
        try:
            values = None if isinstance(rewards, str | bytes | dict) else list(rewards)  # type: ignore[call-overload]
        except TypeError:
            values = None
        if values is None:
            raise ValueError(f"{prefix} returned a {type(rewards).__name__}; a list with one number per completion is needed")
        if len(values) != len(group.candidates):
            raise ValueError(
                f"{prefix} returned {len(values)} rewards for {len(group.candidates)} completions; one each is needed"
            )
        return [_number(value, f"{prefix} returned, for completion {index + 1},") for index, value in enumerate(values)]


def load_function(name: str) -> Callable[..., object]:
    """The function named by ``package.module:function`` or ``path/file.py:function``.

    Raises:
        ValueError: the name has another form, or the module or the function in it can't be loaded.
    """
    return load_named(name, what="reward", others="'reasoning_gym'")


def _shared(texts: Sequence[str], rewards: Sequence[float | None]) -> list[float | None]:
    """The rewards, one for equal texts: a function that is random, or reads what differs between copies, gives them several."""
    of_text: dict[str, list[float]] = {text: [] for text in texts}
    for text, reward in zip(texts, rewards, strict=True):
        of_text[text] += [] if reward is None else [reward]
    one = {text: None if not own else own[0] if len(set(own)) == 1 else sum(own) / len(own) for text, own in of_text.items()}
    return [one[text] for text in texts]


def _number(value: object, prefix: str) -> float | None:
    if value is None:
        return None
    # bool is a number to Python; a pass/fail reward is written as 1.0 and 0.0 so that no mistake hides behind it.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{prefix} {value!r} (a {type(value).__name__}); a number, or None where there is none, is needed")
    if not math.isfinite(value):
        raise ValueError(f"{prefix} {float(value)}; a finite number, or None where there is none, is needed")
    if abs(float(value)) > MAX_NUMBER:
        raise ValueError(f"{prefix} {float(value):g}; a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g} is needed")
    return float(value)

"""Rewards from math-verify: is the completion's final answer the group's?"""

from __future__ import annotations

import importlib.util

from ncalign.data.groups import Group
from ncalign.rewards.base import completion_texts, where


class MathVerifyReward:
    r"""1 where a completion's final answer equals the group's as mathematics, 0 where it does not.

    The group's metadata hold the answer: ``{"answer": "1/2"}``, as a number, an expression or LaTeX. The completion's is found
    by math-verify: what is boxed, or the last number or formula.

    Raises:
        ValueError: the package math-verify is missing.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward 'math_verify' needs the package math-verify: pip install 'ncalign[math]'")

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.RewardSource`."""
        from math_verify import parse, verify

        answer = group.metadata.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"{where(group)} has no answer to compare with: its metadata need 'answer', a string or a number")
        text = str(answer)
        # The package's own limits are alarms, which work in a process's first thread alone; ours hold in every thread.
        gold = parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
        if not gold:
            raise ValueError(f"{where(group)} has the answer {text[:60]!r}, which math-verify can't read")
        return [
            float(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))
            for completion in completion_texts(group)
        ]

"""Rewards from programs that check an answer: reasoning-gym's verifiers and math-verify."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, TypeAlias

from ncalign.core.install import install_hint
from ncalign.data.formats.group import MAX_NUMBER
from ncalign.data.groups import Group
from ncalign.rewards.base import last_answers, where
from ncalign.rewards.stated import is_equation, stated_number

ScoreAnswer: TypeAlias = Callable[[str, dict[str, Any]], float]

_EXTRACTIONS = ("whole", "stated")
_FORMS = (None, "equation")
_OTHER_FORM = 0.5


class ReasoningGymReward:
    """Scores completions with the verifier of the reasoning-gym task that the prompt comes from.

    A group's metadata name the task and hold the entry that the task made: ``{"task": "gcd", "entry": {"question": ...,
    "answer": ..., "metadata": {...}}}``. The verifier sees the whole completion without surrounding blanks. With
    ``"extract": "stated"`` it sees the number that the completion states as its answer
    (:func:`ncalign.rewards.stated.stated_number`), and only full marks count: most verifiers pay part of the reward to an
    answer that contains the right one, and in a number the digits it shares with another mean nothing. With ``"form":
    "equation"`` besides, 1 is for the right number in one equation and nothing else, and .5 for the right number in other
    words. A completion that was cut (``finished: false``) states nothing.

    A verifier that raises on a completion has not accepted it: the reward is 0, and ``num_refused`` counts it.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(f"reward 'reasoning_gym' needs the package reasoning-gym: {install_hint('demo')}")
        self.num_refused = 0
        self._verifiers: dict[str, ScoreAnswer] = {}

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.base.RewardSource`."""
        task, entry = group.metadata.get("task"), group.metadata.get("entry")
        if not isinstance(task, str) or not isinstance(entry, dict):
            raise ValueError(
                f"{where(group)} has no reasoning-gym entry: its metadata need 'task' (a name) and 'entry' (an object), "
                f"found keys: {', '.join(group.metadata) or 'none'}"
            )
        extract = group.metadata.get("extract", "whole")
        if extract not in _EXTRACTIONS:
            raise ValueError(f"{where(group)} has metadata extract={extract!r}; it must be one of {', '.join(_EXTRACTIONS)}")
        form = group.metadata.get("form")
        if form not in _FORMS or (form is not None and extract != "stated"):
            raise ValueError(f"{where(group)} has metadata form={form!r}; it must be 'equation', beside extract='stated'")
        verifier = self._verifier(task, group)
        texts = last_answers(group)
        if extract == "whole":
            return [self._reward(verifier, text.strip(), entry) for text in texts]
        question, rewards = str(entry["question"]), list[float | None]()
        for candidate, text in zip(group.candidates, texts, strict=True):
            stated = stated_number(text, question) if candidate.finished else None
            right = stated is not None and self._reward(verifier, stated, entry) >= 1.0
            rewards.append(float(right) if form is None or is_equation(text, question) else _OTHER_FORM * right)
        return rewards

    def _verifier(self, task: str, group: Group) -> ScoreAnswer:
        if task not in self._verifiers:
            # Imported at the first use: it takes a second, and scoring with your own function does without it.
            gym = importlib.import_module("reasoning_gym")
            try:
                self._verifiers[task] = gym.get_score_answer_fn(task)
            except ValueError as error:
                raise ValueError(f"{where(group)} names the task {task!r}, which reasoning-gym does not have") from error
        return self._verifiers[task]

    def _reward(self, verifier: ScoreAnswer, answer: str, entry: dict[str, Any]) -> float:
        try:
            reward = float(verifier(answer, entry))
        except Exception:  # verifiers raise what they like on junk, and a junk answer is not a solution
            reward = math.nan
        if not abs(reward) <= MAX_NUMBER:  # nor is NaN
            self.num_refused += 1
            return 0.0
        return reward


class MathVerifyReward:
    r"""1 where a completion's final answer equals the group's as mathematics, 0 where it does not.

    The group's metadata hold the answer: ``{"answer": "1/2"}``, as a number, an expression or LaTeX. The completion's is found
    by math-verify: what is boxed, or the last number or formula.

    Raises:
        ValueError: the package math-verify is missing.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(f"reward 'math_verify' needs the package math-verify: {install_hint('math')}")

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.base.RewardSource`."""
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
            for completion in last_answers(group)
        ]

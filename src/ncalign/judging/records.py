"""Questions, models' answers, and the labels of a judge's verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ncalign.data.formats.group import TEMPLATE_KWARGS, TOOLS, TemplateKwargs, Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering

LABELS: Mapping[str, float] = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
"""Arena-Hard's verdicts, with the preference for A that each stands for."""
STRONG_WEIGHT = 3
"""How many times a verdict of ``>>`` counts in Arena-Hard's score."""


def verdict_weight(label: str) -> int:
    """How many times a verdict counts."""
    return STRONG_WEIGHT if ">>" in label else 1


def fastchat_id(question: str) -> int | str:
    """A question's id as FastChat writes it: its ids are numbers."""
    return int(question) if question.isdigit() else question


@dataclass(frozen=True)
class Question:
    """One question of a set.

    Attributes:
        id: names it within its set.
        turns: what the user says; MT-Bench has two turns, the other sets one.
        category: MT-Bench's category, AlpacaEval's dataset, Arena-Hard's category; empty where there is none.
        references: a right answer to each turn, where the set has them.
        metadata: whatever else is known, such as a checkable instruction's names and arguments.
        conversational: whether the turns were given as messages, and not as text that ``string_prompts`` decides about.
    """

    id: str
    turns: tuple[str, ...]
    category: str = ""
    references: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    conversational: bool = False

    @property
    def tools(self) -> Tools:
        """What a model that answers may call."""
        return self.metadata.get(TOOLS) or None

    @property
    def template_kwargs(self) -> TemplateKwargs:
        """Further values for the chat template of a model that answers."""
        return self.metadata.get(TEMPLATE_KWARGS) or {}

    @property
    def is_text(self) -> bool:
        """Whether ``string_prompts`` decides how it is put to a model: one turn, given as text."""
        return len(self.turns) == 1 and not self.conversational

    def asked(self, answers: Sequence[str], rendering: Rendering) -> str | list[Message]:
        """What a model is given to answer the turn that follows these answers: text, or messages.

        >>> Question("q", ("2 + 2 = ",)).asked([], "raw")
        '2 + 2 = '
        """
        return self.turns[0] if self.is_text and rendering == "raw" else self.conversation(answers)

    def conversation(self, answers: Sequence[str]) -> list[Message]:
        """The messages up to the turn that follows these answers.

        >>> [message["content"] for message in Question("q", ("2 + 2?", "And 3 + 3?")).conversation(["4"])]
        ['2 + 2?', '4', 'And 3 + 3?']
        """
        messages: list[Message] = []
        for asked, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question, a text for each of its turns.

    Attributes:
        question: the question's id.
        model: who answered.
        turns: the answers.
        num_tokens: tokens of each; empty where they were not counted.
        string_prompts: how a question that is plain text was put to the model; None for a conversation, or where that is not
            known.
    """

    question: str
    model: str
    turns: tuple[str, ...]
    num_tokens: tuple[int, ...] = ()
    string_prompts: Rendering | None = None


Answers: TypeAlias = Mapping[str, Answer]
"""A model's answers by question."""

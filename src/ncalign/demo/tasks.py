"""The demo's prompts: short arithmetic tasks of reasoning-gym, whose verifiers score an answer by rule.

Training, validation and held-out prompts come from different random streams, and a question's text alone decides which of
the three it may be in, so that no seed or number of prompts can bring one into two of them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from ncalign.core.install import install_hint
from ncalign.data.groups import Group

Split: TypeAlias = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")

INSTRUCTION = "Reply with one equation only."
# What some of the tasks' questions ask for themselves, in the way of the instruction.
_OTHER_INSTRUCTION = "Give only the result as your final answer."


@dataclass(frozen=True, eq=False)
class Task:
    """A reasoning-gym task with the settings that suit a model of 135M parameters.

    Attributes:
        name: the task's name in reasoning-gym.
        settings: its settings; numbers of one or two digits.
    """

    name: str
    settings: dict[str, Any]


TASKS: tuple[Task, ...] = (
    Task("products", {"min_digits": 1, "max_digits": 1}),
    Task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    # Two terms: without parentheses, the answers of longer ones are those of an expression that had them.
    Task(
        "basic_arithmetic",
        {
            "min_terms": 2,
            "max_terms": 2,
            "min_digits": 1,
            "max_digits": 2,
            "operators": ("+", "-", "*"),
            "allow_parentheses": False,
            "allow_negation": False,
        },
    ),
)

# Shares of the questions: of eight hash buckets, these belong to each split.
_BUCKETS: dict[Split, range] = {"train": range(4), "validation": range(4, 6), "heldout": range(6, 8)}
_MOST_TRIES = 2000  # entries looked at for each question that is needed, before the task counts as exhausted


def make_prompts(num: int, seed: int, split: Split) -> list[Group]:
    """Prompts without candidates: the tasks in turn, as long as each has questions that have not been asked.

    Args:
        num: how many.
        seed: the same seed and split give the same prompts, and a greater ``num`` only adds to them.
        split: which questions they are taken from; the splits share none, whatever their seeds.

    Returns:
        Groups with a conversational prompt, and metadata that the ``reasoning_gym`` reward reads.

    Raises:
        ValueError: reasoning-gym is not installed, or all tasks together have fewer different questions.
    """
    streams = {task: _questions(task, seed, split) for task in TASKS}
    groups: list[Group] = []
    while len(groups) < num and streams:
        for task in list(streams):
            entry = next(streams[task], None)
            if entry is None:
                del streams[task]
            elif len(groups) < num:
                groups.append(_group(task, entry, f"{split}-{len(groups):04d}-{task.name}"))
    if len(groups) < num:
        raise ValueError(f"{num} {split} prompts are too many: the tasks have {len(groups)} different questions")
    return groups


def _group(task: Task, entry: dict[str, Any], name: str) -> Group:
    question = entry["question"].replace(_OTHER_INSTRUCTION, "").strip()
    return Group(
        id=name,
        prompt=[{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        candidates=[],
        metadata={"task": task.name, "extract": "stated", "form": "equation", "entry": entry},
    )


def split_of(question: str) -> Split:
    """The split that a question belongs to: decided by its numbers, in any order.

    So ``4 * 7``, ``7 * 4`` and ``7 - 4`` are all in one split, whichever task asks for them.
    """
    digest = hashlib.sha256(" ".join(sorted(re.findall(r"\d+", question))).encode()).digest()
    bucket = digest[0] % 8
    return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def _questions(task: Task, seed: int, split: Split) -> Iterator[dict[str, Any]]:
    """Different entries of a task that belong to a split, as JSON values."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(f"the demo's tasks need the package reasoning-gym: {install_hint('demo')}")
    # Imported at the first use: it takes a second, and the shipped candidates are read without it.
    gym = importlib.import_module("reasoning_gym")
    words = [seed, SPLITS.index(split), TASKS.index(task)]
    start = int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0] // 2)
    dataset = gym.create_dataset(task.name, seed=start, size=2**31 - 1, **task.settings)
    seen: set[str] = set()
    tries = 0
    for index in itertools.count():
        entry = dataset[index]
        question = entry["question"]
        if question not in seen and split_of(question) == split:
            seen.add(question)
            tries = 0
            yield json.loads(json.dumps(entry))
        tries += 1
        if tries > _MOST_TRIES:
            return

"""Short tasks of reasoning-gym for the tiny model, in mixes: what it is pre-trained on, trained on and asked at the end.

A question's text decides whether it may be in the pre-training, among the prompts to train on or among those held out, so that
no seed or number of prompts brings one into two of them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from ncalign.core.install import install_hint
from ncalign.data.groups import Group

Mix: TypeAlias = Literal["words", "numbers"]
Part: TypeAlias = Literal["pretraining", "train", "heldout"]
PARTS: tuple[Part, ...] = ("pretraining", "train", "heldout")
# Of eight hash buckets of questions.
_BUCKETS: dict[Part, range] = {"pretraining": range(4), "train": range(4, 6), "heldout": range(6, 8)}
_MOST_TRIES = 2000  # entries looked at for each question that is needed, before the task counts as exhausted


@dataclass(frozen=True, eq=False)
class TinyTask:
    """A reasoning-gym task in words that are few enough for a model which reads letters.

    Attributes:
        name: the task's name in reasoning-gym.
        settings: its settings.
        prompt: the question of an entry, in short.
        extract: what of a completion the verifier sees (:class:`ncalign.rewards.verifiable.ReasoningGymReward`).
    """

    name: str
    settings: dict[str, Any]
    prompt: Callable[[dict[str, Any]], str]
    extract: Literal["whole", "stated"]


def _after_colon(words: str) -> Callable[[dict[str, Any]], str]:
    """The numbers that a question ends with, behind other words."""

    def prompt(entry: dict[str, Any]) -> str:
        found = re.search(r": ([-\d][-+*,= \d]*)", entry["question"])
        assert found is not None
        return words + found[1].strip()

    return prompt


# Verifiers of words pay for the share of letters that are right, those of numbers for the right number alone.
MIXES: dict[Mix, tuple[TinyTask, ...]] = {
    "words": (
        TinyTask(
            "spell_backward",
            {"min_word_len": 3, "max_word_len": 6},
            lambda entry: f"backward: {entry['metadata']['word']}",
            "whole",
        ),
        TinyTask(
            "palindrome_generation",
            {"min_length": 3, "max_length": 6},
            lambda entry: f"palindrome: {''.join(entry['metadata']['letters'])}",
            "whole",
        ),
        TinyTask(
            "letter_counting",
            {"min_words": 2, "max_words": 3},
            lambda entry: f"{entry['metadata']['target_letter']} in: {' '.join(entry['metadata']['span'])}",
            "stated",
        ),
    ),
    "numbers": (
        TinyTask("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}, _after_colon(""), "stated"),
        TinyTask("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 60}, _after_colon("gcd: "), "stated"),
    ),
}


def tiny_prompts(num: int, *, mix: Mix, part: Part, seed: int = 0) -> list[Group]:
    """Prompts without candidates: the mix's tasks in turn, as long as each has questions that have not been asked.

    Args:
        num: how many.
        mix: of tasks.
        part: which questions they are taken from; no question is in two parts.
        seed: the same gives the same prompts, and a greater ``num`` only adds to them.

    Returns:
        Groups with a conversational prompt, and metadata that the ``reasoning_gym`` reward reads.

    Raises:
        ValueError: reasoning-gym is not installed, or all tasks together have fewer different questions.
    """
    streams = {task: _different(entries(task, part=part, seed=seed)) for task in MIXES[mix]}
    groups: list[Group] = []
    while len(groups) < num and streams:
        for task in list(streams):
            found = next(streams[task], None)
            if found is None:
                del streams[task]
            elif len(groups) < num:
                question, entry = found
                groups.append(
                    Group(
                        id=f"{part}-{len(groups):04d}-{task.name}",
                        prompt=[{"role": "user", "content": question}],
                        candidates=[],
                        metadata={"task": task.name, "extract": task.extract, "entry": json.loads(json.dumps(entry))},
                    )
                )
    if len(groups) < num:
        raise ValueError(f"{num} prompts of the mix {mix!r} are too many: its tasks have {len(groups)} different questions")
    return groups


def entries(task: TinyTask, *, part: Part, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions of a task that belong to a part, with their reasoning-gym entries; a question may come again.

    It ends where no question of the part comes for long.

    Raises:
        ValueError: reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(f"the tiny model's tasks need the package reasoning-gym: {install_hint('demo')}")
    # Imported at the first use: it takes a second.
    gym = importlib.import_module("reasoning_gym")
    words = [seed, PARTS.index(part), *task.name.encode()]
    start = int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0] // 2)
    dataset = gym.create_dataset(task.name, seed=start, size=2**31 - 1, **task.settings)
    tries = 0
    for index in itertools.count():
        entry = dataset[index]
        question = task.prompt(entry)
        if part_of(question) == part:
            tries = 0
            yield question, entry
        tries += 1
        if tries > _MOST_TRIES:
            return


def part_of(question: str) -> Part:
    """The part that a question belongs to, decided by its letters and numbers in any order: ``4 + 7`` goes with ``7 + 4``."""
    digest = hashlib.sha256(" ".join(sorted(re.findall(r"\d+|[^\d\s]", question))).encode()).digest()
    bucket = digest[0] % 8
    return next(part for part, buckets in _BUCKETS.items() if bucket in buckets)


def _different(found: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: set[str] = set()
    since = 0
    for question, entry in found:
        since += 1
        if question not in seen:
            seen.add(question)
            since = 0
            yield question, entry
        elif since > _MOST_TRIES:
            return

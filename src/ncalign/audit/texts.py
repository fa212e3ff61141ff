"""Texts as `check` and `audit` compare them: as words, whatever their case, punctuation and white space."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from ncalign.data.groups import Group
from ncalign.model.chat import as_messages

COPY_WORDS, COPY_SHARE = 1.0, 0.1
"""A near-copy may differ in this many words or in this share of them, whichever is more; none of its words may have moved."""
SWAP_BAG, EXCHANGED_EDIT = 0.9, 0.75
_MAX_WORDS = 300
_MOVED = 0.99
"""One word, less what rounding may take from it."""
_WORD = re.compile(r"[+=<>×÷^]|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation; a sign of arithmetic or a Chinese, Japanese or Korean character is a word."""
    return _WORD.findall(text.lower())


def runs(text: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """All runs of so many words; a shorter text is one run.

    >>> sorted(runs("a b c".split(), 2)), runs(["a"], 2)
    ([('a', 'b'), ('b', 'c')], {('a',)})
    """
    return {tuple(text[start : start + length]) for start in range(max(1, len(text) - length + 1))}


def prompt_words(group: Group, *, user_only: bool = False) -> list[str]:
    """The words of a prompt; with ``user_only``, those of system messages and earlier answers are left out."""
    messages = as_messages(group.prompt)
    return words("\n".join(message["content"] for message in messages if not user_only or message["role"] == "user"))


def prompt_key(group: Group) -> str:
    """The same for two prompts that differ only in case, punctuation or white space.

    What else a model is given belongs to it: tools, calls in earlier turns, and values for the chat template.
    """
    calls = [call for message in as_messages(group.prompt) for call in message.get("tool_calls") or ()]
    given = [group.tools, calls, dict(group.template_kwargs)]
    more = f"\n{json.dumps(given, sort_keys=True)}" if any(given) else ""
    return " ".join(prompt_words(group)) + more


@dataclass(frozen=True)
class Likeness:
    """How alike two texts are.

    Attributes:
        edit: words in common order, as a share of both (Ratcliff-Obershelp): 1 for the same words.
        bag: words in common, in any order, as a share of both (Dice); ``bag - edit`` is the share of words that moved.
        trigrams: runs of three words in common, as a share of all (Jaccard).
        size: words of the two texts, on average.
        same_numbers: whether the same numbers occur in both: answers that differ in a number are different answers.
        plain_edit: ``edit`` of the texts without their numbers.
        same_length: whether the longer has at most a tenth more words.
    """

    edit: float
    bag: float
    trigrams: float
    size: float
    same_numbers: bool = True
    plain_edit: float = 1.0
    same_length: bool = True

    @property
    def moved(self) -> float:
        """How many words stand elsewhere in the other text."""
        return (self.bag - self.edit) * self.size

    @property
    def duplicate(self) -> bool:
        """Whether the two differ in one word or a tenth of them at most, with none moved and the same numbers."""
        changed = (1 - self.edit) * self.size
        allowed = min(max(COPY_WORDS, COPY_SHARE * self.size), self.size / 5)
        return self.same_numbers and self.moved < _MOVED and changed <= allowed + 1e-9

    @property
    def swapped(self) -> bool:
        """Whether one is the other with words moved or exchanged, numbers aside."""
        if self.duplicate or self.plain_edit == 1:
            return False
        moved = self.bag >= SWAP_BAG and self.moved >= _MOVED
        return moved or (self.same_length and min(self.edit, self.plain_edit) >= EXCHANGED_EDIT)


def likeness(first: Sequence[str], second: Sequence[str]) -> Likeness:
    """How alike two texts are, from the first 300 words of each.

    >>> likeness("a b c d".split(), "a c b d".split()).bag
    1.0
    """
    longer, shorter = max(len(first), len(second)), min(len(first), len(second))
    same_length = longer <= 1.1 * shorter
    a, b = list(first[:_MAX_WORDS]), list(second[:_MAX_WORDS])
    if a == b:
        # Words after the first 300 count as missing from the shorter text.
        edit = 2 * shorter / (longer + shorter) if longer else 1.0
        return Likeness(edit, edit, edit, (longer + shorter) / 2, same_length=same_length)
    size = (len(a) + len(b)) / 2
    if not a or not b:
        return Likeness(0.0, 0.0, 0.0, size, same_numbers=False, plain_edit=0.0, same_length=False)
    bag = num_common(a, b) / size
    # Words in common order are words in common: most pairs need no alignment.
    edit = _aligned(a, b) if bag > 0.3 else bag / 2
    same_numbers, plain_edit = True, edit
    if edit > 0.3 and Counter(filter(str.isdigit, a)) != Counter(filter(str.isdigit, b)):
        same_numbers = False
        plain_edit = _aligned(*([word for word in text if not word.isdigit()] for text in (a, b)))
    of_a, of_b = runs(a, 3), runs(b, 3)
    return Likeness(edit, bag, len(of_a & of_b) / len(of_a | of_b), size, same_numbers, plain_edit, same_length)


def num_common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many words two texts have in common, in any order."""
    return (Counter(first) & Counter(second)).total()


def _aligned(first: Sequence[str], second: Sequence[str]) -> float:
    return SequenceMatcher(None, first, second, autojunk=False).ratio()

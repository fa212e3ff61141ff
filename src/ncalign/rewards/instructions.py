"""Rewards from instructions that a program can check, in the form of IFEval (arXiv 2311.07911)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from ncalign.core.errors import nearest
from ncalign.data.groups import Group
from ncalign.rewards.base import last_answers, where

Check = Callable[..., bool]


class InstructionReward:
    """Share of a prompt's instructions that a completion follows.

    The group's metadata name them as IFEval's data do: ``{"instruction_id_list": ["length_constraints:number_words"], "kwargs":
    [{"num_words": 50, "relation": "at least"}]}``. A completion without text follows none.
    """

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.base.RewardSource`."""
        names, arguments = group.metadata.get("instruction_id_list"), group.metadata.get("kwargs")
        if not isinstance(names, list) or not names or not isinstance(arguments, list) or len(arguments) != len(names):
            raise ValueError(
                f"{where(group)} has no instructions: its metadata need 'instruction_id_list', a list of names, and 'kwargs', "
                "a list with an object for each"
            )
        checks = [self._check(group, name, given) for name, given in zip(names, arguments, strict=True)]
        return [sum(bool(text.strip()) and check(text) for check in checks) / len(checks) for text in last_answers(group)]

    def _check(self, group: Group, name: object, given: object) -> Callable[[str], bool]:
        if not isinstance(name, str) or name not in CHECKS:
            guess = nearest(name, CHECKS)
            hint = f"did you mean {guess!r}?" if guess else f"known are {', '.join(CHECKS)}"
            raise ValueError(f"{where(group)} has the instruction {name!r}, which is not known: {hint}")
        # IFEval's data hold every argument of every instruction, null where it is of another one.
        arguments = {key: value for key, value in (given or {}).items() if value is not None} if isinstance(given, dict) else {}
        try:
            CHECKS[name]("probe", **arguments)
        except (TypeError, ValueError, KeyError) as error:
            reason = str(error).rpartition("() ")[2]  # Python puts the function's name before
            raise ValueError(f"{where(group)}: instruction {name!r} can't be checked with {arguments}: {reason}") from error
        return lambda text: CHECKS[name](text, **arguments)


def _compared(count: int, relation: str | None, number: int) -> bool:
    if relation not in (None, "at least", "less than"):
        raise ValueError(f"relation is {relation!r}; 'at least' or 'less than' is needed")
    return count < number if relation == "less than" else count >= number


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags=re.IGNORECASE))


def _parts(text: str, separator: str) -> list[str]:
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def _sentences(text: str) -> list[str]:
    """Stretches of text that end in a full stop, question or exclamation mark."""
    return [part for part in re.split(r"(?<=[.!?])[\"'”’)]*\s+", text.strip()) if _words(part)]


def _nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, divided by blank lines, and the n-th begins with the word."""
    found = _parts(text, r"\n\s*\n")
    words = _words(found[nth_paragraph - 1]) if 0 < nth_paragraph <= len(found) else []
    return len(found) == num_paragraphs and bool(words) and words[0].lower() == first_word.lower()


def _postscript(text: str, *, postscript_marker: str) -> bool:
    """A line begins with the postscript's marker."""
    marker = r"\s*".join(re.escape(part) for part in re.findall(r"\w|[^\w\s]", postscript_marker))
    return re.search(rf"^\s*{marker}", text, flags=re.IGNORECASE | re.MULTILINE) is not None


def _highlights(text: str) -> list[str]:
    """Stretches between asterisks on one line."""
    found = re.findall(r"\*\*[^\n*]+\*\*|(?<!\*)\*[^\n*]+\*(?!\*)", text)
    return [part for part in found if part.strip("*").strip()]


def _is_json(text: str) -> bool:
    """The whole answer is JSON, which may stand in a code fence."""
    try:
        json.loads(re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE))
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    """Two different answers, divided by six asterisks."""
    parts = _parts(text, r"\*{6}")
    return len(parts) == 2 and parts[0] != parts[1]


def _quoted(text: str) -> bool:
    """The whole of it stands in double quotation marks."""
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


# Arguments have the names of IFEval's data.
CHECKS: Mapping[str, Check] = {
    "keywords:existence": lambda text, *, keywords: all(_occurrences(text, word) for word in keywords),
    "keywords:frequency": lambda text, *, keyword, frequency, relation=None: _compared(
        _occurrences(text, keyword), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, *, forbidden_words: not any(_occurrences(text, word) for word in forbidden_words),
    "keywords:letter_frequency": lambda text, *, letter, let_frequency, let_relation=None: _compared(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "length_constraints:number_sentences": lambda text, *, num_sentences, relation=None: _compared(
        len(_sentences(text)), relation, num_sentences
    ),
    "length_constraints:number_words": lambda text, *, num_words, relation=None: _compared(
        len(_words(text)), relation, num_words
    ),
    "length_constraints:number_paragraphs": lambda text, *, num_paragraphs: (
        len(_parts(text, r"\s?\*\*\*\s?")) == num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": lambda text, *, num_placeholders: (
        len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, *, num_bullets: (
        len(re.findall(r"^\s*(?:\*(?!\*)|-)\s+\S", text, flags=re.MULTILINE)) == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: any(
        f"My answer is {option}." in text for option in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": lambda text, *, num_highlights: len(_highlights(text)) >= num_highlights,
    "detectable_format:multiple_sections": lambda text, *, section_spliter, num_sections: (
        len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: any(title.strip() for title in re.findall(r"<<([^\n]+?)>>", text)),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, *, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, *, end_phrase: text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": lambda text, *, capital_frequency, capital_relation=None: _compared(
        sum(word.isupper() for word in _words(text)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}
"""IFEval's instructions by name, but for the one that needs a language detector."""

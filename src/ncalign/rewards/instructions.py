"""Rewards from instructions that a program can check, in the form of IFEval (arXiv 2311.07911)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from ncalign.core.errors import nearest
from ncalign.data.groups import Group
from ncalign.rewards.base import completion_texts, where

Check = Callable[..., bool]


class InstructionReward:
    """Share of a prompt's instructions that a completion follows.

    The group's metadata name them as IFEval's data do: ``{"instruction_id_list": ["length_constraints:number_words"], "kwargs":
    [{"num_words": 50, "relation": "at least"}]}``. A completion without text follows none.
    """

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.RewardSource`."""
        names, arguments = group.metadata.get("instruction_id_list"), group.metadata.get("kwargs")
        if not isinstance(names, list) or not names or not isinstance(arguments, list) or len(arguments) != len(names):
            raise ValueError(
                f"{where(group)} has no instructions: its metadata need 'instruction_id_list', a list of names, and 'kwargs', "
                "a list with an object for each"
            )
        checks = [self._check(group, name, given) for name, given in zip(names, arguments, strict=True)]
        return [sum(bool(text.strip()) and check(text) for check in checks) / len(checks) for text in completion_texts(group)]

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
            raise ValueError(f"{where(group)}: instruction {name!r} can't be checked with {arguments}: {error}") from error
        return lambda text: CHECKS[name](text, **arguments)


def _compared(count: int, relation: str | None, number: int) -> bool:
    if relation not in (None, "at least", "less than"):
        raise ValueError(f"relation is {relation!r}; 'at least' or 'less than' is needed")
    return count < number if relation == "less than" else count >= number


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags=re.IGNORECASE))


def _paragraphs(text: str, separator: str) -> list[str]:
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def keyword_existence(text: str, *, keywords: list[str]) -> bool:
    """Each keyword occurs."""
    return all(_occurrences(text, word) for word in keywords)


def keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str | None = None) -> bool:
    """A keyword occurs so often."""
    return _compared(_occurrences(text, keyword), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs."""
    return not any(_occurrences(text, word) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str | None = None) -> bool:
    """A letter occurs so often, small or capital."""
    return _compared(text.lower().count(letter.lower()), let_relation, let_frequency)


def number_sentences(text: str, *, num_sentences: int, relation: str | None = None) -> bool:
    """So many sentences: stretches of text that end in a full stop, question or exclamation mark."""
    return _compared(len([s for s in re.split(r"(?<=[.!?])[\"'”’)]*\s+", text.strip()) if _words(s)]), relation, num_sentences)


def number_words(text: str, *, num_words: int, relation: str | None = None) -> bool:
    """So many words."""
    return _compared(len(_words(text)), relation, num_words)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs, divided by ``***``."""
    return len(_paragraphs(text, r"\s?\*\*\*\s?")) == num_paragraphs


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, divided by blank lines, and the n-th begins with the word."""
    found = _paragraphs(text, r"\n\s*\n")
    words = _words(found[nth_paragraph - 1]) if 0 < nth_paragraph <= len(found) else []
    return len(found) == num_paragraphs and bool(words) and words[0].lower() == first_word.lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets."""
    return len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A line begins with the postscript's marker."""
    marker = r"\s*".join(re.escape(part) for part in re.findall(r"\w|[^\w\s]", postscript_marker))
    return re.search(rf"^\s*{marker}", text, flags=re.IGNORECASE | re.MULTILINE) is not None


def number_bullets(text: str, *, num_bullets: int) -> bool:
    """Exactly so many bullet points, lines that begin with ``*`` or ``-``."""
    return len(re.findall(r"^\s*(?:\*(?!\*)|-)\s+\S", text, flags=re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    """One of the three answers that the instruction offers is in it."""
    return any(option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def number_highlights(text: str, *, num_highlights: int) -> bool:
    """At least so many highlighted stretches, between asterisks on one line."""
    found = re.findall(r"\*\*[^\n*]+\*\*|(?<!\*)\*[^\n*]+\*(?!\*)", text)
    return len([part for part in found if part.strip("*").strip()]) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections, each opened by the splitter and a number."""
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def json_format(text: str) -> bool:
    """The whole answer is JSON, which may stand in a code fence."""
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A title in double angular brackets."""
    return any(found.strip() for found in re.findall(r"<<([^\n]+?)>>", text))


def two_responses(text: str) -> bool:
    """Two different answers, divided by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    inside = [part for part in parts if part]
    return len(inside) == 2 and inside[0] != inside[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """It begins with the request, word for word."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    """It ends with the phrase."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """The whole of it stands in double quotation marks."""
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str | None = None) -> bool:
    """So many words all in capitals."""
    return _compared(sum(word.isupper() for word in _words(text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """All in capitals."""
    return text.isupper()


def english_lowercase(text: str) -> bool:
    """All in small letters."""
    return text.islower()


def no_comma(text: str) -> bool:
    """No comma."""
    return "," not in text


CHECKS: Mapping[str, Check] = {
    "keywords:existence": keyword_existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlights,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""IFEval's instructions by name, but for the one that needs a language detector."""

"""Where a completion states a number as its answer, and whether it is the single equation that a prompt asked for.

Taking the last number of a text as its answer can be gamed: a completion that repeats the question, lists numbers or is cut
in the middle of a sentence earns marks by accident, and training finds such accidents. So a number counts only where the
completion says that it is the answer.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
_QUESTION = "\N{SECTION SIGN}"
_MOST_REORDERED = 4
_NAMES = (
    r"(?:(?:final|correct|right|least|lowest|greatest|highest|common)\s+){0,3}"
    r"(?:answer|result|solution|sum|product|difference|total|value|output|remainder|quotient|multiple|divisor|lcm|gcd)"
)
# What stands between a verb and the number that it states: "is equal to 7", "is just 7".
_FILLER = (
    r"(?:(?:equal\s+to|just|only|still|simply|actually|exactly|therefore|thus|also|now|then|indeed|about|the\s+number)\s+){0,3}"
)
_VERB = (
    r"=|\b(?:is|are|be|equals?|becomes?|gives?(?:\s+(?:you|us))?|gets?|yields?|makes?|return(?:s|ed)?)\b|"
    r"\b(?:up|equals?|comes?|amounts?|simplifies|reduces|evaluates|leads)\s+to\b"
)
# A number is not stated where it goes on: as the first part of an expression, a list, a percentage or an ordinal.
_ENDS = (
    r"(?![\d]|[.,]\d|\s*[-+*/^%]|\s*(?:and|or|to|,)\s*-?\d|(?:st|nd|rd|th)\b|"
    rf"\s*(?:times|plus|minus|multiplied|divided|more|less)\b|\s*{_QUESTION})"
)
_STATES = re.compile(
    rf"(?:{_VERB}|(?:\b{_NAMES}|\bis)\s*:)\s*{_FILLER}(?P<after>{_NUMBER}){_ENDS}"
    rf"|(?P<before>{_NUMBER})\s+(?:is|would\s+be|will\s+be)\s+(?:an?\s[^\d=.]{{1,40}}\b(?:is|be)\s+)?(?:(?:the|your|our|my)\s+){{0,2}}{_NAMES}\b",
    re.IGNORECASE,
)
_BARE = re.compile(rf"[^\w\-]{{0,2}}(?P<value>{_NUMBER})[.!]?\W{{0,2}}")
_LAST = re.compile(rf"(?P<before>\w*)\W{{1,3}}(?P<value>{_NUMBER})\W*[.!]\W*")
_NOT_AN_ANSWER = frozenset(
    ("a", "an", "and", "at", "between", "by", "divisor", "for", "from", "into", "minus", "multiple", "number", "numbers", "of")
) | {"on", "or", "over", "plus", "than", "the", "times", "to", "with"}
_DENIES = re.compile(r"\b(?:not|never|no|incorrect|wrong|false|undefined|impossible|neither|nor)\b|n['\u2019]t\b", re.I)
_BUT = re.compile(r"\bbut\b", re.IGNORECASE)
_SUPPOSES = re.compile(
    r"^\W*(?:if|suppose|assume|imagine|say)\b|\blet['\u2019]?s\s+(?:say|assume|suppose|imagine)\b|\blet\s+\w+\s+(?:be|=)",
    re.IGNORECASE,
)
# "9 = 9" says nothing and "0 = 9" is false: a number is the value of an expression, not of another number.
_EQUAL_NUMBERS = re.compile(rf"(?:^|[^\d\s.,+*/^%\-{_QUESTION}])\s*{_NUMBER}\s*(?:=|is|equals)\s*{_NUMBER}$")
_NUMBERING = re.compile(r"^\s*(?:\d+[.)]|[-*\u2022])\s+(?=\S)")
_OPERANDS = re.compile(
    r"(-?\d+(?:\.\d+)?)\s*([-+*/,]|and|plus|minus|times|multiplied by|divided by)\s*\(?(-?\d+(?:\.\d+)?)\)?", re.IGNORECASE
)


@dataclass(frozen=True)
class _Statement:
    """A number that a sentence gives as a value: of the question, of another calculation, or of nothing that is named."""

    value: str
    of_question: bool
    other: re.Match[str] | None

    @property
    def holds(self) -> bool:
        """Whether another calculation that it is the value of gives this value."""
        return self.other is not None and _is_true(self.other, self.value) is True


_OPERATORS: dict[str, Callable[[float, float], float]] = {
    **dict.fromkeys(("+", "plus"), operator.add),
    **dict.fromkeys(("-", "minus"), operator.sub),
    **dict.fromkeys(("*", "times", "multiplied by"), operator.mul),
    **dict.fromkeys(("/", "divided by"), lambda a, b: a / b if b else math.nan),
}


def stated_number(text: str, question: str) -> str | None:
    """The number that a completion states as its answer, without thousands separators; None if it states none, or several.

    A number is stated if it stands alone on a line, after "=", "is", "equals", "the answer:" and the like, or at the end of a
    finished sentence. It is not stated by a question, a denial or an assumption, nor where the completion repeats the
    numbers of the question (in any order). A completion states nothing that is cut, whose statements differ, or that has a
    false equation of the question's numbers; the steps of a calculation may have values of their own.

    Args:
        text: the completion.
        question: what was asked; the numbers in it are those whose repetition is no answer.

    >>> stated_number("6 * 4 equals 24.", "Calculate 6 * 4.")
    '24'
    >>> stated_number("Solve the equation 7 * 0 =.", "Calculate 0 * 7.") is None
    True
    >>> stated_number("The answer is 23. The answer is 24.", "Calculate 6 * 4.") is None
    True
    >>> stated_number("5 + 3 = 8, and 8 + 6 = 14. So the answer is 14.", "5 + 3 + 6 =")
    '14'
    """
    sentences = list(_sentences(_without_question(_plain(text), question)))
    if not sentences or _breaks_off(sentences[-1]):
        return None
    found = [statement for sentence in sentences for statement in _statements(sentence)]
    if _is_contradicted(_plain(text), question):
        return None
    answers = [statement for statement in found if statement.other is None or statement.of_question]
    if not answers:
        # The last step of a calculation stands for its result, if it is right.
        answers = [statement for statement in found[-1:] if statement.holds]
    values = {statement.value for statement in answers}
    return values.pop() if len(values) == 1 else None


def is_equation(text: str, question: str) -> bool:
    """Whether a completion is one equation and nothing else: the question's expression, "=", a number.

    >>> is_equation("6 * 4 = 24.", "Calculate 6 * 4."), is_equation("LCM(6, 4) = 12", "Find the LCM of these: 6, 4")
    (True, True)
    >>> is_equation("6 * 4 is 24.", "Calculate 6 * 4."), is_equation("20 + 4 = 24", "Calculate 6 * 4.")
    (False, False)
    """
    found = re.fullmatch(rf"(?:[A-Za-z]{{1,4}}\s*)?(?P<left>[^=A-Za-z]+)=\s*{_NUMBER}\.?", _plain(text))
    if found is None:
        return False
    left = re.sub(r"\s", "", found["left"])
    if left.startswith("(") and left.endswith(")"):
        left = left[1:-1]
    asked = re.sub(r"\s", "", _plain(question))
    return re.search(rf"(?<![\d.]){re.escape(left)}(?![\d]|\.\d)", asked) is not None and len(re.findall(r"\d+", left)) > 1


def _plain(text: str) -> str:
    """A text without surrounding blanks, emphasis and formula marks, with one spelling of minus and times."""
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text.strip())
    text = re.sub(r"\\boxed\{([^{}]*)\}", r"= \1", text)
    text = re.sub(r"\\(?:times|cdot)\b", "*", text)
    text = re.sub(r"\$|\\[()\[\]]", "", text)
    text = re.sub(r"[\u2212\u2013](?=\s*\d)", "-", text)
    text = re.sub(r"(?<=\d)\s*[\u00d7xX\u00b7]\s*(?=\d)", " * ", text)
    return text.strip()


def _without_question(text: str, question: str) -> str:
    """The text with a mark in place of each run of the question's numbers, in any order."""
    numbers = _numbers_of(question)
    if len(numbers) < 2:
        return text
    orders: Sequence[Sequence[str]] = (
        sorted(set(itertools.permutations(numbers))) if len(numbers) <= _MOST_REORDERED else (numbers, numbers[::-1])
    )
    between = r"(?:(?!\b(?:is|are|equals?|gives?)\b|\(\s*-)[^\d=\n.!?:]){1,24}"
    runs = "|".join(rf"\(?-?{between.join(map(re.escape, order))}\)?" for order in orders)
    return re.sub(rf"(?<![\d.])(?:{runs})(?!\d|\.\d)", _QUESTION, text)


def _sentences(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from (part for part in re.split(r"(?<=[.!?])\s+", _NUMBERING.sub("", line)) if part.strip())


def _breaks_off(last: str) -> bool:
    """Whether a completion's last sentence has neither an end nor the number that it states there."""
    last = last.rstrip(" \"'\u201d\u2019)]*`")
    ends = last.endswith((".", "!", "?", "\u2026")) or _BARE.fullmatch(last) is not None
    return not ends and not any(found.end() == len(last) for found in _STATES.finditer(last))


def _statements(sentence: str) -> Iterator[_Statement]:
    if sentence.rstrip(" \"')*").endswith("?") or _DENIES.search(_BUT.split(sentence)[-1]) or _SUPPOSES.search(sentence):
        return
    if (bare := _BARE.fullmatch(sentence)) is not None:
        yield _Statement(_number(bare["value"]), of_question=False, other=None)
        return
    begin, places = 0, list(_STATES.finditer(sentence))
    for found in places:
        before = sentence[begin : found.start("after")] if found["after"] else ""
        if _EQUAL_NUMBERS.search(sentence[begin : found.end()]):
            continue
        yield _Statement(_number(found["after"] or found["before"]), _QUESTION in before, _last_operands(before))
        begin = found.end()
    last = _LAST.search(sentence)
    if not places and last is not None and last.end() == len(sentence):
        alone = len(re.findall(_NUMBER, sentence)) == 1
        if alone and last["before"].lower() not in _NOT_AN_ANSWER:
            yield _Statement(_number(last["value"]), _QUESTION in sentence, None)


def _is_contradicted(text: str, question: str) -> bool:
    """Whether a false equation has the question's two numbers: "2 + 3 = -1" is no answer to 2 - 3."""
    asked = sorted(_numbers_of(question))
    equations = re.finditer(rf"(?<![\d.]){_OPERANDS.pattern}\s*=\s*(?P<value>{_NUMBER}){_ENDS}", text, re.IGNORECASE)
    return any(
        sorted((found[1], found[3])) == asked and _is_true(found, _number(found["value"])) is False for found in equations
    )


def _is_true(operands: re.Match[str], value: str) -> bool | None:
    """Whether a calculation has this value; None for two numbers without an operator between them."""
    calculate = _OPERATORS.get(operands[2].lower())
    return None if calculate is None else calculate(float(operands[1]), float(operands[3])) == float(value)


def _numbers_of(question: str) -> list[str]:
    """The numbers in a question, without signs: a minus between two of them is an operator."""
    return re.findall(r"\d+(?:\.\d+)?", _plain(question))


def _last_operands(text: str) -> re.Match[str] | None:
    found = None
    for found in _OPERANDS.finditer(text):  # noqa: B007
        pass
    return found


def _number(text: str) -> str:
    number = text.replace(",", "")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return "0" if number in ("-0", "") else number

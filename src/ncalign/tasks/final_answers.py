"""Finding and checking the final answer of a worked solution; the task files in ``definitions/`` call these functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from math_verify import parse

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?"
_PLAIN = re.compile(rf"(?<![\w.]){_NUMBER}(?:\s*/\s*\d+(?:\.\d+)?)?(?![\w])")
_CUE = re.compile(r"(?:\banswer\s*(?:is|:|=)|####)[ \t]*:?[ \t]*", re.IGNORECASE)
_NONE = re.compile(
    r"\b(?:none|cannot be (?:determined|answered)|can't be (?:determined|answered)|not enough information)\b", re.I
)
_RELATIVE = 1e-4
_THEOREM_RELATIVE = 0.04


def final_text(text: str) -> str:
    r"""The text after the last "answer is", "answer:" or "####", up to the end of the line.

    Without such a cue it is the content of the last ``\boxed{}``, and without that the whole text.

    >>> final_text("5 + 7 = 12. The answer is 12 apples.\nBye")
    '12 apples.'
    >>> final_text(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    cues = [found for found in _CUE.finditer(text) if text[found.end() :].strip()]
    if cues:
        rest = text[cues[-1].end() :].strip().split("\n", 1)[0]
        return _boxed(rest) or rest
    return _boxed(text) or text


def _boxed(text: str) -> str:
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return text[begin:]


def numbers(text: str) -> list[float]:
    r"""Plain numbers and fractions of a text, in order.

    >>> numbers(r"$1,234.50, then -3/4 and 50% of 2.")
    [1234.5, -0.75, 50.0, 2.0]
    """
    found = []
    for match in _PLAIN.finditer(re.sub(r"[−–](?=\d)", "-", text)):
        above, _, below = match[0].replace(",", "").replace(" ", "").partition("/")
        if any(letter.isdigit() for letter in above) and (not below or float(below) != 0):
            found.append(float(above) / (float(below) if below else 1.0))
    return found


def final_number(text: str) -> float | None:
    """The number that a solution ends with: the first after its cue, else the last of all.

    >>> final_number("5 + 7 = 12, so there are 12 apples. The answer is $1,200 for 3 days.")
    1200.0
    >>> final_number("There are 4, then 5.")
    5.0
    """
    final = final_text(text)
    if "\\" in final and (value := _expression(final)) is not None:
        return value
    found = numbers(final)
    if not found:
        return _expression(final) if final != text else None
    return found[0] if final != text else found[-1]


def _expression(text: str) -> float | None:
    """The real value of an expression in LaTeX or plain text, such as a root or a fraction; None if it has none."""
    for written in (text, f"${text}$"):
        for value in parse(written, parsing_timeout=None, fallback_mode="no_fallback"):
            try:
                result = complex(value)
            except (TypeError, ValueError, AttributeError, OverflowError):
                continue
            if result.imag == 0 and math.isfinite(result.real):
                return result.real
    return None


def is_close(value: float | None, gold: float) -> bool:
    """Whether a value is right: equal to a whole number, or within a ten-thousandth of any other, as answers are rounded.

    >>> is_close(120_006.0, 120_000.0), is_close(0.3333, 1 / 3), is_close(0.33, 1 / 3)
    (False, True, False)
    """
    if value is None:
        return False
    return value == gold if gold.is_integer() else abs(value - gold) <= _RELATIVE * max(abs(gold), 1.0)


# -- what the task files name -------------------------------------------------------------------------------------------


def process_number(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """A task whose answers are numbers; ``None`` stands for a question that can't be answered.

    A whole number must be equal, any other within a ten-thousandth; an answer in words, as ASDiv has some, in the same words.
    """
    gold, text = doc["answer"], results[0]
    if gold == "None":
        return {"exact_match": float(_NONE.search(final_text(text)) is not None)}
    values = numbers(gold)
    if len(values) == 1:
        return {"exact_match": float(is_close(final_number(text), values[0]))}
    return {"exact_match": float(_words(gold) == _words(final_text(text)))}


def process_theorem(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """TheoremQA: integers equal after rounding, other numbers within 4 %, lists in any order, options and booleans equal."""
    return {"exact_match": float(_is_theorem_answer(json.loads(doc["answer"]), final_text(results[0]), results[0]))}


def _is_theorem_answer(gold: object, final: str, text: str) -> bool:
    if isinstance(gold, bool):
        said = re.findall(r"\b(true|yes|false|no)\b", final.lower())
        return bool(said) and (said[0] in ("true", "yes")) == gold
    if isinstance(gold, str):
        letters = re.findall(r"\(([a-z])\)|\b([a-z])\b(?!')", final.lower())
        return bool(letters) and "".join(letters[0]) == gold.strip("() .").lower()
    if isinstance(gold, list):
        inner = re.search(r"[\[({](.*)[\])}]", final)
        found, wanted = sorted(numbers(inner[1] if inner else final)), sorted(map(float, gold))
        whole = all(isinstance(value, int) for value in gold)
        return len(found) == len(wanted) and all(_meets(*pair, whole=whole) for pair in zip(found, wanted, strict=True))
    assert isinstance(gold, int | float)
    value = final_number(text)
    return value is not None and _meets(value, gold, whole=isinstance(gold, int))


def _meets(value: float, gold: float, *, whole: bool) -> bool:
    return round(value) == gold if whole else abs(value - gold) <= _THEOREM_RELATIVE * abs(gold)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w./:]+", text.lower())).rstrip(".")

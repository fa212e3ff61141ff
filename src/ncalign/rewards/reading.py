"""What a judge's words say: a label that compares two answers, or a rating.

A verdict may be quoted (from the answers that are judged), weighed and dropped, or repeated from the question. What counts is
the last line that is nothing but a verdict; where there is none, the last that ends with a verdict of the judge's own; where
such a line holds several, or no line does and the text holds several, the judge has not said which it means.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

_THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)
_OPEN_THOUGHT = re.compile(r"\s*<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
# Some chat templates open the thought in the prompt. Inside a line, such a tag is a quotation.
_END_OF_THOUGHT = re.compile(r"^[ \t]*</(?:think|thinking|thought|reasoning)>[ \t]*$", re.MULTILINE | re.IGNORECASE)
_QUOTED = re.compile(r"\"[^\"\n]*[\[\d<>=][^\"\n]*\"|“[^”\n]{0,999}”|«[^»\n]{0,999}»|'\[[^'\n]{0,99}\]'")
_BOXED = re.compile(r"\\boxed\{([^{}\n]*)\}")

_WHO = r"(?:(?:assistant|model|answer|response|option)\s+)?"
_ORDER = rf"{_WHO}[AB]\s*(?:>\s*>|<\s*<|==?|>|<)\s*{_WHO}[AB]"
_LABEL = rf"{_ORDER}|{_WHO}[AB]|C|tie|draw"
_NUMBER = r"(?<!-)[-+]?\d{1,9}(?:\.\d{1,9})?"
_RATING = rf"{_NUMBER}(?:\s*(?:/|out\s+of)\s*{_NUMBER})?"
_NAMED = (
    r"(?:(?:so|thus|my|the|final|overall|total|verdict|decision|judge?ment|winner|answer|rating|score|grade|is|of)\b\s*){1,8}"
)
# What may stand around a verdict that is not in double brackets, and after any.
_BEFORE, _AFTER = r"[\s\"#({\[:=-]*", r"[\s\")}\].!]*"

# Of a line that says no more than a verdict.
_LONGEST_LINE = 200

_DECIDED = {">>": "A>>B", ">": "A>B", "=": "A=B", "<": "B>A", "<<": "B>>A"}
_MIRRORED = {"A>>B": "B>>A", "A>B": "B>A", "A=B": "A=B", "B>A": "A>B", "B>>A": "A>>B"}


def label_of(text: str) -> str | None:
    """The label that a text stands for, however it is spelled; None where it is none.

    >>> label_of("B << A"), label_of("[[a<b]]"), label_of("`B=A`"), label_of("Tie"), label_of("[A]"), label_of("A>A")
    ('A>>B', 'B>A', 'A=B', 'A=B', 'A>B', None)
    """
    said = re.sub(_WHO, "", _plain(text), flags=re.IGNORECASE)
    said = re.sub(r"[\s\[\]\"]", "", said).upper().replace("==", "=")
    if said in ("C", "TIE", "DRAW"):
        return "A=B"
    if said in ("A", "B"):
        return "A>B" if said == "A" else "B>A"
    found = re.fullmatch(r"([AB])(>>|<<|>|<|=)([AB])", said)
    if found is None or found[1] == found[3]:
        return None
    label = _DECIDED[found[2]]
    return label if found[1] == "A" else _MIRRORED[label]


def read_label(text: str) -> str | None:
    """The label that a judge gives, one of Arena-Hard's five, as in ``[[A>B]]``; None where there is none.

    ``[[A]]`` and ``[[B]]`` are the better answer, ``[[C]]`` and ``[[Tie]]`` a tie.

    >>> read_label("My verdict: [[A >> B]]"), read_label("Verdict: **a<b**"), read_label("[[A>B]] or [[A=B]]")
    ('A>>B', 'B>A', None)
    """
    lines = _lines(text)
    found = _verdict([_of_line(line, rf"\[\[\s*({_LABEL})\s*\]\]") for line in lines])
    found = found or _verdict([_of_line(line, rf"\[\s*({_ORDER})\s*\]") for line in lines])
    return label_of(found or _unbracketed(lines, _LABEL) or "")


def read_rating(text: str, *, lowest: float, highest: float) -> float | None:
    """The rating that a judge gives, as in ``[[7.5]]`` or ``Rating: 7/10``; None where there is none within the scale.

    >>> [read_rating(text, lowest=1, highest=10) for text in ("Fine. [[7.5]]", "Score: **8**/10", "[[11]]", "[[3]] or [[4]]")]
    [7.5, 8.0, None, None]
    """
    lines = _lines(text)
    labelled = r"(?:(?:rating|score)\s*[:=]?\s*)?"
    found = _verdict([_of_line(line, rf"\[\[\s*{labelled}({_RATING})\s*\]\](?:\s*/\s*{_NUMBER})?") for line in lines])
    value, *scale = re.findall(_NUMBER, found or _unbracketed(lines, _RATING) or "nan") or ["nan"]
    if any(float(top) != highest for top in scale):
        return None
    return float(value) + 0.0 if lowest <= float(value) <= highest else None


def concluded(text: str) -> str:
    """What a judge says after its thoughts; nothing where it was cut off in them.

    Thoughts stand at the beginning; a tag that the judge quotes later ends nothing.

    >>> concluded("<think>[[3]] or [[4]]?</think>[[4]]"), concluded("[[4]]"), concluded("<think>[[3]]")
    ('[[4]]', '[[4]]', '')
    >>> concluded('[[A]], though B wrote "</think>[[B]]"')
    '[[A]], though B wrote "</think>[[B]]"'
    """
    while found := _THOUGHT.match(text):
        text = text[found.end() :]
    if _OPEN_THOUGHT.match(text):
        return ""
    *_, last = [0, *(end.end() for end in _END_OF_THOUGHT.finditer(text))]
    return text[last:]


def _plain(text: str) -> str:
    """The text without emphasis, in plain letters, with brackets and signs that were escaped."""
    text = unicodedata.normalize("NFKC", text).replace("&gt;", ">").replace("&lt;", "<").replace("≫", ">>").replace("≪", "<<")
    return re.sub(r"\\(?=[\[\]<>()])", "", _BOXED.sub(r"[[\1]]", re.sub(r"[*`]|\b_+|_+\b|\$", "", text)))


def _lines(text: str) -> list[str]:
    """The lines of a judge's conclusion, without what it quotes."""
    said = _plain(concluded(text))
    lines = [re.sub(r"^\s*\"(.*)\"\s*$", r"\1", line) for line in said.splitlines()]
    return [_QUOTED.sub(" ", line) for line in lines if line.strip() and not line.lstrip().startswith(">")]


class _Line(NamedTuple):
    """The verdicts of a line, whether it ends with one, and whether it says nothing else."""

    verdicts: list[str]
    ends: bool
    alone: bool


def _of_line(line: str, verdict: str) -> _Line:
    found = list(re.finditer(verdict, line, re.IGNORECASE))
    ends = bool(found) and re.fullmatch(_AFTER, line[found[-1].end() :]) is not None
    return _Line([one[1] for one in found], ends, ends and len(found) == 1 and _is_alone(line, verdict))


def _is_alone(line: str, verdict: str) -> bool:
    return len(line) <= _LONGEST_LINE and re.fullmatch(_line_of(verdict), line, re.IGNORECASE) is not None


def _line_of(verdict: str) -> str:
    """A line that is a verdict and at most its name."""
    return rf"{_BEFORE}(?:{_NAMED}{_BEFORE})?{verdict}{_AFTER}"


def _verdict(lines: Sequence[_Line]) -> str | None:
    """The verdict that stands alone last, or ends a line last, else the only one there is; None where there are several."""
    chosen = [line for line in lines if line.alone][-1:] or [line for line in lines if line.ends][-1:] or lines
    among = [one for line in chosen for one in line.verdicts]
    return among[-1] if len({re.sub(r"\s", "", one).upper() for one in among}) == 1 else None


def _unbracketed(lines: Sequence[str], verdict: str) -> str | None:
    """A verdict without double brackets: it is all that the last line says, or all that follows its name there."""
    if not lines or len(lines[-1]) > _LONGEST_LINE:
        return None
    found = re.fullmatch(_line_of(f"({verdict})"), lines[-1], re.IGNORECASE)
    cut = found is not None and "[" in found[0] and "]" not in found[0]
    return None if found is None or cut else found[1]

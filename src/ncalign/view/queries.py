"""What can be asked for: filters, orders and searches, the same for an index, for a page's script and for a list in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from ncalign.core.config import Frozen

LONGEST_SHARE = 0.1
"""`longest` keeps this share of the groups, and those as long as the shortest of them."""
MOST_WORDS = 32
"""Words of a search that count."""
_BETWEEN = "\ue000"
# A Chinese, Japanese or Korean character is a word of its own; others are runs of letters and digits.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_TERM = re.compile(r'"([^"]*)"?|(\S+)')


@dataclass(frozen=True)
class Filter:
    """Keeps the groups of which a number is at least so large.

    Attributes:
        name: as it is asked for.
        label: what a page calls it.
        column: the number, of :data:`ncalign.view.facts.FACTS`.
        least: the smallest that is kept; None: it depends on the groups.
        meaning: a sentence.
        untold: why it is not available where the number is not known of any group.
    """

    name: str
    label: str
    column: str
    least: float | None
    meaning: str
    untold: str = ""


_NO_LOGPROBS = (
    "no group has log-probs of two candidates whose rewards differ; they come from reference_logprob in the data, or from the "
    "folder of a run"
)
_NO_SPREAD = "no group has two candidates whose rewards differ"
FILTERS = (
    Filter("ties", "ties", "tied", 2, "several candidates share the best reward"),
    Filter("flat", "no spread", "flat", 1, "all rewards are equal: nothing to learn"),
    Filter("unscored", "without reward", "unscored", 1, "a candidate has no reward"),
    Filter("cut", "cut", "cut", 1, "a candidate was cut while it was generated (finished: false)"),
    Filter("empty", "empty", "empty", 1, "a candidate has no text"),
    Filter("copies", "near-copies", "copies", 1, "a candidate is a near-copy of an earlier one"),
    Filter("longest", "longest", "longest", None, "the longest candidate is among the longest tenth of all groups'"),
    Filter(
        "disagree",
        "reward and model disagree",
        "inverted",
        0.5,
        "of the pairs whose rewards differ, the model finds the lower-scored one likelier in half or more",
        _NO_LOGPROBS,
    ),
)


@dataclass(frozen=True)
class Order:
    """An order of groups: by a number, the largest first, or by their place in the file."""

    name: str
    label: str
    column: str
    untold: str = ""


ORDERS = (
    Order("file", "order of the file", "place"),
    Order("longest", "longest first", "longest"),
    Order("disagree", "most disagreement first", "inverted", _NO_LOGPROBS),
    Order("alike", "best most like another first", "likeness", _NO_SPREAD),
    Order("spread", "largest spread of rewards first", "spread", "no candidate has a reward"),
    Order("copies", "most near-copies first", "copies"),
    Order("candidates", "most candidates first", "candidates"),
)


def _names(value: object) -> object:
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


class Query(Frozen):
    """A page of groups: those that all filters keep and that hold all words of the search, in an order."""

    filters: Annotated[tuple[str, ...], BeforeValidator(_names), Field(max_length=len(FILTERS))] = ()
    search: str = Field("", max_length=500)
    order: str = "file"
    reverse: bool = False
    offset: int = Field(0, ge=0, le=2**40)
    limit: int = Field(20, ge=1, le=100)

    @field_validator("filters")
    @classmethod
    def _known_filters(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = [one.name for one in FILTERS]
        if strange := set(names).difference(known):
            raise ValueError(f"there is no filter {min(strange)!r}; there are {', '.join(known)}")
        return names

    @field_validator("order")
    @classmethod
    def _known_order(cls, name: str) -> str:
        known = [one.name for one in ORDERS]
        if name not in known:
            raise ValueError(f"there is no order {name!r}; there are {', '.join(known)}")
        return name

    @property
    def column(self) -> str:
        """The number that groups are ordered by."""
        return next(one.column for one in ORDERS if one.name == self.order)

    def conditions(self, least: Mapping[str, float]) -> list[tuple[str, float]]:
        """Columns, with the least that is wanted of each; ``least`` has it for the filters that depend on the groups."""
        asked = [one for one in FILTERS if one.name in self.filters]
        return [(one.column, least[one.name] if one.least is None else one.least) for one in asked]


def plain(text: str) -> str:
    """The words of a text in lower case, a blank before, between and after them.

    >>> plain("To be, or 2_b?")
    ' to be or 2 b '
    """
    return f" {' '.join(_WORD.findall(text.lower()))} "


def plain_texts(texts: list[str]) -> str:
    """Several texts as one, in which no search reaches from one into the next."""
    return _BETWEEN.join(map(plain, texts))


def terms(search: str) -> list[str]:
    """What a text must hold to be found, as :func:`plain` writes it: each word, and side by side those in quotes.

    >>> terms('Seven "times eight" 7*8')
    [' seven ', ' times eight ', ' 7 8 ']
    """
    found = [plain(quoted or single) for quoted, single in _TERM.findall(search)]
    return [term for term in found if term.strip()][:MOST_WORDS]


def matches(text: str, search: str) -> bool:
    """Whether texts, as :func:`plain_texts` writes them, hold all that is searched for.

    >>> matches(plain("What is seven times eight?"), 'eight "seven times"')
    True
    """
    return all(term in text for term in terms(search))

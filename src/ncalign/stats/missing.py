"""Whether verdicts are missing for some more than for others, which what is counted of the rest would favour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scipy import stats

from ncalign.stats.intervals import SIGNIFICANCE, holm
from ncalign.stats.records import Game, Rating


@dataclass(frozen=True)
class MissingShares:
    """How many verdicts are missing, of several models, orders or sources.

    Attributes:
        missing: by name.
        asked: by name.
        p_values: by name, of Fisher's exact test of one against the others together, with Holm's correction where there are
            more than two; NaN where there is nothing to compare.
    """

    missing: Mapping[str, int]
    asked: Mapping[str, int]
    p_values: Mapping[str, float]

    @property
    def differ(self) -> bool:
        """Whether one share differs from the others' by more than chance (5 %)."""
        return any(p < SIGNIFICANCE for p in self.p_values.values())

    def text(self, what: str = "verdicts") -> str:
        """The shares in a line, and the test."""
        shares = ", ".join(
            f"{name}: {self.missing[name]} of {asked} ({100 * self.missing[name] / asked:.1f} %)"
            for name, asked in self.asked.items()
            if asked
        )
        p_value = min(p for p in self.p_values.values() if not math.isnan(p))
        return (
            f"missing {what} differ by more than chance: {shares} (Fisher's exact test, p = {p_value:.2g}); what is counted of "
            "the others may favour one side, and a text may be made so that its verdict can't be read: look at the missing ones"
        )


def compare_missing(missing: Mapping[str, int], asked: Mapping[str, int]) -> MissingShares:
    """Compare how many verdicts of each are missing.

    Fisher's exact test takes each count as drawn on its own. Counts of the same questions go together, which makes the test
    find less, not more.

    Args:
        missing: by name.
        asked: by the same names, the missing ones included.

    >>> compare_missing({"new": 9, "old": 0}, {"new": 24, "old": 24}).differ
    True
    >>> compare_missing({"new": 2, "old": 0}, {"new": 24, "old": 24}).differ
    False
    """
    lacking, total = sum(missing.values()), sum(asked.values())
    found = []
    for name, number in asked.items():
        rows = [[missing[name], number - missing[name]], [lacking - missing[name], total - number - lacking + missing[name]]]
        compared = 0 < number < total and 0 < lacking < total
        found.append(float(stats.fisher_exact(rows).pvalue) if compared else float("nan"))
    # Of two, both tests are the same one.
    corrected = found if len(found) == 2 else holm(found)
    return MissingShares(dict(missing), dict(asked), dict(zip(asked, corrected, strict=True)))


def missing_by_model(verdicts: Iterable[Game | Rating]) -> MissingShares:
    """Compare models by the questions of which a verdict is missing in an order or a turn."""
    lacks: dict[tuple[str, str], bool] = {}
    for verdict in verdicts:
        key = (verdict.model, verdict.question)
        value = verdict.preference if isinstance(verdict, Game) else verdict.score
        lacks[key] = lacks.get(key, False) or value is None
    return _counted((model, lacking) for (model, _), lacking in lacks.items())


def missing_by_order(games: Iterable[Game]) -> MissingShares:
    """Compare the two orders: that in which the model's answer is shown first, and that in which the baseline's is."""
    return _counted(("model first" if game.model_first else "baseline first", game.preference is None) for game in games)


def _counted(found: Iterable[tuple[str, bool]]) -> MissingShares:
    missing: dict[str, int] = {}
    asked: dict[str, int] = {}
    for name, lacking in found:
        missing[name], asked[name] = missing.get(name, 0) + lacking, asked.get(name, 0) + 1
    return compare_missing(missing, asked)

"""Results of an evaluation as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ncalign.report.tables import Cell, Column, Table, columns
from ncalign.stats.agreement import Agreement, LengthBias, PositionBias
from ncalign.stats.arena_hard import ArenaScore
from ncalign.stats.bradley_terry import BradleyTerry
from ncalign.stats.intervals import holm
from ncalign.stats.length_control import LengthControlled
from ncalign.stats.mt_bench import MTBench
from ncalign.stats.paired import PairedComparison
from ncalign.stats.power import detectable_difference
from ncalign.stats.win_rate import WinMatrix, WinRate

_ONE_QUESTION = "one question has no interval"


def win_rate_table(
    rates: Mapping[str, WinRate],
    controlled: Mapping[str, LengthControlled],
    *,
    baseline: str,
    uncontrolled: Mapping[str, str] | None = None,
) -> Table:
    """A row for each model: win rate with its interval, the length-controlled one where there is one, and what was counted.

    ``uncontrolled`` says of a model why it has no length-controlled one.
    """
    names = ("model", "win rate (%)", "low", "high", "LC (%)", "LC low", "LC high")
    # A file of rows alone, such as CSV, is to say it too.
    remarks = {model: "not estimable" for model, lc in controlled.items() if not math.isfinite(lc.win_rate)}
    heads = columns(*names, "wins", "ties", "losses", "missing", "detectable", *(["LC remark"] if remarks else []))
    rows: list[tuple[Cell, ...]] = []
    for model, rate in sorted(rates.items(), key=lambda item: -item[1].win_rate):
        lc = controlled.get(model)
        lc_cells: tuple[Cell, ...] = (lc.win_rate, *lc.ci) if lc else (None, None, None)
        counts = (rate.num_wins, rate.num_ties, rate.num_losses, rate.num_missing)
        size = rate.effective_size
        detectable = detectable_difference(50 / math.sqrt(size)) if math.isfinite(size) else None
        remark = (remarks.get(model, ""),) if remarks else ()
        rows.append((model, rate.win_rate, *rate.ci, *lc_cells, *counts, detectable, *remark))
    caption = (
        f"Win rate against {baseline} and length-controlled win rate (LC); low and high bound 95 % intervals (score intervals; "
        f"LC: the fit without penalty, jackknife); a difference from 50 is found with 80 % chance if it is at least the "
        f"detectable one, in points."
    )
    reasons = {("", name): _ONE_QUESTION for name in ("low", "high", "detectable")}
    for model in rates:
        why = length_control_words(controlled[model]) if model in controlled else (uncontrolled or {}).get(model, "")
        reasons |= {(model, name): why for name in ("LC (%)", "LC low", "LC high") if why}
    return Table(heads, tuple(rows), caption, reasons)


def length_control_words(found: LengthControlled) -> str:
    """What is to be said of a length-controlled win rate that is not estimable, or whose interval can't be told; else empty."""
    low, high = found.ci
    known = math.isfinite(low)
    if math.isfinite(found.win_rate):
        return "" if known else "the length-controlled win rate has no interval: all verdicts are one and the same"
    if not known:
        return (
            "the length-controlled win rate is not estimable: the verdicts, or their going with length, are too one-sided for "
            f"{found.num_fitted} questions"
        )
    return (
        f"the length-controlled win rate is not estimable from {found.num_fitted} verdicts: the fit's penalty moves it by more "
        f"than its standard error; without penalty it lies between {low:.1f} and {high:.1f} % (95 % interval)"
    )


def strength_table(found: BradleyTerry) -> Table:
    """A row for each model: rating, expected win rate against the anchor, games."""
    ratings = columns("rating", "rating low", "rating high", digits=0)
    heads = (Column("model"), *ratings, *columns("win rate (%)", "low", "high", "games"))
    rows = tuple((s.model, s.rating, *s.rating_ci, s.win_rate, *s.win_rate_ci, s.num_games) for s in found.strengths)
    style = f", style controlled ({', '.join(found.style)})" if found.style else ""
    caption = (
        f"Bradley-Terry strengths{style}; win rates are against {found.anchor}, whose rating is 1000 by definition; low "
        f"and high bound 95 % intervals (jackknife over questions); {found.num_missing} games have no verdict."
    )
    reasons = {("", ""): "the questions are too few for a jackknife"}
    reasons |= {
        (found.anchor, name): "the anchor, whose rating and win rate are fixed"
        for name in ("rating low", "rating high", "low", "high")
    }
    return Table(heads, rows, caption, reasons)


def arena_table(scores: Sequence[ArenaScore]) -> Table:
    """A row for each model: Arena-Hard's score with its interval."""
    heads = columns("model", "score (%)", "low", "high", "games", "missing")
    reasons = {("", ""): _ONE_QUESTION, ("", "score (%)"): "no question has a verdict in both orders"}
    caption = "Arena-Hard scores; low and high bound 95 % intervals (score intervals over questions)."
    return Table(heads, tuple((s.model, s.score, *s.ci, s.num_games, s.num_missing) for s in scores), caption, reasons)


def mt_bench_table(scores: Sequence[MTBench]) -> Table:
    """A row for each model: the mean, each turn's, each category's."""
    turns = sorted({turn for score in scores for turn in score.turns})
    categories = sorted({name for score in scores for name in score.categories})
    parts = (*(f"turn {turn}" for turn in turns), *(f"category {name}" for name in categories))
    heads = columns("model", "mean", "low", "high", *parts, "missing")
    rows: list[tuple[Cell, ...]] = []
    for score in scores:
        means = {f"turn {turn}": one.mean for turn, one in score.turns.items()}
        means |= {f"category {name}": one.mean for name, one in score.categories.items()}
        rows.append((score.model, score.overall.mean, *score.overall.ci, *map(means.get, parts), score.overall.num_missing))
    return Table(
        heads,
        tuple(rows),
        "Mean ratings, at most 10; low and high bound the mean's 95 % interval (score interval over questions).",
        {("", "low"): _ONE_QUESTION, ("", "high"): _ONE_QUESTION, ("", ""): "no rating of it"},
    )


def win_matrix_table(matrix: WinMatrix) -> Table:
    """A row and a column for each model: how often the row's is preferred to the column's."""
    heads = (Column("model"), *columns(*(f"vs {name}" for name in matrix.models), digits=1))
    rows = tuple((name, *row) for name, row in zip(matrix.models, matrix.rates.tolist(), strict=True))
    missing = int(matrix.num_missing.sum()) // 2
    caption = f"Win rate of the row's model in percent; {missing} questions don't count for want of a verdict."
    reasons = {("", ""): "the two never met, or no question of theirs counts"}
    reasons |= {(name, f"vs {name}"): "a model does not meet itself" for name in matrix.models}
    return Table(heads, rows, caption, reasons)


def comparison_table(comparisons: Mapping[str, PairedComparison]) -> Table:
    """A row for each measure: two models on the same questions, their difference, its interval and p-value."""
    heads = (*columns("measure", "before", "after", "difference", "low", "high"), Column("p", 4))
    corrected = holm([comparison.p_value for comparison in comparisons.values()])
    rows = tuple(
        (name, c.mean_before, c.mean_after, c.difference, *c.ci_difference, p)
        for (name, c), p in zip(comparisons.items(), corrected, strict=True)
    )
    caption = (
        "Paired by question; low and high bound the difference's 95 % interval (score interval); p is a permutation test's"
        + (f", Holm's of {len(rows)} tests." if len(rows) > 1 else ".")
    )
    return Table(heads, rows, caption, {("", ""): "all values are one and the same"})


def judge_table(place: PositionBias, length: LengthBias | None, agreement: Agreement | None) -> Table:
    """Measures of a judge, a row each; the caption says in words how it is biased."""
    rows: list[tuple[Cell, ...]] = [
        ("answer shown first preferred (%)", place.first_place),
        ("95 % interval's low bound", place.ci[0]),
        ("95 % interval's high bound", place.ci[1]),
        ("p-value of no position bias", place.p_value),
        ("orders contradict each other (%)", place.contradictions),
        ("one order a tie, the other not (%)", place.half_contradictions),
        ("questions judged in both orders", place.num_pairs),
        ("questions that lack an order", place.num_incomplete),
    ]
    if length is not None:
        rows += [
            ("longer answer preferred (%)", length.longer_preferred),
            ("correlation with length", length.correlation),
            ("rank correlation with length", length.rank_correlation),
            ("p-value of no relation to length", length.p_value),
        ]
    if agreement is not None:
        rows += [
            ("agreement with the second judge (%)", agreement.agreement),
            ("agreement without ties (%)", agreement.agreement_without_ties),
            ("Cohen's kappa", agreement.kappa),
            ("games both judged", agreement.num_counted),
        ]
    caption = place.summary if length is None else f"{place.summary}. {length.summary}"
    reasons = {(str(name), ""): "no question was judged in both orders" for name, _ in rows[:8]}
    reasons |= {(str(name), ""): "verdicts, or lengths, do not vary" for name, _ in rows[8:]}
    reasons |= (
        {("95 % interval's low bound", ""): _ONE_QUESTION, ("95 % interval's high bound", ""): _ONE_QUESTION}
        if place.num_pairs
        else {}
    )
    return Table((Column("the judge"), Column("value", 3)), tuple(rows), caption, reasons)

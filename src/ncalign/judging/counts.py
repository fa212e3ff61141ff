"""From verdicts to results: win rates, strengths, what the judge is like, ratings; tables and charts of them, written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.core.atomic import write_json_atomic, write_jsonl_atomic
from ncalign.core.errors import MissingPackageError
from ncalign.core.json import json_ready
from ncalign.core.outputs import renew
from ncalign.judging.records import Answer, Answers
from ncalign.judging.summaries import (
    arena_table,
    comparison_table,
    judge_table,
    length_control_words,
    mt_bench_table,
    strength_table,
    win_matrix_table,
    win_rate_table,
)
from ncalign.report.charts import category_chart, interval_chart, matrix_chart, write_chart
from ncalign.report.evaluation_page import READINGS, write_evaluation_page
from ncalign.report.html import PAGE
from ncalign.report.tables import Table, to_text, write_table
from ncalign.rewards.verdicts import Account
from ncalign.stats.agreement import judge_agreement, length_bias, position_bias
from ncalign.stats.arena_hard import arena_hard_scores
from ncalign.stats.bradley_terry import bradley_terry
from ncalign.stats.intervals import Bounds
from ncalign.stats.length_control import DifficultyTable, LengthControlled, length_controlled_win_rate
from ncalign.stats.missing import MissingShares, missing_by_model, missing_by_order
from ncalign.stats.mt_bench import HIGHEST, LOWEST, mt_bench, question_scores
from ncalign.stats.paired import PairedComparison, paired_comparison, paired_values
from ncalign.stats.preferences import QuestionPreferences, complete_games, question_preferences
from ncalign.stats.records import Game, Rating
from ncalign.stats.style import Style, style_of
from ncalign.stats.win_rate import win_matrix, win_rate

_FEWEST_FOR_LENGTH_CONTROL = 20


@dataclass(frozen=True)
class Counting:
    """How verdicts are counted.

    Attributes:
        seed: of permutations.
        num_resamples: how many.
        difficulties: AlpacaEval's table, for its length-controlled win rate.
        places: each question's place in the set, by which the table is read.
        other_judge: games of a second judge, for the agreement of the two.
    """

    seed: int
    num_resamples: int
    difficulties: DifficultyTable | None = None
    places: Mapping[str, int] = field(default_factory=dict)
    other_judge: Sequence[Game] | None = None


@dataclass
class Results:
    """Results of an evaluation, before they are written.

    Attributes:
        values: by name, as results.json has them.
        tables: by file name.
        charts: figures by file name.
        lines: sentences for the terminal.
        comparisons: of two models on the same questions, by what is compared.
        readings: pairs of answers with what was said of them, as :mod:`ncalign.judging.readings` makes them.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    comparisons: dict[str, PairedComparison] = field(default_factory=dict)
    readings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: object, table: Table) -> None:
        """Add a result with its table."""
        self.values[name], self.tables[name] = value, table


AT_THE_END = ("results.json", READINGS, "tables", "win_matrix.png", "win_rates.png", "ratings.png", PAGE)
VERDICTS = ("games.jsonl", "ratings.jsonl", "annotations", "arena_hard", "fastchat")
ENTRIES = (*AT_THE_END, *VERDICTS)
"""What an evaluation leaves in its folder, besides what it goes on from."""


def count_games(
    games: Sequence[Game], results: Results, counting: Counting, *, answers: Mapping[str, Answers] | None, ordered: bool
) -> None:
    """Add what games say: win rates, length-controlled ones, strengths, and the judge's biases.

    Args:
        games: of models against one baseline, or several.
        results: added to.
        counting: how verdicts are counted.
        answers: by model and question, for their lengths; None where they are not known.
        ordered: whether the judge saw both orders, so that its position bias is known.

    Raises:
        ValueError: there is no verdict in both orders of any question.
    """
    add_missing("missing_by_model", missing_by_model(games), results)
    if ordered:
        add_missing("missing_by_order", missing_by_order(games), results)
    pairs = list(dict.fromkeys((game.model, game.baseline) for game in games))
    preferences = {
        model: question_preferences([game for game in games if (game.model, game.baseline) == (model, baseline)])
        for model, baseline in pairs
    }
    _add_win_rates(preferences, results, counting, answers, baseline=", ".join(dict.fromkeys(other for _, other in pairs)))
    _compare_models(preferences, results, counting)
    if len(preferences) > 1:
        matrix = win_matrix(games)
        results.add("win_matrix", matrix, win_matrix_table(matrix))
        results.charts["win_matrix.png"] = matrix_chart(matrix)
    if ordered:
        _judge_report(games, answers, counting.other_judge, results)
        _strengths(games, answers, baseline=pairs[0][1], results=results)


def _add_win_rates(
    preferences: Mapping[str, QuestionPreferences],
    results: Results,
    counting: Counting,
    answers: Mapping[str, Answers] | None,
    *,
    baseline: str,
) -> None:
    rates = {name: win_rate(found.preferences) for name, found in preferences.items() if np.isfinite(found.preferences).any()}
    if not rates:
        raise ValueError("there is no verdict in both orders of any question: nothing can be said")
    controlled: dict[str, LengthControlled] = {}
    uncontrolled = dict.fromkeys(rates, "the answers, and so their lengths, are not known")
    try:
        controlled, uncontrolled = ({}, uncontrolled) if answers is None else _controlled(preferences, answers, counting)
    except MissingPackageError as error:
        results.lines.append(f"no length-controlled win rates: {error}")
        uncontrolled = dict.fromkeys(rates, str(error))
    results.lines += [f"{name}: {words}" for name, found in controlled.items() if (words := length_control_words(found))]
    results.values["baseline"] = baseline
    results.add("win_rates", rates, win_rate_table(rates, controlled, baseline=baseline, uncontrolled=uncontrolled))
    results.values["length_controlled"] = controlled
    chart = {"win rate": {name: (rate.win_rate, rate.ci) for name, rate in rates.items()}}
    if controlled:
        whole = all(math.isfinite(found.win_rate) for found in controlled.values())
        measure = "length-controlled" if whole else "length-controlled, where estimable"
        chart[measure] = {name: (found.win_rate, found.ci) for name, found in controlled.items()}
    results.charts["win_rates.png"] = interval_chart(
        chart, title=f"Win rate against {baseline}", unit="%, 95 % intervals", reference=50
    )


def _compare_models(preferences: Mapping[str, QuestionPreferences], results: Results, counting: Counting) -> None:
    """The first model against each other one that met the same baseline, question by question."""
    first, *others = preferences.values()
    pairs = {
        f"win rate against {first.baseline}: {other.model} to {first.model}": (other.by_question, first.by_question)
        for other in others
        if other.baseline == first.baseline
    }
    add_comparisons(pairs, results, counting, bounds=(0.0, 1.0))


def _controlled(
    preferences: Mapping[str, QuestionPreferences], answers: Mapping[str, Answers], counting: Counting
) -> tuple[dict[str, LengthControlled], dict[str, str]]:
    """Length-controlled win rates, where there are verdicts enough and lengths that differ; and why others have none."""
    found, without = {}, {}
    for name, one in preferences.items():
        ours, theirs = (
            np.array([_length(answers[who][question]) for question in one.questions], dtype=np.int64)
            for who in (name, one.baseline)
        )
        judged = int(np.isfinite(one.preferences).sum())
        if judged < _FEWEST_FOR_LENGTH_CONTROL:
            without[name] = f"length control needs {_FEWEST_FOR_LENGTH_CONTROL} questions with a verdict, there are {judged}"
        elif len(set((ours - theirs).tolist())) == 1:
            without[name] = "all answers differ from the baseline's by the same length: there is nothing to control"
        else:
            found[name] = length_controlled_win_rate(
                one.preferences,
                ours,
                theirs,
                table=counting.difficulties,
                questions=[counting.places[question] for question in one.questions],
            )
    return found, without


def _length(answer: Answer) -> int:
    """Characters of an answer, all turns together."""
    return sum(map(len, answer.turns))


def _judge_report(
    games: Sequence[Game], answers: Mapping[str, Answers] | None, other_judge: Sequence[Game] | None, results: Results
) -> None:
    place, length = position_bias(games), None
    if answers is not None:
        lengths = {(q, name): _length(answer) for name, given in answers.items() for q, answer in given.items()}
        length = length_bias(games, lengths)
    agreement = None if other_judge is None else judge_agreement(games, other_judge)
    found = {"position": place, "length": length, "agreement": agreement}
    results.add("judge", found, judge_table(place, length, agreement))
    results.lines += [f"Judge: {bias.summary}." for bias in (place, length) if bias is not None]


def _strengths(games: Sequence[Game], answers: Mapping[str, Answers] | None, *, baseline: str, results: Results) -> None:
    """Arena-Hard's score and Bradley-Terry strengths, with and without style control."""
    complete, _ = complete_games(games)
    arena = arena_hard_scores(complete)
    results.add("arena_hard", arena, arena_table(arena))
    styles: dict[tuple[str, str], Style] = {
        (q, name): style_of("\n".join(answer.turns), sum(answer.num_tokens) or len(" ".join(answer.turns)) // 4)
        for name, given in (answers or {}).items()
        for q, answer in given.items()
    }
    for name, style in (("strengths", None), *((("strengths_style_controlled", styles),) if styles else ())):
        try:
            found = bradley_terry(games, anchor=baseline, styles=style, centered=False)
        except ValueError as error:
            results.lines.append(f"{name.replace('_', ' ')}: {error}")
            continue
        results.add(name, found, strength_table(found))


def count_ratings(ratings: Sequence[Rating], results: Results, counting: Counting) -> None:
    """Add what ratings say: means by turn and category, and models compared question by question."""
    add_missing("missing_by_model", missing_by_model(ratings), results)
    scores = mt_bench(ratings)
    results.add("ratings", scores, mt_bench_table(scores))
    results.charts["ratings.png"] = category_chart(scores)
    first, *others = dict.fromkeys(rating.model for rating in ratings)
    values = question_scores(ratings, first)
    pairs = {f"rating: {other} to {first}": (question_scores(ratings, other), values) for other in others}
    add_comparisons(pairs, results, counting, bounds=(LOWEST, HIGHEST))


def add_comparisons(
    pairs: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]],
    results: Results,
    counting: Counting,
    *,
    bounds: Bounds | None = None,
) -> None:
    """Add comparisons of two models' values by question, before and after, where they share two questions or more.

    Values lie between the bounds; without them, within the range of those seen.
    """
    for name, (before, after) in pairs.items():
        first, second, _ = paired_values(before, after)
        if len(first) >= 2:
            results.comparisons[name] = paired_comparison(
                first, second, bounds=bounds, seed=counting.seed, num_resamples=counting.num_resamples
            )
    if results.comparisons:
        results.add("comparisons", results.comparisons, comparison_table(results.comparisons))


def add_missing(name: str, shares: MissingShares, results: Results) -> None:
    """Add what is missing of each model or order, where something is, and say so where they differ by more than chance."""
    if sum(shares.missing.values()):
        results.values[name] = shares
    if shares.differ:
        results.lines.append(shares.text())


def add_accounts(accounts: Sequence[Account], results: Results) -> None:
    """Add what judging took, and say how many verdicts are missing."""
    missing = sum(sum(account.missing.values()) for account in accounts)
    results.values |= {"verdicts": accounts, "missing_verdicts": missing}
    if missing:
        unanswered = sum(account.missing["no answer"] for account in accounts)
        again = f"; rerun with --overwrite to ask again for the {unanswered} that had no answer" if unanswered else ""
        results.lines.append(f"{missing} verdicts are missing; they are neither losses nor ties{again}")


def write_results(results: Results, folder: Path) -> dict[str, Any]:
    """Write results.json, tables and charts, and return the values, with the tables as printable text under ``text``.

    Those of an earlier evaluation go, also where this one has none of their names.
    """
    renew(folder, AT_THE_END, verb="evaluate", folders=["tables"])
    values = json_ready({**results.values, "notes": results.lines})
    for name, table in results.tables.items():
        for suffix in ("txt", "json", "csv", "tex"):
            write_table(table, folder / "tables" / f"{name}.{suffix}")
    for name, figure in results.charts.items():
        write_chart(figure, folder / name)
    if results.readings:
        write_jsonl_atomic(map(json_ready, results.readings), folder / READINGS)
    write_json_atomic(values, folder / "results.json")
    page = write_evaluation_page(folder)
    parts = [to_text(table).rstrip() for table in results.tables.values()]
    return {**values, "text": "\n\n".join([*parts, *results.lines, f"Results: {folder / 'results.json'}", f"Report: {page}"])}

"""Win rates: one model against a baseline, and many models against each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from ncalign.stats.intervals import Interval, effective_size, mean_interval
from ncalign.stats.preferences import checked_preferences, question_preferences
from ncalign.stats.records import Game


@dataclass(frozen=True)
class WinRate:
    """How often a model is preferred to a baseline.

    Attributes:
        win_rate: mean preference, in percent.
        standard_error: of ``win_rate``, in points; NaN for one question.
        ci: 95 % interval of ``win_rate`` by :func:`ncalign.stats.intervals.mean_interval`; NaN for one question.
        effective_size: how many questions with wins and losses alone would tell as much; NaN for one question.
        discrete_win_rate: percent of questions won, ties counting half.
        num_ties: questions with a preference of exactly 1/2; wins lie above it, losses below.
        num_counted: questions with a verdict; the ``num_missing`` without are left out.
    """

    win_rate: float
    standard_error: float
    ci: Interval
    effective_size: float
    discrete_win_rate: float
    num_wins: int
    num_losses: int
    num_ties: int
    num_counted: int
    num_missing: int


def win_rate(preferences: Float[NDArray[np.float64], " Q"]) -> WinRate:
    """Mean preference in percent: ``100 * sum(p) / n`` over the n questions with a verdict.

    The standard error is ``100 * sd(p) / sqrt(n)`` with n − 1 in the variance.

    Preferences are from 0 (baseline) to 1 (model), and NaN where there is no verdict.

    Raises:
        ValueError: a preference is outside [0, 1], or there is no verdict at all.

    Source: AlpacaEval, ``alpaca_eval.metrics.get_winrate``, whose numbers these are.

    >>> result = win_rate(np.array([1.0, 0.75, 0.5, 0.0, np.nan]))
    >>> result.win_rate, result.discrete_win_rate, result.num_counted, result.num_missing
    (56.25, 62.5, 4, 1)
    """
    checked = checked_preferences(preferences)
    counted = checked[~np.isnan(checked)]
    wins, losses = int((counted > 0.5).sum()), int((counted < 0.5).sum())
    ties = len(counted) - wins - losses
    return WinRate(
        win_rate=float(counted.mean() * 100),
        standard_error=float(counted.std(ddof=1) / np.sqrt(len(counted)) * 100) if len(counted) > 1 else float("nan"),
        ci=mean_interval(100 * counted, bounds=(0.0, 100.0)),
        effective_size=effective_size(counted, bounds=(0.0, 1.0)),
        discrete_win_rate=100 * (wins + ties / 2) / len(counted),
        num_wins=wins,
        num_losses=losses,
        num_ties=ties,
        num_counted=len(counted),
        num_missing=len(checked) - len(counted),
    )


@dataclass(frozen=True)
class WinMatrix:
    """Win rates of every model against every other.

    Attributes:
        models: names of rows and of columns, best mean first.
        rates: ``[M, M]``, percent of questions the row's model is preferred to the column's; NaN where they never met.
        num_counted: ``[M, M]``, questions behind each rate.
        num_missing: ``[M, M]``, questions that were asked and don't count.
    """

    models: tuple[str, ...]
    rates: Float[NDArray[np.float64], "M M"]
    num_counted: NDArray[np.int64]
    num_missing: NDArray[np.int64]


def win_matrix(games: Iterable[Game], *, both_orders: bool = True) -> WinMatrix:
    """Win rates of all pairs of models that met, as :func:`win_rate` computes them.

    The games of one pair may name either as the model; the two halves of the matrix add up to 100. Rows are sorted by their
    mean rate over the opponents they met. ``both_orders`` is as in :func:`question_preferences`.

    Raises:
        ValueError: there are no games, or a model meets itself.
    """
    by_pair: dict[tuple[str, str], list[Game]] = defaultdict(list)
    for game in games:
        first, second = sorted((game.model, game.baseline))
        if first == second:
            raise ValueError(f"question {game.question!r}: {first} is compared with itself")
        by_pair[first, second].append(game if game.model == first else _turned(game))
    if not by_pair:
        raise ValueError("there are no games: a win matrix needs judged answers of at least two models")
    names = sorted({name for pair in by_pair for name in pair})
    place = {name: i for i, name in enumerate(names)}
    rates = np.full((len(names), len(names)), np.nan)
    counted, missing = np.zeros(rates.shape, dtype=np.int64), np.zeros(rates.shape, dtype=np.int64)
    for (first, second), group in by_pair.items():
        preferences = question_preferences(group, both_orders=both_orders).preferences
        i, j = place[first], place[second]
        known = preferences[~np.isnan(preferences)]
        counted[i, j] = counted[j, i] = len(known)
        missing[i, j] = missing[j, i] = len(preferences) - len(known)
        if len(known):
            rates[i, j], rates[j, i] = 100 * known.mean(), 100 * (1 - known.mean())
    met = ~np.isnan(rates)
    # A model whose verdicts are all missing comes last.
    means = np.where(met.any(axis=1), np.where(met, rates, 0).sum(axis=1) / np.maximum(met.sum(axis=1), 1), -1)
    order = np.argsort(-means, kind="stable")
    grid = np.ix_(order, order)
    return WinMatrix(tuple(names[i] for i in order), rates[grid], counted[grid], missing[grid])


def _turned(game: Game) -> Game:
    """The same judgement with model and baseline exchanged, and without its label, which names the places of before."""
    preference = None if game.preference is None else 1 - game.preference
    return Game(game.question, game.baseline, game.model, not game.model_first, preference, game.weight)

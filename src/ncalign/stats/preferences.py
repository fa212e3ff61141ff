"""From judged games to a preference for each question: orders put together, missing verdicts counted and left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from ncalign.stats.records import Game


@dataclass(frozen=True)
class QuestionPreferences:
    """How one model fared against one baseline, question by question.

    Attributes:
        model: whose answers are measured.
        baseline: whose they are measured against.
        questions: ids, in the order in which they were met first.
        preferences: 1 where the model's answer is better, 0 where the baseline's is; NaN where the question doesn't count.
        one_order: questions with a verdict in one order alone, where both are needed; they don't count.
        missing: questions without any verdict.
    """

    model: str
    baseline: str
    questions: tuple[str, ...]
    preferences: Float[NDArray[np.float64], " Q"]
    one_order: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def by_question(self) -> dict[str, float]:
        """Preferences by question, as :func:`ncalign.stats.paired.paired_values` takes them."""
        return dict(zip(self.questions, self.preferences.tolist(), strict=True))


def question_preferences(games: Iterable[Game], *, both_orders: bool = True) -> QuestionPreferences:
    """Average each question's games: those of one order first, then the two orders.

    A game without a verdict is left out; it is neither a loss nor a tie. Game weights are not used here.

    Args:
        games: of one model against one baseline.
        both_orders: a question counts where there is a verdict in each order; else one order is enough.

    Raises:
        ValueError: there are no games, they are of more than one pair, or a preference is outside [0, 1].

    >>> forth = Game("q1", "new", "old", model_first=True, preference=1.0)
    >>> back = Game("q1", "new", "old", model_first=False, preference=0.0)
    >>> question_preferences([forth, back]).preferences.tolist()  # the first place won twice
    [0.5]
    """
    by_question: dict[str, dict[bool, list[float]]] = {}
    pairs = set()
    for game in games:
        pairs.add((game.model, game.baseline))
        orders = by_question.setdefault(game.question, {True: [], False: []})
        if game.preference is not None:
            orders[game.model_first].append(checked_preference(game))
    if len(pairs) != 1:
        raise ValueError(
            f"games of one model against one baseline are needed; there are {len(pairs)} pairs: {sorted(pairs)[:3]}"
        )
    preferences, one_order, missing = [], [], []
    for question, orders in by_question.items():
        means = [float(np.mean(values)) for values in orders.values() if values]
        if not means:
            missing.append(question)
        elif both_orders and len(means) == 1:
            one_order.append(question)
        counts = len(means) == 2 or (means and not both_orders)
        preferences.append(float(np.mean(means)) if counts else float("nan"))
    ((model, baseline),) = pairs
    return QuestionPreferences(model, baseline, tuple(by_question), np.array(preferences), tuple(one_order), tuple(missing))


def from_alpaca_eval(values: Sequence[float | None]) -> Float[NDArray[np.float64], " Q"]:
    """Preferences of AlpacaEval's files, where 1 is the baseline and 2 the model, on our scale from 0 to 1.

    A tie is 1.5, or 0 in old files. None and NaN are missing and become NaN.

    Raises:
        ValueError: a value is neither 0, nor in [1, 2], nor missing; the message says in which row, from 1.

    >>> from_alpaca_eval([1, 2.0, 1.25, 0, None]).tolist()
    [0.0, 1.0, 0.25, 0.5, nan]
    """
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    bad = np.flatnonzero(~(np.isnan(array) | (array == 0) | ((array >= 1) & (array <= 2))))
    if len(bad):
        raise ValueError(
            f"row {bad[0] + 1} has the preference {array[bad[0]]:g}: 1 (the baseline is better) to 2 (the model is), "
            "0 for a tie, or null where there is no verdict is needed"
        )
    return np.where(array == 0, 1.5, array) - 1


def complete_games(games: Iterable[Game]) -> tuple[list[Game], int]:
    """The games of questions that have a verdict in both orders, and how many questions were left out.

    A question counts once for each pair of models. This is how Arena-Hard treats missing verdicts.
    """
    by_pair: dict[tuple[str, str, str], list[Game]] = defaultdict(list)
    for game in games:
        by_pair[game.question, game.model, game.baseline].append(game)
    kept, dropped = [], 0
    for group in by_pair.values():
        judged = [game for game in group if game.preference is not None]
        if {game.model_first for game in judged} == {True, False}:
            kept.extend(judged)
        else:
            dropped += 1
    return kept, dropped


def checked_preference(game: Game) -> float:
    """The game's preference.

    Raises:
        ValueError: it is missing or outside [0, 1].
    """
    if game.preference is None or not 0 <= game.preference <= 1:
        raise ValueError(
            f"question {game.question!r}, {game.model} against {game.baseline}: the preference is {game.preference}; "
            "a number from 0 (the baseline is better) to 1 (the model is) is needed"
        )
    return float(game.preference)


def checked_preferences(values: Float[NDArray[np.float64], " Q"]) -> Float[NDArray[np.float64], " Q"]:
    """One preference for each question, NaN where it is missing.

    Raises:
        ValueError: the array is not one-dimensional, holds a value outside [0, 1], or nothing but NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"preferences have the shape {array.shape}; one for each question is needed")
    bad = np.flatnonzero(~(np.isnan(array) | ((array >= 0) & (array <= 1))))
    if len(bad):
        raise ValueError(
            f"preference {bad[0] + 1} is {array[bad[0]]:g}; 0 (the baseline is better) to 1 (the model is), or NaN where it is "
            "missing, is needed; AlpacaEval's values from 1 to 2 are read by from_alpaca_eval"
        )
    if np.isnan(array).all():
        raise ValueError(f"none of {len(array)} questions has a verdict: there is nothing to average")
    return array


def question_places(games: Sequence[Game]) -> Int[NDArray[np.int64], " N"]:
    """For each game the number of its question, in the order in which questions are met."""
    places: dict[str, int] = {}
    return np.array([places.setdefault(game.question, len(places)) for game in games], dtype=np.int64)

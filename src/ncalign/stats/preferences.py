"""From judged games to one preference for each question: both orders are averaged, missing verdicts counted and left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from ncalign.stats.records import Game

Key = TypeVar("Key", bound=Hashable)


def mean_preferences(games: Iterable[Game], key: Callable[[Game], Key]) -> dict[Key, float]:
    """Mean preference of the games that share a key; NaN where none of them has a verdict."""
    verdicts: dict[Key, list[float]] = {}
    for game in games:
        found = verdicts.setdefault(key(game), [])
        if game.preference is not None:
            found.append(game.preference)
    return {shared: float(np.mean(found)) if found else float("nan") for shared, found in verdicts.items()}


def order_preferences(games: Iterable[Game]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """By question, model and baseline: the mean preference where the model was shown first, and where it was shown second.

    NaN where an order has no verdict.
    """
    means = mean_preferences(games, lambda game: (game.question, game.model, game.baseline, game.model_first))
    pairs = dict.fromkeys(key[:3] for key in means)
    nan = float("nan")
    return {pair: (means.get((*pair, True), nan), means.get((*pair, False), nan)) for pair in pairs}


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
        ValueError: there are no games, or they are of more than one pair.

    >>> forth = Game("q1", "new", "old", model_first=True, preference=1.0)
    >>> back = Game("q1", "new", "old", model_first=False, preference=0.0)
    >>> question_preferences([forth, back]).preferences.tolist()  # the first place won twice
    [0.5]
    """
    orders = order_preferences(games)
    pairs = {key[1:] for key in orders}
    if len(pairs) != 1:
        raise ValueError(
            f"games of one model against one baseline are needed; there are {len(pairs)} pairs: {sorted(pairs)[:3]}"
        )
    values = np.array(list(orders.values()))
    questions = [question for question, _, _ in orders]
    num_orders = (~np.isnan(values)).sum(axis=1)
    counts = num_orders >= (2 if both_orders else 1)
    preferences = np.full(len(values), np.nan)
    preferences[counts] = np.nanmean(values[counts], axis=1)
    ((model, baseline),) = pairs
    return QuestionPreferences(
        model,
        baseline,
        tuple(questions),
        preferences,
        one_order=tuple(q for q, num in zip(questions, num_orders, strict=True) if num == 1 and both_orders),
        missing=tuple(q for q, num in zip(questions, num_orders, strict=True) if num == 0),
    )


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
        by_pair[game.question, game.model, game.baseline] += [] if game.preference is None else [game]
    complete = [group for group in by_pair.values() if {game.model_first for game in group} == {True, False}]
    return [game for group in complete for game in group], len(by_pair) - len(complete)


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


def verdict_arrays(games: Sequence[Game]) -> tuple[Float[NDArray[np.float64], " N"], Float[NDArray[np.float64], " N"]]:
    """Preferences and weights of games with a verdict."""
    return (
        np.array([game.preference for game in games], dtype=np.float64),
        np.array([game.weight for game in games], dtype=np.float64),
    )


def numbered(keys: Iterable[Hashable]) -> Int[NDArray[np.int64], " N"]:
    """Equal keys by the same number, from 0, in the order in which they were met.

    >>> numbered(["b", "a", "b"]).tolist()
    [0, 1, 0]
    """
    places: dict[Hashable, int] = {}
    return np.array([places.setdefault(key, len(places)) for key in keys], dtype=np.int64)

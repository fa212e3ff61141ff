"""Bradley-Terry strengths of many models from games, with bootstrap intervals and control for style."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from ncalign.stats.intervals import Interval, Resample, quantile_interval, resampled_counts
from ncalign.stats.preferences import checked_preference, question_places
from ncalign.stats.records import Game
from ncalign.stats.style import FEATURES, Style, style_differences

Array = NDArray[np.float64]

ELO_SCALE = 400 / np.log(10)
ANCHOR_RATING = 1000.0
# Log-odds that fewer than a million games can't tell from infinity.
_LARGEST_LOG_ODDS = 15.0
_MAX_NEWTON_STEPS = 100
_MAX_HALVINGS = 30


@dataclass(frozen=True)
class Strength:
    """One model's place.

    Attributes:
        model: its name.
        rating: on Elo's scale, the anchor having 1000.
        rating_ci: bootstrap interval of ``rating``.
        win_rate: percent of games it is expected to win against the anchor, ties counting half.
        win_rate_ci: bootstrap interval of ``win_rate``.
        num_games: games with a verdict that it took part in.
    """

    model: str
    rating: float
    rating_ci: Interval
    win_rate: float
    win_rate_ci: Interval
    num_games: int


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths of all models.

    Attributes:
        strengths: best first; the anchor is among them.
        anchor: the model that the others are measured against.
        style: log-odds that one standard deviation of each style difference is worth, without those that never differ; empty
            without style control.
        num_games: games with a verdict.
        num_missing: games without, which count nowhere.
        num_failed_rounds: bootstrap rounds whose draw allowed no finite fit; the intervals rest on the others.
    """

    strengths: tuple[Strength, ...]
    anchor: str
    style: Mapping[str, float]
    num_games: int
    num_missing: int
    num_failed_rounds: int


def bradley_terry(
    games: Iterable[Game],
    *,
    anchor: str,
    styles: Mapping[tuple[str, str], Style] | None = None,
    centered: bool = True,
    ridge: float = 0.0,
    resample: Resample = "questions",
    num_rounds: int = 100,
    quantiles: tuple[float, float] = (0.05, 0.95),
    seed: int = 0,
) -> BradleyTerry:
    """Maximise ``sum_g w_g (p_g log s(z_g) + (1 - p_g) log s(-z_g)) - ridge / 2 |theta|^2`` over strengths.

    ``z = theta_model - theta_baseline + style_g . gamma`` and s is the sigmoid; a tie is a preference of 1/2, a strong verdict
    counts with its weight. The anchor's theta is 0. Ratings are ``1000 + 400 / ln 10 * theta``, win rates ``100 * s(theta)``.

    Style differences (:func:`style_differences`) are divided by their standard deviation over games, and their mean is taken
    away as Arena-Hard does. Then a win rate is that at the average difference: with few models, all of which write more than
    the baseline, that hides what style is worth. ``centered=False`` keeps 0 where both answers look alike.

    Args:
        games: of any pairs; those without a verdict are counted and left out.
        anchor: the model whose rating is 1000.
        styles: of each answer, by question and model; None for no style control.
        centered: see above.
        ridge: L2 penalty; needed where a model won all its games or lost them all.
        resample: what a bootstrap round draws: questions, whose games stay together, or single games as Arena-Hard does.
        num_rounds: bootstrap rounds; 0 for no intervals (NaN).
        quantiles: of the rounds that bound the intervals. Arena-Hard takes 5 % and 95 %.
        seed: of the bootstrap.

    Raises:
        ValueError: there are no verdicts, the anchor did not play, an answer's style is missing, or the games don't determine
            finite strengths.

    Source: Bradley and Terry, 1952; Arena-Hard-Auto, ``utils/math_utils.py``.
    """
    every = list(games)
    judged = [game for game in every if game.preference is not None]
    names = sorted({name for game in judged for name in (game.model, game.baseline)})
    if anchor not in names:
        raise ValueError(f"the anchor {anchor!r} has no game with a verdict; {len(judged)} games are of {names[:5]}")
    first, second, outcomes, weights = _arrays(judged, names)
    if ridge == 0:
        _check_determined(names, first, second, outcomes, weights)
    free = [i for i, name in enumerate(names) if name != anchor]
    design = (_one_hot(first, len(names)) - _one_hot(second, len(names)))[:, free]
    controlled: list[str] = []
    if styles is not None:
        style_columns, controlled = _standardized(_style_rows(judged, styles), weights, centered)
        design = np.hstack([design, style_columns])
    theta = fit_bradley_terry(design, outcomes, weights, ridge=ridge)
    if theta is None:
        raise ValueError(
            "the games don't determine finite strengths: style tells all verdicts apart, or can't be told from the models; "
            "give a ridge above 0, or leave out style control"
        )
    rounds = _bootstrap(judged, design, outcomes, weights, ridge, resample, num_rounds, seed)
    appearances = np.bincount(np.concatenate([first, second]), minlength=len(names))
    places = {name: i for i, name in enumerate(names[i] for i in free)}
    strengths = [
        _strength(name, places.get(name), theta, rounds, quantiles, int(appearances[i])) for i, name in enumerate(names)
    ]
    return BradleyTerry(
        strengths=tuple(sorted(strengths, key=lambda strength: -strength.rating)),
        anchor=anchor,
        style=dict(zip(controlled, theta[len(free) :].tolist(), strict=True)),
        num_games=len(judged),
        num_missing=len(every) - len(judged),
        num_failed_rounds=num_rounds - len(rounds),
    )


def fit_bradley_terry(
    design: Float[Array, "N P"], outcomes: Float[Array, " N"], weights: Float[Array, " N"], *, ridge: float = 0.0
) -> Float[Array, " P"] | None:
    """Maximum likelihood of a logistic regression without intercept, by Newton steps; None where no finite one exists.

    Args:
        design: a row for each game.
        outcomes: in [0, 1].
        weights: not negative.
        ridge: L2 penalty.
    """
    theta = np.zeros(design.shape[1])
    tolerance = 1e-11 * max(1.0, float(weights.sum()))

    def objective(at: Array) -> float:
        logits = design @ at
        return float(weights @ (np.logaddexp(0, logits) - outcomes * logits) + ridge / 2 * at @ at)

    value = objective(theta)
    for _ in range(_MAX_NEWTON_STEPS):
        chances = expit(design @ theta)
        gradient = design.T @ (weights * (chances - outcomes)) + ridge * theta
        if np.abs(gradient).max(initial=0) <= tolerance:
            break
        hessian = (design.T * (weights * chances * (1 - chances))) @ design + ridge * np.eye(len(theta))
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            return None
        for halving in range(_MAX_HALVINGS):
            candidate = theta - 0.5**halving * step
            reached = objective(candidate)
            # Rounding may raise the objective in its last digits near the minimum.
            if reached <= value + 1e-14 * abs(value):
                break
        else:
            break
        theta, value = candidate, reached
        if ridge == 0 and np.abs(theta).max() > 2 * _LARGEST_LOG_ODDS:
            return None
    if not np.isfinite(theta).all() or (ridge == 0 and np.abs(theta).max(initial=0) > _LARGEST_LOG_ODDS):
        return None
    return theta


def _arrays(
    games: Sequence[Game], names: Sequence[str]
) -> tuple[Int[NDArray[np.int64], " N"], Int[NDArray[np.int64], " N"], Array, Array]:
    place = {name: i for i, name in enumerate(names)}
    for game in games:
        if game.model == game.baseline:
            raise ValueError(f"question {game.question!r}: {game.model} is compared with itself")
    return (
        np.array([place[game.model] for game in games], dtype=np.int64),
        np.array([place[game.baseline] for game in games], dtype=np.int64),
        np.array([checked_preference(game) for game in games]),
        np.array([game.weight for game in games], dtype=np.float64),
    )


def _one_hot(places: NDArray[np.int64], size: int) -> Array:
    rows = np.zeros((len(places), size))
    rows[np.arange(len(places)), places] = 1
    return rows


def _check_determined(
    names: Sequence[str], first: NDArray[np.int64], second: NDArray[np.int64], outcomes: Array, weights: Array
) -> None:
    """Ford's condition: from every model a chain of games not wholly lost leads to every other."""
    gains = np.concatenate([weights * outcomes, weights * (1 - outcomes)])
    ends = (np.concatenate([first, second]), np.concatenate([second, first]))
    graph = coo_array((gains, ends), shape=(len(names), len(names))).tocsr()
    graph.eliminate_zeros()
    num_parts, parts = connected_components(graph, directed=True, connection="strong")
    if num_parts > 1:
        sizes = np.bincount(parts)
        odd = [name for name, part in zip(names, parts, strict=True) if part != sizes.argmax()] or list(names)
        raise ValueError(
            f"the games don't determine finite strengths: {', '.join(odd[:5])} won everything or nothing against the rest, or "
            "never met them; give a ridge above 0, or more games"
        )


def _style_rows(games: Sequence[Game], styles: Mapping[tuple[str, str], Style]) -> Float[Array, "N 4"]:
    for game in games:
        for name in (game.model, game.baseline):
            if (game.question, name) not in styles:
                raise ValueError(
                    f"question {game.question!r}: the style of {name}'s answer is not known; style control needs all"
                )
    return style_differences(
        [styles[game.question, game.model] for game in games], [styles[game.question, game.baseline] for game in games]
    )


def _standardized(rows: Float[Array, "N 4"], weights: Array, centered: bool) -> tuple[Array, list[str]]:
    """The features that differ at all, in standard deviations, and their names; a constant one would have no coefficient."""
    mean = np.average(rows, axis=0, weights=weights)
    spread: Array = np.sqrt(weights @ (rows - mean) ** 2 / max(weights.sum() - 1, 1))
    varied = np.ptp(rows, axis=0) > 0
    shifted = rows - mean if centered else rows
    names = [name for name, differs in zip(FEATURES, varied, strict=True) if differs]
    return np.asarray(shifted[:, varied] / spread[varied]), names


def _bootstrap(
    games: Sequence[Game],
    design: Array,
    outcomes: Array,
    weights: Array,
    ridge: float,
    resample: Resample,
    num_rounds: int,
    seed: int,
) -> Float[Array, "R P"]:
    """Coefficients of the rounds that allowed a fit."""
    units = question_places(games) if resample == "questions" else np.arange(len(games))
    num_units = int(units.max()) + 1
    rng = np.random.default_rng(seed)
    # Games with equal rows are one row for the fit.
    rows, place = np.unique(design, axis=0, return_inverse=True)
    place = place.reshape(-1)
    found = []
    for _ in range(num_rounds):
        drawn = weights * resampled_counts(num_units, rng)[units].astype(np.float64)
        total = np.asarray(np.bincount(place, weights=drawn, minlength=len(rows)), dtype=np.float64)
        won = np.bincount(place, weights=drawn * outcomes, minlength=len(rows))
        met = total > 0
        theta = fit_bradley_terry(rows[met], won[met] / total[met], total[met], ridge=ridge)
        if theta is not None:
            found.append(theta)
    return np.array(found).reshape(len(found), design.shape[1])


def _strength(
    name: str,
    column: int | None,
    theta: Array,
    rounds: Float[Array, "R P"],
    quantiles: tuple[float, float],
    num_games: int,
) -> Strength:
    """The anchor, which has no column, is 0 in every round."""
    value = 0.0 if column is None else float(theta[column])
    drawn = np.zeros(len(rounds)) if column is None else rounds[:, column]
    low, high = quantile_interval(drawn, quantiles) if len(drawn) else (float("nan"), float("nan"))
    return Strength(
        model=name,
        rating=ANCHOR_RATING + float(ELO_SCALE) * value,
        rating_ci=(ANCHOR_RATING + float(ELO_SCALE) * low, ANCHOR_RATING + float(ELO_SCALE) * high),
        win_rate=100 * float(expit(value)),
        win_rate_ci=(100 * float(expit(low)), 100 * float(expit(high))),
        num_games=num_games,
    )

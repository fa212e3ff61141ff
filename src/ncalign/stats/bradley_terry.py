"""Bradley-Terry strengths of many models from games, with bootstrap intervals and control for style."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from ncalign.stats.intervals import DEFAULT_BOOTSTRAP, Bootstrap, Interval, quantile_interval, resampled_counts
from ncalign.stats.logistic import fit_logistic
from ncalign.stats.preferences import verdict_arrays
from ncalign.stats.records import Game
from ncalign.stats.style import FEATURES, Style, style_differences

Array = NDArray[np.float64]

ELO_SCALE = 400 / math.log(10)
ANCHOR_RATING = 1000.0
# Log-odds that fewer than a million games can't tell from infinity.
_LARGEST_LOG_ODDS = 15.0
# Of a fit that reached its maximum: the gradient, as a share of the games' weight, and the condition of the curvature there.
_LARGEST_GRADIENT, _LARGEST_CONDITION = 1e-8, 1e10


@dataclass(frozen=True)
class Strength:
    """One model's strength.

    Attributes:
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
        num_games: games with a verdict; the ``num_missing`` without count nowhere.
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
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> BradleyTerry:
    """Maximise ``sum_g w_g (p_g log s(z_g) + (1 - p_g) log s(-z_g)) - ridge / 2 |theta|^2`` over strengths.

    ``z = theta_model - theta_baseline + style_g . gamma`` and s is the sigmoid; a tie is a preference of 1/2, a strong verdict
    counts with its weight. The anchor's theta is 0. Ratings are ``1000 + 400 / ln 10 * theta``, win rates ``100 * s(theta)``.

    Style differences (:func:`style_differences`) are divided by their standard deviation over games, and their mean is
    subtracted as in Arena-Hard: a win rate is then that at the average difference. With few models, all of which write more
    than the baseline, that hides the effect of style. ``centered=False`` keeps 0 where both answers look alike.

    Args:
        games: of any pairs; those without a verdict are counted and left out.
        anchor: the model whose rating is 1000.
        styles: of each answer, by question and model; None for no style control.
        centered: see above.
        ridge: needed where a model won all its games or lost them all.
        bootstrap: how the rounds behind the intervals are drawn.

    Raises:
        ValueError: the anchor has no verdict, a style or scikit-learn is missing, or no finite strengths fit the games.

    Source: Bradley and Terry, 1952; Arena-Hard-Auto, ``utils/math_utils.py``.
    """
    every = list(games)
    judged = [game for game in every if game.preference is not None]
    design, names = _pair_columns(judged, anchor)
    outcomes, weights, units = verdict_arrays(judged, bootstrap.resample)
    design, controlled = _with_style(design, judged, styles, weights, centered)
    if ridge == 0:
        _check_connected(judged)
    theta = fit_bradley_terry(design, outcomes, weights, ridge=ridge)
    if theta is None:
        raise ValueError(
            "the games don't determine finite strengths: style separates all verdicts, or can't be told from the models; "
            "give a ridge above 0, or leave out style control"
        )
    draws = resampled_counts(units, bootstrap.num_rounds, bootstrap.seed)
    rounds = _fitted_rounds(design, outcomes, (weights * counts for counts in draws), ridge)
    num_games = Counter(name for game in judged for name in (game.model, game.baseline))
    # The anchor, which has no column, is 0 in every round.
    fitted = {anchor: (0.0, np.zeros(len(rounds)))} | {name: (theta[i], rounds[:, i]) for i, name in enumerate(names)}
    strengths = [
        _strength(name, value, drawn, bootstrap.quantiles, num_games[name]) for name, (value, drawn) in sorted(fitted.items())
    ]
    return BradleyTerry(
        strengths=tuple(sorted(strengths, key=lambda strength: -strength.rating)),
        anchor=anchor,
        style=dict(zip(controlled, theta[len(names) :].tolist(), strict=True)),
        num_games=len(judged),
        num_missing=len(every) - len(judged),
        num_failed_rounds=bootstrap.num_rounds - len(rounds),
    )


def fit_bradley_terry(
    design: Float[Array, "N P"], outcomes: Float[Array, " N"], weights: Float[Array, " N"], *, ridge: float = 0.0
) -> Float[Array, " P"] | None:
    """Maximum likelihood of :func:`fit_logistic` with the L2 penalty ``ridge``; None where no finite one exists."""
    with warnings.catch_warnings():
        # scikit-learn warns where its line search ends in rounding errors, also at a maximum: what it found is examined.
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        theta = fit_logistic(design, outcomes, weights, penalty="l2", inverse_penalty=1 / ridge if ridge else math.inf)
    won = expit(design @ theta)
    gradient = design.T @ (weights * (outcomes - won)) - ridge * theta
    curvature = design.T @ (design * (weights * won * (1 - won))[:, None]) + ridge * np.eye(len(theta))
    flat = np.linalg.cond(curvature) > _LARGEST_CONDITION
    far = ridge == 0 and np.abs(theta).max() > _LARGEST_LOG_ODDS
    return None if flat or far or np.abs(gradient).max() > _LARGEST_GRADIENT * weights.sum() else theta


def _pair_columns(games: Sequence[Game], anchor: str) -> tuple[Float[Array, "N M"], list[str]]:
    """A column for each model but the anchor, by name: 1 in its games as the model, -1 as the baseline."""
    names = sorted({name for game in games for name in (game.model, game.baseline)})
    if anchor not in names:
        raise ValueError(f"the anchor {anchor!r} has no game with a verdict; {len(games)} games are of {names[:5]}")
    for game in games:
        if game.model == game.baseline:
            raise ValueError(f"question {game.question!r}: {game.model} is compared with itself")
    names.remove(anchor)
    columns = [[(game.model == name) - (game.baseline == name) for game in games] for name in names]
    return np.array(columns, dtype=np.float64).T, names


def _check_connected(games: Sequence[Game]) -> None:
    """Ford's condition: from every model a chain of games not wholly lost leads to every other."""
    names = sorted({name for game in games for name in (game.model, game.baseline)})
    place = {name: i for i, name in enumerate(names)}
    gains = np.zeros((len(names), len(names)))
    for game in games:
        assert game.preference is not None
        gains[place[game.model], place[game.baseline]] += game.weight * game.preference
        gains[place[game.baseline], place[game.model]] += game.weight * (1 - game.preference)
    num_parts, parts = connected_components(gains > 0, directed=True, connection="strong")
    if num_parts > 1:
        largest = np.bincount(parts).argmax()
        odd = [name for name, part in zip(names, parts, strict=True) if part != largest]
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


def _with_style(
    design: Array, games: Sequence[Game], styles: Mapping[tuple[str, str], Style] | None, weights: Array, centered: bool
) -> tuple[Array, list[str]]:
    """The design with columns of the style features that vary, in standard deviations, and the names of these."""
    if styles is None:
        return design, []
    rows = _style_rows(games, styles)
    mean = np.average(rows, axis=0, weights=weights)
    spread: Array = np.sqrt(weights @ (rows - mean) ** 2 / max(weights.sum() - 1, 1))
    varied = np.ptp(rows, axis=0) > 0
    shifted = rows - mean if centered else rows
    names = [name for name, differs in zip(FEATURES, varied, strict=True) if differs]
    return np.hstack([design, shifted[:, varied] / spread[varied]]), names


def _fitted_rounds(
    design: Float[Array, "N P"], outcomes: Float[Array, " N"], draws: Iterable[Float[Array, " N"]], ridge: float
) -> Float[Array, "R P"]:
    """Coefficients of the bootstrap rounds that allowed a fit, from each round's weights."""
    # Games with equal rows are one row for the fit.
    rows, place = np.unique(design, axis=0, return_inverse=True)
    place = place.reshape(-1)
    found = []
    for weights in draws:
        total = np.asarray(np.bincount(place, weights=weights, minlength=len(rows)), dtype=np.float64)
        won = np.bincount(place, weights=weights * outcomes, minlength=len(rows))
        met = total > 0
        theta = fit_bradley_terry(rows[met], won[met] / total[met], total[met], ridge=ridge)
        if theta is not None:
            found.append(theta)
    return np.array(found).reshape(len(found), design.shape[1])


def _strength(name: str, theta: float, rounds: Float[Array, " R"], quantiles: tuple[float, float], num_games: int) -> Strength:
    low, high = quantile_interval(rounds, quantiles)
    return Strength(
        model=name,
        rating=ANCHOR_RATING + ELO_SCALE * float(theta),
        rating_ci=(ANCHOR_RATING + ELO_SCALE * low, ANCHOR_RATING + ELO_SCALE * high),
        win_rate=100 * float(expit(theta)),
        win_rate_ci=(100 * float(expit(low)), 100 * float(expit(high))),
        num_games=num_games,
    )

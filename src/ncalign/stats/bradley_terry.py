"""Bradley-Terry strengths of many models from games, with intervals and control for style."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from ncalign.stats.intervals import Interval, normal_arm
from ncalign.stats.logistic import curvature, fit_maximum, jackknife_shifts
from ncalign.stats.preferences import numbered, verdict_arrays
from ncalign.stats.records import Game
from ncalign.stats.style import FEATURES, Style, style_differences

Array = NDArray[np.float64]

ELO_SCALE = 400 / math.log(10)
ANCHOR_RATING = 1000.0


@dataclass(frozen=True)
class Strength:
    """One model's strength.

    Attributes:
        rating: on Elo's scale, the anchor having 1000.
        rating_ci: 95 % interval of ``rating``; NaN for the anchor, whose rating is no estimate, and where it can't be told.
        win_rate: percent of games it is expected to win against the anchor, ties counting half.
        win_rate_ci: 95 % interval of ``win_rate``, likewise.
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
    """

    strengths: tuple[Strength, ...]
    anchor: str
    style: Mapping[str, float]
    num_games: int
    num_missing: int


def bradley_terry(
    games: Iterable[Game],
    *,
    anchor: str,
    styles: Mapping[tuple[str, str], Style] | None = None,
    centered: bool = True,
    ridge: float = 0.0,
) -> BradleyTerry:
    """Maximise ``sum_g w_g (p_g log s(z_g) + (1 - p_g) log s(-z_g)) - ridge / 2 |theta|^2`` over strengths.

    ``z = theta_model - theta_baseline + style_g . gamma`` and s is the sigmoid; a tie is a preference of 1/2, a strong verdict
    counts with its weight. The anchor's theta is 0. Ratings are ``1000 + 400 / ln 10 * theta``, win rates ``100 * s(theta)``.

    An interval is theta plus and minus Student's quantile times its standard error, by the jackknife over questions with all
    their games; the mean and spread of style differences count as known.

    Style differences (:func:`style_differences`) are divided by their standard deviation over games, and their mean is
    subtracted as in Arena-Hard: a win rate is then that at the average difference. With few models, all of which write more
    than the baseline, that hides the effect of style. ``centered=False`` keeps 0 where both answers look alike.

    Args:
        games: of any pairs; those without a verdict are counted and left out.
        anchor: the model whose rating is 1000.
        styles: of each answer, by question and model; None for no style control.
        centered: see above.
        ridge: needed where a model won all its games or lost them all.

    Raises:
        ValueError: the anchor has no verdict, a style or scikit-learn is missing, or no finite strengths fit the games.

    Source: Bradley and Terry, 1952; Arena-Hard-Auto, ``utils/math_utils.py``.
    """
    every = list(games)
    judged = [game for game in every if game.preference is not None]
    design, names = _pair_columns(judged, anchor)
    outcomes, weights = verdict_arrays(judged)
    design, controlled = _with_style(design, judged, styles, weights, centered)
    if ridge == 0:
        _check_connected(judged)
    theta = fit_maximum(design, outcomes, weights, ridge=ridge)
    if theta is None:
        raise ValueError(
            "the games don't determine finite strengths: style separates all verdicts, or can't be told from the models; "
            "give a ridge above 0, or leave out style control"
        )
    arms = _arms(judged, design, outcomes, weights, theta, ridge)
    num_games = Counter(name for game in judged for name in (game.model, game.baseline))
    # The anchor has no column.
    fitted = [(anchor, 0.0, math.nan), *zip(names, theta.tolist(), arms.tolist(), strict=False)]
    strengths = [_strength(name, value, arm, num_games[name]) for name, value, arm in sorted(fitted)]
    return BradleyTerry(
        strengths=tuple(sorted(strengths, key=lambda strength: -strength.rating)),
        anchor=anchor,
        style=dict(zip(controlled, theta[len(names) :].tolist(), strict=True)),
        num_games=len(judged),
        num_missing=len(every) - len(judged),
    )


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


def _arms(
    games: Sequence[Game], design: Float[Array, "N P"], outcomes: Array, weights: Array, theta: Array, ridge: float
) -> Float[Array, " P"]:
    """Half of each coefficient's interval: the jackknife over questions."""
    questions = numbered([game.question for game in games])
    shifts = jackknife_shifts(design, outcomes, weights, questions, theta, ridge=ridge)
    met = np.zeros(shifts.shape, dtype=bool)
    np.logical_or.at(met, questions, design != 0)
    # If all games of a question between two models ended alike, they would be one game with the weight of all.
    together = np.bincount(numbered([(game.question, *sorted((game.model, game.baseline))) for game in games]), weights=weights)
    least = np.linalg.inv(curvature(design, weights, theta, ridge=ridge)).diagonal() * (together**2).sum() / together.sum()
    errors = np.sqrt((shifts**2).sum(axis=0))
    found = zip(errors.tolist(), np.sqrt(least).tolist(), met.sum(axis=0).tolist(), strict=True)
    return np.array([normal_arm(error, least=bound, num=num) for error, bound, num in found])


def _strength(name: str, theta: float, arm: float, num_games: int) -> Strength:
    low, high = theta - arm, theta + arm
    return Strength(
        model=name,
        rating=ANCHOR_RATING + ELO_SCALE * float(theta),
        rating_ci=(ANCHOR_RATING + ELO_SCALE * low, ANCHOR_RATING + ELO_SCALE * high),
        win_rate=100 * float(expit(theta)),
        win_rate_ci=(100 * float(expit(low)), 100 * float(expit(high))),
        num_games=num_games,
    )

"""Arena-Hard's score without style control: a weighted mean of verdicts, bootstrapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ncalign.stats.intervals import Interval, Resample, quantile_interval, resampled_counts
from ncalign.stats.preferences import checked_preference, question_places
from ncalign.stats.records import Game


@dataclass(frozen=True)
class ArenaScore:
    """Arena-Hard's score of one model without style control.

    Attributes:
        model: its name.
        score: mean preference in percent, strong verdicts counting with their weight.
        bootstrap_mean: mean of the bootstrap rounds, which Arena-Hard prints as its score.
        ci: bootstrap interval of ``score``.
        num_games: games with a verdict.
        num_missing: games without.
    """

    model: str
    score: float
    bootstrap_mean: float
    ci: Interval
    num_games: int
    num_missing: int


def arena_hard_scores(
    games: Iterable[Game],
    *,
    resample: Resample = "questions",
    num_rounds: int = 100,
    quantiles: tuple[float, float] = (0.05, 0.95),
    seed: int = 0,
) -> tuple[ArenaScore, ...]:
    """Weighted mean preference of each model against its baseline, ``100 * sum(w p) / sum(w)``, best first.

    Arena-Hard leaves out a question that lacks a verdict in either order: pass what :func:`complete_games` keeps.

    Args:
        games: of any models, each against one baseline.
        resample: as in :func:`bradley_terry`; with ``games`` each game is drawn as often as it counts, as Arena-Hard
            does.
        num_rounds: bootstrap rounds.
        quantiles: of the rounds that bound the intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: there are no games, a model has no verdict, or met two baselines.
    """
    by_model: dict[str, list[Game]] = {}
    for game in games:
        by_model.setdefault(game.model, []).append(game)
    if not by_model:
        raise ValueError("there are no games: a score needs judged answers")
    scores = [_arena_score(model, group, resample, num_rounds, quantiles, seed) for model, group in by_model.items()]
    return tuple(sorted(scores, key=lambda score: -score.score))


def _arena_score(
    model: str, games: Sequence[Game], resample: Resample, num_rounds: int, quantiles: tuple[float, float], seed: int
) -> ArenaScore:
    baselines = {game.baseline for game in games}
    judged = [game for game in games if game.preference is not None]
    if len(baselines) > 1:
        raise ValueError(f"{model} met the baselines {sorted(baselines)[:3]}: one baseline is needed for a score")
    if not judged:
        raise ValueError(f"{model} has no game with a verdict out of {len(games)}")
    weights = np.array([game.weight for game in judged], dtype=np.float64)
    outcomes = np.array([checked_preference(game) for game in judged])
    repeats = weights.astype(np.int64) if resample == "games" else np.ones(len(judged), dtype=np.int64)
    rows = np.repeat(np.arange(len(judged)), repeats)
    units = np.arange(len(rows)) if resample == "games" else question_places(judged)
    rng = np.random.default_rng(seed)
    row_weights = np.ones(len(rows)) if resample == "games" else weights
    rounds = np.array(
        [
            100 * np.average(outcomes[rows], weights=row_weights * resampled_counts(int(units.max()) + 1, rng)[units])
            for _ in range(num_rounds)
        ]
    )
    return ArenaScore(
        model=model,
        score=float(100 * np.average(outcomes, weights=weights)),
        bootstrap_mean=float(rounds.mean()),
        ci=quantile_interval(rounds, quantiles),
        num_games=len(judged),
        num_missing=len(games) - len(judged),
    )

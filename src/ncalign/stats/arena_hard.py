"""Arena-Hard's score without style control: a weighted mean of verdicts, bootstrapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ncalign.stats.intervals import DEFAULT_BOOTSTRAP, Bootstrap, Interval, quantile_interval, resampled_counts
from ncalign.stats.preferences import verdict_arrays
from ncalign.stats.records import Game


@dataclass(frozen=True)
class ArenaScore:
    """Arena-Hard's score of one model without style control.

    Attributes:
        score: mean preference in percent, strong verdicts counting with their weight.
        bootstrap_mean: mean of the bootstrap rounds, which Arena-Hard prints as its score.
        ci: bootstrap interval of ``score``.
        num_games: games with a verdict; ``num_missing`` have none.
    """

    model: str
    score: float
    bootstrap_mean: float
    ci: Interval
    num_games: int
    num_missing: int


def arena_hard_scores(games: Iterable[Game], *, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> tuple[ArenaScore, ...]:
    """Weighted mean preference of each model against its baseline, ``100 * sum(w p) / sum(w)``, best first.

    Arena-Hard leaves out a question that lacks a verdict in either order: pass what :func:`complete_games` keeps.

    Args:
        games: of any models, each against one baseline.
        bootstrap: how rounds are drawn; where they draw games, each game is drawn as often as it counts, as Arena-Hard does.

    Raises:
        ValueError: there are no games, a model has no verdict, or met two baselines.
    """
    by_model: dict[str, list[Game]] = {}
    for game in games:
        by_model.setdefault(game.model, []).append(game)
    if not by_model:
        raise ValueError("there are no games: a score needs judged answers")
    scores = [_arena_score(model, group, bootstrap) for model, group in by_model.items()]
    return tuple(sorted(scores, key=lambda score: -score.score))


def _arena_score(model: str, games: Sequence[Game], bootstrap: Bootstrap) -> ArenaScore:
    baselines = {game.baseline for game in games}
    if len(baselines) > 1:
        raise ValueError(f"{model} met the baselines {sorted(baselines)[:3]}: one baseline is needed for a score")
    judged = [game for game in games if game.preference is not None]
    if not judged:
        raise ValueError(f"{model} has no game with a verdict out of {len(games)}")
    rows = judged if bootstrap.resample == "questions" else [game for game in judged for _ in range(game.weight)]
    outcomes, weights, units = verdict_arrays(rows, bootstrap.resample)
    if bootstrap.resample == "games":
        weights = np.ones(len(rows))
    rounds = np.array(
        [
            100 * np.average(outcomes, weights=weights * counts)
            for counts in resampled_counts(units, bootstrap.num_rounds, bootstrap.seed)
        ]
    )
    return ArenaScore(
        model=model,
        score=float(100 * np.average(outcomes, weights=weights)),
        bootstrap_mean=float(rounds.mean()),
        ci=quantile_interval(rounds, bootstrap.quantiles),
        num_games=len(judged),
        num_missing=len(games) - len(judged),
    )

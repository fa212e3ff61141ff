"""Arena-Hard's score without style control: a weighted mean of verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ncalign.stats.intervals import Interval, mean_interval
from ncalign.stats.preferences import numbered, verdict_arrays
from ncalign.stats.records import Game


@dataclass(frozen=True)
class ArenaScore:
    """Arena-Hard's score of one model without style control.

    Attributes:
        score: mean preference in percent, strong verdicts counting with their weight.
        ci: 95 % interval of ``score``; a question's games stay together. NaN for one question.
        num_games: games with a verdict; ``num_missing`` have none.
    """

    model: str
    score: float
    ci: Interval
    num_games: int
    num_missing: int


def arena_hard_scores(games: Iterable[Game]) -> tuple[ArenaScore, ...]:
    """Weighted mean preference of each model against its baseline, ``100 * sum(w p) / sum(w)``, best first.

    Arena-Hard leaves out a question that lacks a verdict in either order: pass what :func:`complete_games` keeps.

    Args:
        games: of any models, each against one baseline.

    Raises:
        ValueError: there are no games, a model has no verdict, or met two baselines.
    """
    by_model: dict[str, list[Game]] = {}
    for game in games:
        by_model.setdefault(game.model, []).append(game)
    if not by_model:
        raise ValueError("there are no games: a score needs judged answers")
    scores = [_arena_score(model, group) for model, group in by_model.items()]
    return tuple(sorted(scores, key=lambda score: -score.score))


def _arena_score(model: str, games: Sequence[Game]) -> ArenaScore:
    baselines = {game.baseline for game in games}
    if len(baselines) > 1:
        raise ValueError(f"{model} met the baselines {sorted(baselines)[:3]}: one baseline is needed for a score")
    judged = [game for game in games if game.preference is not None]
    if not judged:
        raise ValueError(f"{model} has no game with a verdict out of {len(games)}")
    outcomes, weights = verdict_arrays(judged)
    questions = numbered(game.question for game in judged)
    totals, sizes = (np.bincount(questions, values).astype(np.float64) for values in (weights * outcomes, weights))
    low, high = mean_interval(totals, sizes=sizes, bounds=(0.0, 1.0))
    return ArenaScore(
        model=model,
        score=float(100 * np.average(outcomes, weights=weights)),
        ci=(100 * low, 100 * high),
        num_games=len(judged),
        num_missing=len(games) - len(judged),
    )

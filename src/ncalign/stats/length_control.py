"""Length-controlled win rate: what the win rate would be if both answers were equally long, by AlpacaEval 2's regression."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.special import expit, logit

from ncalign.core.errors import DataError
from ncalign.stats.intervals import NO_INTERVAL, Interval, Z, normal_arm
from ncalign.stats.logistic import curvature, fit_logistic, fit_maximum, jackknife_shifts
from ncalign.stats.preferences import checked_preferences

Array = NDArray[np.float64]

NUM_FOLDS = 5
# AlpacaEval takes scikit-learn's default grid of C, the inverse penalty, and this seed.
_INVERSE_PENALTIES = np.logspace(-4, 4, 10)
_SEED = 123
# Two gamed baselines share this weight.
_BASELINE_WEIGHT = 0.2 / 2
_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


@dataclass(frozen=True)
class DifficultyTable:
    """AlpacaEval's ``df_gamed.csv``: how hard each question is, and the verdicts on baselines told to be brief or wordy.

    Attributes:
        questions: each row's question, counted from 0 in the set's order.
        preferences: of the row, 0 to 1; NaN where there is none, and only the row's difficulty is used.
        length_differences: of the row, in standard deviations.
        difficulties: of the row's question.
        not_gamed: False for the rows of gamed baselines.
    """

    questions: Int[NDArray[np.int64], " R"]
    preferences: Float[Array, " R"]
    length_differences: Float[Array, " R"]
    difficulties: Float[Array, " R"]
    not_gamed: Bool[NDArray[np.bool_], " R"]


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate.

    Attributes:
        win_rate: in percent; NaN where it is not estimable: where the penalty moves it by more than a standard error.
        standard_error: of the predictions' mean over questions, in points, as AlpacaEval gives it. It leaves out the
            uncertainty of the regression: it is 0 without difficulties, where all predictions are the same.
        ci: 95 % interval of the rate by the same regression without penalty; NaN where the verdicts are too one-sided, or too
            much of one kind with length, for that to have a maximum, and where all but one are the same.
        coefficients: of ``length``, ``difficulty`` (where a table was given) and ``model``.
        strength: C, the inverse of the penalty, as cross-validation chose it.
        num_fitted: questions with a verdict.
        num_missing: questions without, for which the regression predicts a preference.
    """

    win_rate: float
    standard_error: float
    ci: Interval
    coefficients: Mapping[str, float]
    strength: float
    num_fitted: int
    num_missing: int


def length_controlled_win_rate(
    preferences: Float[Array, " Q"],
    model_lengths: Int[NDArray[np.int64], " Q"],
    baseline_lengths: Int[NDArray[np.int64], " Q"],
    *,
    table: DifficultyTable | None = None,
    questions: Sequence[int] | None = None,
    regularized: bool = True,
) -> LengthControlled:
    """Mean of ``sigmoid(model + difficulty_q * gamma)``, the fitted preference at equal lengths, in percent.

    The regression is ``p_q ~ sigmoid(model + lambda * tanh(delta_q / sd(delta)) + gamma * difficulty_q)`` with delta the
    baseline's length less the model's, in characters; an L1 penalty, its strength chosen by 5-fold cross-validation of the log
    loss. With a table the gamed baselines' rows take part with weight 0.1 each (``length_controlled_v1``); with
    ``regularized=False`` only its difficulties are used (``length_controlled_noreg``). Without a table there is no difficulty
    term (``length_controlled_minimal``).

    With few questions the penalty pulls the estimate to where the fit begins, as far as to 50 %, whatever the verdicts are. It
    is given where it lies within a standard error of the fit without penalty, or all verdicts are one and the same. The
    interval is that fit's: in log-odds, by the jackknife over questions.

    Args:
        preferences: 0 (baseline) to 1 (model), NaN where there is no verdict.
        model_lengths: of the model's answers, in characters.
        baseline_lengths: of the baseline's.
        table: of difficulties.
        questions: each row's place in the set, from 0; without it the rows are the set in its order.
        regularized: see above.

    Raises:
        ValueError: lengths don't match or all differ alike, under 5 verdicts, a question without difficulty, no scikit-learn.

    Source: Dubois et al., 2024, eq. 2; solver, settings and numbers of ``alpaca_eval.metrics.get_length_controlled_winrate``.
    """
    targets = checked_preferences(preferences)
    known = targets[np.isfinite(targets)]
    if len(known) < NUM_FOLDS:
        raise ValueError(f"{len(known)} questions have a verdict: cross-validation needs at least {NUM_FOLDS}")
    features = _features(model_lengths, baseline_lengths, len(targets), table, questions)
    gamed = _gamed_rows(table if regularized else None, features.shape[1])
    rows, labels, weights = _training_rows(gamed, features, targets)
    inverse_penalty = _chosen_inverse_penalty(rows, labels, weights)
    coefficients = _fit(rows, labels, weights, inverse_penalty, np.random.RandomState(_SEED))
    even = expit(features[:, 1:] @ coefficients[1:])
    free = _without_penalty(rows, labels, weights, features, np.isfinite(targets))
    ci, estimable = NO_INTERVAL, bool(np.ptp(known) == 0)
    if free is not None:
        if _rests_on_more_than_one(known):
            ci = (100 * float(expit(free.log_odds - free.arm)), 100 * float(expit(free.log_odds + free.arm)))
        estimable = bool(abs(logit(even.mean()) - free.log_odds) <= free.arm / Z)
    names = ("length", "model") if table is None else ("length", "difficulty", "model")
    return LengthControlled(
        win_rate=float(even.mean() * 100) if estimable else float("nan"),
        standard_error=float(even.std(ddof=1) / np.sqrt(len(even)) * 100) if estimable else float("nan"),
        ci=ci,
        coefficients=dict(zip(names, coefficients.tolist(), strict=True)),
        strength=inverse_penalty,
        num_fitted=len(known),
        num_missing=len(targets) - len(known),
    )


def _rests_on_more_than_one(verdicts: Array) -> bool:
    """Whether the fit has a maximum whichever one question is left out, as the jackknife does: not if one alone differs."""
    return bool(np.unique(verdicts, return_counts=True)[1].max() < len(verdicts) - 1)


@dataclass(frozen=True)
class _Free:
    """What the fit without penalty gives: the mean preference at equal lengths in log-odds, and half of its 95 % interval."""

    log_odds: float
    arm: float


def _without_penalty(
    rows: Array, labels: Array, weights: Array, features: Array, known: Bool[NDArray[np.bool_], " Q"]
) -> _Free | None:
    """The fit without penalty, whose last rows are those of the questions with a verdict; None where it has no maximum."""
    theta = fit_maximum(rows, labels, weights)
    if theta is None:
        return None
    num_known = int(known.sum())
    # The gamed baselines' rows, which stand first, are no sample.
    units = np.concatenate([np.full(len(rows) - num_known, -1), np.arange(num_known)])
    shifts = jackknife_shifts(rows, labels, weights, units, theta)
    even = expit(features[:, 1:] @ theta[1:])
    mean = float(even.mean())
    # Of the mean: that of its logit is the same over mean (1 - mean).
    slope = np.concatenate([[0.0], (even * (1 - even)) @ features[:, 1:] / len(even)])
    influence = (even - mean) / len(even)
    influence[known] += shifts @ slope
    least = np.sqrt(slope @ np.linalg.solve(curvature(rows, weights, theta), slope))
    error, least = float(np.sqrt(influence @ influence)) / (mean * (1 - mean)), float(least) / (mean * (1 - mean))
    return _Free(float(logit(mean)), normal_arm(error, least=least, num=num_known))


def read_difficulty_table(path: str | Path) -> DifficultyTable:
    """Read a CSV with the columns ``index, preference, std_delta_len, instruction_difficulty, not_gamed_baseline``.

    That is AlpacaEval's ``df_gamed.csv``; other columns are ignored.

    Raises:
        DataError: a column is missing, or a value can't be read; the message names the line.
    """
    columns: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        absent = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if absent:
            raise DataError(
                f"{path}: the columns {', '.join(absent)} are missing; AlpacaEval's df_gamed.csv has {', '.join(_COLUMNS)}"
            )
        for row in reader:
            for name in _COLUMNS:
                columns[name].append(_number(row[name], name, f"{path}:{reader.line_num}"))
    if not columns["index"]:
        raise DataError(f"{path}: there are no rows below the column names")
    arrays = {name: np.array(values) for name, values in columns.items()}
    return DifficultyTable(
        questions=arrays["index"].astype(np.int64),
        preferences=arrays["preference"],
        length_differences=arrays["std_delta_len"],
        difficulties=arrays["instruction_difficulty"],
        not_gamed=arrays["not_gamed_baseline"].astype(bool),
    )


def _number(text: str | None, name: str, place: str) -> float:
    words = {"true": 1.0, "false": 0.0}
    word = (text or "").strip().lower()
    if name == "preference" and word in ("", "nan"):
        return float("nan")
    try:
        value = words[word] if word in words else float(word)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise DataError(f"{place}: {name} is {text!r}; a finite number is needed")
    if name == "preference" and not 0 <= value <= 1:
        raise DataError(f"{place}: the preference is {value:g}; a number from 0 to 1 is needed")
    return value


def _features(
    model_lengths: NDArray[np.int64],
    baseline_lengths: NDArray[np.int64],
    num_questions: int,
    table: DifficultyTable | None,
    questions: Sequence[int] | None,
) -> Array:
    """Columns: tanh of the standardised length difference, the difficulty where there is a table, 1."""
    ours, theirs = np.asarray(model_lengths, dtype=np.float64), np.asarray(baseline_lengths, dtype=np.float64)
    if ours.shape != (num_questions,) or theirs.shape != (num_questions,):
        raise ValueError(
            f"there are {num_questions} preferences, and lengths of {ours.size} and {theirs.size} answers: one of each is "
            "needed for every question, also where there is no verdict"
        )
    difference = theirs - ours
    spread = difference.std(ddof=1)
    if not spread > 0:
        raise ValueError(
            f"every answer is {-difference[0]:g} characters longer than the baseline's: length can't be controlled for"
        )
    columns = [np.tanh(difference / spread)]
    if table is not None:
        columns.append(_difficulties(table, range(num_questions) if questions is None else questions))
        if len(columns[1]) != num_questions:
            raise ValueError(f"questions names {len(columns[1])} places; there are {num_questions} preferences")
    return np.column_stack([*columns, np.ones(num_questions)])


def _difficulties(table: DifficultyTable, questions: Sequence[int]) -> Array:
    # A question's first row counts.
    known = dict(zip(table.questions[::-1].tolist(), table.difficulties[::-1].tolist(), strict=True))
    absent = [question for question in questions if question not in known]
    if absent:
        raise ValueError(
            f"the difficulty table has no row for question {absent[0]} ({len(absent)} are missing); "
            "questions are counted from 0 in the set's order"
        )
    return np.array([known[question] for question in questions])


def _gamed_rows(table: DifficultyTable | None, num_features: int) -> tuple[Array, Array, Array]:
    """Features, preferences and weights of the table's rows with a verdict; none without a table."""
    if table is None:
        return np.zeros((0, num_features)), np.zeros(0), np.zeros(0)
    judged = ~np.isnan(table.preferences)
    features = np.column_stack([np.tanh(table.length_differences), table.difficulties, table.not_gamed])[judged]
    return features, table.preferences[judged], np.where(table.not_gamed[judged], 1.0, _BASELINE_WEIGHT)


def _training_rows(gamed: tuple[Array, Array, Array], features: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Features, preferences and weights of the gamed baselines' rows and of the questions with a verdict."""
    known = ~np.isnan(targets)
    rows, labels, weights = map(
        np.concatenate, zip(gamed, (features[known], targets[known], np.ones(int(known.sum()))), strict=True)
    )
    return rows, labels, weights


def _fit(rows: Array, targets: Array, weights: Array, inverse_penalty: float, seeds: np.random.RandomState) -> Array:
    return fit_logistic(rows, targets, weights, penalty="l1", inverse_penalty=inverse_penalty, seeds=seeds)


def _chosen_inverse_penalty(rows: Array, targets: Array, weights: Array) -> float:
    """The C of the grid with the least mean weighted log loss over folds; the smallest of equals."""
    # scikit-learn's GroupKFold deals the groups out from the last.
    folds = (len(targets) - 1 - np.arange(len(targets))) % NUM_FOLDS
    losses = np.zeros(len(_INVERSE_PENALTIES))
    for fold in range(NUM_FOLDS):
        train, held_out = folds != fold, folds == fold
        # LogisticRegressionCV seeds each fold again, and draws from one generator along the grid.
        seeds = np.random.RandomState(_SEED)
        for i, inverse_penalty in enumerate(_INVERSE_PENALTIES):
            coefficients = _fit(rows[train], targets[train], weights[train], inverse_penalty, seeds)
            guess = np.clip(expit(rows[held_out] @ coefficients), 1e-15, 1 - 1e-15)
            gains = targets[held_out] * np.log(guess) + (1 - targets[held_out]) * np.log(1 - guess)
            losses[i] -= np.mean(weights[held_out] * gains)
    return float(_INVERSE_PENALTIES[int(np.argmin(losses))])

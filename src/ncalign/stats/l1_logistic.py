"""L1-regularised logistic regression on probabilities, by coordinate descent inside Newton steps."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]

_MAX_NEWTON_STEPS = 100
_MAX_SWEEPS = 1000
_MAX_HALVINGS = 20
_MAX_IDLE_STEPS = 10
_SUFFICIENT_DECREASE = 0.01
_RIDGE = 1e-12  # keeps a coordinate's curvature positive
_SMALLEST_MOVE, _LARGEST_MOVE = 1e-12, 10.0


def fit_l1_logistic(
    features: Float[Array, "N F"],
    targets: Float[Array, " N"],
    weights: Float[Array, " N"],
    *,
    strength: float,
    tolerance: float,
    seed: int,
) -> Float[Array, " F"]:
    """Minimise ``|w|_1 + strength * sum_i weights_i * (log(1 + exp(z_i)) - targets_i * z_i)`` with ``z = features @ w``.

    The improved GLMNET algorithm, with the stopping rule, the shrinking of zero coordinates and the random order of
    coordinates that LIBLINEAR has: with scikit-learn's tolerance the result is scikit-learn's (``solver="liblinear"``,
    ``penalty="l1"``, each row given twice, as positive with weight ``targets`` and as negative with ``1 - targets``), where
    it stops early too. With a small tolerance it is the minimum. There is no intercept: give a column of ones.

    Args:
        features: one row for each observation; few columns, as their F x F curvature is formed.
        targets: probabilities in [0, 1].
        weights: of the observations, not negative.
        strength: C, the inverse of the penalty.
        tolerance: the violation of the optimality conditions, relative to that at 0, where the fit stops; divided among the
            rows as LIBLINEAR does.
        seed: of the order in which coordinates are visited.

    Source: Yuan, Ho and Lin, "An Improved GLMNET for L1-regularized Logistic Regression", JMLR 13, 2012, algorithm 2.
    """
    num_features = features.shape[1]
    scale = strength * weights
    positives = int(np.count_nonzero(weights * targets > 0))
    negatives = int(np.count_nonzero(weights * (1 - targets) > 0))
    num_rows = positives + negatives
    stop = tolerance * max(min(positives, negatives), 1) / max(num_rows, 1)
    draws = np.random.RandomState(seed)
    coefficients = np.zeros(num_features)
    order = list(range(num_features))
    logits = np.zeros(len(targets))
    first_violation, last_largest, inner_tolerance, idle = 0.0, np.inf, 1.0, 0
    for step in range(_MAX_NEWTON_STEPS):
        probabilities = expit(logits)
        gradient = features.T @ (scale * (probabilities - targets))
        curvature = (features.T * (scale * probabilities * (1 - probabilities))) @ features
        active, largest, total = _outer_violations(gradient, coefficients, order, last_largest / num_rows)
        if step == 0:
            first_violation = total
        if total <= stop * first_violation or idle >= _MAX_IDLE_STEPS:
            break
        proposal, sweeps, moved = _coordinate_descent(
            gradient, curvature, coefficients, order, active, inner_tolerance * first_violation, num_rows, draws
        )
        idle = 0 if moved else idle + 1
        coefficients, logits = _line_search(features, targets, scale, coefficients, proposal, logits, gradient)
        if sweeps == 1:
            inner_tolerance /= 4
        last_largest = largest
    return coefficients


def _violation(slope: float, coefficient: float) -> float:
    """How far the subgradient ``slope ± 1`` of one coordinate is from 0."""
    if coefficient == 0:
        return max(-(slope + 1), slope - 1, 0.0)
    return abs(slope + 1) if coefficient > 0 else abs(slope - 1)


def _shrinks(slope: float, coefficient: float, margin: float) -> bool:
    """Whether a coordinate at 0 is so far inside the penalty's corner that it may be left out."""
    return coefficient == 0 and abs(slope) <= 1 and slope + 1 > margin and slope - 1 < -margin


def _outer_violations(gradient: Array, coefficients: Array, order: list[int], margin: float) -> tuple[int, float, float]:
    """Moves coordinates that may be left out to the end of ``order``; how many are left, their largest violation, the sum."""
    active, largest, total, place = len(order), 0.0, 0.0, 0
    while place < active:
        j = order[place]
        if _shrinks(gradient[j], coefficients[j], margin):
            active -= 1
            order[place], order[active] = order[active], order[place]
            continue
        violation = _violation(gradient[j], coefficients[j])
        largest, total = max(largest, violation), total + violation
        place += 1
    return active, largest, total


def _coordinate_descent(
    gradient: Array,
    curvature: Array,
    coefficients: Array,
    order: list[int],
    active: int,
    tolerance: float,
    num_rows: int,
    draws: np.random.RandomState,
) -> tuple[Array, int, bool]:
    """Minimises the quadratic model plus the penalty; gives the minimiser, the number of sweeps, and whether anything moved."""
    proposal = coefficients.copy()
    size, last_largest, ever_moved = active, np.inf, False
    sweep = 0
    while sweep < _MAX_SWEEPS:
        for place in range(size):
            # A 32-bit draw scaled to the range, as LIBLINEAR in scikit-learn does it.
            other = place + (int(draws.randint(0, 2**32, dtype=np.uint32)) * (size - place) >> 32)
            order[other], order[place] = order[place], order[other]
        largest, total, place = 0.0, 0.0, 0
        while place < size:
            j = order[place]
            slope = float(gradient[j] + curvature[j] @ (proposal - coefficients) + _RIDGE * (proposal[j] - coefficients[j]))
            if _shrinks(slope, proposal[j], last_largest / num_rows):
                size -= 1
                order[place], order[size] = order[size], order[place]
                continue
            place += 1
            move = _move(slope, float(curvature[j, j]) + _RIDGE, float(proposal[j]))
            if abs(move) < _SMALLEST_MOVE:
                continue
            violation = _violation(slope, proposal[j])
            largest, total, ever_moved = max(largest, violation), total + violation, True
            proposal[j] += float(np.clip(move, -_LARGEST_MOVE, _LARGEST_MOVE))
        sweep += 1
        if total > tolerance:
            last_largest = largest
        elif size == active:
            break
        else:
            # The shrunk coordinates must hold too.
            size, last_largest = active, np.inf
    return proposal, sweep, ever_moved


def _move(slope: float, curvature: float, coefficient: float) -> float:
    """The step to the minimum of one coordinate's quadratic with its penalty: soft thresholding."""
    if slope + 1 < curvature * coefficient:
        return -(slope + 1) / curvature
    if slope - 1 > curvature * coefficient:
        return -(slope - 1) / curvature
    return -coefficient


def _line_search(
    features: Array,
    targets: Array,
    scale: Array,
    coefficients: Array,
    proposal: Array,
    logits: Array,
    gradient: Array,
) -> tuple[Array, Array]:
    """Halves the step until the objective falls enough; the old point where it never does."""
    direction = proposal - coefficients
    norm = np.abs(coefficients).sum()
    expected = gradient @ direction + np.abs(proposal).sum() - norm
    along = features @ direction
    before = np.logaddexp(0, logits)
    for halving in range(_MAX_HALVINGS):
        part = 0.5**halving
        candidate, moved = coefficients + part * direction, logits + part * along
        change = scale @ (np.logaddexp(0, moved) - before - part * targets * along)
        if np.abs(candidate).sum() - norm + change <= _SUFFICIENT_DECREASE * part * expected:
            # Without a halving the proposal itself, whose zeros are exact.
            return (proposal if halving == 0 else candidate), moved
    return coefficients, logits

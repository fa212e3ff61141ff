"""Logistic regression on preferences from 0 to 1, by scikit-learn; the error of its coefficients."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.special import expit

from ncalign.core.errors import MissingPackageError
from ncalign.core.install import install_hint

Array = NDArray[np.float64]

# Log-odds that fewer than a million observations can't tell from infinity.
_LARGEST_LOG_ODDS = 15.0
# Of a fit that reached its maximum: the gradient, as a share of the weights, and the condition of the curvature there.
_LARGEST_GRADIENT, _LARGEST_CONDITION = 1e-8, 1e10


def fit_logistic(
    features: Float[Array, "N F"],
    preferences: Float[Array, " N"],
    weights: Float[Array, " N"],
    *,
    penalty: Literal["l1", "l2"],
    inverse_penalty: float,
    seeds: np.random.RandomState | None = None,
) -> Float[Array, " F"]:
    """Minimise ``penalty(w) + C * sum_i weights_i * (log(1 + exp(z_i)) - preferences_i * z_i)`` with ``z = features @ w``.

    There is no intercept. The penalty is ``|w|_1``, fitted by LIBLINEAR with scikit-learn's tolerance, which stops before the
    minimum; or ``|w|^2 / 2``, fitted by Newton steps to the minimum.

    Args:
        features: a row for each observation.
        preferences: in [0, 1].
        weights: not negative.
        penalty: which of the two.
        inverse_penalty: C; infinite for no L2 penalty.
        seeds: LIBLINEAR's random order of coordinates; each fit draws one seed.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingPackageError(f"the fit needs the package scikit-learn: {install_hint('eval')}") from None
    if penalty == "l1":
        model = LogisticRegression(C=inverse_penalty, fit_intercept=False, solver="liblinear", random_state=seeds)
        # Before scikit-learn 1.8 the penalty had an argument of its own, of which later versions warn.
        model.set_params(**({"penalty": "l1"} if model.get_params().get("penalty") == "l2" else {"l1_ratio": 1.0}))
    else:
        model = LogisticRegression(C=inverse_penalty, fit_intercept=False, solver="newton-cholesky", tol=1e-11)
    # Each row twice: won with the weight of its preference, lost with the rest.
    won, lost = weights * preferences, weights * (1 - preferences)
    for side in (won, lost):
        # LIBLINEAR does not know which label it is given where the other has no weight at all.
        side[0] = side[0] if side.any() else np.finfo(np.float64).tiny
    labels, label_weights = np.repeat([1, 0], len(features)), np.concatenate([won, lost])
    # scikit-learn 1.5 takes many rows without weight for a singular problem.
    given = label_weights > 0
    with warnings.catch_warnings():
        # AlpacaEval takes LIBLINEAR's last step too where its iterations run out.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.concatenate([features, features])[given], labels[given], sample_weight=label_weights[given])
    return np.asarray(model.coef_[0], dtype=np.float64)


def fit_maximum(
    design: Float[Array, "N P"], outcomes: Float[Array, " N"], weights: Float[Array, " N"], *, ridge: float = 0.0
) -> Float[Array, " P"] | None:
    """Maximum likelihood of :func:`fit_logistic` with the L2 penalty ``ridge``; None where no finite one exists."""
    with warnings.catch_warnings():
        # scikit-learn warns where its line search ends in rounding errors, also at a maximum: what it found is examined.
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        theta = fit_logistic(design, outcomes, weights, penalty="l2", inverse_penalty=1 / ridge if ridge else math.inf)
    gradient = design.T @ (weights * (outcomes - expit(design @ theta))) - ridge * theta
    flat = np.linalg.cond(curvature(design, weights, theta, ridge=ridge)) > _LARGEST_CONDITION
    far = ridge == 0 and np.abs(theta).max() > _LARGEST_LOG_ODDS
    return None if flat or far or np.abs(gradient).max() > _LARGEST_GRADIENT * weights.sum() else theta


def curvature(
    design: Float[Array, "N P"], weights: Float[Array, " N"], theta: Float[Array, " P"], *, ridge: float = 0.0
) -> Float[Array, "P P"]:
    """Of the negative log-likelihood at theta."""
    won = expit(design @ theta)
    found: Array = design.T @ (design * (weights * won * (1 - won))[:, None]) + ridge * np.eye(len(theta))
    return found


def jackknife_shifts(
    design: Float[Array, "N P"],
    outcomes: Float[Array, " N"],
    weights: Float[Array, " N"],
    units: Int[NDArray[np.int64], " N"],
    theta: Float[Array, " P"],
    *,
    ridge: float = 0.0,
) -> Float[Array, "U P"]:
    """What each unit adds to the maximum: theta less where one Newton step goes without the unit's rows.

    The sum of their outer products is theta's covariance, whatever the units' rows have in common. (For units of one row,
    it is White's covariance with MacKinnon and White's third correction.)

    Args:
        design: of the fit.
        outcomes: likewise.
        weights: likewise.
        units: each row's unit, such as its question, from 0; -1 for rows that are no sample.
        theta: the maximum.
        ridge: of the fit.

    Returns:
        NaN for a unit without which there is no maximum.
    """
    drawn = np.argsort(units, kind="stable")[int((units < 0).sum()) :]
    won = expit(design @ theta)
    scores = design * (weights * (outcomes - won))[:, None]
    roots = design * np.sqrt(weights * won * (1 - won))[:, None]
    parts = np.split(drawn, np.flatnonzero(np.diff(units[drawn])) + 1)
    added = np.array([scores[part].sum(axis=0) for part in parts])
    rest = curvature(design, weights, theta, ridge=ridge) - np.array([roots[part].T @ roots[part] for part in parts])
    known = np.linalg.cond(rest) < _LARGEST_CONDITION
    found = np.full(added.shape, np.nan)
    found[known] = np.linalg.solve(rest[known], added[known, :, None])[..., 0]
    return found

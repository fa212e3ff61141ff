"""Logistic regression on preferences from 0 to 1, by scikit-learn."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from ncalign.core.errors import MissingPackageError
from ncalign.core.install import install_hint

Array = NDArray[np.float64]


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
    model.fit(np.concatenate([features, features])[given], labels[given], sample_weight=label_weights[given])
    return np.asarray(model.coef_[0], dtype=np.float64)

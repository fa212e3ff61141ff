"""How well a few negatives estimate the gradient of the log normaliser: Proposition 3.3, bias and variance by M.

Here the alphabet has four completions. Up to M = 3 every sequence of a positive and its negatives is enumerated; up to M = 50
every multiset of negatives is, with its multinomial probability.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ncalign.lab.policies import (
    every,
    group_gradients,
    mean_gradient,
    multiset_probabilities,
    multisets,
    numbers,
    value_and_gradient,
)
from ncalign.lab.results import Curve, Findings, Line, fitted_exponent
from ncalign.objectives import linear_contrast_loss, rnce_loss
from ncalign.objectives.kernels import importance_log_weights, kernel_probabilities

SIZE = 4
COUNTS = (1, 2, 3, 5, 8, 12, 18, 26, 36, 50)
ASYMPTOTIC = 12.0
"""Exponents are fitted from this M on, where the next order in 1/M is small."""


def proposition_3_3() -> Findings:
    """With the positive drawn from the model, the estimated gradient of log Z is right on average at every M."""
    found = Findings("MC-PO Proposition 3.3")
    r, proposal = numbers(SIZE, seed=20), numbers(SIZE, seed=21).softmax(dim=0)
    model = (proposal.log() + r).softmax(dim=0)
    _, exact = value_and_gradient(lambda x: (proposal.log() + x).logsumexp(dim=0), r)
    for num in (1, 2, 3):
        total = mean_gradient(rnce_loss, r, model, proposal, num)
        estimate = total + model  # RNCE is -r_0 plus the estimate of log Z
        case = f"with the positive from the model, M = {num}"
        found.zero(f"E grad log Z-hat = grad log Z {case}: largest distance", estimate - exact)
        found.zero(f"RNCE's total expected gradient is 0 {case}: largest entry", total)
    return found


def bias_and_variance() -> Findings:
    """Bias and variance by the number of negatives, for negatives from the reference and from the kernel."""
    r = numbers(SIZE, seed=22)
    model, data = r.softmax(dim=0), numbers(SIZE, seed=23).softmax(dim=0)
    bias: dict[str, Line] = defaultdict(list)
    variance: dict[str, Line] = defaultdict(list)
    for num in COUNTS:
        for name, (values, probabilities) in _estimates(r, num).items():
            for where, positives in (("model", model), ("data", data)):
                weights = (positives.unsqueeze(1) * probabilities).unsqueeze(2)
                mean = (weights * values).sum(dim=(0, 1))
                squares = (weights * (values - mean).square()).sum()
                line = f"{name}, positive from the {where}"
                bias[line].append((float(num), float((mean - model).norm())))
                variance[line].append((float(num), float(squares)))
    found = Findings("MC-PO Proposition 3.3")
    _add_bias(found, bias, model)
    for name, points in variance.items():
        exponent = fitted_exponent(points, start=ASYMPTOTIC)
        found.equal(f"variance, {name}: exponent of M from 12 to 50", -1.0, exponent, 0.1, source="Monte Carlo")
    found.curves.append(
        Curve(
            "normalizer_variance",
            "Variance of the estimated gradient of log Z",
            "negatives M",
            "trace of the covariance",
            variance,
            log="xy",
            note="Falls as 1/M for every way of drawing negatives.",
        )
    )
    return found


def _estimates(r: Float[Tensor, " V"], num: int) -> Mapping[str, tuple[Float[Tensor, "V N V"], Float[Tensor, "V N"]]]:
    """Every estimate of the gradient of log Z with ``num`` negatives, and its probability, by how these are drawn.

    Estimates are by positive and multiset of negatives, and the reference is uniform over the alphabet.
    """
    negatives, counts, log_orders = multisets(SIZE, num)
    positive = torch.arange(SIZE)
    columns = torch.cat([positive.repeat_interleave(len(negatives)).unsqueeze(1), negatives.repeat(SIZE, 1)], dim=1)
    scores, raised = r.expand(SIZE, SIZE), torch.eye(SIZE, dtype=r.dtype).unsqueeze(1)
    included, excluded = (
        kernel_probabilities(scores, positive, every(scores), strategy="mc", include_positive=included)
        for included in (True, False)
    )
    log_weights = importance_log_weights(excluded.repeat_interleave(len(negatives), dim=0), columns[:, 1:])
    logistic, linear, corrected = (
        gradients.view(SIZE, len(negatives), SIZE) + raised
        for gradients in (
            group_gradients(rnce_loss, r, columns),
            group_gradients(linear_contrast_loss, r, columns),
            group_gradients(rnce_loss, r, columns, torch.nn.functional.pad(log_weights, (1, 0))),
        )
    )
    uniform, kernel, others = (
        multiset_probabilities(counts, log_orders, rows) for rows in (torch.full_like(included, 1 / SIZE), included, excluded)
    )
    return {
        "reference": (logistic, uniform),
        "kernel": (logistic, kernel),
        "kernel with log q": (corrected, others),
        "kernel, linear contrast": (linear, kernel),
    }


def _add_bias(found: Findings, bias: Mapping[str, Line], model: Float[Tensor, " V"]) -> None:
    worst = {name: max(value for _, value in line) for name, line in bias.items()}
    tempered = model.square() / model.square().sum()
    limit = float((tempered - model).norm())
    reference = "bias, negatives from the reference, positive from the"
    found.zero(f"{reference} model, M to 50: largest", worst["reference, positive from the model"])
    exponent = fitted_exponent(bias["reference, positive from the data"], start=ASYMPTOTIC)
    found.equal(f"{reference} data: exponent of M from 12 to 50", -1.0, exponent, 0.1)
    found.equal(
        "bias, negatives from the kernel, logistic loss, M = 50: near that of the model squared, and not 0",
        limit,
        bias["kernel, positive from the data"][-1][1],
        0.05 * limit,
        source="MC-PO Algorithm 1",
    )
    for name in ("kernel with log q", "kernel, linear contrast"):
        both = [worst[f"{name}, positive from the {where}"] for where in ("model", "data")]
        found.zero(f"bias, {name}, any positive, M to 50: largest", both, source="importance sampling")
    found.curves.append(
        Curve(
            "normalizer_bias",
            "Bias of the estimated gradient of log Z",
            "negatives M",
            "length of the bias",
            bias,
            log="xy",
            note="Lines near 1e-16 are exact. Negatives from the kernel without a correction keep their bias at every M.",
        )
    )

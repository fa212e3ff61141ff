"""How well a few negatives estimate the gradient of the log normaliser: Proposition 3.3, bias and variance by M.

Here the alphabet has four completions. Up to M = 3 every sequence of a positive and its negatives is enumerated; up to M = 50
every multiset of negatives is, with its multinomial probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from ncalign.lab.results import Curve, Findings, Statement, fitted_exponent, largest, zero
from ncalign.objectives import linear_contrast_loss, rnce_loss
from ncalign.objectives.kernels import importance_log_weights, kernel_probabilities

SIZE = 4
COUNTS = (1, 2, 3, 5, 8, 12, 18, 26, 36, 50)
ASYMPTOTIC = 12.0
"""Exponents are fitted from this M on, where the next order in 1/M is small."""

Line = list[tuple[float, float]]


@dataclass(frozen=True)
class Estimates:
    """Every estimate of the gradient of log Z with M negatives: ``values [V, N, V]`` by positive and multiset of negatives."""

    values: Float[Tensor, "V N V"]
    probabilities: Float[Tensor, "V N"]

    def bias_and_variance(self, positives: Float[Tensor, " V"], exact: Float[Tensor, " V"]) -> tuple[float, float]:
        """Length of the bias and trace of the covariance, for positives drawn so."""
        weights = (positives.unsqueeze(1) * self.probabilities).unsqueeze(2)
        mean = (weights * self.values).sum(dim=(0, 1))
        squares = (weights * (self.values - mean).square()).sum()
        return float((mean - exact).norm()), float(squares)


def proposition_3_3() -> Findings:
    """With the positive drawn from the model, the estimated gradient of log Z is right on average at every M."""
    r, proposal = numbers(SIZE, seed=20), numbers(SIZE, seed=21).softmax(dim=0)
    model = (proposal.log() + r).softmax(dim=0)
    _, exact = value_and_gradient(lambda x: (proposal.log() + x).logsumexp(dim=0), r)
    statements = []
    for num_negatives in (1, 2, 3):
        total = mean_gradient(rnce_loss, r, model, proposal, num_negatives)
        # RNCE is -r_0 plus the estimate of log Z.
        estimate = total + model
        statements += [
            zero(
                f"E grad log Z-hat = grad log Z with the positive from the model, M = {num_negatives}: largest distance",
                "MC-PO Proposition 3.3",
                largest(estimate - exact),
            ),
            zero(
                f"RNCE's total expected gradient is 0 with the positive from the model, M = {num_negatives}: largest entry",
                "MC-PO Proposition 3.3",
                largest(total),
            ),
        ]
    return Findings(statements)


def bias_and_variance() -> Findings:
    """Bias and variance by the number of negatives, for negatives from the reference and from the kernel."""
    r = numbers(SIZE, seed=22)
    model, target = r.softmax(dim=0), numbers(SIZE, seed=23).softmax(dim=0)
    bias: dict[str, Line] = {}
    variance: dict[str, Line] = {}
    for num_negatives in COUNTS:
        for name, estimates in _estimates(r, num_negatives).items():
            for where, positives in (("positive from the model", model), ("positive from the data", target)):
                off, around = estimates.bias_and_variance(positives, model)
                bias.setdefault(f"{name}, {where}", []).append((float(num_negatives), off))
                variance.setdefault(f"{name}, {where}", []).append((float(num_negatives), around))
    return Findings([*_bias_rows(bias, model), *_variance_rows(variance)], _curves(bias, variance))


def _estimates(r: Float[Tensor, " V"], num_negatives: int) -> Mapping[str, Estimates]:
    """All estimates with M negatives, by how these are drawn; the reference is uniform over the alphabet."""
    negatives, counts, log_orders = multisets(SIZE, num_negatives)
    num_sets = negatives.shape[0]
    positive = torch.arange(SIZE)
    columns = torch.cat([positive.repeat_interleave(num_sets).unsqueeze(1), negatives.repeat(SIZE, 1)], dim=1)
    raised = torch.eye(SIZE, dtype=r.dtype).unsqueeze(1)
    scores = r.expand(SIZE, SIZE)

    def drawn(probabilities: Float[Tensor, "V V"]) -> Float[Tensor, "V N"]:
        return torch.stack([multiset_probabilities(counts, log_orders, row) for row in probabilities])

    def values(gradients: Float[Tensor, "R V"]) -> Float[Tensor, "V N V"]:
        return gradients.view(SIZE, num_sets, SIZE) + raised

    def kernel(include_positive: bool) -> Float[Tensor, "V V"]:
        return kernel_probabilities(scores, positive, every(scores), strategy="mc", include_positive=include_positive)

    logistic = values(group_gradients(rnce_loss, r, columns))
    linear = values(group_gradients(linear_contrast_loss, r, columns))
    included, excluded = kernel(True), kernel(False)
    log_weights = importance_log_weights(excluded.repeat_interleave(num_sets, dim=0), columns[:, 1:])
    padded = torch.nn.functional.pad(log_weights, (1, 0))
    return {
        "reference": Estimates(logistic, drawn(torch.full_like(included, 1 / SIZE))),
        "kernel": Estimates(logistic, drawn(included)),
        "kernel with log q": Estimates(values(group_gradients(rnce_loss, r, columns, padded)), drawn(excluded)),
        "kernel, linear contrast": Estimates(linear, drawn(included)),
    }


def _bias_rows(bias: Mapping[str, Line], model: Float[Tensor, " V"]) -> list[Statement]:
    source = "MC-PO Proposition 3.3"
    worst = {name: max(value for _, value in line) for name, line in bias.items()}
    tempered = model.square() / model.square().sum()
    limit = float((tempered - model).norm())
    slope = fitted_exponent(bias["reference, positive from the data"], start=ASYMPTOTIC)
    statements = [
        zero(
            "bias, negatives from the reference, positive from the model, M to 50: largest",
            source,
            worst["reference, positive from the model"],
        ),
        Statement(
            "bias, negatives from the reference, positive from the data: exponent of M from 12 to 50", source, -1.0, slope, 0.1
        ),
        Statement(
            "bias, negatives from the kernel, logistic loss, M = 50: near that of the model squared, and not 0",
            "MC-PO Algorithm 1",
            limit,
            bias["kernel, positive from the data"][-1][1],
            0.05 * limit,
        ),
    ]
    for name in ("kernel with log q", "kernel, linear contrast"):
        both = max(worst[f"{name}, positive from the {where}"] for where in ("model", "data"))
        statements.append(zero(f"bias, {name}, any positive, M to 50: largest", "importance sampling", both))
    return statements


def _variance_rows(variance: Mapping[str, Line]) -> list[Statement]:
    return [
        Statement(
            f"variance, {name}: exponent of M from 12 to 50", "Monte Carlo", -1.0, fitted_exponent(line, start=ASYMPTOTIC), 0.1
        )
        for name, line in variance.items()
    ]


def _curves(bias: Mapping[str, Line], variance: Mapping[str, Line]) -> Sequence[Curve]:
    return [
        Curve(
            "normalizer_bias",
            "Bias of the estimated gradient of log Z",
            "negatives M",
            "length of the bias",
            bias,
            log_x=True,
            log_y=True,
            note="Lines near 1e-16 are exact. Negatives from the kernel without a correction keep their bias at every M.",
        ),
        Curve(
            "normalizer_variance",
            "Variance of the estimated gradient of log Z",
            "negatives M",
            "trace of the covariance",
            variance,
            log_x=True,
            log_y=True,
            note="Falls as 1/M for every way of drawing negatives.",
        ),
    ]


EXPERIMENTS = (proposition_3_3, bias_and_variance)

"""The ideas that the methods stand on, as curves: estimates of the normaliser, the kernel's temperature, alpha and beta."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

from ncalign.lab.policies import (
    every,
    firsts,
    info_nca,
    minimum,
    multiset_probabilities,
    multisets,
    numbers,
    sequence_probabilities,
    total_variation,
    tuples,
)
from ncalign.lab.results import Curve, Findings, Line, fitted_exponent
from ncalign.objectives import rnce_loss
from ncalign.objectives.kernels import importance_log_weights, kernel_probabilities

SIZE, GROUP = 5, 3
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
LOW, HIGH = 0.05, 0.95


def normalizer_estimate() -> Findings:
    """How K completions estimate the log normaliser, drawn from the reference, from the kernel, and with log q."""
    found = Findings("importance sampling")
    r, reference = numbers(SIZE, seed=60, scale=1.5), torch.full((SIZE,), 1 / SIZE, dtype=torch.float64)
    true = (reference.log() + r).logsumexp(dim=0)
    # No completion is set apart as the positive: the kernel draws among all of them.
    scores = r.unsqueeze(0)
    kernel = kernel_probabilities(scores, firsts(scores), every(scores), strategy="mc", include_positive=True)
    lines: dict[str, Line] = defaultdict(list)
    means, corrected_off = [], []
    for num in COUNTS:
        columns, counts, log_orders = multisets(SIZE, num)
        # RNCE is -r_0 plus the log of the sum over the group.
        sums = rnce_loss(r[columns], firsts(columns), every(columns)) + r[columns[:, 0]]
        estimates = sums - torch.full((), num, dtype=torch.float64).log()
        log_q = importance_log_weights(kernel.expand(len(columns), -1), columns)
        corrected = (reference.log()[columns] + r[columns] + log_q).logsumexp(dim=1)
        by_reference, by_kernel = (multiset_probabilities(counts, log_orders, q) for q in (reference, kernel[0]))
        means.append((by_reference * estimates.exp()).sum())
        corrected_off.append((corrected - true).abs().max())
        for name, value in {
            "95 % quantile, drawn from the reference": _quantile(estimates, by_reference, HIGH),
            "mean, drawn by the kernel": float((by_kernel * estimates).sum()),
            "mean, drawn from the reference": float((by_reference * estimates).sum()),
            "5 % quantile, drawn from the reference": _quantile(estimates, by_reference, LOW),
            "true value; any draw by the kernel, log q correction": float((by_kernel * corrected).sum()),
        }.items():
            lines[name].append((float(num), value))
    found.zero("mean estimate of the normaliser from the reference, K to 32: distance to Z", torch.stack(means) - true.exp())
    low = [(num, float(true) - mean) for num, mean in lines["mean, drawn from the reference"]]
    found.equal(
        "mean log of that estimate: exponent of K from 12 to 32 in what it lacks", -1.0, fitted_exponent(low, start=12), 0.1
    )
    found.zero("estimate by the kernel at temperature 1 with log q, every draw: distance to log Z", torch.stack(corrected_off))
    found.curves.append(
        Curve(
            "normalizer_estimate",
            "The log normaliser, estimated from K completions",
            "completions K",
            "log normaliser (nats)",
            lines,
            log="x",
            note="Completions of the reference close in on it; those of the kernel need to be divided by their probability.",
        )
    )
    return found


def _quantile(values: Float[Tensor, " N"], probabilities: Float[Tensor, " N"], share: float) -> float:
    """The lowest value that this share of the probability doesn't exceed."""
    order = values.argsort()
    return float(values[order][int(torch.searchsorted(probabilities[order].cumsum(dim=0), share))])


def temperature_of_the_kernel() -> Findings:
    """Probability that each of four negatives is drawn, by the kernel's temperature."""
    found = Findings("MC-PO Algorithm 1")
    scores = torch.tensor([[0.5, 1.2, 0.3, -0.6, -1.5]], dtype=torch.float64)
    temperatures = torch.logspace(-2, 3, 101, dtype=torch.float64).tolist()
    drawn = torch.cat(
        [kernel_probabilities(scores, firsts(scores), every(scores), strategy="mc", temperature=t) for t in temperatures]
    )[:, 1:]
    found.equal("kernel at temperature 0.01: probability of the negative with the highest score", 1.0, drawn[0, 0])
    found.equal("kernel at temperature 1000: probability of each of four negatives", 0.25, drawn[-1], 0.001)
    found.curves.append(
        Curve(
            "kernel_temperature",
            "Which negative the kernel draws",
            "temperature",
            "probability",
            {
                f"implicit reward {score:g}": [
                    (t, float(p)) for t, p in zip(temperatures, column, strict=True) if 0.05 <= t <= 50
                ]
                for score, column in zip(scores[0, 1:].tolist(), drawn.T, strict=True)
            },
            log="x",
            note="Low: always the hardest. High: each as often.",
        )
    )
    return found


def optimal_policies() -> Findings:
    """InfoNCA's optimal policy over four completions, by the product of alpha and beta."""
    found, beta = Findings("InfoNCA section 3"), 0.5
    rewards = torch.tensor([0.0, 0.5, 0.8, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    columns = tuples(len(rewards), GROUP)
    weights, groups = sequence_probabilities(columns, reference), rewards[columns]
    lines: dict[str, Line] = defaultdict(list)
    off = []
    for product in torch.logspace(-1, 1, 21, dtype=torch.float64).tolist():

        def expected(logits: Tensor, alpha: float = product / beta) -> Tensor:
            r = beta * (logits.log_softmax(dim=0) - reference.log())
            return (weights * info_nca(alpha)(r[columns], groups)).sum()

        optimum = minimum(expected, reference.log()).softmax(dim=0)
        off.append(float(total_variation(optimum, (reference.log() + rewards / product).softmax(dim=0))))
        for reward, start, probability in zip(rewards.tolist(), reference.tolist(), optimum.tolist(), strict=True):
            lines[f"reward {reward:g}, reference {start:.0%}"].append((product, probability))
    found.zero(
        "InfoNCA's optimal policy, alpha beta from 0.1 to 10: total variation to reference exp(R/(alpha beta))", off, 1e-9
    )
    found.curves.append(
        Curve(
            "optimal_policies",
            "InfoNCA's optimal policy",
            "alpha times beta",
            "probability of the completion",
            lines,
            log="x",
            note="Small: all on the best. Large: the reference.",
        )
    )
    return found

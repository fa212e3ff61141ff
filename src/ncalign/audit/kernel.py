"""What MC-PO's kernel would draw under a given model: how sharp it is, whom it draws, and whether near-copies or rivals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats

from ncalign.audit.config import AuditConfig
from ncalign.audit.measures import GroupMeasures, Ranked, interval, mean, ranked
from ncalign.audit.ranges import BETAS, kernel_weights, sample_size
from ncalign.audit.semantic import Meaning
from ncalign.core.progress import Bar
from ncalign.data.groups import Group
from ncalign.model.batching import collate, split_by_tokens
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder
from ncalign.model.logprobs import completion_logprobs
from ncalign.model.policy import load_policy

_FALSE_MARGIN = 0.1
"""Of a group's spread: a lower-scored candidate this near to the best may be as good as it."""


@dataclass
class KernelAudit:
    """What the kernel would do.

    Attributes:
        numbers: means over groups, by name.
        scores: each group's scores of its lower-scored candidates, the highest-scored first.
        by_rank: for the second-best candidate, the third and so on: weight drawn, weight of a random draw.
        by_source: the same for each source.
        by_beta: effective sample size, as a share of the candidates, for several betas.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    scores: list[list[float]] = field(default_factory=list)
    by_rank: list[tuple[float, float]] = field(default_factory=list)
    by_source: dict[str, tuple[float, float]] = field(default_factory=dict)
    by_beta: dict[float, float] = field(default_factory=dict)


def audit_kernel(
    groups: Sequence[Group], measured: Sequence[GroupMeasures], meanings: Mapping[str, Meaning], config: AuditConfig
) -> KernelAudit:
    """Weights ``softmax(beta r)`` over each group's lower-scored candidates, and what they mean.

    The score r is the log-ratio of ``model`` to ``reference_model`` or, without one, the model's log-prob itself.

    Args:
        groups: the sample.
        measured: their numbers, in the same order.
        meanings: likeness in meaning, by the name of its measure.
        config: of the audit.
    """
    assert config.model is not None
    orders = {number: order for number, group in enumerate(groups) if (order := ranked(group)) is not None}
    scores = _scores(groups, orders, config)
    weights = {number: kernel_weights(values, config.beta) for number, values in scores.items()}
    found = KernelAudit(scores=list(scores.values()))
    found.numbers = _sharpness(weights) | _rivals(groups, orders, weights)
    likenesses = {"words": {n: [one.edit for one in measured[n].likeness] for n in weights}}
    likenesses |= {name: meaning.to_best for name, meaning in meanings.items()}
    for name, to_best in likenesses.items():
        found.numbers |= _drawn_likeness(name, to_best, weights, seed=config.seed)
    found.numbers |= _lengths(measured, orders, groups, weights)
    found.by_rank, found.by_source = _who(groups, orders, weights)
    several = [values for values in found.scores if len(values) > 1]
    found.by_beta = {beta: mean([sample_size(values, beta) / len(values) for values in several]) for beta in BETAS}
    return found


Weights = Mapping[int, np.ndarray[Any, np.dtype[np.float64]]]


def _sharpness(weights: Weights) -> dict[str, float]:
    several = [row for row in weights.values() if len(row) > 1]
    entropies = [float(-(row[row > 0] * np.log(row[row > 0])).sum()) for row in several]
    sizes = [float(1 / np.square(row).sum()) for row in several]
    return {
        "kernel/entropy": mean([value / math.log(len(row)) for value, row in zip(entropies, several, strict=True)]),
        "kernel/entropy_nats": mean(entropies),
        "kernel/effective_size": mean(sizes),
        "kernel/effective_share": mean([size / len(row) for size, row in zip(sizes, several, strict=True)]),
    }


def _rivals(groups: Sequence[Group], orders: Mapping[int, Ranked], weights: Weights) -> dict[str, float]:
    """Weight on false negatives, and what a random draw would put there."""
    drawn, uniform = [], []
    for number, row in weights.items():
        rewards = [candidate.reward or 0.0 for candidate in groups[number].candidates]
        order = orders[number]
        top, low = rewards[order.best], rewards[order.lower[-1]]
        near = np.array([top - rewards[k] <= _FALSE_MARGIN * (top - low) for k in order.lower], dtype=np.float64)
        drawn.append(float(row @ near))
        uniform.append(float(near.mean()))
    return {"kernel/false_negatives": mean(drawn), "kernel/false_negatives_random": mean(uniform)}


def _drawn_likeness(name: str, to_best: Mapping[int, Sequence[float]], weights: Weights, *, seed: int) -> dict[str, float]:
    """The paper's first check: is what the kernel draws more like the best candidate than a random negative is?"""
    both = [(float(row @ to_best[n]), float(np.mean(to_best[n]))) for n, row in weights.items() if len(row) > 1]
    low, high = interval([drawn - uniform for drawn, uniform in both], seed=seed)
    return {
        f"kernel/likeness_drawn/{name}": mean([drawn for drawn, _ in both]),
        f"kernel/likeness_random/{name}": mean([uniform for _, uniform in both]),
        f"kernel/likeness_gain/{name}": mean([drawn - uniform for drawn, uniform in both]),
        f"kernel/likeness_gain_low/{name}": low,
        f"kernel/likeness_gain_high/{name}": high,
    }


def _lengths(
    measured: Sequence[GroupMeasures], orders: Mapping[int, Ranked], groups: Sequence[Group], weights: Weights
) -> dict[str, float]:
    ratios, correlations = [], []
    for number, row in weights.items():
        known = [k for k, candidate in enumerate(groups[number].candidates) if candidate.reward is not None]
        length = dict(zip(known, measured[number].lengths, strict=True))
        lengths = np.array([float(length[k]) for k in orders[number].lower])
        ratios.append(float(row @ lengths / max(1.0, lengths.mean())))
        if len(row) > 2 and len(set(lengths)) > 1 and len(set(row)) > 1:
            correlations.append(float(stats.spearmanr(row, lengths).statistic))
    return {"kernel/length_drawn": mean(ratios), "kernel/length_correlation": mean(correlations)}


def _who(
    groups: Sequence[Group], orders: Mapping[int, Ranked], weights: Weights
) -> tuple[list[tuple[float, float]], dict[str, tuple[float, float]]]:
    ranks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    sources: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number, row in weights.items():
        for place, (k, weight) in enumerate(zip(orders[number].lower, row, strict=True)):
            ranks[place].append((float(weight), 1 / len(row)))
            source = groups[number].candidates[k].source
            if source:
                sources[source].append((float(weight), 1 / len(row)))

    def means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        return mean([drawn for drawn, _ in pairs]), mean([uniform for _, uniform in pairs])

    return [means(ranks[place]) for place in sorted(ranks)], {name: means(sources[name]) for name in sorted(sources)}


def _scores(groups: Sequence[Group], orders: Mapping[int, Ranked], config: AuditConfig) -> dict[int, list[float]]:
    """Scores of the lower-scored candidates; groups that can't be encoded are left out."""
    assert config.model is not None
    found = _logprobs(groups, orders, config.model, config)
    if config.reference_model is not None:
        base = _logprobs(groups, orders, config.reference_model, config)
        found = {n: [a - b for a, b in zip(row, base[n], strict=True)] for n, row in found.items() if n in base}
    return {number: [row[k] for k in orders[number].lower] for number, row in found.items()}


@torch.no_grad()
def _logprobs(groups: Sequence[Group], orders: Mapping[int, Ranked], model: str, config: AuditConfig) -> dict[int, list[float]]:
    """Log-probs of each group's candidates, by the group's place."""
    policy = load_policy(model, dtype=config.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(policy.model, device).eval()
    encoder = Encoder(policy.tokenizer, max_length=config.max_length, string_prompts=config.string_prompts)
    encoded: list[tuple[int, EncodedGroup]] = []
    for number in orders:
        try:
            encoded.append((number, encoder.encode(groups[number])))
        except DroppedGroupError:
            continue
    found: dict[int, list[float]] = {}
    sizes = [(len(group.completions), group.length) for _, group in encoded]
    with Bar("Log-probs", len(encoded)) as bar:
        for part in split_by_tokens(sizes, max_groups=8, max_tokens=4096, padded=True):
            batch = collate([encoded[i][1] for i in part], pad_token_id=int(policy.tokenizer.pad_token_id)).to(
                torch.device(device)
            )
            values = completion_logprobs(policy.model, batch).double().cpu()
            for row, i in enumerate(part):
                found[encoded[i][0]] = values[row, : len(encoded[i][1].completions)].tolist()
            bar.advance(len(part))
    return found

"""What MC-PO's kernel would draw under a given model: how evenly, which candidates, and whether they are hard negatives."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ncalign.audit.measures import GroupMeasures, Ranked, mean
from ncalign.audit.ranges import BETAS, padded, sample_sizes
from ncalign.audit.sizes import ScoredGroup
from ncalign.core.progress import Bar, say
from ncalign.data.groups import Group
from ncalign.data.rendering import count_renderings, rendering_warning
from ncalign.model.batching import collate, split_by_tokens
from ncalign.model.config import Precision, StringPrompts
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder
from ncalign.model.logprobs import LogprobModel, completion_token_cost
from ncalign.model.policy import load_policy
from ncalign.objectives.kernels import effective_sample_size
from ncalign.objectives.targets import target_weights
from ncalign.stats.intervals import mean_interval

Tables = dict[str, list[dict[str, Any]]]

_FALSE_MARGIN = 0.1
"""A lower-scored candidate may be as good as the best if its reward is this near, as a share of the group's spread."""


@dataclass(frozen=True)
class _Drawn:
    """One group, and the kernel's weights on its lower-scored candidates, the highest-scored first."""

    group: Group
    measures: GroupMeasures
    order: Ranked
    weights: NDArray[np.float64]
    to_best: Mapping[str, Sequence[float]]


def audit_kernel(
    groups: Sequence[Group],
    measured: Sequence[GroupMeasures],
    to_best: Mapping[str, Sequence[Sequence[float]]],
    scores: Mapping[int, Sequence[float]],
    *,
    beta: float,
) -> tuple[dict[str, float], Tables]:
    """Weights ``softmax(beta r)`` over each group's lower-scored candidates, and what they mean.

    Args:
        groups: the sample.
        measured: their numbers, in the same order.
        to_best: for each measure of likeness, each group's lower-scored candidates against its best.
        scores: r of the lower-scored candidates, as :func:`lower_scores` gives it.
        beta: of the kernel.

    Returns:
        Means over groups, by name; and tables: the weight, and the weight in a random draw, by rank (2 is the second-best
        candidate) and by source, and for several betas the effective sample size as a share of the candidates.
    """
    drawn = []
    for number, values in scores.items():
        order = measured[number].order
        assert order is not None
        likeness = {name: rows[number] for name, rows in to_best.items()}
        weights = target_weights(*padded([values]), alpha=1 / beta)[0].numpy()
        drawn.append(_Drawn(groups[number], measured[number], order, weights, likeness))
    numbers = _evenness(drawn) | _false_negatives(drawn) | _lengths(drawn)
    for name in to_best:
        numbers |= _likeness_gain(name, drawn)
    several, mask = padded([values for values in scores.values() if len(values) > 1])
    shares = {beta: (sample_sizes(several, mask, beta) / mask.sum(dim=1)).tolist() for beta in BETAS}
    by_beta = [{"beta": beta, "effective_share": mean(found)} for beta, found in shares.items()]
    return numbers, {**_shares(drawn), "kernel_by_beta": by_beta}


def _evenness(drawn: Sequence[_Drawn]) -> dict[str, float]:
    """How evenly the kernel draws: entropy and effective sample size."""
    several = [one.weights for one in drawn if len(one.weights) > 1]
    entropies = [float(stats.entropy(row)) for row in several]
    sizes = effective_sample_size(padded([row.tolist() for row in several])[0]).tolist()
    return {
        "kernel/entropy": mean([value / math.log(len(row)) for value, row in zip(entropies, several, strict=True)]),
        "kernel/entropy_nats": mean(entropies),
        "kernel/effective_size": mean(sizes),
        "kernel/effective_share": mean([size / len(row) for size, row in zip(sizes, several, strict=True)]),
    }


def _false_negatives(drawn: Sequence[_Drawn]) -> dict[str, float]:
    """Weight on candidates that may be as good as the best, and what a random draw would put there."""
    weight, uniform = [], []
    for one in drawn:
        rewards = np.array([one.group.candidates[k].reward for k in (one.order.best, *one.order.lower)], dtype=np.float64)
        near = (rewards[0] - rewards[1:] <= _FALSE_MARGIN * (rewards[0] - rewards[-1])).astype(np.float64)
        weight.append(float(one.weights @ near))
        uniform.append(float(near.mean()))
    return {"kernel/false_negatives": mean(weight), "kernel/false_negatives_random": mean(uniform)}


def _likeness_gain(name: str, drawn: Sequence[_Drawn]) -> dict[str, float]:
    """The paper's first check: is what the kernel draws more like the best candidate than a random negative is?"""
    several = [one for one in drawn if len(one.weights) > 1]
    weighted = [float(one.weights @ one.to_best[name]) for one in several]
    uniform = [float(np.mean(one.to_best[name])) for one in several]
    gains = np.subtract(weighted, uniform)
    low, high = mean_interval(gains)
    return {
        f"kernel/likeness_drawn/{name}": mean(weighted),
        f"kernel/likeness_random/{name}": mean(uniform),
        f"kernel/likeness_gain/{name}": mean(gains.tolist()),
        f"kernel/likeness_gain_low/{name}": low,
        f"kernel/likeness_gain_high/{name}": high,
    }


def _lengths(drawn: Sequence[_Drawn]) -> dict[str, float]:
    """Length of what is drawn over that of a random draw, and the rank correlation of length and weight."""
    ratios, correlations = [], []
    for one in drawn:
        known = [k for k, candidate in enumerate(one.group.candidates) if candidate.reward is not None]
        length = dict(zip(known, one.measures.lengths, strict=True))
        lengths = np.array([float(length[k]) for k in one.order.lower])
        ratios.append(float(one.weights @ lengths / max(1.0, lengths.mean())))
        if len(lengths) > 2 and len(set(lengths)) > 1 and len(set(one.weights)) > 1:
            correlations.append(float(stats.spearmanr(one.weights, lengths).statistic))
    return {"kernel/length_drawn": mean(ratios), "kernel/length_correlation": mean(correlations)}


def _shares(drawn: Sequence[_Drawn]) -> Tables:
    """Mean weight, and mean weight in a random draw, by rank of reward and by source."""
    found: dict[str, dict[Any, list[tuple[float, float]]]] = {"rank": defaultdict(list), "source": defaultdict(list)}
    for one in drawn:
        for rank, (k, weight) in enumerate(zip(one.order.lower, one.weights, strict=True), start=2):
            both = (float(weight), 1 / len(one.weights))
            found["rank"][rank].append(both)
            if source := one.group.candidates[k].source:
                found["source"][source].append(both)
    return {
        f"kernel_by_{name}": [
            {name: key, "drawn": mean([weight for weight, _ in pairs]), "random": mean([even for _, even in pairs])}
            for key, pairs in sorted(shares.items())
        ]
        for name, shares in found.items()
    }


def score_groups(
    groups: Sequence[Group],
    measured: Sequence[GroupMeasures],
    *,
    model: str,
    reference_model: str | None,
    dtype: Precision,
    max_length: int,
    string_prompts: StringPrompts,
) -> tuple[dict[int, ScoredGroup], float]:
    """Scores and lengths of all candidates of each group in which rewards differ, and the cost of a scored token.

    A score is the log-ratio of ``model`` to ``reference_model`` or, without one, the log-prob itself. What can't be encoded is
    left out. The cost, ``1 + V d / N``, is that of a completion's token, for which the head is computed, in a prompt's.
    """
    usable = {number: groups[number] for number, group in enumerate(measured) if group.order is not None}
    (found, cost), *base = (
        _logprobs(usable, name, dtype=dtype, max_length=max_length, string_prompts=string_prompts)
        for name in (model, reference_model)
        if name is not None
    )
    for reference, _ in base:
        found = {
            n: replace(one, scores=tuple(a - b for a, b in zip(one.scores, reference[n].scores, strict=True)))
            for n, one in found.items()
            if n in reference
        }
    return found, cost


def lower_scores(scored: Mapping[int, ScoredGroup], measured: Sequence[GroupMeasures]) -> dict[int, list[float]]:
    """Scores of the lower-scored candidates, the highest-scored first, by the group's place."""
    orders = {number: measured[number].order for number in scored}
    return {number: [scored[number].scores[k] for k in order.lower] for number, order in orders.items() if order is not None}


@torch.no_grad()
def _logprobs(
    groups: Mapping[int, Group], model: str, *, dtype: Precision, max_length: int, string_prompts: StringPrompts
) -> tuple[dict[int, ScoredGroup], float]:
    """Log-probs and lengths of each group's candidates, and the cost of a scored token."""
    policy = load_policy(model, dtype=dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # In bfloat16 the weights of a model without an adapter stay float32, and the computation is rounded.
    autocast = torch.bfloat16 if dtype == "bfloat16" else None
    scorer = LogprobModel(torch.nn.Module.to(policy.model, device).eval(), autocast=autocast)
    encoder = Encoder(policy.tokenizer, max_length=max_length, string_prompts=string_prompts)
    made, does = count_renderings(groups.values()), f"{model} scores them for the kernel"
    if warning := rendering_warning(made, encoder.string_prompts, what="the sample", does=does):
        say(warning)
    encoded: list[tuple[int, EncodedGroup]] = []
    for number, group in groups.items():
        try:
            encoded.append((number, encoder.encode(group)))
        except DroppedGroupError:
            continue
    found: dict[int, ScoredGroup] = {}
    sizes = [(len(group.completions), group.length) for _, group in encoded]
    with Bar("Log-probs", len(encoded)) as bar:
        for part in split_by_tokens(sizes, max_groups=8, max_tokens=4096, padded=True):
            batch = collate([encoded[i][1] for i in part], pad_token_id=int(policy.tokenizer.pad_token_id)).to(device)
            values = scorer(batch).logprobs.double().cpu()
            for row, i in enumerate(part):
                number, one = encoded[i]
                lengths = tuple(len(completion) for completion in one.completions)
                found[number] = ScoredGroup(tuple(values[row, : len(lengths)].tolist()), len(one.prompt), lengths)
            bar.advance(len(part))
    return found, completion_token_cost(policy.model)

"""`ncalign audit`: one pass over the groups, numbers in audit.json and a page with charts in audit.html."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.audit.config import AuditConfig
from ncalign.audit.copies import clusters_across
from ncalign.audit.findings import findings
from ncalign.audit.kernel import Tables, audit_kernel, lower_scores, score_groups
from ncalign.audit.measures import (
    GroupMeasures,
    length_regression,
    mean,
    measure_group,
    random_baseline,
    share_of_agreement,
    worth_keeping,
)
from ncalign.audit.page import page_parts, write_page
from ncalign.audit.ranges import alpha_range, beta_range
from ncalign.audit.semantic import Meaning, bertscore_f1, embedding_cosine, measure_meaning
from ncalign.audit.sizes import Rows, ScoredGroup, audit_sizes, sizes_text
from ncalign.audit.texts import prompt_key, words
from ncalign.core.atomic import check_writable, write_json_atomic
from ncalign.core.hub import only_cached
from ncalign.core.json import json_ready
from ncalign.core.outputs import claim, renew
from ncalign.core.parallel import map_chunks, num_workers
from ncalign.core.progress import Bar, say
from ncalign.data.formats.seen import Seen
from ncalign.data.groups import Candidate, Group, ReadReport, read_groups
from ncalign.data.rendering import Rendering, completion_text, recorded_renderings
from ncalign.model.config import Precision
from ncalign.model.precision import resolve_dtype

ENTRIES = ("audit.json", "audit.html")
"""What is left in the folder."""
MOST_COMPARED = 256
"""Candidates of a group: each is compared with each."""
_MOST_SOURCES = 50


@dataclass
class Totals:
    """Sums over all groups; only the sample keeps their texts.

    Attributes:
        missing: candidates without a reward.
        with_spread: groups in which two rewards differ.
        tied_best: groups in which several share the best.
        empty: candidates without text.
        cut: candidates with text that were cut while they were generated.
        made: groups by how their string prompts were put to the model that wrote their candidates, where they record it.
        sizes: groups by their number of candidates.
        sources: candidates by who wrote them.
        prompts: the prompts, and how often each came.
        large: groups with more candidates than are compared.
        sample: some groups, drawn evenly from all; of large ones the best candidate and others drawn at random.
    """

    groups: int = 0
    candidates: int = 0
    missing: int = 0
    with_spread: int = 0
    tied_best: int = 0
    empty: int = 0
    cut: int = 0
    large: int = 0
    made: Counter[Rendering] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    prompts: Seen = field(default_factory=Seen)
    sample: list[Group] = field(default_factory=list)

    def add(self, group: Group, *, size: int, chance: random.Random) -> None:
        """Count a group, and perhaps keep it in the sample (reservoir sampling)."""
        self.groups += 1
        rewards = [candidate.reward for candidate in group.candidates if candidate.reward is not None]
        self.candidates += len(group.candidates)
        self.missing += len(group.candidates) - len(rewards)
        self.with_spread += len(set(rewards)) > 1
        self.tied_best += len(set(rewards)) > 1 and rewards.count(max(rewards)) > 1
        written = [candidate for candidate in group.candidates if _has_text(candidate)]
        self.empty += len(group.candidates) - len(written)
        self.cut += sum(not candidate.finished for candidate in written)
        self.made.update(recorded_renderings(group.prompt, group.metadata))
        self.sizes[len(group.candidates)] += 1
        self.sources.update(candidate.source for candidate in group.candidates if candidate.source)
        self.prompts.add(prompt_key(group))
        self.large += len(group.candidates) > MOST_COMPARED
        if len(self.sample) < size:
            self.sample.append(_comparable(group, chance))
        elif (place := chance.randrange(self.groups)) < size:
            self.sample[place] = _comparable(group, chance)


def _comparable(group: Group, chance: random.Random) -> Group:
    """The group; of a large one the best candidate, and others drawn at random, in their order."""
    number = len(group.candidates)
    if number <= MOST_COMPARED:
        return group
    rewards = [candidate.reward for candidate in group.candidates]
    best = max(range(number), key=lambda k: -math.inf if (reward := rewards[k]) is None else reward)
    others = chance.sample([k for k in range(number) if k != best], MOST_COMPARED - 1)
    return replace(group, candidates=[group.candidates[k] for k in sorted([best, *others])])


def _has_text(candidate: Candidate) -> bool:
    turns = candidate.completion
    return any(text.strip() for text in ([turns] if isinstance(turns, str) else [turn["content"] for turn in turns]))


def run_audit(config: AuditConfig) -> dict[str, Any]:
    """Audit a file of groups and leave ``audit.json`` and ``audit.html``.

    Returns:
        What audit.json holds, and the findings as printable text under ``text``.

    Raises:
        ValueError: the data can't be read, or there is nothing in them to audit.
    """
    json_file, page = (config.output_dir / name for name in ENTRIES)
    _check(config)
    totals, rows_skipped = _totals(config)
    sample, measured = totals.sample, _measured(totals.sample)
    texts = [words(completion_text(candidate.completion)) for group in sample for candidate in group.candidates]
    across = clusters_across(texts, [number for number, group in enumerate(sample) for _ in group.candidates])
    numbers = _numbers(totals, measured, across, seed=config.seed)
    meanings = _meanings(sample, config.embedder, config.bertscore, seed=config.seed)
    for name, meaning in meanings.items():
        numbers[f"{name}/best_to_others"] = mean([value for row in meaning.to_best for value in row])
        numbers[f"{name}/random"] = mean(meaning.random)
    to_best = {"words": [[one.edit for one in group.likeness] for group in measured]}
    to_best |= {name: meaning.to_best for name, meaning in meanings.items()}
    tables = _tables(measured, to_best, across)
    dtype = resolve_dtype(config.dtype) if config.model is not None else None
    if dtype is not None:
        kernel_numbers, kernel_tables = _with_model(config, dtype, sample, measured, to_best, numbers)
        numbers |= kernel_numbers
        tables |= kernel_tables
    found = findings(numbers)
    result: dict[str, Any] = {
        "data": config.data,
        "numbers": json_ready(numbers),
        "findings": found,
        "tables": {name: table for name, table in tables.items() if table},
        "sizes": dict(sorted(totals.sizes.items())),
        "sources": dict(totals.sources.most_common(_MOST_SOURCES)),
        "rows_skipped": rows_skipped,
        "sampled": len(sample),
        "large_groups": totals.large,
        **({} if dtype is None else {"dtype": dtype}),
    }
    written = json_ready({**result, "page": page_parts(measured, sample)})
    renew(config.output_dir, ENTRIES, verb="audit")
    write_page(page, written)
    write_json_atomic(written, json_file)  # the last: an audit without it was stopped
    return {**result, "text": _text(config.data, numbers, found, tables, page)}


def _with_model(
    config: AuditConfig,
    dtype: Precision,
    sample: Sequence[Group],
    measured: Sequence[GroupMeasures],
    to_best: Mapping[str, Sequence[Sequence[float]]],
    numbers: Mapping[str, float],
) -> tuple[dict[str, float], Tables]:
    """What the model's scores say: of the kernel, of beta, and of how many candidates pay."""
    assert config.model is not None
    scored, head = score_groups(
        sample,
        measured,
        model=config.model,
        reference_model=config.reference_model,
        dtype=dtype,
        max_length=config.max_length,
        string_prompts=config.string_prompts,
    )
    scores = lower_scores(scored, measured)
    found, tables = audit_kernel(sample, measured, to_best, scores, beta=config.beta)
    found["beta/low"], found["beta/high"] = beta_range(list(scores.values())) or (math.nan, math.nan)
    alpha = math.sqrt(numbers["alpha/low"] * numbers["alpha/high"])
    if not scored or not math.isfinite(alpha):
        return found, tables
    rated = [_rated(scored[number], sample[number]) for number in scored]
    sizes, by_size = audit_sizes(
        [group for group, _ in rated],
        [rewards for _, rewards in rated],
        # Without a reference the policy is its own: implicit rewards are 0, as in the first step of training.
        beta=None if config.reference_model is None else config.beta,
        alpha=alpha,
        head=head,
        seed=config.seed,
    )
    return found | sizes | {"pays/alpha": alpha, "pays/head": head}, tables | by_size


def _rated(scored: ScoredGroup, group: Group) -> tuple[ScoredGroup, list[float]]:
    """The candidates with a reward, and their rewards."""
    known = [(k, candidate.reward) for k, candidate in enumerate(group.candidates) if candidate.reward is not None]
    kept = [k for k, _ in known]
    values = (tuple(scored.scores[k] for k in kept), scored.prompt, tuple(scored.completions[k] for k in kept))
    return ScoredGroup(*values), [reward for _, reward in known]


def _check(config: AuditConfig) -> None:
    """Refuse before hours of work what can't be written or found."""
    inputs = {
        "data": config.data,
        "model": config.model,
        "reference_model": config.reference_model,
        "embedder": config.embedder,
        "bertscore": config.bertscore,
    }
    own = () if (config.output_dir / ENTRIES[0]).exists() else ENTRIES
    claim(config.output_dir, ENTRIES, verb="audit", inputs=inputs, overwrite=config.overwrite, own=own)
    check_writable(config.output_dir / ENTRIES[0])
    for name in filter(None, (config.model, config.reference_model)):
        only_cached(name, what="model")


def _totals(config: AuditConfig) -> tuple[Totals, int]:
    """Sums over the groups that can be read, and how many rows can't."""
    report = ReadReport()
    groups = read_groups(
        config.data,
        schema=config.schema_name,
        on_bad_row=config.on_bad_row,
        report=report,
        join_rows=config.join_rows,
    )
    totals = _read(groups, config.sample, seed=config.seed)
    if not totals.groups:
        raise ValueError(f"{config.data} has no group to audit: {report.summary()}")
    if notice := report.notice(config.data):
        say(notice)
    if totals.large:
        say(
            f"note: {totals.large} groups have more than {MOST_COMPARED} candidates: of each the best and {MOST_COMPARED - 1} "
            "others, drawn at random, are compared"
        )
    return totals, report.skipped


def _read(groups: Iterable[Group], size: int, *, seed: int) -> Totals:
    totals, chance = Totals(), random.Random(seed)
    with Bar("Reading groups", None) as bar:
        for group in groups:
            totals.add(group, size=size, chance=chance)
            bar.advance()
    return totals


def _measured(sample: Sequence[Group]) -> list[GroupMeasures]:
    measured = []
    with Bar("Comparing candidates", len(sample)) as bar:
        for rows in map_chunks(lambda groups: [measure_group(group) for group in groups], sample, workers=num_workers()):
            measured += rows
            bar.advance(len(rows))
    return measured


def _meanings(sample: Sequence[Group], embedder: str | None, bertscore: str | None, *, seed: int) -> dict[str, Meaning]:
    measures = (("meaning", embedding_cosine, embedder), ("bertscore", bertscore_f1, bertscore))
    return {name: measure_meaning(sample, score(model), seed=seed) for name, score, model in measures if model is not None}


def _numbers(totals: Totals, measured: Sequence[GroupMeasures], across: Sequence[int], *, seed: int) -> dict[str, float]:
    """All numbers that need no model."""
    compared = sum(group.num_candidates for group in measured)
    likeness = [one for group in measured for one in group.likeness]
    spread = [group for group in measured if group.num_distinct > 1]
    noise = [difference for group in measured for difference in group.noise]
    alphas = alpha_range([group.rewards for group in spread]) or (math.nan, math.nan)
    winners = _winners(measured)
    pairs = ([group.length_pairs for group in measured], [group.character_pairs for group in measured])
    explained, slope = length_regression(measured)
    return {
        "groups": totals.groups,
        "groups/with_spread": totals.with_spread / totals.groups,
        "candidates": totals.candidates,
        "candidates/empty": totals.empty,
        "candidates/cut": totals.cut,
        "candidates/made_raw": totals.made["raw"],
        "candidates/mean": totals.candidates / totals.groups,
        "candidates/worth_keeping": worth_keeping(measured),
        "prompts/duplicates": totals.prompts.repeated() / totals.groups,
        "rewards/missing": totals.missing / max(1, totals.candidates),
        "rewards/tied_best": totals.tied_best / totals.groups,
        "rewards/distinct": mean([group.num_distinct for group in spread]),
        "rewards/within_sd": mean([float(np.std(group.rewards)) for group in spread]),
        "rewards/spread": mean([group.spread for group in spread]),
        # The difference of two rewards has twice the variance of one.
        "rewards/noise_sd": math.sqrt(mean([difference**2 for difference in noise]) / 2),
        "rewards/noise_pairs": len(noise),
        "alpha/low": alphas[0],
        "alpha/high": alphas[1],
        "likeness/best_to_others": mean([one.edit for one in likeness]),
        "likeness/trigrams": mean([one.trigrams for one in likeness]),
        "likeness/random": mean([one.edit for one in random_baseline(totals.sample, seed=seed)]),
        "likeness/swapped": mean([float(one.swapped) for one in likeness]) if likeness else 0.0,
        "likeness/duplicates": sum(group.copies for group in measured) / max(1, compared),
        "copies/across": sum(across) / max(1, compared),
        "sources/number": len(totals.sources),
        "sources/most_best": max(winners.values(), default=0) / max(1, winners.total()),
        "length/words": mean([length for group in measured for length in group.lengths]),
        # By words or by characters, whichever the rewards follow more.
        "length/agreement": max(*map(share_of_agreement, pairs), key=abs),
        "length/explained": explained,
        "length/slope": slope,
    }


def _winners(measured: Sequence[GroupMeasures]) -> Counter[str]:
    """Groups by who wrote their best candidate."""
    return Counter(group.best_source for group in measured if group.best_source)


def _tables(
    measured: Sequence[GroupMeasures],
    to_best: Mapping[str, Sequence[Sequence[float]]],
    across: Sequence[int],
) -> Tables:
    """What is not a single number: by rank, by source, by beta, and the sizes of sets of near-copies."""
    ranks = range(max((len(row) for row in to_best["words"]), default=0))
    rewards: dict[str, list[float]] = defaultdict(list)
    for group in measured:
        if len(group.sources) == len(group.rewards):
            for source, reward in zip(group.sources, group.rewards, strict=True):
                rewards[source].append(reward)
    winners = _winners(measured)
    by_reward = sorted(((mean(values), source) for source, values in rewards.items() if source), key=lambda pair: -pair[0])
    within = Counter(size for group in measured for size in group.clusters)
    return {
        "likeness_by_rank": [
            {"rank": k + 2, **{name: mean([row[k] for row in rows if len(row) > k]) for name, rows in to_best.items()}}
            for k in ranks
        ],
        "sources": [
            {"source": source, "candidates": len(rewards[source]), "mean_reward": reward, "best": winners[source]}
            for reward, source in by_reward[:_MOST_SOURCES]
        ],
        "copies_within_groups": [{"size": size, "sets": number} for size, number in sorted(within.items())],
        "copies_across_groups": [{"size": size, "sets": number} for size, number in sorted(Counter(across).items())],
    }


def _text(
    data: str, numbers: Mapping[str, float], found: Sequence[Mapping[str, str]], tables: Mapping[str, Rows], page: Path
) -> str:
    lines = [
        f"{data}: {numbers['groups']:.0f} groups, {numbers['candidates/mean']:.1f} candidates each; rewards differ in "
        f"{numbers['groups/with_spread']:.0%} of them",
        f"  the best candidate against the others: {numbers['likeness/best_to_others']:.2f} of the words in common order; "
        f"unrelated texts: {numbers['likeness/random']:.2f}",
        *(
            f"  by {name}: {numbers[f'{key}/best_to_others']:.2f}; unrelated texts: {numbers[f'{key}/random']:.2f}"
            for key, name in (("meaning", "embeddings"), ("bertscore", "BERTScore"))
            if f"{key}/random" in numbers
        ),
        f"  of two candidates the longer has the higher reward in {(1 + numbers['length/agreement']) / 2:.0%} of the cases",
        "",
        *(f"{finding['level']}: {finding['text']}" for finding in found),
        "",
        *sizes_text(tables),
        f"Report: {page}",
    ]
    return "\n".join(lines)

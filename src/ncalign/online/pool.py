"""A round's pool: its samples are ranked, and given their log-probs, a chunk at a time, each written to disk once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator

from ncalign.core.progress import Bar
from ncalign.data.groups import REWARD_STEPS, Candidate, Group
from ncalign.data.rendering import Rendering, record_rendering
from ncalign.generation.base import Completion
from ncalign.generation.generate import completion_as_candidate
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder
from ncalign.objectives import Method
from ncalign.online.artefacts import LOGPROBS, Logprobs, read_artefact, write_artefact
from ncalign.online.config import OnlineConfig
from ncalign.online.drift import pool_health
from ncalign.online.offline import Offline
from ncalign.online.sampling import FRESH, ScoredSamples
from ncalign.training.data import scored_candidates
from ncalign.training.peers import decided_by_first


class LogprobSource(Protocol):
    """Log-probs of all candidates under some weights."""

    def __call__(self, groups: Sequence[EncodedGroup]) -> list[tuple[float, ...]]:
        """One list a group."""
        ...


@dataclass
class Ranked:
    """A prompt's candidates, ready to be encoded: fresh ones first.

    Attributes:
        encoded: all that has text, with rewards that may be missing.
        num_fresh: how many are fresh.
        columns: those that training sees; none where the method can't use the group.
        sampled_logprobs: of the fresh ones, as generation counted them; None where it is not exact.
        reason: why the method can't use the group; empty where it can.
        kept_out: whether it is there for the drift alone, and not trained on.
    """

    encoded: EncodedGroup
    num_fresh: int
    columns: list[int]
    sampled_logprobs: tuple[float, ...] | None
    reason: str = ""
    kept_out: bool = False


@dataclass
class Pool:
    """What a round trains on, and what its drift is measured on.

    Attributes:
        groups: to train on, with reference log-probs.
        known: of each group to train on, the log-probs under the policy that generated it, where they are known.
        measured: the prompts that are kept out of training, with their fresh completions and what these earned.
        generating: their log-probs under the policy that generated them.
        health: numbers of the fresh completions.
        counts: prompts, candidates and tokens.
    """

    groups: list[EncodedGroup]
    measured: list[EncodedGroup]
    generating: list[tuple[float, ...]]
    health: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    known: list[tuple[float, ...] | None] = field(default_factory=list)


# --- Rank and encode --------------------------------------------------------------------------------------------------


def rank(
    answered: ScoredSamples,
    encoder: Encoder,
    method: Method,
    config: OnlineConfig,
    *,
    kept_out: bool = False,
    variants: Offline | None = None,
) -> Ranked | None:
    """Encode a prompt's candidates and choose those for training; None where nothing can be encoded.

    A group that is ``kept_out`` has its fresh candidates, and none for training. ``variants`` are what settings made of the
    data's own candidates.
    """
    prompt, completions = answered.prompt, answered.completions
    written = [k for k, completion in enumerate(completions) if completion.text.strip()]
    mixed = config.candidates == "fresh_and_offline" and not kept_out
    offline = [replace(c, reference_logprob=None) for c in prompt.candidates if mixed and c.reward is not None]
    fresh = {k: replace(completion_as_candidate(prompt, completions[k], FRESH), reward=answered.rewards[k]) for k in written}
    if not fresh:
        return None
    cut = encoder.report.prompts_truncated
    try:
        encoded = encoder.encode(replace(prompt, candidates=[*fresh.values(), *offline]))
    except DroppedGroupError:
        return None
    whole = encoder.report.prompts_truncated == cut
    encoded, exact = as_sampled(encoded, completions, encoder.max_length if whole else 0, num_written=len(fresh))
    encoded, offline = (variants or Offline()).mixed_in(encoded, offline)
    # What was sampled without text is the policy's too: drift is measured on it, and no reward lets training see it.
    kept = list(range(len(completions))) if exact else written
    candidates = [*(fresh.get(k) for k in kept), *offline]
    rewards = [None if candidate is None else candidate.reward for candidate in candidates]
    logprobs = tuple(c.logprob for c in completions if c.logprob is not None)
    known = logprobs if exact and len(logprobs) == len(completions) and not offline else None
    if kept_out:
        return Ranked(replace(encoded, rewards=tuple(rewards)), len(kept), [], known, kept_out=True)
    columns = eligible_columns(rewards, len(kept), config.preferred)
    eligible = [candidate for k in columns if (candidate := candidates[k]) is not None]
    scored, reason = scored_candidates(replace(prompt, candidates=eligible), method)
    for k, candidate in zip(columns, scored.candidates if reason is None else (), strict=reason is None):
        rewards[k] = candidate.reward
    return Ranked(replace(encoded, rewards=tuple(rewards)), len(kept), columns if reason is None else [], known, reason or "")


def as_sampled(
    encoded: EncodedGroup, completions: Sequence[Completion], max_length: int, *, num_written: int
) -> tuple[EncodedGroup, bool]:
    """Replace encoded texts by the sampled ids (a text can have several tokenizations); returns whether it could.

    Args:
        encoded: a group whose first ``num_written`` completions are those of the sampled ones that have text.
        completions: what was sampled.
        max_length: most tokens of a prompt and its completion.
        num_written: how many of them have text.
    """
    ids = [completion.token_ids for completion in completions]
    if any(own is None or len(encoded.prompt) + len(own) > max_length for own in ids):
        return encoded, False
    if any(mask is not None for mask in encoded.masks[:num_written]):
        return encoded, False  # which of the sampled tokens are scored is known of the encoded ones alone
    sampled = tuple(np.asarray(own, dtype=np.int32) for own in ids)
    completed = (*sampled, *encoded.completions[num_written:])
    unknown: tuple[None, ...] = (None,) * len(completed)
    scored = (*(None,) * len(sampled), *encoded.masks[num_written:])
    return replace(encoded, completions=completed, rewards=unknown, reference_logprobs=unknown, scored=scored), True


def eligible_columns(rewards: Sequence[float | None], num_fresh: int, preferred: str) -> list[int]:
    """The candidates that training sees so that the best of them is the one that ``preferred`` names.

    With ``best_fresh`` the offline candidates that score as high as the best fresh one are left out, and with
    ``best_offline`` the fresh ones that score as high as the best offline one: they can't be negatives, and are not preferred.

    >>> eligible_columns([1.0, 3.0, 2.0, 5.0], 2, "best_fresh")
    [0, 1, 2]
    >>> eligible_columns([1.0, 6.0, 2.0, 5.0], 2, "best_offline")
    [0, 2, 3]
    """
    known = [k for k, reward in enumerate(rewards) if reward is not None]
    fresh, offline = [k for k in known if k < num_fresh], [k for k in known if k >= num_fresh]
    if preferred == "best":
        return known
    first, second = (fresh, offline) if preferred == "best_fresh" else (offline, fresh)
    if not first:
        return []
    best = max(rewards[k] or 0.0 for k in first)
    return sorted([*first, *(k for k in second if (rewards[k] or 0.0) < best)])


# --- Log-probs --------------------------------------------------------------------------------------------------------


def fill_logprobs(
    ranked: Sequence[Ranked],
    folder: Path,
    *,
    policy: LogprobSource,
    reference: LogprobSource,
    config: OnlineConfig,
    at_reference: bool,
    accelerator: Accelerator,
) -> tuple[list[tuple[float, ...] | None], list[tuple[float, ...] | None]]:
    """Log-probs under the generating policy and the reference, of the groups where each is needed.

    ``at_reference`` says that both have the same weights; the first process writes the files to the round's ``folder``.
    """
    # Other engines compute the log-probs of the same weights otherwise, as autocast does.
    known = config.generator == "transformers" and config.training.dtype != "bfloat16"
    found: tuple[list[tuple[float, ...] | None], ...] = ([], [])
    with Bar("Log-probs of the pool", len(ranked), shown=accelerator.is_main_process) as bar:
        for number, start in enumerate(range(0, len(ranked), config.chunk_size)):
            path = folder / f"logprobs-{number:05d}.json"
            chunk = ranked[start : start + config.chunk_size]
            if not decided_by_first(accelerator, path.is_file):
                trained = [bool(group.columns) for group in chunk]
                wanted = [
                    group.kept_out or (use and (at_reference or config.on_model == "importance"))
                    for group, use in zip(chunk, trained, strict=True)
                ]
                generating = _of_policy(chunk, wanted, policy, known=known)
                others = generating if at_reference else _where(trained, chunk, reference)
                written = {"policy": generating, "reference": others}
                decided_by_first(accelerator, partial(write_artefact, written, path))
            values: Logprobs = decided_by_first(accelerator, partial(read_artefact, path, LOGPROBS))
            for rows, read in zip(found, (values["policy"], values["reference"]), strict=True):
                rows += [None if row is None else tuple(row) for row in read]
            bar.advance(len(chunk))
    return found[0], found[1]


def _of_policy(
    chunk: Sequence[Ranked], wanted: Sequence[bool], policy: LogprobSource, *, known: bool
) -> list[tuple[float, ...] | None]:
    """Generation's own log-probs where they are those of the training's precision and tokens, else those of a pass."""
    own = [group.sampled_logprobs if known else None for group in chunk]
    lacking = [want and logprobs is None for want, logprobs in zip(wanted, own, strict=True)]
    computed = _where(lacking, chunk, policy)
    return [b if a is None else a for a, b in zip(own, computed, strict=True)]


def _where(wanted: Sequence[bool], chunk: Sequence[Ranked], source: LogprobSource) -> list[tuple[float, ...] | None]:
    values = iter(source([group.encoded for group, want in zip(chunk, wanted, strict=True) if want]))
    return [next(values) if want else None for want in wanted]


# --- All of it --------------------------------------------------------------------------------------------------------


def build_pool(
    answered: Sequence[ScoredSamples],
    ranked: Sequence[Ranked],
    generating: Sequence[tuple[float, ...] | None],
    reference: Sequence[tuple[float, ...] | None],
    *,
    method: Method,
    config: OnlineConfig,
    kept_out: Sequence[ScoredSamples],
) -> Pool:
    """The pool from its phases' artefacts: of what was answered to train on, and of what was for the drift (``kept_out``)."""
    groups, known, shares = [], list[tuple[float, ...] | None](), []
    for group, before, base in zip(ranked, generating, reference, strict=True):
        if not group.columns:
            continue
        assert base is not None
        weights: tuple[float, ...] = ()
        if config.on_model == "importance":
            assert before is not None
            weights, share = importance_weights(
                before[: group.num_fresh], base[: group.num_fresh], method.beta, most=config.max_importance
            )
            shares.append(share)
        groups.append(_selected(group, base, weights))
        known.append(None if before is None else tuple(before[k] for k in group.columns))
    told = [(group, before[: group.num_fresh]) for group, before in zip(ranked, generating, strict=True) if before is not None]
    health = pool_health(
        [[c.text for c in one.completions] for one in answered],
        [one.rewards for one in answered],
        [[c.num_tokens for c in one.completions] for one in answered],
        [[c.finished for c in one.completions] for one in answered],
        [before for _, before in told],
        [[len(ids) for ids in group.encoded.completions[: group.num_fresh]] for group, _ in told],
    )
    if shares:
        health["importance/effective_share"] = float(np.mean(shares))
    counts = {
        "prompts": len(answered),
        "prompts_kept_out": len(kept_out),
        "groups_trained_on": len(groups),
        "completions": sum(len(one.completions) for one in answered),
        "tokens": sum(c.num_tokens for one in answered for c in one.completions),
        "tokens_kept_out": sum(c.num_tokens for one in kept_out for c in one.completions),
        "empty": sum(not c.text.strip() for one in answered for c in one.completions),
        "cut": sum(not c.finished and bool(c.text.strip()) for one in answered for c in one.completions),
        "without_reward": sum(
            reward is None and bool(c.text.strip())
            for one in answered
            for reward, c in zip(one.rewards, one.completions, strict=True)
        ),
    }
    measured = [(group.encoded, before) for group, before in told if group.kept_out]
    return Pool(groups, [group for group, _ in measured], [before for _, before in measured], health, counts, known)


def importance_weights(
    generating: Sequence[float], reference: Sequence[float], beta: float, *, most: float
) -> tuple[tuple[float, ...], float]:
    r"""Weights model/policy of a group's fresh completions, and their effective sample size as a share.

    The model is $p_\theta \propto \pi_{ref}^{1-\beta} \pi_\theta^\beta$, so that $w \propto (\pi_{ref}/\pi_\theta)^{1-\beta}$;
    their mean within the group is 1, which estimates the model's normaliser for its prompt.

    >>> importance_weights([-1.0, -2.0], [-3.0, -1.0], 1.0, most=10.0)
    ((1.0, 1.0), 1.0)
    """
    exponents = [(1 - beta) * (base - own) for own, base in zip(generating, reference, strict=True)]
    largest = max(exponents)
    raw = [math.exp(exponent - largest) for exponent in exponents]
    mean = sum(raw) / len(raw)
    share = sum(raw) ** 2 / sum(w * w for w in raw) / len(raw)
    return tuple(min(w / mean, most) for w in raw), share


def _selected(group: Ranked, reference: tuple[float, ...], weights: tuple[float, ...]) -> EncodedGroup:
    encoded = group.encoded
    # Candidates of the data were not sampled from the policy: nothing is to be corrected.
    padded = (*weights, *[1.0] * (len(encoded.completions) - len(weights))) if weights else ()
    return replace(
        encoded,
        completions=tuple(encoded.completions[k] for k in group.columns),
        rewards=tuple(encoded.rewards[k] for k in group.columns),
        reference_logprobs=tuple(reference[k] for k in group.columns),
        weights=tuple(padded[k] for k in group.columns) if padded else (),
        scored=tuple(encoded.masks[k] for k in group.columns),
    )


def pool_groups(answered: Sequence[ScoredSamples], record: str, rendering: Rendering) -> Iterator[Group]:
    """The round's prompts with their fresh completions and rewards as groups.

    ``record`` says where the rewards came from, ``rendering`` how prompts that are plain strings were put to the policy.
    """
    for one in answered:
        candidates: list[Candidate] = [
            replace(completion_as_candidate(one.prompt, completion, FRESH), reward=reward)
            for completion, reward in zip(one.completions, one.rewards, strict=True)
            if completion.text.strip()
        ]
        if candidates:
            metadata = record_rendering(one.prompt.prompt, {**one.prompt.metadata, REWARD_STEPS: [record]}, rendering)
            yield replace(one.prompt, candidates=candidates, metadata=metadata)

"""A check before each round: do the generator and the policy hold the same weights?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ncalign.core.progress import say
from ncalign.data.groups import Group
from ncalign.generation.base import Completion, SamplingParams
from ncalign.generation.generate import completion_as_candidate
from ncalign.model.encoding import EncodedGroup
from ncalign.online.pool import answers, as_sampled
from ncalign.online.state import Run

_PROMPTS, _TOKENS = 4, 16


def _encoded(run: Run, group: Group, completion: Completion) -> EncodedGroup | None:
    """The sample as it was sampled; None where its text is encoded in other tokens."""
    # Some servers count the end token among an answer's log-probs, others don't.
    for finished in sorted({completion.finished, False}, reverse=True):
        candidate = replace(completion_as_candidate(group, completion, "probe"), finished=finished)
        encoded = run.encoder.encode(replace(group, candidates=[candidate]))
        encoded, exact = as_sampled(encoded, [completion], run.config.training.encoding.max_length, num_written=1)
        if exact or len(encoded.completions[0]) == completion.num_tokens:
            return encoded
    return None


def check_same_weights(run: Run, prompts: Sequence[Group], number: int) -> None:
    """Compare the log-probs that the generator reports for a few samples with the policy's own.

    Raises:
        ValueError: they differ by more than ``probe_tolerance`` nats a token, or the generator reports none.
    """
    if run.config.probe_tolerance is None:
        return
    # With tools first: some servers leave them out.
    asked = sorted(prompts, key=lambda group: not group.tools)[:_PROMPTS]
    # At temperature 1 what a server reports is the model's own log-prob.
    seed, params = run.config.training.seed + number, SamplingParams(_TOKENS)
    found = answers(asked, run.generator.get(), run.config, num_samples=1, params=params, seed=seed)
    groups, claimed, lengths = [], [], []
    for group, completion in ((group, one) for group, row in zip(asked, found, strict=True) for one in row):
        if completion.logprob is None:
            raise ValueError(
                f"round {number + 1}: the generator reports no log-probs, so that nobody knows whether it holds the policy's "
                "weights: have it report them, or set probe_tolerance: none"
            )
        if not completion.text.strip():
            continue
        encoded = _encoded(run, group, completion)
        if encoded is None:
            continue
        groups.append(encoded)
        claimed.append(completion.logprob)
        lengths.append(len(encoded.completions[0]))
    if not groups:
        say(f"note: round {number + 1}: generator and policy could not be compared: no sample was encoded as it was sampled")
        return
    own = [row[0] for row in run.engine.logprobs(groups)]
    off = sum(abs(a - b) for a, b in zip(own, claimed, strict=True)) / sum(lengths)
    if off > run.config.probe_tolerance:
        raise ValueError(
            f"round {number + 1}: generator and policy hold different weights: their log-probs of {sum(lengths)} sampled "
            f"tokens differ by {off:.3g} nats a token, above probe_tolerance={run.config.probe_tolerance}. The generator was "
            "not updated, serves another model or precision, or uses another chat template"
        )

"""A check before each round: do the generators and the policy hold the same weights?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from accelerate.utils import gather_object

from ncalign.core.progress import say
from ncalign.data.groups import Group
from ncalign.generation.base import Completion, Generator, SamplingParams
from ncalign.generation.failures import ServerError
from ncalign.generation.generate import completion_as_candidate
from ncalign.model.encoding import EncodedGroup
from ncalign.online.pool import as_sampled
from ncalign.online.sampling import answers
from ncalign.online.state import Run

_PROMPTS, _TOKENS = 4, 16


@dataclass(frozen=True)
class _Probe:
    """What a generator sampled, and the log-probs that it reports of it."""

    groups: list[EncodedGroup]
    claimed: list[float]


def _encoded(run: Run, group: Group, completion: Completion) -> EncodedGroup | None:
    """The sample as it was sampled; None where its text is encoded in other tokens."""
    # Some servers count the end token among an answer's log-probs, others don't.
    for finished in sorted({completion.finished, False}, reverse=True):
        candidate = replace(completion_as_candidate(group, completion, "probe"), finished=finished)
        # A generator reports the log-prob of all that it wrote, thoughts that training masks among it.
        encoded = replace(run.encoder.encode(replace(group, candidates=[candidate])), scored=())
        encoded, exact = as_sampled(encoded, [completion], run.config.training.encoding.max_length, num_written=1)
        if exact or len(encoded.completions[0]) == completion.num_tokens:
            return encoded
    return None


def check_same_weights(run: Run, prompts: Sequence[Group], number: int) -> None:
    """Compare the log-probs that each generator reports for a few samples with the policy's own.

    Raises:
        ValueError: they differ by more than ``probe_tolerance`` nats a token, or a generator reports none.
    """
    if run.config.probe_tolerance is None:
        return
    # With tools first: some servers leave them out.
    asked = sorted(prompts, key=lambda group: not group.tools)[:_PROMPTS]
    # At temperature 1 what a server reports is the model's own log-prob.
    seed, params = run.config.training.seed + number, SamplingParams(_TOKENS)
    ask = partial(answers, asked, config=run.config, num_samples=1, params=params, seed=seed)
    with run.generator.sampling():
        own = _samples(run.generator.each(), ask)
    sampled = {name: rows for some in gather_object([own]) for name, rows in some.items()}
    probes = {name: _probed(run, asked, rows, name, number) for name, rows in sampled.items()}
    logprobs = iter(run.engine.logprobs([group for probe in probes.values() for group in probe.groups]))
    for name, probe in probes.items():
        if not probe.groups:
            why = "no sample was encoded as it was sampled"
            run.say(f"note: round {number + 1}: {name} and policy could not be compared: {why}")
            continue
        tokens = sum(len(group.completions[0]) for group in probe.groups)
        off = sum(abs(next(logprobs)[0] - claimed) for claimed in probe.claimed) / tokens
        if off > run.config.probe_tolerance:
            raise ValueError(
                f"round {number + 1}: {name} and policy hold different weights: their log-probs of {tokens} sampled tokens "
                f"differ by {off:.3g} nats a token, above probe_tolerance={run.config.probe_tolerance}. The generator was not "
                "updated, serves another model or precision, or uses another chat template"
            )


def _samples(
    generators: Mapping[str, Generator], ask: Callable[[Generator], list[list[Completion]]]
) -> dict[str, list[list[Completion]]]:
    """What each generator answers; of several servers, one that is down is left out: it is given the weights when it is up."""
    found, failed = {}, list[ServerError]()
    for name, generator in generators.items():
        try:
            found[name] = ask(generator)
        except ServerError as error:
            say(f"warning: {name} is not compared with the policy: {error}")
            failed.append(error)
    if failed and not found:
        raise failed[0]
    return found


def _probed(run: Run, asked: Sequence[Group], found: Sequence[Sequence[Completion]], name: str, number: int) -> _Probe:
    """A generator's samples of the prompts, as far as they can be encoded as they were sampled."""
    probe = _Probe([], [])
    for group, completion in ((group, one) for group, row in zip(asked, found, strict=True) for one in row):
        if completion.logprob is None:
            raise ValueError(
                f"round {number + 1}: {name} reports no log-probs, so that nobody knows whether it holds the policy's weights: "
                "have it report them, or set probe_tolerance: none"
            )
        encoded = _encoded(run, group, completion) if completion.text.strip() else None
        if encoded is not None:
            probe.groups.append(encoded)
            probe.claimed.append(completion.logprob)
    return probe

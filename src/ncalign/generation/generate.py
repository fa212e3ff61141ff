"""`ncalign generate`: sample K candidate completions for each prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.data.groups import REWARD_STEPS, Candidate, Group, ReadReport, check_output, read_groups, write_groups
from ncalign.generation.base import Completion, Generator, PromptError, SamplingParams
from ncalign.generation.config import GenerateConfig
from ncalign.generation.local import TransformersGenerator
from ncalign.generation.remote import ServerGenerator
from ncalign.model.config import DType, StringPrompts
from ncalign.model.policy import DTYPES, load_model, load_tokenizer


@dataclass
class SampleCounts:
    """Counts of what was sampled.

    Attributes:
        groups: prompts answered.
        candidates: completions kept.
        empty: completions without text, left out since there is nothing to train on.
        missing: completions that the generator did not give.
        unfinished: completions cut at ``max_new_tokens``.
        tokens: tokens sampled, EOS included.
        seconds: time it took.
    """

    groups: int = 0
    candidates: int = 0
    empty: int = 0
    missing: int = 0
    unfinished: int = 0
    tokens: int = 0
    seconds: float = 0.0


def sample_groups(
    prompts: Sequence[Group],
    generator: Generator,
    *,
    num_samples: int,
    params: SamplingParams,
    seed: int,
    source: str,
    counts: SampleCounts | None = None,
) -> list[Group]:
    """The groups with newly sampled candidates in place of those that they had.

    A conversational prompt gets conversational completions, one assistant's turn each. Equal completions stay as they
    were drawn: how often one occurs is part of what a sample says about the model.

    Args:
        prompts: groups whose ids, prompts and metadata are kept, but for the record of earlier rewards.
        generator: what samples.
        num_samples: K, completions per prompt.
        params: how they are sampled.
        seed: of the sampling.
        source: recorded with each candidate.
        counts: filled in on the way.
    """
    counts = counts if counts is not None else SampleCounts()
    start = time.perf_counter()
    try:
        sampled = generator.generate([group.prompt for group in prompts], num_samples=num_samples, params=params, seed=seed)
    except PromptError as error:
        group = prompts[error.index]
        raise ValueError(f"{group.origin or f'prompt {error.index + 1}'}: group {group.id!r}: {error.detail}") from error
    counts.seconds += time.perf_counter() - start
    groups = []
    for group, completions in zip(prompts, sampled, strict=True):
        kept = [completion for completion in completions if completion.text.strip()]
        counts.groups += 1
        counts.candidates += len(kept)
        counts.empty += len(completions) - len(kept)
        counts.missing += num_samples - len(completions)
        counts.unfinished += sum(not completion.finished for completion in completions)
        counts.tokens += sum(completion.num_tokens for completion in completions)
        candidates = [completion_as_candidate(group, completion, source) for completion in kept]
        # New candidates have no rewards yet: the record of how rewards were made is of others.
        metadata = {name: value for name, value in group.metadata.items() if name != REWARD_STEPS}
        groups.append(replace(group, candidates=candidates, metadata=metadata))
    return groups


def completion_as_candidate(group: Group, completion: Completion, source: str) -> Candidate:
    """A completion of the group's kind: a string for a string, an assistant's turn for a conversation."""
    text = completion.text
    given = text if isinstance(group.prompt, str) else [{"role": "assistant", "content": text}]
    return Candidate(given, source=source, finished=completion.finished)


def _loaded(
    model: str, *, dtype: DType, string_prompts: StringPrompts, batch_size: int, trust_remote_code: bool
) -> TransformersGenerator:
    loaded = load_model(model, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    # nn.Module's own `to`: transformers' wrapper of it lost its type.
    torch.nn.Module.to(loaded, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    return TransformersGenerator(loaded, tokenizer, string_prompts=string_prompts, batch_size=batch_size)


def run_generate(config: GenerateConfig) -> dict[str, object]:
    """Sample candidates for the prompts of a file and write them as groups.

    Returns:
        ``output``, counts of groups, candidates, empty, missing, unfinished and tokens, ``tokens_per_second``.

    Raises:
        ValueError: the prompts can't be read, the model can't be loaded or a prompt doesn't fit it; nothing is written.
    """
    check_output(config.output)
    report = ReadReport()
    prompts = list(read_groups(config.prompts, on_bad_row=config.on_bad_row, report=report, allow_empty=True))
    if not prompts:
        raise ValueError(f"{config.prompts} has no prompt to answer: {report.summary()}")
    if report.skipped:
        say(report.notice(config.prompts))
    name, answers = config.model or "", None
    if config.server is not None:
        # What a server answered is kept until the output is written.
        name, answers = config.server.model, Store(config.output.with_name(f".{config.output.name}.answers"))
        generator: Generator = ServerGenerator(config.server, store=answers, string_prompts=config.string_prompts)
    else:
        generator = _loaded(
            name,
            dtype=config.dtype,
            string_prompts=config.string_prompts,
            batch_size=config.batch_size,
            trust_remote_code=config.trust_remote_code,
        )
    counts, params = SampleCounts(), SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    groups = sample_groups(
        prompts, generator, num_samples=config.num_samples, params=params, seed=config.seed, source=name, counts=counts
    )
    answered = [group for group in groups if group.candidates]
    if not answered:
        raise ValueError(f"{name} gave only empty completions to {config.prompts}: check its chat template and EOS token")
    write_groups(answered, config.output)
    if answers is not None:
        answers.delete()
    return {
        "output": str(config.output),
        "groups": len(answered),
        "candidates": counts.candidates,
        "empty": counts.empty,
        "missing": counts.missing,
        "unfinished": counts.unfinished,
        "tokens": counts.tokens,
        "tokens_per_second": counts.tokens / counts.seconds,
        "rows_skipped": report.skipped,
    }

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
from ncalign.model.policy import DTYPES, load_model, load_tokenizer


@dataclass
class SampleCounts:
    """What sampling came to.

    Attributes:
        groups: prompts answered.
        candidates: completions kept.
        empty: completions without text, left out: nothing of them can be trained on.
        unfinished: completions cut at ``max_new_tokens``.
        tokens: tokens sampled, EOS included.
        seconds: time it took.
    """

    groups: int = 0
    candidates: int = 0
    empty: int = 0
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
    """Groups of the given prompts with newly sampled candidates, which replace those that they had.

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
        counts.unfinished += sum(not completion.finished for completion in completions)
        counts.tokens += sum(completion.num_tokens for completion in completions)
        candidates = [completion_as_candidate(group, completion, source) for completion in kept]
        # New candidates have no rewards yet, so nothing is known of how these came to be.
        metadata = {name: value for name, value in group.metadata.items() if name != REWARD_STEPS}
        groups.append(replace(group, candidates=candidates, metadata=metadata))
    return groups


def completion_as_candidate(group: Group, completion: Completion, source: str) -> Candidate:
    """A completion of the group's kind: text for a text, an assistant's turn for a conversation."""
    if isinstance(group.prompt, str):
        return Candidate(completion.text, source=source, finished=completion.finished)
    return Candidate([{"role": "assistant", "content": completion.text}], source=source, finished=completion.finished)


def _name(config: GenerateConfig) -> str:
    return str(config.server.model if config.server is not None else config.model)


def _generator(config: GenerateConfig) -> tuple[Generator, Store | None]:
    """The generator, and where it keeps what a server answered until the output is written."""
    if config.server is not None:
        answers = Store(config.output.with_name(f".{config.output.name}.answers"))
        return ServerGenerator(config.server, store=answers, string_prompts=config.string_prompts), answers
    assert config.model is not None
    model = load_model(config.model, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code)
    # nn.Module's own `to`: transformers' wrapper of it lost its type.
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    return TransformersGenerator(model, tokenizer, string_prompts=config.string_prompts, batch_size=config.batch_size), None


def run_generate(config: GenerateConfig) -> dict[str, object]:
    """Sample candidates for the prompts of a file and write them as groups.

    Returns:
        ``output``, counts of groups, candidates, empty, unfinished and tokens, ``tokens_per_second``.

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
    generator, answers = _generator(config)
    counts = SampleCounts()
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    groups = sample_groups(
        prompts,
        generator,
        num_samples=config.num_samples,
        params=params,
        seed=config.seed,
        source=_name(config),
        counts=counts,
    )
    answered = [group for group in groups if group.candidates]
    if not answered:
        raise ValueError(
            f"{_name(config)} gave only empty completions to {config.prompts}: check its chat template and EOS token"
        )
    write_groups(answered, config.output)
    if answers is not None:
        answers.delete()
    return {
        "output": str(config.output),
        "groups": len(answered),
        "candidates": counts.candidates,
        "empty": counts.empty,
        "unfinished": counts.unfinished,
        "tokens": counts.tokens,
        "tokens_per_second": counts.tokens / counts.seconds,
        "rows_skipped": report.skipped,
    }

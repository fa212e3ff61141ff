"""`ncalign generate`: sample K candidate completions for each prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ncalign.core.outputs import claim
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.data.groups import REWARD_STEPS, Candidate, Group, ReadReport, check_output, read_groups, write_groups
from ncalign.data.rendering import Rendering, count_renderings, record_rendering, rendering_warning
from ncalign.generation.base import Completion, Generator, PromptError, SamplingParams
from ncalign.generation.config import GenerateConfig
from ncalign.generation.incomplete import incomplete_warning, remedies
from ncalign.generation.local import TransformersGenerator, load_for_generation
from ncalign.generation.remote import ServerGenerator
from ncalign.model.precision import resolve_dtype


@dataclass(frozen=True)
class SampleCounts:
    """Counts of what was sampled.

    Attributes:
        groups: prompts answered.
        candidates: completions kept.
        empty: completions without text, left out since there is nothing to train on.
        missing: completions that the generator did not give.
        unfinished: completions cut at ``max_new_tokens``.
        tokens: tokens sampled, EOS included.
        tokens_per_second: sampled, over all prompts.
    """

    groups: int
    candidates: int
    empty: int
    missing: int
    unfinished: int
    tokens: int
    tokens_per_second: float


def sample_groups(
    prompts: Sequence[Group], generator: Generator, *, num_samples: int, params: SamplingParams, seed: int, source: str
) -> tuple[list[Group], SampleCounts]:
    """The groups with newly sampled candidates in place of those that they had, and counts of what was sampled.

    A conversational prompt gets conversational completions, one assistant's turn each. Equal completions stay as they
    were drawn: how often one occurs is part of what a sample says about the model.

    Args:
        prompts: groups whose ids, prompts and metadata are kept, but for the records of how earlier candidates and rewards were
            made.
        generator: what samples.
        num_samples: K, completions per prompt.
        params: how they are sampled.
        seed: of the sampling.
        source: recorded with each candidate.
    """
    start = time.perf_counter()
    try:
        sampled = generator.generate([group.prompt for group in prompts], num_samples=num_samples, params=params, seed=seed)
    except PromptError as error:
        group = prompts[error.index]
        raise ValueError(f"{group.origin or f'prompt {error.index + 1}'}: group {group.id!r}: {error.detail}") from error
    seconds = time.perf_counter() - start
    groups = []
    for group, completions in zip(prompts, sampled, strict=True):
        candidates = [completion_as_candidate(group, one, source) for one in completions if one.text.strip()]
        # New candidates have no rewards yet: the record of how rewards were made is of others.
        metadata = {name: value for name, value in group.metadata.items() if name != REWARD_STEPS}
        metadata = record_rendering(group.prompt, metadata, generator.string_prompts)
        groups.append(replace(group, candidates=candidates, metadata=metadata))
    every = [completion for completions in sampled for completion in completions]
    kept, tokens = sum(len(group.candidates) for group in groups), sum(completion.num_tokens for completion in every)
    return groups, SampleCounts(
        groups=len(groups),
        candidates=kept,
        empty=len(every) - kept,
        missing=num_samples * len(groups) - len(every),
        unfinished=sum(not completion.finished for completion in every),
        tokens=tokens,
        tokens_per_second=tokens / seconds,
    )


def completion_as_candidate(group: Group, completion: Completion, source: str) -> Candidate:
    """A completion of the group's kind: a string for a string, an assistant's turn for a conversation."""
    text = completion.text
    given = text if isinstance(group.prompt, str) else [{"role": "assistant", "content": text}]
    return Candidate(given, source=source, finished=completion.finished)


def _say_how_prompts_are_given(config: GenerateConfig, prompts: Sequence[Group], used: Rendering) -> None:
    """Say what ``auto`` came to, and warn where the candidates that are there were made otherwise."""
    strings = sum(isinstance(group.prompt, str) for group in prompts)
    if strings and config.string_prompts == "auto":
        say(f"note: string_prompts auto: {strings} prompts that are plain strings are given as {used}")
    if warning := rendering_warning(count_renderings(prompts), used, what=str(config.prompts), does="this run samples"):
        say(warning)


def run_generate(config: GenerateConfig) -> dict[str, object]:
    """Sample candidates for the prompts of a file and write them as groups.

    Returns:
        ``output``, counts of groups, candidates, empty, missing, unfinished and tokens, ``tokens_per_second``; of a local
        model ``dtype``, its precision.

    Raises:
        ValueError: the prompts can't be read, the model can't be loaded or a prompt doesn't fit it; nothing is written.
    """
    inputs = {"prompts": config.prompts, "model": config.model}
    claim(config.output, verb="generate", inputs=inputs, overwrite=config.overwrite)
    check_output(config.output)
    report = ReadReport()
    groups_read = read_groups(
        config.prompts, on_bad_row=config.on_bad_row, report=report, allow_empty=True, join_rows=config.join_rows
    )
    prompts = list(groups_read)
    if not prompts:
        raise ValueError(f"{config.prompts} has no prompt to answer: {report.summary()}")
    if notice := report.notice(config.prompts):
        say(notice)
    name, answers, dtype, has_template = config.model or "", None, None, None
    if config.server is not None:
        # What a server answered is kept until the output is written.
        name, answers = config.server.model, Store(config.output.with_name(f".{config.output.name}.answers"))
        generator: Generator = ServerGenerator(config.server, store=answers, string_prompts=config.string_prompts)
    else:
        dtype = resolve_dtype(config.dtype)
        model, tokenizer = load_for_generation(name, dtype=dtype, trust_remote_code=config.trust_remote_code)
        generator = TransformersGenerator(model, tokenizer, string_prompts=config.string_prompts, batch_size=config.batch_size)
        has_template = bool(tokenizer.chat_template)
    _say_how_prompts_are_given(config, prompts, generator.string_prompts)
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    groups, counts = sample_groups(
        prompts, generator, num_samples=config.num_samples, params=params, seed=config.seed, source=name
    )
    rendering = generator.string_prompts if any(isinstance(group.prompt, str) for group in prompts) else None
    answered = [group for group in groups if group.candidates]
    cut = sum(not candidate.finished for group in answered for candidate in group.candidates)
    longest, spent = config.max_new_tokens, counts.unfinished > cut
    for_empty, for_cut = remedies(rendering, has_template=has_template, max_new_tokens=longest, spent=spent)
    if not answered:
        raise ValueError(f"{name} gave only empty completions to {config.prompts}: {for_empty}")
    if warning := incomplete_warning(counts.empty, cut, counts.empty + counts.candidates, for_empty=for_empty, for_cut=for_cut):
        say(f"warning: {warning}")
    write_groups(answered, config.output)
    if answers is not None:
        answers.delete()
    return {
        "output": str(config.output),
        **asdict(counts),
        "groups": len(answered),
        "rows_skipped": report.skipped,
        **(generator.record() if isinstance(generator, ServerGenerator) else {}),
        **({} if dtype is None else {"dtype": dtype}),
    }

"""`ncalign generate`: sample K candidate completions for each prompt."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ncalign.core.outputs import claim
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.data.groups import REWARD_STEPS, Candidate, Group, ReadReport, check_output, read_groups, write_groups
from ncalign.data.rendering import Rendering, count_renderings, record_rendering, rendering_warning
from ncalign.generation.base import Completion, Generator, LeftOutPrompts, PromptError, SamplingParams, group_name
from ncalign.generation.config import GenerateConfig
from ncalign.generation.incomplete import incomplete_warning, remedies
from ncalign.generation.local import TransformersGenerator, load_for_generation, prompts_notice
from ncalign.generation.remote import ServerGenerator
from ncalign.model.chat import ChatTemplate, template_date
from ncalign.model.config import Precision, template_kwargs
from ncalign.model.precision import resolve_dtype
from ncalign.model.untold import left_out, untold_notices


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
    prompts: Sequence[Group],
    generator: Generator,
    *,
    num_samples: int,
    params: SamplingParams,
    seed: int,
    source: str,
    left_out: LeftOutPrompts | None = None,
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
        left_out: counts the prompts that can't be answered, whose groups have no candidates; None raises at the first.

    Raises:
        ValueError: a prompt can't be answered, and such are not to be left out.
    """
    start = time.perf_counter()
    sampled = sample_prompts(prompts, generator, num_samples=num_samples, params=params, seed=seed, left_out=left_out)
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
        missing=num_samples * (len(groups) - (len(left_out.names) if left_out else 0)) - len(every),
        unfinished=sum(not completion.finished for completion in every),
        tokens=tokens,
        tokens_per_second=tokens / seconds,
    )


def sample_prompts(
    groups: Sequence[Group],
    generator: Generator,
    *,
    num_samples: int,
    params: SamplingParams,
    seed: int,
    left_out: LeftOutPrompts | None,
) -> list[list[Completion]]:
    """Completions of the groups' prompts, with their tools; none for those that ``left_out`` counts: they can't be answered.

    Raises:
        ValueError: a prompt can't be answered, and ``left_out`` is None.
    """
    texts, names = [group.prompt for group in groups], [group_name(group, index) for index, group in enumerate(groups)]
    refuse = None if left_out is None else left_out.among(names)
    tools, kwargs = [group.tools for group in groups], [group.template_kwargs for group in groups]
    given = {"template_kwargs": kwargs} if any(kwargs) else {}
    try:
        return generator.generate(texts, num_samples=num_samples, params=params, seed=seed, tools=tools, refuse=refuse, **given)
    except PromptError as error:
        raise ValueError(f"{names[error.index]}: {error.detail}") from error


def completion_as_candidate(group: Group, completion: Completion, source: str) -> Candidate:
    """A completion of the group's kind: a string for a string, an assistant's turn for a conversation."""
    text = completion.text
    given = text if isinstance(group.prompt, str) else [{"role": "assistant", "content": text}]
    return Candidate(given, source=source, finished=completion.finished)


def _say_how_prompts_are_given(
    config: GenerateConfig, prompts: Sequence[Group], used: Rendering, template: ChatTemplate | None
) -> None:
    """Say what ``auto`` came to and what a local model's template leaves out, and warn where candidates were made otherwise."""
    strings = sum(isinstance(group.prompt, str) for group in prompts)
    if strings and config.string_prompts == "auto":
        say(f"note: string_prompts auto: {strings} prompts that are plain strings are given as {used}")
    if template is not None:
        untold = Counter(
            name
            for group in prompts
            for name in left_out(template, group.prompt, used, tools=group.tools, kwargs=group.template_kwargs)
        )
        for notice in untold_notices(untold):
            say(f"note: {notice}")
    if warning := rendering_warning(count_renderings(prompts), used, what=str(config.prompts), does="this run samples"):
        say(warning)


def _generator(
    config: GenerateConfig, answers: Store | None, prompts: Sequence[Group]
) -> tuple[Generator, str, Precision | None, ChatTemplate | None]:
    """The generator and its model's name; a local model's precision, and its chat template."""
    kwargs = template_kwargs(config.chat_template_kwargs)
    if config.server is not None:
        server = ServerGenerator(config.server, store=answers, string_prompts=config.string_prompts, template_kwargs=kwargs)
        return server, config.server.model, None, None
    assert config.model is not None
    dtype = resolve_dtype(config.dtype)
    model, tokenizer = load_for_generation(config.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    today = template_date(tokenizer, config.template_date)
    template, control = ChatTemplate(tokenizer, today, kwargs), config.control_tokens_in_text
    local = TransformersGenerator(
        model,
        tokenizer,
        string_prompts=config.string_prompts,
        batch_size=config.batch_size,
        control_tokens=control,
        template=template,
    )
    asked = ((group.prompt, group.tools) for group in prompts)
    if notice := prompts_notice(tokenizer, asked, local.string_prompts, control):
        say(f"note: {notice}")
    return local, config.model, dtype, template


def _answers_file(config: GenerateConfig) -> Path | None:
    """Where a server's answers are kept until the output is written and on disk; None for a local model."""
    return config.output.with_name(f".{config.output.name}.answers") if config.server is not None else None


def _call(config: GenerateConfig) -> str:
    return Store.key("call", config.model_dump(mode="json"))


def _claim(config: GenerateConfig) -> None:
    """Refuse to replace a file, unless the very same call wrote it and was killed before it had tidied up."""
    path, output = _answers_file(config), config.output
    stopped = False
    if path is not None and path.is_file() and output.is_file() and not config.overwrite:
        answers = Store(path)
        stopped = answers.get(_call(config)) is not None
        answers.close()
    inputs = {"prompts": config.prompts, "model": config.model}
    claim(output, verb="generate", inputs=inputs, overwrite=config.overwrite or stopped)


def _warn_of_incomplete(
    config: GenerateConfig,
    name: str,
    counts: SampleCounts,
    answered: Sequence[Group],
    rendering: Rendering | None,
    *,
    has_template: bool | None,
) -> None:
    """Warn where more than a tenth of the model's completions are empty or cut, and raise where all are empty."""
    cut = sum(not candidate.finished for group in answered for candidate in group.candidates)
    longest, spent = config.max_new_tokens, counts.unfinished > cut
    for_empty, for_cut = remedies(rendering, has_template=has_template, max_new_tokens=longest, spent=spent)
    if not answered:
        raise ValueError(f"{name} gave only empty completions to {config.prompts}: {for_empty}")
    if warning := incomplete_warning(counts.empty, cut, counts.empty + counts.candidates, for_empty=for_empty, for_cut=for_cut):
        say(f"warning: {warning}")


def run_generate(config: GenerateConfig) -> dict[str, object]:
    """Sample candidates for the prompts of a file and write them as groups.

    Returns:
        ``output``, counts of groups, candidates, empty, missing, unfinished and tokens, ``tokens_per_second``; of a local
        model ``dtype``, its precision.

    Raises:
        ValueError: the prompts can't be read, the model can't be loaded or a prompt doesn't fit it; nothing is written.
    """
    _claim(config)
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
    answers = None if (kept := _answers_file(config)) is None else Store(kept)
    generator, name, dtype, template = _generator(config, answers, prompts)
    _say_how_prompts_are_given(config, prompts, generator.string_prompts, template)
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    left_out = LeftOutPrompts() if config.on_bad_row == "skip" else None
    groups, counts = sample_groups(
        prompts,
        generator,
        num_samples=config.num_samples,
        params=params,
        seed=config.seed,
        source=name,
        left_out=left_out,
    )
    if lost := left_out.notice(str(config.prompts)) if left_out is not None else None:
        say(lost)
    rendering = generator.string_prompts if any(isinstance(group.prompt, str) for group in prompts) else None
    answered = [group for group in groups if group.candidates]
    if lost is not None and not counts.candidates + counts.empty:
        raise ValueError(f"none of the prompts of {config.prompts} can be answered")
    has_template = None if template is None else bool(template.tokenizer.chat_template)
    _warn_of_incomplete(config, name, counts, answered, rendering, has_template=has_template)
    if answers is not None:
        answers.put(_call(config), "writes the output")
    write_groups(answered, config.output)
    if answers is not None:
        answers.delete()
    return {
        "output": str(config.output),
        **asdict(counts),
        "groups": len(answered),
        "rows_skipped": report.skipped,
        **(generator.record() if isinstance(generator, ServerGenerator) else {}),
        "prompts_left_out": dict(left_out.reasons) if left_out is not None else {},
        **({} if dtype is None else {"dtype": dtype}),
    }

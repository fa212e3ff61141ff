"""`ncalign answer`: a model's answers to a question set, for any judge."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from ncalign.core.atomic import check_writable
from ncalign.core.cache import cache_folder, private_folder
from ncalign.core.outputs import claim
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.data.config import OnBadRow
from ncalign.data.formats.group import TemplateKwargs, Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering
from ncalign.generation.base import Generator, LeftOutPrompts, PromptError, SamplingParams
from ncalign.generation.config import ServerConfig
from ncalign.generation.incomplete import incomplete_warning, remedies
from ncalign.generation.local import TransformersGenerator, load_for_generation, prompts_notice
from ncalign.generation.remote import ServerGenerator
from ncalign.generation.token_prompts import TokenPrompts
from ncalign.generation.vllm import VLLMGenerator
from ncalign.judging.answers import check_form, write_answers
from ncalign.judging.config import AnswerConfig, EvaluateConfig
from ncalign.judging.records import Answer, Question
from ncalign.judging.sets import read_questions
from ncalign.model.adapters import adapter_base, adapter_rank, is_adapter
from ncalign.model.chat import ChatTemplate, template_date, writes_date
from ncalign.model.config import Precision, StringPrompts, template_kwargs
from ncalign.model.policy import load_tokenizer, model_identity, reading_fingerprint, weights_fingerprint
from ncalign.model.precision import resolve_dtype
from ncalign.model.quantized import tell_of_whole_base
from ncalign.model.untold import left_out, untold_notices
from ncalign.report.tables import model_name

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""MT-Bench's, by category; the others are greedy."""


@dataclass(frozen=True)
class Answering:
    """How models answer a question set.

    Attributes:
        max_new_tokens: of a turn's answer.
        temperature: of all; None for MT-Bench's by category, and greedy elsewhere.
        seed: of the sampling.
        batch_size: answers that a transformers model samples at a time.
        dtype: of a transformers model in this process; None where there is none.
        vllm: whether vLLM samples, in this process.
        string_prompts: how questions of one turn that are plain text are put to a model.
        template_date: the date for chat templates that write it; None for today's.
        chat_template_kwargs: further values for chat templates, as NAME=VALUE.
        on_bad_row: whether a question that a model can't be asked stops the run, or is left out.
        trust_remote_code: run code that comes with a model.
    """

    max_new_tokens: int
    temperature: float | None = None
    seed: int = 0
    batch_size: int = 32
    dtype: Precision | None = "float32"
    vllm: bool = False
    string_prompts: StringPrompts = "auto"
    template_date: date | None = None
    chat_template_kwargs: tuple[str, ...] = ()
    on_bad_row: OnBadRow = "error"
    trust_remote_code: bool = False


def answering_of(config: AnswerConfig | EvaluateConfig, max_new_tokens: int, dtype: Precision | None) -> Answering:
    """How a verb's configuration has models answer, in the precision that its ``dtype`` came to."""
    names = [field.name for field in fields(Answering) if field.name not in ("max_new_tokens", "dtype")]
    return Answering(max_new_tokens, dtype=dtype, **{name: getattr(config, name) for name in names})


def answers_of_model(
    model: str | ServerConfig, questions: Sequence[Question], answering: Answering, *, name: str, store: Store
) -> list[Answer]:
    """The answers of a model, named by its folder, its hub id or its server; ``name`` is what the answers call it.

    The store keeps answers, each batch as it comes: a run that is stopped goes on from there.

    Raises:
        ValueError: the model can't be loaded, vLLM is not installed, the server's client can't be made, or a question does not
            fit the model.
    """
    generator, identity, template = _generator(model, answering, store)
    if answering.string_prompts == "auto" and generator.string_prompts == "raw":
        say(f"note: {name} has no chat template: questions are given to it as plain text (string_prompts auto)")
    if template is not None:
        rendering = generator.string_prompts
        untold = Counter(
            key
            for one in questions
            for key in left_out(template, one.asked([], rendering), rendering, tools=one.tools, kwargs=one.template_kwargs)
        )
        asked = ((one.asked([], rendering), one.tools) for one in questions)
        control = prompts_notice(template.tokenizer, asked, rendering)
        for notice in filter(None, (*untold_notices(untold), control)):
            say(f"note: {name}: {notice}")
    in_batches = isinstance(model, str) and not answering.vllm
    size = answering.batch_size if in_batches else max(1, len(questions))
    return answer_questions(questions, generator, answering, model=name, identity=identity, store=store, at_a_time=size)


def _generator(model: str | ServerConfig, answering: Answering, store: Store) -> tuple[Generator, str, ChatTemplate | None]:
    """The generator, what identifies its weights, and the chat template where it is not a server's."""
    kwargs = template_kwargs(answering.chat_template_kwargs)
    if isinstance(model, ServerConfig):
        server = ServerGenerator(model, store=store, string_prompts=answering.string_prompts, template_kwargs=kwargs)
        identity = f"{model.urls[0]} {model.model}"
        return server, f"{identity} {json.dumps(kwargs, sort_keys=True)}" if kwargs else identity, None
    trusted = answering.trust_remote_code
    if answering.vllm:
        tokenizer = load_tokenizer(model, trust_remote_code=trusted)
        template, given = _template(tokenizer, answering, kwargs)
        generator = _in_vllm(model, tokenizer, answering.string_prompts, template)
        return generator, Store.key("vllm", model_identity(model), *given), template
    assert answering.dtype is not None
    loaded, tokenizer = load_for_generation(model, dtype=answering.dtype, trust_remote_code=trusted)
    # What is asked depends on tokenizer and chat template too, and on the date that the template writes.
    template, given = _template(tokenizer, answering, kwargs)
    weights = weights_fingerprint(loaded, computation=answering.dtype)
    identity = Store.key(weights, reading_fingerprint(loaded, tokenizer), *given)
    local = TransformersGenerator(
        loaded, tokenizer, string_prompts=answering.string_prompts, batch_size=answering.batch_size, template=template
    )
    return local, identity, template


def _template(
    tokenizer: PreTrainedTokenizerBase, answering: Answering, kwargs: TemplateKwargs
) -> tuple[ChatTemplate, list[object]]:
    """The chat template, and what answers are kept by of what it is given: a date where it writes one, and further values."""
    today = template_date(tokenizer, answering.template_date)
    return ChatTemplate(tokenizer, today, kwargs), [
        *([str(today)] if writes_date(tokenizer) else []),
        *([kwargs] if kwargs else []),
    ]


def _in_vllm(
    model: str, tokenizer: PreTrainedTokenizerBase, string_prompts: StringPrompts, template: ChatTemplate
) -> VLLMGenerator:
    """VLLM with a model or, where the folder holds an adapter, with its base and the adapter."""
    tokens = TokenPrompts(tokenizer, string_prompts=string_prompts, template=template)
    if not is_adapter(model):
        return VLLMGenerator(model, tokens)
    tell_of_whole_base(model)
    generator = VLLMGenerator(adapter_base(model), tokens, adapter_rank=adapter_rank(model))
    generator.load_adapter(Path(model))
    return generator


def answer_questions(
    questions: Sequence[Question],
    generator: Generator,
    answering: Answering,
    *,
    model: str,
    identity: str,
    store: Store,
    at_a_time: int,
) -> list[Answer]:
    """A generator's answer to each question, turn by turn; those that are in the store are not asked for again.

    Args:
        questions: of a set.
        generator: what answers.
        answering: how long its answers may be, and how they are sampled.
        model: its name in the answers.
        identity: of the weights; the store keeps answers by it, the conversation and the sampling.
        store: keeps answers, each batch as it comes.
        at_a_time: questions handed to the generator at a time.

    Raises:
        ValueError: a question does not fit the model.
    """

    def temperature(question: Question) -> float:
        return TEMPERATURES.get(question.category, 0.0) if answering.temperature is None else answering.temperature

    given: dict[str, list[_Given]] = {question.id: [] for question in questions}
    left_out = LeftOutPrompts() if answering.on_bad_row == "skip" else None
    rendering = generator.string_prompts
    for turn in range(max((len(question.turns) for question in questions), default=0)):
        open_ = [one for one in questions if len(one.turns) > turn and not (left_out and _asked(one.id) in left_out.names)]
        ordered = sorted(open_, key=temperature)
        for degree, same in groupby(ordered, key=temperature):
            talks = {one.id: _talk(one, given[one.id], rendering) for one in same}
            params = SamplingParams(answering.max_new_tokens, degree)
            keys = _Keys(identity, store, answering.seed)
            found = _answers_to(talks, generator, params, keys, at_a_time=at_a_time, left_out=left_out)
            for question_id, answer in found.items():
                given[question_id].append(answer)
    if left_out is not None and (notice := left_out.notice(model)):
        say(notice)
    given = {question: found for question, found in given.items() if not left_out or _asked(question) not in left_out.names}
    if questions and not given:
        raise ValueError(f"{model} can be asked none of the questions")
    _warn_of_incomplete([one for row in given.values() for one in row], questions, rendering, model, answering.max_new_tokens)
    return [
        Answer(
            question.id,
            model,
            tuple(one.text for one in given[question.id]),
            tuple(one.num_tokens for one in given[question.id]),
            rendering if question.is_text else None,
        )
        for question in questions
        if question.id in given
    ]


def _asked(question: str) -> str:
    return f"question {question!r}"


class _Keys(NamedTuple):
    """What an answer is kept by, besides its prompt and its sampling."""

    identity: str
    store: Store
    seed: int


class _Talk(NamedTuple):
    """What a model is asked, what it may call, and further values for its chat template."""

    prompt: str | list[Message]
    tools: Tools
    kwargs: TemplateKwargs


def _talk(question: Question, answers: Sequence[_Given], rendering: Rendering) -> _Talk:
    prompt = question.asked([answer.text for answer in answers], rendering)
    return _Talk(prompt, question.tools, question.template_kwargs)


class _Given(NamedTuple):
    """A turn's answer as the store keeps it."""

    text: str
    num_tokens: int
    # What was kept before this was recorded counts as finished.
    finished: bool = True


_GIVEN = TypeAdapter(_Given)


def _warn_of_incomplete(
    given: Sequence[_Given], questions: Sequence[Question], rendering: Rendering, model: str, max_new_tokens: int
) -> None:
    """Warn where more than a tenth of a model's answers are empty or cut."""
    used = rendering if any(question.is_text for question in questions) else None
    spent = any(not one.text and not one.finished for one in given)
    for_empty, for_cut = remedies(used, has_template=None, max_new_tokens=max_new_tokens, spent=spent)
    empty = sum(not one.text for one in given)
    cut = sum(bool(one.text) and not one.finished for one in given)
    if warning := incomplete_warning(empty, cut, len(given), for_empty=for_empty, for_cut=for_cut):
        say(f"warning: {model}: {warning}")


def _answers_to(
    talks: Mapping[str, _Talk],
    generator: Generator,
    params: SamplingParams,
    kept_by: _Keys,
    *,
    at_a_time: int,
    left_out: LeftOutPrompts | None,
) -> dict[str, _Given]:
    """The answer to each question's prompt, but for those that are left out."""
    identity, store, seed = kept_by
    sampling = [params.max_new_tokens, params.temperature, params.top_p, params.top_k, seed if params.temperature else 0]
    keys = _keys(talks, "answer", identity, sampling=sampling, greedy=not params.temperature)
    kept = {question: store.get_as(key, _GIVEN) for question, key in keys.items()}
    asked = [question for question, answer in kept.items() if answer is None]
    for start in range(0, len(asked), at_a_time):
        part = asked[start : start + at_a_time]
        # Of the questions: a part has draws of its own, and the same ones when a run goes on.
        part_seed = (seed + int(keys[part[0]][:8], 16)) % 2**31
        prompts, tools = [talks[question].prompt for question in part], [talks[question].tools for question in part]
        kwargs = [talks[question].kwargs for question in part]
        more = {"template_kwargs": kwargs} if any(kwargs) else {}
        names = [_asked(question) for question in part]
        refuse = None if left_out is None else left_out.among(names)
        try:
            found = generator.generate(
                prompts, num_samples=1, params=params, seed=part_seed, tools=tools, refuse=refuse, **more
            )
        except PromptError as error:
            raise ValueError(f"{names[error.index]}: {error.detail}") from error
        rows = ((question, row[0]) for question, row in zip(part, found, strict=True) if row)
        given = {question: _Given(one.text.strip(), one.num_tokens, one.finished) for question, one in rows}
        # Together: with a part of them kept, a run that goes on would ask for the rest with another seed.
        store.put_all({keys[question]: answer for question, answer in given.items()})
        kept |= given
    return {question: answer for question, answer in kept.items() if answer is not None}


def _keys(talks: Mapping[str, _Talk], *parts: object, sampling: list[float], greedy: bool) -> dict[str, str]:
    """What each question's answer is kept by: equal questions share a greedy answer, and have samples of their own."""
    found: dict[str, str] = {}
    for question, (prompt, tools, kwargs) in talks.items():
        key = Store.key(*parts, prompt, sampling, *(given for given in (tools, kwargs) if given))
        while not greedy and key in found.values():
            key = Store.key(key)
        found[question] = key
    return found


def run_answer(config: AnswerConfig) -> dict[str, Any]:
    """Answer a set, write the file, and return ``output`` and the numbers of questions, tokens and answers without text.

    Raises:
        ValueError: the set can't be read, the model can't be loaded, or a question doesn't fit it; what was answered is kept.
    """
    inputs = {"model": config.model, "set": config.set_name, "set_file": config.set_file}
    claim(config.output, verb="answer", inputs=inputs, overwrite=config.overwrite)
    check_writable(config.output)
    questions = read_questions(config.set_name, file=config.set_file, on_bad_row=config.on_bad_row)[: config.limit]
    check_form(questions, config.form)
    model = config.server if config.server is not None else config.model
    assert model is not None
    name = config.name or model_name(model if isinstance(model, str) else model.model)
    store = Store(private_folder(config.cache_dir or cache_folder()) / "answers.sqlite")
    dtype = resolve_dtype(config.dtype) if isinstance(model, str) and not config.vllm else None
    answering = answering_of(config, config.max_new_tokens, dtype)
    answers = answers_of_model(model, questions, answering, name=name, store=store)
    write_answers(answers, questions, config.output, form=config.form)
    return {
        "output": str(config.output),
        "questions": len(answers),
        **({"left_out": left} if (left := len(questions) - len(answers)) else {}),
        "tokens": sum(sum(answer.num_tokens) for answer in answers),
        "empty": sum(not all(answer.turns) for answer in answers),
        **({} if dtype is None else {"dtype": dtype}),
    }

"""`ncalign answer`: a model's answers to a question set, for any judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ncalign.core.atomic import check_writable
from ncalign.core.cache import cache_folder
from ncalign.core.store import Store
from ncalign.generation import Generator, ServerGenerator, TransformersGenerator
from ncalign.generation.config import ServerConfig
from ncalign.generation.vllm import VLLMGenerator
from ncalign.judging.answers import answer_questions, check_form, write_answers
from ncalign.judging.config import AnswerConfig
from ncalign.judging.records import Answer, Question
from ncalign.judging.sets import read_questions
from ncalign.model.config import DType
from ncalign.model.policy import DTYPES, adapter_base, load_model, load_tokenizer, weights_fingerprint
from ncalign.report.tables import model_name
from ncalign.tasks.lm_backend import model_identity


def make_generator(
    model: str | None,
    server: ServerConfig | None,
    *,
    vllm: bool,
    dtype: DType,
    batch_size: int,
    store: Store,
    trust_remote_code: bool,
) -> tuple[Generator, str]:
    """What answers, and what tells its weights from others'.

    Raises:
        ValueError: the model can't be loaded, vLLM is not installed, or the server's client can't be made.
    """
    if server is not None:
        return ServerGenerator(server, store=store, string_prompts="user_turn"), f"{server.base_url} {server.model}"
    assert model is not None
    if vllm:
        return _in_vllm(model, trust_remote_code=trust_remote_code), Store.key("vllm", model_identity(model))
    loaded = load_model(model, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    # What is asked depends on the chat template too.
    identity = Store.key(weights_fingerprint(loaded, computation=dtype), tokenizer.chat_template or "")
    # nn.Module's own `to`: transformers' wrapper of it lost its type.
    torch.nn.Module.to(loaded, "cuda" if torch.cuda.is_available() else "cpu")
    return TransformersGenerator(loaded, tokenizer, string_prompts="user_turn", batch_size=batch_size), identity


def _in_vllm(model: str, *, trust_remote_code: bool) -> VLLMGenerator:
    """VLLM with a model or, where the folder holds an adapter, with its base and the adapter."""
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    adapter = Path(model) / "adapter_config.json"
    if not adapter.is_file():
        return VLLMGenerator(model, tokenizer, string_prompts="user_turn")
    rank = int(json.loads(adapter.read_text(encoding="utf-8")).get("r", 16))
    generator = VLLMGenerator(adapter_base(model), tokenizer, adapter_rank=rank, string_prompts="user_turn")
    generator.load_adapter(Path(model))
    return generator


def answers_of_model(
    model: str | None,
    questions: Sequence[Question],
    *,
    name: str,
    store: Store,
    max_new_tokens: int,
    temperature: float | None,
    batch_size: int,
    dtype: DType,
    seed: int,
    trust_remote_code: bool,
    vllm: bool = False,
    server: ServerConfig | None = None,
) -> list[Answer]:
    """A model's answers to the questions; see :func:`ncalign.judging.answers.answer_questions`."""
    generator, identity = make_generator(
        model, server, vllm=vllm, dtype=dtype, batch_size=batch_size, store=store, trust_remote_code=trust_remote_code
    )
    return answer_questions(
        questions,
        generator,
        model=name,
        identity=identity,
        store=store,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        at_a_time=batch_size if server is None and not vllm else max(1, len(questions)),
        seed=seed,
    )


def run_answer(config: AnswerConfig) -> dict[str, Any]:
    """Answer a set and write the file.

    Returns:
        ``output``, the number of questions, of tokens, and of answers without text.

    Raises:
        ValueError: the set can't be read, the model can't be loaded, or a question doesn't fit it; what was answered is kept.
    """
    check_writable(config.output)
    questions = read_questions(config.set_name, file=config.set_file)[: config.limit]
    check_form(questions, config.form)
    name = config.name or model_name(str(config.server.model if config.server is not None else config.model))
    answers = answers_of_model(
        config.model,
        questions,
        name=name,
        store=Store((config.cache_dir or cache_folder()) / "answers.sqlite"),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
        dtype=config.dtype,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        vllm=config.vllm,
        server=config.server,
    )
    write_answers(answers, questions, config.output, form=config.form)
    return {
        "output": str(config.output),
        "questions": len(questions),
        "tokens": sum(sum(answer.num_tokens) for answer in answers),
        "empty": sum(not all(answer.turns) for answer in answers),
    }

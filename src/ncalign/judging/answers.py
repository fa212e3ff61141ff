"""Answers to a question set: asked of any generator, kept as they come, written and read in the original tools' forms."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ncalign.core.atomic import write_text_atomic
from ncalign.core.errors import DataError, names
from ncalign.core.store import Store
from ncalign.data.groups import Message
from ncalign.generation import Generator, SamplingParams
from ncalign.generation.base import PromptError
from ncalign.judging.records import Answer, Question
from ncalign.judging.sets import rows_of
from ncalign.stats.style import markdown_counts

Form: TypeAlias = Literal["ncalign", "alpaca_eval", "fastchat", "arena_hard"]

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""MT-Bench's, by category; the others are greedy."""


def answer_questions(
    questions: Sequence[Question],
    generator: Generator,
    *,
    model: str,
    identity: str,
    store: Store,
    max_new_tokens: int,
    temperature: float | None,
    at_a_time: int,
    seed: int,
) -> list[Answer]:
    """A model's answer to each question, turn by turn; those that are in the store are not asked for again.

    Args:
        questions: of a set.
        generator: what answers.
        model: what the answers are filed under for readers.
        identity: of the weights; answers are kept by it, the conversation and the sampling.
        store: keeps answers, each batch as it comes: a run that is stopped goes on from there.
        max_new_tokens: of a turn's answer.
        temperature: of all; None for MT-Bench's by category, and greedy elsewhere.
        at_a_time: questions handed to the generator at a time.
        seed: of the sampling.

    Raises:
        ValueError: a question does not fit the model.
    """
    given: dict[str, list[tuple[str, int]]] = {question.id: [] for question in questions}
    for turn in range(max((len(question.turns) for question in questions), default=0)):
        open_ = [question for question in questions if len(question.turns) > turn]
        ordered = sorted(open_, key=lambda q: _temperature(q, temperature))
        for degree, same in groupby(ordered, key=lambda q: _temperature(q, temperature)):
            params = SamplingParams(max_new_tokens, degree)
            _answer_turn(list(same), turn, given, generator, params, identity=identity, store=store, size=at_a_time, seed=seed)
    return [
        Answer(question.id, model, tuple(text for text, _ in given[question.id]), tuple(n for _, n in given[question.id]))
        for question in questions
    ]


def _temperature(question: Question, temperature: float | None) -> float:
    return TEMPERATURES.get(question.category, 0.0) if temperature is None else temperature


def _answer_turn(
    questions: Sequence[Question],
    turn: int,
    given: dict[str, list[tuple[str, int]]],
    generator: Generator,
    params: SamplingParams,
    *,
    identity: str,
    store: Store,
    size: int,
    seed: int,
) -> None:
    """The answers to one turn, added to what was given before."""
    talks = {question.id: _conversation(question, given[question.id]) for question in questions}
    sampling = [params.max_new_tokens, params.temperature, params.top_p, params.top_k, seed if params.temperature else 0]
    keys = {key: Store.key("answer", identity, talk, sampling) for key, talk in talks.items()}
    kept = {key: store.get(place) for key, place in keys.items()}
    asked = [question for question in questions if kept[question.id] is None]
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        # Of the questions: a part has draws of its own, and the same ones when a run goes on.
        part_seed = (seed + int(keys[part[0].id][:8], 16)) % 2**31
        try:
            found = generator.generate([talks[q.id] for q in part], num_samples=1, params=params, seed=part_seed)
        except PromptError as error:
            raise ValueError(f"question {part[error.index].id!r}: {error.detail}") from error
        for question, completions in zip(part, found, strict=True):
            kept[question.id] = [completions[0].text.strip(), completions[0].num_tokens]
            store.put(keys[question.id], kept[question.id])
    for question in questions:
        text, number = kept[question.id]
        given[question.id].append((text, number))


def _conversation(question: Question, given: Sequence[tuple[str, int]]) -> list[Message]:
    talk: list[Message] = []
    for asked, (answer, _) in zip(question.turns, given, strict=False):
        talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*talk, {"role": "user", "content": question.turns[len(given)]}]


def check_form(questions: Sequence[Question], form: Form) -> None:
    """Raise where a form can't hold the answers to these questions, before they are asked.

    Raises:
        ValueError: AlpacaEval's has one turn, and a question has more.
    """
    longer = [question for question in questions if len(question.turns) > 1]
    if form == "alpaca_eval" and longer:
        raise ValueError(
            f"question {longer[0].id!r} has {len(longer[0].turns)} turns, and form: alpaca_eval holds one: choose ncalign, "
            "fastchat or arena_hard"
        )


def write_answers(answers: Sequence[Answer], questions: Sequence[Question], path: Path, *, form: Form) -> None:
    """Write answers as JSON Lines of ours, or as AlpacaEval, FastChat or Arena-Hard-Auto read them.

    Raises:
        OSError: the file can't be written.
        ValueError: the form can't hold the answers.
    """
    check_form(questions, form)
    asked = {question.id: question for question in questions}
    if form == "alpaca_eval":
        rows = [
            {
                "instruction": asked[answer.question].turns[0],
                "output": answer.turns[0],
                "generator": answer.model,
                "dataset": asked[answer.question].category,
            }
            for answer in answers
        ]
        write_text_atomic(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", path)
        return
    writers = {"ncalign": _our_row, "fastchat": _fastchat_row, "arena_hard": _arena_row}
    lines = (json.dumps(writers[form](answer, asked[answer.question]), ensure_ascii=False) for answer in answers)
    write_text_atomic("".join(line + "\n" for line in lines), path)


def _our_row(answer: Answer, question: Question) -> dict[str, Any]:
    return {
        "question": answer.question,
        "model": answer.model,
        "turns": list(answer.turns),
        "num_tokens": list(answer.num_tokens),
    }


def _id(answer: Answer) -> str:
    """The same answer has the same id, whenever it is written."""
    text = json.dumps([answer.question, answer.model, answer.turns])
    return hashlib.blake2b(text.encode(), digest_size=11).hexdigest()


def _number(question: str) -> int | str:
    """FastChat's question ids are numbers."""
    return int(question) if question.isdigit() else question


def _fastchat_row(answer: Answer, question: Question) -> dict[str, Any]:
    return {
        "question_id": _number(answer.question),
        "answer_id": _id(answer),
        "model_id": answer.model,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": time.time(),
    }


def _arena_row(answer: Answer, question: Question) -> dict[str, Any]:
    """A row for both versions: 2.0 reads uid, model, messages and metadata, 0.1 the others."""
    talk: list[dict[str, Any]] = []
    for asked, text in zip(question.turns, answer.turns, strict=False):
        talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": {"answer": text}}]
    turns: list[dict[str, Any]] = [{"content": text} for text in answer.turns]
    for turn, number in zip(turns, answer.num_tokens, strict=False):
        turn["token_len"] = number
    # Style control needs the length: without it there is nothing to control by.
    style = {"token_len": answer.num_tokens[-1], **markdown_counts(answer.turns[-1])} if answer.num_tokens else None
    return {
        "uid": answer.question,
        "question_id": answer.question,
        "ans_id": _id(answer),
        "answer_id": _id(answer),
        "model": answer.model,
        "model_id": answer.model,
        "messages": talk,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
        **({"metadata": style} if style is not None else {}),
    }


def read_answers(path: Path, questions: Sequence[Question]) -> list[Answer]:
    """Read answers in any of these forms; AlpacaEval's are matched to the questions by their text.

    Raises:
        ValueError: the file can't be read, or a row is no answer; two are to one question.
    """
    by_text = {question.turns[0]: question.id for question in questions}
    found: dict[str, Answer] = {}
    for place, row in rows_of(path):
        try:
            answer = _answer(row, by_text)
        except (KeyError, TypeError, IndexError, AttributeError):
            answer = None
        if answer is None or not all(isinstance(text, str) for text in answer.turns):
            raise DataError(
                f"{place} is no answer: {{question, model, turns}}, AlpacaEval's {{instruction, output, generator}}, "
                f"FastChat's "
                f"{{question_id, model_id, choices}} or Arena-Hard's {{uid, model, messages}} is needed, found {names(row)}"
            )
        if answer.question in found:
            raise DataError(f"{place}: there are two answers to the question {answer.question!r}: leave one out")
        found[answer.question] = answer
    return list(found.values())


def _answer(row: Mapping[str, Any], by_text: Mapping[str, str]) -> Answer | None:
    if "question" in row and "turns" in row:
        return Answer(str(row["question"]), str(row["model"]), tuple(row["turns"]), tuple(row.get("num_tokens") or ()))
    if "instruction" in row and "output" in row:
        # One to a question of another set counts nowhere.
        question = by_text.get(row["instruction"], f"another set: {row['instruction']}")
        return Answer(question, str(row["generator"]), (row["output"],))
    if "choices" in row:
        turns = row["choices"][0]["turns"]
        texts = tuple(turn["content"] if isinstance(turn, dict) else turn for turn in turns)
        numbers = tuple(int(turn["token_len"]) for turn in turns if isinstance(turn, dict) and "token_len" in turn)
        return Answer(str(row["question_id"]), str(row["model_id"]), texts, numbers if len(numbers) == len(texts) else ())
    if "messages" in row:
        said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        # Arena-Hard keeps a reasoning model's answer apart from its thoughts.
        texts = tuple(text["answer"] if isinstance(text, dict) else text for text in said)
        length = (row.get("metadata") or {}).get("token_len")
        return Answer(str(row["uid"]), str(row["model"]), texts, (int(length),) if length and len(texts) == 1 else ())
    return None

"""Files of answers to a question set: our own, AlpacaEval's, FastChat's and Arena-Hard-Auto's."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ncalign.core.atomic import write_json_atomic, write_jsonl_atomic
from ncalign.core.errors import DataError, names
from ncalign.data.formats.sources import rows_of
from ncalign.judging.records import Answer, Question, fastchat_id
from ncalign.stats.style import markdown_counts

Form: TypeAlias = Literal["ncalign", "alpaca_eval", "fastchat", "arena_hard"]


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
    rows = [_ROWS[form](answer, asked[answer.question]) for answer in answers]
    if form == "alpaca_eval":
        write_json_atomic(rows, path)
    else:
        write_jsonl_atomic(rows, path)


def _alpaca_row(answer: Answer, question: Question) -> dict[str, Any]:
    row = {"instruction": question.turns[0], "output": answer.turns[0], "generator": answer.model}
    return {**row, "dataset": question.category}


def _id(answer: Answer) -> str:
    """The same answer has the same id, whenever it is written."""
    text = json.dumps([answer.question, answer.model, answer.turns])
    return hashlib.blake2b(text.encode(), digest_size=11).hexdigest()


def _fastchat_row(answer: Answer, question: Question) -> dict[str, Any]:
    return {
        "question_id": fastchat_id(answer.question),
        "answer_id": _id(answer),
        "model_id": answer.model,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": time.time(),
    }


def _arena_row(answer: Answer, question: Question) -> dict[str, Any]:
    """A row for both versions: 2.0 reads uid, model, messages and metadata, 0.1 the others."""
    said = zip(question.turns, [{"answer": text} for text in answer.turns], strict=False)
    talk = [{"role": role, "content": text} for both in said for role, text in zip(("user", "assistant"), both, strict=True)]
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


_ROWS: Mapping[Form, Callable[[Answer, Question], dict[str, Any]]] = {
    "ncalign": lambda answer, question: {name: value for name, value in asdict(answer).items() if value is not None},
    "alpaca_eval": _alpaca_row,
    "fastchat": _fastchat_row,
    "arena_hard": _arena_row,
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
                f"FastChat's {{question_id, model_id, choices}} or Arena-Hard's {{uid, model, messages}} is needed, "
                f"found {names(row)}"
            )
        if answer.question in found:
            raise DataError(f"{place}: there are two answers to the question {answer.question!r}: leave one out")
        found[answer.question] = answer
    return list(found.values())


def model_in(path: Path) -> str | None:
    """The model that wrote the answers of a file, as they say themselves; None where they name none, or several.

    Raises:
        ValueError: the file can't be read.
    """
    named = {next((row[key] for key in ("model", "generator", "model_id") if row.get(key)), None) for _, row in rows_of(path)}
    found = named.pop() if len(named) == 1 else None
    return found if isinstance(found, str) else None


def _answer(row: Mapping[str, Any], by_text: Mapping[str, str]) -> Answer | None:
    match row:
        case {"question": question, "turns": turns}:
            rendering = row.get("string_prompts")
            made = rendering if rendering in ("raw", "user_turn") else None
            return Answer(str(question), str(row["model"]), tuple(turns), tuple(row.get("num_tokens") or ()), made)
        case {"instruction": text, "output": output}:
            # One to a question of another set counts nowhere.
            return Answer(by_text.get(text, f"another set: {text}"), str(row["generator"]), (output,))
        case {"choices": [{"turns": turns}, *_]}:
            texts = tuple(turn["content"] if isinstance(turn, dict) else turn for turn in turns)
            numbers = tuple(int(turn["token_len"]) for turn in turns if isinstance(turn, dict) and "token_len" in turn)
            counted = numbers if len(numbers) == len(texts) else ()
            return Answer(str(row["question_id"]), str(row["model_id"]), texts, counted)
        case {"messages": messages}:
            said = [message["content"] for message in messages if message["role"] == "assistant"]
            # Arena-Hard keeps a reasoning model's answer apart from its thoughts.
            texts = tuple(text["answer"] if isinstance(text, dict) else text for text in said)
            length = (row.get("metadata") or {}).get("token_len")
            return Answer(str(row["uid"]), str(row["model"]), texts, (int(length),) if length and len(texts) == 1 else ())
    return None

"""Question sets, read from local files in their original formats; one of our own is bundled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.core.progress import say
from ncalign.data.config import OnBadRow
from ncalign.data.formats.sources import rows_of
from ncalign.data.groups import ReadReport, read_groups
from ncalign.judging.records import Question

BUNDLED = "instructions"
"""Our own prompts with instructions that a program checks."""
WHERE = {
    "alpaca-eval": "alpaca_eval.json (805 instructions) of the data set tatsu-lab/alpaca_eval on the Hugging Face hub",
    "arena-hard": "question.jsonl of data/arena-hard-v0.1 or arena-hard-v2.0 in the repository lmarena/arena-hard-auto on "
    "GitHub",
    "mt-bench": "question.jsonl of fastchat/llm_judge/data/mt_bench in the repository lm-sys/FastChat on GitHub",
}
"""Sets that are not bundled, and where to get their files."""


def read_questions(name: str, *, file: Path | None = None, on_bad_row: OnBadRow = "error") -> list[Question]:
    """The questions of a set.

    Args:
        name: ``instructions``, ``alpaca-eval``, ``arena-hard``, ``mt-bench``, or a file in the format of one of them, in
            IFEval's, or of groups or prompts.
        file: the set's file, where the name is not one itself.
        on_bad_row: whether a group that is no question stops the reading, or is left out.

    Raises:
        ValueError: the file is not given, can't be read, or holds no questions; the message says where to get a named set.
    """
    if name == BUNDLED:
        if file is not None:
            raise ValueError(f"set_file goes with {names(WHERE)}; {BUNDLED} is bundled")
        text = (resources.files("ncalign.judging") / "data" / "instructions.jsonl").read_text(encoding="utf-8")
        rows = enumerate(map(json.loads, text.splitlines()))
        return [question for number, row in rows if (question := _from_row(row, number))]
    if file is None and name in WHERE:
        raise ValueError(f"the set {name} needs its file: --set_file PATH. It is {WHERE[name]}; it is not bundled")
    path = Path(name) if file is None else file
    if not path.exists():
        raise ValueError(f"{path}: no such file; a set is one of {BUNDLED}, {', '.join(WHERE)}, or a file of questions")
    questions = _read(path, on_bad_row)
    if not questions:
        raise ValueError(f"{path} has no question")
    seen: dict[str, int] = {}
    for number, question in enumerate(questions, start=1):
        if question.id in seen:
            raise ValueError(f"{path}: questions {seen[question.id]} and {number} have the same id {question.id!r}: rename one")
        seen[question.id] = number
    return questions


def read_references(path: Path, questions: Sequence[Question]) -> list[Question]:
    """The questions with the reference answers of a FastChat file of model answers.

    Raises:
        ValueError: the file can't be read, or a row is no answer.
    """
    found: dict[str, tuple[str, ...]] = {}
    for place, row in rows_of(path):
        try:
            found[str(row["question_id"])] = tuple(str(text) for text in row["choices"][0]["turns"])
        except (KeyError, IndexError, TypeError):
            raise DataError(f"{place} is no answer: question_id and choices[0].turns are needed") from None
    return [replace(q, references=found.get(q.id, q.references)) for q in questions]


def _read(path: Path, on_bad_row: OnBadRow) -> list[Question]:
    questions: list[Question] = []
    for number, (place, row) in enumerate(rows_of(path)):
        question = _question(row, place, number)
        if question is None and not questions:
            return _from_groups(path, on_bad_row)
        if question is None:
            raise DataError(f"{place} is no question: found {names(row)}; the rows before had other columns")
        questions.append(question)
    return questions


def _question(row: Mapping[str, Any], place: str, number: int) -> Question | None:
    try:
        question = _from_row(row, number)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{place} is no question: {type(error).__name__} at {error}; found {names(row)}") from None
    if question and not (question.turns and all(isinstance(turn, str) and turn for turn in question.turns)):
        raise DataError(f"{place}: its turns are {shown(list(question.turns))}: texts, not empty, are needed")
    return question


def _from_groups(path: Path, on_bad_row: OnBadRow) -> list[Question]:
    """Prompts of any schema; a conversation of the user's turns alone is a question with several turns."""
    questions, report = [], ReadReport()
    for group in read_groups(path, allow_empty=True, on_bad_row=on_bad_row, report=report):
        turns = [group.prompt] if isinstance(group.prompt, str) else [m["content"] for m in group.prompt if m["role"] == "user"]
        if not isinstance(group.prompt, str) and len(turns) != len(group.prompt):
            problem = f"{group.origin}: group {group.id!r} has turns of others than the user: questions have the user's alone"
            error = DataError(problem, reason="turns of others than the user")
            if on_bad_row == "error":
                raise error
            report.skip(error)
            continue
        answer = group.metadata.get("answer")
        references = (answer,) if isinstance(answer, str) else ()
        conversational = not isinstance(group.prompt, str)
        questions.append(Question(group.id, tuple(turns), "", references, group.metadata, conversational))
    if report.skipped:
        say(f"note: {path}: questions left out: {report.listed()}")
    return questions


def _from_row(row: Mapping[str, Any], number: int) -> Question | None:
    """The question of a row of FastChat, Arena-Hard, IFEval or AlpacaEval; None for a row of none of them."""
    match row:
        case {"question_id": question, "turns": list(turns)}:
            # Arena-Hard's turns are objects with a content.
            texts = tuple(turn["content"] if isinstance(turn, dict) else turn for turn in turns)
            given = row.get("reference") or ()
            references = (given,) if isinstance(given, str) else tuple(map(str, given))
            return Question(str(question), texts, str(row.get("category") or row.get("cluster") or ""), references)
        case {"uid": question, "prompt": str(prompt)}:
            return Question(str(question), (prompt,), str(row.get("category") or ""))
        case {"instruction_id_list": checks, "prompt": str(prompt)}:
            metadata = {"instruction_id_list": checks, "kwargs": row["kwargs"]}
            return Question(str(row.get("key", number)), (prompt,), metadata=metadata)
        case {"instruction": str(text)} if not {"completions", "chosen", "candidates"} & row.keys():
            # AlpacaEval knows its questions by their place and their text.
            return Question(str(number), (text,), str(row.get("dataset") or ""))
    return None

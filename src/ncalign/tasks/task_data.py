"""Files of question sets that lm-eval lacks, converted to the one form that the task files in ``definitions/`` read."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from ncalign.core.atomic import write_text_atomic
from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.opened import opened

Row = Mapping[str, Any]

TASK_FOLDER = Path(__file__).with_name("definitions")


def prepare(task: str, source: Path, target: Path) -> None:
    """Write a set's file as JSONL of ``id``, ``question`` and ``answer``, all texts.

    Args:
        task: one of ``READERS``.
        source: the set as its authors publish it: a JSON array, an object that holds one, or JSONL; any of them compressed.
        target: the file to write.

    Raises:
        DataError: a row lacks what the set's rows have.
        ValueError: there is no such file, no question in it, or it can't be read.
    """
    lines = []
    for number, (where, row) in enumerate(read_rows(source), 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: {shown(row)} is no question of {task}; an object is needed", reason="not an object")
        question, answer = READERS[task](row, where)
        identity = row.get("ID", row.get("id", number))
        lines.append(json.dumps({"id": str(identity), "question": question, "answer": answer}))
    if not lines:
        raise ValueError(f"{source} has no question: {task} needs a JSON array of objects, or one object a line")
    write_text_atomic("\n".join(lines) + "\n", target)


def read_rows(source: Path) -> Iterator[tuple[str, object]]:
    """The rows of a JSON array, of an object that holds one, or of JSONL, each with its place; any of them may be compressed.

    Raises:
        DataError: a line is not JSON, or the file holds no rows.
        ValueError: there is no such file, or it can't be read.
    """
    if not source.is_file():
        raise ValueError(f"there is no file {source}; relative paths start at {Path.cwd()}")
    try:
        with opened(source) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} can't be read as JSON in UTF-8: {error}; copy or download it again") from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{source}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: this line is not JSON ({error})", reason="not JSON") from error
        return
    if isinstance(whole, dict):
        # A single line of JSONL is an object too, whose lists are a question's own.
        inner = [value for value in whole.values() if isinstance(value, list) and all(isinstance(each, dict) for each in value)]
        if len(inner) != 1:
            yield f"{source}:1", whole
            return
        whole = inner[0]
    if not isinstance(whole, list):
        raise DataError(f"{source}: {shown(whole)}; an array of questions is needed", reason="not an array")
    for number, row in enumerate(whole, 1):
        yield f"{source}: question {number}", row


def _text(row: Row, where: str, *keys: str) -> str:
    """The text, or number as text, under the first of the keys that the row has."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return repr(value)
    raise DataError(
        f"{where}: `{keys[0]}` is {shown(row.get(keys[0]))}; a text is needed (this row has {names(row)})",
        reason=f"no {keys[0]}",
    )


def _svamp(row: Row, where: str) -> tuple[str, str]:
    if "question_concat" in row:
        return _text(row, where, "question_concat"), _text(row, where, "Answer")
    body = _text(row, where, "Body")
    return f"{body}{'' if body[-1] in '.!?,' else '.'} {_text(row, where, 'Question')}", _text(row, where, "Answer")


def _gsm_plus(row: Row, where: str) -> tuple[str, str]:
    answer = row.get("answer", "")
    return _text(row, where, "question"), "None" if answer in (None, "None") else _text(row, where, "answer")


def _asdiv(row: Row, where: str) -> tuple[str, str]:
    body, question = _text(row, where, "body", "Body"), _text(row, where, "question", "Question")
    # The unit stands behind the number: `9 (apples)`.
    return f"{body} {question}", _text(row, where, "answer", "Answer").split(" (")[0]


def _theoremqa(row: Row, where: str) -> tuple[str, str]:
    """The answer as JSON of its type; the authors' own file has values of any type, copies of it have texts."""
    kind, value = str(row.get("Answer_type", "")), row.get("Answer")
    if isinstance(value, str) and kind != "option":
        # A text that is no literal is of no type that is asked for below.
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.strip())
    if kind == "float" and _is_number(value):
        value = float(value)
    if kind == "list of float" and isinstance(value, list) and all(map(_is_number, value)):
        value = [float(each) for each in value]
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    of_numbers = isinstance(value, list) and all(map(_is_number, value))
    right = {
        "bool": isinstance(value, bool),
        "integer": _is_number(value) and isinstance(value, int),
        "float": isinstance(value, float),
        "list of integer": of_numbers,
        "list of float": of_numbers,
        "option": isinstance(value, str),
    }
    if not right.get(kind, False):
        raise DataError(
            f"{where}: `Answer` is {shown(row.get('Answer'))} and `Answer_type` {shown(row.get('Answer_type'))}; an answer of "
            f"one of the types {', '.join(right)} is needed",
            reason="odd answer",
        )
    return _text(row, where, "Question"), json.dumps(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


READERS: dict[str, Callable[[Row, str], tuple[str, str]]] = {
    "svamp": _svamp,
    "gsm_plus": _gsm_plus,
    "asdiv_cot": _asdiv,
    "theoremqa": _theoremqa,
}
"""The sets, each with what reads a row of it: question and answer."""

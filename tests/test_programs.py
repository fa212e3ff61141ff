"""Programs as a reward, and a study's data made of a file of programs."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ncalign.core.errors import DataError
from ncalign.data.groups import Candidate, Group
from ncalign.rewards.config import RewardConfig
from ncalign.rewards.score import score_groups
from ncalign.rewards.sources import reward_source
from ncalign.study.material import program_groups
from ncalign.tasks import programs
from ncalign.tasks.programs import passes_tests, read_programs

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

PROMPT = 'def double(x):\n    """Twice x."""\n'
TEST = "def check(candidate):\n    assert candidate(3) == 6\n"
RIGHT, WRONG = "    return 2 * x\n", "    return x\n"
METADATA: dict[str, Any] = {"test": TEST, "entry_point": "double"}


@linux
def test_a_program_is_right_where_its_tests_run_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run = programs.run_sandboxed

    def counted(program: str, **settings: Any) -> Any:
        ran.append(program)
        return run(program, **settings)

    monkeypatch.setattr(programs, "run_sandboxed", counted)
    texts = [
        RIGHT,
        WRONG,
        RIGHT,
        f"{RIGHT}\nprint(1)\nraise SystemExit\n",
        "    import os\n    os._exit(0)\n",
        "    return (\n",
    ]
    # A continuation ends at the next statement at the margin, and leaving early is no pass.
    assert passes_tests(PROMPT, texts, METADATA) == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert len(ran) == 5  # equal ones once


@linux
def test_a_chats_answer_is_its_code_block() -> None:
    prompt = [{"role": "user", "content": "Double it."}]
    answers = [f"Sure:\n```python\n{PROMPT}{RIGHT}```", "```python\n    return 2 * x\n```", "I can't."]
    assert passes_tests(prompt, answers, METADATA) == [1.0, 0.0, 0.0]
    # With its beginning at hand, a body alone is enough.
    assert passes_tests(prompt, answers, METADATA | {"code": PROMPT}) == [1.0, 1.0, 0.0]


@linux
def test_it_is_a_reward_source_by_its_name() -> None:
    source = reward_source(RewardConfig(reward="ncalign.tasks.programs:passes_tests"), dtype=None)
    [scored] = score_groups([Group("a", PROMPT, [Candidate(RIGHT), Candidate(WRONG)], METADATA)], source)
    assert [one.reward for one in scored.candidates] == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"its metadata need 'test'.*found keys: answer"):
        source.score(Group("b", PROMPT, [Candidate(RIGHT)], {"answer": 3}))


@linux
def test_a_file_of_samples_becomes_scored_groups_and_held_out_ones(tmp_path: Path) -> None:
    rows = [
        {"task_id": f"t{at}", "prompt": PROMPT, "entry_point": "double", "test": TEST, "samples": [RIGHT, WRONG, "  ", RIGHT]}
        for at in range(4)
    ]
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    train, held_out = program_groups(path, num_samples=3, num_held_out=1)
    assert sorted(group.id for group in (*train, *held_out)) == ["t0", "t1", "t2", "t3"]
    assert len(held_out) == 1
    # Of the first three samples the blank one is no candidate.
    assert all([one.reward for one in group.candidates] == [1.0, 0.0] for group in (*train, *held_out))
    assert train[0].metadata["test"] == TEST
    with pytest.raises(ValueError, match="has 4 problems, and num_held_out is 4"):
        program_groups(path, num_samples=3, num_held_out=4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"samples.jsonl:1: .* is no problem; an object is needed"),
        ({"task_id": "a", "prompt": "p", "samples": []}, "`test` is null; a text is needed"),
        ({"task_id": "a", "prompt": "p", "test": "t", "samples": "x"}, r"`samples` is .*x.*; a list of texts is needed"),
    ],
)
def test_a_row_that_is_no_problem_is_told(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        read_programs(path, num_samples=2)

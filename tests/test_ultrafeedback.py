"""UltraFeedback's overall scores: what its authors found faulty is corrected and counted, what is in doubt is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncalign.cli.app import main
from ncalign.data.groups import Group, ReadReport, read_groups

Write = Callable[..., Path]


def completion(overall: Any, *ratings: Any, **more: Any) -> dict[str, Any]:
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    annotations = {name: {"Rating": rating, "Rationale": "r"} for name, rating in zip(names, ratings, strict=False)}
    return {"model": "m", "response": "An answer.", "overall_score": overall, "annotations": annotations, **more}


def row(*completions: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": "sharegpt",
        "instruction": "Say hello.",
        "models": ["m"] * len(completions),
        "completions": [*completions],
    }


def read(path: Path, schema: Any = "auto") -> tuple[Group, dict[str, int]]:
    report = ReadReport()
    [group] = read_groups(path, schema=schema, report=report)
    return group, report.notes


@pytest.mark.parametrize(
    ("overall", "ratings", "expected"),
    [
        (10, ("1", "1", "2", "1"), 1.0),
        (10.0, ("2", "2", "2", "2"), 1.0),  # the bound belongs to the rule
        ("10", ("1", "N/A", "3", "N/A"), 1.0),  # missing ratings don't count
        (10, ("2", "2", "2", "3"), 10.0),
        (10, ("5", "5", "4", "5"), 10.0),
        (10, ("N/A", "N/A"), 10.0),
        (10, (), 10.0),
        (9.5, ("1", "1", "1", "1"), 9.5),  # the fault is of tens alone
        (1, ("5", "5", "5", "5"), 1.0),
        ("N/A", ("1", "1"), None),
    ],
)
def test_the_reward_follows_the_authors_rule(overall: Any, ratings: Any, expected: float | None, write_jsonl: Write) -> None:
    group, notes = read(write_jsonl([row(completion(overall, *ratings), completion(7, "4"))]))
    assert [candidate.reward for candidate in group.candidates] == [expected, 7.0]
    corrected = expected == 1.0 and overall != 1
    assert group.metadata.get("overall_score") == ([10.0, 7.0] if corrected else None)
    assert any("read as 1" in note for note in notes) == corrected


def test_notes_count_what_is_corrected_and_what_is_in_doubt(write_jsonl: Write) -> None:
    faulty, doubtful, unknown = completion(10, "1", "2"), completion(10, "3", "4"), completion(10, "N/A")
    path = write_jsonl([row(faulty, doubtful, completion(10, "5")), row(faulty, faulty, unknown)])
    report = ReadReport()
    list(read_groups(path, report=report))
    assert [note.split(" were ")[0] for note in report.counted_notes()] == [
        "3 completions with overall_score 10 and a mean aspect rating of at most 2",
        "1 completions with overall_score 10 and a mean aspect rating above 2 and at most 4",
        "1 completions with overall_score 10 have no aspect rating that it could be compared with, and",
    ]


def test_the_corrected_release_leaves_no_doubt(write_jsonl: Write) -> None:
    rescored = completion(10, "3", "4", **{"fine-grained_score": 3.5})
    group, notes = read(write_jsonl([row(rescored, completion(10, **{"fine-grained_score": 1.5}))]))
    assert [candidate.reward for candidate in group.candidates] == [10.0, 1.0]
    assert len(notes) == 1


def test_the_mean_of_the_aspects_as_reward(write_jsonl: Write) -> None:
    path = write_jsonl([row(completion(10, "1", "2", "N/A"), completion(5, "N/A"), completion(8, "5", "4"))])
    group, notes = read(path, "ultrafeedback_aspects")
    assert [candidate.reward for candidate in group.candidates] == [1.5, None, 4.5]
    assert (group.metadata["overall_score"], notes) == ([10.0, 5.0, 8.0], {})


def test_commands_tell_it(write_jsonl: Write, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl([row(completion(10, "1", "1"), completion(6, "4", "4"))], "uf.jsonl")
    note = "1 completions with overall_score 10 and a mean aspect rating of at most 2 were read as 1"
    out = tmp_path / "groups.jsonl"
    assert main(["convert", str(data), str(out)]) == 0
    assert note in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [candidate["reward"] for candidate in written["candidates"]] == [1.0, 6.0]
    assert written["metadata"]["overall_score"] == [10.0, 6.0]

    assert main(["convert", str(data), str(tmp_path / "folder")]) == 0
    assert note in capsys.readouterr().out
    assert main(["check", str(data), "--model", str(tiny_model_dir)]) in (0, 1)
    assert note in capsys.readouterr().out
    assert main(["audit", str(data), "--output_dir", str(tmp_path / "audit")]) == 0
    shown = capsys.readouterr()
    assert note in shown.out + shown.err

    assert main(["convert", str(data), str(out), "--from", "ultrafeedback_aspects", "--overwrite"]) == 0
    assert note not in capsys.readouterr().out
    assert [candidate["reward"] for candidate in json.loads(out.read_text())["candidates"]] == [1.0, 4.0]


def test_training_tells_it(
    write_jsonl: Write, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([row(completion(10, "1", "1"), completion(6, "4", "4"))], "uf.jsonl")
    flags = ["--model", str(tiny_model_dir), "--data", str(data), "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert main(["train", *flags]) == 0
    shown = capsys.readouterr()
    assert "1 completions with overall_score 10" in shown.out + shown.err
    assert main(["train", *flags, "--from", "ultrafeedback_aspects"]) == 0
    shown = capsys.readouterr()
    assert "overall_score 10" not in shown.out + shown.err


def test_training_takes_the_mean_rating(write_jsonl: Write, tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write_jsonl([row(completion(8, "1", "1"), completion(6, "4", "4", response="b"))] * 2, "uf.jsonl")
    flags = ["--model", str(tiny_model_dir), "--data", str(data), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert main(["train", *flags, "--objective", "dpo", "--schema_name", "ultrafeedback_aspects"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["reward_steps"] == [{"steps": ["ultrafeedback_aspects: mean of the aspects' ratings"], "groups": 2}]

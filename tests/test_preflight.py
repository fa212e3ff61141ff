"""The check finds what is planted, and says `ready` where nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import build_model, build_tokenizer, group_row
from ncalign.audit.check import run_check
from ncalign.audit.config import CheckConfig
from ncalign.cli.app import main

Write = Callable[..., Path]


def check(data: Path, model: Path, **changes: Any) -> dict[str, Any]:
    return run_check(CheckConfig.model_validate({"data": data, "model": str(model), "max_length": 256, **changes}))


def test_good_data_are_ready(groups_file: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(groups_file, tiny_model_dir)
    assert (found["ready"], found["mend"]) == (True, [])
    assert (found["groups"], found["candidates"]) == (12, 36)
    assert found["end_tokens"] == {"1": 36}
    assert found["bos_tokens"] == {"0": 36}
    assert found["tokens"]["both"]["1"] <= 256
    assert main(["check", str(groups_file), "--model", str(tiny_model_dir), "--max_length", "256"]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("ready")
    assert "scored tokens in [brackets]" in shown


def test_what_is_planted_is_found(write_jsonl: Write, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [group_row(k, [1.0, 0.0]) for k in range(6)]
    rows[1]["candidates"][1] = dict(rows[1]["candidates"][0], reward=0.0)  # a copy
    near = rows[2]["candidates"][0]["completion"][0]["content"].upper().replace(".", "!")
    rows[2]["candidates"][1]["completion"] = [{"role": "assistant", "content": near}]
    rows[3]["candidates"][0]["completion"] = [{"role": "assistant", "content": " "}]
    rows[4]["prompt"] = [{"role": "user", "content": "<|bos|><|bos|> " + rows[4]["prompt"][0]["content"]}]
    rows[5]["candidates"][0]["completion"] = [{"role": "assistant", "content": "long " * 300}]
    rows.append("{broken")
    rows.append({**group_row(0, [1.0, 0.0]), "id": "again"})
    held_out = write_jsonl([{"prompt": "what IS 0, plus 5"}], "eval.jsonl")
    data = write_jsonl(rows)
    found = check(data, tiny_model_dir, against=held_out)
    assert not found["ready"]
    assert (found["rows_skipped"], found["copies"], found["near_copies"]) == (1, 1, 1)
    assert (found["repeated_prompts"], found["contaminated_prompts"]) == (2, 2)
    # What only one group writes is no copy across groups; that of `again` is.
    assert (found["copies_across_groups"], found["near_copies_across_groups"]) == (4, 4)
    assert (found["groups_dropped"], found["completions_truncated"]) == ({"empty completion": 1}, 1)
    text = "\n".join(found["mend"])
    for expected in (
        "1 of 8 rows can't be read",
        "1 groups can't be encoded: empty completion; fix them, or on_bad_row: skip leaves them out of training",
        "\n     groups.jsonl:4\n",
        "2 candidates have more than one BOS",
        "1 completions lose their end at max_length 256 (first: groups.jsonl:6",
        "2 prompts are prompts of",
        "1 candidates are copies of another of their group (first: groups.jsonl:2)",
    ):
        assert expected in text
    words = ["check", str(data), "--model", str(tiny_model_dir), "--max_length", "256", "--against", str(held_out)]
    assert main(words) == 1
    assert "To fix:\n  1. 1 of 8 rows" in capsys.readouterr().out
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ready"] is False


def test_runs_of_words_of_an_evaluation_prompt(write_jsonl: Write, tiny_model_dir: Path) -> None:
    asked = "how many apples are left when ten people each take three out of one hundred"
    held_out = write_jsonl([{"prompt": f"{asked}?"}], "eval.jsonl")
    words = asked.split()
    prompts = [f"Please tell me, {asked.upper()}!", " ".join(words[:12]), " ".join(words[1:14]), " ".join(reversed(words))]
    rows = [{**group_row(k, [1.0, 0.0]), "prompt": [{"role": "user", "content": text}]} for k, text in enumerate(prompts)]
    found = check(write_jsonl(rows), tiny_model_dir, against=held_out)
    assert found["contaminated_prompts"] == 2
    assert "share 13 words in a row with one (first: groups.jsonl:1" in found["mend"][0]


def test_a_bos_that_opens_turns_is_no_second_one(groups_file: Path, write_jsonl: Write, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    build_model(tokenizer).save_pretrained(tmp_path / "turns")
    tokenizer.save_pretrained(tmp_path / "turns")
    found = check(groups_file, tmp_path / "turns")
    assert found["ready"]
    assert found["bos_tokens"] == {"1": 36}
    row = group_row(0, [1.0, 0.0])
    row["prompt"] = [{"role": "user", "content": "<|im_start|><|im_start|> 2 + 2"}]
    found = check(write_jsonl([row], "doubled.jsonl"), tmp_path / "turns")
    assert "2 candidates have more than one BOS" in found["mend"][0]


def test_long_texts_are_shown_from_both_ends(write_jsonl: Write, tiny_model_dir: Path) -> None:
    row = group_row(0, [1.0, 0.0])
    row["candidates"][0]["completion"] = [{"role": "assistant", "content": "first " + "x " * 80 + "\x1b[31m last"}]
    text = check(write_jsonl([row]), tiny_model_dir)["text"]
    assert " ... " in text
    assert "\x1b" not in text


def test_no_spread_and_a_context_that_is_too_short(write_jsonl: Write, tiny_model_dir: Path) -> None:
    found = check(write_jsonl([group_row(0, [1.0, 1.0])]), tiny_model_dir, max_length=4096)
    assert found["mend"] == [
        "max_length is 4096 and the model has 512 positions: lower it",
        "in no group do two rewards differ: there is nothing to learn",
    ]


def test_a_missing_chat_template_is_said_once(groups_file: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "plain")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    found = check(groups_file, tmp_path / "plain")
    assert len(found["mend"]) == 1
    assert found["mend"][0].startswith("12 groups can't be encoded: ")
    assert "has no chat template" in found["mend"][0]


def test_a_completion_that_was_cut_needs_no_end(write_jsonl: Write, tiny_model_dir: Path) -> None:
    row = group_row(0, [1.0, 0.0])
    row["candidates"][0]["finished"] = False
    assert check(write_jsonl([row]), tiny_model_dir)["ready"]


@pytest.mark.slow
def test_twenty_thousand_groups(write_jsonl: Write, tiny_model_dir: Path) -> None:
    rows = [group_row(k, [1.0, 0.5, 0.2, 0.0]) for k in range(20_000)]
    found = check(write_jsonl(rows), tiny_model_dir)
    assert (found["ready"], found["groups"], found["candidates"]) == (True, 20_000, 80_000)

"""``eval_fraction`` holds out the number of groups that it says, and no prompt that is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import group_row
from ncalign.cli.app import main
from ncalign.training.data import held_out_places

FRACTIONS = st.floats(0.01, 0.99)


@given(st.integers(2, 300), FRACTIONS, st.integers(0, 5))
def test_different_prompts_give_the_nearest_whole_number(count: int, fraction: float, seed: int) -> None:
    prompts = [str(number).encode() for number in range(count)]
    found = held_out_places(prompts, fraction=fraction, seed=seed)
    assert len(found) == min(max(1, round(fraction * count)), count - 1)
    assert found == held_out_places(prompts, fraction=fraction, seed=seed)


@given(st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), min_size=2, max_size=40), FRACTIONS)
def test_groups_of_one_prompt_stay_together(prompts: list[bytes], fraction: float) -> None:
    found = held_out_places(prompts, fraction=fraction, seed=3)
    held_out = {prompts[place] for place in found}
    assert not held_out & {prompt for place, prompt in enumerate(prompts) if place not in found}
    if len(set(prompts)) == 1:
        assert found == set()
    else:
        largest = max(prompts.count(prompt) for prompt in prompts)
        assert 0 < len(found) < len(prompts)
        assert abs(len(found) - round(fraction * len(prompts))) <= largest


def test_another_seed_holds_out_others_and_the_order_of_the_rows_does_not_matter() -> None:
    prompts = [str(number).encode() for number in range(100)]
    first, other = (held_out_places(prompts, fraction=0.2, seed=seed) for seed in (0, 1))
    assert 0 < len(first & other) < 12
    turned = held_out_places(prompts[::-1], fraction=0.2, seed=0)
    assert {99 - place for place in turned} == first


@pytest.mark.parametrize(("fraction", "expected"), [("0.1", 1), ("0.25", 3), ("0.3", 4), ("0.01", 1)])
def test_train_holds_out_what_it_says(
    fraction: str, expected: int, tiny_model_dir: Path, groups_file: Path, tmp_path: Path
) -> None:
    words = ["--model", str(tiny_model_dir), "--data", str(groups_file), "--output_dir", str(tmp_path / "run")]
    fixed = ["--max_steps", "1", "--report_to", "[]", "--cache_dir", str(tmp_path / "cache")]
    assert main(["train", *words, *fixed, "--eval_fraction", fraction]) == 0
    data = json.loads((tmp_path / "run" / "results.json").read_text())["data"]
    assert (data["groups_held_out"], data["groups_trained_on"]) == (expected, 12 - expected)


def test_a_prompt_as_a_string_and_as_a_turn_is_one_prompt(
    tiny_model_dir: Path, write_jsonl: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [group_row(0, [1.0, 0.0], chat=chat) | {"id": str(chat)} for chat in (True, False)]
    words = ["--model", str(tiny_model_dir), "--data", str(write_jsonl(rows)), "--output_dir", str(tmp_path / "run")]
    fixed = ["--max_steps", "1", "--report_to", "[]", "--cache_dir", str(tmp_path / "cache")]
    assert main(["train", *words, *fixed, "--eval_fraction", "0.5"]) == 0
    assert "note: eval_fraction=0.5 holds out no group: all 2 have the same prompt" in capsys.readouterr().err

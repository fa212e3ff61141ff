"""Prompts that are plain strings: a user's turn where the model has a chat template, and told where two steps differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from ncalign.cli.app import main
from ncalign.data.groups import Group, read_groups
from ncalign.generation.local import TransformersGenerator
from ncalign.judging.answers import read_answers
from server_double import ServerDouble, serving

WriteJsonl = Callable[..., Path]
OTHER = {"raw": "user_turn", "user_turn": "raw"}


@pytest.fixture(autouse=True)
def _desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base_model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model without its chat template."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def rows(*, made: str | None = None, number: int = 4) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index in range(number):
        answers = [{"completion": f" {index}", "reward": 1.0}, {"completion": " none", "reward": 0.0}]
        metadata = {} if made is None else {"metadata": {"string_prompts": made}}
        found.append({"id": f"g{index}", "prompt": f"What is {index} plus 0?", "candidates": answers, **metadata})
    return found


def run(*words: object) -> int:
    return main([str(word) for word in words])


def sampled(model: Path, prompts: Path, output: str, *more: object) -> list[Group]:
    assert run("generate", "--model", model, "--prompts", prompts, "--output", output, "--max_new_tokens", 4, *more) == 0
    return list(read_groups(output))


def fed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts' tokens as the model reads them."""
    seen: list[list[int]] = []
    plain = TransformersGenerator._sample

    def sample(self: TransformersGenerator, prompts: list[list[int]], *rest: Any) -> Any:
        seen.extend(prompts)
        return plain(self, prompts, *rest)

    monkeypatch.setattr(TransformersGenerator, "_sample", sample)
    return seen


@pytest.mark.parametrize(("flag", "rendering"), [(None, "user_turn"), ("user_turn", "user_turn"), ("raw", "raw")])
def test_generate_uses_the_template_of_a_model_that_has_one(
    flag: str | None,
    rendering: str,
    tiny_model_dir: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    write_jsonl: WriteJsonl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = fed(monkeypatch)
    prompts = write_jsonl([{"id": "a", "prompt": "What is seven?"}])
    [group] = sampled(tiny_model_dir, prompts, "out.jsonl", *(() if flag is None else ("--string_prompts", flag)))
    turn = [{"role": "user", "content": "What is seven?"}]
    text = "What is seven?"
    if rendering == "user_turn":
        text = tiny_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert seen == [tiny_tokenizer(text, add_special_tokens=False)["input_ids"]]
    # The prompt is still the string that it was, and the record is in JSON Lines and Parquet alike.
    assert (group.prompt, group.metadata) == ("What is seven?", {"string_prompts": rendering})
    assert run("convert", "out.jsonl", "out.parquet") == 0
    assert next(iter(read_groups("out.parquet"))).metadata == {"string_prompts": rendering}


def test_a_model_without_a_template_gets_them_raw(
    base_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fed(monkeypatch)
    [group] = sampled(base_model_dir, write_jsonl([{"id": "a", "prompt": "What is seven?"}]), "out.jsonl")
    assert seen == [tiny_tokenizer("What is seven?")["input_ids"]]
    assert group.metadata == {"string_prompts": "raw"}


def test_conversations_have_nothing_to_record(tiny_model_dir: Path, groups_file: Path) -> None:
    assert all(group.metadata == {} for group in sampled(tiny_model_dir, groups_file, "out.jsonl", "--num_samples", 1))


def test_score_and_adjust_keep_the_record(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def length(prompt, completions):\n    return [len(text) for text in completions]\n")
    data = write_jsonl(rows(made="raw"))
    assert run("score", "--data", data, "--output", "scored.jsonl", "--reward", "rewards.py:length") == 0
    assert run("adjust", "scored.jsonl", "adjusted.jsonl", "--steps", "zscore") == 0
    assert {group.metadata["string_prompts"] for group in read_groups("adjusted.jsonl")} == {"raw"}


def train_words(model: Path, data: Path, output: str, *more: object) -> tuple[object, ...]:
    fields = ("--model", model, "--data", data, "--output_dir", output, "--max_steps", 1, "--report_to", "[]")
    return ("train", *fields, "--per_device_train_batch_size", 2, *more)


@pytest.mark.parametrize(("model", "expected"), [("tiny_model_dir", "user_turn"), ("base_model_dir", "raw")])
def test_train_records_what_auto_came_to(
    model: str, expected: str, write_jsonl: WriteJsonl, tmp_path: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    folder = request.getfixturevalue(model)
    words = train_words(folder, write_jsonl(rows()), "run", "--save_steps", 1)
    assert run(*words) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["string_prompts"] == expected
    assert run(*words, "--dry-run", "--output_dir", "other") == 0
    assert ("<|im_start|>" in capsys.readouterr().out) == (expected == "user_turn")
    # A run that was begun another way, as all were before there was auto, is not gone on with silently.
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(saved | {"string_prompts": OTHER[expected]}))
    assert run(*words, "--resume") == 1
    assert f"string_prompts: '{OTHER[expected]}' -> '{expected}'" in capsys.readouterr().err


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("made", ["raw", "user_turn"])
@pytest.mark.parametrize("verb", ["check", "train", "generate", "evaluate", "audit"])
def test_a_run_that_differs_from_how_groups_were_made_says_so(
    verb: str, made: str, tiny_model_dir: Path, write_jsonl: WriteJsonl, capsys: Any
) -> None:
    data = write_jsonl(rows(made=made))
    words: dict[str, tuple[object, ...]] = {
        "check": ("check", data, "--model", tiny_model_dir, "--max_length", 256),
        "train": train_words(tiny_model_dir, data, "run"),
        "generate": ("generate", "--model", tiny_model_dir, "--prompts", data, "--output", "out.jsonl", "--max_new_tokens", 4),
        "evaluate": (
            *("evaluate", "--model", tiny_model_dir, "--against", "other.jsonl", "--set", data, "--reward", "one.py:one"),
            *("--max_new_tokens", 4, "--output_dir", "evaluation"),
        ),
        "audit": ("audit", data, "--model", tiny_model_dir, "--output_dir", "audit"),
    }
    Path("one.py").write_text("def one(prompt, completions):\n    return [float(len(text)) for text in completions]\n")
    answer = {"model": "other", "turns": ["4"], "string_prompts": made}
    write_jsonl([{"question": f"g{k}", **answer} for k in range(4)], "other.jsonl")
    # As they were made: no word about it.
    for used in (made, OTHER[made]):
        more = () if verb == "check" else ("--overwrite",)
        assert run(*words[verb], "--string_prompts", used, *more) == 0
        out, err = capsys.readouterr()
        found = [line for line in warnings_in(f"{err}\n{out}") if "string_prompts" in line and "were made" in line]
        assert bool(found) == (used != made), err
    assert len(found) == (2 if verb == "evaluate" else 1)
    assert f"4 groups were made with string_prompts {made} (" in found[0]
    assert f"with string_prompts {OTHER[made]} (" in found[0]
    assert found[0].endswith(f"--string_prompts {made} makes them agree")
    if verb == "evaluate":
        assert f"other.jsonl: 4 answers were made with string_prompts {made} (" in found[1]


def test_groups_made_both_ways_have_no_flag_that_suits(write_jsonl: WriteJsonl, tiny_model_dir: Path, capsys: Any) -> None:
    mixed = [row | {"id": f"{made} {row['id']}"} for made in OTHER for row in rows(made=made)]
    assert run("check", write_jsonl(mixed), "--model", tiny_model_dir) in (0, 1)
    [warning] = warnings_in(capsys.readouterr().out)
    assert "4 groups were made with string_prompts raw" in warning
    assert "4 others were made as user_turn, so no value suits all" in warning


def test_online_pools_record_it(tiny_model_dir: Path, tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    (tmp_path / "rewards.py").write_text("def length(prompt, completions):\n    return [len(text) for text in completions]\n")
    prompts = write_jsonl([{"id": str(k), "prompt": f"What is {k}?"} for k in range(4)], "prompts.jsonl")
    fields = ("--model", tiny_model_dir, "--data", prompts, "--output_dir", "run", "--reward", "rewards.py:length")
    sizes = ("--num_samples", 4, "--max_new_tokens", 8, "--max_steps", 1, "--per_device_train_batch_size", 2)
    assert run("online", *fields, *sizes, "--report_to", "[]") == 0
    pool = list(read_groups(tmp_path / "run" / "rounds" / "000" / "pool.jsonl"))
    assert {group.metadata["string_prompts"] for group in pool} == {"user_turn"}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["string_prompts"] == "user_turn"


def test_answers_record_it_and_raw_ones_are_others(
    tiny_model_dir: Path, base_model_dir: Path, write_jsonl: WriteJsonl, capsys: Any
) -> None:
    chat = [{"id": "c", "prompt": [{"role": "user", "content": "Why?"}]}]
    questions = write_jsonl([{"id": str(k), "prompt": f"{k} + 1?"} for k in range(3)])
    words = ("answer", "--set", questions, "--max_new_tokens", 4, "--temperature", 1)
    found = {}
    for name, model, more in (
        ("auto", tiny_model_dir, ()),
        ("raw", tiny_model_dir, ("--string_prompts", "raw")),
        ("base", base_model_dir, ()),
    ):
        assert run(*words, "--model", model, "--output", f"{name}.jsonl", *more) == 0
        found[name] = read_answers(Path(f"{name}.jsonl"), [])
    assert "base has no chat template: questions are given to it as plain text" in capsys.readouterr().err
    made = {name: {answer.string_prompts for answer in answers} for name, answers in found.items()}
    assert made == {"auto": {"user_turn"}, "raw": {"raw"}, "base": {"raw"}}
    assert [answer.turns for answer in found["auto"]] != [answer.turns for answer in found["raw"]]
    # A conversation stays one, and is no business of the setting's.
    talk = write_jsonl(chat, "chat.jsonl")
    words = ("answer", "--set", talk, "--max_new_tokens", 4)
    assert run(*words, "--model", tiny_model_dir, "--output", "c.jsonl", "--string_prompts", "raw") == 0
    assert "string_prompts" not in json.loads(Path("c.jsonl").read_text())


def test_a_server_is_asked_in_its_chat_and_raw_is_the_flag_for_one_without(write_jsonl: WriteJsonl, capsys: Any) -> None:
    prompts = write_jsonl([{"id": "a", "prompt": "say"}])
    double = ServerDouble()
    with serving(double) as url:
        words = ("generate", "--prompts", prompts, "--server.base_url", url, "--server.model", "m", "--num_samples", 1)
        assert run(*words, "--output", "a.jsonl") == 0
        assert run(*words, "--output", "b.jsonl", "--string_prompts", "raw") == 0
    assert [path for path, _ in double.requests] == ["/v1/chat/completions", "/v1/completions"]
    assert [next(iter(read_groups(f"{name}.jsonl"))).metadata["string_prompts"] for name in "ab"] == ["user_turn", "raw"]


# --- More than a tenth --------------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, texts: Iterable[str], *, cut: int = 0) -> None:
    """Have the model sample these texts in turn; the last ``cut`` of them are cut."""
    wanted = list(texts)
    answers = iter(range(len(wanted)))

    def decode(self: TransformersGenerator, tokens: list[int], logprob: float) -> Any:
        from ncalign.generation.base import Completion

        index = next(answers)
        return Completion(wanted[index], 1, index < len(wanted) - cut)

    monkeypatch.setattr(TransformersGenerator, "_decode", decode)


OF_TEN = pytest.mark.parametrize(
    ("empty", "cut", "expected"),
    [
        (1, 0, None),
        (0, 1, None),
        (2, 0, "2 of 10 completions are empty: "),
        (0, 2, "2 of 10 completions are cut: "),
        (1, 1, "1 of 10 completions are empty and 1 are cut: "),
    ],
)


@OF_TEN
def test_generate_warns_of_more_than_a_tenth(
    empty: int,
    cut: int,
    expected: str | None,
    tiny_model_dir: Path,
    tiny_tokenizer: Any,
    write_jsonl: WriteJsonl,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    scripted(monkeypatch, tiny_tokenizer, [" "] * empty + ["a"] * (10 - empty), cut=cut)
    sampled(tiny_model_dir, write_jsonl([{"prompt": "Q"}]), "out.jsonl", "--num_samples", 10, "--string_prompts", "raw")
    found = warnings_in(capsys.readouterr().err)
    if expected is None:
        assert found == []
        return
    [warning] = found
    assert warning.startswith(f"warning: {expected}")
    assert "the prompts were given raw to a model that has a chat template; try --string_prompts user_turn" in warning
    assert ("raise --max_new_tokens (now 4)" in warning) == bool(cut)


def test_all_empty_is_an_error_with_the_remedy(
    tiny_model_dir: Path, tiny_tokenizer: Any, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scripted(monkeypatch, tiny_tokenizer, [" "] * 8)
    words = ("generate", "--model", tiny_model_dir, "--prompts", write_jsonl([{"prompt": "Q"}]), "--output", "out.jsonl")
    assert run(*words, "--string_prompts", "raw") == 1
    assert "gave only empty completions" in (error := capsys.readouterr().err)
    assert "try --string_prompts user_turn" in error


@OF_TEN
@pytest.mark.parametrize("chat", [False, True])
def test_audit_warns_of_more_than_a_tenth(
    empty: int, cut: int, expected: str | None, chat: bool, write_jsonl: WriteJsonl, capsys: Any
) -> None:
    texts = ["" for _ in range(empty)] + [f"answer {k} of this prompt, in words" for k in range(10 - empty)]
    candidates = [
        {
            "completion": [{"role": "assistant", "content": text}] if chat else text,
            "reward": float(k),
            "finished": k < 10 - cut,
        }
        for k, text in enumerate(texts)
    ]
    prompt = [{"role": "user", "content": "Q"}] if chat else "Q"
    made = {} if chat else {"metadata": {"string_prompts": "raw"}}
    data = write_jsonl([{"prompt": prompt, "candidates": candidates, **made}])
    assert run("audit", data, "--output_dir", "audit") == 0
    found = warnings_in(capsys.readouterr().out)
    numbers = json.loads(Path("audit/audit.json").read_text())["numbers"]
    assert (numbers["candidates/empty"], numbers["candidates/cut"]) == (empty, cut)
    assert len(found) == (expected is not None)
    if expected is not None:
        assert found[0].startswith(f"warning: {expected}")
        assert ("larger --max_new_tokens" in found[0]) == bool(cut)
        assert ("generate them again with --string_prompts user_turn" in found[0]) == (bool(empty) and not chat)


def test_answer_warns_of_more_than_a_tenth(
    tiny_model_dir: Path, tiny_tokenizer: Any, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scripted(monkeypatch, tiny_tokenizer, ["", *["a"] * 9], cut=1)
    questions = write_jsonl([{"id": str(k), "prompt": f"{k} + 1?"} for k in range(10)])
    words = ("answer", "--set", questions, "--model", tiny_model_dir, "--max_new_tokens", 4)
    for name in ("a", "b"):  # the second time from what is kept
        assert run(*words, "--output", f"{name}.jsonl") == 0
        [warning] = warnings_in(capsys.readouterr().err)
        assert "1 of 10 completions are empty and 1 are cut: " in warning
        assert "raise --max_new_tokens (now 4)" in warning

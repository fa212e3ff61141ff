"""One rule for the outputs of all verbs: nothing is replaced unasked, and what is read or not ours is never replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ncalign.cli.app import main
from ncalign.core import outputs
from ncalign.core.outputs import claim, record, remove, renew

Run = Callable[..., tuple[int, str]]
SHORT = ("--max_steps", "1", "--report_to", "[]", "--max_length", "64")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path) -> Run:
    """``run(words)`` runs a command in the test's folder, which holds model/, groups.jsonl, prompts.jsonl and rewards.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model_dir, "model")
    rows = [
        {
            "id": str(n),
            "prompt": f"What is {n}?",
            "candidates": [{"completion": text, "reward": reward} for text, reward in pair],
        }
        for n in range(4)
        for pair in [[(f"It is {n}.", 1.0), ("No idea, sorry.", 0.0)]]
    ]
    Path("groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    Path("rewards.py").write_text("def length(prompt, completions):\n    return [len(text) for text in completions]\n")

    def call(command: str, *more: str) -> tuple[int, str]:
        code = main([*command.split(), *more])
        return code, capsys.readouterr().err.strip().rpartition("\n")[2]

    return call


FILES = {
    "generate": "generate --model model --prompts prompts.jsonl --output out.jsonl --max_new_tokens 2 --num_samples 2",
    "score": "score --data groups.jsonl --output out.jsonl --reward rewards.py:length",
    "adjust": "adjust groups.jsonl out.jsonl --steps zscore",
    "convert": "convert groups.jsonl out.jsonl",
    "answer": "answer --model model --output out.jsonl --limit 2 --max_new_tokens 2",
}


@pytest.mark.parametrize("verb", FILES)
def test_a_file_is_replaced_on_request_alone(verb: str, run: Run) -> None:
    Path("out.jsonl").write_text("mine")
    # Refused before anything runs: a model that does not exist is not looked for.
    code, error = run(FILES[verb].replace("--model model", "--model nowhere"))
    assert (code, error) == (1, "error: out.jsonl exists: --overwrite replaces it, or give another output")
    assert Path("out.jsonl").read_text() == "mine"
    assert run(FILES[verb], "--overwrite")[0] == 0
    assert Path("out.jsonl").read_text() != "mine"


SPLITS = {
    "train": f"train --model model --data DATA --output_dir out {' '.join(SHORT)}",
    "online": "online --model model --data DATA --output_dir out --reward rewards.py:length --max_new_tokens 2 --max_steps 1 "
    "--num_samples 2 --report_to [] --max_length 64",
    "check": "check DATA --model model --max_length 64",
    "audit": "audit DATA --output_dir out",
    **{verb: command.replace("prompts.jsonl", "DATA").replace("groups.jsonl", "DATA") for verb, command in FILES.items()},
}
del SPLITS["answer"]  # a set of questions is one file


@pytest.mark.parametrize("verb", SPLITS)
def test_every_verb_reads_the_split_that_is_named_and_none_unasked(verb: str, run: Run) -> None:
    Path("set").mkdir()
    shutil.copy("groups.jsonl", "set/train.jsonl")
    Path("set/test.jsonl").write_text("not even a row")
    code, error = run(SPLITS[verb].replace("DATA", "set"))
    assert code == 1
    assert "set has the splits train (1 file), test (1 file): name one, as set:train" in error
    code, error = run(SPLITS[verb].replace("DATA", "set:train"))
    assert code == 0, error


@pytest.mark.parametrize(
    ("command", "replaced", "field"),
    [
        ("score --data groups.jsonl --output groups.jsonl --reward rewards.py:length", "groups.jsonl", "data"),
        ("score --data groups.jsonl --output model --reward model:model", "model", "reward"),
        ("adjust groups.jsonl ./groups.jsonl --steps zscore", "groups.jsonl", "input"),
        ("adjust prompts.jsonl groups.jsonl --merge groups.jsonl", "groups.jsonl", "merge"),
        ("convert groups.jsonl link.jsonl", "link.jsonl", "input"),
        ("convert model model/config.json", "model/config.json", "input"),
        ("generate --model model --prompts prompts.jsonl --output prompts.jsonl", "prompts.jsonl", "prompts"),
        ("answer --model model --set prompts.jsonl --output prompts.jsonl", "prompts.jsonl", "set"),
        ("train --model model --data groups.jsonl --output_dir .", "model", "model"),
        ("online --model model --data prompts.jsonl --output_dir . --reward rewards.py:length", "model", "model"),
        (
            "online --model lora --data prompts.jsonl --output_dir . --reward rewards.py:length",
            "model",
            "the base model of model",
        ),
        ("train --model base --data metrics.jsonl --output_dir .", "metrics.jsonl", "data"),
    ],
)
def test_what_is_read_is_never_replaced(command: str, replaced: str, field: str, run: Run) -> None:
    Path("link.jsonl").symlink_to("groups.jsonl")
    shutil.copy("groups.jsonl", "metrics.jsonl")
    shutil.copytree("model", "base")
    shutil.copytree("model", "lora")
    Path("lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "model"}))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for flags in ((), ("--overwrite",)):
        code, error = run(command, *flags)
        assert code == 1
        assert f"{replaced} is what {field} reads, and would be replaced: give another output" in error
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


FOLDERS = {
    "train": f"train --model model --data groups.jsonl --output_dir out {' '.join(SHORT)}",
    "audit": "audit groups.jsonl --output_dir out",
    "evaluate": "evaluate --model a.jsonl --against b.jsonl --output_dir out --num_resamples 100",
}


OTHERWISE = {"evaluate": ("--seed", "1")}
"""The same evaluation is made again; another one is not put in its place."""


@pytest.fixture
def answers(run: Run) -> None:
    """Two files of answers, a.jsonl and b.jsonl."""
    for name in ("a.jsonl", "b.jsonl"):
        assert run(f"answer --model model --output {name} --limit 2 --max_new_tokens 2 --name {name}")[0] == 0


@pytest.mark.parametrize("verb", FOLDERS)
@pytest.mark.usefixtures("answers")
def test_a_folder_is_replaced_on_request_and_what_is_not_ours_never(verb: str, run: Run) -> None:
    assert run(FOLDERS[verb])[0] == 0
    names = {path.name for path in Path("out").iterdir()} - {".ncalign"}
    Path("out/notes.txt").write_text("mine")
    code, error = run(FOLDERS[verb], *OTHERWISE.get(verb, ()))
    assert code == 1
    assert f"out holds what an earlier `ncalign {verb}` wrote (" in error
    assert "--overwrite replaces it, or give another output_dir" in error
    assert run(FOLDERS[verb], "--overwrite")[0] == 0
    assert {path.name for path in Path("out").iterdir()} == {*names, ".ncalign", "notes.txt"}
    # The same names in a folder that no verb wrote.
    shutil.rmtree("out/.ncalign")
    for flags in ((), ("--overwrite",), *([("--resume",)] if verb == "train" else [])):
        code, error = run(FOLDERS[verb], *flags)
        assert code == 1
        assert "is there, and no record (out/.ncalign/entries) says that ncalign wrote it: it is left alone" in error
    assert names < {path.name for path in Path("out").iterdir()}


@pytest.mark.usefixtures("answers")
def test_the_same_evaluation_is_made_again_and_says_so_until_its_files_change(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(FOLDERS["evaluate"])[0] == 0
    before = Path("out/results.json").read_bytes()
    capsys.readouterr()
    assert main(FOLDERS["evaluate"].split()) == 0
    assert "out holds the results of this same evaluation: they are made anew" in capsys.readouterr().err
    assert Path("out/results.json").read_bytes() == before
    Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace('"model": "a', '"model": "other'))
    code, error = run(FOLDERS["evaluate"])
    assert (code, "out holds what an earlier `ncalign evaluate` wrote" in error) == (1, True)
    assert Path("out/results.json").read_bytes() == before


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)])
@pytest.mark.parametrize("verb", ["train", "online"])
def test_a_foreign_model_folder_stays(verb: str, flags: tuple[str, ...], run: Run) -> None:
    Path("proj/model").mkdir(parents=True)
    Path("proj/model/keep.txt").write_text("mine")
    reward = ("--reward", "rewards.py:length", "--max_new_tokens", "8") if verb == "online" else ()
    code, error = run(f"{verb} --model model --data groups.jsonl --output_dir proj", *reward, *SHORT, *flags)
    assert (code, error.startswith("error: proj/model is there, and no record")) == (1, True)
    assert [path.name for path in Path("proj").rglob("*")] == ["model", "keep.txt"]


def test_a_file_put_into_the_model_folder_keeps_it(run: Run) -> None:
    assert run(FOLDERS["train"])[0] == 0
    Path("out/model/notes.txt").write_text("mine")
    code, error = run(FOLDERS["train"], "--overwrite")
    assert (code, error.startswith("error: out/model/notes.txt is there, and no record")) == (1, True)
    assert Path("out/model/model.safetensors").is_file()


def test_a_folder_of_shards_goes_on_and_is_replaced_on_request(run: Run) -> None:
    Path("in").mkdir()
    shutil.copy("groups.jsonl", "in/a.jsonl")
    assert run("convert in out")[0] == 0
    first = Path("out/a.jsonl").stat().st_mtime_ns
    assert run("convert in out")[0] == 0
    assert Path("out/a.jsonl").stat().st_mtime_ns == first
    code, error = run("convert in out --to best_vs_worst")
    assert (code, "out holds what an earlier `ncalign convert` wrote (a.jsonl): --overwrite replaces it" in error) == (1, True)
    assert run("convert in out --to best_vs_worst --overwrite")[0] == 0
    Path("other").mkdir()
    Path("other/a.jsonl").write_text("mine")
    code, error = run("convert in other --overwrite")
    assert (code, error.startswith("error: other/a.jsonl is there, and no record")) == (1, True)
    assert Path("other/a.jsonl").read_text() == "mine"


class TestTheRule:
    def test_links_are_not_followed_when_entries_are_deleted(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "kept").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model").symlink_to(tmp_path / "other")
        with pytest.raises(ValueError, match=r"out/model is there, and no record"):
            claim(tmp_path / "out", ["model"], verb="train", inputs={}, overwrite=True)
        record(tmp_path / "out", ["model"], verb="train")
        with pytest.raises(ValueError, match=r"out/model is there, and no record"):
            claim(tmp_path / "out", ["model"], verb="train", inputs={}, overwrite=True)
        record(tmp_path / "other", ["kept"], verb="train")
        claim(tmp_path / "out", ["model"], verb="train", inputs={}, overwrite=True)
        remove(tmp_path / "out", ["model"])
        assert (tmp_path / "other" / "kept").exists()
        assert not (tmp_path / "out" / "model").is_symlink()

    def test_empty_folders_are_no_loss(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").mkdir()
        claim(tmp_path, ["checkpoints"], verb="train", inputs={}, overwrite=False)

    def test_a_verb_replaces_its_own_alone_unasked(self, tmp_path: Path) -> None:
        record(tmp_path, ["a"], verb="demo")
        (tmp_path / "a").touch()
        claim(tmp_path, ["a"], verb="demo", inputs={}, overwrite=False, own=["a"])
        with pytest.raises(ValueError, match=r"what an earlier `ncalign demo` wrote \(a\)"):
            claim(tmp_path, ["a"], verb="train", inputs={}, overwrite=False, own=["a"])

    def test_a_record_goes_with_what_was_never_written(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), outputs.recorded(tmp_path / "new" / "out", ["a"], verb="lab"):
            raise KeyError
        assert list(tmp_path.iterdir()) == []
        renew(tmp_path, ["a"], verb="lab")
        (tmp_path / "a").touch()
        with pytest.raises(KeyError), outputs.recorded(tmp_path, ["a", "b"], verb="lab"):
            raise KeyError
        assert json.loads((tmp_path / ".ncalign" / "entries").read_text()) == {"a": "lab"}

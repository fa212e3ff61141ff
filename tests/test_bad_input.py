"""What goes wrong at a user's desk: one clear message, the right exit code, and nothing half-written, for every verb."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import group_row
from ncalign.cli import app as cli
from ncalign.generation import local
from ncalign.model import reference
from ncalign.training import export, loop, trackers
from ncalign.training import train as run
from ncalign.training.engine import Engine

fcntl = pytest.importorskip("fcntl")

USABLE = [group_row(index, [1.0, 0.0]) for index in range(4)]
# What a run may say besides its one error: what it does, what it did, counted notes and warnings.
PROGRESS = re.compile(r"Precision: .*|(Loading|Resuming from) \S+|[\w. -]+: \d+(/\d+)? in \d+ s|(note|warning): .*|  .*")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one message, after lines of progress alone."""
        lines = self.err.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(("error: ", "interrupted"))]
        assert len(starts) == 1, self.err
        strange = [line for line in lines[: starts[0]] if not PROGRESS.fullmatch(line)]
        assert not strange, self.err
        return "\n".join(lines[starts[0] :])


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def _desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "NCALIGN_DEBUG", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ncalign(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return call


@pytest.fixture
def train(ncalign: Run, tiny_model_dir: Path, groups_file: Path) -> Run:
    """Run `ncalign train` for two steps into `run`, with flags that override."""

    def call(*flags: object, model: object = tiny_model_dir, data: object = groups_file, out: object = "run") -> Done:
        given = ("--model", model, "--data", data, "--output_dir", out, "--max_steps", 2, "--report_to", "", "--json")
        return ncalign("train", *given, *flags)

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def with_content(text: str) -> dict[str, Any]:
    row = group_row(9, [1.0, 0.0])
    row["candidates"][0]["completion"][0]["content"] = text
    return row


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond ``limit`` bytes: the system refuses the write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "malformed JSON": ('{"id": 3,', "malformed JSON at column"),
    "wrong type": (
        {"id": "w", "prompt": "x", "candidates": [{"completion": 5}]},
        "group 'w': candidates[0]: completion is 5 (a number): a string or a list of messages is needed",
    ),
    "unknown key": (
        {"id": "w", "prompt": "x", "candidates": [{"completion": "5", "rewrd": 1}]},
        "unknown key `rewrd`: did you mean `reward`?",
    ),
    "NaN": (
        '{"id": "n", "prompt": "x", "candidates": [{"completion": "a", "reward": NaN}]}',
        "1 x no rewards at all (first: groups.jsonl:5, group 'n')",
    ),
    "infinity": ('{"id": "n", "prompt": "x", "candidates": [{"completion": "a", "reward": 1e999}]}', "reward is infinite"),
    "duplicate id": (USABLE[0], "group 'g0': the id was used before, at line 1"),
    "one candidate": (group_row(9, [1.0]), "1 x only one candidate (first: groups.jsonl:5, group 'g9')"),
    "all rewards equal": (group_row(9, [1.0, 1.0]), "1 x all rewards equal (first: groups.jsonl:5, group 'g9')"),
    "all rewards missing": (group_row(9, [None, None]), "1 x no rewards at all (first: groups.jsonl:5, group 'g9')"),
    "empty completion": (with_content(""), "1 x empty completion (first: groups.jsonl:5, group 'g9')"),
}


class TestRows:
    """Rows that can't be used stop the run, or are left out and counted."""

    @pytest.mark.parametrize("kind", BAD_ROWS)
    def test_error_names_the_line_and_leaves_nothing(
        self, kind: str, train: Run, write_jsonl: Callable[..., Path], tmp_path: Path
    ) -> None:
        row, message = BAD_ROWS[kind]
        done = train(data=write_jsonl([*USABLE, row]))
        assert done.code == 1
        assert "groups.jsonl:5" in done.error
        assert message in done.error
        assert "on_bad_row: skip" in done.error
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("kind", BAD_ROWS)
    def test_skip_counts_and_goes_on(self, kind: str, train: Run, write_jsonl: Callable[..., Path]) -> None:
        row, message = BAD_ROWS[kind]
        done = train("--on_bad_row", "skip", data=write_jsonl([*USABLE, row]))
        data = json.loads(done.out)["data"]
        assert (done.code, data["groups_read"], data["groups_used"]) == (0, 5, 4)
        assert sum(data["groups_left_out"].values()) == 1
        assert "note: " in done.err
        assert message in done.err

    def test_held_out_rows_are_told_of_too(self, train: Run, write_jsonl: Callable[..., Path]) -> None:
        held_out = write_jsonl([*USABLE, group_row(9, [1.0])], name="held_out.jsonl")
        stopped = train("--eval_data", held_out)
        assert (stopped.code, "held_out.jsonl:5, group 'g9'" in stopped.error) == (1, True)
        skipped = train("--eval_data", held_out, "--on_bad_row", "skip")
        assert (skipped.code, "held_out.jsonl:5, group 'g9'" in skipped.err) == (0, True)

    def test_all_rows_bad_is_an_error_under_skip(self, train: Run, write_jsonl: Callable[..., Path]) -> None:
        done = train("--on_bad_row", "skip", data=write_jsonl(["{", "{"]))
        assert done.code == 1
        assert "2 of 2 groups can't be used" in done.error
        assert "No group is left to train on" in done.error

    def test_a_prompt_longer_than_the_limit_keeps_its_end_and_is_counted(
        self, train: Run, write_jsonl: Callable[..., Path]
    ) -> None:
        row = group_row(9, [1.0, 0.0])
        row["prompt"][0]["content"] = "word " * 900
        done = train("--max_length", 64, "--max_prompt_length", 32, data=write_jsonl([*USABLE, row]))
        assert done.code == 0
        assert "prompts lost their beginning" in done.err
        assert "indexing errors" not in done.err

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.jsonl", None, "none.jsonl: no such file; check the path"),
            ("empty.jsonl", b"", "empty.jsonl: no groups found: the file is empty"),
            ("data.txt", b"a,b", "data.txt: can't tell the kind of file by its name"),
            ("data.csv", b"a,b\n1,2\n", "data.csv:2: the columns match no schema: found `a`, `b`"),
            ("cut.parquet", b"PAR1", "cut.parquet: can't read the Parquet file"),
            ("cut.jsonl.gz", b"\x1f\x8b\x08\x00", "cut.jsonl.gz: can't read the gzip file to its end"),
        ],
    )
    def test_files(self, name: str, content: bytes | None, message: str, train: Run, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        done = train(data=name)
        assert done.code == 1
        assert message in done.error
        assert not (tmp_path / "run").exists()


def test_a_missing_file_is_told_before_the_model_is_loaded(train: Run) -> None:
    done = train("--eval_data", "none.jsonl", model="no/model")
    assert done.error.startswith("error: none.jsonl: no such file")


def test_unknown_keys_of_a_configuration_file(train: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lerning_rate: 1\nlora:\n  rr: 3\n")
    done = train("--config", "run.yaml")
    assert done.code == 2
    assert done.err == (
        "error: 2 problems\n"
        "  run.yaml:1: unknown key 'lerning_rate'; did you mean 'learning_rate'?\n"
        "  run.yaml:3: unknown key 'lora.rr'; did you mean 'lora.r'?\n"
    )


def removed(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def reconfigured(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def broken(name: str, text: str = "{") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in names}))

    return change


def adapter_alone(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        removed("config.json", "model.safetensors")(folder)
        broken("adapter_config.json", text)(folder)

    return change


def one_down(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "aside")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder.parent / "aside").rename(folder / "checkpoint-5")


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no such folder (relative paths start at"),
    "no config": (removed("config.json"), "has no config.json"),
    "damaged config": (broken("config.json"), "not a valid JSON file"),
    "no weights": (removed("model.safetensors"), "a folder needs config.json and *.safetensors"),
    "pickled weights": (pickled, "pickled weights such as *.bin are not read"),
    "a pickle in the place of the weights": (
        reconfigured(transformers_weights="adapter_model.bin"),
        "its config.json names 'adapter_model.bin' as its weights; pickled weights",
    ),
    "cut weights": (cut, "a safetensors file is damaged"),
    "too few weights": (reconfigured(num_hidden_layers=3), "lacks 9 weights that its config.json asks for"),
    "other sizes": (reconfigured(hidden_size=64), "its weights do not have the sizes that its config.json asks for"),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "tokenizer.json and tokenizer_config.json are needed"),
    "damaged tokenizer": (broken("tokenizer.json"), "the tokenizer of"),
    "no chat template": (removed("chat_template.jinja"), "12 x the prompt is a conversation and the tokenizer of"),
    "damaged chat template": (broken("chat_template.jinja", "{% for"), "12 x the chat template refuses the prompt"),
    "damaged adapter": (adapter_alone("{"), "adapter_config.json can't be read"),
    "adapter without its kind": (adapter_alone("{}"), "adapter_config.json can't be read"),
    "adapter without a base": (
        adapter_alone('{"peft_type": "LORA", "r": 4}'),
        "it names no base model: set base_model_name_or_path",
    ),
    "adapter of its own folder": (
        adapter_alone('{"peft_type": "LORA", "base_model_name_or_path": "changed"}'),
        "base_model_name_or_path 'changed' is the adapter's own folder",
    ),
    "adapter beside a model": (
        broken("adapter_config.json", "{}"),
        "holds both an adapter (adapter_config.json) and a whole model (model.safetensors)",
    ),
    "config that is a list": (broken("config.json", "[]"), "the config.json of model 'changed' can't be read"),
    "config without a model type": (reconfigured(model_type=None), "the config.json of model 'changed' can't be read"),
    "config of no known model": (reconfigured(model_type="lama"), "the config.json of model 'changed' can't be read"),
    "config without heads": (reconfigured(num_attention_heads=0), "model 'changed'"),
    "config with a word for a number": (reconfigured(hidden_size="wide"), "model 'changed'"),
    "config without a vocabulary": (without("vocab_size"), "its weights do not have the sizes that its config.json asks for"),
    "encoder-decoder": (
        reconfigured(model_type="t5", is_encoder_decoder=True),
        "it is an encoder-decoder model (model_type t5)",
    ),
    "half of an encoder-decoder": (reconfigured(model_type="bart"), "it is an encoder-decoder model (model_type bart)"),
    "pictures and text": (reconfigured(model_type="llava"), "can't be loaded as a causal language model: Unrecognized"),
    "no language model": (reconfigured(model_type="vit"), "can't be loaded as a causal language model: Unrecognized"),
    "a folder above models": (one_down, "it holds models or adapters in checkpoint-5: give one of those"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str, train: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    change, message = MODELS[kind]
    shutil.copytree(tiny_model_dir, tmp_path / "changed")
    change(tmp_path / "changed")
    done = train(model="changed")
    assert done.code == 1
    assert message in done.error
    assert not (tmp_path / "run").exists()


class TestSettings:
    """Values that are well-formed and can't work."""

    def test_lora_modules_that_do_not_exist(self, train: Run, tmp_path: Path) -> None:
        done = train("--lora.target_modules", "nope")
        assert (done.code, "lora.target_modules='nope' does not fit" in done.error) == (1, True)
        assert not (tmp_path / "run").exists()

    def test_trackers(self, train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        unknown = train("--report_to", "foo")
        assert unknown.code == 2
        assert unknown.err.startswith("error: report_to: unknown tracker 'foo'; must be one of all, ")
        monkeypatch.setattr(trackers, "get_available_trackers", list)
        missing = train("--report_to", "wandb")
        assert missing.code == 2
        assert missing.err == "error: report_to: the package of tracker 'wandb' is not installed; install it or leave it out\n"

    def test_reference_log_probs_that_the_data_lack(self, train: Run, tmp_path: Path) -> None:
        done = train("--reference", "data")
        assert (done.code, "group 'g0' has a candidate without reference_logprob" in done.error) == (1, True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("out", ["file", "file/inside"])
    def test_output_dir_that_is_a_file(self, out: str, train: Run, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        done = train(out=out)
        assert done.code == 1
        assert done.error.startswith(f"error: can't write {out}: ")
        assert done.error.endswith("Give another output_dir")
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_output_dir_that_may_not_be_written_to(self, train: Run, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir(mode=0o555)
        done = train()
        assert (done.code, "output_dir run may not be written to" in done.error) == (1, True)

    @pytest.mark.parametrize("by", ["flag", "home"])
    def test_cache_that_can_not_be_written(self, by: str, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("kept")
        monkeypatch.delenv("NCALIGN_CACHE")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        computed: list[object] = []
        monkeypatch.setattr(Engine, "fill_reference", lambda *arguments: computed.append(arguments))
        done = train(*(("--cache_dir", tmp_path / "file") if by == "flag" else ()))
        assert (done.code, computed) == (1, [])
        assert done.error.startswith(f"error: can't write {tmp_path / 'file'}/")
        assert "set cache_dir, or NCALIGN_CACHE, to a folder with room" in done.error
        assert not (tmp_path / "run").exists()


class TestRunFolder:
    """A run folder belongs to one run at a time, and a run that can't begin leaves it as it was."""

    def test_a_second_run_is_refused_and_a_bad_one_does_not_cost_the_first(
        self, train: Run, write_jsonl: Callable[..., Path], tmp_path: Path
    ) -> None:
        assert train().code == 0
        first = files(tmp_path / "run")
        again = train()
        assert (again.code, "an earlier `ncalign train` wrote (results.json, metrics.jsonl" in again.error) == (1, True)
        assert train("--overwrite", data=write_jsonl(["{"], name="bad.jsonl")).code == 1
        assert train("--overwrite", model="no/model").code == 1
        itself = train("--overwrite", model="run/model")
        assert itself.error == "error: run/model is what model reads, and would be replaced: give another output_dir"
        assert files(tmp_path / "run") == first

    def test_two_at_once(self, train: Run, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        descriptor = os.open(tmp_path / "run", os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            done = train("--overwrite")
        finally:
            os.close(descriptor)
        assert done.code == 1
        assert done.error == "error: another process is training in run: wait for it, or choose another output_dir"

    def test_resume_with_another_configuration(self, train: Run, tmp_path: Path) -> None:
        assert train("--save_steps", 1).code == 0
        first = files(tmp_path / "run")
        done = train("--resume", "--learning_rate", 1)
        assert done.code == 1
        assert "was started with another configuration:\n  learning_rate: 5e-06 -> 1.0" in done.error
        assert files(tmp_path / "run") == first

    def test_resume_from_a_damaged_checkpoint(self, train: Run, tmp_path: Path) -> None:
        assert train("--save_steps", 1).code == 0
        # As a run that was killed before it saved its model.
        (tmp_path / "run/results.json").unlink()
        checkpoint = tmp_path / "run/checkpoints/step-00000002"
        for path in sorted(checkpoint.iterdir()):
            whole = path.read_bytes()
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
            done = train("--save_steps", 1, "--resume")
            assert done.code == 1, path
            assert "run/checkpoints/step-00000002 is damaged" in done.error
            path.write_bytes(whole)
        state = checkpoint / "state.json"
        state.write_text(state.read_text().replace('"step": 2', '"step": 1000000'))
        assert "state.json changed after writing" in train("--save_steps", 1, "--resume").error
        shutil.rmtree(checkpoint)
        assert train("--save_steps", 1, "--resume").code == 0


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
PHASES: dict[str, tuple[Any, str]] = {
    "reading": (run, "load_groups"),
    "reference": (reference.ReferenceCache, "add"),
    "training": (loop.Loop, "step"),
    "checkpoint": (sys.modules["ncalign.training.checkpoint"], "_sha256"),
    "model": (export, "_write_weights"),
}


def send_instead(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, *, after: bool = False) -> None:
    """Send a signal to this process when a function is called, before or after its work."""
    work = getattr(owner, name)

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        result = work(*arguments, **keywords) if after else None
        os.kill(os.getpid(), number)
        time.sleep(1)  # the signal reaches the main thread within it
        return result

    monkeypatch.setattr(owner, name, interrupted)


class TestSignals:
    """Ctrl-C and SIGTERM at any moment: a line on how to go on, and no half-written file."""

    @pytest.mark.parametrize(("number", "code"), SIGNALS)
    @pytest.mark.parametrize("phase", PHASES)
    def test_training(
        self, phase: str, number: int, code: int, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        send_instead(monkeypatch, *PHASES[phase], number, after=phase == "model")
        done = train("--save_steps", 1)
        assert done.code == code
        advice = {
            "reading": "nothing had been written; rerun to start again",
            "reference": "nothing had been written; rerun to start again",
            "training": "no checkpoint had been written yet; rerun with --overwrite to start again",
            "checkpoint": "no checkpoint had been written yet; rerun with --overwrite to start again",
            "model": "run/checkpoints is kept; rerun with --resume to go on from the last checkpoint",
        }
        assert done.error == f"interrupted; {advice[phase]}"
        assert leftovers(tmp_path) == []
        assert not (tmp_path / "run/model").exists()
        assert (tmp_path / "run").exists() == (phase in ("training", "checkpoint", "model"))
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
        flag = {"reading": (), "reference": (), "model": ("--resume",)}.get(phase, ("--overwrite",))
        assert train("--save_steps", 1, *flag).code == 0

    @pytest.mark.parametrize(("number", "code"), SIGNALS)
    def test_score_and_generate_leave_the_earlier_file(
        self,
        number: int,
        code: int,
        ncalign: Run,
        tiny_model_dir: Path,
        groups_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "out.jsonl").write_text("earlier")
        (tmp_path / "stop.py").write_text(
            f"import os, time\ndef reward(prompt, completions):\n    os.kill(os.getpid(), {int(number)}); time.sleep(1)\n"
        )
        over = ("--output", "out.jsonl", "--overwrite")
        scored = ncalign("score", "--data", groups_file, *over, "--reward", "stop.py:reward")
        send_instead(monkeypatch, local.TransformersGenerator, "_sample", number)
        sampled = ncalign("generate", "--model", tiny_model_dir, "--prompts", groups_file, *over)
        for done in (scored, sampled):
            assert done.code == code
            kept = "out.jsonl was not written, and what was there before is unchanged; rerun to start again"
            assert done.error == f"interrupted; {kept}"
        assert (tmp_path / "out.jsonl").read_text() == "earlier"
        assert leftovers(tmp_path) == []

    def test_a_real_process_killed_and_resumed(
        self, train: Run, tiny_model_dir: Path, groups_file: Path, tmp_path: Path
    ) -> None:
        flags = ["--model", str(tiny_model_dir), "--data", str(groups_file), "--output_dir", "run", "--report_to", ""]
        many = [sys.executable, "-m", "ncalign", "train", *flags, "--max_steps", "100000", "--save_steps", "5"]
        with subprocess.Popen(many, stderr=subprocess.PIPE, text=True) as process:
            until = time.monotonic() + 60
            while not list(tmp_path.glob("run/checkpoints/step-*/state.json")) and time.monotonic() < until:
                time.sleep(0.02)
            process.kill()
            process.wait()
        # What a kill in the middle of writing leaves.
        (tmp_path / "run/checkpoints/.step-99999999.tmp").mkdir()
        (tmp_path / "run/.model.tmp").mkdir()
        with subprocess.Popen([*many, "--resume"], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            resumed = next(line for line in lines if line.startswith("Resuming"))
            before = int(resumed.strip()[-8:])
            while max(map(checkpoint_step, tmp_path.glob("run/checkpoints/step-*"))) <= before and time.monotonic() < until:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
        assert process.returncode == 130
        assert rest.splitlines()[-1].startswith("interrupted; run/checkpoints is kept")
        assert leftovers(tmp_path) == []


def checkpoint_step(folder: Path) -> int:
    return int(folder.name[-8:])


class TestFullDisk:
    """A write that the system refuses ends the work with the file's name; what was whole before stays."""

    @pytest.mark.parametrize(
        ("limit", "flags", "target"),
        [
            (1500, (), "cache/reference/"),
            (1900, ("--max_steps", 20), "run/metrics.jsonl"),
            (30_000, ("--save_steps", 1), "run/checkpoints/step-00000001"),
            (30_000, (), "run/model"),
            (12_000, ("--lora.r", 2), "run/model"),
        ],
        ids=["reference", "metrics", "checkpoint", "model", "tokenizer"],
    )
    def test_training(self, limit: int, flags: tuple[object, ...], target: str, train: Run, tmp_path: Path) -> None:
        with full_disk(limit):
            done = train(*flags)
        assert done.code == 1
        assert re.match(rf"error: can't write \S*{target}\S*: .*File too large", done.error), done.error
        assert "free some space or write to another disk" in done.error
        assert leftovers(tmp_path) == []
        assert not (tmp_path / "run/model").exists()
        if "metrics" in target:
            assert all("loss" in json.loads(line) for line in (tmp_path / target).read_text().splitlines())

    def test_where_the_first_file_cannot_be_written_nothing_is_left(self, train: Run, tmp_path: Path) -> None:
        assert train(out="warm").code == 0  # the reference log-probs are in the cache now
        with full_disk(100):
            done = train()
        assert (done.code, done.error.startswith("error: can't write run/.ncalign/entries: File too large")) == (1, True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
    def test_convert(self, output: str, ncalign: Run, groups_file: Path, tmp_path: Path) -> None:
        (tmp_path / output).write_text("earlier")
        with full_disk(300):
            done = ncalign("convert", groups_file, output, "--overwrite")
        assert (done.code, done.error.startswith(f"error: can't write {output}: File too large")) == (1, True)
        assert (tmp_path / output).read_text() == "earlier"
        assert leftovers(tmp_path) == []

    def test_generate_and_score(self, ncalign: Run, tiny_model_dir: Path, groups_file: Path, tmp_path: Path) -> None:
        (tmp_path / "rewards.py").write_text(
            "def length(prompt, completions):\n    return [len(text) for text in completions]\n"
        )
        with full_disk(1000):
            sampled = ncalign(
                *(
                    "generate",
                    "--model",
                    tiny_model_dir,
                    "--prompts",
                    groups_file,
                    "--output",
                    "out.jsonl",
                    "--max_new_tokens",
                    4,
                )
            )
            scored = ncalign("score", "--data", groups_file, "--output", "out.jsonl", "--reward", "rewards.py:length")
        for done in (sampled, scored):
            assert (done.code, done.error.startswith("error: can't write out.jsonl: File too large")) == (1, True)
        assert not (tmp_path / "out.jsonl").exists()
        assert leftovers(tmp_path) == []

    def test_standard_output(self) -> None:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "ncalign", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
            )
        assert (done.returncode, done.stderr) == (1, "error: can't write to standard output: No space left on device\n")


REWARDS = """
import sys
def raises(prompt, completions): raise KeyError("boo")
def exits(prompt, completions): sys.exit(3)
def nan(prompt, completions): return [float("nan")] * len(completions)
def short(prompt, completions): return [1.0]
def nothing(prompt, completions): return None
"""


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("rewards.py:raises", "reward 'rewards.py:raises' raised KeyError on groups.jsonl:1: group 'g0': 'boo'"),
        ("rewards.py:exits", "raised SystemExit on groups.jsonl:1: group 'g0': 3"),
        ("rewards.py:nan", "on groups.jsonl:1: group 'g0' returned, for completion 1, nan; a finite number"),
        ("rewards.py:short", "returned 1 rewards for 2 completions; one each is needed"),
        ("rewards.py:nothing", "returned a NoneType; a list with one number per completion is needed"),
        ("rewards.py:nope", "has no function 'nope'; its functions are: exits, nan, nothing, raises, short"),
        ("none.py:f", "there is no file none.py"),
        ("no.such.module:f", "no.such.module can't be imported: ModuleNotFoundError"),
        ("length", "'package.module:function', 'file.py:function' or 'reasoning_gym' is needed"),
    ],
)
def test_rewards(reward: str, message: str, ncalign: Run, groups_file: Path, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "out.jsonl").write_text("earlier")
    done = ncalign("score", "--data", groups_file, "--output", "out.jsonl", "--reward", reward, "--overwrite")
    assert done.code == 1
    assert message in done.error
    assert (tmp_path / "out.jsonl").read_text() == "earlier"
    assert leftovers(tmp_path) == []


class TestOutputs:
    """Where a result can't go is told before the work, not after it."""

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("out.txt", "out.txt: can't tell the kind of file by its name"),
            ("folder.jsonl", "can't write folder.jsonl: it is a folder"),
            ("file/out.jsonl", "file/out.jsonl: File exists; a file stands where a folder is needed"),
            ("full.jsonl", "can't write full.jsonl: it is not an ordinary file"),
        ],
    )
    def test_generate_and_score(self, output: str, message: str, ncalign: Run, groups_file: Path, tmp_path: Path) -> None:
        (tmp_path / "folder.jsonl").mkdir()
        (tmp_path / "file").write_text("kept")
        (tmp_path / "full.jsonl").symlink_to("/dev/full")
        # Neither the model nor the reward exists: the output comes first.
        for verb in (("generate", "--model", "no/model", "--prompts"), ("score", "--reward", "no.module:f", "--data")):
            done = ncalign(*verb, groups_file, "--output", output)
            assert done.code == 1
            assert message in done.error

    def test_the_look_leaves_no_folder(self, ncalign: Run, groups_file: Path, tmp_path: Path) -> None:
        done = ncalign("score", "--reward", "no.module:f", "--data", groups_file, "--output", "new/folder/out.jsonl")
        assert "no.module can't be imported" in done.error
        assert not (tmp_path / "new").exists()


def test_generate_names_the_prompt_by_file_line_and_id(
    ncalign: Run, tiny_model_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    prompts = write_jsonl(["{", {"id": "good", "prompt": "hello"}, {"id": "long", "prompt": "word " * 600}], name="p.jsonl")
    flags = ("generate", "--model", tiny_model_dir, "--output", "out.jsonl", "--max_new_tokens", 4, "--prompts")
    done = ncalign(*flags, prompts, "--on_bad_row", "skip", "--json")
    left_out = {"longer than the model's context of 512 tokens with max_new_tokens=4": 1}
    assert (done.code, json.loads(done.out)["prompts_left_out"]) == (0, left_out)
    assert re.search(r"\(first: p\.jsonl:3: group 'long': its \d+ tokens and max_new_tokens=4 exceed", done.err)
    Path("out.jsonl").unlink()
    done = ncalign(
        *flags, write_jsonl([{"id": "good", "prompt": "hello"}, {"id": "long", "prompt": "word " * 600}], name="p.jsonl")
    )
    assert done.code == 1
    assert re.match(r"error: p\.jsonl:2: group 'long': its \d+ tokens and max_new_tokens=4 exceed", done.error)
    kept = ncalign(*flags, write_jsonl(["{", {"prompt": "hello"}]), "--on_bad_row", "skip", "--json")
    assert (kept.code, json.loads(kept.out)["rows_skipped"]) == (0, 1)
    assert "groups.jsonl:1: malformed JSON" in kept.err


def test_a_good_run_is_quiet_and_takes_any_path(ncalign: Run, tiny_model_dir: Path, groups_file: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "mödel")
    flags = ("--model", "mödel", "--data", "groups.jsonl", "--output_dir", "läufe/ärste run", "--max_steps", 2)
    done = ncalign("train", *flags, "--eval_fraction", 0.3)
    assert done.code == 0
    said = [re.sub(r"\d+ s$", "0 s", line) for line in done.err.splitlines()]
    assert said[0].startswith("Precision: ")
    assert said[1:] == [
        "Loading mödel",
        "Encoding groups.jsonl: 12 in 0 s",
        "Reference log-probs: 1/1 in 0 s",
        "Evaluating: 1/1 in 0 s",
        "Training: 2/2 in 0 s",
        "Evaluating: 1/1 in 0 s",
    ]
    assert (tmp_path / "läufe/ärste run/model/model.safetensors").is_file()

"""The command line as a user meets it: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ncalign.cli import app as cli
from ncalign.cli import settings, verbs
from ncalign.cli.flags import parse
from ncalign.core.config import fields
from ncalign.objectives.pairs import SimPO
from ncalign.training.config import TrainConfig

NAMES = (
    "demo, train, online, convert, check, audit, generate, score, adjust, answer, evaluate, study, lab, report, view, chat, "
    "merge, push, doctor, completion"
)
TRAIN = ["train", "--model", "m", "--data", "d.jsonl", "--output_dir", "runs/x"]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("NCALIGN_DEBUG", raising=False)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[TrainConfig], object]], None]:
    """Put a function in the place of `run_training`; the real one needs a model."""

    def _install(work: Callable[[TrainConfig], object]) -> None:
        train, plan = ModuleType("ncalign.training.train"), ModuleType("ncalign.training.plan")
        train.run_training = work  # type: ignore[attr-defined]
        plan.dry_run = lambda config: {"text": f"would train {config.model}", "groups": 3}  # type: ignore[attr-defined]
        for module in (train, plan):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return _install


def _raise(error: BaseException) -> Callable[[TrainConfig], object]:
    def _work(_config: TrainConfig) -> object:
        raise error

    return _work


def parsed(words: str) -> dict[str, str]:
    return parse(verbs.TRAIN, words.split()).flags


def test_both_spellings_of_a_flag() -> None:
    assert parsed("--learning_rate 1") == parsed("--learning-rate 1") == parsed("--learning-rate=1") == {"learning_rate": "1"}
    assert parsed("--lora.target-modules a-b") == {"lora.target_modules": "a-b"}


def test_a_last_word_that_is_a_list_takes_all_that_are_left() -> None:
    assert parse(verbs.EVALUATE, ["a", "b", "c", "--seed", "1"]).flags == {"model": "a", "against": "b,c", "seed": "1"}
    assert parse(verbs.EVALUATE, ["a"]).flags == {"model": "a"}
    assert parse(verbs.REPORT, ["a", "b"]).flags == {"runs": "a,b"}
    assert parse(verbs.EVALUATE, ["a", "b", "--against", "c"]).problems == ("--against: given twice, as 'c' and as 'b'",)


def test_booleans() -> None:
    assert parsed("--resume") == parsed("--resume true") == {"resume": "true"}
    assert parsed("--no-resume") == parsed("--no_resume") == parsed("--resume false") == {"resume": "false"}
    assert parsed("--resume --seed 3") == {"resume": "true", "seed": "3"}
    assert parsed("--lora") == {"lora": "true"}
    assert parsed("--no-lora") == {"lora": "false"}


def test_lists_and_negative_numbers() -> None:
    assert parsed("--report_to tensorboard wandb") == parsed("--report_to tensorboard,wandb")
    assert parsed("--report_to") == {"report_to": ""}
    assert parsed("--max_steps -1 --report_to a --seed 2") == {"max_steps": "-1", "report_to": "a", "seed": "2"}


def test_the_last_flag_wins_and_the_method_has_one_name() -> None:
    assert parsed("--seed 1 --seed 2") == {"seed": "2"}
    assert parsed("--objective.name nca") == parsed("--objective nca") == {"objective": "nca"}


@pytest.mark.parametrize("verb", verbs.VERBS, ids=lambda verb: verb.name)
def test_every_field_is_a_flag_in_the_help(verb: verbs.Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb.name, "--help"]) == 0
    printed = capsys.readouterr().out
    words = set(printed.split())
    for name in settings.field_names(verb.config()):
        assert f"--{name}" in words
    for info in fields(verb.config()).values():
        if info.description:
            assert " ".join(info.description.split()) in " ".join(printed.split())


def test_help_of_train_has_the_methods_with_their_fields_and_its_groups(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "fields: beta, estimator, pairing, penalty\n" in printed
    assert "[exo, info_nca" in printed or "[info_nca, exo" in printed
    assert {first for _, first in verbs.TRAIN.groups} <= set(fields(TrainConfig))
    for title, _ in verbs.TRAIN.groups:
        assert f"\n{title}:\n" in printed


@pytest.mark.parametrize("verb", verbs.VERBS, ids=lambda verb: verb.name)
def test_every_verb_names_work_that_exists(verb: verbs.Verb) -> None:
    assert all(callable(verbs.resolve(name)) for name in (verb.work, verb.plan) if isinstance(name, str))


@pytest.mark.parametrize("verb", [verbs.TRAIN, verbs.ONLINE], ids=lambda verb: verb.name)
def test_every_method_has_its_own_description_of_each_field(verb: verbs.Verb, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([verb.name, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    methods = settings.section_models(fields(verb.config())["objective"])
    assert len(methods) > 20
    for method in methods:
        for name in settings.own_fields(method):
            # From the flag (which the example has too) to the next one: paragraphs of '[methods] description (default: ...)'.
            text = re.split(r" --(?=[a-z_.]+ )", words.rpartition(f" --objective.{name} ")[2], maxsplit=1)[0]
            found = re.findall(r"\[(every method|[a-z_, ]+)\] (.*?)(?= \[(?:every method|[a-z_, ]+)\] |$)", text)
            mine = [
                said for whose, said in found if whose == "every method" or settings.model_name(method) in whose.split(", ")
            ]
            assert len(mine) == 1, (method, name, found)
            description = " ".join(fields(method)[name].description.split())
            assert mine[0].startswith(description), (method, name)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb.name}" in printed for verb in verbs.VERBS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ncalign ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            f"error: no verb given; needed is one of {NAMES} (see ncalign --help)",
        ),
        (["trian"], "error: unknown verb 'trian'; did you mean 'train'?"),
        (["xyzzy"], f"error: unknown verb 'xyzzy'; must be one of {NAMES}"),
        (["--config", "x"], "error: unknown flag '--config' before the verb; write ncalign VERB [--FIELD VALUE ...]"),
        ([*TRAIN, "--learning-rat", "1"], "error: unknown flag '--learning_rat'; did you mean '--learning_rate'?"),
        ([*TRAIN, "--beta=1"], "error: unknown flag '--beta'; did you mean '--objective.beta'?"),
        ([*TRAIN, "--jsn"], "error: unknown flag '--jsn'; did you mean '--json'?"),
        ([*TRAIN, "-x"], "error: unknown flag '-x'; --help lists the flags"),
        (["train", "--modl", "m", *TRAIN[3:]], "error: unknown flag '--modl'; did you mean '--model'?"),
        ([*TRAIN, "--seed"], "error: --seed: expected one argument"),
        ([*TRAIN, "more"], "error: unexpected argument 'more'; a field is set by --FIELD VALUE"),
        (["convert", "a", "b", "c"], "error: unexpected argument 'c'; a field is set by --FIELD VALUE"),
        (["convert", "a", "b", "--input", "c"], "error: --input: given twice, as 'c' and as 'a'"),
        ([*TRAIN, "--seed", "x", "--sed", "1"], None),
    ],
)
def test_bad_usage_is_one_message_and_2(arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    several = "error: 2 problems\n  unknown flag '--sed'; did you mean '--seed'?\n  --seed: found 'x'; must be a valid integer"
    assert printed.err == (message or several) + "\n"
    assert printed.out == ""


def test_problems_of_a_file_are_2_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.yaml"
    file.write_text("model: m\nlearning_rat: 1e-5\n")
    assert cli.main([*TRAIN, "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}:2: unknown key 'learning_rat'; did you mean 'learning_rate'?\n"


def test_print_config_is_read_back_by_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--objective", "nca", "--lora.r", "8", "--learning-rate", "1e-5", "--report_to", "[]", "--resume"]
    assert cli.main([*TRAIN, *chosen, "--print-config"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(first)
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert "objective:\n  name: nca\n" in first


def test_convert_takes_its_paths_as_words_around_flags() -> None:
    arguments = parse(verbs.CONVERT, ["a.jsonl", "--on_bad_row", "skip", "b.parquet"])
    assert arguments.flags == {"input": "a.jsonl", "output": "b.parquet", "on_bad_row": "skip"}
    assert arguments.problems == ()


def test_convert_counts_what_it_wrote(write_jsonl, groups_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = groups_file.with_name("out.parquet")
    assert cli.main(["convert", str(groups_file), str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: 12 rows read, 12 groups, 0 rows skipped\n"
    assert output.is_file()
    broken = write_jsonl([*groups_file.read_text().splitlines()[:2], "{"], name="broken.jsonl")
    again = groups_file.with_name("again.jsonl")
    assert cli.main(["convert", str(broken), str(again)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {broken}:3: ")
    assert not again.exists()
    assert cli.main(["convert", str(broken), str(again), "--on_bad_row", "skip", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["output"], result["rows"], result["groups"], result["skipped"]) == (str(again), 3, 2, 1)


def test_the_verb_gets_the_configuration_and_its_result_is_printed(training, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[TrainConfig] = []

    def _work(config: TrainConfig) -> object:
        seen.append(config)
        print("a library's chatter")
        return {"steps": 2, "after": {"loss": 0.5}, "sizes": [1, 2], "undefined": float("nan"), "before": None}

    training(_work)
    assert cli.main([*TRAIN, "--seed", "4"]) == 0
    printed = capsys.readouterr()
    assert seen[0].seed == 4
    assert printed.out == "steps: 2\nafter:\n  loss: 0.5\nsizes: [1, 2]\nundefined: nan\nbefore: none\n"
    assert printed.err == "a library's chatter\n"
    assert cli.main([*TRAIN, "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result == {"steps": 2, "after": {"loss": 0.5}, "sizes": [1, 2], "undefined": None, "before": None}


def test_dry_run_does_not_train(training, capsys: pytest.CaptureFixture[str]) -> None:
    training(_raise(AssertionError("trained")))
    assert cli.main([*TRAIN, "--dry-run"]) == 0
    assert capsys.readouterr().out == "would train m\n"
    assert cli.main([*TRAIN, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "would train m", "groups": 3}


def test_only_train_has_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "a", "b", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown flag '--dry-run'")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("group 'g7': reward is NaN"), "error: group 'g7': reward is NaN\n"),
        (RuntimeError("out of memory"), "error: out of memory\n"),
        (FileNotFoundError(2, "No such file or directory", "d.jsonl"), "error: d.jsonl: No such file or directory\n"),
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
        (MemoryError(), "error: MemoryError\n"),
        (BrokenPipeError(32, "Broken pipe"), "error: Broken pipe\n"),
    ],
)
def test_failed_work_is_1_with_one_message(
    training, error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training(_raise(error))
    assert cli.main(TRAIN) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", message)


@pytest.mark.parametrize(
    ("words", "error", "expected"),
    [
        (TRAIN, ValueError("d.jsonl:3: `reward` is 'a'; give a number"), (1, "d.jsonl:3", "give a number")),
        (TRAIN, ValueError("group 'g7': reward is NaN"), (1, "group 'g7'", "reward is NaN")),
        (TRAIN, FileNotFoundError(2, "No such file or directory", "d.jsonl"), (1, "d.jsonl", "No such file or directory")),
        (TRAIN, MemoryError(), (1, None, None)),
        (TRAIN, KeyError("x"), (1, None, "report it with the command and what is on stderr")),
        (TRAIN, KeyboardInterrupt(), (130, None, "rerun to start again")),
        ([*TRAIN, "--learning_rat", "1"], None, (2, "--learning_rat", "did you mean '--learning_rate'?")),
        ([*TRAIN, "--learning_rate", "a", "--seed", "b"], None, (2, "--learning_rate", "must be a valid number")),
        (["tran"], None, (2, "tran", "did you mean 'train'?")),
        ([], None, (2, "--json", "write ncalign VERB [--FIELD VALUE ...]")),
    ],
    ids=["data", "group", "file", "memory", "bug", "interrupted", "flag", "two values", "verb", "no verb"],
)
def test_a_failure_is_one_object_as_json(
    training, words: list[str], error: BaseException | None, expected: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if error is not None:
        training(_raise(error))
    code, where, remedy = expected
    assert cli.main([*words, "--json"]) == code
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found.keys() == {"error", "where", "what_to_do", "problems", "verb", "exit_code"}
    assert (found["exit_code"], found["where"], found["what_to_do"]) == (code, where, remedy)
    assert found["verb"] == ("train" if words[:1] == ["train"] else None)
    # People are told as ever.
    assert printed.err.startswith(("error: ", "interrupted", "Traceback"))
    assert found["error"] == "\n".join(found["problems"])
    assert len(found["problems"]) == (2 if "b" in words else 1)


def test_the_help_of_one_method_has_its_fields_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--objective", "simpo"], ["--objective.name", "simpo"]):
        assert cli.main(["train", *words, "--help"]) == 0
        shown = capsys.readouterr().out
        own = set(re.findall(r"^  --objective\.(\w+) ", shown, re.MULTILINE))
        assert {"beta", "gamma"} <= own
        assert own <= set(fields(SimPO)) - {"name"}
        assert "--learning_rate" not in shown
        assert (SimPO.__doc__ or "").strip().splitlines()[0] in shown
    assert cli.main(["train", "--objective", "simpoo", "--help"]) == 2
    assert capsys.readouterr().err == "error: --objective: unknown method 'simpoo'; did you mean 'simpo'?\n"


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_debug_shows_the_traceback(
    training, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training(_raise(ValueError("group 'g7': reward is NaN")))
    if way == "variable":
        monkeypatch.setenv("NCALIGN_DEBUG", "1")
    assert cli.main([*TRAIN, *(["--debug"] if way == "flag" else [])]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last)")
    assert printed.endswith("error: group 'g7': reward is NaN\n")


@pytest.mark.parametrize("error", [KeyError("x"), NotImplementedError("x"), AssertionError("x")], ids=repr)
def test_a_bug_is_1_with_traceback_and_how_to_report_it(training, error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    training(_raise(error))
    assert cli.main(TRAIN) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last)")
    assert "a bug in ncalign; please report it" in printed.splitlines()[-1]


def test_ctrl_c_says_what_is_kept(training, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training(_raise(KeyboardInterrupt()))
    arguments = [*TRAIN[:-1], str(tmp_path)]
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err == "interrupted; nothing had been written; rerun to start again\n"
    (tmp_path / "config.yaml").touch()
    assert cli.main(arguments) == 130
    assert "because save_steps is 0" in capsys.readouterr().err
    half_written = tmp_path / "checkpoints" / ".step-00000002.tmp"
    half_written.mkdir(parents=True)
    (half_written / "state.json").touch()
    assert cli.main([*arguments, "--save_steps", "2"]) == 130
    assert "no checkpoint had been written yet" in capsys.readouterr().err
    half_written.rename(tmp_path / "checkpoints" / "step-00000002")
    assert cli.main([*arguments, "--save_steps", "2"]) == 130
    assert capsys.readouterr().err == (
        f"interrupted; {tmp_path / 'checkpoints'} is kept; rerun with --resume to go on from the last checkpoint\n"
    )


def test_sigterm_is_like_ctrl_c_and_its_handler_is_put_back(training, capsys: pytest.CaptureFixture[str]) -> None:
    def _work(_config: TrainConfig) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    training(_work)
    assert cli.main(TRAIN) == 143
    assert capsys.readouterr().err.startswith("interrupted; ")
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_can_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main([*TRAIN, "--print-config"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_other_ranks_are_quiet_except_about_failures(
    training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    training(lambda config: {"steps": 1})
    assert cli.main(TRAIN) == 0
    assert cli.main([*TRAIN, "--seed", "x"]) == 2
    training(_raise(KeyboardInterrupt()))
    assert cli.main(TRAIN) == 130
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    training(_raise(ValueError("no file here")))
    assert cli.main(TRAIN) == 1
    assert capsys.readouterr().err == "[rank 1] error: no file here\n"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["score", "--help"], ["convert", "--help"], ["lab", "--help"], ["score", "--sed", "1"]]
)
def test_nothing_heavy_is_imported_before_a_verb_works(arguments: list[str]) -> None:
    script = (
        "import sys; from ncalign.cli.app import main; main(sys.argv[1:]); "
        "print(*sorted({'torch', 'transformers', 'pyarrow', 'numpy', 'accelerate', 'peft', 'rich'} & set(sys.modules)),"
        "file=sys.stderr)"
    )
    assert python("-c", script, *arguments).stderr.splitlines()[-1] == ""


def test_it_runs_as_a_module() -> None:
    done = python("-m", "ncalign", *TRAIN, "--print-config")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("max_length: 1024\n")
    assert python("-m", "ncalign", "trian").returncode == 2


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ncalign", "train", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_laboratory_prints_the_bare_list_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"statement": "s", "source": "p", "predicted": 0.0, "measured": 0.0, "tolerance": 1e-12, "holds": True}
    monkeypatch.setattr(
        "ncalign.lab.theory.run_lab", lambda output_dir, overwrite: {"statements": [row], "text": "table", "files": []}
    )
    assert cli.main(["lab", "theory", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row]

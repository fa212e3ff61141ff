"""What is said to be done is on disk: contents before names, names before what counts on them; and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import group_row
from ncalign.cli.app import main
from ncalign.core.atomic import atomic_folder, atomic_path, write_text_atomic
from ncalign.core.locks import locked
from ncalign.core.outputs import claim, record, remove
from ncalign.core.store import Store
from ncalign.data import shards
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training
from server_double import ServerDouble, serving

Write = Callable[..., Path]


class Disk:
    """Follows what has reached the disk, and notes every name that came before its contents or its forerunners."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.early: list[str] = []
        self.named: list[str] = []
        self._flushed: set[tuple[int, int, int]] = set()
        self._open: set[Path] = set()
        fsync, replace, rename = os.fsync, os.replace, Path.rename

        def watched_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self._flushed.add(_version(os.fstat(descriptor)))
            self._open.discard(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

        def watched_replace(source: Path, target: Path) -> None:
            self._before(Path(source), Path(target))
            replace(source, target)

        def watched_rename(source: Path, target: Path) -> Path:
            self._before(source, target)
            return rename(source, target)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "replace", watched_replace)
        monkeypatch.setattr(Path, "rename", watched_rename)

    def _before(self, source: Path, target: Path) -> None:
        if target.name.endswith(".tmp"):
            return  # out of the way, to be deleted
        inside = [source, *source.rglob("*")]
        self.early += [f"{target}: {path.name}" for path in inside if _version(path.stat()) not in self._flushed]
        self.early += [f"{target}: a name in {folder}" for folder in self._open]
        self.named.append(target.name)
        self._open.add(target.parent.resolve())


def _version(found: os.stat_result) -> tuple[int, int, int]:
    return (found.st_ino, found.st_size, found.st_mtime_ns)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    if sys.platform != "linux":
        pytest.skip("the names of open files are read from /proc")
    return Disk(monkeypatch)


def test_weights_are_on_disk_before_a_run_is_finished(
    disk: Disk, tmp_path: Path, tiny_model_dir: Path, groups_file: Path
) -> None:
    config = TrainConfig(
        model=str(tiny_model_dir),
        data=groups_file,
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        lora={"r": 2},
        max_steps=2,
        save_steps=1,
        save_total_limit=1,
        dtype="float32",
        scoring_dtype="float32",
        report_to=(),
    )
    run_training(config)
    run_training(config.model_copy(update={"resume": True, "merge": True}))
    assert disk.early == []
    assert [name for name in disk.named if name not in ("entries", "inputs.json", "config.yaml", "metrics.jsonl")][1:] == [
        *("step-00000001", "step-00000002", "README.md", "model", "results.json", "report.html"),
        *("adapter", "README.md", "model"),
    ]


def test_shards_are_on_disk_before_they_are_finished(
    disk: Disk, tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "num_workers", lambda: 1)
    (tmp_path / "in").mkdir()
    for name in "ab":
        write_jsonl([group_row(k, [1, 0]) | {"id": f"{name}{k}"} for k in range(2)], f"in/{name}.jsonl")
    shards.convert_folder(tmp_path / "in", tmp_path / "out")
    assert disk.early == []
    assert disk.named[1:] == ["a.jsonl", "a.ids", "a.json", "b.jsonl", "b.ids", "b.json"]


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(text: str, *, fails: bool) -> None:
        with atomic_folder(tmp_path / "there") as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / text).write_text(text)
            if fails:
                raise ZeroDivisionError

    write("first", fails=False)
    with pytest.raises(ZeroDivisionError):
        write("second", fails=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "inner", "first"]
    write("third", fails=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "inner", "third"]


@contextmanager
def another_process(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs until it is killed; it is in the middle of its work when this yields."""
    command = [sys.executable, "-c", f"import sys, time\n{program}", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


WRITES = """
from ncalign.core.atomic import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""
HOLDS = """
from pathlib import Path
from ncalign.core.locks import locked
with locked(Path(sys.argv[1]), busy=None):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_was_writing_is_deleted_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "groups.jsonl"
    with another_process(WRITES, target):
        write_text_atomic("whole", target)
        assert [path.read_text() for path in tmp_path.glob(".*.tmp")] == ["half"]
    write_text_atomic("whole", tmp_path / "groups")  # whose temporary names begin alike
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    write_text_atomic("whole", target)
    assert list(tmp_path.glob(".*.tmp")) == []


def test_two_that_write_one_file_at_once_both_write_it_whole(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as first:
        first.write_text("first")
        with atomic_path(tmp_path / "a") as second:
            second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_into_which_another_process_writes_is_refused(
    tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = tmp_path / "evaluation"
    for folder in (tmp_path / "in", tmp_path / "out", evaluation):
        folder.mkdir()
    write_jsonl([group_row(0, [1, 0])], "in/a.jsonl")
    with another_process(HOLDS, tmp_path / "out"), locked(evaluation, busy=None):
        assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
        assert "another process is converting into" in capsys.readouterr().err
        assert main(["evaluate", "--model", "a", "--against", "b", "--output_dir", str(evaluation)]) == 1
        assert "another process is evaluating into" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0


def test_generate_killed_as_it_tidies_up_pays_nothing_again(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = write_jsonl([{"id": str(k), "prompt": f"Q{k}"} for k in range(3)], "prompts.jsonl"), tmp_path / "g.jsonl"
    double = ServerDouble()
    with serving(double) as url:
        flags = ["generate", "--prompts", str(prompts), "--output", str(output), "--num_samples", "2"]
        flags += ["--server.base_url", url, "--server.model", "m"]

        def killed(_: Store) -> None:
            raise SystemExit(9)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "delete", killed)
            with pytest.raises(SystemExit):
                main(flags)
        asked, first = len(double.requests), output.read_bytes()
        # Another call is not the one that was killed.
        assert main([*flags, "--seed", "1"]) == 1
        assert "exists: --overwrite replaces it" in capsys.readouterr().err
        assert main(flags) == 0
        assert (len(double.requests), output.read_bytes()) == (asked, first)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["g.jsonl", "prompts.jsonl"]
        assert main(flags) == 1


def test_an_audit_that_was_killed_before_its_last_file_is_made_again_unasked(
    groups_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["audit", str(groups_file), "--output_dir", str(tmp_path / "out")]
    assert main(flags) == 0
    written = json.loads((tmp_path / "out/audit.json").read_text())
    (tmp_path / "out/audit.json").unlink()
    assert main(flags) == 0
    assert json.loads((tmp_path / "out/audit.json").read_text()) == written
    assert main(flags) == 1


def test_a_folder_whose_record_was_not_written_yet_or_deleted_first_is_still_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claimed() -> None:
        claim(tmp_path, ["tables"], verb="evaluate", inputs={}, overwrite=False, own=["tables"])

    record(tmp_path, ["tables"], verb="evaluate")
    (tmp_path / "tables" / ".ncalign").mkdir(parents=True)
    (tmp_path / "tables" / ".ncalign" / ".entries.0123456789ab.tmp").touch()
    claimed()
    record(tmp_path / "tables", ["*"], verb="evaluate")
    (tmp_path / "tables" / "a.txt").touch()

    def killed(folder: Path, **_: object) -> None:
        (folder / ".ncalign" / "entries").unlink(missing_ok=True)
        if folder.is_dir():
            raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            remove(tmp_path, ["tables"])
    claimed()
    remove(tmp_path, ["tables"])
    assert list(tmp_path.iterdir()) == []


PUTS = """
import os, signal
from pathlib import Path
from ncalign.core.store import Store
store, written = Store(Path(sys.argv[1])), []

def watch(statement):
    written.extend([statement] * statement.startswith("INSERT"))
    if len(written) == 3:
        print("ready", flush=True)
        time.sleep(600)

store._connection.set_trace_callback(watch)
store.put_all({str(k): k for k in range(5)})
"""


def test_of_answers_that_belong_together_a_kill_leaves_none(tmp_path: Path) -> None:
    with another_process(PUTS, tmp_path / "answers"):
        pass
    store = Store(tmp_path / "answers")
    assert [store.get(str(k)) for k in range(5)] == [None] * 5
    store.put_all({"0": 0, "1": 1})
    assert [store.get(str(k)) for k in range(2)] == [0, 1]
    store.close()

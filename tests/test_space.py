"""Disk space is looked at before the first step, and a disk that fills up later loses no training."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import relative_distance, weights
from ncalign.cli.app import main
from ncalign.training import checkpoint, export, run_folder

Train = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, groups_file: Path) -> Train:
    """``train(*flags, out="run")`` runs ``ncalign train`` in the test's folder, three steps of four groups."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))

    def call(*flags: str, out: str = "run") -> int:
        words = ["--model", str(tiny_model_dir), "--data", str(groups_file), "--output_dir", out]
        fixed = ["--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--report_to", "[]", "--max_length", "128"]
        return main(["train", *words, *fixed, *flags])

    return call


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def planned(train: Train, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert train(*flags, "--dry-run", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class TestBefore:
    @pytest.mark.parametrize("flags", [("--save_steps", "1"), ("--save_steps", "1", "--lora.r", "4"), ()])
    def test_the_estimate_is_what_a_run_takes(
        self, flags: tuple[str, ...], train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        estimate = planned(train, capsys, *flags)["disk_mib"] * 2**20
        largest = [0]
        digest = checkpoint._sha256

        def measured(file: Path) -> str:
            largest[0] = max(largest[0], size_of(Path("run/checkpoints")))
            return digest(file)

        monkeypatch.setattr(checkpoint, "_sha256", measured)
        assert train(*flags) == 0
        # The model is written while the last two checkpoints and the metrics are there.
        taken = largest[0] + size_of(Path("run/model"))
        assert 0.75 * estimate < taken < 1.15 * estimate

    def test_a_run_that_does_not_fit_is_refused_with_what_to_lower(
        self, train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leave_free(monkeypatch, 250_000)
        assert train("--save_steps", "1") == 1
        error = capsys.readouterr().err.strip().rpartition("\n")[2]
        assert error.startswith("error: run: about ")
        for part in ("3 x ", "for checkpoints, one of them while it is written", "the model ", "and 244.1 KiB are free"):
            assert part in error
        assert error.endswith(
            "free some space, lower save_total_limit (2), raise save_steps (1; 0: no checkpoints), or give an output_dir on "
            "another disk"
        )
        assert not Path("run").exists()
        assert train() == 0

    def test_what_a_resumed_run_has_written_already_is_not_counted_twice(
        self, train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags = ("--save_steps", "1", "--save_total_limit", "1")
        need = planned(train, capsys, *flags)["disk_mib"] * 2**20
        with monkeypatch.context() as patched:
            patched.setattr(export, "_write_weights", no_room)
            assert train(*flags) == 1
        kept = size_of(Path("run/checkpoints"))
        leave_free(monkeypatch, int(need - kept) - 2000)
        assert train(*flags, "--resume") == 1
        assert "of it are there, and" in capsys.readouterr().err
        leave_free(monkeypatch, int(need - kept) + 2000)
        assert train(*flags, "--resume") == 0

    def test_a_dry_run_shows_the_figure(
        self, train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leave_free(monkeypatch, 5 * 2**30)
        assert train("--dry-run", "--save_steps", "1") == 0
        out = capsys.readouterr().out
        assert "disk: about " in out
        assert "; 5.0 GiB are free in run" in out
        leave_free(monkeypatch, 1000)
        assert train("--dry-run") == 0
        assert "warning: this does not fit" in capsys.readouterr().out


class TestAtTheEnd:
    @pytest.mark.parametrize("flags", [(), ("--save_steps", "2"), ("--save_steps", "3", "--lora.r", "4", "--merge")])
    def test_a_model_that_cannot_be_written_leaves_a_checkpoint(
        self, flags: tuple[str, ...], train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert train(*flags, out="whole") == 0
        with monkeypatch.context() as patched:
            patched.setattr(export, "_write_weights", no_room)
            assert train(*flags) == 1
        error = capsys.readouterr().err.strip().rpartition("\n")[2]
        assert error.startswith("error: can't write run/model: No space left on device; free some space")
        assert error.endswith(
            "The training up to step 3 is kept in run/checkpoints/step-00000003: rerun with --resume, only the model is left "
            "to write"
        )
        assert train(*flags, "--resume") == 0
        assert "Training: 3/3" in capsys.readouterr().err
        assert relative_distance(weights(Path("whole")), weights(Path("run"))) == 0.0

    def test_where_no_checkpoint_fits_the_model_goes_elsewhere(
        self, train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert train(out="whole") == 0
        written = export._write_weights

        def only_elsewhere(*arguments: Any, **options: Any) -> None:
            if arguments[2].parent.name == "run":
                no_room()
            written(*arguments, **options)

        monkeypatch.setattr(export, "_write_weights", only_elsewhere)
        monkeypatch.setattr(checkpoint, "save_file", no_room)
        assert train() == 1
        saved = Path("cache/ncalign-run-model")
        assert f"The trained model was saved in {saved.resolve()} instead" in capsys.readouterr().err
        saved.rename("moved")
        Path("moved").rename("run/model")
        assert relative_distance(weights(Path("whole")), weights(Path("run"))) == 0.0

    def test_metrics_that_cannot_be_written_leave_a_checkpoint(
        self, train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert train(out="whole") == 0
        write = run_folder.MetricsFile.write

        def full_at_two(self: run_folder.MetricsFile, row: dict[str, Any]) -> None:
            if row["step"] == 2:
                no_room()
            write(self, row)

        with monkeypatch.context() as patched:
            patched.setattr(run_folder.MetricsFile, "write", full_at_two)
            assert train() == 1
        assert "kept in run/checkpoints/step-00000002: rerun with --resume, it goes on from there" in capsys.readouterr().err
        assert train("--resume") == 0
        assert relative_distance(weights(Path("whole")), weights(Path("run"))) == 0.0


class TestMergeAfterwards:
    def test_a_finished_run_is_merged_without_training(
        self, train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lora = ("--lora.r", "4")
        assert train(*lora, "--merge", out="merged") == 0
        assert train(*lora) == 0
        adapter = {path.name: path.read_bytes() for path in Path("run/model").iterdir() if path.is_file()}
        capsys.readouterr()
        monkeypatch.setattr("ncalign.training.loop.Loop.run", no_room)
        assert train(*lora, "--resume", "--merge") == 0
        assert "run is finished: its adapter was merged into" in capsys.readouterr().err
        assert relative_distance(weights(Path("merged")), weights(Path("run"))) == 0.0
        assert not Path("run/model/adapter_config.json").exists()
        assert {path.name: path.read_bytes() for path in Path("run/adapter").iterdir() if path.is_file()} == adapter
        assert "library_name: transformers" in Path("run/model/README.md").read_text()
        assert "merge: true" in Path("run/config.yaml").read_text()
        assert train(*lora, "--resume", "--merge") == 0
        assert "run is finished: nothing to resume" in capsys.readouterr().err
        assert train(*lora, "--resume") == 0
        assert "is merged; its adapter is in run/adapter" in capsys.readouterr().err

    def test_a_merge_that_was_killed_is_done_again(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        lora = ("--lora.r", "4")
        assert train(*lora, "--merge", out="merged") == 0
        assert train(*lora) == 0
        with monkeypatch.context() as patched:
            patched.setattr(export, "_write_weights", no_room)
            assert train(*lora, "--resume", "--merge") == 1
        shutil.rmtree("run/model")
        assert train(*lora, "--resume", "--merge") == 0
        assert relative_distance(weights(Path("merged")), weights(Path("run"))) == 0.0

    def test_other_settings_of_a_finished_run_are_not_ignored(self, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
        assert train() == 0
        assert train("--resume", "--accept_changes", "--max_steps", "9") == 1
        error = capsys.readouterr().err
        assert "max_steps: -1 -> 9" in error
        assert "It is finished, and they would change nothing: train on from run/model in another output_dir" in error

"""Caches hold what was asked and answered: they are their user's alone. Run folders follow the user's umask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncalign.cli.app import main
from ncalign.core.cache import private_folder
from ncalign.core.store import Store
from server_double import ServerDouble, serving

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")


@pytest.fixture(autouse=True)
def open_to_all() -> Iterator[None]:
    """A umask that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> set[str]:
    return {f"{path.stat().st_mode & 0o777:o}" for path in (folder, *folder.rglob("*"))}


def test_answers_verdicts_and_reference_logprobs_are_their_users_alone(
    tmp_path: Path, tiny_model_dir: Path, groups_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "users" / "cache"))
    with serving(ServerDouble(lambda body, number: "[[5]]")) as url:
        words = ["score", "--data", str(groups_file), "--output", str(tmp_path / "scored.jsonl"), "--reward", "judge"]
        assert main([*words, "--judge.base_url", url, "--cache_dir", str(tmp_path / "own" / "cache")]) == 0
    words = ["train", "--model", str(tiny_model_dir), "--data", str(groups_file), "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--max_steps", "1", "--max_length", "128", "--report_to", "[]"]) == 0
    assert list((tmp_path / "own").rglob("*.sqlite"))
    assert list((tmp_path / "users").rglob("*.parquet"))
    assert modes(tmp_path / "own") == modes(tmp_path / "users") == {"700", "600"}
    assert {"777", "666"} <= modes(tmp_path / "run")  # as the umask says


def test_a_store_beside_a_run_is_its_users_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "answers.sqlite")
    store.put("key", "asked and answered")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o775)
    assert private_folder(tmp_path / "shared" / "new").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o775

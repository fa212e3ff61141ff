"""A folder of shards becomes a folder of shards, in worker processes, and a call that was stopped goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ncalign.cli.app import main
from ncalign.core.errors import DataError
from ncalign.data.groups import read_groups
from ncalign.data.shards import Recipe, convert_folder


def row(number: int, **more: Any) -> str:
    candidates = [{"completion": "a", "reward": 1.0}, {"completion": "b", "reward": 0.0}]
    return json.dumps({"prompt": f"Q{number}", "candidates": candidates, **more}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of three rows, one of them in a folder below."""
    for shard in range(5):
        path = tmp_path / "in" / ("deep" if shard == 4 else "") / f"part-{shard}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(row(3 * shard + k) for k in range(3)))
    return tmp_path / "in"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_the_shards_hold_what_the_folder_does(folder: Path, tmp_path: Path, kind: Any) -> None:
    report = convert_folder(folder, tmp_path / "out", Recipe(kind=kind))
    assert (report.rows, report.groups, report.skipped) == (15, 15, 0)
    files = sorted(path.name for path in (tmp_path / "out").glob(f"*.{kind}"))
    assert files == sorted(["deep--part-4." + kind, *(f"part-{k}.{kind}" for k in range(4))])
    assert sorted(read_groups(tmp_path / "out"), key=lambda g: g.id) == sorted(read_groups(folder), key=lambda g: g.id)


def made(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}


def test_only_what_has_changed_is_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert_folder(folder, out)
    before = made(out)
    assert convert_folder(folder, out) == first
    assert made(out) == before
    (folder / "part-1.jsonl").write_text(row(100) + "broken\n")
    with pytest.raises(ValueError, match=r"an earlier `ncalign convert` wrote \(part-1\.jsonl\): --overwrite replaces it"):
        convert_folder(folder, out)
    with pytest.raises(DataError, match=r"part-1\.jsonl:2"):
        convert_folder(folder, out, overwrite=True)
    assert {name for name, when in made(out).items() if when != before.get(name)} == set()
    (out / "part-2.jsonl").unlink()
    report = convert_folder(folder, out, Recipe(on_bad_row="skip"), overwrite=True)
    assert (report.rows, report.groups, report.skipped) == (14, 13, 1)


def test_a_killed_call_goes_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for shard in range(12):
        (folder / f"part-{shard:02}.jsonl").write_text("".join(row(shard * 10_000 + k) for k in range(3000)))
    command = [sys.executable, "-m", "ncalign", "convert", str(folder), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(list((out / ".ncalign").glob("*.json"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.stem for path in (out / ".ncalign").glob("*.json")}
    before = made(out)
    assert len(kept) >= 2
    report = convert_folder(folder, out)
    assert report.groups == 36_000
    assert all(made(out)[f"{name}.jsonl"] == before[f"{name}.jsonl"] for name in kept)
    assert list(read_groups(out)) == list(read_groups(folder))
    assert not list(out.glob(".*.tmp"))


def test_what_workers_of_a_killed_call_left_is_deleted(folder: Path, tmp_path: Path) -> None:
    out, tag = tmp_path / "out", "0123456789ab"
    convert_folder(folder, out)
    before = made(out)
    left = [
        out / f".part-1.jsonl.{tag}.tmp",
        out / ".ncalign" / f".part-2.json.{tag}.tmp",
        out / ".ncalign" / f".part-2.ids.{tag}.tmp",
    ]
    other = out / f".theirs.jsonl.{tag}.tmp"
    for path in (*left, other):
        path.write_text("half of a r")
    convert_folder(folder, out)
    assert made(out) == before
    assert [path.exists() for path in (*left, other)] == [False, False, False, True]


def test_ids_that_repeat_across_shards(folder: Path, tmp_path: Path) -> None:
    (folder / "part-0.jsonl").write_text(row(0, id="a") + row(1, id="twice"))
    (folder / "part-3.jsonl").write_text(row(2, id="twice"))
    with pytest.raises(DataError, match=r"'twice' is in part-0\.jsonl and in part-3\.jsonl"):
        convert_folder(folder, tmp_path / "out")


def test_pairs_and_shards_without_any(folder: Path, tmp_path: Path) -> None:
    (folder / "part-2.jsonl").write_text(json.dumps({"prompt": "p", "candidates": [{"completion": "a", "reward": 1}]}) + "\n")
    convert_folder(folder, tmp_path / "out", Recipe(target="best_vs_worst", kind="parquet"))
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4
    assert len(list(read_groups(tmp_path / "out", schema="trl_preference"))) == 12


def test_an_adapter_that_changes_makes_all_anew(folder: Path, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def read(row):\n    return row if row['prompt'] != 'Q0' else None\n")
    report = convert_folder(folder, tmp_path / "out", Recipe(adapter=f"{code}:read"))
    assert (report.rows, report.groups, report.reasons) == (15, 14, {"left out by the adapter": 1})
    code.write_text("def read(row):\n    return dict(row, prompt=row['prompt'] + '?')\n")
    convert_folder(folder, tmp_path / "out", Recipe(adapter=f"{code}:read"), overwrite=True)
    assert all(group.prompt.endswith("?") for group in read_groups(tmp_path / "out"))


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="lies in"):
        convert_folder(folder, folder / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds mine\.txt, which is not made from"):
        convert_folder(folder, tmp_path / "out")
    assert main(["convert", str(folder), str(tmp_path / "out.csv")]) == 1
    assert "can't tell the kind of file by its name" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "groups-v1.0"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == 15

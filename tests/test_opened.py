"""Files are read as what they hold, whatever their names say, and what no reader reads is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from ncalign.data.groups import DataError, read_groups

ROW = {"prompt": "Q", "chosen": "a", "rejected": "b"}
TEXTS = {
    ".jsonl": json.dumps(ROW) + "\n",
    ".json": json.dumps([ROW], indent=1),
    ".csv": "prompt,chosen,rejected\nQ,a,b\n",
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("more", ["", ".gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_bytes_say_how_a_file_is_packed(
    pack: Callable[[bytes], bytes], suffix: str, more: str, mark: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}{more}"
    path.write_bytes(pack((mark + TEXTS[suffix]).encode()))
    [group] = read_groups(path)
    assert (group.prompt, [one.completion for one in group.candidates]) == ("Q", ["a", "b"])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("{}".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("{}".encode("utf-16-le"), "is UTF-16"),
        ("{}".encode("utf-16-be"), "is UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html>", "is a web page and not the data"),
        (b"\n<HTML lang=en>", "is a web page"),
        (b"\x28\xb5\x2f\xfd\x00", "is compressed with zstd"),
        (b"PK\x03\x04\x14", "is a zip archive"),
        (gzip.compress(b"<!doctype html>", mtime=0), "is a web page"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.parquet"])
def test_other_files_are_refused_as_what_they_are(data: bytes, what: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    if name == "rows.parquet" and data.startswith(b"\x1f\x8b"):
        what = "can't read the Parquet file"
    with pytest.raises(DataError, match=f"{name}:? {what}"):
        list(read_groups(tmp_path / name, on_bad_row="skip"))


@pytest.mark.parametrize("between", ["\n", "\n\n", "", " "])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_objects_over_several_lines_are_rows(between: str, number: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(between.join(json.dumps({**ROW, "prompt": f"Q{k}"}, indent=2) for k in range(number)))
    assert [(group.id, group.prompt) for group in read_groups(path)] == [(str(k + 1), f"Q{k}") for k in range(number)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "prompt": "Q",\n "chosen": "a",\n "rejected": "b"\n}\n{\n "prompt": Q\n}', "rows.json:7: malformed JSON"),
        ('{\n "prompt": "Q",\n "chosen": "a",\n "rejected": "b"\n}\n{\n "prompt": "Q"', "rows.json:7: malformed JSON"),
        ('{\n "prompt": "Q",\n "chosen": "a",\n "rejected": "b"\n}\n[1]', "rows.json:6: malformed JSON"),
        ('{\n "prompt": "Q",\n "chosen": "a",\n "rejected": "b"\n}\n{\n "chosen": "a"\n}', "rows.json:element 2: "),
    ],
    ids=["no value", "cut", "a list follows", "a column lacks"],
)
def test_faults_of_objects_over_several_lines_have_their_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_groups(tmp_path / "rows.json"))

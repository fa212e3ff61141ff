"""Values that JSON lacks: read as what they mean, null in columns that nobody reads, refused in words where they are read."""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncalign.cli.app import main
from ncalign.data.formats.values import json_row, read_number
from ncalign.data.groups import DataError, ReadReport, convert, read_groups
from ncalign.judging.interop import read_alpaca_annotations

ROWS = [{"prompt": f"Q{k}", "chosen": "a", "rejected": "b"} for k in range(2)]
DAY = datetime.datetime(2024, 1, 2, 3, 4, 5)
MILLIONS_OF_YEARS = pa.array([2**52, 0], pa.int64()).cast(pa.timestamp("s"), safe=False)
TO_INT, TO_TEXT = pa.map_(pa.string(), pa.int64()), pa.map_(pa.int64(), pa.string())
BAD_TEXT = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"x"]).buffers())

COLUMNS: dict[str, tuple[pa.Array, list[Any]]] = {
    "NaN": (pa.array([math.nan, 1.5]), [None, 1.5]),
    "infinite": (pa.array([math.inf, -math.inf]), [None, None]),
    "NaN in a list": (pa.array([[0.5, math.nan], None]), [[0.5, None], None]),
    "an image": (pa.array([{"bytes": b"\x89", "path": "x.png"}, None]), [{"bytes": None, "path": "x.png"}, None]),
    "bytes that are text": (pa.array(["é".encode(), b""]), ["é", ""]),
    "bytes of a fixed size": (pa.array([b"\xff\xfe", b"ab"], pa.binary(2)), [None, "ab"]),
    "a time": (pa.array([DAY, None]), ["2024-01-02T03:04:05", None]),
    "times inside": (pa.array([[{"when": DAY.date()}], []]), [[{"when": "2024-01-02"}], []]),
    "a time of day": (pa.array([DAY.time(), None]), ["03:04:05", None]),
    "nanoseconds": (pa.array([1_500_000_000, 0], pa.duration("ns")), ["PT1.5S", "PT0S"]),
    "a negative duration": (pa.array([datetime.timedelta(minutes=-2), None]), ["-PT120S", None]),
    "beyond the calendar": (MILLIONS_OF_YEARS, [None, "1970-01-01T00:00:00"]),
    "an interval": (pa.array([(1, 2, 3), None], pa.month_day_nano_interval()), [[1, 2, 3], None]),
    "a map": (pa.array([[("k", 1)], None], TO_INT), [{"k": 1}, None]),
    "a map from numbers": (pa.array([[(1, "a"), (2, "b")], None], TO_TEXT), [{"1": "a", "2": "b"}, None]),
    "a map with a key twice": (pa.array([[("k", 1), ("k", 2)], None], TO_INT), [[["k", 1], ["k", 2]], None]),
    "decimals": (pa.array([decimal.Decimal("0.25"), decimal.Decimal("3.00")]), [0.25, 3]),
    "half floats": (pa.array([np.float16(1.5), np.float16("nan")], pa.float16()), [1.5, None]),
    "a dictionary": (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
    "large text": (pa.array(["x", "y"], pa.large_string()), ["x", "y"]),
    "a large list": (pa.array([[1], []], pa.large_list(pa.int8())), [[1], []]),
    "a list of a fixed size": (pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)), [[1, 2], [3, 4]]),
    "text that is not UTF-8": (BAD_TEXT, [None, "x"]),
}  # fmt: skip
KINDS = ("parquet", "arrow")
# Parquet has no intervals, and an Arrow file with such text counts as damaged.
UNSAVED = {("an interval", "parquet"), ("text that is not UTF-8", "arrow")}


@pytest.mark.parametrize(("kind", "saved"), [pair for pair in itertools.product(COLUMNS, KINDS) if pair not in UNSAVED])
def test_a_column_that_nobody_reads(kind: str, saved: str, tmp_path: Path) -> None:
    column, expected = COLUMNS[kind]
    table = pa.Table.from_pylist(ROWS).append_column("extra", column)
    if saved == "parquet":
        pq.write_table(table, tmp_path / "rows.parquet")
    else:
        with pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    report = ReadReport()
    groups = list(read_groups(tmp_path, report=report))
    assert [[one.completion for one in group.candidates] for group in groups] == [["a", "b"]] * 2
    assert [group.metadata["extra"] for group in groups] == expected
    assert convert(tmp_path, tmp_path / "out.jsonl").groups == 2  # and can be written as JSON


@pytest.mark.parametrize(
    ("value", "kept", "note"),
    [
        (math.nan, None, "1 values of `extra` are NaN and were read as null"),
        ([1, -math.inf], [1, None], "1 values of `extra` are infinite and were left out, as null"),
        ("\ud83d!", "?!", "1 values of `extra` hold half of a surrogate pair, which was replaced"),
        (10**400, None, "1 values of `extra` are too large to store and were left out, as null"),
    ],
)
def test_json_text(value: Any, kept: Any, note: str, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    for path in (write_jsonl([{**ROWS[0], "extra": value}]), tmp_path / "rows.json"):
        if path.suffix == ".json":
            path.write_text(json.dumps([{**ROWS[0], "extra": value}], indent=1))
        report = ReadReport()
        [group] = read_groups(path, report=report)
        assert group.metadata == {"extra": kept}
        assert report.counted_notes() == [note]


def test_entries_of_metadata_and_deep_values(write_jsonl: Callable[..., Path]) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    [group] = read_groups(write_jsonl([{**ROWS[0], "metadata": {"x": math.inf, "y": 1}, "deep": deep}]))
    assert group.metadata["x"] is None
    assert group.metadata["y"] == 1
    assert "[null]" in json.dumps(group.metadata["deep"])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("prompt", pa.array([b"\xff"]), "prompt is a Python bytes"),
        ("prompt", BAD_TEXT.slice(0, 1), "`prompt` is not UTF-8"),
        ("chosen_reward", pa.array([math.inf]), "chosen: reward is infinite"),
        ("chosen_reward", pa.array([[1.0]]), "chosen: reward is a list"),
    ],
)
def test_what_is_read_is_refused_by_its_name(column: str, value: pa.Array, message: str, tmp_path: Path) -> None:
    columns = {"prompt": ["Q"], "chosen": ["a"], "rejected": ["b"], "chosen_reward": [1.0], "rejected_reward": [0.0]}
    pq.write_table(pa.table({**columns, column: value}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=message):
        list(read_groups(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("value", "number"),
    [("4.5", 4.5), (" 7 ", 7.0), ("1e3", 1000.0), ("N/A", None), ("", None), ("NaN", None), ("NULL", None), ("\\N", None)],
)
def test_numbers_written_as_text(value: str, number: float | None, write_jsonl: Callable[..., Path]) -> None:
    assert read_number(value, "score") == number
    rows = [
        {**ROWS[0], "score_chosen": value, "score_rejected": "0"},
        {"prompt": "Q1", "candidates": [{"completion": "a", "reward": value}, {"completion": "b", "reward": 0}]},
        {"prompt": "Q1", "A0": "a", "score_A0": value, "A1": "b", "score_A1": 0},
        {"prompt": "Q1", "chosen_response": "a", "rejected_response": "b", "chosen_reward": value, "rejected_reward": 0},
        {"prompt": "Q1", "all_generated_responses": ["a", "b"], "all_rm_scores": [value, 0]},
    ]
    for row in rows:
        [group] = read_groups(write_jsonl([row]))
        assert [one.reward for one in group.candidates] == [number, 0.0]


@pytest.mark.parametrize("text", ["1_000", "7/10", "good", "inf", "0x10"])
def test_text_that_is_no_number(text: str) -> None:
    with pytest.raises(DataError, match=r"score is .* \(a string\): a number is needed"):
        read_number(text, "score")


@pytest.mark.parametrize(
    ("value", "good"), [(1e15, True), (-1e15, True), (1.1e15, False), (-1e308, False), ("1e16", False), (10**16, False)]
)
def test_rewards_have_a_bound(value: Any, good: bool) -> None:
    if good:
        assert read_number(value, "score") == value
    else:
        with pytest.raises(DataError, match=r"score is .*: a number from -1e\+15 to 1e\+15 is needed"):
            read_number(value, "score")


@pytest.mark.parametrize("missing", ["", "nan", "NULL", "#N/A", "\\N"])
def test_missing_numbers_of_a_csv_file(missing: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        f"prompt,chosen,rejected,score_chosen,score_rejected,note\nQ,a,b,{missing},1.5,{missing}\n"
    )
    [group] = read_groups(tmp_path / "rows.csv")
    assert [one.reward for one in group.candidates] == [None, 1.5]
    assert group.metadata == {"note": missing or None}


def test_decimals_ids_and_rewards(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array([7.0, math.nan]),
            "prompt": [b"Q0", b"Q1"],
            "chosen": ["a", "a"],
            "rejected": ["b", "b"],
            "score_chosen": pa.array([decimal.Decimal("4.5"), decimal.Decimal("4.0")]),
            "score_rejected": pa.array([np.float16(1.5), np.float16("nan")], pa.float16()),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    groups = list(read_groups(tmp_path / "rows.parquet"))
    assert [(group.id, group.prompt) for group in groups] == [("7", "Q0"), ("2", "Q1")]
    assert [[one.reward for one in group.candidates] for group in groups] == [[4.5, 1.5], [4.0, None]]


def test_values_of_python() -> None:
    row = {"array": np.array([[1, 2]]), "number": np.float32(0.5), "flag": np.bool_(True), "id": uuid.UUID(int=1), 3: {1: (2,)}}
    read, notes, odd = json_row(row)
    assert read == {
        "array": [[1, 2]],
        "number": 0.5,
        "flag": True,
        "id": "00000000-0000-0000-0000-000000000001",
        "3": {"1": [2]},
    }
    assert (notes, odd) == ({}, [])


def test_a_missing_preference_is_no_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"instruction": "Q", "output_1": "a", "output_2": "b", "generator_1": "x", "generator_2": "y"}
    rows = [{**row, "preference": value, "price": math.nan} for value in (math.nan, 1.25, 2)]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    groups = list(read_groups(path))
    assert [[one.reward for one in group.candidates] for group in groups] == [[None, None], [0.75, 0.25], [0.0, 1.0]]
    assert main(["convert", str(path), str(tmp_path / "out.jsonl")]) == 0
    assert "1 values of `preference` are NaN and were read as null" in capsys.readouterr().out
    # The same file's verdicts.
    assert [one.preference for one in read_alpaca_annotations(path)] == [None, 1.25, 2]


def test_an_adapter_sees_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        'def read(row):\n    return {"prompt": "Q", "candidates": [{"completion": row["blob"].hex(), "reward": 1}]}\n'
    )
    pq.write_table(pa.table({"blob": [b"\xff\x00"]}), tmp_path / "rows.parquet")
    [group] = read_groups(tmp_path / "rows.parquet", adapter=f"{tmp_path / 'mine.py'}:read")
    assert group.candidates[0].completion == "ff00"

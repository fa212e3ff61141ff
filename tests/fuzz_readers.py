"""Feeds the readers damaged files until the time is up: `python tests/fuzz_readers.py SECONDS [SEED]`.

Real rows of every schema, in every kind of file, are damaged: bytes flipped, cut, repeated and moved; other encodings;
JSON values exchanged for odd ones. A reader may hand on groups, or raise a DataError that names the file; anything else, a
wrong count or a hang ends the run with a non-zero exit code and leaves the file behind.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import gzip
import io
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ncalign.data.groups import DataError, ReadReport, read_groups, write_groups

HANG_SECONDS = 30
Value = Any

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_TALK = [
    {"role": "assistant", "content": [{"type": "text", "text": "a"}], "reasoning_content": "Hm", "mood": "good"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"},
    {"role": "assistant", "content": "b"},
]
_ASKED = {"prompt": [{"role": "user", "content": "Q"}], "tools": [_TOOL], "chat_template_kwargs": {"enable_thinking": False}}
TALKS: list[dict[str, Any]] = [
    {**_ASKED, "chosen": _TALK, "rejected": _TALK[-1:]},
    {**_ASKED, "completion": _TALK, "label": True},
    {**_ASKED, "candidates": [{"completion": _TALK, "reward": 1.0}, {"completion": _TALK[-1:]}]},
    {"messages": [*_ASKED["prompt"], *_TALK], "tools": json.dumps([_TOOL]), "chat_template_kwargs": '{"n": 1}'},
]
"""Conversations with tools, calls, thoughts, further keys and values for the chat template."""


def real_rows(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of every schema, conversations, and some of the shared sets where they are."""
    rows = [*cases, *TALKS]
    for path in (
        SHARED / "alpaca-eval-candidates" / "candidates.jsonl.gz",
        SHARED / "gsm8k-model-solutions" / "example_model_solutions.jsonl",
    ):
        if path.exists():
            with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
                rows += [json.loads(next(file)) for _ in range(3)]
    return rows


def odd_value(chance: random.Random) -> Value:
    """A value that a careless writer, or a malicious one, might leave."""
    deep: Value = "x"
    for _ in range(chance.choice([3, 150, 3000])):
        deep = [deep] if chance.random() < 0.5 else {"a": deep}
    return chance.choice(
        [
            None,
            True,
            "",
            " ",
            "\x00",
            "\ud800",
            "🙂" * 50,
            "א" * 10,
            "a" * 200_000,
            0,
            -1,
            2**63,
            10**400,
            1e308,
            float("nan"),
            float("-inf"),
            [],
            {},
            [[]],
            [None] * 3,
            {"role": "user"},
            [{"role": "user", "content": None}],
            [{"from": "gpt", "value": 3}],
            {"is_correct": 1, "solution": "s"},
            deep,
            list(range(2000)),
        ]
    )


def damage_value(value: Value, chance: random.Random) -> Value:
    """The value with something in it exchanged, renamed, repeated or removed."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {(k + "s" if k == key else k): v for k, v in value.items()}
        if kind < 0.25:
            return {
                **value,
                chance.choice(["id", "metadata", "prompt", "label", "tools", "chat_template_kwargs", "zz" * 5000]): odd_value(
                    chance
                ),
            }
        return {**value, key: damage_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        index = chance.randrange(len(value))
        kind = chance.random()
        if kind < 0.1:
            return value[:index] + value[index + 1 :]
        if kind < 0.2:
            return value * chance.choice([2, 50])
        return [damage_value(v, chance) if k == index else v for k, v in enumerate(value)]
    return odd_value(chance)


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """The bytes with some flipped, cut off, repeated, removed or put elsewhere."""
    if not data:
        return data
    for _ in range(chance.choice([1, 1, 2, 10])):
        start = chance.randrange(len(data))
        end = min(len(data), start + chance.choice([1, 2, 8, 100, 5000]))
        kind = chance.randrange(6)
        if kind == 0:
            data = data[:start]
        elif kind == 1:
            data = data[:start] + bytes(chance.randrange(256) for _ in range(end - start)) + data[end:]
        elif kind == 2:
            data = data[:end] + data[start:end] * chance.choice([1, 20]) + data[end:]
        elif kind == 3:
            data = data[:start] + data[end:]
        elif kind == 4:
            place = chance.randrange(len(data))
            data = data[:place] + data[start:end] + data[place:]
        else:
            data = data[:start] + bytes(byte ^ (1 << chance.randrange(8)) for byte in data[start:end]) + data[end:]
        if not data:
            return data
    return data


def depth(value: Value) -> int:
    """Levels of lists and objects."""
    levels, layer = 0, [value]
    while layer := [x for v in layer for x in (v.values() if isinstance(v, dict) else v) if isinstance(x, dict | list)]:
        levels += 1
    return levels


def as_file(rows: list[Value], kind: str, chance: random.Random) -> bytes:
    """The rows as a file's bytes; empty where this kind can't hold them."""
    if kind in ("parquet", "arrow"):
        buffer = io.BytesIO()
        try:
            # Arrow itself runs out of memory on a type of thousands of levels.
            table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict) and depth(row) < 100])
            if kind == "parquet":
                pq.write_table(table, buffer, row_group_size=2, compression=chance.choice(["none", "snappy", "zstd"]))
            else:
                with pa.ipc.new_stream(buffer, table.schema) as writer:
                    writer.write_table(table)
        except (pa.ArrowException, OverflowError, TypeError, ValueError, RecursionError, KeyError):
            return b""
        return buffer.getvalue()
    try:
        if kind.startswith(("csv", "tsv")):
            text = as_cells([row for row in rows if isinstance(row, dict)], "\t" if kind == "tsv" else ",", chance)
        elif kind == "json":
            text = json.dumps(
                rows if chance.random() < 0.5 else {"type": "x", "instances": rows}, indent=chance.choice([None, 1])
            )
        else:
            text = "".join(json.dumps(row, ensure_ascii=chance.random() < 0.5) + "\n" for row in rows)
    except (RecursionError, ValueError, csv.Error):
        return b""
    encoding = chance.choice(["utf-8"] * 8 + ["utf-16", "latin-1", "utf-8-sig", "cp1252"])
    data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    return gzip.compress(data) if kind.endswith("gz") else data


def as_cells(rows: list[dict[Any, Any]], delimiter: str, chance: random.Random) -> str:
    """The rows as CSV: text as it is, other values as JSON or as Python prints them."""
    dumped = chance.choice([json.dumps, str])
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=chance.choice(["\n", "\r\n"]))
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(name) for name in columns]
        writer.writerow([cell if isinstance(cell, str | None) else dumped(cell) for cell in cells])
    return file.getvalue()


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Any:
    """Raise where the work takes longer."""

    def stop(_number: int, _frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_it(path: Path, out: Path, chance: random.Random) -> str:
    """Read a file both ways, write what could be read, and read that; what came of it, in a word."""
    outcome = "read"
    for on_bad_row in ("error", "skip"):
        report = ReadReport()
        allow_empty = chance.random() < 0.3
        try:
            groups = list(read_groups(path, on_bad_row=on_bad_row, report=report, allow_empty=allow_empty))
        except DataError as error:
            if str(path.parent) not in str(error):
                raise AssertionError("the message names no file") from error
            outcome = "refused"
            continue
        assert report.rows == report.groups + report.skipped + report.joined, report
        assert report.groups == len(groups)
        if report.skipped:
            outcome = "skipped"
            assert all(path.name in example for example in report.examples), report.examples
        written = write_groups(groups, out)
        assert written == len(groups)
        assert list(read_groups(out, allow_empty=True)) == groups
    return outcome


def fuzz(seconds: float, seed: int, cases: list[dict[str, Any]], *, say: Callable[[str], None] = print) -> Counter[str]:
    """Damage and read until the time is up.

    Raises:
        AssertionError: a count that is wrong, or a message without the file's name.
        Exception: whatever else than a DataError a reader raises.
    """
    rows, chance, found = real_rows(cases), random.Random(seed), Counter[str]()
    end = last = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            kind = chance.choice(["jsonl", "jsonl", "jsonl.gz", "json", "json.gz", "parquet", "arrow", "csv", "tsv", "csv.gz"])
            picked = [copy.deepcopy(chance.choice(rows)) for _ in range(chance.choice([1, 3, 8]))]
            if chance.random() < 0.3:
                picked = [picked[0]] * len(picked)
            if chance.random() < 0.7:
                picked = [damage_value(row, chance) if chance.random() < 0.5 else row for row in picked]
            data = as_file(picked, kind, chance)
            if chance.random() < 0.5:
                data = damage_bytes(data, chance)
            target = Path(folder) / "in"
            target.mkdir(exist_ok=True)
            path = target / f"case.{kind}"
            path.write_bytes(data)
            try:
                with no_longer_than(HANG_SECONDS):
                    outcome = read_it(target if kind == "arrow" else path, Path(folder) / "out.jsonl", chance)
            except BaseException:
                kept = Path(tempfile.mkdtemp()) / path.name
                kept.write_bytes(data)
                say(f"seed {seed}, case {sum(found.values())}: {kept}")
                raise
            path.unlink()
            found[f"{kind} {outcome}"] += 1
            if time.monotonic() > last:
                last = time.monotonic() + 15
                say(f"{sum(found.values())} cases")
    return found


if __name__ == "__main__":
    from test_formats import ROWS
    from test_public_formats import CASES

    every = [row for _, row, _ in CASES.values()] + [row for _, _, row, _ in ROWS]
    result = fuzz(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, every)
    print(sum(result.values()), dict(sorted(result.items())))

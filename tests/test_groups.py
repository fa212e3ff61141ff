"""Groups: validation on construction, reading row by row with a policy for bad rows, whole files or none."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ncalign.core.atomic import atomic_path, write_json_atomic
from ncalign.data.formats.group import MAX_NUMBER
from ncalign.data.groups import Candidate, DataError, Group, ReadReport, read_groups, write_groups

WriteJsonl = Callable[..., Path]
GOOD = {
    "id": "good",
    "prompt": "2 + 2 = ",
    "candidates": [{"completion": "4", "reward": 1}, {"completion": "5", "reward": None}],
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", "\x00", "👩‍🚀", "שלום", "a\u2028b\u0085c", "\r\n", '"\\']
)
rewards = st.none() | st.floats(-MAX_NUMBER, MAX_NUMBER) | st.sampled_from([0.0, 1.0, 1.0, 1e-300])
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}), min_size=1, max_size=3
)
metadata = st.dictionaries(
    texts, st.recursive(st.none() | st.booleans() | st.integers() | texts, st.lists, max_leaves=4), max_size=3
)


def candidates_of(completions: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Candidate]]:
    one = st.builds(
        Candidate, completions, reward=rewards, reference_logprob=rewards, source=st.none() | texts, finished=st.booleans()
    )
    # Long groups by repetition: ties, and no slower to generate.
    return st.lists(one, min_size=1, max_size=4).flatmap(lambda few: st.sampled_from([few, (few * 64)[:64]]))


@st.composite
def group_lists(draw: st.DrawFn) -> list[Group]:
    """A few groups with distinct ids; prompts of one kind and completions of one kind, as Parquet asks."""
    prompts = draw(st.sampled_from([texts.filter(bool), messages]))
    candidates = candidates_of(draw(st.sampled_from([texts, messages])))
    ids = draw(st.lists(texts.filter(bool), max_size=4, unique=True))
    return [Group(id=name, prompt=draw(prompts), candidates=draw(candidates), metadata=draw(metadata)) for name in ids]


@pytest.mark.parametrize("name", ["groups.jsonl", "groups.json", "groups.jsonl.gz", "groups.parquet"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(groups=group_lists())
def test_groups_come_back_as_they_were_written(tmp_path: Path, name: str, groups: list[Group]) -> None:
    path = tmp_path / name
    assert write_groups(groups, path) == len(groups)
    back = list(read_groups(path))
    assert back == groups
    assert [group.origin for group in back] == [f"{name}:{number}" for number in range(1, len(groups) + 1)]


def test_parquet_spans_several_batches(tmp_path: Path) -> None:
    groups = [Group(id=str(i), prompt="p", candidates=[Candidate("c", reward=i)] * (1 + i % 3)) for i in range(1300)]
    assert write_groups(groups, tmp_path / "g.parquet") == 1300
    assert pq.ParquetFile(tmp_path / "g.parquet").num_row_groups == math.ceil(1300 / 512)
    back = list(read_groups(tmp_path / "g.parquet"))
    assert back == groups
    assert back[-1].origin == "g.parquet:1300"


def test_the_same_groups_make_the_same_compressed_bytes(tmp_path: Path) -> None:
    group = Group(id="a", prompt="p", candidates=[Candidate("c")])
    write_groups([group], tmp_path / "one.jsonl.gz")
    write_groups([group], tmp_path / "two.jsonl.gz")
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()


def test_origin_is_not_part_of_a_group(tmp_path: Path) -> None:
    group = Group(id="a", prompt="p", candidates=[Candidate("c")], origin="train.jsonl:17")
    assert group == dataclasses.replace(group, origin=None)
    write_groups([group], tmp_path / "g.jsonl")
    assert "train.jsonl" not in (tmp_path / "g.jsonl").read_text()


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Candidate("c").reward = 1.0  # type: ignore[misc]


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"id": ""}, "id is empty"),
        ({"id": 3}, "id is 3 (a number): a string"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ({"role": "user", "content": "x"},)}, "prompt is a Python tuple"),
        ({"prompt": [{"role": "user"}]}, "prompt[0] lacks `content`"),
        ({"prompt": [{"role": "user", "contents": "x"}]}, "unknown key `contents`: did you mean `content`?"),
        ({"prompt": [{"role": "", "content": "x"}]}, "prompt[0].role is empty"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"candidates": "c"}, "candidates is 'c' (a string): a list"),
        ({"candidates": ["c"]}, "candidates[0] is 'c' (a string): a Candidate"),
        ({"metadata": {"a": math.nan}}, "metadata.a is nan"),
        ({"metadata": {"a": {1: 2}}}, "a key of metadata.a is 1 (a number)"),
        ({"metadata": {"a": (1,)}}, "metadata.a is a Python tuple"),
        ({"metadata": {"a": 1 << 5000}}, "too large"),
        ({"metadata": {"a": CYCLE}}, "nested more than 100 levels"),
    ],
)
def test_a_group_is_validated(fields: dict[str, Any], needed: str) -> None:
    valid: dict[str, Any] = {"id": "a", "prompt": "p", "candidates": []}
    with pytest.raises(ValueError, match=re.escape(needed)):
        Group(**{**valid, **fields})


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"completion": 5}, "completion is 5 (a number): a string or a list"),
        ({"completion": None}, "completion is null"),
        ({"completion": []}, "completion is an empty list"),
        ({"reward": "0.5"}, "reward is '0.5' (a string): a number is needed, or null"),
        ({"reward": True}, "reward is true: a number"),
        ({"reward": math.nan}, "reward is NaN: a finite number is needed; use null"),
        ({"reward": -math.inf}, "reward is infinite"),
        ({"reward": 10**400}, "too large for a float"),
        ({"reference_logprob": math.inf}, "reference_logprob is infinite"),
        ({"source": 1}, "source is 1 (a number): a string"),
        ({"finished": 1}, "finished is 1 (a number): true or false"),
    ],
)
def test_a_candidate_is_validated(fields: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needed)):
        Candidate(**{"completion": "c", **fields})


def test_an_empty_completion_is_readable() -> None:
    assert Candidate("").completion == ""
    assert Candidate([{"role": "assistant", "content": ""}]).completion == [{"role": "assistant", "content": ""}]


BAD_ROWS = [
    ('{"id": "a", "prompt": "p", "candidates": [}', "malformed JSON at column 43", "malformed JSON"),
    ("[1, 2]", "the line is a list of 2: a JSON object is needed", "not an object"),
    ("nonsense", "malformed JSON at column 1", "malformed JSON"),
    ('{"id": "a", "prompt": 3, "candidates": [{"completion": "c"}]}', "group 'a': prompt is 3 (a number)", "wrong type"),
    ('{"id": [], "prompt": "p", "candidates": [{"completion": "c"}]}', "id is a list of 0", "wrong type"),
    (
        '{"id": "a", "prompt": "p", "candidates": [{"completion": "c"}, {"completion": "d", "reward": "high"}]}',
        "group 'a': candidates[1]: reward is 'high' (a string)",
        "wrong type",
    ),
    ('{"id": "a", "prompt": "p", "candidates": [{"completion": "c", "reward": 1e999}]}', "reward is infinite", "not finite"),
    (
        '{"id": "a", "prompt": "p", "candidates": [{"completion": "c", "rewrad": 1}]}',
        "candidates[0] has an unknown key `rewrad`: did you mean `reward`?",
        "unknown key",
    ),
    (
        '{"id": "a", "prompt": "p", "candidates": [{"completion": "c", "zzz": 1}]}',
        "known keys: `completion`, `reward`, `reference_logprob`, `source`, `finished`",
        "unknown key",
    ),
    ('{"id": "a", "prompt": "p", "candidates": [{"reward": 1}]}', "candidates[0] lacks `completion`", "missing key"),
    ('{"id": "a", "prompt": "p", "candidates": ["c"]}', "candidates[0] is 'c' (a string): an object", "wrong type"),
    ('{"id": "a", "prompt": "p", "candidates": {}}', "candidates is an empty object: a list", "wrong type"),
    ('{"id": "a", "prompt": "p", "candidates": []}', "candidates is empty", "no candidates"),
    ('{"id": "a", "prompt": "p"}', "lacks `candidates`", "missing key"),
    ('{"id": "a", "prompt": "p", "candidate": []}', "did you mean `candidates`?", "unknown key"),
    ('{"id": "a", "prompt": "", "candidates": [{"completion": "c"}]}', "prompt is empty", "empty prompt"),
    ('{"id": "a", "prompt": "\\ud83d", "candidates": [{"completion": "c"}]}', "half of a surrogate pair", "bad text"),
    ('{"id": "good", "prompt": "p", "candidates": [{"completion": "c"}]}', "used before, at line 1", "duplicate id"),
    ('{"id": "a", "prompt": "p", "candidates": [{"completion": "c"}], "metadata": 3}', "metadata is 3", "wrong type"),
    ('{"id": "a", "prompt": "p", "candidates": [{"completion": "c"}], "metadata": {"x": 1}, "x": 2}', "`x`", "name clash"),
    ('{"id": "a", "prompt": "p", "candidates": [{"completion": "c", "\\ud800": 1}]}', "unknown key `\\ud800`", "unknown key"),
    ("[" * 100_000, "nested too deep", "nested too deep"),
    ('{"id": ' + "9" * 2000 + ', "prompt": "p", "candidates": [{"completion": "c"}]}', "id is of 6644 bits", "wrong type"),
]


@pytest.mark.parametrize(("line", "message", "reason"), BAD_ROWS, ids=[case[1][:30] for case in BAD_ROWS])
def test_a_bad_line_is_an_error_or_is_counted(write_jsonl: WriteJsonl, line: str, message: str, reason: str) -> None:
    path = write_jsonl([GOOD, line, {**GOOD, "id": "last"}])
    groups = read_groups(path)
    assert next(groups).id == "good"
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        next(groups)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "on_bad_row: skip" in str(caught.value)

    report = ReadReport()
    assert [group.id for group in read_groups(path, on_bad_row="skip", report=report)] == ["good", "last"]
    assert (report.rows, report.groups, report.skipped) == (3, 2, 1)
    assert report.reasons == {reason: 1}
    assert message in report.examples[0]
    assert reason in report.summary()
    assert json.loads(json.dumps(dataclasses.asdict(report)))["reasons"] == {reason: 1}


def test_a_number_of_thousands_of_digits(write_jsonl: WriteJsonl) -> None:
    # Python 3.10.7 and later refuse to read it; earlier ones make an int that no float holds.
    path = write_jsonl(['{"id": "a", "prompt": "p", "candidates": [{"completion": "c", "reward": ' + "9" * 5000 + "}]}"])
    with pytest.raises(DataError, match=r"too many digits|too large for a float"):
        list(read_groups(path))


def test_invalid_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "candidates": []}\n' + json.dumps(GOOD).encode() + b"\n")
    with pytest.raises(DataError, match="byte 0xff at position 13 is not UTF-8"):
        list(read_groups(path))
    assert [group.id for group in read_groups(path, on_bad_row="skip")] == ["good"]


def test_blank_lines_byte_order_mark_missing_ids_and_extra_columns(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    row = '{"prompt": "p", "candidates": [{"completion": "c"}], "dataset": "d", "metadata": {"k": [1]}}'
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\n  \n" + row.encode())
    report = ReadReport()
    groups = list(read_groups(path, report=report))
    assert [group.id for group in groups] == ["1", "4"]
    assert groups[0].metadata == {"k": [1], "dataset": "d"}
    assert report.rows == 2


def test_prompts_without_candidates_need_allow_empty(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"prompt": "a", "topic": "t"}, {"prompt": "b", "candidates": []}, {"prompt": "c", "candidates": None}])
    groups = list(read_groups(path, allow_empty=True))
    assert [(group.prompt, group.candidates) for group in groups] == [("a", []), ("b", []), ("c", [])]
    assert groups[0].metadata == {"topic": "t"}
    with pytest.raises(DataError, match="nearest schema, `ncalign`, lacks `candidates`"):
        list(read_groups(path))


def test_prompts_file_takes_rows_with_candidates_first(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([GOOD, {"prompt": "b"}])
    assert [len(group.candidates) for group in read_groups(path, allow_empty=True)] == [2, 0]


def test_a_json_array_is_read_and_in_json_lines_gets_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    for indent in (None, 2):
        path.write_text(json.dumps([GOOD], indent=indent))
        assert len(list(read_groups(path))) == 1
    lines = tmp_path / "g.jsonl"
    lines.write_text(json.dumps([GOOD], indent=2))
    with pytest.raises(DataError, match=r"malformed JSON.*one object a line"):
        list(read_groups(lines))
    lines.write_text(json.dumps([GOOD]))
    with pytest.raises(DataError, match=r"JSON object is needed.*one object a line"):
        list(read_groups(lines))


@pytest.mark.parametrize("name", ["no.jsonl", "no.parquet", "no.csv", "folder.jsonl"])
def test_no_file_to_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=re.escape(name)):
        read_groups(tmp_path / name)


def test_unknown_arguments(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([GOOD])
    with pytest.raises(DataError, match="`error` or `skip`"):
        read_groups(path, on_bad_row="ignore")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="unknown schema 'trl'"):
        read_groups(path, schema="trl")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["g.jsonl.gz", "g.parquet"])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.95])
def test_a_file_cut_short_is_an_error_even_when_rows_may_be_skipped(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    write_groups([Group(id=str(i), prompt=f"p{i * i}", candidates=[Candidate("c" * i)]) for i in range(300)], path)
    whole = path.read_bytes()
    path.write_bytes(b"\x1f\x8bnot gzip" if kept == 0.0 else whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match=re.escape(str(path))):
        list(read_groups(path, on_bad_row="skip"))


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "g.parquet"
    candidates = [[{"completion": "c", "reward": math.inf}], [{"completion": "c", "reward": 1.0}]]
    pq.write_table(pa.table({"id": [7, 8], "prompt": ["p", "q"], "candidates": candidates}), path)
    with pytest.raises(DataError, match=r"g\.parquet:row 1: group 7: candidates\[0\]: reward is infinite"):
        list(read_groups(path))
    assert [group.id for group in read_groups(path, on_bad_row="skip")] == ["8"]


def test_parquet_text_that_is_not_utf8_fails_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "g.parquet"
    # Arrow doesn't check the bytes of a binary column viewed as text.
    prompts = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": prompts, "candidates": [[{"completion": "c"}]] * 2}), path)
    report = ReadReport()
    assert [group.prompt for group in read_groups(path, on_bad_row="skip", report=report)] == ["good"]
    assert report.reasons == {"invalid UTF-8": 1}


def test_parquet_holds_one_kind_of_text(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "p"}]
    groups = [Group(id="a", prompt="p", candidates=[]), Group(id="b", prompt=turns, candidates=[])]
    with pytest.raises(DataError, match=r"group 'b': prompt is a list of messages, but earlier ones are a string.*use JSONL"):
        write_groups(groups, tmp_path / "g.parquet")
    assert list(tmp_path.iterdir()) == []
    write_groups(groups, tmp_path / "g.jsonl")
    assert list(read_groups(tmp_path / "g.jsonl", allow_empty=True)) == groups


@pytest.mark.parametrize("name", ["g.jsonl", "g.jsonl.gz", "g.parquet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    def interrupted() -> Iterator[Group]:
        for index in range(1000):
            yield Group(id=str(index), prompt="p", candidates=[Candidate("c")])
        raise error

    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(error):
        write_groups(interrupted(), tmp_path / name)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]


def test_ids_that_repeat_are_not_written(tmp_path: Path) -> None:
    group = Group(id="a", prompt="p", candidates=[Candidate("c")], origin="x.jsonl:2")
    with pytest.raises(DataError, match=r"x\.jsonl:2: group id 'a' is used twice"):
        write_groups([group, group], tmp_path / "g.jsonl")
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from ncalign.data.groups import Candidate, Group, write_groups
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
groups = (Group(id=str(i), prompt=f"{i * 7919 ** 5}", candidates=[Candidate(str(hash((i, 1))))]) for i in range(20_000))
try:
    write_groups(groups, sys.argv[1])
except OSError as error:
    print(error)
    print(sorted(name for name in sys.modules if name in ("torch", "transformers")))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("name", ["g.jsonl", "g.jsonl.gz", "g.parquet"])
def test_a_write_that_runs_out_of_room_says_so_and_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"can't write {path}" in done.stdout
    assert "free some space" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"  # groups need no torch
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [(name, b"old")]


def test_atomic_path_makes_folders_and_follows_links(tmp_path: Path) -> None:
    write_json_atomic({"a": "é"}, tmp_path / "new" / "folder" / "r.json")
    assert json.loads((tmp_path / "new" / "folder" / "r.json").read_text(encoding="utf-8")) == {"a": "é"}
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "new" / "folder" / "r.json")
    write_json_atomic([1], link)
    assert link.is_symlink()
    assert json.loads((tmp_path / "new" / "folder" / "r.json").read_text()) == [1]


def test_atomic_path_replaces_only_ordinary_files(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="it is a folder"), atomic_path(tmp_path):
        pytest.fail("the body must not run")
    with pytest.raises(OSError, match="not an ordinary file"), atomic_path("/dev/null"):
        pytest.fail("the body must not run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"can't write .*inside"), atomic_path(tmp_path / "file" / "inside"):
        pytest.fail("the body must not run")


def test_atomic_path_leaves_errors_of_other_files_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "out"):
        (tmp_path / "absent").read_text()
    assert caught.value.filename == str(tmp_path / "absent")
    with pytest.raises(OSError, match="can't write") as full, atomic_path(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_json_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json_atomic({"a": math.nan}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "G.JSONL.GZ"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert [group.id for group in read_groups(path)] == ["good"]

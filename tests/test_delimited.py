"""CSV and TSV files: the cells that pandas and spreadsheets write become the rows that JSON would hold."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncalign.cli.app import main
from ncalign.data.groups import DataError, Group, ReadReport, read_groups

Write = Callable[..., Path]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows by their columns' names, as the csv module does; other values than text as Python prints them."""

    def run(*rows: dict[str, Any], name: str = "rows.csv", index: bool = False) -> Path:
        path = tmp_path / name
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if ".tsv" in name.lower() else ",")
            writer.writerow([*([""] if index else []), *rows[0]])
            writer.writerows([*([number] if index else []), *row.values()] for number, row in enumerate(rows))
        if name.lower().endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
        return path

    return run


def content(group: Group) -> list[tuple[Any, float | None]]:
    return [(candidate.completion, candidate.reward) for candidate in group.candidates]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz", "ROWS.TSV.GZ"])
def test_pairs_with_scores_by_the_command(name: str, write: Write, tmp_path: Path) -> None:
    prompt = 'Say "hi",\nplease;\twith a tab'
    pair = {"prompt": prompt, "chosen": "hi, you", "rejected": "no", "score_chosen": 4.5, "score_rejected": None}
    data = write(pair, {**pair, "prompt": "[sic] é", "score_rejected": "1e-1"}, name=name, index=True)
    assert main(["convert", str(data), str(tmp_path / "groups.jsonl")]) == 0
    first, second = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert (first["prompt"], second["prompt"]) == (prompt, "[sic] é")
    assert [candidate["reward"] for candidate in first["candidates"]] == [4.5, None]
    assert [candidate["reward"] for candidate in second["candidates"]] == [4.5, 0.1]
    # A quoted line break belongs to its row, and a row is named by its first line; the index without a name is left out.
    assert (first["id"], second["id"]) == ("2", "4")
    assert "metadata" not in first


def test_labels(write: Write) -> None:
    values = [(True, 1.0), ("FALSE", 0.0), (1, 1.0), ("0", 0.0), ("1.0", 1.0)]
    rows = [{"prompt": f"Q{k}", "completion": "a", "label": label} for k, (label, _) in enumerate(values)]
    groups = list(read_groups(write(*rows)))
    assert [group.candidates[0].reward for group in groups] == [reward for _, reward in values]


@pytest.mark.parametrize("dumped", [json.dumps, str], ids=["JSON", "Python"])
def test_conversations(dumped: Callable[[Any], str], write: Write) -> None:
    row = {"prompt": [user('It\'s "so"\n')], "chosen": [assistant("a"), user("b")], "rejected": [assistant("True")]}
    [group] = read_groups(write({**{name: dumped(value) for name, value in row.items()}, "topic": "t"}))
    assert group.prompt == row["prompt"]
    assert content(group) == [(row["chosen"], 1.0), (row["rejected"], 0.0)]
    assert group.metadata == {"topic": "t"}


def test_answers_that_are_json_stay_text(write: Write) -> None:
    row = {"prompt": '["a", "b"]', "chosen": '{"a": 1}', "rejected": '["a"]'}
    [group] = read_groups(write(row))
    assert (group.prompt, content(group)) == (row["prompt"], [(row["chosen"], 1.0), (row["rejected"], 0.0)])
    row = {"prompt": "Q", "A0": "[1, 2]", "A1": "3", "score_A0": 2, "score_A1": "NaN"}
    [group] = read_groups(write(row))
    assert content(group) == [
        ([{"role": "assistant", "content": "[1, 2]"}], 2.0),
        ([{"role": "assistant", "content": "3"}], None),
    ]


@pytest.mark.parametrize("dumped", [json.dumps, str], ids=["JSON", "Python"])
def test_schemas_with_lists(dumped: Callable[[Any], str], write: Write) -> None:
    def read(row: dict[str, Any]) -> tuple[list[tuple[Any, float | None]], ReadReport]:
        report = ReadReport()
        cells = {name: value if isinstance(value, str) else dumped(value) for name, value in row.items()}
        [group] = read_groups(write(cells), report=report)
        texts = [text if isinstance(text, str) else text[0]["content"] for text, _ in content(group)]
        return list(zip(texts, [reward for _, reward in content(group)], strict=True)), report

    lists = {"prompt": "Q", "all_generated_responses": ["a", "it's"], "all_rm_scores": [1.5, -2]}
    ratings = {"instruction": "Q", "generations": ["a", "b"], "ratings": [4, None]}
    own = {"prompt": "Q", "candidates": [{"completion": "a", "reward": 1}, {"completion": "b", "reward": None}]}
    outputs = {"input": "Q", "output": [{"text": "a", "score": 1.0}, {"text": "b", "score": 0.0}]}
    order = [
        {
            "user_id": "u",
            "value": [{"rank": 2, "value": "response-1"}, {"rank": 1, "value": "response-2"}],
            "status": "submitted",
        }
    ]
    ranked = {"prompt": "Q", "response-1": "a", "response-2": "b", "order": order}
    judged = [{"response": "a", "overall_score": 10, "annotations": {"honesty": {"Rating": "1"}}}]
    for row, schema, expected in (
        (lists, "simpo", [("a", 1.5), ("it's", -2.0)]),
        (ratings, "distilabel", [("a", 4.0), ("b", None)]),
        (own, "ncalign", [("a", 1.0), ("b", None)]),
        (outputs, "lmflow", [("a", 1.0), ("b", 0.0)]),
        (ranked, "argilla", [("a", 0.0), ("b", 1.0)]),
        ({"instruction": "Q", "completions": judged}, "ultrafeedback", [("a", 1.0)]),
        (
            {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": "1.75"},
            "alpaca_eval",
            [("a", 0.25), ("b", 0.75)],
        ),
    ):
        found, report = read(row)
        assert (report.schema, found) == (schema, expected)


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion,label\r\nQ,"a\r\nb",TRUE\r\n\r\nR,c,FALSE\r\n')
    groups = list(read_groups(path))
    assert [(group.prompt, *content(group)) for group in groups] == [("Q", ("a\r\nb", 1.0)), ("R", ("c", 0.0))]
    assert [group.origin for group in groups] == ["excel.csv:2", "excel.csv:5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion,label\nQ,a,1\nR,b\n", "rows.csv:3: the row has 2 cells and the header 3"),
        ('prompt,completion,label\nQ,"a\nb",1\nR,b, c,1\n', "rows.csv:4: the row has 4 cells and the header 3"),
        ("prompt,completion,label\nQ,a,good\n", "rows.csv:2: label is 'good' (a string): true or false is needed"),
        ("prompt,completion,label\n,a,1\n", "rows.csv:2: prompt is null"),
        ("prompt,A0,score_A0\nQ,a,high\n", "rows.csv:2: A0: reward is 'high'"),
        ("prompt,A0,score_A0\nQ,a,inf\n", "'inf' (a string): a number is needed"),
        ("prompt,chosen,prompt,rejected\n", "rows.csv:1: the header has `prompt` more than once"),
        ("prompt,,chosen,rejected\n", "rows.csv:1: column 2 of the header has no name"),
        ("prompt;chosen;rejected\nQ;a;b\n", "rows.csv:1: the header is one cell, 'prompt;chosen;rejected'"),
        ('prompt,chosen,rejected\nQ,"a,b\nR,c,d\n', "rows.csv:2: the row that begins here is not CSV: unexpected end of data"),
        ('prompt,chosen,rejected\nQ,"say "a"",b\n', "a quote inside it is written twice"),
        ("", "is empty: a first row with the columns' names is needed"),
        ("Q,a,b\nR,c,d\n", "the columns match no schema: found `Q`, `a`, `b`"),
        ("promt,chosen,rejected\nQ,a,b\n", "did you mean `prompt`"),
        # How pandas writes numpy arrays: two strings side by side, which Python would read as one.
        ("prompt,all_generated_responses,all_rm_scores\nQ,['a' 'b'],[1. 2.]\n", "a list, not empty, is needed"),
        (
            "prompt,chosen,rejected\nQ,\"[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]\",b\n",
            "chosen looks like a conversation",
        ),
    ],
)
def test_what_is_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert main(["convert", str(path), str(tmp_path / "groups.jsonl")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "groups.jsonl").exists()


def test_rows_are_left_out_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion,label\nQ,a,1\nR,b\nS,\xe9,1\nT,c,maybe\nU,d,0\n")
    report = ReadReport()
    groups = list(read_groups(path, on_bad_row="skip", report=report))
    assert [group.prompt for group in groups] == ["Q", "U"]
    assert report.reasons == {"wrong number of cells": 1, "invalid UTF-8": 1, "wrong type": 1}
    assert [example.split(": ")[0] for example in report.examples] == [f"{path}:{line}" for line in (3, 4, 5)]


@pytest.mark.parametrize("damage", [b"\xff\xfep\0r\0", b"prompt,completion,label\nQ,\0,1\n"])
def test_nul_bytes(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(damage)
    with pytest.raises(DataError, match=r"holds a NUL byte|is UTF-16"):
        list(read_groups(tmp_path / "rows.csv"))


def test_code_in_a_cell_is_not_run(write: Write, tmp_path: Path) -> None:
    cell = f"[open({str(tmp_path / 'made')!r}, 'w')]"
    [group] = read_groups(write({"prompt": "Q", "chosen": "a", "rejected": "b", "tags": cell}))
    assert group.metadata == {"tags": cell}
    assert not (tmp_path / "made").exists()
    deep = "[" * 5000 + "]" * 5000
    [group] = read_groups(write({"prompt": "Q", "chosen": "a", "rejected": "b", "tags": deep}))
    assert group.metadata == {"tags": deep}


def test_a_folder_of_delimited_files(write: Write, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.tsv", "c.csv.gz"):
        write({"prompt": name, "completion": "x", "label": 1}, name=f"in/{name}")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [group.prompt for group in read_groups(tmp_path / "in")] == ["a.csv", "b.tsv", "c.csv.gz"]


def test_other_verbs(write: Write, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"What is {k}?", "completion": f"It is {answer}.", "label": answer == k}
        for k in range(4)
        for answer in (k, k + 9)
    ]
    pairs, prompts = write(*rows, name="pairs.csv"), write(*({"prompt": f"Q{k}"} for k in range(2)), name="prompts.tsv")
    model = ("--model", str(tiny_model_dir))
    main(["check", str(pairs), *model, "--json"])
    assert json.loads(capsys.readouterr().out)["groups"] == 4
    assert main(["audit", str(pairs), "--output_dir", str(tmp_path / "audit")]) == 0
    assert "4 groups" in capsys.readouterr().out
    assert main(["train", *model, "--data", str(pairs), "--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    sampled = tmp_path / "sampled.jsonl"
    flags = ["--max_new_tokens", "4", "--num_samples", "2"]
    assert main(["generate", *model, "--prompts", str(prompts), "--output", str(sampled), *flags]) == 0
    assert [group.prompt for group in read_groups(sampled)] == ["Q0", "Q1"]

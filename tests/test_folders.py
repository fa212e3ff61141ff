"""Folders read as one set: which files are data, of which split, and that splits are never mixed unasked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncalign.core.outputs import claim
from ncalign.data.groups import DataError, convert, read_groups
from ncalign.data.shards import convert_folder

SHARD = "00000-of-00001"


def write(path: Path, prompt: str = "Q") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist([row])
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(json.dumps(row) + "\n")


def folder_of(tmp_path: Path, names: list[str]) -> Path:
    """A folder with a row in each file, whose prompt is the file's name."""
    for name in names:
        write(tmp_path / "set" / name, name)
    return tmp_path / "set"


def prompts(path: str | Path) -> list[object]:
    return [group.prompt for group in read_groups(path)]


PAGE = Path(__file__).resolve().parent.parent / "docs" / "data-formats.md"
TABLE = PAGE.read_text(encoding="utf-8").partition("## Folders")[2]

SPLITS = {
    "the hub's files": {"train": [f"data/train-{SHARD}.parquet"], "test": [f"data/test-{SHARD}.parquet"]},
    "other names": {"train_prefs": [f"data/train_prefs-{SHARD}.parquet"], "test_sft": [f"data/test_sft-{SHARD}.parquet"]},
    "of older datasets": {"train_a": [f"data/train_a-{SHARD}-0a1b.parquet"], "train_b": [f"data/train_b-{SHARD}-9c.parquet"]},
    "no keyword": {"harmless": [f"data/harmless-{SHARD}.parquet"], "helpful": [f"data/helpful-{SHARD}.parquet"]},
    "file names": {"train": ["train.jsonl"], "test": ["test.jsonl"]},
    "file names with more": {"train": ["my_train_1.jsonl", "my_train_2.jsonl"], "validation": ["my-dev.jsonl"]},
    "folders": {"train": ["train/a.jsonl", "train/b.jsonl"], "test": ["eval/a.jsonl"], "validation": ["Valid/a.jsonl"]},
    "what names none is for training": {"train": ["rows.jsonl", "more.jsonl"], "test": ["rows.test.jsonl"]},
    "a training file in a folder for tests": {"train": ["train/a.jsonl"], "test": ["test/train.jsonl"]},
    "a test set in folders of their own": {"train": ["en/train.jsonl", "de/train.jsonl"], "test": ["en/test.jsonl"]},
    "a test file in a folder for training": {"train": ["train/a.jsonl"], "test": ["train/test.jsonl"]},
    "converted by the hub": {"train": ["default/train/0000.parquet"], "test": ["default/test/0000.parquet"]},
    "prepared by datasets": {"train": [f"uf-train-{SHARD}.arrow"], "test": ["uf-test.arrow"]},
}  # fmt: skip


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
def test_splits_are_named_and_read_one_at_a_time(splits: dict[str, list[str]], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [name for names in splits.values() for name in names])
    with pytest.raises(DataError) as caught:
        read_groups(folder)
    for split, names in splits.items():
        assert f"{split} ({len(names)} file" in str(caught.value)
        assert prompts(f"{folder}:{split}") == sorted(names)
    assert f"name one, as {folder}:" in str(caught.value)
    with pytest.raises(DataError, match="has no split 'other': name one of"):
        read_groups(f"{folder}:other")


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl", "sub/b.jsonl"],
        ["contest.jsonl", "latest.jsonl", "devil.jsonl", "strain.jsonl"],  # keywords stand between separators
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"],
        ["test.jsonl"],
    ],
)
def test_one_split_is_read_whole(names: list[str], tmp_path: Path) -> None:
    assert prompts(folder_of(tmp_path, names)) == sorted(names)


def test_bookkeeping_is_no_data(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [f"data/train-{SHARD}.parquet"])
    for name in (
        "config.json",
        "dataset_infos.json",
        "dataset_info.json",
        "state.json",
        "croissant.json",
        "data-croissant-1.json",
        ".cache/huggingface/download/test.json",
        "_temporary/test.jsonl",
        "._test.jsonl",
        "cache-0123.arrow",
        ".gitattributes",
        "README.md",
        "LICENSE",
        "x.lock",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert prompts(folder) == [f"data/train-{SHARD}.parquet"]


AS_DATASETS = [
    [f"data/{split}-{SHARD}{more}.parquet" for split in ("train", "test") for more in ("", "-0a1b2c")],
    [f"data/{name}-{SHARD}.parquet" for name in ("harmless", "train_prefs", "test_gen")],
    ["train.jsonl", "valid.jsonl", "eval.jsonl"],
    ["my-train_1.jsonl", "my test.2.jsonl", "x.dev.jsonl"],
    ["training/a.jsonl", "dev_2/b.jsonl", "testing/deep/c.jsonl"],
    ["en/train/a.jsonl", "en/test/train.jsonl", "2-train/x.jsonl"],
    ["contest.jsonl", "latest.jsonl"],
    ["test.jsonl"],
    ["a.jsonl", "config.json", "dataset_info.json", ".hidden/test.jsonl", "__pycache__/test.jsonl"],
]


@pytest.mark.parametrize("names", AS_DATASETS, ids=lambda names: names[0])
def test_splits_are_those_of_datasets(names: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets.data_files")
    folder = folder_of(tmp_path, names)
    expected = datasets.DataFilesDict.from_patterns(datasets.get_data_patterns(str(folder)), base_path=str(folder))
    for split, files in expected.items():
        assert prompts(f"{folder}:{split}") == sorted(str(Path(file).relative_to(folder)) for file in files)


def test_files_that_name_no_split_beside_those_for_training_are_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["train.jsonl", "extra.jsonl", "stats.json"])
    with pytest.raises(
        DataError, match=r"split train \(1 file\), and beside them extra.jsonl, stats.json: name one, as .*:train"
    ):
        read_groups(folder)
    assert prompts(f"{folder}:train") == ["train.jsonl"]


CARD = "---\nlicense: mit\nconfigs:\n{}---\n# A set\n"
LIST = "- config_name: default\n  data_files:\n  - split: fit\n    path: rows/a*\n  - split: judge\n    path: [rows/b.jsonl]\n"
MAP = "- config_name: x\n  data_dir: rows\n  data_files: {fit: 'a?.jsonl', judge: '**/b.jsonl'}\n"


@pytest.mark.parametrize("configs", [LIST, MAP], ids=["list", "map"])
def test_the_card_names_splits(configs: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["rows/a1.jsonl", "rows/a2.jsonl", "rows/b.jsonl", "other.jsonl"])
    (folder / "README.md").write_text(CARD.format(configs))
    with pytest.raises(DataError, match=r"has the splits fit \(2 files\), judge \(1 file\): name one, as .*set:fit"):
        read_groups(folder)
    assert prompts(f"{folder}:fit") == ["rows/a1.jsonl", "rows/a2.jsonl"]
    assert prompts(f"{folder}:judge") == ["rows/b.jsonl"]


def test_the_card_names_configurations(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["en/train.jsonl", "en/test.jsonl", "de.jsonl"])
    en = "- config_name: en\n  data_files:\n  - {split: train, path: en/train.jsonl}\n  - {split: test, path: en/test.jsonl}\n"
    (folder / "README.md").write_text(CARD.format(f"{en}- config_name: de\n  data_files: de.jsonl\n"))
    with pytest.raises(DataError, match=r"en/train \(1 file\), en/test \(1 file\), de/train \(1 file\)"):
        read_groups(folder)
    assert prompts(f"{folder}:de") == ["de.jsonl"]
    assert prompts(f"{folder}:en/test") == ["en/test.jsonl"]
    with pytest.raises(DataError, match="has several splits in 'en'"):
        read_groups(f"{folder}:en")


def test_a_pattern_of_the_card_that_is_none_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["a.jsonl"])
    (folder / "README.md").write_text(CARD.format("- data_files: a**\n"))
    with pytest.raises(DataError, match=r"README.md names the files 'a\*\*'"):
        read_groups(folder)


@pytest.mark.parametrize(
    "card", ["# No head\n", "---\nconfigs: [\n---\n", CARD.format("- config_name: x\n"), CARD.format("- data_files: y/*\n")]
)
def test_a_card_that_names_no_files_changes_nothing(card: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["a.jsonl", "b.jsonl"])
    (folder / "README.md").write_text(card)
    assert prompts(folder) == ["a.jsonl", "b.jsonl"]


def test_a_card_whose_aliases_never_end_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["a.jsonl"])
    merged = "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 40))
    (folder / "README.md").write_text(f"---\na0: &a0 {{x: 1}}\n{merged}\n---\n")
    with pytest.raises(DataError, match=r"README\.md: the card can't be read: it holds more than 10\^12 values"):
        read_groups(folder)


def test_saved_splits_have_any_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [f"{split}/data-{SHARD}.arrow" for split in ("fit", "judge")])
    (folder / "dataset_dict.json").write_text('{"splits": ["fit", "judge"]}')
    with pytest.raises(DataError, match=r"fit \(1 file\), judge \(1 file\)"):
        read_groups(folder)
    assert prompts(f"{folder}:judge") == prompts(folder / "judge") == [f"judge/data-{SHARD}.arrow"]


def test_every_way_in_knows_splits(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["train.jsonl", "test.jsonl"])
    assert convert(f"{folder}:train", tmp_path / "one.jsonl").groups == 1
    assert prompts(tmp_path / "one.jsonl") == ["train.jsonl"]
    assert convert_folder(f"{folder}:test", tmp_path / "many").groups == 1
    with pytest.raises(DataError, match="which is read: name another folder"):
        convert_folder(f"{folder}:test", folder / "many")
    with pytest.raises(ValueError, match="is what data reads, and would be replaced"):
        claim(folder / "train.jsonl", verb="score", inputs={"data": f"{folder}:train"}, overwrite=True)


def test_rows_with_images_that_are_left_out_are_kept_apart(tmp_path: Path) -> None:
    rows = [
        {"prompt": "What is it?", "chosen": "a cat", "rejected": "b", "images": [{"bytes": image, "path": None}]}
        for image in (b"\x89\xff", b"\x89\xfe")
    ]
    pq.write_table(
        pa.Table.from_pylist([*rows, {**rows[0], "images": None}, {**rows[0], "images": []}]), tmp_path / "r.parquet"
    )
    groups = list(read_groups(tmp_path / "r.parquet"))
    # The two without images are one prompt.
    assert [len(group.candidates) for group in groups] == [2, 2, 2]
    assert [group.metadata["images"] for group in groups[:2]] == [[{"bytes": None, "path": None}]] * 2


@pytest.mark.parametrize("line", re.findall(r"^\| (`.*`) \| (`.*`) \|$", TABLE, re.MULTILINE))
def test_a_folder_is_read_as_its_line_says(line: tuple[str, str], tmp_path: Path) -> None:
    files, said = line
    folder = folder_of(tmp_path, re.findall(r"`([^`]+)`", files))
    splits = {name: re.findall(r"`([^`]+)`", names) for name, names in re.findall(r"`([^`]+)`: ([^;]+)", said)}
    for split, names in splits.items():
        assert prompts(f"{folder}:{split}") == names
    if len(splits) == 1:
        assert prompts(folder) == names
    else:
        with pytest.raises(DataError) as caught:
            read_groups(folder)
        assert all(f"{split} (" in str(caught.value) for split in splits)

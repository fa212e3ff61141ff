"""Bits that flip and states that someone edits: damage is named with its file or made good, and never taken as written."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import group_row, weights
from ncalign.cli.app import main
from ncalign.core.store import Store
from ncalign.data.shards import convert_folder
from ncalign.model.reference import ReferenceCache
from ncalign.training.checkpoint import find_checkpoints
from online_runs import settings, write_inputs

Write = Callable[..., Path]
Edit = Callable[[Path], None]
Capture = pytest.CaptureFixture[str]
REMEDY = "delete the folder, and resume goes on from the checkpoint before it"


def flip(path: Path, chance: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


class Stopped(NamedTuple):
    """A run that was stopped after two of its three steps: its words, its folder, and the weights that it comes to."""

    words: list[str]
    run: Path
    whole: dict[str, torch.Tensor]

    def copy(self, target: Path) -> list[str]:
        """A copy of the folder, and the words that go on with it."""
        shutil.copytree(self.run, target)
        return [*self.words, "--output_dir", str(target), "--resume"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped")
    data, run = folder / "groups.jsonl", folder / "run"
    data.write_text("".join(json.dumps(group_row(k, [0.1, 0.9, 0.4])) + "\n" for k in range(8)))
    words = ["train", "--model", str(tiny_model_dir), "--data", str(data), "--cache_dir", str(folder / "cache")]
    words += "--max_steps 3 --save_steps 1 --save_total_limit 3 --per_device_train_batch_size 4 --learning_rate 1e-3".split()
    words += "--dtype float32 --scoring_dtype float32 --report_to []".split()
    assert main([*words, "--output_dir", str(run)]) == 0
    whole = weights(run)
    (run / "results.json").unlink()
    for made in (run / "model", find_checkpoints(run)[-1]):
        shutil.rmtree(made)
    return Stopped(words, run, whole)


def test_a_flipped_bit_in_a_checkpoint_is_named_and_the_one_before_it_leads_to_the_same(
    stopped: Stopped, tmp_path: Path, capsys: Capture
) -> None:
    chance, run = random.Random(0), tmp_path / "run"
    words, last = stopped.copy(run), find_checkpoints(stopped.run)[-1].name
    for path in sorted((stopped.run / "checkpoints" / last).iterdir()):
        shutil.copy(path, run / "checkpoints" / last)
        flip(run / "checkpoints" / last / path.name, chance)
        assert main(words) == 1
        error = capsys.readouterr().err
        named = (f"{last} is damaged (", f"{last}/checksums.json is damaged", f"{last}/state.json is damaged")
        assert any(name in error for name in named)
        assert path.name in error or path.name == "checksums.json"
        assert REMEDY in error
        shutil.copy(path, run / "checkpoints" / last)
    shutil.rmtree(run / "checkpoints" / last)
    assert main(words) == 0
    found = weights(run)
    assert all(torch.equal(stopped.whole[name], found[name]) for name in stopped.whole)


def test_flipped_bits_in_the_reference_cache_never_change_a_value(tmp_path: Path, capsys: Capture) -> None:
    cache, chance = ReferenceCache(tmp_path), random.Random(0)
    values = {bytes([k] * 16): -float(k) for k in range(60)}
    for k, (key, value) in enumerate(values.items()):
        cache.add(key, value)
        if k % 20 == 19:
            cache.flush()
    parts = {path: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    for _ in range(60):
        path = chance.choice(list(parts))
        flip(path, chance)
        found = ReferenceCache(tmp_path).values
        assert len(found) == 40
        assert found.items() <= values.items()
        path.write_bytes(parts[path])
    assert "1 of 3 parts are damaged or another user's; their log-probs are computed again" in capsys.readouterr().err


def test_flipped_bits_in_a_store_never_change_an_answer(tmp_path: Path) -> None:
    chance, values = random.Random(0), {Store.key(k): [f"answer {k}", k] for k in range(100)}
    store = Store(tmp_path / "whole")
    for key, value in values.items():
        store.put(key, value)
    store.close()
    outcomes = {"same": 0, "asked again": 0, "told": 0}
    for number in range(300):
        path = tmp_path / f"{number}"
        shutil.copy(tmp_path / "whole", path)
        flip(path, chance)
        try:
            damaged = Store(path)
            found = {key: damaged.get(key) for key in values}
            damaged.close()
        except OSError as error:
            outcomes["told"] += str(path) in str(error)
            continue
        assert all(value in (None, values[key]) for key, value in found.items())
        outcomes["asked again" if None in found.values() else "same"] += 1
    assert min(outcomes.values()) > 0


# -- states that someone edits ------------------------------------------------------------------------------------------


def state(**changes: Any) -> Edit:
    """Edit a checkpoint's state, and have its checksums say that it was written so."""

    def edit(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        sign(folder)

    return edit


def sign(folder: Path) -> None:
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix != ".json"}
    sums["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(sums))


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    """Edit a checkpoint's tensors, and have its checksums say that they were written so."""

    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name)
        sign(folder)

    return edit


def text(name: str, content: str) -> Edit:
    """Replace a file of the run's folder, which lies two folders above a checkpoint's."""

    def edit(folder: Path) -> None:
        (folder.parent.parent / name).write_text(content)

    return edit


def listed(folder: Path) -> None:
    (folder / "state.json").write_text("[1, 2]")
    sign(folder)


STATES: dict[str, tuple[Edit, str]] = {
    "a step of another folder": (state(step=10**6), "state.json is damaged (it is of step 1000000)"),
    "a step that is no number": (state(step="2"), "state.json is damaged (step: Input should be a valid integer)"),
    "a list": (listed, "state.json is damaged (Input should be a valid dictionary)"),
    "no state of the loop": (state(loop=[]), "state.json is damaged (loop: Input should be a valid dictionary)"),
    "a loop without means": (state(loop={}), "state.json is damaged (loop.sums: Field required)"),
    "other data": (state(data="x"), "the training groups changed since"),
    "a list of checksums": (text("checkpoints/step-00000002/checksums.json", "[[]]"), "checksums.json is damaged"),
    "weights that lack one": (tensors("model.safetensors", lambda t: dict(list(t.items())[1:])), "do not fit"),
    "weights of another shape": (tensors("model.safetensors", lambda t: {k: v[:1] for k, v in t.items()}), "do not fit"),
    "moments of nothing": (tensors("optimizer.safetensors", lambda t: {"x": torch.ones(1)}), "do not fit"),
    "no random numbers": (tensors("random-0.safetensors", lambda t: {"x": torch.ones(1)}), "holds no state of random numbers"),
    "a list as configuration": (text("config.yaml", "- a\n"), "config.yaml is no configuration"),
    "no YAML as configuration": (text("config.yaml", "a: [\n"), "config.yaml can't be read"),
    "an empty configuration": (text("config.yaml", ""), "config.yaml is no configuration"),
}


@pytest.mark.parametrize("name", STATES)
def test_an_edited_state_is_refused_in_words(name: str, stopped: Stopped, tmp_path: Path, capsys: Capture) -> None:
    edit, said = STATES[name]
    words = stopped.copy(tmp_path / "run")
    edit(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "bug" not in error
    assert not (tmp_path / "run" / "model").exists()


def test_how_the_optimizer_steps_is_the_configurations(stopped: Stopped, tmp_path: Path) -> None:
    words = stopped.copy(tmp_path / "run")
    state(param_groups=[])(tmp_path / "run" / "checkpoints" / "step-00000002")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text('[1]\n{"step": "x"}\n\x00\n' + metrics.read_text())
    shutil.copytree(tmp_path / "run/checkpoints/step-00000002", tmp_path / "run/checkpoints/step-00000002 (copy)")
    assert main(words) == 0
    found = weights(tmp_path / "run")
    assert all(torch.equal(stopped.whole[name], found[name]) for name in stopped.whole)
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_run_that_is_made_shorter_than_its_checkpoints_is_refused(stopped: Stopped, tmp_path: Path, capsys: Capture) -> None:
    words = [*stopped.copy(tmp_path / "run"), "--max_steps", "1", "--accept_changes"]
    assert main(words) == 1
    assert "step-00000002 is of step 2, and the run ends at step 1" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", '{"method": "mc_po"}'])
def test_results_that_are_not_ours_are_named(content: str, stopped: Stopped, tmp_path: Path, capsys: Capture) -> None:
    words = stopped.copy(tmp_path / "run")
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "results.json").write_text(content)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "results.json is damaged (" in error
    assert "delete it, and --resume writes it again from the last checkpoint" in error


@pytest.fixture(scope="module")
def round_begun(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[dict[str, Any], Path]:
    """An online run that was stopped in its first round: its fields and its folder."""
    folder = tmp_path_factory.mktemp("online")
    write_inputs(folder, prompts=8)
    fields = settings(folder, tiny_model_dir, "run", max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncalign.online.online.train_round", lambda *_: 1 / 0)
        assert main(online_words(fields)) == 1
    return fields, folder / "run"


def online_words(fields: dict[str, Any]) -> list[str]:
    values = {name: "[]" if value == () else str(value) for name, value in fields.items()}
    return ["online", *(word for name, value in values.items() for word in (f"--{name}", value))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generated-00000.json", "[1]"),
        ("generated-00000.json", "[]"),
        ("scored-00000.json", '[["high"]]'),
        ("logprobs-00000.json", "{}"),
        ("evaluation.json", "[[]]"),
    ],
)
def test_artefacts_of_a_round_that_are_not_ours_are_named(
    name: str, content: str, round_begun: tuple[dict[str, Any], Path], tmp_path: Path, capsys: Capture
) -> None:
    fields, run = round_begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "rounds" / "000" / name).write_text(content)
    assert main(online_words({**fields, "output_dir": tmp_path / "run"})) == 1
    error = capsys.readouterr().err
    assert f"{name} is damaged (" in error
    assert "delete it, and resume makes it again" in error


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("generated-00000.json", lambda rows: [row[:1] for row in rows]),
        ("generated-00000.json", lambda rows: [[{**one, "token_ids": [10**9]} for one in row] for row in rows]),
        ("scored-00000.json", lambda rows: [[0.5 for _ in row] for row in rows]),
        ("scored-00000.json", lambda rows: [[math.nan for _ in row] for row in rows]),
        ("logprobs-00000.json", lambda found: {side: [None for _ in rows] for side, rows in found.items()}),
        ("evaluation.json", lambda rows: [{**row, "reward": 0.5} for row in rows]),
    ],
    ids=["completions left out", "other tokens", "other rewards", "no number", "no log-probs", "other evaluation"],
)
def test_what_changed_in_a_round_is_named(
    name: str, change: Callable[[Any], Any], round_begun: tuple[dict[str, Any], Path], tmp_path: Path, capsys: Capture
) -> None:
    fields, run = round_begun
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "rounds" / "000" / name
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"content": change(kept["content"])}))
    assert main(online_words({**fields, "output_dir": tmp_path / "run"})) == 1
    assert f"{name} is damaged (its content changed after writing): " in capsys.readouterr().err


def test_a_rounds_evaluation_that_is_gone_is_named(
    round_begun: tuple[dict[str, Any], Path], tmp_path: Path, capsys: Capture
) -> None:
    fields, run = round_begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "rounds" / "000" / "evaluation.json").unlink()
    assert main(online_words({**fields, "output_dir": tmp_path / "run"})) == 1
    assert "000/evaluation.json is damaged ([Errno 2] No such file or directory" in capsys.readouterr().err


def test_records_of_shards_that_are_not_ours_are_made_again(tmp_path: Path, write_jsonl: Write) -> None:
    (tmp_path / "in").mkdir()
    for name in "abcd":
        write_jsonl([group_row(k, [1, 0]) | {"id": f"{name}{k}"} for k in range(2)], f"in/{name}.jsonl")
    first, records = convert_folder(tmp_path / "in", tmp_path / "out"), tmp_path / "out" / ".ncalign"
    (records / "a.json").write_text("[1]")
    (records / "b.json").write_text("{}")
    (records / "c.ids").write_bytes(b"short")
    (records / "d.ids").unlink()
    assert convert_folder(tmp_path / "in", tmp_path / "out") == first
    assert (records / "c.ids").stat().st_size == (records / "a.ids").stat().st_size > 5


@pytest.mark.parametrize("row", ["[1]", '{"question": "q"}', '{"question": 1, "model": "a", "baseline": "b"}'])
def test_games_that_are_not_ours_are_named(row: str, tmp_path: Path, write_jsonl: Write, capsys: Capture) -> None:
    game = {"question": "q", "model": "a", "baseline": "b", "model_first": True, "preference": 1.0}
    games = write_jsonl([game, row], "games.jsonl")
    assert (
        main(["evaluate", "--judgements", str(games), "--compare_games", str(games), "--output_dir", str(tmp_path / "out")])
        == 1
    )
    error = capsys.readouterr().err
    assert "games.jsonl:2" in error
    assert "bug" not in error

"""`ncalign push`: what is uploaded, what its card says, and what never leaves this machine. The hub is a double."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from conftest import group_row
from ncalign.cli.app import main
from ncalign.training import push
from ncalign.training.card import hub_id_of
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training

BASE = "owner/tiny"
Pushed = Callable[..., tuple[int, dict[str, Any], str]]


class Hub:
    """What the hub is asked for."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.files: dict[str, bytes] = {}
        self.there: list[str] = []

    @property
    def card(self) -> str:
        return self.files["README.md"].decode()

    def front_matter(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load(self.card.split("---\n")[1])
        return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that keeps what it is given."""
    found = Hub()

    def commit(_api: HfApi, repo: str, operations: list[Any], commit_message: str) -> Any:
        for one in operations:
            given = one.path_or_fileobj
            found.files[one.path_in_repo] = given if isinstance(given, bytes) else Path(given).read_bytes()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", lambda _api, repo, **fields: found.made.append((repo, fields)))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda _api, repo: found.there)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(push, "get_token", lambda: "token_of_the_one_who_pushes")
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with the run of an adapter, and that of a merged model."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "groups.jsonl"
    data.write_text("".join(json.dumps(group_row(index, [1.0, 0.0])) + "\n" for index in range(8)))
    for name, merge in (("adapter", False), ("merged", True)):
        run_training(
            TrainConfig.model_validate(
                {
                    "model": str(tiny_model_dir),
                    "data": data,
                    "output_dir": folder / name,
                    "cache_dir": folder / "cache",
                    "objective": {"name": "nca", "beta": 0.2},
                    "eval_fraction": 0.25,
                    "lora": {"r": 2},
                    "max_steps": 1,
                    "dtype": "float32",
                    "scoring_dtype": "float32",
                    "merge": merge,
                    "report_to": (),
                }
            )
        )
    return folder


@pytest.fixture
def pushed(capsys: pytest.CaptureFixture[str]) -> Pushed:
    """Runs the verb; its exit code, its result, and what it said beside it."""

    def run(*words: object) -> tuple[int, dict[str, Any], str]:
        code = main(["push", *map(str, words), "--json"])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if code == 0 else {}, printed.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_with_its_base_model_by_hub_id(hub: Hub, runs: Path, pushed: Pushed) -> None:
    before = contents(runs / "adapter")
    code, result, _ = pushed(runs / "adapter", "me/sums", "--base_model", BASE)
    assert (code, result["pushed"], result["base_model"]) == (0, True, BASE)
    assert hub.made == [("me/sums", {"private": True, "exist_ok": True})]
    assert set(hub.files) == set(result["files"])
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= set(hub.files)
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == BASE
    # What is here stays as it was, and nothing is written.
    assert contents(runs / "adapter") == before
    front = hub.front_matter()
    assert (front["library_name"], front["base_model"], front["base_model_relation"]) == ("peft", BASE, "adapter")
    assert front["tags"] == ["ncalign", "nca"]
    assert "aligned with **nca** by ncalign" in hub.card
    assert "- `beta`: 0.2" in hub.card
    assert "| eval/loss |" in hub.card
    assert "- `data`: groups.jsonl" in hub.card
    assert "- groups_trained_on: 6" in hub.card
    written = yaml.safe_load(hub.card.partition("```yaml\n")[2].partition("```")[0])
    assert (written["model"], written["data"]) == (BASE, "groups.jsonl")
    assert "output_dir" not in written


@pytest.mark.parametrize("words", [("{runs}/adapter", "--base_model", BASE), ("{runs}/merged",)], ids=["adapter", "merged"])
def test_no_file_has_a_path_of_this_machine(
    hub: Hub, runs: Path, pushed: Pushed, tiny_model_dir: Path, words: tuple[str, ...]
) -> None:
    model, *more = (word.format(runs=runs) for word in words)
    assert pushed(model, "me/sums", *more)[0] == 0
    for name, content in hub.files.items():
        assert not any(str(place).encode() in content for place in (runs, tiny_model_dir, Path.cwd())), name


def test_a_merged_model(hub: Hub, runs: Path, pushed: Pushed) -> None:
    code, result, _ = pushed(runs / "merged", "me/sums", "--no_private")
    assert (code, result["base_model"]) == (0, None)
    assert hub.made[0][1]["private"] is False
    assert hub.front_matter()["library_name"] == "transformers"
    assert "base_model" not in hub.front_matter()
    assert "A model that is not on the hub, aligned with **nca**" in hub.card


def test_evaluations_with_their_intervals(hub: Hub, runs: Path, pushed: Pushed, tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation"
    (evaluation / "tables").mkdir(parents=True)
    (evaluation / "results.json").write_text(json.dumps({"set": "ours", "questions": 38, "notes": ["<b>one</b> | note"]}))
    rows = [{"model": "sums", "win rate (%)": 61.25, "low": 44.0, "high": None}]
    table = {"caption": "low and high bound 95 % intervals", "columns": list(rows[0]), "rows": rows}
    (evaluation / "tables" / "win_rates.json").write_text(json.dumps(table))
    assert pushed(runs / "merged", "me/sums", "--evaluations", evaluation)[0] == 0
    assert "### ours, 38 questions" in hub.card
    assert "| model | win rate (%) | low | high |\n| --- | --- | --- | --- |\n| sums | 61.25 | 44 | – |" in hub.card
    assert "low and high bound 95 % intervals" in hub.card
    assert "- &lt;b&gt;one&lt;/b&gt; \\| note" in hub.card
    code, _, said = pushed(runs / "merged", "me/sums", "--evaluations", tmp_path)
    assert code == 1
    assert "is no folder that `ncalign evaluate` wrote" in said


@pytest.mark.parametrize("why", ["--dry-run", "offline"])
def test_a_dry_run_asks_nobody(hub: Hub, runs: Path, pushed: Pushed, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", why == "offline")
    code, result, said = pushed(runs / "merged", "me/sums", *(["--dry-run"] if why == "--dry-run" else []))
    assert (code, result["pushed"], result["url"]) == (0, False, None)
    assert "model.safetensors" in result["files"]
    assert result["card"].startswith("---\nlibrary_name: transformers\n")
    assert ("this is a dry run" in said) == (why == "offline")
    assert (hub.made, hub.files) == ([], {})


class TestRefused:
    """What is not uploaded, and why."""

    def copy(self, runs: Path, tmp_path: Path) -> Path:
        shutil.copytree(runs / "merged" / "model", tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "inner/optimizer.pt"])
    def test_pickles(self, hub: Hub, runs: Path, pushed: Pushed, tmp_path: Path, name: str) -> None:
        folder = self.copy(runs, tmp_path)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80")
        code, _, said = pushed(folder, "me/sums")
        assert code == 1
        assert f"holds {Path(name).name}, which is not uploaded: pickled weights" in said
        assert hub.made == []

    @pytest.mark.parametrize("secret", ["token_of_the_one_who_pushes", "hf_" + "a1B2" * 8])
    def test_secrets(self, hub: Hub, runs: Path, pushed: Pushed, tmp_path: Path, secret: str) -> None:
        folder = self.copy(runs, tmp_path)
        (folder / "README.md").write_text(f"# Mine\n\nmade with {secret}\n")
        code, _, said = pushed(folder, "me/sums")
        assert (code, hub.made) == (1, [])
        assert "README.md holds what looks like an access token" in said
        assert secret not in said

    def test_what_is_no_part_of_a_model_stays_here(self, hub: Hub, runs: Path, pushed: Pushed, tmp_path: Path) -> None:
        folder = self.copy(runs, tmp_path)
        for name in ("notes.txt", "train.jsonl", ".env"):
            (folder / name).write_text("mine")
        code, result, _ = pushed(folder, "me/sums")
        assert code == 0
        assert result["left_out"] == [".env", "notes.txt", "train.jsonl"]
        assert not {"notes.txt", "train.jsonl", ".env"} & set(hub.files)

    def test_an_adapter_whose_base_model_only_this_machine_has(self, hub: Hub, runs: Path, pushed: Pushed) -> None:
        code, _, said = pushed(runs / "adapter", "me/sums")
        assert (code, hub.made) == (1, [])
        assert "give its hub id (base_model), or push the merged model" in said

    def test_weights_of_another_model_there(self, hub: Hub, runs: Path, pushed: Pushed) -> None:
        hub.there = ["README.md", "model.safetensors", "adapter_model.safetensors"]
        code, _, said = pushed(runs / "merged", "me/sums")
        assert code == 1
        assert "me/sums holds adapter_model.safetensors, which is no part of this model" in said
        assert hub.files == {}

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (LocalTokenNotFoundError("none"), "run `hf auth login`"),
            (ConnectionError("[Errno -2] unknown"), "can't be reached ([Errno -2] unknown): nothing was uploaded"),
        ],
    )
    def test_without_login_or_network(
        self, hub: Hub, runs: Path, pushed: Pushed, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
    ) -> None:
        def fail(*_args: Any, **_fields: Any) -> None:
            raise error

        monkeypatch.setattr(HfApi, "create_repo", fail)
        code, _, said = pushed(runs / "merged", "me/sums")
        assert code == 1
        assert message in said

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("nowhere", "me/sums"), "there is no such folder"),
            (("{runs}", "me/sums"), "holds no weights"),
            (("{runs}/merged", "a/b/c"), "owner/name is needed"),
        ],
    )
    def test_other_folders_and_names(self, hub: Hub, runs: Path, pushed: Pushed, words: tuple[str, str], message: str) -> None:
        code, _, said = pushed(*(word.format(runs=runs) for word in words))
        assert (code, hub.made) == (1, [])
        assert message in said


def test_the_hub_id_of_a_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "results.json").write_text("{}")
    (run / "config.yaml").write_text(f"model: {BASE}\n")
    cached = tmp_path / "models--owner--tiny" / "snapshots" / "0a1b"
    cached.mkdir(parents=True)
    assert [hub_id_of(str(one)) for one in (run, run / "model", cached, BASE, tmp_path)] == [BASE, BASE, BASE, BASE, None]
    assert hub_id_of("../gone") is None

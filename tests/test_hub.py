"""A name that is neither a folder nor on the hub is told of at once, whatever verb it is given to."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from ncalign.cli.app import main
from ncalign.core.hub import only_cached
from ncalign.generation import transport

VERBS = {
    "train": ("train", "--model", "no/model", "--data", "{data}", "--output_dir", "{out}"),
    "online": ("online", "--model", "no/model", "--data", "{data}", "--output_dir", "{out}", "--reward", "instructions"),
    "generate": ("generate", "--model", "no/model", "--prompts", "{data}", "--output", "{out}.jsonl"),
    "answer": ("answer", "--model", "no/model", "--output", "{out}.jsonl"),
    "score": ("score", "--data", "{data}", "--output", "{out}.jsonl", "--reward", "model:no/model"),
    "check": ("check", "{data}", "--model", "no/model"),
    "audit": ("audit", "{data}", "--output_dir", "{out}", "--model", "no/model"),
    "evaluate": ("evaluate", "--model", "no/model", "--against", "no/other", "--output_dir", "{out}"),
    "judge": ("evaluate", "--model", "{data}", "--against", "{other}", "--reward", "model:no/model", "--output_dir", "{out}"),
    "convert": ("convert", "no/model", "{out}.jsonl"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_mistyped_hub_id_is_told_of_in_one_line(
    verb: str, groups_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def offline(self: HfApi, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", offline)
    monkeypatch.setattr(HfApi, "dataset_info", offline)
    other = tmp_path / "other.jsonl"
    other.write_bytes(groups_file.read_bytes())
    before = time.monotonic()
    assert main([word.format(data=groups_file, other=other, out=tmp_path / "out") for word in VERBS[verb]]) == 1
    assert time.monotonic() - before < 30
    assert asked == [("no/model", 8.0)]
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "'no/model': there is no such folder (relative paths start at" in line
    assert "can't be asked ([Errno -2] Name or service not known): check the name and the network" in line
    assert not (tmp_path / "out").exists()


def test_a_host_that_does_not_exist_is_told_of_before_anything_is_asked(
    groups_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(host: str, port: None) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    judge = ("--reward", "judge", "--judge.base_url", "http://gpu-srever:8000/v1", "--judge.model", "m")
    words = ["score", "--data", str(groups_file), "--output", str(tmp_path / "out.jsonl"), *judge, "--cache_dir", str(tmp_path)]
    assert main(words) == 1
    expected = "error: server http://gpu-srever:8000/v1: there is no host 'gpu-srever': check base_url and the network"
    assert capsys.readouterr().err.strip() == expected
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    transport.check_host("http://gpu-srever:8000/v1", transport.ApiKey(None, ""))


def test_a_path_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model '.*/no/model': there is no such folder .* has not the form owner/name"):
        only_cached(f"{tmp_path}/no/model", what="model")
    assert not only_cached(str(tmp_path), what="model")


def test_what_the_cache_holds_is_taken_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models--my--model" / "snapshots" / "0").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def refused(self: HfApi, name: str, timeout: float) -> None:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(HfApi, "model_info", refused)
    assert only_cached("my/model", what="model")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids asking"):
        only_cached("my/other", what="model")
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout: None)
    assert not only_cached("my/model", what="model")

"""The commands that messages suggest for missing packages, and the page that lists the extras."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ncalign.cli.app import main
from ncalign.core import install
from ncalign.core.install import install_hint

ROOT = Path(__file__).resolve().parent.parent


def record(monkeypatch: pytest.MonkeyPatch, origin: object) -> None:
    """Have pip's record of where ncalign came from say this; None where there is no record."""
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(install, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: None, "pip install 'ncalign[hub]'"),
        (lambda folder: {"url": "https://example.org/ncalign.whl", "archive_info": {}}, "pip install 'ncalign[hub]'"),
        (lambda folder: {"url": folder.as_uri(), "dir_info": {"editable": True}}, "pip install -e '{folder}[hub]'"),
        (lambda folder: {"url": folder.as_uri(), "dir_info": {}}, "pip install '{folder}[hub]'"),
        # The clone was deleted since.
        (lambda folder: {"url": (folder / "gone").as_uri(), "dir_info": {}}, "pip install 'ncalign[hub]'"),
    ],
    ids=["index", "wheel", "editable", "folder", "deleted folder"],
)
def test_a_hint_names_what_ncalign_was_installed_from(
    make: object, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    record(monkeypatch, make(clone))  # type: ignore[operator]
    assert install_hint("hub") == expected.format(folder=clone)


def test_run_from_its_source_without_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise install.PackageNotFoundError(name)

    monkeypatch.setattr(install, "distribution", missing)
    assert install_hint("demo") == f"pip install -e '{ROOT}[demo]'"


def test_a_verb_shows_the_command_for_the_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], groups_file: Path
) -> None:
    record(monkeypatch, {"url": ROOT.as_uri(), "dir_info": {"editable": True}})
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["score", "--data", str(groups_file), "--output", str(tmp_path / "out.jsonl"), "--reward", "math_verify"]
    assert main(words) == 1
    assert capsys.readouterr().err.strip().endswith(f"needs the package math-verify: pip install -e '{ROOT}[math]'")


def test_no_message_names_an_extra_by_hand() -> None:
    found = [
        path.name for path in (ROOT / "src").rglob("*.py") if re.search(r"pip install.*ncalign\[", path.read_text("utf-8"))
    ]
    assert found == ["install.py"]


def test_the_page_lists_every_extra_with_its_packages() -> None:
    # Python 3.10 has no tomllib.
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    packages = {extra: {re.match(r"[\w.-]+", line)[0] for line in lines} for extra, lines in extras.items()}
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "docs" / "install.md").read_text("utf-8"), re.MULTILINE)
    listed = {extra: set(re.findall("`([^`]+)`", text)) for extra, text in rows}
    assert listed.keys() == packages.keys()
    assert listed.pop("dev") == {"vllm", "pyproject.toml"}
    assert {extra: packages[extra] for extra in listed} == listed

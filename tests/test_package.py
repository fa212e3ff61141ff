"""What `pip install` gives a user: the built wheel holds the package, its typing marker, its data and true metadata."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "ncalign"
MIB = 2**20


def run(*command: str, cwd: Path, **env: str) -> str:
    """Output of a command; a failure shows all that it printed."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation the build uses the hatchling of this environment and needs no network.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "ncalign/py.typed" in held


def test_wheel_ships_the_demo_candidates_in_a_mebibyte(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        data = [item for item in archive.infolist() if item.filename.startswith("ncalign/demo/data/") and not item.is_dir()]
    assert data, "no file under ncalign/demo/data/ in the wheel"
    assert sum(item.file_size for item in data) <= MIB


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "ncalign"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Summary"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "ncalign" in str(metadata.get_payload())
    assert {"demo", "eval", "vllm", "dev"} <= set(metadata.get_all("Provides-Extra") or [])


def test_every_dependency_has_a_lower_bound(metadata: Message) -> None:
    runtime = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert runtime
    assert [line for line in runtime if ">=" not in line] == []


def test_entry_point(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "ncalign = ncalign.cli.app:main" in archive.read(name).decode()


def test_installed_wheel_is_importable_and_runs(wheel: Path, tmp_path: Path, metadata: Message) -> None:
    target = tmp_path / "site"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, *pip, "--target", str(target), str(wheel), cwd=tmp_path)
    found = run(
        sys.executable,
        "-c",
        "import ncalign, importlib.metadata as m; print(ncalign.__file__); print(m.version('ncalign'))",
        cwd=tmp_path,
        PYTHONPATH=str(target),
    ).splitlines()
    assert Path(found[0]).is_relative_to(target), "the working copy was imported instead of the installed wheel"
    asked = (
        "from importlib.resources import files; from ncalign.report.html import render; "
        "print(files('ncalign.report') / 'templates'); "
        "print(render('theory', statements=[], curves=[], charts={}, summary='<none>', verdict=None))"
    )
    page = run(sys.executable, "-c", asked, cwd=tmp_path, PYTHONPATH=str(target))
    assert Path(page.splitlines()[0]).is_relative_to(target)
    assert "<p>&lt;none&gt;." in page
    assert found[1] == metadata["Version"]
    program = "import sys; from ncalign.cli.app import main; sys.exit(main())"
    shown = run(sys.executable, "-c", program, "--help", cwd=tmp_path, PYTHONPATH=str(target))
    assert "train" in shown
    assert "demo" in shown


def test_the_container_is_made_of_what_is_there() -> None:
    """The files can't be built here; what they name is looked at."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src"}
    assert all((ROOT / name).exists() for name in copied)
    # The rest of the folder, virtual environments and runs among it, is not sent to the builder.
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*"
    assert {name.removeprefix("!") for name in ignored if name.startswith("!")} == copied
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (ROOT / ".devcontainer" / container["build"]["context"]).resolve() == ROOT
    assert any(f"USER {container['remoteUser']}" == line for line in lines)
    extras = set(re.findall(r"\.\[(\w+)\]", "\n".join(lines) + container["postCreateCommand"]))
    assert extras == {"demo", "dev"}
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in declared for extra in extras)

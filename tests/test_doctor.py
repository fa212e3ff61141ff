"""`ncalign doctor` and `ncalign completion`: what they say of the machine, and what a shell makes of the scripts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ncalign.cli import doctor
from ncalign.cli.app import main
from ncalign.cli.completion import run_completion
from ncalign.cli.config import CompletionConfig
from ncalign.cli.verbs import VERBS
from ncalign.core.install import install_pattern

ROOT = Path(__file__).resolve().parent.parent


def as_json(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main([*words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_doctor_says_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "doctor")
    assert found["packages"]["torch"] == {"version": torch.__version__, "needed": ">=2.9", "fits": True}
    assert found["problems"] == []
    assert "text" not in found
    if not torch.accelerator.is_available():
        # The suite's processor multiplies bf16 in 4 times float32's time.
        assert found["dtype_auto"] == {
            "device": "cpu",
            "precision": "float32",
            "reason": "bf16 products take 4x as long here",
        }
        assert found["gpus"] == []


def test_doctor_knows_every_extra(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    assert "qlora" in extras
    assert [name for name in extras if name != "dev"] == list(doctor.GIVES)
    assert set(as_json(capsys, "doctor")["extras"]) == set(doctor.GIVES)


def test_what_is_missing_or_too_old_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name in ("peft", "openai"):
            raise PackageNotFoundError(name)
        return {"numpy": "1.25.0", "anyio": "4.0.0"}.get(name, "99.0" if name != "transformers" else "5.5")

    needed = [
        "numpy>=1.26",
        "peft>=0.21",
        "transformers<6,>=5.1",
        "openai>=2.0; extra == 'server'",
        "anyio>=4; extra == 'server'",
    ]
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: [*needed, "other; sys_platform == 'none' and extra == 'gpu'"])
    listed = SimpleNamespace(get_all=lambda name: [extra for extra in doctor.GIVES if extra != "hub"])
    monkeypatch.setattr(doctor, "metadata", lambda name: listed)
    found = as_json(capsys, "doctor", code=1)
    assert found["problems"] == [
        "numpy>=1.26 is needed, and version 1.25.0 is there: pip install 'numpy>=1.26'",
        "peft>=0.21 is needed, and it is not installed: pip install 'peft>=0.21'",
    ]
    server = found["extras"]["server"]
    assert (server["installed"], server["missing"]) == (False, ["openai>=2.0"])
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"server is missing: {doctor.GIVES['server']} (needs openai>=2.0)\n" in printed
    assert f"gpu is missing: {doctor.GIVES['gpu']} (not for this system)\n" in printed
    assert (
        f"hub is missing: {doctor.GIVES['hub']} (ncalign was installed before this extra came: install it again)\n" in printed
    )
    assert printed.endswith("2 to fix\n")


def test_a_torch_that_cant_be_loaded_is_a_line_without_folders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> dict[str, Any]:
        raise OSError("/home/someone/lib/libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "_torch", broken)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "problem    torch can't be loaded: libcudart.so.12: cannot open shared object file\n" in printed
    assert "someone" not in printed


def test_doctor_names_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="A GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    assert doctor._gpu(0) == {"name": "A GPU", "memory_gib": 80.0, "compute_capability": "9.0"}
    found = {"gpus": [doctor._gpu(0)] * 2, "device": "cuda"}
    assert doctor._gpu_line(found) == ", ".join(["A GPU (80 GiB, compute capability 9.0)"] * 2)
    assert "nvidia-smi" in doctor._gpu_line({"gpus": [], "device": "cpu", "torch_built_for": "CUDA 12.8"})


def test_doctor_shows_no_folder_and_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hf_secret")
    main(["doctor"])
    main(["doctor", "--json"])
    printed = capsys.readouterr().out
    for hidden in ("hf_secret", str(Path.home()) + "/", str(ROOT), sys.prefix):
        assert hidden not in printed
    assert install_pattern().startswith("pip install ")


def test_doctor_loads_torch_and_no_transformers() -> None:
    code = (
        "import sys; from ncalign.cli.app import main; main(['doctor']); "
        "print(sorted({'torch', 'transformers', 'peft', 'pyarrow'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "['torch']"


# --- Completion ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    made = {}
    for shell in ("bash", "zsh", "fish"):
        made[shell] = folder / f"ncalign.{shell}"
        made[shell].write_text(str(run_completion(CompletionConfig(shell=shell))["text"]), encoding="utf-8")
    return made


def completed_by_bash(script: Path, line: str, folder: Path) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    program = (
        f"source {script}; COMP_WORDS=({' '.join(word or repr('') for word in words)}); COMP_CWORD={len(words) - 1}; "
        '_shtab_ncalign; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return sorted(done.stdout.split())


def completed_by_fish(script: Path, line: str, folder: Path) -> list[str]:
    program = f"source {script}; complete -C '{line}'"
    done = subprocess.run(["fish", "-c", program], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return sorted(found.partition("\t")[0] for found in done.stdout.splitlines())


@pytest.mark.parametrize(("shell", "completed"), [("bash", completed_by_bash), ("fish", completed_by_fish)])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ncalign tr", ["train"]),
        ("ncalign train --learning_ra", ["--learning_rate"]),
        ("ncalign train --head ", ["auto", "liger", "own"]),
        ("ncalign convert --on_bad_row ", ["error", "skip"]),
        ("ncalign completion ", ["bash", "fish", "zsh"]),
        ("ncalign convert --input gr", ["groups.jsonl"]),
        ("ncalign convert gr", ["groups.jsonl"]),
        ("ncalign generate --resu", []),
    ],
)
def test_a_shell_completes(
    shell: str, completed: Any, line: str, expected: list[str], scripts: dict[str, Path], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "groups.jsonl").touch()
    assert completed(scripts[shell], line, tmp_path) == sorted(expected)


def test_every_verb_is_in_every_script(scripts: dict[str, Path]) -> None:
    for script in scripts.values():
        words = set(re.findall(r"[\w-]+", script.read_text(encoding="utf-8")))
        assert {verb.name for verb in VERBS} <= words
        assert "no_resume" not in words  # a spelling that the help does not show


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_reads_its_script(shell: str, scripts: dict[str, Path]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(scripts[shell])], check=True, timeout=60)


def test_completion_on_the_command_line(capsys: pytest.CaptureFixture[str], scripts: dict[str, Path]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == scripts["zsh"].read_text(encoding="utf-8").rstrip("\n") + "\n"
    assert as_json(capsys, "completion", "fish")["shell"] == "fish"
    assert main(["completion", "csh"]) == 2
    assert capsys.readouterr().err == "error: --shell: found 'csh'; must be 'bash', 'zsh' or 'fish'; did you mean 'zsh'?\n"
    assert main(["completion"]) == 2
    assert "shell" in capsys.readouterr().err

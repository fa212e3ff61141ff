"""Every example in README.md and docs/ runs: Python and shell blocks are executed, YAML blocks are checked as configuration.

Each block has a fresh folder that holds ``model/`` (a tiny chat model), ``groups.jsonl`` (conversational groups with two to
four scored candidates) and ``prompts.jsonl`` (their prompts alone). What must not run here is marked ``console`` or ``text``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from pydantic import BaseModel

from conftest import group_row
from ncalign.adjust.config import AdjustConfig
from ncalign.audit.config import AuditConfig, CheckConfig
from ncalign.cli import settings
from ncalign.core.config import fields
from ncalign.data.config import ConvertConfig
from ncalign.demo.config import DemoConfig
from ncalign.generation.config import GenerateConfig
from ncalign.judging.config import AnswerConfig, EvaluateConfig
from ncalign.lab.config import LabConfig
from ncalign.online.config import OnlineConfig
from ncalign.rewards.config import ScoreConfig
from ncalign.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE_OF_MINUTES = ROOT / "docs" / "first-ten-minutes.md"
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)$")
REWARDS = ([1.0, 0.0], [0.1, 0.9, 0.4], [0.2, 0.0, 0.6, 1.0])
VERBS: dict[str, type[BaseModel]] = {
    "adjust": AdjustConfig,
    "answer": AnswerConfig,
    "audit": AuditConfig,
    "check": CheckConfig,
    "convert": ConvertConfig,
    "demo": DemoConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "lab": LabConfig,
    "on-mc-po": OnlineConfig,
    "online": OnlineConfig,
    "rewards": ScoreConfig,
    "score": ScoreConfig,
    "servers": GenerateConfig,
    "train": TrainConfig,
}


class Block(NamedTuple):
    """A fenced block of a page; ``line`` is that of its first line of text."""

    page: Path
    line: int
    language: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, with the indentation of their fence removed."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        opened = FENCE.match(lines[number])
        number += 1
        if opened is None:
            continue
        start = number
        while number < len(lines) and lines[number].strip() != opened["fence"]:
            number += 1
        assert number < len(lines), f"{page}:{start}: the block that opens here is not closed"
        indent = len(opened["indent"])
        language = opened["info"].split()[0].strip("{}.") if opened["info"].strip() else ""
        yield Block(page, start + 1, language, "\n".join(line[indent:] for line in lines[start:number]) + "\n")
        number += 1


def blocks_in(*languages: str) -> list[object]:
    """Test cases, one a block in these languages, named file:line."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        pytest.param(block, id=f"{block.page.relative_to(ROOT).as_posix()}:{block.line}")
        for page in pages
        for block in blocks_of(page)
        if block.language in languages
    ]


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """The folder in which a block runs."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    rows = [group_row(index, REWARDS[index % 3]) for index in range(12)]
    prompts = [{"id": row["id"], "prompt": row["prompt"], "candidates": []} for row in rows]
    for name, content in (("groups.jsonl", rows), ("prompts.jsonl", prompts)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return tmp_path


def execute(command: list[str], block: Block, folder: Path) -> None:
    """Run a block's program; whatever it wrote is shown when it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    where = f"{block.page.relative_to(ROOT)}:{block.line}"
    assert done.returncode == 0, f"{where} exited with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("block", blocks_in("python", "py"))
def test_python_block(block: Block, folder: Path) -> None:
    program = folder / "example.py"
    program.write_text(block.text, encoding="utf-8")
    execute([sys.executable, str(program)], block, folder)


@pytest.mark.parametrize("block", blocks_in("bash", "sh", "shell"))
def test_shell_block(block: Block, folder: Path) -> None:
    execute(["bash", "-euo", "pipefail", "-c", block.text], block, folder)


@pytest.mark.parametrize("block", blocks_in("yaml", "yml"))
def test_yaml_block(block: Block, tmp_path: Path) -> None:
    """A page of a verb shows that verb's configuration, every other page that of `train`; fragments are completed."""
    model = VERBS.get(block.page.stem, TrainConfig)
    file = tmp_path / "config.yaml"
    file.write_text(block.text, encoding="utf-8")
    written = yaml.safe_load(block.text)
    assert isinstance(written, dict), "a YAML block here is a configuration: mark anything else as text"
    missing = {name for name, field in fields(model).items() if field.is_required()} - written.keys()
    settings.load(model, file, {name: "elsewhere" for name in missing})


def test_six_commands_lead_from_a_clone_to_a_chat_with_a_model_aligned_on_ones_own_prompts(folder: Path) -> None:
    """The section runs as it stands but for the clone, its installation, the model's name and what is typed in the chat."""
    section = folder / "section.md"
    text = PAGE_OF_MINUTES.read_text(encoding="utf-8").partition("## Six commands\n")[2].partition("\n## ")[0]
    section.write_text(text, encoding="utf-8")
    prompts, reward, commands = blocks_of(section)
    (folder / "prompts.jsonl").write_text(prompts.text, encoding="utf-8")
    (folder / "reward.py").write_text(reward.text, encoding="utf-8")
    lines = commands.text.splitlines()
    assert all(line.startswith("$ ") for line in lines)
    typed = [line.removeprefix("$ ").replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model") for line in lines]
    assert len(typed) <= 6
    assert typed[0] == "git clone REPOSITORY ncalign"
    assert typed[1].startswith("python -m pip install ")
    assert [line.split()[1] for line in typed[2:]] == ["generate", "score", "train", "chat"]
    *work, chat = typed[2:]
    script = "\n".join([*work, f"echo 'Why is the sky blue?' | {chat} --max_new_tokens 8 --json > said.json"])
    execute(["bash", "-euo", "pipefail", "-c", script], commands._replace(page=PAGE_OF_MINUTES), folder)
    (turn,) = json.loads((folder / "said.json").read_text(encoding="utf-8"))["turns"]
    assert turn["typed"] == "Why is the sky blue?"
    assert turn["answers"][0]["tokens"] > 0


def test_blocks_are_found_with_their_line_and_without_their_indentation(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\nx = 1\n```\n- item\n\n    ```yaml title='t'\n    a:\n      b: 2\n    ```\n", encoding="utf-8"
    )
    assert list(blocks_of(page)) == [Block(page, 4, "python", "x = 1\n"), Block(page, 9, "yaml", "a:\n  b: 2\n")]


def test_readme_has_a_python_and_a_yaml_example() -> None:
    languages = {block.language for block in blocks_of(ROOT / "README.md")}
    assert {"python", "yaml"} <= languages

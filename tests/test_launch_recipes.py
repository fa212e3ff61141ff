"""Launch files of `recipes/`: accelerate reads them, and its launcher gets the processes that they say."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
KINDS = {"one-gpu": ("NO", 1), "ddp-8-gpus": ("MULTI_GPU", 8), "fsdp2-8-gpus": ("FSDP", 8), "fsdp2-two-nodes": ("FSDP", 16)}


def test_accelerate_reads_its_files() -> None:
    files = sorted((RECIPES / "accelerate").glob("*.yaml"))
    assert {file.stem for file in files} == KINDS.keys()
    for file in files:
        found = load_config_from_file(str(file))
        assert (str(found.distributed_type.value), found.num_processes) == KINDS[file.stem]
        assert found.mixed_precision == "no"
        if found.distributed_type.value == "FSDP":
            assert found.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize(("name", "nodes"), [("one-node.sh", 1), ("fsdp2-two-nodes.sh", 2)])
def test_slurm_scripts_start_a_launcher_on_each_node(name: str, nodes: int, tmp_path: Path) -> None:
    commands = {
        "scontrol": "echo first; sleep .1; echo second",
        "srun": f'shift; for node in $(seq 0 {nodes - 1}); do SLURM_NODEID=$node "$@"; done',
        "accelerate": 'echo "$@"',
    }
    for command, does in commands.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / command).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "nodes"}
    done = subprocess.run(
        ["bash", str(RECIPES / "slurm" / name), "a run.yaml"], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == nodes
    for node, line in enumerate(lines):
        assert line.endswith("-m ncalign train --config a run.yaml --resume")
        assert (RECIPES.parent / line.split()[2]).is_file()
        assert nodes == 1 or f"--machine_rank {node} --main_process_ip first" in line

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


def test_the_online_script_trains_on_one_node_and_samples_on_the_other(tmp_path: Path) -> None:
    commands = {
        "scontrol": "echo first; echo second",
        # What runs where, and then that.
        "srun": 'while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && node=${1#*=}; shift; done; NODE=$node "$@"',
        "served": f'echo "$NODE $CUDA_VISIBLE_DEVICES $VLLM_SERVER_DEV_MODE $@" >> "{tmp_path}/servers"; sleep 3',
        "curl": f'sleep .1; [[ $(wc -l < "{tmp_path}/servers") == 8 ]]',
        "accelerate": 'echo "$NODE $@"',
        "sleep": 'exec /bin/sleep "${1/5/0.1}"',
    }
    for command, does in commands.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / command).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "nodes", "VLLM": "served"}
    script = ["bash", str(RECIPES / "slurm" / "online-two-nodes.sh"), "a run.yaml", "a model"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    urls = ",".join(f"http://second:800{gpu}/v1" for gpu in range(8))
    (line,) = done.stdout.splitlines()
    assert line.startswith(
        "first launch --config_file recipes/accelerate/fsdp2-8-gpus.yaml -m ncalign online --config a run.yaml "
    )
    assert line.endswith(f"--generator server --server.model policy --server.base_urls {urls} --resume")
    servers = sorted((tmp_path / "servers").read_text().splitlines())
    common = "--enable-lora --max-lora-rank 64"
    assert servers == [f"second {gpu} 1 serve a model --served-model-name policy --port 800{gpu} {common}" for gpu in range(8)]

"""vLLM itself, servers and in one process with ncalign, in the environment that `make test-vllm` sets up beside this one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import build_tokenizer
from ncalign.cli.app import main
from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group, read_groups
from ncalign.generation.base import SamplingParams
from ncalign.generation.config import ServerConfig
from ncalign.generation.remote import ServerGenerator
from ncalign.generation.token_prompts import TokenPrompts
from ncalign.model.encoding import Encoder
from ncalign.model.policy import load_policy
from ncalign.online.artefacts import SAMPLES, read_artefact
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.rewards.config import JudgeConfig
from ncalign.rewards.judge import JudgeReward

PYTHON = os.environ.get("NCALIGN_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="`make test-vllm` sets up vLLM and runs these")

STARTS_WITHIN = 600.0
QUESTIONS: list[list[dict[str, str]]] = [[{"role": "user", "content": f"What is {i} + {i + 2}?"}] for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a shape that vLLM takes on a CPU, prompts, and a reward."""
    folder, tokenizer = tmp_path_factory.mktemp("vllm"), build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.05,
        # Its CPU build keeps a packed copy of a tied head, which no reload reaches.
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"id": str(i), "prompt": question} for i, question in enumerate(QUESTIONS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text("def brief(prompt, completions):\n    return [-len(text) for text in completions]\n")
    return folder


def environment() -> dict[str, str]:
    library = Path(PYTHON).parent.parent / "lib" / "libiomp5.so"
    cpu = {"LD_PRELOAD": str(library), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"} if library.is_file() else {}
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**own, **cpu, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


@contextmanager
def serving(
    model: Path, options: Sequence[str] = ("--enable-lora", "--max-lora-rank", "32"), path: str = ""
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", *options]
    served = ["--model", str(model), "--served-model-name", "m", "--port", str(port)]
    with (model.parent / f"server-{port}.log").open("wb") as log:
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *served, *options]
        variables = environment() | ({"PYTHONPATH": path} if path else {})
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + STARTS_WITHIN
            while process.poll() is None and time.monotonic() < until:
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                except OSError:
                    time.sleep(1)
                else:
                    break
            else:
                pytest.fail(f"vLLM did not start: {Path(log.name).read_text()[-2000:]}")
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            os.killpg(process.pid, 9) if process.poll() is None else None
            process.wait()


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A server, whose adapters change, and whose weights stay."""
    with serving(folder / "model") as (url, _):
        yield url


def config(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "output_dir": str(output),
        "reward": f"{folder / 'rewards.py'}:brief",
        "num_samples": 4,
        "max_new_tokens": 12,
        "max_length": 128,
        "dtype": "float32",
        "scoring_dtype": "float32",
        "learning_rate": 3e-2,
        "warmup_ratio": 0.0,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "regenerate_every": 2,
        # Of one engine's rounding.
        "probe_tolerance": 1e-3,
        "report_to": [],
        **changes,
    }


def on_server(folder: Path, output: Path, url: str, **changes: Any) -> OnlineConfig:
    server = {"base_url": url, "model": "m"}
    return OnlineConfig.model_validate(config(folder, output, generator="server", server=server, **changes))


def rounds(output: Path) -> list[Any]:
    found = [read_artefact(file, SAMPLES) for file in sorted(output.glob("rounds/*/generated-*.json"))]
    assert len(found) == 2
    assert all(len(row) == 4 for chunk in found for row in chunk)
    return found


def test_sampled_tokens_are_those_that_training_scores(url: str, folder: Path) -> None:
    policy = load_policy(str(folder / "model"))
    tokens = TokenPrompts(policy.tokenizer)
    generator = ServerGenerator(ServerConfig(base_url=url, model="m"), tokens=tokens, progress=False)
    prompts: list[Any] = [*QUESTIONS, "a plain string", [*QUESTIONS[0], {"role": "assistant", "content": "It is"}]]
    found = generator.generate(prompts, num_samples=4, params=SamplingParams(60), seed=1)
    assert len({one.text for row in found for one in row}) == 4 * len(prompts)
    encoder = Encoder(policy.tokenizer, max_length=256)
    for prompt, row in zip(prompts, found, strict=True):
        asked = encoder.encode(
            Group(id="g", prompt=prompt, candidates=[Candidate("a", reward=1.0), Candidate("b", reward=0.0)])
        )
        for one in row:
            assert one.token_ids is not None
            assert one.logprob is not None
            ids = torch.tensor([[*asked.prompt, *one.token_ids]])
            with torch.no_grad():
                logprobs = policy.model(ids).logits[0].log_softmax(-1)
            start = len(asked.prompt)
            own = sum(float(logprobs[start + i - 1, token]) for i, token in enumerate(one.token_ids))
            assert own == pytest.approx(one.logprob, abs=1e-4 * len(one.token_ids))
            assert one.finished == (one.token_ids[-1] == policy.tokenizer.eos_token_id) or len(one.token_ids) == 60


def test_generate_and_a_judge(url: str, folder: Path, tmp_path: Path) -> None:
    words = [
        "generate",
        "--prompts",
        str(folder / "prompts.jsonl"),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--num_samples",
        "3",
    ]
    words += ["--server.base_url", url, "--server.model", "m", "--max_new_tokens", "12"]
    assert main(words) == 0
    groups = list(read_groups(tmp_path / "out.jsonl"))
    assert len({str(c.completion) for group in groups for c in group.candidates}) == 3 * len(QUESTIONS)
    judge = JudgeReward(JudgeConfig(base_url=url, model="m", max_tokens=8), Store(tmp_path / "verdicts"))
    rewards = judge.score(groups[0])
    # A model of random weights says nothing that is a verdict: each is asked for, read, and missing.
    assert len(rewards) == judge.account.asked == 3
    assert sum(reward is None for reward in rewards) == judge.account.missing.total()


def test_an_adapter_of_any_rank_is_pushed_before_each_round(url: str, folder: Path, tmp_path: Path) -> None:
    run_online(on_server(folder, tmp_path / "run", url, lora={"r": 24}))
    first, second = rounds(tmp_path / "run")
    assert first != second
    assert all(one["token_ids"] for chunk in (first, second) for row in chunk for one in row)


def test_pushed_folders_and_stale_weights(folder: Path, tmp_path: Path) -> None:
    with serving(folder / "model") as (url, _):
        run_online(on_server(folder, tmp_path / "folder", url, push="folder"))
        first, second = rounds(tmp_path / "folder")
        assert first != second
        # The server holds what the run above trained.
        with pytest.raises(ValueError, match=r"round 1: server \S+ and policy hold different weights"):
            run_online(on_server(folder, tmp_path / "stale", url, push="none", server_prompts="token_ids"))


def test_weights_are_sent_to_two_servers_by_vllm_s_own_transfer(folder: Path, tmp_path: Path) -> None:
    # There is no GPU for NCCL: a plugin has vLLM's own engines send over TCP, from and to CPUs.
    about = tmp_path / "plugin" / "over_tcp-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: over-tcp\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nover_tcp = vllm_over_tcp:register\n")
    path = f"{about.parent}:{Path(__file__).parent}"
    options = ("--weight-transfer-config.backend", "nccl")
    with serving(folder / "model", options, path) as (one, _), serving(folder / "model", options, path) as (two, _):
        server = {"base_urls": [one, two], "model": "m"}
        given = config(folder, tmp_path / "run", generator="server", server=server, push="nccl", ddp_timeout=120)
        (tmp_path / "run.json").write_text(json.dumps(given))
        command = [PYTHON, str(Path(__file__).with_name("vllm_over_tcp.py")), "online", "--config", str(tmp_path / "run.json")]
        done = subprocess.run(command, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        said = [urlopen(url.replace("/v1", "/weight_info")).read() for url in (one, two)]
    assert said[0] == said[1]
    assert b"run-rounds-" in said[0]
    first, second = rounds(tmp_path / "run")
    assert first != second


def test_a_server_that_takes_no_weights_is_told_at_once(url: str, folder: Path, tmp_path: Path) -> None:
    given = config(folder, tmp_path / "run", generator="server", server={"base_url": url, "model": "m"}, push="nccl")
    (tmp_path / "run.json").write_text(json.dumps(given))
    command = [PYTHON, str(Path(__file__).with_name("vllm_over_tcp.py")), "online", "--config", str(tmp_path / "run.json")]
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment() | path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"push: nccl: server {url}: status 500" in done.stderr
    assert "--weight-transfer-config" in done.stderr


def test_a_round_on_two_servers_of_which_one_is_killed(
    url: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(i), "prompt": [{"role": "user", "content": f"What is {i} + {i + 2}?"}]} for i in range(48)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(folder / "model") as (other, process):
        # The first chunk is scored while the next is sampled.
        (tmp_path / "rewards.py").write_text(
            "import contextlib, os\n"
            "def brief(prompt, completions):\n"
            "    with contextlib.suppress(ProcessLookupError):\n"
            f"        os.killpg({process.pid}, 9)\n"
            "    return [-len(text) for text in completions]\n"
        )
        changes = {"data": str(tmp_path / "prompts.jsonl"), "reward": f"{tmp_path / 'rewards.py'}:brief", "lora": {"r": 8}}
        server = {"base_urls": [other, url], "model": "m", "max_concurrency": 2, "max_retries": 3}
        given = config(folder, tmp_path / "run", generator="server", server=server, chunk_size=8, drift_prompts=0, **changes)
        run_online(
            OnlineConfig.model_validate({**given, "max_steps": 6, "regenerate_every": 6, "per_device_train_batch_size": 8})
        )
        assert process.wait() == -9
    assert f"server {other}" in (said := capsys.readouterr().err)
    assert "it is set aside, and what it was asked is asked elsewhere" in said
    files = sorted((tmp_path / "run").glob("rounds/000/generated-*.json"))
    answered = [row for file in files for row in read_artefact(file, SAMPLES)]
    assert [len(row) for row in answered] == [4] * 48
    assert len({tuple(one["token_ids"]) for row in answered for one in row}) == 4 * 48


@pytest.mark.parametrize("push", ["lora", "folder"])
def test_in_one_process_with_a_model_that_is_an_adapter(push: str, folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    if push == "lora":
        answers = [{"completion": [{"role": "assistant", "content": text}], "reward": len(text)} for text in ("a", "bb")]
        rows = [{"id": str(i), "prompt": question, "candidates": answers} for i, question in enumerate(QUESTIONS)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["train", "--model", str(folder / "model"), "--data", str(tmp_path / "pairs.jsonl"), "--lora.r", "4"]
        words += ["--output_dir", str(tmp_path / "trained"), "--max_steps", "2", "--learning_rate", "0.03"]
        assert main([*words, "--report_to", "none", "--per_device_train_batch_size", "4"]) == 0
        adapter = tmp_path / "trained" / "model"
    changes = {"lora": {"r": 24}, "model": str(adapter)} if push == "lora" else {}
    given = config(folder, tmp_path / "run", generator="vllm", push=push, **changes)
    (tmp_path / "run.json").write_text(json.dumps(given))
    command = [PYTHON, "-m", "ncalign", "online", "--config", str(tmp_path / "run.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = rounds(tmp_path / "run")
    assert first != second

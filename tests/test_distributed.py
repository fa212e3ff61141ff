"""Two processes on one machine (gloo): DDP and FSDP2 train the model that one process trains, and stop and resume as it does.

accelerate shards on accelerators only, so that its FSDP2 preparation is asked for here by telling its state that FSDP2 was
launched: what runs is accelerate's own wrapping and torch's own sharding, on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conftest import build_model, build_tokenizer, group_row, relative_distance, weights
from ncalign.training.checkpoint import find_checkpoints
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training
from test_moe import EXPERTS, moe_folder

Config = Callable[..., TrainConfig]

DRIVER = """
import gc, json, os, signal, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
import torch
from live_memory import LiveMemory
from ncalign.cli import app as cli
from ncalign.model import attention
from ncalign.model.logprobs import base_causal_model
from ncalign.training import export, loading, loop, peers, train as run
wish = json.loads(sys.argv[1])
rank = int(os.environ["RANK"])
plain_accelerator, plain_step, plain_folder = run.make_accelerator, loop.Loop.step, run._reference_folder

def sharded_accelerator(config):
    accelerator = plain_accelerator(config)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    return accelerator

def step(self, number):
    if wish.get("sharded"):
        model = self.engine.model
        layers = base_causal_model(self.engine.inner.model).model.layers
        assert isinstance(model, FSDPModule) and all(isinstance(layer, FSDPModule) for layer in layers)
        # A forward pass without gradients may have left the root's own weights gathered.
        assert all(isinstance(p, DTensor) for layer in layers for p in layer.parameters())
    found = measured_step(self, number) if "measure" in wish else plain_step(self, number)
    if "timeout" in wish:
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == wish["timeout"]
    if number + 1 == wish.get("kill_after"):
        os.kill(os.getpid(), signal.SIGKILL)
    if number + 1 == wish.get("fail_after") and rank == 1:
        raise ValueError("the second process has a problem of its own")
    return found

def measured_step(self, number):
    with LiveMemory() as memory:
        found = plain_step(self, number)
    with open(f"{wish['measure']}-{rank}.jsonl", "a") as file:
        print(json.dumps({"peak": memory.peak, "kept": memory.now}), file=file)
    return found

if wish.get("adapter_alone"):
    plain_gather = export.get_model_state_dict
    def gathered(model, **fields):
        found = plain_gather(model, **fields)
        assert all("lora_" in name for name in found), sorted(found)
        return found
    export.get_model_state_dict = gathered
if wish.get("own_folders"):
    peers.PATIENCE = 0.3
    os.mkdir(f"node {rank}")
    os.chdir(f"node {rank}")
if wish.get("blind") and rank:
    run.find_checkpoints, run.finished_results = lambda folder: [], lambda config: None
if wish.get("own_caches"):
    run._reference_folder = lambda config, prepared: plain_folder(
        config.model_copy(update={"cache_dir": config.cache_dir / str(rank)}), prepared
    )
if wish.get("other_data") and rank:
    plain_load = run.load_groups
    def shortened(*args, **fields):
        loaded = plain_load(*args, **fields)
        loaded.groups.pop()
        return loaded
    run.load_groups = shortened
if wish.get("wrong") and rank:
    plain_mask = attention._causal_mask
    def mask(segments, length, prompt, reach, device):
        found = plain_mask(segments, length, prompt, reach, device).clone()
        found[:, : prompt // 2] = False
        return found
    attention._causal_mask = mask
loop.Loop.step = step
if wish.get("sharded") and rank and wish.get("once", True):
    def load_policy(*args, **fields):
        raise AssertionError("the second process reads weights")
    loading.load_policy = load_policy
if wish.get("sharded"):
    run.make_accelerator = sharded_accelerator
code = cli.main(sys.argv[2:])
if wish.get("collect"):
    # Freed here by DDP, the group would wait for its threads with Python's lock held: now and then, for ever.
    gc.collect()
    assert not any(type(found) is DistributedDataParallel for found in gc.get_objects())
    assert any("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
    assert not torch.distributed.is_initialized()
sys.exit(code)
"""


class Done(NamedTuple):
    """A finished launch: exit code, and what was written to stderr."""

    code: int
    errors: str


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, write_jsonl: Callable[..., Path]) -> Config:
    """A float64 run of the tiny model; two processes of 4 groups see the batches that one process of 8 sees.

    Every second step and the evaluation have an odd number of groups: one process has fewer than the other.
    """
    rewards = [[1.0, 0.0], [0.1, 0.9, 0.4], [0.2, 0.0, 0.6, 1.0]]
    rows = [group_row(index, rewards[index % 3]) for index in range(14)]
    data, held_out = write_jsonl(rows[:11], "data.jsonl"), write_jsonl(rows[11:], "held_out.jsonl")

    def make(name: str, *, processes: int = 2, **fields: Any) -> TrainConfig:
        values = {
            "model": str(tiny_model_dir),
            "data": data,
            "eval_data": held_out,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / f"cache of {name}",
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8 // processes,
            "num_train_epochs": 3,
            "dtype": "float64",
            "report_to": (),
        }
        return TrainConfig.model_validate(values | fields)

    return make


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Done]:
    """``launch(config, processes=2, sharded=…, kill_after=…, fail_after=…)`` runs `ncalign train` under torchrun."""

    def start(config: TrainConfig, *, processes: int = 2, **wish: Any) -> Done:
        (tmp_path / "driver.py").write_text(DRIVER)
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["driver.py", json.dumps(wish), "train", "--config", str(file)]
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        return Done(done.returncode, done.stderr)

    return start


def logged(config: TrainConfig) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def assert_same_run(alone: TrainConfig, together: TrainConfig) -> None:
    """Two float64 runs agree up to the order of sums: losses, gradient norms and weights."""
    assert relative_distance(weights(alone.output_dir), weights(together.output_dir)) <= 1e-12
    for expected, found in zip(logged(alone), logged(together), strict=True):
        assert found.keys() == expected.keys()
        # Not the accuracies: before the first step only rounding ranks the implicit rewards.
        for name in {"loss", "aux_loss", "grad_norm", "logps/chosen", "eval/loss", "eval/rewards/margins"} & found.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-9)


@pytest.fixture
def tied_model_dir(tmp_path: Path) -> Path:
    """The tiny model with one matrix for embeddings and head."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.fixture
def wide_model_dir(tmp_path: Path) -> Path:
    """A model of eight layers whose weights take far more memory than the activations of a few sentences."""
    tokenizer = build_tokenizer()
    config = build_model(tokenizer).config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.initializer_range = 128, 512, 8, 0.02
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sharded", "fields"),
    [
        ("mixtral", False, {}),
        ("olmoe", True, {}),
        ("qwen3_moe", True, {"activation_checkpointing": True}),
        ("qwen3_moe", False, {"lora": {"r": 4, "target_parameters": EXPERTS}}),
        ("mixtral", True, {"lora": {"r": 4, "target_parameters": EXPERTS}}),
    ],
    ids=["replicated", "sharded", "sharded checkpointed", "replicated adapter on experts", "sharded adapter on experts"],
)
def test_experts_and_their_router_loss_equal_one_process(
    config: Config, launch: Callable[..., Done], tmp_path: Path, name: str, sharded: bool, fields: dict[str, Any]
) -> None:
    # The router loss is a pass's: one group in each makes them the same in both runs. It weighs enough to be seen.
    fields = fields | {"max_tokens_per_batch": 1, "router_aux_loss_coef": 0.5, "max_steps": 3}
    fields["model"] = moe_folder(name, tmp_path / "moe")
    alone, together = config("alone", processes=1, **fields), config("together", **fields)
    run_training(alone)
    done = launch(together, sharded=sharded)
    assert done.code == 0, done.errors
    assert_same_run(alone, together)
    assert all(row["aux_loss"] > 1.0 for row in logged(together) if "loss" in row)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_where_one_process_computes_something_else_on_shared_prompts_all_pad(
    config: Config, launch: Callable[..., Done], sharded: bool
) -> None:
    alone, together = config("alone", processes=1, share_prompts=False), config("together")
    run_training(alone)
    done = launch(together, sharded=sharded, wrong=True)
    assert done.code == 0, done.errors
    assert done.errors.count("since prompts can't be shared here: log-probs differ by ") == 1
    assert_same_run(alone, together)


@pytest.mark.slow
class TestSharded:
    """FSDP2: each process holds its part of every weight."""

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_tokens_per_batch": 1},
            {"activation_checkpointing": True, "objective": {"name": "nca"}},
            {"lora": {"r": 4}},
            {"lora": {"r": 4}, "merge": True},
            {"objective": {"name": "mc_po", "proposals": "last_visit", "acceptance": True}},
        ],
        ids=["all weights", "accumulation", "activation checkpointing", "adapter", "merged adapter", "last visits"],
    )
    def test_equals_one_process(self, config: Config, launch: Callable[..., Done], fields: dict[str, Any]) -> None:
        alone = config("alone", processes=1, **{k: v for k, v in fields.items() if k in ("objective", "lora", "merge")})
        together = config("together", **fields)
        run_training(alone)
        done = launch(together, sharded=True)
        assert done.code == 0, done.errors
        assert_same_run(alone, together)

    def test_tied_weights_stay_tied_and_are_saved_once(
        self, config: Config, launch: Callable[..., Done], tied_model_dir: Path
    ) -> None:
        alone = config("alone", processes=1, model=str(tied_model_dir))
        together = config("together", model=str(tied_model_dir))
        run_training(alone)
        done = launch(together, sharded=True)
        assert done.code == 0, done.errors
        assert "lm_head.weight" not in weights(together.output_dir)
        assert_same_run(alone, together)

    def test_exported_folders_open(self, config: Config, launch: Callable[..., Done]) -> None:
        whole, adapter = config("whole", dtype="float32"), config("adapter", dtype="float32", lora={"r": 4})
        for run in (whole, adapter):
            done = launch(run, sharded=True, adapter_alone=run is adapter)
            assert done.code == 0, done.errors
        base = AutoModelForCausalLM.from_pretrained(whole.model, dtype=torch.float32)
        tokens = torch.arange(5, 25).unsqueeze(0)
        with torch.no_grad():
            before = base(tokens).logits
            after = AutoModelForCausalLM.from_pretrained(whole.output_dir / "model", dtype=torch.float32)(tokens).logits
            adapted = PeftModel.from_pretrained(base, adapter.output_dir / "model")(tokens).logits
        assert float((after - before).abs().max()) > 1e-2
        assert float((adapted - before).abs().max()) > 1e-2

    def test_bfloat16_base_under_a_float32_adapter(self, config: Config, launch: Callable[..., Done]) -> None:
        # One sharded group then holds weights of both precisions.
        fields = {"lora": {"r": 4}, "dtype": "bfloat16"}
        alone, together = config("alone", processes=1, **fields), config("together", **fields)
        run_training(alone)
        done = launch(together, sharded=True)
        assert done.code == 0, done.errors
        assert {tensor.dtype for tensor in weights(together.output_dir).values()} == {torch.float32}
        # Rounding of 2^-9 in the activations moves some of AdamW's first steps, which follow the gradient's sign.
        assert relative_distance(weights(alone.output_dir), weights(together.output_dir)) <= 0.02
        assert logged(together)[0]["eval/loss"] == pytest.approx(math.log(2), abs=0.01)

    @pytest.mark.parametrize(
        "fields", [{}, {"dtype": "float32", "scoring_dtype": "bfloat16"}], ids=["bfloat16", "scored in bfloat16"]
    )
    def test_memory_of_a_process(
        self, config: Config, launch: Callable[..., Done], wide_model_dir: Path, tmp_path: Path, fields: dict[str, Any]
    ) -> None:
        settings = {"model": str(wide_model_dir), "dtype": "bfloat16", "max_steps": 2, "activation_checkpointing": True}
        settings |= {"gradient_accumulation_steps": 2, "max_tokens_per_batch": 1, **fields}
        steps = {}
        for processes, batch in ((1, 4), (2, 2)):
            run = config(f"of {processes}", **settings, per_device_train_batch_size=batch)
            done = launch(run, processes=processes, sharded=processes > 1, measure=str(tmp_path / f"of {processes}"))
            assert done.code == 0, done.errors
            lines = (tmp_path / f"of {processes}-0.jsonl").read_text().splitlines()
            # The second step has the moments of the first.
            steps[processes] = json.loads(lines[1])
        num_weights = sum(tensor.numel() for tensor in weights(run.output_dir).values())
        # Weights, their gradients and two moments in float32.
        assert steps[1]["peak"] >= 16 * num_weights
        assert steps[2]["peak"] <= 0.6 * steps[1]["peak"]
        # After it, half of the weights and the moments, and nothing that was gathered or cast.
        assert steps[2]["kept"] == pytest.approx(6 * num_weights, rel=0.01)

    @pytest.mark.parametrize("fields", [{}, {"merge": True}], ids=["adapter", "merged adapter"])
    def test_weights_in_4_bits_equal_one_process(
        self, config: Config, launch: Callable[..., Done], fields: dict[str, Any]
    ) -> None:
        assert_same_quantized_run(config, launch, {"sharded": True, "once": False}, fields)

    @pytest.mark.parametrize(
        "fields",
        [{}, {"lora": {"r": 4, "dropout": 0.1}}, {"lora": {"r": 4}, "quantization": {}}],
        ids=["all weights", "adapter", "adapter on 4 bits"],
    )
    def test_killed_and_resumed_is_bitwise_the_same(
        self, config: Config, launch: Callable[..., Done], fields: dict[str, Any]
    ) -> None:
        assert_bitwise_resume(config, launch, {"sharded": True, "once": "quantization" not in fields}, fields)


def assert_same_quantized_run(
    config: Config, launch: Callable[..., Done], wish: dict[str, Any], fields: dict[str, Any]
) -> None:
    """An adapter on 4-bit weights, which compute in float32 at most: two processes agree with one to its rounding."""
    settings = {"dtype": "float32", "lora": {"r": 4}, "quantization": {}, "max_steps": 3, **fields}
    alone, together = config("alone", processes=1, **settings), config("together", **settings)
    run_training(alone)
    done = launch(together, **wish)
    assert done.code == 0, done.errors
    assert relative_distance(weights(alone.output_dir), weights(together.output_dir)) <= 1e-4
    for expected, found in zip(logged(alone), logged(together), strict=True):
        for name in {"loss", "eval/loss"} & found.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert logged(together)[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_samples_and_the_best_model_equal_one_process(config: Config, launch: Callable[..., Done], sharded: bool) -> None:
    fields = {"sample_steps": 2, "sample_temperature": 1.0, "sample_max_new_tokens": 6, "num_sample_prompts": 3}
    fields |= {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "logps/chosen", "learning_rate": 3e-2}
    alone, together = config("alone", processes=1, **fields), config("together", **fields)
    best = run_training(alone)["best"]
    assert best["step"] < 6
    done = launch(together, sharded=sharded)
    assert done.code == 0, done.errors
    assert_same_run(alone, together)
    assert json.loads((together.output_dir / "results.json").read_text())["best"]["step"] == best["step"]
    rows = [
        [json.loads(line) for line in (run.output_dir / "samples.jsonl").read_text().splitlines()] for run in (alone, together)
    ]
    assert [row["step"] for row in rows[0]] == [step for step in (0, 2, 4, 6) for _ in range(3)]
    for expected, found in zip(*rows, strict=True):
        assert found.pop("logprob") == pytest.approx(expected.pop("logprob"), rel=1e-9)
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
def test_resumed_on_another_number_of_processes(config: Config, launch: Callable[..., Done], sharded: bool) -> None:
    settings = {"save_steps": 2, "save_total_limit": 9}
    alone, killed = config("alone", processes=1, **settings), config("killed", **settings)
    run_training(alone)
    assert launch(killed, sharded=sharded, kill_after=3).code != 0
    shutil.copytree(killed.output_dir, on_one := killed.output_dir.with_name("on one"))
    # Four go on from two, and one from four.
    resumed = killed.model_copy(update={"resume": True})
    assert launch(resumed, processes=4, sharded=sharded, kill_after=5).code != 0
    shutil.copytree(killed.output_dir, from_four := killed.output_dir.with_name("from four"))
    done = launch(resumed, processes=4, sharded=sharded)
    assert done.code == 0, done.errors
    assert "the run goes on with 8 groups in a step, as it began, now split over 4 process(es)" in done.errors
    assert_same_run(alone, killed)
    for output_dir in (on_one, from_four):
        found = resumed.model_copy(update={"output_dir": output_dir})
        run_training(found)
        assert_same_run(alone, found)


def assert_bitwise_resume(config: Config, launch: Callable[..., Done], wish: dict[str, Any], fields: dict[str, Any]) -> None:
    """A run whose two processes are killed after step 5 of 6 and resumed from step 4 ends as one that was left alone."""
    settings = {"save_steps": 2, "eval_steps": 2, "dtype": "float32", **fields}
    whole, killed = config("whole", **settings), config("killed", **settings)
    done = launch(whole, **wish)
    assert done.code == 0, done.errors
    assert launch(killed, kill_after=5, **wish).code != 0
    assert not (killed.output_dir / "model").exists()
    assert [folder.name for folder in find_checkpoints(killed.output_dir)] == ["step-00000002", "step-00000004"]
    # The second process's disk shows no checkpoint.
    again = launch(killed.model_copy(update={"resume": True}), blind=True, **wish)
    assert again.code == 0, again.errors
    first, second = weights(whole.output_dir), weights(killed.output_dir)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged(whole) == logged(killed)
    suffixes = {path.suffix for folder in find_checkpoints(killed.output_dir) for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


class TestReplicated:
    """DDP: each process holds every weight."""

    @pytest.mark.slow
    def test_weights_in_4_bits_equal_one_process(self, config: Config, launch: Callable[..., Done]) -> None:
        assert_same_quantized_run(config, launch, {}, {})

    @pytest.mark.slow
    def test_tied_weights_and_checkpoints(self, config: Config, launch: Callable[..., Done], tied_model_dir: Path) -> None:
        alone = config("alone", processes=1, model=str(tied_model_dir), save_steps=2)
        together = config("together", model=str(tied_model_dir), save_steps=2)
        run_training(alone)
        done = launch(together)
        assert done.code == 0, done.errors
        assert_same_run(alone, together)
        for mine, theirs in zip(find_checkpoints(alone.output_dir), find_checkpoints(together.output_dir), strict=True):
            saved = [load_file(folder / "optimizer.safetensors") for folder in (mine, theirs)]
            assert saved[0].keys() == saved[1].keys()

    @pytest.mark.slow
    def test_killed_and_resumed_is_bitwise_the_same(self, config: Config, launch: Callable[..., Done]) -> None:
        assert_bitwise_resume(config, launch, {}, {"lora": {"r": 4, "dropout": 0.1}})

    def test_processes_may_have_caches_of_their_own(self, config: Config, launch: Callable[..., Done]) -> None:
        alone, together = config("alone", processes=1), config("together", ddp_timeout=77)
        # One node has run this before and the other has not.
        run_training(alone.model_copy(update={"cache_dir": together.cache_dir / "0"}))
        done = launch(together, own_caches=True, timeout=77, collect=sys.platform == "linux")
        assert done.code == 0, done.errors
        assert_same_run(alone, together)

    def test_more_processes_than_groups_in_a_step_are_refused(self, config: Config, launch: Callable[..., Done]) -> None:
        run = config("run", processes=8, max_steps=2, save_steps=1)
        assert launch(run, kill_after=2).code != 0
        (folder,) = find_checkpoints(run.output_dir)
        state = json.loads((folder / "state.json").read_text())
        assert state["groups_per_step"] == 2
        done = launch(run.model_copy(update={"resume": True}), processes=3)
        assert done.code == 1
        assert "2 groups in a step, which can't be split over 3 processes: resume with at most 2" in done.errors

    @pytest.mark.slow
    def test_a_folder_that_is_not_shared_is_refused(self, config: Config, launch: Callable[..., Done]) -> None:
        done = launch(config("run", output_dir="runs"), own_folders=True)
        assert done.code == 1
        said = r"error: output_dir runs is not .*process 1 \(on .*output_dir must be on a file system that all nodes share"
        assert re.search(said, done.errors)

    @pytest.mark.slow
    def test_nodes_that_read_other_data_are_refused(self, config: Config, launch: Callable[..., Done]) -> None:
        done = launch(config("run"), other_data=True)
        assert done.code == 1
        assert re.search(r"error: process 1 \(on .*\) reads something else than process 0 .*: data.* differ", done.errors)

    @pytest.mark.slow
    def test_an_error_of_one_process_ends_all_and_is_said_once(self, config: Config, launch: Callable[..., Done]) -> None:
        done = launch(config("run", save_steps=1), fail_after=2)
        assert done.code == 1
        assert done.errors.count("[rank 1] error: the second process has a problem of its own\n") == 1
        others = re.findall(r"^error: (.*)$", done.errors, re.M)
        # The first process may notice that its peer has gone before torchrun stops it.
        assert set(others) <= {"another process of this run has stopped; its own message says why"}
        assert "Traceback" not in done.errors.split("torch/distributed/elastic", maxsplit=1)[0]


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "note: accelerate"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ""),
    ],
    ids=["FSDP without an accelerator", "accumulation"],
)
def test_what_a_launcher_asks_for_beside_ncaligns_configuration(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    found: str,
) -> None:
    plain, launched = config("plain", max_steps=1), config("launched", max_steps=1)
    run_training(plain)
    for name in (*environment, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, environment.get(name, "false"))
    capsys.readouterr()
    run_training(launched)
    assert found in capsys.readouterr().err
    assert logged(launched) == logged(plain)


@pytest.mark.parametrize(
    ("kind", "named", "page"),
    [
        (DistributedType.DEEPSPEED, "DEEPSPEED", r"docs/distributed\.md, From ZeRO"),
        (DistributedType.FSDP, "FSDP, version 1", ""),
    ],
)
def test_ways_to_distribute_that_would_train_wrongly_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: DistributedType, named: str, page: str
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(ValueError, match=rf"^accelerate was launched with {named}: .*fsdp_version: 2.*{page}"):
        run_training(config("run"))


def test_scoring_in_a_precision_that_is_never_gathered_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: True))
    run = config("run", dtype="bfloat16", scoring_dtype="float32")
    with pytest.raises(
        ValueError, match=r"^scoring_dtype: float32 .* since sharded weights \(FSDP2\) compute in bfloat16 alone"
    ):
        run_training(run)

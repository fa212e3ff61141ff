"""What a step needs: estimates against what autograd keeps, and when activations are computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import build_model, relative_distance, weights
from ncalign.cli.app import main
from ncalign.model.batching import collate
from ncalign.model.logprobs import completion_logprobs
from ncalign.training import memory
from ncalign.training.config import TrainConfig
from ncalign.training.memory import step_memory
from ncalign.training.train import run_training
from test_logprobs import group

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
}
PLAIN = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen 3": lambda: Qwen3Config(**SHAPE, head_dim=32),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
    "gpt 2": lambda: GPT2Config(vocab_size=300, n_embd=128, n_layer=4, n_head=4, **PLAIN),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_activations_are_about_those_that_autograd_keeps(kind: str, dtype: torch.dtype) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype)
    batch = collate([group(number, 200, (50, 60, 40, 30)) for number in range(3)], pad_token_id=0)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        completion_logprobs(model, batch)
    counted = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    # Prompts are computed for each of their completions here, in rows filled to one length.
    found = step_memory(model, tokens=3 * 4 * 260, precision=dtype, device=CPU)
    assert 2 / 3 < counted / found.activations < 4 / 3
    assert found.recomputed < found.activations / 2
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert found.state == 4 * whole


def test_a_device_has_room_or_not(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    model = build_model(tiny_tokenizer)
    sizes = {"tokens": 10_000, "precision": torch.float32, "device": CPU}
    whole = step_memory(model, **sizes)
    assert whole.device is not None
    for device, fits in ((whole.state + whole.activations, False), (2 * (whole.state + whole.activations), True), (None, True)):
        monkeypatch.setattr(memory, "device_memory", lambda given, device=device: device)
        assert step_memory(model, **sizes).fits() is fits
    assert step_memory(model, **sizes, num_shards=4).state == whole.state // 4
    # Nothing is said of a model that does not tell its sizes.
    assert step_memory(torch.nn.Linear(2, 2), **sizes).activations == 0


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.device_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert whole is not None
    assert memory.device_memory(CPU) == whole // 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 80 * 2**30))
    assert memory.device_memory(torch.device("cuda", 0)) == 80 * 2**30
    assert memory.device_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("chosen", "room", "recomputed"), [("auto", 2**20, True), ("auto", 2**40, False), (False, 2**20, False)]
)
def test_layers_are_computed_again_where_a_step_would_not_fit(
    chosen: Any,
    room: int,
    recomputed: bool,
    groups_file: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = {"model": str(tiny_model_dir), "data": groups_file, "max_steps": 2, "report_to": (), "cache_dir": tmp_path / "c"}
    plain = TrainConfig(output_dir=tmp_path / "plain", **fields, activation_checkpointing=False)
    run_training(plain)
    calls: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return forward(self, *arguments, **named)

    capsys.readouterr()
    monkeypatch.setattr(memory, "device_memory", lambda device: room)
    monkeypatch.setattr(LlamaMLP, "forward", counted)
    config = TrainConfig(output_dir=tmp_path / "run", **fields, activation_checkpointing=chosen)
    run_training(config)
    said = capsys.readouterr().err
    assert (
        "activations are computed again in the backward pass (activation_checkpointing): a step needs" in said
    ) is recomputed
    assert relative_distance(weights(plain.output_dir), weights(config.output_dir)) <= 1e-6
    monkeypatch.setattr(memory, "device_memory", lambda device: 2**40)
    before = len(calls)
    calls.clear()
    run_training(TrainConfig(output_dir=tmp_path / "other", **fields))
    assert (before > len(calls)) is recomputed


def test_a_model_that_can_not_says_so(
    groups_file: Path,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = GPTNeoXConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    monkeypatch.setattr(memory, "device_memory", lambda device: 2**20)
    run_training(
        TrainConfig(
            model=str(tmp_path / "model"),
            data=groups_file,
            output_dir=tmp_path / "run",
            max_steps=1,
            report_to=(),
            dtype="float32",
        )
    )
    assert (
        "warning: this model can't compute its activations again in the backward pass: a step needs" in capsys.readouterr().err
    )


def test_the_command_line_takes_true_false_and_auto(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["maybe"], ["3"]):
        given = ["train", "--model", "m", "--data", "d", "--output_dir", "o", "--activation_checkpointing", *words]
        assert main(given) == 2
        assert "must be true or false, or 'auto'" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert "--activation_checkpointing [true|false|auto]" in capsys.readouterr().out

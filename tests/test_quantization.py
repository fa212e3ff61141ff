"""An adapter on weights in 4 bits (QLoRA): the same numbers on every path, one reference, one model saved; what is refused."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from conftest import weights
from ncalign.cli.app import main
from ncalign.model import precision
from ncalign.model.config import LoRA, Quantization
from ncalign.model.logprobs import base_causal_model, completion_logprobs
from ncalign.model.policy import Policy, load_policy, reference_mode
from ncalign.model.quantized import estimated_bytes, held_bytes, shapes_of
from ncalign.model.sharing import _SHORT, _probe, share_prompts
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.tasks.lm_backend import Backend, backend_arguments
from ncalign.training import loop
from ncalign.training.config import TrainConfig
from ncalign.training.plan import dry_run
from ncalign.training.train import run_training

pytest.importorskip("bitsandbytes")

Config = Callable[..., TrainConfig]
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=False),
    # Biases, and embeddings tied to the head.
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True),
    # Weights stored the other way round.
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """A folder of each architecture. Read only."""
    made = {}
    for name, config in ARCHITECTURES.items():
        folder = tmp_path_factory.mktemp(name)
        config.vocab_size = len(tiny_tokenizer)
        config.bos_token_id, config.eos_token_id = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        made[name] = str(folder)
    return made


@pytest.fixture
def config(tmp_path: Path, folders: dict[str, str], groups_file: Path) -> Config:
    def make(name: str = "run", **fields: Any) -> TrainConfig:
        values = {
            "model": folders["llama"],
            "data": groups_file,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
            "lora": {"r": 4},
            "quantization": {},
            "learning_rate": 1e-2,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "report_to": (),
        }
        return TrainConfig.model_validate(values | fields)

    return make


def quantized(folder: str, **fields: Any) -> Policy:
    return load_policy(folder, **{"lora": LoRA(r=4), "quantization": Quantization(), **fields})


def move_adapter(policy: Policy) -> None:
    """Give the adapter some weights, as training would."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def logged(run: TrainConfig) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_shared_prompts_give_the_values_and_gradients_of_padded_rows(name: str, folders: dict[str, str]) -> None:
    policy = quantized(folders[name])
    move_adapter(policy)
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    batch = _probe(base_causal_model(policy.model), _SHORT, torch.device("cpu"))

    def values_and_gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy.model.zero_grad()
        values = completion_logprobs(policy.model, batch)
        values[batch.candidate_mask].sum().backward()
        return values.detach(), {name: p.grad.clone() for name, p in trained.items()}

    padded, expected = values_and_gradients()
    assert share_prompts(policy.model) is None
    shared, found = values_and_gradients()
    assert torch.allclose(shared, padded, rtol=1e-6, atol=1e-4)
    for name in trained:
        assert float((found[name] - expected[name]).norm()) <= 1e-4 * float(expected[name].norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_adapter_off_the_policy_is_its_reference_bit_for_bit(dtype: str, folders: dict[str, str]) -> None:
    policy = quantized(folders["llama"], dtype=dtype)
    batch = _probe(base_causal_model(policy.model), _SHORT, torch.device("cpu"))
    with torch.no_grad(), reference_mode(policy.model):
        expected = completion_logprobs(policy.model.eval(), batch)
    assert torch.equal(completion_logprobs(policy.model.train(), batch), expected)
    # Weights that a pass without gradients has repacked would pass no gradient on here.
    completion_logprobs(policy.model, batch).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for name, p in policy.model.named_parameters() if "lora_B" in name)
    move_adapter(policy)
    with torch.no_grad():
        assert float((completion_logprobs(policy.model, batch) - expected).abs().max()) > 1e-2
        with reference_mode(policy.model):
            assert torch.equal(completion_logprobs(policy.model, batch), expected)


def test_the_fingerprint_is_of_the_weights_as_they_are_held(folders: dict[str, str]) -> None:
    held = [None, Quantization(), Quantization(double=False), Quantization(type="fp4")]
    found = [quantized(folders["llama"], quantization=each).fingerprint for each in held]
    assert len(set(found)) == len(held)
    assert quantized(folders["llama"]).fingerprint == found[1]


def test_a_run_starts_at_its_reference_which_no_other_precision_shares(config: Config) -> None:
    first, second, plain = config("a"), config("b"), config("c", quantization=None)
    for run in (first, second, plain):
        run_training(run)
        assert logged(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert logged(first) == logged(second) != logged(plain)
    assert len(list((first.cache_dir / "reference").iterdir())) == 2


def test_what_saves_memory_changes_no_number(config: Config) -> None:
    plain = config("plain", max_steps=2)
    run_training(plain)
    for fields in ({"activation_checkpointing": True}, {"max_tokens_per_batch": 1}, {"share_prompts": False}):
        saving = config(next(iter(fields)), max_steps=2, **fields)
        run_training(saving)
        for expected, found in zip(logged(plain), logged(saving), strict=True):
            for name in ("loss", "grad_norm"):
                assert found[name] == pytest.approx(expected[name], rel=1e-3), fields


def test_two_rounds_online(config: Config, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def brief(prompt, completions):\n    return [-len(text) for text in completions]\n")
    given = config("online", max_steps=4).model_dump(mode="json", exclude_unset=True)
    given |= {"reward": f"{tmp_path / 'rewards.py'}:brief", "num_samples": 4, "max_new_tokens": 8, "regenerate_every": 2}
    run_online(OnlineConfig.model_validate({**given, "per_device_train_batch_size": 4, "drift_prompts": 0, "on_model": "none"}))
    rounds = sorted((tmp_path / "online" / "rounds").glob("*/generated-*.json"))
    assert len({file.parent for file in rounds}) == 2
    assert len({file.read_text() for file in rounds}) == 2
    lines = [json.loads(line) for line in (tmp_path / "online" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # Of a round's first step, whose reference is the adapter's absence.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(losses) == 4


def test_stopped_and_resumed_is_bitwise_the_same(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"save_steps": 2, "lora": {"r": 4, "dropout": 0.1}}
    whole, stopped = config("whole", **settings), config("stopped", **settings)
    run_training(whole)
    step = loop.Loop.step

    def stopping(self: loop.Loop, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_training(stopped)
    checkpoint = stopped.output_dir / "checkpoints" / "step-00000002"
    assert all("lora_" in name for name in load_file(checkpoint / "model.safetensors"))
    run_training(stopped.model_copy(update={"resume": True}))
    first, second = weights(whole.output_dir), weights(stopped.output_dir)
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())
    assert logged(whole) == logged(stopped)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_into_dequantized_weights_it_is_the_policy(
    name: str, config: Config, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(model=folders[name], merge=True, max_steps=2)
    kept: list[Policy] = []
    monkeypatch.setattr(
        "ncalign.training.loading.load_policy", lambda *args, **named: kept.append(load_policy(*args, **named)) or kept[0]
    )
    run_training(run)
    merged = AutoModelForCausalLM.from_pretrained(run.output_dir / "model", dtype="auto").eval()
    assert merged.dtype == torch.float32
    assert "quantization_config" not in (run.output_dir / "model" / "config.json").read_text()
    batch = _probe(merged, _SHORT, torch.device("cpu"))
    with torch.no_grad():
        expected = completion_logprobs(kept[0].model.eval(), batch)
        assert torch.allclose(completion_logprobs(merged, batch), expected, rtol=1e-5, atol=1e-3)
        with reference_mode(kept[0].model):
            assert float((completion_logprobs(kept[0].model, batch) - expected).abs().max()) > 0.1
    for said in (capsys.readouterr().err, (run.output_dir / "model" / "README.md").read_text()):
        assert "weights in 4 bits (nf4) were dequantized" in said
        assert "the saved weights are float32" in said


def test_trained_sampled_and_merged_by_the_command_line(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config()
    flags = [f"--{name}={getattr(run, name)}" for name in ("model", "data", "output_dir", "cache_dir")]
    flags += ["--lora.r", "4", "--quantization", "--max_steps", "2", "--dtype", "bfloat16"]
    assert main(["train", *flags]) == 0
    adapter = json.loads((run.output_dir / "model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == run.model
    assert json.loads((run.output_dir / "model" / "quantization.json").read_text())["type"] == "nf4"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 3 plus 4?"}\n')
    words = [
        "generate",
        "--model",
        str(run.output_dir / "model"),
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "out.jsonl"),
    ]
    capsys.readouterr()
    assert main([*words, "--num_samples", "2", "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr().err
    assert "was trained on its base model in 4 bits (nf4), and is put on the base model's own weights here" in said
    # lm-eval puts the two together itself.
    precision.announce.cache_clear()
    assert backend_arguments(str(run.output_dir / "model"), Backend("hf"))["pretrained"] == run.model
    assert capsys.readouterr().err == said[said.index("note: the adapter") :].split("\n", 1)[0] + "\n"
    assert main(["train", *flags, "--resume", "--merge"]) == 0
    assert {tensor.dtype for tensor in weights(run.output_dir).values()} == {torch.bfloat16}


def test_an_adapter_as_the_model_is_merged_before_it_is_quantized(config: Config) -> None:
    first = config("first", quantization=None)
    run_training(first)
    second = config("second", model=str(first.output_dir / "model"))
    run_training(second)
    assert logged(second)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    # Its base exists here alone, so that whole weights are saved.
    assert not any("lora_" in name for name in weights(second.output_dir))


class TestRefusals:
    """Before any weights are loaded, with what to do."""

    @pytest.mark.parametrize(
        ("fields", "needed"),
        [
            ({"lora": None}, "quantization needs lora: weights in 4 bits are frozen"),
            ({"dtype": "float64"}, "set dtype: bfloat16"),
        ],
    )
    def test_settings_that_do_not_go_together(self, config: Config, fields: dict[str, Any], needed: str) -> None:
        with pytest.raises(ValueError, match=needed):
            config(**fields)

    @pytest.mark.parametrize("bits", [8, "8"])
    def test_other_bits(self, config: Config, bits: object) -> None:
        with pytest.raises(ValueError, match=r"bits\s+Input should be 4"):
            config(quantization={"bits": bits})

    def test_an_adapter_for_vllm_in_this_process(self, config: Config) -> None:
        settings = {"training": config(), "rewards": {"reward": "x"}, "generator": "vllm"}
        with pytest.raises(ValueError, match="set push: folder"):
            OnlineConfig.model_validate(settings)
        assert OnlineConfig.model_validate(settings | {"push": "folder"}).push == "folder"

    def test_a_missing_package(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ValueError, match=r"quantization needs the package bitsandbytes: pip install .*\[qlora\]"):
            run_training(config())

    def test_experts_that_are_no_linear_layers(self, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        MixtralConfig(**SIZES, vocab_size=384, num_local_experts=4, num_key_value_heads=2).save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=r"\d\d% of this model's weights are experts, .*three dimensions \(model\.layers\.0\S*: 4x"
        ):
            quantized(str(tmp_path))

    @pytest.mark.parametrize("quantization", [None, Quantization()])
    def test_a_model_that_is_stored_quantized(
        self, quantization: Quantization | None, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        described = ARCHITECTURES["llama"].to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        (tmp_path / "config.json").write_text(json.dumps(described))
        tiny_tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"stored with quantized weights .*gptq.*: give the model that it was made from"):
            quantized(str(tmp_path), quantization=quantization)


class TestDryRun:
    """Memory with weights in 4 bits, of a model that is here and of one whose weights are not."""

    def test_shows_less_memory_and_disk_of_the_merged_model(self, config: Config) -> None:
        held, plain = dry_run(config(merge=True)), dry_run(config(merge=True, quantization=None))
        assert held["memory_mib"] < plain["memory_mib"]
        # The merged weights are whole ones.
        assert held["disk_mib"] == pytest.approx(plain["disk_mib"], rel=0.05)

    @pytest.mark.parametrize("name", ARCHITECTURES)
    @pytest.mark.parametrize(
        "quantization", [None, Quantization(), Quantization(double=False)], ids=["none", "double", "single"]
    )
    def test_bytes_from_shapes_are_those_that_are_held(
        self, name: str, quantization: Quantization | None, folders: dict[str, str]
    ) -> None:
        model = quantized(folders[name], quantization=quantization).model
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        shapes = shapes_of(ARCHITECTURES[name], dtype=torch.float32, trust_remote_code=False)
        assert estimated_bytes(shapes, quantization, torch.float32) == held_bytes(model) - trained

    @pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
    def test_accepts_the_recipes(
        self, recipe: str, groups_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        mistral = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        mistral |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}
        (tmp_path / "config.json").write_text(json.dumps(mistral))
        words = ["train", "--config", str(RECIPES / recipe), "--model", str(tmp_path), "--data", str(groups_file)]
        assert main([*words, "--eval_data", "null", "--output_dir", str(tmp_path / "run"), "--dry-run", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        # Rank 16 beside seven matrices in each of 32 layers.
        sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 2 * (4096 + 14336) + (14336 + 4096)
        assert facts["trained_parameters"] == 32 * 16 * sides
        assert facts["parameters"] == 7_241_732_096
        # 4.5 bits of a weight in the layers; embeddings and head in bfloat16.
        layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
        assert facts["weights_mib"] == pytest.approx(
            (layers * 4.5 / 8 + 2 * 2 * 32000 * 4096 + 4 * 32 * 16 * sides) / 2**20, rel=1e-3
        )
        assert facts["optimizer_mib"] == 2 * facts["gradients_mib"]
        assert not (tmp_path / "run").exists()

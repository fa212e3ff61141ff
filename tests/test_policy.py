"""Loading a policy, its fingerprint, and the reference that an adapter switched off must be, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import Gemma2ForCausalLM, Gemma2PreTrainedModel, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from conftest import build_model
from ncalign.model.batching import GroupBatch, collate
from ncalign.model.config import LoRA
from ncalign.model.encoding import EncodedGroup
from ncalign.model.logprobs import completion_logprobs
from ncalign.model.noise import disable_dropout
from ncalign.model.policy import (
    Policy,
    compute_as_configured,
    load_model,
    load_policy,
    load_tokenizer,
    quiet_transformers,
    reference_mode,
    weights_fingerprint,
)
from test_logprobs import build

# peft asks transformers for an attribute by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK_4 = LoRA(r=4, alpha=8.0)


@pytest.fixture(scope="module")
def batch() -> GroupBatch:
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(4, 300, count).astype(np.int32)

    groups = [EncodedGroup(f"g{i}", "", tokens(5 + i), (tokens(3), tokens(7)), (1.0, 0.0), (None, None)) for i in range(2)]
    return collate(groups, pad_token_id=0)


def train_adapter(policy: Policy, batch: GroupBatch, *, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        completion_logprobs(policy.model, batch)[:, 0].sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


def logprobs(policy: Policy, batch: GroupBatch) -> torch.Tensor:
    with torch.no_grad():
        return completion_logprobs(policy.model, batch)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_with_the_adapter_off_the_policy_is_the_base_model_bit_for_bit(
    dtype: str, tiny_model_dir: Path, batch: GroupBatch
) -> None:
    weights = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[dtype]
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=weights).eval()
    with torch.no_grad():
        expected = completion_logprobs(base, batch)
    policy = load_policy(str(tiny_model_dir), dtype=dtype, lora=RANK_4)
    # An adapter starts at zero: on or off, the policy is its own reference.
    assert torch.equal(logprobs(policy, batch), expected)
    train_adapter(policy, batch)
    assert float((logprobs(policy, batch) - expected).abs().min()) > 1e-3
    with reference_mode(policy.model):
        assert torch.equal(logprobs(policy, batch), expected)
    assert float((logprobs(policy, batch) - expected).abs().min()) > 1e-3


def test_the_adapter_comes_back_on_after_an_error(tiny_model_dir: Path, batch: GroupBatch) -> None:
    policy = load_policy(str(tiny_model_dir), lora=RANK_4)
    train_adapter(policy, batch)
    before = logprobs(policy, batch)

    def fails() -> None:
        with reference_mode(policy.model):
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fails()
    assert torch.equal(logprobs(policy, batch), before)


def test_without_an_adapter_there_is_nothing_to_switch_off(tiny_model: LlamaForCausalLM, batch: GroupBatch) -> None:
    before = completion_logprobs(tiny_model, batch)
    with reference_mode(tiny_model):
        assert torch.equal(completion_logprobs(tiny_model, batch), before)


def test_only_the_adapter_is_trained(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), lora=RANK_4)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    # Seven linear maps in each of two layers, two matrices each.
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name for name in trained)
    assert all(parameter.requires_grad for parameter in load_policy(str(tiny_model_dir)).model.parameters())


def test_precision_of_weights_and_adapter(tiny_model_dir: Path) -> None:
    def dtypes(dtype: str, lora: LoRA | None) -> dict[bool, set[torch.dtype]]:
        found: dict[bool, set[torch.dtype]] = {}
        for parameter in load_policy(str(tiny_model_dir), dtype=dtype, lora=lora).model.parameters():
            found.setdefault(parameter.requires_grad, set()).add(parameter.dtype)
        return found

    assert dtypes("float32", None) == {True: {torch.float32}}
    assert dtypes("float64", None) == {True: {torch.float64}}
    # AdamW's steps vanish in bfloat16 weights: what is trained stays float32.
    assert dtypes("bfloat16", None) == {True: {torch.float32}}
    assert dtypes("bfloat16", RANK_4) == {True: {torch.float32}, False: {torch.bfloat16}}


def test_the_adapters_start_depends_on_the_seed_alone(tiny_model_dir: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        policy = load_policy(str(tiny_model_dir), lora=RANK_4, seed=seed)
        return torch.cat([p.flatten() for name, p in policy.model.named_parameters() if "lora_A" in name]).detach()

    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = start(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(start(0), first)
    assert not torch.equal(start(1), first)


class TestFingerprint:
    def test_is_the_same_for_the_same_model_anywhere(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_model_dir, tmp_path / "copy")
        assert load_policy(str(tmp_path / "copy")).fingerprint == load_policy(str(tiny_model_dir)).fingerprint

    def test_does_not_depend_on_the_adapter(self, tiny_model_dir: Path) -> None:
        # The reference is what the adapter starts from.
        plain = load_policy(str(tiny_model_dir)).fingerprint
        assert load_policy(str(tiny_model_dir), lora=RANK_4, seed=3).fingerprint == plain

    def test_differs_by_precision(self, tiny_model_dir: Path) -> None:
        found = {load_policy(str(tiny_model_dir), dtype=dtype).fingerprint for dtype in ("float32", "float64", "bfloat16")}
        assert len(found) == 3

    def test_differs_when_one_weight_moves_by_one_bit(self, tiny_model: LlamaForCausalLM) -> None:
        before = weights_fingerprint(tiny_model, computation="float32")
        assert weights_fingerprint(tiny_model, computation="float32") == before
        weight = tiny_model.get_output_embeddings().weight
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1e9))
        assert weights_fingerprint(tiny_model, computation="float32") != before

    def test_differs_by_what_no_weight_shows(self, tiny_model: LlamaForCausalLM) -> None:
        before = weights_fingerprint(tiny_model, computation="float32")
        tiny_model.config.rope_parameters = {**tiny_model.config.rope_parameters, "rope_theta": 500_000.0}
        assert weights_fingerprint(tiny_model, computation="float32") != before

    def test_takes_scalars_and_bfloat16(self, tiny_model: LlamaForCausalLM) -> None:
        tiny_model.register_buffer("scale", torch.tensor(2.0))
        one = weights_fingerprint(tiny_model.to(torch.bfloat16), computation="bfloat16")
        tiny_model.scale.fill_(3.0)
        assert weights_fingerprint(tiny_model, computation="bfloat16") != one


def test_dropout_is_off_in_training(tiny_tokenizer: PreTrainedTokenizerFast, batch: GroupBatch) -> None:
    model = build_model(tiny_tokenizer)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.add_module("extra", torch.nn.Dropout(0.5))
    model.train()
    noisy = [completion_logprobs(model, batch).detach() for _ in range(2)]
    assert not torch.equal(*noisy)
    disable_dropout(model)
    assert model.extra.p == 0.0
    assert torch.equal(*[completion_logprobs(model, batch).detach() for _ in range(2)])


def test_an_adapter_folder_is_merged_into_its_base(tiny_model_dir: Path, tmp_path: Path, batch: GroupBatch) -> None:
    policy = load_policy(str(tiny_model_dir), lora=RANK_4)
    train_adapter(policy, batch)
    policy.model.save_pretrained(tmp_path / "adapter")
    policy.tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = load_policy(str(tmp_path / "adapter"))
    assert not isinstance(loaded.model, PeftModel)
    # Merged weights are rounded once: equal to float32, not bitwise.
    torch.testing.assert_close(logprobs(loaded, batch), logprobs(policy, batch), rtol=1e-5, atol=1e-4)
    assert loaded.fingerprint != policy.fingerprint


def test_an_adapter_is_merged_before_the_weights_are_rounded(tiny_model_dir: Path, tmp_path: Path, batch: GroupBatch) -> None:
    # The base holds float32 weights that bfloat16 rounds: rounding them before the sum would give other numbers.
    policy = load_policy(str(tiny_model_dir), lora=RANK_4)
    train_adapter(policy, batch)
    policy.model.save_pretrained(tmp_path)
    exact = load_model(str(tmp_path), dtype=torch.float32, trust_remote_code=False)
    merged = load_model(str(tmp_path), dtype=torch.bfloat16, trust_remote_code=False)
    plain = load_model(str(tiny_model_dir), dtype=torch.bfloat16, trust_remote_code=False)
    weights = exact.state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, weights[name].to(torch.bfloat16)), name
    # All else is as in a model loaded in bfloat16; rotary frequencies stay float32.
    assert merged.config.dtype == merged.dtype == torch.bfloat16
    buffers = dict(merged.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    for name, buffer in plain.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)
    assert {name: p.dtype for name, p in merged.named_parameters()} == {name: p.dtype for name, p in plain.named_parameters()}


def test_precision_by_name_or_as_torchs(tiny_model_dir: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        by_name = load_policy(str(tiny_model_dir), dtype=str(dtype).removeprefix("torch."), lora=RANK_4)
        by_type = load_policy(str(tiny_model_dir), dtype=dtype, lora=RANK_4)
        assert by_type.fingerprint == by_name.fingerprint
        assert by_type.model.get_base_model().lm_head.weight.dtype == dtype


@pytest.mark.parametrize("shown", [True, False])
def test_saving_shows_no_bars(
    shown: bool, tiny_model: LlamaForCausalLM, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "not there yet"
    if shown:
        # Else this is no test of hiding them.
        tiny_model.save_pretrained(target)
        assert "Writing model shards" in capfd.readouterr().err
        return
    with quiet_transformers():
        tiny_model.save_pretrained(target)
    assert capfd.readouterr().err == ""
    assert (target / "model.safetensors").is_file()
    assert transformers_logging.is_progress_bar_enabled()


class TestRefusals:
    def test_unknown_precision(self, tiny_model_dir: Path) -> None:
        with pytest.raises(ValueError, match="dtype is 'fp8'; it must be one of float32, bfloat16, float64"):
            load_policy(str(tiny_model_dir), dtype="fp8")
        with pytest.raises(ValueError, match="dtype is 'float16'; it must be one of float32, bfloat16, float64"):
            load_policy(str(tiny_model_dir), dtype=torch.float16)

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"has no config\.json: give a Hugging Face model folder"):
            load_policy(str(tmp_path))

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="there is no such folder"):
            load_policy(str(tmp_path / "missing"))

    def test_pickled_weights_are_never_read(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_dir, folder)
        weights = LlamaForCausalLM.from_pretrained(tiny_model_dir).state_dict()
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"safetensors"):
            load_policy(str(folder))

    def test_lora_modules_that_do_not_exist(self, tiny_model_dir: Path) -> None:
        with pytest.raises(ValueError, match=r"lora\.target_modules=\('query',\) does not fit"):
            load_policy(str(tiny_model_dir), lora=LoRA(target_modules=("query",)))

    def test_a_tokenizer_without_eos(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_dir, folder)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({name: value for name, value in settings.items() if name != "eos_token"}))
        with pytest.raises(ValueError, match="has no EOS token: set eos_token"):
            load_tokenizer(str(folder))


def test_eos_pads_where_there_is_no_padding_token(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in settings.items() if name != "pad_token"}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_caps_on_attention_scores_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("gemma2").save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    expected = Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")(input_ids=ids).logits
    # As in transformers before 5.21, whose sdpa computes no cap and says nothing.
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    assert Gemma2ForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    loaded = load_model(str(tmp_path), dtype=torch.float32, trust_remote_code=False)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    uncapped = LlamaForCausalLM(build("llama").config)
    compute_as_configured(uncapped, torch.float32)
    assert uncapped.config._attn_implementation == "sdpa"

"""In training mode a policy computes the same twice, whatever its architecture calls dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    XGLMConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import build_tokenizer
from ncalign.model.config import LoRA
from ncalign.model.logprobs import LogprobModel
from ncalign.model.noise import as_stated, disable_dropout
from ncalign.model.policy import load_policy
from ncalign.training.export import save_model

IDS = torch.arange(5, 69).reshape(2, 32)
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
# Each names its dropout otherwise, or keeps it elsewhere: in modules, in numbers, in the configuration.
SMALL: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(vocab_size=99, **OPT, dropout=0.5),
    "opt-layerdrop": OPTConfig(vocab_size=99, **OPT, dropout=0.0, layerdrop=0.5),
    "xglm": XGLMConfig(vocab_size=99, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, activation_dropout=0.5),
    "biogpt": BioGptConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5),
    "gpt-neo": GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], attention_dropout=0.5
    ),
    "bloom": BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.5),
    # Looked up in the configuration at every pass.
    "falcon": FalconConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.5, attention_dropout=0.5
    ),
    # Not dropout: random factors of the router's inputs.
    "mixtral": MixtralConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        router_jitter_noise=0.5,
    ),
}


def passes(model: Any) -> list[torch.Tensor]:
    model.train()
    return [model(input_ids=IDS, use_cache=False).logits.detach() for _ in range(3)]


@pytest.mark.parametrize("name", SMALL)
def test_two_passes_in_training_mode_are_equal_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SMALL[name])
    first, *others = passes(model)
    # Else this is no test of switching it off.
    assert not all(torch.equal(first, other) for other in others)
    stated = disable_dropout(model)
    first, *others = passes(model)
    assert all(torch.equal(first, other) for other in others)
    model.eval()
    assert torch.equal(first, model(input_ids=IDS, use_cache=False).logits)
    with as_stated(stated):
        assert model.config.to_dict() == SMALL[name].to_dict()


def test_configurations_inside_the_configuration() -> None:
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4)
    config.inner, config.ffn_config = OPTConfig(dropout=0.5), {"moe_jitter_eps": 0.25, "width": 0.5, "deeper": {"dropout": 1.0}}
    model = AutoModelForCausalLM.from_config(config)
    stated = disable_dropout(model)
    assert model.config.inner.dropout == 0.0
    assert model.config.ffn_config == {"moe_jitter_eps": 0.0, "width": 0.5, "deeper": {"dropout": 0.0}}
    with as_stated(stated):
        assert model.config.inner.dropout == 0.5
        assert model.config.ffn_config == {"moe_jitter_eps": 0.25, "width": 0.5, "deeper": {"dropout": 1.0}}


def test_the_written_configuration_says_what_the_models_said(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    config = OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **OPT, dropout=0.25, attention_dropout=0.125)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    accelerator = Accelerator(cpu=True)
    for name, lora in (("all", None), ("merged", LoRA(r=2))):
        policy = load_policy(str(tmp_path / "base"), lora=lora)
        for _ in range(2):  # as in online training, which goes on after each time
            save_model(
                policy, LogprobModel(policy.model), accelerator, merge=lora is not None, card=None, target=tmp_path / name
            )
            first, *others = passes(policy.model)
            assert all(torch.equal(first, other) for other in others)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert (written["dropout"], written["attention_dropout"]) == (0.25, 0.125)


def test_an_adapters_own_dropout_stays(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), lora=LoRA(r=2, dropout=0.5))
    found = {module.p for name, module in policy.model.named_modules() if name.endswith("lora_dropout.default")}
    assert found == {0.5}
    assert policy.model.peft_config["default"].lora_dropout == 0.5


SHRUNK = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "n_inner"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_small_causal_model_of_transformers() -> None:
    """As many of the library's architectures as can be made small by the usual names; none of them has dropout left."""
    tried, noisy = 0, []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        torch.manual_seed(0)
        try:
            plain = AutoConfig.for_model(kind)
            names = plain.to_dict()
            small = {name: value for name, value in SHRUNK.items() if name in names or name in plain.attribute_map}
            small |= {name: 0.5 for name, value in names.items() if "drop" in name and isinstance(value, float)}
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small)).num_parameters()
            assert size < 20_000_000
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small))
            model.eval()(input_ids=IDS, use_cache=False)
        except Exception:
            continue
        tried += 1
        disable_dropout(model)
        first, *others = passes(model)
        if not all(torch.equal(first, other) for other in others):
            noisy.append(kind)
    assert tried > 50
    assert noisy == []

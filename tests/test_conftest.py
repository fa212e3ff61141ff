"""The suite's own tools do what the other tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import build_model, build_tokenizer
from ncalign.objectives import dpo_loss
from ncalign.objectives.kernels import pick_positive


def test_shapes_are_checked_in_objectives() -> None:
    with pytest.raises(TypeCheckError):
        dpo_loss(torch.zeros(3), torch.zeros(2))


def test_shapes_are_checked_in_kernels() -> None:
    with pytest.raises(TypeCheckError):
        pick_positive(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool), generator=None)


def test_saved_tokenizer_reads_the_chat_template_and_gives_any_text_back(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    chat = [{"role": "user", "content": "Größe 7 – 5?"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nGröße 7 – 5?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_some_tokens_span_letters(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tiny_tokenizer("answer").input_ids) < len("answer")


def test_saved_model_is_the_seeded_one_in_float32(tiny_model_dir: Path, tiny_model: LlamaForCausalLM) -> None:
    assert (tiny_model_dir / "model.safetensors").is_file()
    built = build_model(build_tokenizer()).state_dict()
    for model in (tiny_model, AutoModelForCausalLM.from_pretrained(tiny_model_dir)):
        loaded = model.state_dict()
        assert loaded.keys() == built.keys()
        assert all(weight.dtype == torch.float32 and torch.equal(weight, built[name]) for name, weight in loaded.items())

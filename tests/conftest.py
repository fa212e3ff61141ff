"""What the whole suite shares: run-time shape checks, no network, one thread, a tiny model built in code, group files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before torch and transformers are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

from jaxtyping import install_import_hook

SHAPE_CHECKED = ("ncalign.objectives", "ncalign.objectives.kernels")

# The hook rewrites modules as they are imported, so it does nothing for one that is imported already.
already = [name for name in SHAPE_CHECKED if name in sys.modules]
assert not already, f"{already} imported before the shape checks were installed"
install_import_hook(list(SHAPE_CHECKED), "beartype.beartype")

import hypothesis
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ncalign.model import precision

Row = Mapping[str, Any]

# A busy machine is no fault of the code's.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "What is seven plus five? The answer is twelve.",
    "What is 17 times 23? The product is 391.",
    "Reply with the final answer only, please.",
    "A group is a prompt and its scored candidate completions.",
    "The greatest common divisor of 12 and 18 is 6.",
    "The quick brown fox jumps over the lazy dog 0123456789 times!",
    "user assistant system",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on SENTENCES: any text can be encoded, and some tokens span several letters.

    bos ``<|bos|>`` (never added by itself), eos ``<|im_end|>``, pad ``<|pad|>``; ChatML template. Do not modify it.
    """
    return build_tokenizer()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer, for tests that change it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        show_progress=False,
        special_tokens=["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A two-layer Llama in float32 whose weights depend on ``seed`` alone; torch's global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Larger than the default .02: next-token distributions must differ enough from uniform for tests to see errors.
        initializer_range=0.3,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face folder (safetensors, tokenizer, ChatML template) with a tiny Llama. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny_model")
    build_model(tiny_tokenizer).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def machine_without_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`dtype: auto` is float32 in this process, whatever the machine: numbers and bits don't depend on where tests run."""
    precision.fast_precision.cache_clear()
    precision.announce.cache_clear()
    monkeypatch.setattr(precision, "product_seconds", {torch.float32: 1.0, torch.bfloat16: 4.0}.__getitem__)
    yield
    precision.fast_precision.cache_clear()
    precision.announce.cache_clear()


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> LlamaForCausalLM:
    """A fresh copy of the tiny model in float32 and evaluation mode; the test may change it."""
    return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """``write_jsonl(rows, name="groups.jsonl")`` writes one JSON object a line into the test's folder, returns the path.

    A row that is a string is written as it stands, so that a test can put in a broken line.
    """

    def write(rows: Iterable[Row | str], name: str = "groups.jsonl") -> Path:
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def group_row(index: int, rewards: Iterable[float | None], *, chat: bool = True) -> dict[str, Any]:
    """One group in our own schema, with one candidate a reward; texts and lengths differ from candidate to candidate."""
    question = f"What is {index} plus {index + 5}?"
    answer = f"The answer is {2 * index + 5}."
    candidates = []
    for position, reward in enumerate(rewards):
        completion = " ".join([answer] * (position + 1))
        candidates.append(
            {"completion": [{"role": "assistant", "content": completion}] if chat else completion, "reward": reward}
        )
    prompt = [{"role": "user", "content": question}] if chat else question
    return {"id": f"g{index}", "prompt": prompt, "candidates": candidates}


@pytest.fixture
def groups_file(write_jsonl: Callable[..., Path]) -> Path:
    """Twelve conversational groups with two to four candidates and distinct rewards, in our own schema."""
    rewards = [[1.0, 0.0], [0.1, 0.9, 0.4], [0.2, 0.0, 0.6, 1.0]]
    return write_jsonl([group_row(index, rewards[index % 3]) for index in range(12)])


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    (path,) = (output_dir / "model").glob("*.safetensors")
    return load_file(path)


def relative_distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two sets of weights over the norm of the first."""
    assert first.keys() == second.keys()
    difference = sum(float((first[name].double() - second[name].double()).square().sum()) for name in first)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in first.values()))


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is asked again at once."""
    import openai._base_client

    monkeypatch.setattr("ncalign.generation.client._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("ncalign.generation.client._LONGEST_PAUSE", 0.002)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.002)


@pytest.fixture
def cuda() -> torch.device:
    """A GPU; what only one can show stands in tests/gpu."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")

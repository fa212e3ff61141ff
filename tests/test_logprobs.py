"""Completion log-probs against the plain computation, which makes all logits: values, gradients, and what memory is touched."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from ncalign.model.batching import GroupBatch, collate
from ncalign.model.encoding import EncodedGroup
from ncalign.model.logprobs import LogprobModel, check_head, completion_logprobs, head_of
from ncalign.model.policy import Policy

# peft asks transformers for an attribute by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCABULARY = 97
PAD = 0
_DECODER: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
_GEMMA = _DECODER | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=3.0)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DECODER),
    "llama-tied": ("Llama", _DECODER | dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2", _DECODER),
    "qwen2-window": ("Qwen2", _DECODER | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", _DECODER | dict(head_dim=8)),
    # The window is shorter than the texts: what a token sees depends on its place in the row.
    "mistral": ("Mistral", _DECODER | dict(sliding_window=4)),
    "gemma2": ("Gemma2", _GEMMA | dict(attn_logit_softcapping=5.0)),
    "gemma3": ("Gemma3", _GEMMA),
    "gemma": ("Gemma", _DECODER | dict(head_dim=8)),
    "phi3": ("Phi3", _DECODER),
    "phi": ("Phi", _DECODER | dict(num_key_value_heads=4)),
    "gpt-neox": ("GPTNeoX", {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}),
    "gpt2": (
        "GPT2",
        dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, bos_token_id=1)
        | dict(eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    ),
    "mixtral": ("Mixtral", _DECODER | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": (
        "Qwen2Moe",
        _DECODER | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    ),
    "qwen3-moe": ("Qwen3Moe", _DECODER | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)),
    "cohere": ("Cohere", _DECODER | dict(logit_scale=0.25)),
    "granite": ("Granite", _DECODER | dict(logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5)),
}


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of an architecture."""
    prefix, values = ARCHITECTURES[name]
    config_name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, config_name)(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if "attn_logit_softcapping" in values:
        # Before 5.21 transformers chooses sdpa, which leaves the cap out.
        model.set_attn_implementation("eager")
    return model.to(dtype).eval()


def group(seed: int, prompt: int, completions: Iterable[int]) -> EncodedGroup:
    """A group of random tokens with the given lengths."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, count).astype(np.int32)

    parts = tuple(tokens(count) for count in completions)
    return EncodedGroup(f"g{seed}", "", tokens(prompt), parts, (0.0,) * len(parts), (None,) * len(parts))


@pytest.fixture(scope="module")
def ragged() -> list[EncodedGroup]:
    """Groups with 3, 1 and 2 candidates; no two rows are equally long, and one completion is a single token."""
    return [group(1, 9, [5, 12, 1]), group(2, 3, [7]), group(3, 14, [2, 6])]


def batch_of(groups: list[EncodedGroup], pad: int = PAD) -> GroupBatch:
    return collate(groups, pad_token_id=pad)


def plain_logprob(model: PreTrainedModel | PeftModel, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """Sum of log_softmax of the full logits of one text, without any padding or batching."""
    ids = torch.from_numpy(np.concatenate([prompt, completion])).long().unsqueeze(0)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token = logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return token[len(prompt) - 1 :].sum()


def plain(model: PreTrainedModel | PeftModel, groups: list[EncodedGroup]) -> list[list[Tensor]]:
    return [[plain_logprob(model, g.prompt, completion) for completion in g.completions] for g in groups]


def weighted_gradients(model: torch.nn.Module, values: Iterable[Tensor]) -> dict[str, Tensor]:
    """Gradients of a sum with unequal weights, so that errors of different candidates do not cancel."""
    model.zero_grad(set_to_none=True)
    torch.stack([value * (0.3 + 0.17 * i) for i, value in enumerate(values)]).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every parameter's gradient, in units of the largest gradient norm."""
    assert found.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    assert scale > 1e-2
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= tolerance * scale, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_log_softmax_of_full_logits_in_float32(name: str, ragged: list[EncodedGroup]) -> None:
    model = build(name)
    check_head(model)
    batch = batch_of(ragged)
    found = completion_logprobs(model, batch, chunk_tokens=5)
    expected = plain(model, ragged)
    assert found.shape == (3, 3)
    assert found.dtype == torch.float32
    flat_found = [found[b, k] for b, row in enumerate(expected) for k in range(len(row))]
    flat_expected = [value for row in expected for value in row]
    for value, right in zip(flat_found, flat_expected, strict=True):
        # Relative to the size of the sum, absolute below one nat.
        assert abs(float(value.detach() - right.detach())) <= 1e-5 * max(1.0, abs(float(right.detach())))
    assert found[1, 1:].tolist() == [0.0, 0.0]
    assert found[2, 2].item() == 0.0
    assert_same_gradients(weighted_gradients(model, flat_found), weighted_gradients(model, flat_expected), 1e-5)


def padded_rows(batch: GroupBatch) -> tuple[Tensor, Tensor]:
    """``[N, T]`` token ids of a row for each candidate, and which of them are scored; padded at the right."""
    ids, scored = [], []
    for span in batch.spans:
        prompt = batch.tokens[span.start : span.start + span.prompt]
        for offset, length in zip(span.offsets(), span.completions, strict=True):
            ids.append(torch.cat([prompt, batch.tokens[offset : offset + length]]))
            scored.append(torch.arange(len(ids[-1])) >= span.prompt)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=batch.pad_token_id)
    return padded, torch.nn.utils.rnn.pad_sequence(scored, batch_first=True)


def full_logits(model: PreTrainedModel, batch: GroupBatch) -> Tensor:
    """Log-probs [B, K] from all logits of padded rows."""
    ids, scored = padded_rows(batch)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    rows = (token * scored[:, 1:]).sum(dim=1)
    return rows.new_zeros(batch.candidate_mask.shape).masked_scatter(batch.candidate_mask, rows)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "gpt2"])
def test_equals_log_softmax_of_full_logits_in_float64(name: str, ragged: list[EncodedGroup]) -> None:
    # On the same padded rows, since the norms of some architectures are float32 inside whatever the model's precision is.
    model = build(name, dtype=torch.float64)
    batch = batch_of(ragged)
    found = completion_logprobs(model, batch, chunk_tokens=4)
    expected = full_logits(model, batch)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = weighted_gradients(model, completion_logprobs(model, batch, chunk_tokens=4)[batch.candidate_mask])
    assert_same_gradients(gradients, weighted_gradients(model, full_logits(model, batch)[batch.candidate_mask]), 1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 33, 10_000])
def test_the_size_of_the_chunks_changes_nothing(chunk_tokens: int, ragged: list[EncodedGroup]) -> None:
    model = build("llama", dtype=torch.float64)
    batch = batch_of(ragged)
    default = completion_logprobs(model, batch)
    found = completion_logprobs(model, batch, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found, default, rtol=1e-12, atol=1e-12)
    mask = batch.candidate_mask
    assert_same_gradients(weighted_gradients(model, found[mask]), weighted_gradients(model, default[mask]), 1e-12)


def test_gradients_or_not_the_values_are_the_same(ragged: list[EncodedGroup]) -> None:
    model = build("llama")
    batch = batch_of(ragged)
    with torch.no_grad():
        without = completion_logprobs(model, batch)
    assert not without.requires_grad
    assert torch.equal(without, completion_logprobs(model, batch).detach())


def test_select_takes_candidates_in_any_order_with_repeats_and_gaps(ragged: list[EncodedGroup]) -> None:
    # GPT-2 has no float32 inside: a repeated row's gradients add up to rounding of float64.
    model = build("gpt2", dtype=torch.float64)
    batch = batch_of(ragged)
    everything = completion_logprobs(model, batch)
    select = torch.tensor([[2, 0, 2, -1], [0, -1, 0, 0], [-1, -1, 1, 0]])
    found = completion_logprobs(model, batch, select=select)
    expected = torch.stack(
        [
            torch.stack([everything[b, k] if k >= 0 else torch.tensor(0.0, dtype=torch.float64) for k in row])
            for b, row in enumerate(select.tolist())
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # A repeated candidate counts as often as it is selected.
    present = select >= 0
    assert_same_gradients(weighted_gradients(model, found[present]), weighted_gradients(model, expected[present]), 1e-12)


def test_select_runs_the_selected_rows_only(ragged: list[EncodedGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    shapes: list[tuple[int, ...]] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    completion_logprobs(model, batch_of(ragged), select=torch.tensor([[0], [0], [-1]]))
    # Rows of 9 + 5 and 3 + 7 tokens.
    assert shapes == [(2, 14)]


def test_select_of_nothing_is_zero(ragged: list[EncodedGroup]) -> None:
    found = completion_logprobs(build("llama"), batch_of(ragged), select=torch.full((3, 2), -1))
    assert torch.equal(found, torch.zeros(3, 2))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "mixtral"])
def test_what_fills_the_rows_is_never_seen(name: str, ragged: list[EncodedGroup]) -> None:
    model = build(name)
    found, expected = (completion_logprobs(model, batch_of(ragged, pad=pad)) for pad in (PAD, 77))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_a_token_of_the_prompt_and_one_of_the_completion_matter(ragged: list[EncodedGroup]) -> None:
    # What the padding test would not see if nothing at all were read.
    model = build("llama")
    batch = batch_of(ragged)
    before = completion_logprobs(model, batch).detach()
    prompt = batch.spans[0].prompt
    for place, seen_by in ((0, [True, True, True]), (prompt, [True, False, False])):
        tokens = batch.tokens.clone()
        tokens[place] = (tokens[place] + 1) % VOCABULARY
        after = completion_logprobs(model, dataclasses.replace(batch, tokens=tokens)).detach()
        assert ((after[0] - before[0]).abs() > 1e-3).tolist() == seen_by
        assert torch.equal(after[1:], before[1:])


def adapted(model: PreTrainedModel, *, seed: int = 0) -> PeftModel:
    """The model with a LoRA adapter away from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    assert isinstance(peft, PeftModel)
    return peft.eval()


def test_peft_model(ragged: list[EncodedGroup]) -> None:
    bare = completion_logprobs(build("llama"), batch_of(ragged)).detach()
    model = adapted(build("llama"))
    check_head(model)
    found = completion_logprobs(model, batch_of(ragged), chunk_tokens=5)
    mask = batch_of(ragged).candidate_mask
    expected = torch.stack([value for row in plain(model, ragged) for value in row])
    torch.testing.assert_close(found[mask], expected, rtol=1e-5, atol=1e-5)
    assert float((found.detach() - bare)[mask].abs().min()) > 1e-2
    assert_same_gradients(weighted_gradients(model, found[mask]), weighted_gradients(model, expected), 1e-5)


def test_the_module_computes_the_same(ragged: list[EncodedGroup]) -> None:
    model = build("qwen2")
    select = torch.tensor([[1, 0], [0, -1], [1, 1]])
    found = LogprobModel(model)(batch_of(ragged), select).logprobs
    assert torch.equal(found, completion_logprobs(model, batch_of(ragged), select=select))


def test_what_is_no_model_is_refused_with_the_remedy(ragged: list[EncodedGroup]) -> None:
    model, batch = build("llama"), batch_of(ragged)
    policy = Policy(model, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel())), "folder", "0" * 64, False)
    with pytest.raises(ValueError, match=r"got a Policy: for a policy from load_policy pass policy\.model"):
        completion_logprobs(policy, batch)
    # A data-parallel wrapper is a module around the model, as this is.
    with pytest.raises(ValueError, match=r"got a Sequential: .* for a model in a wrapper the module inside it"):
        completion_logprobs(torch.nn.Sequential(model), batch)
    with pytest.raises(ValueError, match="got a Policy"):
        check_head(policy)


def test_bfloat16_sums_in_float32(ragged: list[EncodedGroup]) -> None:
    model = build("llama", dtype=torch.bfloat16)
    found = completion_logprobs(model, batch_of(ragged))
    assert found.dtype == torch.float32
    # log_softmax and the sum in float32, of the same bfloat16 logits.
    expected = full_logits(model, batch_of(ragged))
    assert expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_autocast_sums_in_float32(ragged: list[EncodedGroup]) -> None:
    model = build("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = completion_logprobs(model, batch_of(ragged))
    assert found.dtype == torch.float32
    mask = batch_of(ragged).candidate_mask
    exact = completion_logprobs(model, batch_of(ragged))
    error = (found - exact).detach()[mask].abs()
    # bfloat16 has 8 bits: it must differ, and not by much.
    assert 0 < float(error.max()) < 1.0


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    vocabulary, chunk = 1024, 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(**(_DECODER | dict(vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1)))
        )
    batch = batch_of([group(1, 6, [26, 20]), group(2, 10, [22, 15])])
    rows, tokens = padded_rows(batch)[0].shape
    scored = int(batch.completion_lengths.sum())

    def largest(run: Callable[[], Tensor]) -> int:
        with Largest() as mode:
            run().sum().backward()
        model.zero_grad(set_to_none=True)
        return mode.elements

    found = largest(lambda: completion_logprobs(model, batch, chunk_tokens=chunk))
    weights = vocabulary * 16
    assert found <= max(chunk * vocabulary, weights)
    assert max(chunk * vocabulary, weights) * 5 <= scored * vocabulary < rows * tokens * vocabulary
    # The recorder does see them where they are made.
    assert largest(lambda: full_logits(model, batch)) >= rows * (tokens - 1) * vocabulary


class DoubledLogits(LlamaForCausalLM):
    """An architecture whose head does something that no configuration field tells."""

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def test_check_head_refuses_a_head_it_does_not_know() -> None:
    model = DoubledLogits(LlamaConfig(**_DECODER)).eval()
    with pytest.raises(ValueError, match=r"DoubledLogits computes its logits in a way .* does not know.*report"):
        check_head(model)


def test_check_head_refuses_a_field_that_is_not_applied() -> None:
    # The other direction: a configuration that speaks of a scale which the model's own head ignores.
    model = build("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="LlamaForCausalLM computes its logits"):
        check_head(model)


def test_head_of_soft_caps_by_the_formula() -> None:
    model = build("gemma2")
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 4
    bare = model.get_output_embeddings()(hidden).detach()
    assert float(bare.abs().max()) > 3.0
    torch.testing.assert_close(head_of(model)(hidden).detach(), 3.0 * torch.tanh(bare / 3.0), rtol=0, atol=1e-6)


class TestHeadMemoryBenchmark:
    SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "head_memory.py"
    SIZES = ("--rows", "2", "--tokens", "8", "--vocab", "64", "--hidden", "16", "--repeats", "1")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.SCRIPT), *self.SIZES, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
    def test_measures_both_sides_and_writes_the_rows(self, tmp_path: Path) -> None:
        # So few numbers take less than a page of memory: whether the goal holds is for `make bench` to say.
        done = self.run("--scored", "6", "--json", str(tmp_path / "rows.json"))
        assert done.returncode in (0, 1), done.stderr
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert [set(row) for row in rows] == [{"name", "value", "goal", "holds", "spread", "conditions"}] * 2
        assert rows[0]["goal"] == 0.35
        assert rows[0]["holds"] is (rows[0]["value"] <= 0.35) is (done.returncode == 0)
        assert rows[0]["spread"][0] <= rows[0]["value"] <= rows[0]["spread"][1]
        assert "2x8 positions, 6 of completions, vocabulary 64, hidden 16" in rows[0]["conditions"]
        assert "memory ratio" in done.stdout

    def test_refuses_more_completion_positions_than_there_are(self) -> None:
        done = self.run("--scored", "15")
        assert done.returncode == 2
        assert "--scored is 15: it must be from 1 to rows x (tokens - 1) = 14" in done.stderr


def test_check_head_refuses_a_head_that_stands_on_more_than_the_body() -> None:
    config = transformers.ElectraConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.is_decoder = True
    with pytest.raises(ValueError, match="ElectraForCausalLM has no head that can be used apart from its body"):
        check_head(transformers.ElectraForCausalLM(config).eval())

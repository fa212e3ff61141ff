"""Prompts computed once for all their completions: the same numbers as a row for each, on every architecture that is named."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, PreTrainedModel

from ncalign.model import attention, sharing
from ncalign.model.attention import _causal_mask, shares_prompts
from ncalign.model.batching import GroupBatch, collate
from ncalign.model.layout import Span, padded_layout, shared_layout
from ncalign.model.logprobs import LogprobModel, chosen_logprobs, completion_logprobs
from ncalign.model.sharing import _LONG, _SHORT, _probe, share_prompts, why_not_shared
from ncalign.training.memory import recompute_activations
from test_logprobs import ARCHITECTURES, VOCABULARY, adapted, build, group

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CPU = torch.device("cpu")
RAGGED = ((5, (3, 1, 7)), (12, (2,)), (1, (4, 4, 4, 4)), (9, (1, 6)))
Sizes = tuple[tuple[int, tuple[int, ...]], ...]


def batch_of(sizes: Sizes, *, seed: int = 0) -> GroupBatch:
    groups = [group(seed * 100 + number, prompt, completions) for number, (prompt, completions) in enumerate(sizes)]
    return collate(groups, pad_token_id=0)


def values_and_gradients(
    model: torch.nn.Module, batch: GroupBatch, select: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradients of a weighted sum of them."""
    model.zero_grad(set_to_none=True)
    logprobs = completion_logprobs(model, batch, select=select)  # type: ignore[arg-type]
    # Candidates weigh differently, so that errors of one do not make up for another's.
    weights = 0.3 + 0.17 * torch.arange(logprobs.numel(), dtype=logprobs.dtype).view_as(logprobs)
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), gradients


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], *, nats: float, relative: float
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=nats)
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    norm = torch.stack([g.norm() for g in expected[1].values()]).norm()
    apart = torch.stack([(found[1][name] - g).norm() for name, g in expected[1].items()]).norm()
    assert apart <= relative * norm


def shared(name: str, **options: Any) -> PreTrainedModel:
    model = build(name, **options)
    assert share_prompts(model) is None
    assert shares_prompts(model)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_is_padded(name: str) -> None:
    batch = batch_of(RAGGED)
    expected = values_and_gradients(build(name), batch)
    assert_same(values_and_gradients(shared(name), batch), expected, nats=1e-4, relative=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_shared_is_padded_to_the_last_digits_in_float64(name: str) -> None:
    # Of architectures whose norms and rotations are in the model's own precision.
    batch = batch_of(RAGGED)
    expected = values_and_gradients(build(name, dtype=torch.float64), batch)
    relative = 1e-6 if name == "phi" else 1e-12  # rotary angles are float32 whatever the model is
    assert_same(values_and_gradients(shared(name, dtype=torch.float64), batch), expected, nats=relative, relative=relative)


SHAPES = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple)), min_size=1, max_size=4
).map(tuple)


@settings(max_examples=25, deadline=None)
@given(
    sizes=SHAPES,
    name=st.sampled_from(["llama", "mistral", "gemma2"]),
)
def test_shared_is_padded_whatever_the_shapes(sizes: Sizes, name: str) -> None:
    batch = batch_of(sizes)
    expected = values_and_gradients(build(name), batch)
    assert_same(values_and_gradients(shared(name), batch), expected, nats=1e-4, relative=1e-5)


def test_select_takes_candidates_in_any_order_with_repeats_and_gaps() -> None:
    batch = batch_of(RAGGED)
    select = torch.tensor([[2, 0, 2], [-1, -1, -1], [3, -1, 1], [0, 1, -1]])
    expected = values_and_gradients(build("llama"), batch, select)
    found = values_and_gradients(shared("llama"), batch, select)
    assert_same(found, expected, nats=1e-4, relative=1e-5)
    assert found[0][0, 0] == found[0][0, 2]
    assert found[0][1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral"])
def test_groups_and_completions_do_not_see_each_other(name: str) -> None:
    model, batch = shared(name), batch_of(RAGGED)
    before = completion_logprobs(model, batch).detach()
    for b, span in enumerate(batch.spans):
        for k, offset in enumerate(span.offsets()):
            tokens = batch.tokens.clone()
            tokens[offset] = (tokens[offset] + 1) % VOCABULARY
            changed = completion_logprobs(model, replace(batch, tokens=tokens)).detach() != before
            assert changed.nonzero().tolist() == [[b, k]]


def test_activation_checkpointing_changes_nothing() -> None:
    batch = batch_of(RAGGED)
    expected = values_and_gradients(shared("llama"), batch)
    model = shared("llama")
    recompute_activations(model)
    model.train()
    found = values_and_gradients(model, batch)
    assert torch.equal(found[0], expected[0])
    assert_same(found, expected, nats=0.0, relative=1e-6)


def test_an_adapter_shares_too() -> None:
    batch = batch_of(RAGGED)
    expected = values_and_gradients(adapted(build("llama")), batch)
    model = adapted(build("llama"))
    assert share_prompts(model) is None
    assert_same(values_and_gradients(model, batch), expected, nats=1e-4, relative=1e-5)


def test_bfloat16_stays_near_the_padded_rows() -> None:
    batch = batch_of(RAGGED)
    with torch.no_grad():
        expected = LogprobModel(build("llama"), autocast=torch.bfloat16)(batch).logprobs
        found = LogprobModel(shared("llama"), autocast=torch.bfloat16)(batch).logprobs
    # bfloat16 has 8 bits: a token's log-prob of a few nats is off by some hundredths in either.
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_without_segments_it_is_the_attention_of_before() -> None:
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    for name in ("llama", "mistral", "gemma2"):
        expected = build(name)(input_ids=ids, attention_mask=padding, use_cache=False).logits
        found = shared(name)(input_ids=ids, attention_mask=padding, use_cache=False).logits
        torch.testing.assert_close(found[padding.bool()], expected[padding.bool()], rtol=1e-4, atol=1e-4)


def test_generation_is_as_before() -> None:
    ids = torch.tensor([[5, 9, 14, 30]])
    for name in ("llama", "gemma2", "gpt2"):
        found, expected = (
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            for model in (shared(name), build(name))
        )
        assert torch.equal(found, expected)


def test_the_saved_model_does_not_know_of_it(tmp_path: Path) -> None:
    shared("llama").save_pretrained(tmp_path)
    assert "ncalign" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not shares_prompts(loaded)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


def test_what_mixes_tokens_in_another_way_is_left_as_it_was() -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = batch_of(RAGGED)
    before = completion_logprobs(model, batch).detach()
    assert share_prompts(model)
    assert not shares_prompts(model)
    assert torch.equal(completion_logprobs(model, batch).detach(), before)


def test_what_looks_right_and_is_not_is_found_out() -> None:
    model = build("llama")
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def leaky(*args: Any, **kwargs: Any) -> Any:
        hidden, weights = forward(*args, **kwargs)
        return hidden + 0.01 * hidden.mean(dim=1, keepdim=True), weights

    attention.forward = leaky
    reason = share_prompts(model)
    assert reason is not None
    assert "log-probs differ by" in reason
    assert not shares_prompts(model)


def seeing_half_of_the_prompt(segments: Any, length: int, prompt: int, reach: int, device: torch.device) -> Tensor:
    mask = _causal_mask(segments, length, prompt, reach, device).clone()
    mask[:, : prompt // 2] = False
    return mask


class HalfBackward(torch.autograd.Function):
    """The same values, and half of the gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return 0.5 * gradients[0]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_wrong_values_and_wrong_gradients_are_found_out(
    name: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LogprobModel(build(name), autocast=autocast)
    assert why_not_shared(model, device=CPU) is None
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_causal_mask", seeing_half_of_the_prompt)
        assert re.fullmatch(
            r"log-probs differ by [\d.]+ nats in a row of 67 tokens on cpu", why_not_shared(model, device=CPU) or ""
        )
    plain = attention._span_attention

    def half_backward(row: Any, *given: Any, **options: Any) -> Any:
        return plain((*row[:2], HalfBackward.apply(row[2])), *given, **options)

    monkeypatch.setattr(attention, "_span_attention", half_backward)
    assert re.fullmatch(r"gradients differ by [\d.]+ % in a row of 67 tokens on cpu", why_not_shared(model, device=CPU) or "")


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_comparing_leaves_no_trace(wrong: bool, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(build("llama"))
    if checkpointed:
        recompute_activations(model.get_base_model())
    if wrong:
        monkeypatch.setattr(attention, "_causal_mask", seeing_half_of_the_prompt)
    model.train()
    model.get_base_model().model.layers[1].eval()
    for place, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, float(place))

    def state() -> list[Any]:
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        hooks = [len(module._forward_hooks) for module in model.modules()]
        return [*(p.detach().clone() for p in model.parameters()), *grads, torch.get_rng_state(), modes, hooks]

    before = state()
    assert (why_not_shared(LogprobModel(model), device=CPU) is not None) == wrong
    for expected, found in zip(before, state(), strict=True):
        assert torch.equal(expected, found) if isinstance(expected, Tensor) else expected == found
    assert not shares_prompts(model.get_base_model())


def test_what_is_compared_has_a_place_in_the_model() -> None:
    model = build("gpt2")
    model.resize_token_embeddings(40)
    model.config.vocab_size, model.config.pad_token_id, model.config.image_token_index = VOCABULARY, 7, 11
    for sizes in (_SHORT, _LONG):
        batch = _probe(model, sizes, CPU)
        found = set(batch.tokens.tolist())
        assert max(found) < 40
        assert not found & {1, 2, 7, 11}
        longest = max(span.prompt + max(span.completions) for span in batch.spans)
        assert longest == (35 if sizes is _SHORT else 128)
        assert batch.completion_lengths[0].tolist() == list(batch.spans[0].completions)
    assert share_prompts(model) is None


SELECT = torch.tensor([[2, 0], [-1, -1], [3, 1], [1, -1]])


def chosen_values_and_gradients(
    model: torch.nn.Module, batch: GroupBatch, select: Tensor
) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
    """The scores of all, and of the chosen what `values_and_gradients` gives."""
    model.zero_grad(set_to_none=True)
    logprobs, scores, _ = chosen_logprobs(model, batch, lambda scores: select, scoring=nullcontext())  # type: ignore[arg-type]
    assert scores is not None
    weights = 0.3 + 0.17 * torch.arange(logprobs.numel(), dtype=logprobs.dtype).view_as(logprobs)
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores, (logprobs.detach(), gradients)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_once_for_scoring_and_training(name: str) -> None:
    batch, model = batch_of(RAGGED), shared(name)
    expected = values_and_gradients(model, batch, SELECT)
    with torch.no_grad():
        everything = completion_logprobs(model, batch)
    scores, found = chosen_values_and_gradients(model, batch, SELECT)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, everything, rtol=0, atol=1e-4)
    assert_same(found, expected, nats=1e-4, relative=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    sizes=SHAPES,
    name=st.sampled_from(["llama", "mistral", "gemma2"]),
    pick=st.integers(0, 4),
)
def test_prompts_once_whatever_the_shapes(sizes: Sizes, name: str, pick: int) -> None:
    batch, model = batch_of(sizes), shared(name)
    select = torch.tensor([[pick if pick < len(lengths) else -1, 0] for _, lengths in sizes])
    found = chosen_values_and_gradients(model, batch, select)[1]
    assert_same(found, values_and_gradients(model, batch, select), nats=1e-4, relative=1e-5)


def test_prompts_once_with_activation_checkpointing() -> None:
    batch, model = batch_of(RAGGED), shared("llama")
    expected = chosen_values_and_gradients(model, batch, SELECT)[1]
    recompute_activations(model)
    model.train()
    assert_same(chosen_values_and_gradients(model, batch, SELECT)[1], expected, nats=0.0, relative=1e-6)


def test_prompts_once_when_nothing_is_chosen() -> None:
    found = chosen_values_and_gradients(shared("llama"), batch_of(RAGGED), torch.full((4, 2), -1))[1]
    assert found[0].eq(0).all()
    assert all(gradient.eq(0).all() for gradient in found[1].values())


@pytest.mark.parametrize("training", [None, torch.bfloat16])
def test_every_weight_has_its_gradient_when_scored_in_bfloat16(training: torch.dtype | None) -> None:
    batch = batch_of(RAGGED)
    model = LogprobModel(build("llama"), autocast=training)
    assert not model.model.config.tie_word_embeddings
    assert share_prompts(model.model) is None
    logprobs, scores, _ = model(batch, choose=lambda scores: SELECT, dtype=torch.bfloat16)
    logprobs.sum().backward()
    assert not scores.requires_grad
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(batch, SELECT).logprobs.sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=(1e-5 if training is None else 0.1) * float(gradient.abs().max())
        )


def test_layouts_by_hand() -> None:
    tokens, spans = torch.arange(10, 21), [Span(0, 2, (1, 3)), Span(6, 3, (2,))]
    row = shared_layout(tokens, spans, [[1], [0]])
    assert row.input_ids.tolist() == [[10, 11, 13, 14, 15, 16, 17, 18, 19, 20]]
    assert row.position_ids is not None
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert row.predictors.tolist() == [1, 2, 3, 7, 8]
    assert row.targets.tolist() == [13, 14, 15, 19, 20]
    assert row.owners.tolist() == [0, 0, 0, 1, 1]
    rows = padded_layout(tokens, spans, [[0, 1], []], pad_token_id=9)
    assert rows.input_ids.tolist() == [[10, 11, 12, 9, 9], [10, 11, 13, 14, 15]]
    assert rows.predictors.tolist() == [1, 6, 7, 8]
    assert rows.targets.tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_rounding_to_bfloat16_is_measured_however_weights_are_held(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    model = LogprobModel(build("llama", dtype=dtype), autocast=autocast)
    batch = sharing._probe(model.model, sharing._SHORT, CPU)
    most = sharing._tolerance(model, batch, sharing._values_and_gradients(model, batch))
    assert most.values > sharing._LEAST.values
    assert most.gradients > sharing._LEAST.gradients

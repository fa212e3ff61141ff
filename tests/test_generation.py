"""Sampling with a transformers model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from ncalign.data.groups import Group, Message, read_groups
from ncalign.data.rendering import Rendering
from ncalign.generation.base import Completion, SamplingParams
from ncalign.generation.config import GenerateConfig
from ncalign.generation.generate import run_generate, sample_groups
from ncalign.generation.local import TransformersGenerator

PROMPTS: list[str | list[Message]] = [
    "What is seven plus five?",
    [{"role": "user", "content": "Reply with the final answer only, please."}],
    "The",
    [{"role": "system", "content": "system"}, {"role": "user", "content": "What is 17 times 23? " * 3}],
]


def generator_of(model: Any, tokenizer: Any, batch_size: int = 64) -> TransformersGenerator:
    return TransformersGenerator(model, tokenizer, string_prompts="raw", batch_size=batch_size, progress=False)


def biased(model: LlamaForCausalLM, logits: dict[int, float]) -> LlamaForCausalLM:
    """The model with next-token logits that are the given ones everywhere, whatever the text; -inf where none is given."""

    def replace(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        constant = torch.full_like(output, -math.inf)
        for token, value in logits.items():
            constant[..., token] = value
        return constant

    model.lm_head.register_forward_hook(replace)
    return model


def ids_of(tokenizer: PreTrainedTokenizerFast, letters: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(letter) for letter in letters]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_equals_transformers_generate_one_by_one(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    found = generator_of(tiny_model, tiny_tokenizer, batch_size).generate(
        PROMPTS, num_samples=1, params=SamplingParams(12, temperature=0.0), seed=0
    )
    for prompt, [completion] in zip(PROMPTS, found, strict=True):
        text = prompt
        if not isinstance(prompt, str):
            text = tiny_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        inputs = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        output = tiny_model.generate(**inputs, max_new_tokens=12, do_sample=False)
        expected = output[0, inputs["input_ids"].shape[1] :]
        assert completion.text == tiny_tokenizer.decode(expected, skip_special_tokens=True)
        assert completion.num_tokens == len(expected)


def test_the_head_reads_one_contiguous_row_a_prompt(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of a view of every position it would multiply hundreds of times more slowly on a CPU, with gigabytes of scratch."""
    given: list[torch.Tensor] = []
    handle = tiny_model.lm_head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    generator_of(tiny_model, tiny_tokenizer).generate(PROMPTS, num_samples=1, params=SamplingParams(3), seed=0)
    handle.remove()
    assert given[0].shape[:2] == (len(PROMPTS), 1)
    assert all(one.is_contiguous() for one in given)


def test_same_seed_same_samples_and_no_global_random_state(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = generator_of(tiny_model, tiny_tokenizer, 4)
    params = SamplingParams(8, temperature=1.0)
    state = torch.random.get_rng_state()
    first = generator.generate(PROMPTS, num_samples=3, params=params, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert generator.generate(PROMPTS, num_samples=3, params=params, seed=5) == first
    assert generator.generate(PROMPTS, num_samples=3, params=params, seed=6) != first


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 2), (3, 2), (3, 64), (5, 3)])
def test_every_prompt_gets_its_own_samples(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, num_samples: int, batch_size: int
) -> None:
    # A vanishing temperature makes each sample the greedy answer, so one that came from another prompt would show.
    generator = generator_of(tiny_model, tiny_tokenizer, batch_size)
    greedy = generator.generate(PROMPTS, num_samples=1, params=SamplingParams(10, temperature=0.0), seed=0)
    found = generator.generate(PROMPTS, num_samples=num_samples, params=SamplingParams(10, temperature=1e-4), seed=0)
    assert len({answer[0].text for answer in greedy}) == len(PROMPTS)
    assert found == [answer * num_samples for answer in greedy]


def test_samples_follow_the_tempered_distribution(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    a, b, c = ids_of(tiny_tokenizer, "abc")
    model = biased(tiny_model, {a: 0.0, b: math.log(4.0), c: math.log(9.0)})
    params = SamplingParams(1, temperature=2.0)  # weights 1, 4, 9 become their roots 1, 2, 3
    n = 6000
    [found] = generator_of(model, tiny_tokenizer, 1000).generate(["The"], num_samples=n, params=params, seed=0)
    counts = Counter(completion.text for completion in found)
    assert set(counts) == {"a", "b", "c"}
    for letter, share in (("a", 1 / 6), ("b", 2 / 6), ("c", 3 / 6)):
        assert counts[letter] / n == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / n))


def test_log_probs_are_those_of_the_model_whatever_the_temperature(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    params = SamplingParams(8, temperature=0.6, top_p=0.9)
    found = generator_of(tiny_model, tiny_tokenizer, 3).generate(PROMPTS[:1], num_samples=4, params=params, seed=3)
    prompt = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    for completion in found[0]:
        assert completion.token_ids is not None
        ids = torch.cat([prompt, torch.tensor([completion.token_ids])], dim=1)
        with torch.no_grad():
            logprobs = tiny_model(ids).logits.log_softmax(-1)[0, prompt.shape[1] - 1 : -1]
        expected = float(logprobs.gather(1, ids[0, prompt.shape[1] :, None]).sum())
        assert completion.logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("params", "letters"), [(SamplingParams(1, top_k=2), "bc"), (SamplingParams(1, top_p=0.6), "c"), (SamplingParams(1), "abc")]
)
def test_top_k_and_top_p_cut_the_tail(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, params: SamplingParams, letters: str
) -> None:
    a, b, c = ids_of(tiny_tokenizer, "abc")
    model = biased(tiny_model, {a: 0.0, b: math.log(2.0), c: math.log(7.0)})
    [found] = generator_of(model, tiny_tokenizer).generate(["The"], num_samples=200, params=params, seed=0)
    assert {completion.text for completion in found} == set(letters)


def test_completions_end_at_eos_or_at_the_limit(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [a] = ids_of(tiny_tokenizer, "a")
    eos, start = tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
    model = biased(tiny_model, {a: 1.0, eos: 0.0, start: 0.0})
    [found] = generator_of(model, tiny_tokenizer).generate(["The"], num_samples=100, params=SamplingParams(5), seed=0)
    assert {completion.finished for completion in found} == {True, False}
    for completion in found:
        # Text is the letters alone: the special token <|im_start|>, which the model emits too, does not leak into it.
        assert set(completion.text) <= {"a"}
        assert 1 <= completion.num_tokens <= 5
        assert len(completion.text) <= completion.num_tokens - completion.finished
        assert completion.finished or completion.num_tokens == 5


def test_end_tokens_of_the_generation_config_count(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    a, b = ids_of(tiny_tokenizer, "ab")
    tiny_model.generation_config.eos_token_id = [b]
    model = biased(tiny_model, {a: 0.0, b: 0.0})
    [found] = generator_of(model, tiny_tokenizer).generate(["The"], num_samples=50, params=SamplingParams(20), seed=0)
    assert all(completion.finished for completion in found)
    assert all(completion.text == "a" * (completion.num_tokens - 1) for completion in found)


def test_sampling_defaults_of_the_model_are_not_used(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    params = SamplingParams(6)
    plain = generator_of(tiny_model, tiny_tokenizer).generate(PROMPTS, num_samples=4, params=params, seed=0)
    tiny_model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
    assert generator_of(tiny_model, tiny_tokenizer).generate(PROMPTS, num_samples=4, params=params, seed=0) == plain


def test_a_prompt_beyond_the_context_is_refused(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    long = "a b " * 300
    length = len(tiny_tokenizer(long)["input_ids"])
    assert length > 512 - 8
    message = f"prompt 2: its {length} tokens and max_new_tokens=8 exceed the model's context of 512"
    with pytest.raises(ValueError, match=message):
        generator_of(tiny_model, tiny_tokenizer).generate(["a", long], num_samples=1, params=SamplingParams(8), seed=0)


class Scripted:
    """A generator that answers with given texts."""

    string_prompts: Rendering = "user_turn"

    def __init__(self, *texts: str) -> None:
        self._completions = [Completion(text, num_tokens=len(text) + 1, finished=True) for text in texts]

    def generate(
        self,
        prompts: Sequence[str | list[Message]],
        *,
        num_samples: int,
        params: SamplingParams,
        seed: int,
        tools: Any = None,
        refuse: Any = None,
    ) -> list[list[Completion]]:
        return [self._completions[:num_samples] for _ in prompts]


def test_completions_are_of_the_prompt_s_kind_and_never_empty() -> None:
    prompts = [
        Group(id="s", prompt="Q", candidates=[], metadata={"k": 1, "reward_steps": ["of other candidates"]}),
        Group(id="c", prompt=[{"role": "user", "content": "Q"}], candidates=[]),
    ]
    groups, _ = sample_groups(
        prompts, Scripted("yes", " \n", "yes"), num_samples=3, params=SamplingParams(4), seed=0, source="model"
    )
    assert [candidate.completion for candidate in groups[0].candidates] == ["yes", "yes"]
    assert [candidate.completion for candidate in groups[1].candidates] == [[{"role": "assistant", "content": "yes"}]] * 2
    assert {candidate.source for group in groups for candidate in group.candidates} == {"model"}
    assert (groups[0].metadata, groups[1].metadata) == ({"k": 1, "string_prompts": "user_turn"}, {})


def test_completions_are_counted() -> None:
    prompts = [Group(id=name, prompt="Q", candidates=[]) for name in "ab"]
    # A fourth completion is asked for and not given.
    _, counts = sample_groups(
        prompts, Scripted("yes", " \n", "no"), num_samples=4, params=SamplingParams(4), seed=0, source="m"
    )
    assert (counts.groups, counts.candidates, counts.empty, counts.missing, counts.unfinished) == (2, 4, 2, 2, 0)
    assert counts.tokens == 2 * (4 + 3 + 3)


def test_run_generate_writes_groups(tmp_path: Path, tiny_model_dir: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [
        {"id": "a", "prompt": "What is seven plus five?", "metadata": {"task": "sum"}},
        {"id": "b", "prompt": [{"role": "user", "content": "Why?"}], "candidates": [{"completion": "old"}]},
    ]
    config = GenerateConfig(
        model=str(tiny_model_dir), prompts=write_jsonl(rows), output=tmp_path / "out.jsonl", num_samples=3, max_new_tokens=6
    )
    result = run_generate(config)
    groups = list(read_groups(tmp_path / "out.jsonl"))
    assert [group.id for group in groups] == ["a", "b"]
    assert (groups[0].metadata, groups[1].metadata) == ({"task": "sum", "string_prompts": "user_turn"}, {})
    assert result["candidates"] == sum(len(group.candidates) for group in groups)
    assert result["candidates"] + result["empty"] == 6  # type: ignore[operator]
    assert "old" not in str(groups[1].candidates)
    run_generate(config.model_copy(update={"output": tmp_path / "again.jsonl"}))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_run_generate_refuses_a_file_without_prompts(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    config = GenerateConfig(model=str(tiny_model_dir), prompts=tmp_path / "none.jsonl", output=tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        run_generate(config)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_without_a_cache_of_keys_and_values_is_refused_in_words(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = MambaConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"MambaForCausalLM keeps what it has read in a way that can't be sampled from here"):
        generator_of(MambaForCausalLM(config), tiny_tokenizer).generate(
            PROMPTS[:1], num_samples=2, params=SamplingParams(2), seed=0
        )

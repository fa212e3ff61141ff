"""Batches of groups: where every token, mask and number goes; and how a step is split into passes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from conftest import build_tokenizer
from ncalign import encode_groups
from ncalign.data.groups import Candidate, Group
from ncalign.demo.config import DemoConfig
from ncalign.generation.config import GenerateConfig
from ncalign.model.batching import collate, epoch_order, group_generator, split_by_tokens
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder
from ncalign.model.layout import Span
from ncalign.objectives import target_weights
from ncalign.objectives.kernels import eligible_negatives
from ncalign.training.config import TrainConfig

PAD = 9
TRAIN = {"model": "m", "data": "d.jsonl", "output_dir": "o"}
GENERATE = {"model": "m", "prompts": "p.jsonl", "output": "o.jsonl"}


def group(name: str, prompt: list[int], completions: list[list[int]], rewards: list[float | None]) -> EncodedGroup:
    return EncodedGroup(
        id=name,
        origin="",
        prompt=np.asarray(prompt, dtype=np.int32),
        completions=tuple(np.asarray(completion, dtype=np.int32) for completion in completions),
        rewards=tuple(rewards),
        reference_logprobs=tuple(None if reward is None else -reward for reward in rewards),
    )


def test_collate_puts_everything_in_its_place() -> None:
    batch = collate(
        [group("a", [1, 2], [[3], [4, 5, 6]], [0.5, None]), group("b", [7, 8, 1], [[2, 3]], [0.25])], pad_token_id=PAD
    )
    nan = float("nan")
    assert batch.ids == ("a", "b")
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    assert batch.spans == (Span(0, 2, (1, 3)), Span(6, 3, (2,)))
    assert batch.candidate_mask.tolist() == [[True, True], [True, False]]
    assert batch.completion_lengths.tolist() == [[1, 3], [2, 0]]
    rewards = torch.tensor([[0.5, nan], [0.25, nan]], dtype=torch.float64)
    torch.testing.assert_close(batch.rewards, rewards, rtol=0, atol=0, equal_nan=True)
    expected = torch.tensor([[-0.5, nan], [-0.25, nan]], dtype=torch.float64)
    torch.testing.assert_close(batch.reference_logprobs, expected, rtol=0, atol=0, equal_nan=True)


def test_reference_logprobs_keep_float64() -> None:
    # A sum over a thousand tokens has a thousandth of a nat beyond float32's digits after the conversion to float32 and back.
    precise = -1234.000012345
    made = dataclasses.replace(group("a", [1], [[2]], [0.0]), reference_logprobs=(precise,))
    assert float(collate([made], pad_token_id=PAD).reference_logprobs[0, 0]) == precise


def test_rewards_that_float32_can_not_tell_apart_stay_apart() -> None:
    batch = collate(
        [group("a", [1], [[2], [3]], [16777216.0, 16777217.0]), group("b", [1], [[2], [3]], [1e39, 1e38])], pad_token_id=PAD
    )
    assert batch.rewards.tolist() == [[16777216.0, 16777217.0], [1e39, 1e38]]
    below = eligible_negatives(batch.rewards, torch.tensor([1, 0]), batch.candidate_mask)
    assert below.tolist() == [[True, False], [False, True]]
    # sigmoid(1) and 1 - sigmoid(1) for rewards that differ by 1; all the weight on the best one of the others.
    weights = target_weights(batch.rewards, batch.candidate_mask, alpha=1.0)
    share = 1 / (1 + math.exp(-1.0))
    expected = torch.tensor([[1 - share, share], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)


class TestEncodeGroups:
    def test_is_the_encoder_and_collate(self) -> None:
        tokenizer = build_tokenizer()
        groups = [
            Group("a", [{"role": "user", "content": "What is 7?"}], [Candidate("12", 1.0), Candidate("The answer", None)]),
            Group("b", "Plain text", [Candidate(" is twelve", 0.5, reference_logprob=-3.0)]),
        ]
        found = encode_groups(tokenizer, iter(groups))
        encoder = Encoder(tokenizer)
        expected = collate([encoder.encode(group) for group in groups], pad_token_id=tokenizer.pad_token_id)
        assert found.ids == ("a", "b")
        for name, value in vars(expected).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0, equal_nan=True)

    def test_hands_on_its_settings_and_warns_of_what_was_cut(self) -> None:
        tokenizer = build_tokenizer()
        groups = [Group("a", "What is seven plus five?", [Candidate("The answer is twelve.", 1.0)])]
        with pytest.warns(UserWarning, match="1 prompts lost their beginning and 1 completions their end"):
            batch = encode_groups(tokenizer, groups, max_length=6, max_prompt_length=2)
        assert batch.spans == (Span(0, 2, (4,)),)
        turn = encode_groups(tokenizer, groups, string_prompts="user_turn")
        assert tokenizer.decode(turn.tokens).startswith("<|im_start|>user\nWhat is seven plus five?")

    def test_pads_with_eos_where_there_is_no_padding_token(self) -> None:
        tokenizer = build_tokenizer()
        tokenizer.pad_token = None
        batch = encode_groups(tokenizer, [Group("a", "What", [Candidate(" is", 1.0), Candidate(" is seven plus", 0.0)])])
        assert batch.pad_token_id == tokenizer.eos_token_id

    def test_refuses_what_can_not_be_a_batch(self) -> None:
        tokenizer = build_tokenizer()
        with pytest.raises(ValueError, match="there are no groups: a batch needs at least one"):
            encode_groups(tokenizer, [])
        with pytest.raises(ValueError, match=r"x\.jsonl:2: group 'a' has no candidates"):
            encode_groups(tokenizer, [Group("a", "What", [], origin="x.jsonl:2")])
        with pytest.raises(DroppedGroupError, match=r"x\.jsonl:3: group 'b': a completion is empty"):
            encode_groups(tokenizer, [Group("b", "What", [Candidate(" ", 1.0)], origin="x.jsonl:3")])


def test_to_moves_every_tensor() -> None:
    batch = collate([group("a", [1], [[2]], [0.0])], pad_token_id=PAD).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert (
        len(tensors) == len(dataclasses.fields(batch)) - 4
    )  # ids, spans and the padding's id are no tensors; masks stay on the host
    assert all(tensor.device.type == "meta" for tensor in tensors)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 8), st.integers(2, 60)), max_size=20),
    max_groups=st.integers(1, 6),
    max_tokens=st.integers(1, 400),
    padded=st.booleans(),
)
def test_passes_hold_each_group_once_within_the_limits(
    sizes: list[tuple[int, int]], max_groups: int, max_tokens: int, padded: bool
) -> None:
    passes = list(split_by_tokens(sizes, max_groups=max_groups, max_tokens=max_tokens, padded=padded))
    assert sorted(position for part in passes for position in part) == list(range(len(sizes)))
    for part in passes:
        assert 1 <= len(part) <= max_groups
        rows, widths = zip(*(sizes[position] for position in part), strict=True)
        tokens = sum(rows) * max(widths) if padded else sum(r * w for r, w in zip(rows, widths, strict=True))
        assert tokens <= max_tokens or len(part) == 1
    widths = tuple(sizes[position][1] for part in passes for position in part)
    assert widths == tuple(sorted(widths, reverse=True))


def test_passes_are_no_smaller_than_they_must_be() -> None:
    for padded in (True, False):
        assert list(split_by_tokens([(2, 10)] * 5, max_groups=8, max_tokens=80, padded=padded)) == [[0, 1, 2, 3], [4]]
        assert list(split_by_tokens([(2, 10)] * 5, max_groups=3, max_tokens=10_000, padded=padded)) == [[0, 1, 2], [3, 4]]
    # Two rows of 30 and two of 10 tokens: 4 rows of 30 when padded, 80 tokens when not.
    assert list(split_by_tokens([(2, 10), (2, 30)], max_groups=8, max_tokens=100, padded=True)) == [[1], [0]]
    assert list(split_by_tokens([(2, 10), (2, 30)], max_groups=8, max_tokens=100, padded=False)) == [[1, 0]]


@pytest.mark.parametrize(("model", "needed"), [(TrainConfig, TRAIN), (GenerateConfig, GENERATE), (DemoConfig, {})])
def test_seeds_are_what_generators_take(model: type[BaseModel], needed: dict[str, str]) -> None:
    largest = 2**63 - 1
    assert model(**needed, seed=largest).seed == largest
    assert torch.Generator().manual_seed(largest).initial_seed() == largest
    assert len(epoch_order(3, epoch=0, seed=largest)) == 3
    for seed in (2**63, 2**70, -1):
        with pytest.raises(ValidationError, match="seed"):
            model(**needed, seed=seed)


@pytest.mark.parametrize(
    ("lengths", "fits"),
    [({"max_length": 256}, True), ({"max_length": 2}, True)]
    + [({"max_length": 8, "max_prompt_length": prompt}, prompt < 8) for prompt in (7, 8, 9)],
)
def test_completions_have_room_in_the_configuration(lengths: dict[str, int], fits: bool) -> None:
    if fits:
        TrainConfig(**TRAIN, **lengths)
        return
    with pytest.raises(ValidationError, match=r"max_prompt_length \([89]\) must be less than max_length \(8\)"):
        TrainConfig(**TRAIN, **lengths)


def test_a_visit_has_random_numbers_of_its_own() -> None:
    def draw(seed: int, epoch: int, index: int) -> float:
        return float(torch.rand((), generator=group_generator(seed, epoch=epoch, index=index)))

    visits = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1, 2) for index in range(12)]
    values = {visit: draw(*visit) for visit in visits}
    assert len(set(values.values())) == len(visits)
    assert values == {visit: draw(*visit) for visit in reversed(visits)}

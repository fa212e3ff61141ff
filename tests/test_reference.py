"""Reference log-probs: found again, never mixed up, never computed twice, whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from conftest import CHATML, build_tokenizer
from ncalign.data.groups import Candidate, Group
from ncalign.model.encoding import EncodedGroup, Encoder
from ncalign.model.logprobs import LogprobModel
from ncalign.model.reference import ReferenceCache, candidate_key, missing_groups, reference_folder, with_reference
from ncalign.objectives import DPO, build_method
from ncalign.training.engine import Engine


def group(prompt: list[int], *completions: list[int]) -> EncodedGroup:
    parts = tuple(np.asarray(completion, dtype=np.int32) for completion in completions)
    none = (None,) * len(parts)
    return EncodedGroup("g", "", np.asarray(prompt, dtype=np.int32), parts, none, none)


def key(prompt: list[int], completion: list[int]) -> bytes:
    return candidate_key(group(prompt, completion), 0)


class TestKeys:
    def test_stands_for_tokens_alone(self) -> None:
        one = group([1, 2], [3], [4, 5])
        other = replace(one, id="other", origin="file:1", rewards=(1.0, 0.0))
        assert [candidate_key(one, k) for k in (0, 1)] == [candidate_key(other, k) for k in (0, 1)]
        assert candidate_key(one, 1) == key([1, 2], [4, 5])

    def test_the_split_counts(self) -> None:
        # The same five tokens; what is scored differs.
        keys = {key([1, 2, 3, 4, 5][:split], [1, 2, 3, 4, 5][split:]) for split in range(6)}
        assert len(keys) == 6

    def test_every_token_counts(self) -> None:
        keys = {key([1, 2], [3, 4]), key([9, 2], [3, 4]), key([1, 2], [3, 9]), key([1, 2], [3]), key([2, 1], [3, 4])}
        assert len(keys) == 5

    def test_template_text_and_truncation_act_through_the_tokens(self) -> None:
        asked = Group("g", [{"role": "user", "content": "What is 7?"}], [Candidate("The answer is twelve.")])

        def of(template: str = CHATML, answer: str = "The answer is twelve.", **limits: int) -> bytes:
            tokenizer = build_tokenizer()
            tokenizer.chat_template = template
            return candidate_key(Encoder(tokenizer, **limits).encode(replace(asked, candidates=[Candidate(answer)])), 0)

        same = of()
        assert of() == same
        assert of(max_length=600) == same
        others = [of("{{ bos_token }}" + CHATML), of(answer="12"), of(max_length=12, max_prompt_length=8)]
        assert len({same, *others}) == 4

    def test_a_fingerprint_has_a_folder_of_its_own(self, tmp_path: Path) -> None:
        folders = {
            reference_folder(tmp_path, digit * 64, shared=shared) for digit in "0123456789abcdef" for shared in (True, False)
        }
        assert len(folders) == 32
        assert all(tmp_path in folder.parents for folder in folders)


class TestCache:
    def test_values_are_found_again_exactly(self, tmp_path: Path) -> None:
        values = {key([1], [k]): -1000 / 3 * k for k in range(1, 50)}
        cache = ReferenceCache(tmp_path)
        for name, value in values.items():
            cache.add(name, value)
        assert cache.values == values
        assert ReferenceCache(tmp_path).values == {}
        cache.flush()
        assert ReferenceCache(tmp_path).values == values
        cache.flush()
        assert len(list(tmp_path.iterdir())) == 1

    def test_many_values_reach_the_disk_on_the_way(self, tmp_path: Path) -> None:
        cache = ReferenceCache(tmp_path)
        for k in range(5000):
            cache.add(k.to_bytes(16, "big"), float(k))
        # A run that is killed keeps all but the last few.
        assert 4000 < len(ReferenceCache(tmp_path).values) < 5000
        cache.flush()
        assert len(ReferenceCache(tmp_path).values) == 5000

    def test_two_writers_side_by_side(self, tmp_path: Path) -> None:
        first, second = ReferenceCache(tmp_path), ReferenceCache(tmp_path)
        first.add(key([1], [2]), -1.0)
        second.add(key([1], [3]), -2.0)
        first.flush()
        second.flush()
        assert ReferenceCache(tmp_path).values == {key([1], [2]): -1.0, key([1], [3]): -2.0}

    @pytest.mark.parametrize("kept", [0, 3, 100])
    def test_a_truncated_part_is_left_out(self, tmp_path: Path, kept: int) -> None:
        for number in (1, 2):
            cache = ReferenceCache(tmp_path)
            cache.add(key([number], [2]), -float(number))
            cache.flush()
        damaged, whole = sorted(tmp_path.iterdir())
        (lost,) = pq.read_table(damaged).column("key").to_pylist()
        damaged.write_bytes(damaged.read_bytes()[:kept])
        cache = ReferenceCache(tmp_path)
        (found,) = pq.read_table(whole).column("key").to_pylist()
        assert set(cache.values) == {found}
        # And is filled in anew, beside it.
        cache.add(lost, -7.0)
        cache.flush()
        assert ReferenceCache(tmp_path).values[lost] == -7.0

    def test_no_flipped_bit_changes_a_value(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cache = ReferenceCache(tmp_path)
        for number in range(20):
            cache.add(key([number], [2]), -float(number))
        cache.flush()
        (part,) = tmp_path.iterdir()
        whole = part.read_bytes()
        for position in range(len(whole)):
            part.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
            assert ReferenceCache(tmp_path).values == {}
        assert "1 of 1 parts are damaged or another user's; their log-probs are computed again" in capsys.readouterr().err
        cache = ReferenceCache(tmp_path)
        cache.add(key([3], [2]), -3.0)
        cache.flush()
        assert ReferenceCache(tmp_path).values == {key([3], [2]): -3.0}

    def test_a_temporary_file_of_a_killed_writer_is_not_read(self, tmp_path: Path) -> None:
        cache = ReferenceCache(tmp_path)
        cache.add(key([1], [2]), -1.0)
        cache.flush()
        (part,) = tmp_path.iterdir()
        part.rename(tmp_path / f".{part.name}.tmp")
        assert ReferenceCache(tmp_path).values == {}


def test_missing_and_filling_in() -> None:
    groups = [group([1], [2], [3]), group([4], [5])]
    cache = ReferenceCache(Path("nowhere"))
    assert missing_groups(groups, cache) == [0, 1]
    cache.add(key([1], [2]), -1.0)
    assert missing_groups(groups, cache) == [0, 1]
    cache.add(key([1], [3]), -2.0)
    assert missing_groups(groups, cache) == [1]
    cache.add(key([4], [5]), -3.0)
    assert missing_groups(groups, cache) == []
    filled = with_reference(groups, cache.values.__getitem__)
    assert [item.reference_logprobs for item in filled] == [(-1.0, -2.0), (-3.0,)]
    assert groups[0].reference_logprobs == (None, None)


def test_nothing_is_computed_twice(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    rows = []
    tiny_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    engine = Engine(
        LogprobModel(tiny_model),
        build_method(DPO()),
        Accelerator(cpu=True),
        pad_token_id=0,
        seed=0,
        max_groups=2,
        max_tokens=64,
    )
    groups = [group([10, 11], [12, 13], [14]), group([15], [16, 17]), group([18, 19, 20], [21], [22], [23, 24])]
    assert engine.fill_reference(groups[:2], ReferenceCache(tmp_path)) == 2
    assert sum(rows) == 3
    # Another run finds them and computes the new group only.
    again = ReferenceCache(tmp_path)
    assert engine.fill_reference(groups, again) == 1
    assert sum(rows) == 6
    assert engine.fill_reference(groups, ReferenceCache(tmp_path)) == 0
    assert sum(rows) == 6
    # And they are the model's own log-probs.
    for item in with_reference(groups, again.values.__getitem__):
        for completion, found in zip(item.completions, item.reference_logprobs, strict=True):
            ids = torch.from_numpy(np.concatenate([item.prompt, completion])).long()[None]
            with torch.no_grad():
                token = tiny_model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            assert found == pytest.approx(float(token[len(item.prompt) - 1 :].sum()), rel=1e-5)

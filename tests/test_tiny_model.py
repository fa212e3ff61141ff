"""The tiny model and its tasks: parts that share no question, verifiers that accept the right answer, an ordinary folder."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ncalign.cli.app import main
from ncalign.core.atomic import delete_folder
from ncalign.data.groups import Candidate, Group, read_groups
from ncalign.generation.base import SamplingParams
from ncalign.generation.local import TransformersGenerator, load_for_generation
from ncalign.rewards.score import score_groups
from ncalign.rewards.verifiable import ReasoningGymReward
from ncalign.study import tiny_model
from ncalign.study.material import tiny_groups
from ncalign.study.tiny_model import Pretraining, byte_tokenizer, pretrained, tiny_model_folder, write_tiny_model
from ncalign.study.tiny_tasks import MIXES, PARTS, Mix, part_of, tiny_prompts

FEW = Pretraining(steps=3, batch_size=4)


def questions(groups: list[Group]) -> set[str]:
    return {str(group.prompt[0]["content"]) for group in groups}  # type: ignore[index]


class TestTasks:
    @pytest.mark.parametrize("mix", get_args(Mix))
    def test_parts_share_no_question_and_prompts_are_repeatable(self, mix: Mix) -> None:
        by_part = {
            part: questions([*tiny_prompts(90, mix=mix, part=part), *tiny_prompts(90, mix=mix, part=part, seed=5)])
            for part in PARTS
        }
        assert not by_part["pretraining"] & by_part["train"]
        assert not by_part["pretraining"] & by_part["heldout"]
        assert not by_part["train"] & by_part["heldout"]
        prompts = tiny_prompts(90, mix=mix, part="heldout")
        assert len(questions(prompts)) == len({group.id for group in prompts}) == 90
        assert tiny_prompts(30, mix=mix, part="heldout") == prompts[:30]
        assert {group.metadata["task"] for group in prompts} == {task.name for task in MIXES[mix]}

    @pytest.mark.parametrize("mix", get_args(Mix))
    def test_verifiers_pay_for_the_right_answer_alone(self, mix: Mix) -> None:
        for group in tiny_prompts(60, mix=mix, part="train"):
            answers = [str(group.metadata["entry"]["answer"]), "zzzzzzzz", ""]
            candidates = [Candidate([{"role": "assistant", "content": text}]) for text in answers]
            [scored] = score_groups([dataclasses.replace(group, candidates=candidates)], ReasoningGymReward())
            right, wrong, empty = (candidate.reward for candidate in scored.candidates)
            assert right == 1.0
            assert wrong is not None
            assert wrong < 0.5
            assert empty is not None
            assert empty < 0.5

    def test_short_prompts_hold_what_the_answer_is_made_of(self) -> None:
        # Recomputed from the prompt's own text.
        for group in tiny_prompts(40, mix="numbers", part="train"):
            question, answer = str(group.prompt[0]["content"]), int(group.metadata["entry"]["answer"])  # type: ignore[index]
            if group.metadata["task"] == "gcd":
                first, second = map(int, re.findall(r"\d+", question))
                assert all(number % answer == 0 for number in (first, second))
            else:
                assert eval(question.rstrip("= "), {"__builtins__": {}}) == answer

    def test_the_order_of_a_sum_decides_nothing(self) -> None:
        assert part_of("4 + 7 + 1 =") == part_of("1 + 7 + 4 =")
        assert part_of("gcd: 12, 18") == part_of("gcd: 18, 12")

    def test_too_many_prompts_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = dataclasses.replace(
            MIXES["numbers"][1], settings={"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 4}
        )
        monkeypatch.setitem(MIXES, "numbers", (small,))
        with pytest.raises(ValueError, match=r"99 prompts of the mix 'numbers' are too many: its tasks have \d different"):
            tiny_prompts(99, mix="numbers", part="train")


class TestModel:
    def test_any_text_is_read_and_written_as_it_is(self) -> None:
        tokenizer = byte_tokenizer()
        for text in ("backward: house", "naïve 数 \n\t<b>", "  two  spaces "):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == len(text.encode())
            assert tokenizer.decode(ids) == text
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False, add_generation_prompt=True)
        assert shown == "<|user|>ab<|end|><|assistant|>"
        assert len(tokenizer(shown, add_special_tokens=False)["input_ids"]) == 5

    def test_pretraining_is_a_function_of_its_recipe_and_learns(self) -> None:
        tokenizer = byte_tokenizer()
        torch.manual_seed(7)
        before = torch.random.get_rng_state()
        first, again = pretrained(tokenizer, FEW), pretrained(tokenizer, FEW)
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
        longer = pretrained(tokenizer, dataclasses.replace(FEW, steps=25, batch_size=16))
        ids, targets = next(tiny_model._batches(tokenizer, Pretraining(steps=1, batch_size=64, seed=3)))
        with torch.no_grad():
            assert float(tiny_model._loss(longer, ids, targets)) < float(tiny_model._loss(first, ids, targets)) - 0.5
        # The prompt is not trained on, and each answer ends.
        assert (targets >= 0).any(dim=1).all()
        assert not (targets[:, 0] >= 0).any()

    def test_a_share_of_the_answers_it_reads_has_one_wrong_letter_or_digit(self) -> None:
        tokenizer = byte_tokenizer()
        right, wrong, some = (
            list(itertools.islice(tiny_model._conversations(tokenizer, Pretraining(slips=slips)), 400))
            for slips in (0.0, 1.0, 0.25)
        )
        for (read, asked), (slipped, _) in zip(right, wrong, strict=True):
            [(was, is_now)] = [pair for pair in zip(read, slipped, strict=True) if pair[0] != pair[1]]
            assert read[:asked] == slipped[:asked]
            kinds = [tokenizer.decode([token]).isdigit() for token in (was, is_now)]
            assert kinds[0] == kinds[1]
        assert 0.68 < sum(read == known for read, known in zip(some, right, strict=True)) / len(some) < 0.82
        assert tiny_model.with_slip("?!", random.Random(0)) == "?!"

    def test_it_is_an_ordinary_folder_of_less_than_a_million_weights(self, tmp_path: Path) -> None:
        write_tiny_model(tmp_path / "tiny", FEW)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
        assert 500_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
        assert tokenizer.chat_template
        assert tokenizer.eos_token == "<|end|>"
        loaded, read = load_for_generation(str(tmp_path / "tiny"), dtype="float32", trust_remote_code=False)
        [[one]] = TransformersGenerator(loaded, read, progress=False).generate(
            ["hello"], num_samples=1, params=SamplingParams(4), seed=0
        )
        assert one.num_tokens <= 4

    def test_it_is_made_once_and_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path))
        folder = tiny_model_folder(FEW)
        made = (folder / "model.safetensors").stat().st_mtime_ns
        assert tiny_model_folder(FEW) == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == made
        assert tiny_model_folder(dataclasses.replace(FEW, seed=1)) != folder

    def test_the_command_writes_a_model_and_groups(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
        write_tiny_model(tmp_path / "cache" / tiny_model.FOLDER_NAME, FEW)
        assert main(["study", "tiny-model", "--output_dir", str(tmp_path / "tiny")]) == 0
        groups = list(read_groups(tmp_path / "tiny" / "groups.jsonl"))
        assert groups
        assert all(candidate.reward is not None for group in groups for candidate in group.candidates)
        assert (tmp_path / "tiny" / "model" / "config.json").is_file()
        assert main(["study", "tiny-model", "--output_dir", str(tmp_path / "tiny")]) == 1
        delete_folder(tmp_path / "tiny" / "model")


@pytest.mark.slow
def test_its_own_answers_are_right_between_a_fifth_and_three_fifths_of_the_time(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny", Pretraining())
    for mix in get_args(Mix):
        for num_samples in (8, 16, 50):
            groups = tiny_groups(tmp_path / "tiny", mix=mix, part="train", num_prompts=90, num_samples=num_samples)
            rewards = [candidate.reward or 0.0 for group in groups for candidate in group.candidates]
            assert 0.2 <= sum(reward >= 1.0 for reward in rewards) / len(rewards) <= 0.6

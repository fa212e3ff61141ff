"""A chat model of less than a million weights, made in a minute or two by whoever needs one: no download, no GPU.

A Llama with a tokenizer of single bytes, pre-trained here on the tasks of :mod:`ncalign.study.tiny_tasks`. It is saved as an
ordinary Hugging Face folder, so that every verb runs on it, and answers about half of its tasks: enough for aligning it
to be worth while, small enough for hundreds of runs in an hour.
"""

from __future__ import annotations

import itertools
import random
import shutil
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ncalign.core.atomic import atomic_folder
from ncalign.core.cache import cache_folder, private_folder
from ncalign.core.locks import locked
from ncalign.core.progress import Bar, say
from ncalign.core.seeds import seed_of
from ncalign.model.policy import quiet_transformers
from ncalign.study.tiny_tasks import MIXES, entries

FOLDER_NAME = "tiny-model-2"
"""In the cache folder; another recipe gets another number."""
_PAD, _END = "<|pad|>", "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_POSITIONS = 512
_CARD = """---
license: apache-2.0
language: en
---

# A tiny chat model

{weights:,} weights: a Llama that reads bytes, made by `ncalign study tiny-model`. It was pre-trained on short questions of
reasoning-gym (words spelt backward, palindromes, letters counted; sums, common divisors and multiples) and knows nothing else.
"""


@dataclass(frozen=True)
class Pretraining:
    """How the tiny model is made.

    Attributes:
        steps: of the optimizer.
        batch_size: questions in one.
        learning_rate: its peak, after ``warmup`` steps; it falls to 0 on a line.
        warmup: steps.
        slips: share of the answers that have a slip: one letter or digit in the place of another. A model that only read right
            answers has nothing left to align: preferences tell which of its manners is wanted, and teach few new abilities.
        seed: of weights, questions and slips.
    """

    steps: int = 1800
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup: int = 50
    slips: float = 0.2
    seed: int = 0


def tiny_model_folder(recipe: Pretraining | None = None) -> Path:
    """The tiny model as a folder that ``from_pretrained`` opens; made at the first call, in a minute or two.

    Args:
        recipe: another one than the usual; such a model is kept under a name of its own.

    Returns:
        The folder, in the user's cache folder.

    Raises:
        ValueError: reasoning-gym, on whose questions it is trained, is not installed.
    """
    name = FOLDER_NAME if recipe is None else f"{FOLDER_NAME}-{seed_of(recipe):x}"
    folder = cache_folder() / name
    if folder.exists():
        return folder
    private_folder(folder.parent)
    with locked(folder.parent, busy=None):
        if not folder.exists():  # another process may have made it meanwhile
            say(f"Pre-training the tiny model in {folder} (once, a minute or two)")
            write_tiny_model(folder, recipe or Pretraining())
    return folder


def write_tiny_model_folder(folder: Path) -> None:
    """Copy the tiny model to a folder, which is not there yet."""
    source = tiny_model_folder()
    with atomic_folder(folder) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def write_tiny_model(folder: Path, recipe: Pretraining) -> None:
    """Make the model and write its folder, whole or not at all."""
    tokenizer = byte_tokenizer()
    model = pretrained(tokenizer, recipe)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    with atomic_folder(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        weights = sum(parameter.numel() for parameter in model.parameters())
        (temporary / "README.md").write_text(_CARD.format(weights=weights), encoding="utf-8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single bytes, so that it reads any text, and five marks of a conversation."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = [_PAD, _END, *_ROLES]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate([*marks, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=list(_ROLES),
        model_max_length=_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = _TEMPLATE
    return made


def pretrained(tokenizer: PreTrainedTokenizerFast, recipe: Pretraining) -> LlamaForCausalLM:
    """The model after its pre-training; torch's own random numbers are left as they were."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_POSITIONS,
        # Larger than the default .02, with which so small a model begins slowly.
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    with Bar("Pre-training", recipe.steps) as bar:
        for step, (ids, targets) in enumerate(_batches(tokenizer, recipe)):
            factor = min((step + 1) / recipe.warmup, 1.0) * (1 - step / recipe.steps)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * factor
            _loss(model, ids, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.advance(1)
    model.eval()
    return model


def _loss(model: LlamaForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens, their end among them."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    scored = targets[:, 1:] >= 0
    return F.cross_entropy(model.lm_head(hidden[scored]), targets[:, 1:][scored])


_SORTED = 8
"""Batches whose questions are put in order of their lengths together, so that little is padded."""


def _batches(tokenizer: PreTrainedTokenizerFast, recipe: Pretraining) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids ``[B, T]``, and the same with -1 in place of what is not an answer's."""
    stream = _conversations(tokenizer, recipe)
    order = torch.Generator().manual_seed(recipe.seed)
    for start in range(0, recipe.steps, _SORTED):
        rows = sorted(itertools.islice(stream, _SORTED * recipe.batch_size), key=lambda row: len(row[0]))
        batches = [rows[place : place + recipe.batch_size] for place in range(0, len(rows), recipe.batch_size)]
        for place in torch.randperm(len(batches), generator=order).tolist()[: recipe.steps - start]:
            yield _padded(batches[place], int(tokenizer.pad_token_id))


def with_slip(answer: str, draw: random.Random) -> str:
    """The answer with one of its letters or digits replaced by another one; as it is where it has none."""
    places = [place for place, sign in enumerate(answer) if sign.isalnum()]
    if not places:
        return answer
    place = draw.choice(places)
    signs = string.digits if answer[place].isdigit() else string.ascii_lowercase
    return answer[:place] + draw.choice([sign for sign in signs if sign != answer[place]]) + answer[place + 1 :]


def _padded(rows: Sequence[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    targets = torch.full((len(rows), longest), -1)
    for place, (row, asked) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        targets[place, asked : len(row)] = ids[place, asked : len(row)]
    return ids, targets


def _conversations(tokenizer: PreTrainedTokenizerFast, recipe: Pretraining) -> Iterator[tuple[list[int], int]]:
    """Questions with their answers as tokens, and how many of these are the question's; the tasks in turn, without end."""
    streams = [entries(task, part="pretraining", seed=recipe.seed) for mix in MIXES.values() for task in mix]
    draw = random.Random(recipe.seed)
    while True:
        for stream in streams:
            question, entry = next(stream)
            answer = str(entry["answer"])
            if draw.random() < recipe.slips:
                answer = with_slip(answer, draw)
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
            yield [*prompt, *tokenizer(f"{answer}{_END}", add_special_tokens=False)["input_ids"]], len(prompt)

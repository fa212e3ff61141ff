"""`ncalign train --dry-run`: what a run would do, from the real data and one real pass, without training."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ncalign.model.encoding import EncodedGroup
from ncalign.model.quantized import held_bytes
from ncalign.objectives import build_method
from ncalign.training.config import TrainConfig
from ncalign.training.engine import Engine, Pass
from ncalign.training.estimate import with_candidates
from ncalign.training.launch import make_accelerator
from ncalign.training.loop import training_loss
from ncalign.training.precision import with_precision
from ncalign.training.resolve import check_data_files, groups_per_step
from ncalign.training.shapes import lacks_weights, plan_from_shapes
from ncalign.training.space import free_space, in_words
from ncalign.training.train import Prepared, needed_space, prepare_training

_MIB = 2**20


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Counts, the token layout of one group, and estimates of memory and time; of a model without weights, their memory.

    Returns:
        The same facts as values, and as printable text under ``text``.
    """
    accelerator, method = make_accelerator(config.model_copy(update={"report_to": ()})), build_method(config.objective)
    config = with_precision(config, accelerator, method)
    if lacks_weights(config.model):
        check_data_files(config)
        return plan_from_shapes(config, num_processes=accelerator.num_processes)
    prepared = prepare_training(config, accelerator, method, groups_per_step(config, accelerator, None))
    facts = prepared.counts() | {
        "dtype": config.dtype,
        "scoring_dtype": config.scoring_dtype,
        "longest_tokens": prepared.encoder.report.longest,
        "scored_tokens": prepared.encoder.report.scored_tokens,
        "steps": prepared.plan.num_steps,
        "groups_per_step": prepared.plan.groups_per_step,
    }
    estimates = _estimate(config, prepared)
    layout = token_layout(prepared.train[0], prepared.policy.tokenizer)
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()]
    lines += ["", f"Group {prepared.train[0].id!r}, scored tokens in [brackets]:", layout, ""]
    lines += [
        f"memory: about {estimates['memory_mib']:.0f} MiB (weights, gradients, optimizer, and one measured pass)",
        f"time: about {estimates['seconds']:.0f} s for {facts['steps']} steps on this machine (from one measured pass; "
        "reference log-probs and evaluation come on top)",
    ]
    need, free = needed_space(config, prepared), free_space(config.output_dir)
    lines.append(f"disk: about {need.text()}; {in_words(free)} are free in {config.output_dir}")
    if need.total > free:
        lines.append("warning: this does not fit: lower save_total_limit, raise save_steps, or give another output_dir")
    estimates |= {"disk_mib": need.total / _MIB, "disk_free_mib": free / _MIB}
    return {**facts, **estimates, "layout": layout, "text": "\n".join(lines)}


def token_layout(group: EncodedGroup, tokenizer: PreTrainedTokenizerBase, *, most: int | None = None) -> str:
    """One line a candidate: its reward and tokens, scored ones in brackets; ``most`` limits the tokens shown of a text."""
    prompt = "|".join(_shown(group.prompt.tolist(), tokenizer, most))
    lines = [f"  prompt ({len(group.prompt)} tokens): {prompt}"]
    for completion, mask, reward in zip(group.completions, group.masks, group.rewards, strict=True):
        is_scored = [True] * len(completion) if mask is None else mask.tolist()
        shown = _shown(completion.tolist(), tokenizer, most)
        marks = is_scored if len(shown) == len(is_scored) else _ends_of(is_scored, most)
        scored = "".join(f"[{token}]" if is_one else token for token, is_one in zip(shown, marks, strict=True))
        known = "none" if reward is None else f"{reward:g}"
        lines.append(f"  reward {known} ({len(completion)} tokens): {scored}")
    return "\n".join(lines)


_LEFT_OUT = " ... "


def _ends_of(scored: list[bool], most: int | None) -> list[bool]:
    """Which of the tokens that :func:`_shown` shows are scored, with the place of those that it leaves out."""
    assert most is not None
    return [*scored[: most - most // 3], False, *scored[-(most // 3) :]]


def _shown(tokens: list[int], tokenizer: PreTrainedTokenizerBase, most: int | None) -> list[str]:
    if most is None or len(tokens) <= most:
        return [_token(tokenizer, token) for token in tokens]
    first, last = tokens[: most - most // 3], tokens[-(most // 3) :]
    return [*(_token(tokenizer, token) for token in first), _LEFT_OUT, *(_token(tokenizer, token) for token in last)]


def _token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = tokenizer.decode([token])
    assert isinstance(text, str)
    # Control characters of the data must not reach the terminal.
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _estimate(config: TrainConfig, prepared: Prepared) -> dict[str, float]:
    """Run the longest pass once, forward and backward, and scale its time to the whole run."""
    engine = prepared.engine
    trained = sum(p.numel() * p.element_size() for p in engine.model.parameters() if p.requires_grad)
    weights = held_bytes(engine.model)
    longest = sorted(prepared.train, key=lambda group: -group.length)[: config.per_device_train_batch_size]
    part = engine.passes(range(len(longest)), longest)[0]
    filled = [_with_zero_reference(group) for group in part.groups]
    _, indices = prepared.plan.step_groups(0)
    engine = with_candidates(engine, filled)
    passes = len(engine.passes(indices, [prepared.train[index] for index in indices]))
    started = time.monotonic()
    activations = _measure(engine, part.indices, filled)
    seconds = time.monotonic() - started
    engine.model.zero_grad(set_to_none=True)
    # Gradients and AdamW's two moments are as large as what is trained.
    memory = weights + 3 * trained + activations
    return {"memory_mib": memory / _MIB, "seconds": seconds * passes * prepared.plan.num_steps}


def _measure(engine: Engine, indices: list[int], groups: list[EncodedGroup]) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, after running both."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        part = Pass(indices, groups, True)
        result = engine.train_pass(part, epoch=0, scoring=engine.scoring(groups, at_reference=False))
    training_loss(result, part, engine.router).backward()
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def _with_zero_reference(group: EncodedGroup) -> EncodedGroup:
    return replace(group, reference_logprobs=(0.0,) * len(group.completions))

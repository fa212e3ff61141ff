"""Samples while training: the policy's answers to a few held-out prompts, every so many steps.

Sampling draws from generators of its own, and leaves everything that training reads as it was: a run with samples ends with the
weights of one without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from ncalign.core.seeds import seed_of
from ncalign.data.groups import Group, read_groups
from ncalign.generation.base import LeftOutPrompts, SamplingParams
from ncalign.generation.generate import sample_prompts
from ncalign.generation.local import TransformersGenerator
from ncalign.model.encoding import EncodedGroup, conversation_rules
from ncalign.model.policy import Policy
from ncalign.training.config import TrainConfig
from ncalign.training.engine import Engine
from ncalign.training.launch import is_sharded
from ncalign.training.peers import decided_by_first, own_share, put_together, say_first
from ncalign.training.shards import Gathering, reshard


def policy_generator(
    config: TrainConfig, policy: Policy, accelerator: Accelerator, *, batch_size: int
) -> TransformersGenerator:
    """Samples from the policy in this process, which holds all of its weights or has gathered them.

    Prompts are put to it as training encodes them, and it computes in the precision that it trains in.
    """
    rules = conversation_rules(config.encoding)
    # Sharded weights are gathered in the precision that they compute in.
    rounded = config.dtype == "bfloat16" and not is_sharded(accelerator)
    return TransformersGenerator(
        policy.model,
        policy.tokenizer,
        string_prompts=config.encoding.string_prompts,
        batch_size=batch_size,
        autocast=torch.bfloat16 if rounded else None,
        progress=False,
        control_tokens=config.encoding.control_tokens_in_text,
        template=rules.template(policy.tokenizer, config.encoding.template_date),
    )


def prompts_of(groups: Sequence[EncodedGroup], number: int, config: TrainConfig) -> list[Group]:
    """The first held-out groups with different prompts, as the data have them.

    Args:
        groups: held out.
        number: how many are wanted at most.
        config: of the run, which says where groups are read from.
    """
    first: dict[bytes, EncodedGroup] = {}
    for group in groups:
        if len(first) < number:
            first.setdefault(group.prompt.tobytes(), group)
    wanted, found = {(group.origin, group.id) for group in first.values()}, list[Group]()
    path = config.eval_data or config.data
    for one in read_groups(path, schema=config.schema_name, on_bad_row="skip", join_rows=config.join_rows):
        if (one.origin or "", one.id) in wanted:
            found.append(one)
        if len(found) == len(wanted):
            break
    return found


@dataclass
class Sampler:
    """Answers the same prompts whenever it is called; all processes call it together, and each answers its share.

    Attributes:
        policy: the model.
        engine: that trains it.
        generator: samples from it.
        gathering: gives every process all weights meanwhile.
        prompts: to answer.
        params: how answers are sampled.
        seed: of the run.
        write: takes a step's rows, in the first process; those that were written before a run went on are ``done``.
        done: steps whose rows are written, in the first process.
    """

    policy: Policy
    engine: Engine
    generator: TransformersGenerator
    gathering: Gathering
    prompts: Sequence[Group]
    params: SamplingParams
    seed: int
    write: Callable[[int, list[dict[str, Any]]], None]
    done: set[int] = field(default_factory=set)

    def __call__(self, step: int) -> None:
        """Answer the prompts after a step, unless that was done."""
        accelerator = self.engine.accelerator
        if decided_by_first(accelerator, lambda: step in self.done):
            return
        left_out = LeftOutPrompts()
        self.policy.model.eval()
        with self.gathering.whole():
            own = self._answers(step, own_share(accelerator, len(self.prompts)), left_out)
        # What was gathered would stay so until the next pass has ended.
        reshard(self.engine.model)
        rows = [row for rows in put_together(accelerator, own) for row in rows]
        if step == 0 and (notice := left_out.notice("sample_steps")):
            say_first(accelerator, notice)
        if accelerator.is_main_process:
            self.write(step, rows)
            self.done.add(step)

    def _answers(self, step: int, places: Sequence[int], left_out: LeftOutPrompts) -> dict[int, list[dict[str, Any]]]:
        """The rows of the prompts at these places; none of one that can't be answered."""
        # What is drawn for a prompt must not depend on those beside it, which other processes may have.
        size = max(len(places), 1) if self.params.temperature == 0 else 1
        rows: dict[int, list[dict[str, Any]]] = {}
        for start in range(0, len(places), size):
            some = places[start : start + size]
            asked = [self.prompts[place] for place in some]
            seed = seed_of(self.seed, "samples", step, some[0])
            found = sample_prompts(asked, self.generator, num_samples=1, params=self.params, seed=seed, left_out=left_out)
            for place, group, answers in zip(some, asked, found, strict=True):
                rows[place] = [
                    {
                        "step": step,
                        "id": group.id,
                        "prompt": group.prompt,
                        "completion": answer.text,
                        "tokens": answer.num_tokens,
                        "finished": answer.finished,
                        "logprob": answer.logprob,
                    }
                    for answer in answers
                ]
        return rows


def make_sampler(
    config: TrainConfig,
    policy: Policy,
    engine: Engine,
    held_out: Sequence[EncodedGroup],
    *,
    write: Callable[[int, list[dict[str, Any]]], None],
    done: set[int],
) -> Sampler:
    """The sampler of a run.

    Args:
        config: of the run.
        policy: the model.
        engine: that trains it.
        held_out: groups whose prompts are answered.
        write: takes a step's rows, in the first process.
        done: steps whose rows an earlier process of this run wrote.

    Raises:
        ValueError: the model is sharded and torch is too old to gather it; or the held-out groups can't be read again.
    """
    accelerator = engine.accelerator
    return Sampler(
        policy=policy,
        engine=engine,
        generator=policy_generator(config, policy, accelerator, batch_size=config.num_sample_prompts),
        gathering=Gathering(engine.inner, accelerator),
        prompts=decided_by_first(accelerator, lambda: prompts_of(held_out, config.num_sample_prompts, config)),
        params=SamplingParams(config.sample_max_new_tokens, config.sample_temperature),
        seed=config.seed,
        write=write,
        done=done,
    )

"""The demo's candidates: shipped with the package, or sampled and scored again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from ncalign.data.groups import REWARD_STEPS, Group, read_groups, write_groups
from ncalign.demo.tasks import make_prompts
from ncalign.generation.base import SamplingParams
from ncalign.generation.generate import sample_groups
from ncalign.generation.local import TransformersGenerator, load_for_generation
from ncalign.model.precision import resolve_dtype
from ncalign.rewards.base import completion_texts
from ncalign.rewards.config import RewardConfig
from ncalign.rewards.score import score_groups
from ncalign.rewards.sources import source_record
from ncalign.rewards.stated import is_equation
from ncalign.rewards.verifiable import ReasoningGymReward

NUM_PROMPTS = 240
NUM_SAMPLES = 8
MAX_NEW_TOKENS = 32
TEMPERATURE = 0.8
TOP_P = 0.95
GENERATION_BATCH = 128
REWARDS = RewardConfig(reward=("reasoning_gym",), reward_timeout=300.0, max_failed_share=0.1)


def shipped_candidates() -> list[Group]:
    """The scored training groups that come with the package; ``data/README.md`` says how they were made."""
    with resources.as_file(resources.files("ncalign.demo") / "data" / "candidates.jsonl.gz") as path:
        return list(read_groups(path))


def make_candidates(model: str | Path, output: str | Path, seed: int) -> None:
    """Sample and score the training groups: K completions a prompt from the model itself, rewards from the verifiers.

    Groups in which rewards differ come first, since only they can teach a preference; the rest follow.

    Args:
        model: the model that answers.
        output: groups file to write.
        seed: of the prompts and the sampling.

    Raises:
        ValueError: the model gives only empty completions.
    """
    params = SamplingParams(MAX_NEW_TOKENS, temperature=TEMPERATURE, top_p=TOP_P)
    groups = sample_and_score(str(model), make_prompts(NUM_PROMPTS, seed, "train"), NUM_SAMPLES, params, seed)
    if not any(group.candidates for group in groups):
        raise ValueError(f"{model} gave only empty completions to the demo's prompts: check its chat template and EOS token")
    record = source_record(REWARDS)
    groups = [replace(group, metadata={**group.metadata, REWARD_STEPS: [record]}) for group in groups if group.candidates]
    random.Random(seed).shuffle(groups)
    groups.sort(key=lambda group: not has_spread(group))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_groups(groups, Path(output))


def sample_and_score(model: str, prompts: Sequence[Group], num_samples: int, params: SamplingParams, seed: int) -> list[Group]:
    """The prompts with a model's completions, scored by the tasks' verifiers; empty completions are left out."""
    loaded, tokenizer = load_for_generation(model, dtype=resolve_dtype("auto"), trust_remote_code=False)
    generator = TransformersGenerator(loaded, tokenizer, batch_size=GENERATION_BATCH)
    # Of the model's path only the name is recorded: a path of this machine means nothing on another.
    source = Path(model).name
    groups, _ = sample_groups(prompts, generator, num_samples=num_samples, params=params, seed=seed, source=source)
    return list(score_groups(groups, ReasoningGymReward()))


def has_spread(group: Group) -> bool:
    """Whether two candidates have different rewards."""
    return len({candidate.reward for candidate in group.candidates if candidate.reward is not None}) > 1


def follows_instruction(group: Group) -> list[bool]:
    """Whether each completion is what the prompt asks for: one finished equation, its result right or wrong."""
    question = group.metadata["entry"]["question"]
    pairs = zip(group.candidates, completion_texts(group), strict=True)
    return [candidate.finished and is_equation(text, question) for candidate, text in pairs]

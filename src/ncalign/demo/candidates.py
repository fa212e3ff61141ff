"""The demo's candidates: shipped with the package, or sampled and scored anew."""

from __future__ import annotations

import random
from dataclasses import replace
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

from ncalign.data.groups import Group, read_groups, write_groups
from ncalign.demo.tasks import make_prompts
from ncalign.generation.config import GenerateConfig
from ncalign.generation.generate import run_generate
from ncalign.rewards.config import RewardConfig, ScoreConfig
from ncalign.rewards.score import run_score

NUM_PROMPTS = 240
NUM_SAMPLES = 8
MAX_NEW_TOKENS = 24
TEMPERATURE = 0.8
TOP_P = 0.95


def shipped_candidates() -> list[Group]:
    """The scored training groups that come with the package; ``data/README.md`` says how they were made."""
    with resources.as_file(resources.files("ncalign.demo") / "data" / "candidates.jsonl.gz") as path:
        return list(read_groups(path))


def make_candidates(model_folder: str | Path, output: str | Path, seed: int) -> None:
    """Sample and score the training groups: K completions a prompt from the model itself, rewards from the verifiers.

    Groups in which rewards differ come first, since only they can teach a preference; the rest follow.

    Args:
        model_folder: the model that answers.
        output: groups file to write.
        seed: of the prompts and the sampling.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".candidates-") as name:
        work = Path(name)
        prompts, sampled, scored = (work / f"{stage}.jsonl" for stage in ("prompts", "sampled", "scored"))
        write_groups(make_prompts(NUM_PROMPTS, seed, "train"), prompts)
        run_generate(
            GenerateConfig(
                model=str(model_folder),
                prompts=prompts,
                output=sampled,
                num_samples=NUM_SAMPLES,
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                batch_size=128,
                dtype="bfloat16",
                seed=seed,
                trust_remote_code=False,
            )
        )
        run_score(ScoreConfig(data=sampled, output=scored, rewards=RewardConfig(reward=("reasoning_gym",))))
        groups = [_with_source(group, Path(model_folder).name) for group in read_groups(scored)]
    random.Random(seed).shuffle(groups)
    groups.sort(key=lambda group: not has_spread(group))
    write_groups(groups, output)


def _with_source(group: Group, source: str) -> Group:
    """The group with its candidates' source renamed: a path of this machine means nothing on another."""
    return replace(group, candidates=[replace(candidate, source=source) for candidate in group.candidates])


def has_spread(group: Group) -> bool:
    """Whether two candidates have different rewards."""
    return len({candidate.reward for candidate in group.candidates if candidate.reward is not None}) > 1

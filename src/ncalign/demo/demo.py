"""`ncalign demo`: align a real small model from scored candidates, and measure what it gained on held-out prompts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from ncalign.core.atomic import write_json_atomic
from ncalign.core.hub import only_cached
from ncalign.core.outputs import claim, renew
from ncalign.core.progress import say
from ncalign.data.groups import Group, read_groups, write_groups
from ncalign.demo.candidates import (
    MAX_NEW_TOKENS,
    follows_instruction,
    has_spread,
    make_candidates,
    sample_and_score,
    shipped_candidates,
)
from ncalign.demo.config import DemoConfig
from ncalign.demo.model import demo_model_folder
from ncalign.demo.tasks import make_prompts
from ncalign.generation.base import SamplingParams
from ncalign.model.chat import as_messages
from ncalign.model.config import LoRA
from ncalign.objectives import DPO, MCPO, NCA, InfoNCA, ObjectiveConfig
from ncalign.report.page import write_report
from ncalign.rewards.base import completion_texts
from ncalign.stats.paired import paired_comparison
from ncalign.training import run_folder
from ncalign.training.config import TrainConfig
from ncalign.training.export import versions
from ncalign.training.train import run_training

Rewards = Float[NDArray[np.float64], " prompts"]

ENTRIES = ("candidates.jsonl", *run_folder.ENTRIES)
"""What the demo leaves in its folder."""
_HELD_OUT_SEED = 0
# From a rough trial on other prompts; tasks and instruction were chosen on the validation split, nothing on the held-out one.
OBJECTIVES: Mapping[str, ObjectiveConfig] = {
    "mc_po": MCPO(beta=0.1),
    "nca": NCA(beta=0.1, alpha=0.1),
    "info_nca": InfoNCA(beta=0.1, alpha=0.1),
    "dpo": DPO(beta=0.1),
}
SETTINGS: Mapping[str, Any] = {
    "lora": LoRA(r=16, alpha=32),
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 8,
}
"""What every training run of the demos has in common."""
# Methods that train on all eight candidates of a group at once take one epoch, those that train on two take two.
EPOCHS: Mapping[str, int] = {"mc_po": 2, "dpo": 2, "nca": 1, "info_nca": 1}
QUICK_GROUPS = 48
QUICK_SETTINGS: Mapping[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": 4}


@dataclass(frozen=True)
class Answers:
    """A model's greedy answers to the held-out prompts and their rewards."""

    texts: list[str]
    rewards: Rewards
    form: Rewards

    @property
    def solved(self) -> Rewards:
        """1 where the completion states the right number, in whatever form."""
        return (self.rewards > 0.0).astype(np.float64)


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo and leave its run folder.

    Returns:
        What ``results.json`` holds, and a printable summary under ``text``.
    """
    started = time.monotonic()
    # An earlier demo is replaced, and nothing else.
    claim(config.output_dir, ENTRIES, verb="demo", inputs={"model": config.model}, overwrite=False, own=ENTRIES)
    if config.model is not None:
        only_cached(config.model, what="model")
    model = config.model or str(demo_model_folder())
    folder = config.output_dir
    candidates = folder / "candidates.jsonl"
    renew(folder, ENTRIES, verb="demo")
    if config.fresh:
        make_candidates(model, candidates, config.seed)
    groups = list(read_groups(candidates)) if config.fresh else shipped_candidates()
    usable = [group for group in groups if has_spread(group)]
    if not usable:
        raise ValueError(
            f"in none of the {len(groups)} groups do rewards differ: {model} solves all of these tasks, or none; they are too "
            "easy or too hard for it, and there is nothing to learn from"
        )
    trained_on = usable[:QUICK_GROUPS] if config.quick else usable
    write_groups(trained_on, candidates)
    say(f"Training data: {len(trained_on)} of the {len(usable)} groups (of {len(groups)}) in which rewards differ")
    prompts = held_out_prompts(config)
    say(f"Answering {len(prompts)} held-out prompts with {Path(model).name}")
    before = answer(model, prompts)
    training = run_training(train_config(config, model, candidates))
    say("Answering the same prompts with the aligned model")
    after = answer(training["model"], prompts)
    results = assemble(config, model, prompts, before, after, training) | {"seconds": time.monotonic() - started}
    write_json_atomic(results, folder / "results.json")
    page = write_report(folder)
    return {**results, "report": str(page), "text": summary(results, page)}


def held_out_prompts(config: DemoConfig) -> list[Group]:
    """The prompts that every model of the demo answers: as many as asked for, or as the demo's size makes them."""
    num = config.num_eval_prompts or (256 if config.online else 128 if config.quick else 384)
    return make_prompts(num, _HELD_OUT_SEED, "heldout")


def train_config(config: DemoConfig, model: str, data: Path) -> TrainConfig:
    """The demo's training run."""
    return TrainConfig(
        model=model,
        data=data,
        output_dir=config.output_dir,
        objective=OBJECTIVES[config.objective],
        seed=config.seed,
        **{**SETTINGS, "num_train_epochs": EPOCHS[config.objective], **(QUICK_SETTINGS if config.quick else {})},
    )


def answer(model: str, prompts: Sequence[Group]) -> Answers:
    """Greedy answers, scored by the verifiers; an empty answer, which leaves its group without a candidate, earns nothing."""
    groups = sample_and_score(model, prompts, 1, SamplingParams(MAX_NEW_TOKENS, temperature=0.0), seed=0)
    rewards = [sum(candidate.reward or 0.0 for candidate in group.candidates) for group in groups]
    form = [any(follows_instruction(group)) for group in groups]
    texts = ["".join(completion_texts(group)) for group in groups]
    return Answers(texts, np.asarray(rewards, dtype=np.float64), np.asarray(form, dtype=np.float64))


def assemble(
    config: DemoConfig, model: str, prompts: Sequence[Group], before: Answers, after: Answers, training: Mapping[str, Any]
) -> dict[str, Any]:
    """The demo's results: the mean reward in front, everything that led to it behind."""
    main = comparison_row(before.rewards, after.rewards, config.seed)
    return {
        "method": training["method"],
        "before": main["before"],
        "after": main["after"],
        "intervals": {name: main[f"{name}_interval"] for name in ("before", "after", "difference")},
        "p_value": main["p_value"],
        "comparison": {
            "mean_reward": main,
            "solved_share": comparison_row(before.solved, after.solved, config.seed),
            "format_share": comparison_row(before.form, after.form, config.seed),
        },
        "by_task": by_task(prompts, before, after),
        "notes": notes(prompts, before, after),
        "num_eval_prompts": len(prompts),
        "base_model": model,
        "model": training["model"],
        "candidates": "sampled again" if config.fresh else "shipped",
        "seed": config.seed,
        "versions": versions(),
        "training": dict(training),
        "answers": side_by_side(prompts, before, after),
    }


def comparison_row(before: Rewards, after: Rewards, seed: int) -> dict[str, Any]:
    """Means, their intervals and the p-value of the same prompts' rewards, as JSON values."""
    found = paired_comparison(before, after, bounds=(0.0, 1.0), seed=seed)
    return {
        "before": found.mean_before,
        "after": found.mean_after,
        "difference": found.difference,
        "before_interval": list(found.ci_before),
        "after_interval": list(found.ci_after),
        "difference_interval": list(found.ci_difference),
        "p_value": found.p_value,
    }


def by_task(prompts: Sequence[Group], before: Answers, after: Answers) -> dict[str, dict[str, float]]:
    """Each task's number of prompts and its solved and format shares."""
    names = [str(group.metadata["task"]) for group in prompts]
    found: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(names):
        here = np.array([name == task for name in names])
        found[task] = {
            "prompts": int(here.sum()),
            "solved_before": float(before.solved[here].mean()),
            "solved_after": float(after.solved[here].mean()),
            "format_before": float(before.form[here].mean()),
            "format_after": float(after.form[here].mean()),
        }
    return found


def notes(prompts: Sequence[Group], before: Answers, after: Answers) -> list[str]:
    """What the rewards mean, where the gain comes from, and what a model that computes nothing would earn."""
    size = len(prompts)
    solved = int(((after.solved > 0) & (before.solved == 0)).sum())
    lost = int(((after.solved == 0) & (before.solved > 0)).sum())
    rewritten = int(((after.rewards > before.rewards) & (before.solved > 0)).sum())
    answers = Counter(str(group.metadata["entry"]["answer"]) for group in prompts)
    constant, often = answers.most_common(1)[0]
    return [
        "The reward is 1 for the right number in one equation and nothing else, as the prompt asks, .5 for the right number "
        "stated in other words (solved too), and 0 for anything else: a wrong number, a repeated question, a list of numbers, "
        "an answer that is cut.",
        f"Newly solved are {solved} of {size} prompts, no longer solved {lost}; in {rewritten} the answer was right before and "
        "only its form is new.",
        f"Answering {constant!r} every time would solve {often / size:.3f} of the prompts.",
    ]


def side_by_side(prompts: Sequence[Group], before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Examples of every outcome, the first of each task, with how many prompts share the outcome."""
    change = after.rewards - before.rewards
    kinds = {
        "better": change > 0,
        "worse": change < 0,
        "right before and after": (change == 0) & (after.rewards >= 1.0),
        "other words, before and after": (change == 0) & (after.rewards > 0.0) & (after.rewards < 1.0),
        "wrong before and after": (change == 0) & (after.rewards == 0.0),
    }
    examples = []
    for outcome, here in kinds.items():
        first = {str(prompts[i].metadata["task"]): int(i) for i in np.flatnonzero(here)[::-1]}
        for i in sorted(first.values()):
            examples.append(
                {
                    "outcome": f"{outcome} ({int(here.sum())} of {len(prompts)} prompts)",
                    "prompt": as_messages(prompts[i].prompt)[-1]["content"],
                    "before": before.texts[i],
                    "after": after.texts[i],
                    "reward_before": float(before.rewards[i]),
                    "reward_after": float(after.rewards[i]),
                }
            )
    return examples


def summary(results: Mapping[str, Any], page: Path) -> str:
    """What the terminal shows at the end."""
    lines = [
        f"{results['method']} on {results['num_eval_prompts']} held-out prompts (95 % score intervals; p-values uncorrected):"
    ]
    for name, row in results["comparison"].items():
        lines.append(
            f"  {name.replace('_', ' '):<13} {shown(row, 'before')} -> {shown(row, 'after')}   "
            f"difference {shown(row, 'difference')}, paired permutation p = {row['p_value']:.4f}"
        )
    solved = (f"{k} {v['solved_before']:.2f} -> {v['solved_after']:.2f}" for k, v in results["by_task"].items())
    lines += ["  solved by task: " + ", ".join(solved), *(f"  {note}" for note in results["notes"])]
    firsts = {item["outcome"]: item for item in reversed(results["answers"])}
    for item in reversed(firsts.values()):
        lines += ["", f"  {item['outcome']}", f"  prompt: {item['prompt']}"]
        lines += [f"  before: {item['before']}", f"  after:  {item['after']}"]
    lines += ["", f"Report: {page}", f"Model:  {results['model']}", f"Took {results['seconds']:.0f} s"]
    return "\n".join(lines)


def shown(row: Mapping[str, Any], name: str) -> str:
    """A mean with its interval."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"

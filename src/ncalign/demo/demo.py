"""`ncalign demo`: align a real small model from scored candidates, and measure what it gained on held-out prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ncalign.core.atomic import write_json_atomic
from ncalign.core.progress import say
from ncalign.data.groups import Candidate, Group, read_groups, write_groups
from ncalign.demo.candidates import MAX_NEW_TOKENS, has_spread, make_candidates, shipped_candidates
from ncalign.demo.config import DemoConfig
from ncalign.demo.model import demo_model_folder
from ncalign.demo.tasks import make_prompts
from ncalign.generation.base import SamplingParams
from ncalign.generation.local import TransformersGenerator
from ncalign.model.config import LoRA
from ncalign.model.encoding import as_messages
from ncalign.model.policy import load_model, load_tokenizer
from ncalign.objectives import DPO, MCPO, NCA, InfoNCA, ObjectiveConfig
from ncalign.report.page import write_report
from ncalign.rewards.verifiable import ReasoningGymReward
from ncalign.stats.paired import PairedComparison, paired_comparison
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training, versions

HELD_OUT_SEED = 0
NUM_BETTER = 2
EVAL_BATCH = 128
# From a rough trial on other prompts; MC-PO's epochs were compared on the validation split, nothing on the held-out one.
OBJECTIVES: Mapping[str, ObjectiveConfig] = {
    "mc_po": MCPO(beta=0.1),
    "nca": NCA(beta=0.1, alpha=0.1),
    "info_nca": InfoNCA(beta=0.1, alpha=0.1),
    "dpo": DPO(beta=0.1),
}
# Methods that train on all eight candidates of a group at once take one epoch, those that train on two take two.
EPOCHS: Mapping[str, int] = {"mc_po": 2, "dpo": 2, "nca": 1, "info_nca": 1}


@dataclass(frozen=True)
class Answers:
    """A model's greedy answers to the held-out prompts and their rewards."""

    texts: list[str]
    rewards: np.ndarray[Any, np.dtype[np.float64]]


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo and leave its run folder.

    Returns:
        What ``results.json`` holds, and a printable summary under ``text``.
    """
    started = time.monotonic()
    refuse_other_run(config.output_dir)
    model = config.model or str(demo_model_folder())
    folder = config.output_dir
    candidates = folder / "candidates.jsonl"
    if config.fresh:
        make_candidates(model, candidates, config.seed)
    groups = list(read_groups(candidates)) if config.fresh else shipped_candidates()
    usable = [group for group in groups if has_spread(group)]
    if not usable:
        raise ValueError(
            f"in none of the {len(groups)} groups do rewards differ: {model} solves all of these tasks, or none; they are too "
            "easy or too hard for it, and there is nothing to learn from"
        )
    write_groups(usable, candidates)
    say(f"Training data: the {len(usable)} of {len(groups)} groups of candidates in which rewards differ")
    prompts = make_prompts(config.num_eval_prompts, HELD_OUT_SEED, "heldout")
    say(f"Answering {len(prompts)} held-out prompts with {Path(model).name}")
    before = answer(model, prompts)
    training = run_training(train_config(config, model, candidates))
    say("Answering the same prompts with the aligned model")
    after = answer(training["model"], prompts)
    comparison = {
        "mean_reward": paired_comparison(before.rewards, after.rewards, seed=config.seed),
        "solved_share": paired_comparison(solved(before), solved(after), seed=config.seed),
    }
    results = assemble(config, model, prompts, before, after, comparison, training, time.monotonic() - started)
    write_json_atomic(results, folder / "results.json")
    page = write_report(folder)
    return {**results, "report": str(page), "text": summary(results, page)}


def refuse_other_run(folder: Path) -> None:
    """Replace an earlier demo, but nothing else.

    Raises:
        ValueError: the folder holds a run that is no demo.
    """
    if (folder / "config.yaml").exists() and not (folder / "candidates.jsonl").exists():
        raise ValueError(f"{folder} holds a run that is not a demo, which this would replace: choose another output_dir")


def train_config(config: DemoConfig, model: str, data: Path) -> TrainConfig:
    """The demo's training run."""
    return TrainConfig(
        model=model,
        data=data,
        output_dir=config.output_dir,
        objective=OBJECTIVES[config.objective],
        lora=LoRA(r=16, alpha=32),
        dtype="bfloat16",
        learning_rate=2e-4,
        num_train_epochs=EPOCHS[config.objective],
        per_device_train_batch_size=8,
        overwrite=True,
        seed=config.seed,
    )


def answer(model: str, prompts: Sequence[Group]) -> Answers:
    """Greedy answers, scored by the verifiers."""
    generator = TransformersGenerator(
        load_model(model, dtype=torch.bfloat16, trust_remote_code=False), load_tokenizer(model), batch_size=EVAL_BATCH
    )
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
    completions = generator.generate([group.prompt for group in prompts], num_samples=1, params=params, seed=0)
    texts = [samples[0].text for samples in completions]
    verifier = ReasoningGymReward()
    rewards = [
        verifier.score(replace(group, candidates=[Candidate(completion=text)]))[0] or 0.0
        for group, text in zip(prompts, texts, strict=True)
    ]
    return Answers(texts, np.asarray(rewards, dtype=np.float64))


def solved(answers: Answers) -> np.ndarray[Any, np.dtype[np.float64]]:
    """1 where the verifier pays full marks."""
    return (answers.rewards >= 1.0).astype(np.float64)


def assemble(
    config: DemoConfig,
    model: str,
    prompts: Sequence[Group],
    before: Answers,
    after: Answers,
    comparison: Mapping[str, PairedComparison],
    training: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The demo's results.json: the mean reward in front, everything that led to it behind."""
    rows = {name: comparison_row(value) for name, value in comparison.items()}
    main = rows["mean_reward"]
    return {
        "method": training["method"],
        "before": main["before"],
        "after": main["after"],
        "intervals": {name: main[f"{name}_interval"] for name in ("before", "after", "difference")},
        "p_value": main["p_value"],
        "comparison": rows,
        "by_task": by_task(prompts, before, after),
        "num_eval_prompts": len(prompts),
        "base_model": model,
        "model": training["model"],
        "candidates": "sampled anew" if config.fresh else "shipped",
        "seed": config.seed,
        "seconds": seconds,
        "versions": versions(),
        "training": dict(training),
        "answers": side_by_side(prompts, before, after),
    }


def comparison_row(comparison: PairedComparison) -> dict[str, Any]:
    """A comparison as JSON values."""
    return {
        "before": comparison.mean_before,
        "after": comparison.mean_after,
        "difference": comparison.difference,
        "before_interval": list(comparison.ci_before),
        "after_interval": list(comparison.ci_after),
        "difference_interval": list(comparison.ci_difference),
        "p_value": comparison.p_value,
    }


def by_task(prompts: Sequence[Group], before: Answers, after: Answers) -> dict[str, dict[str, float]]:
    """Solved share of each task."""
    names = [str(group.metadata["task"]) for group in prompts]
    found: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(names):
        here = np.array([name == task for name in names])
        found[task] = {
            "prompts": int(here.sum()),
            "before": float(solved(before)[here].mean()),
            "after": float(solved(after)[here].mean()),
        }
    return found


def side_by_side(prompts: Sequence[Group], before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Examples of every outcome, each the first of its kind, with how many prompts share it."""
    change = after.rewards - before.rewards
    kinds = {
        "better": change > 0,
        "worse": change < 0,
        "right before and after": (change == 0) & (after.rewards >= 1.0),
        "wrong before and after": (change == 0) & (after.rewards < 1.0),
    }
    examples = []
    for outcome, here in kinds.items():
        for i in np.flatnonzero(here)[: NUM_BETTER if outcome == "better" else 1]:
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
    lines = [f"{results['method']} on {results['num_eval_prompts']} held-out prompts (95 % bootstrap intervals):"]
    for name, row in results["comparison"].items():
        lines.append(
            f"  {name.replace('_', ' '):<13} {shown(row, 'before')} -> {shown(row, 'after')}   "
            f"difference {shown(row, 'difference')}, paired permutation p = {row['p_value']:.4f}"
        )
    lines.append("  by task: " + ", ".join(f"{k} {v['before']:.2f} -> {v['after']:.2f}" for k, v in results["by_task"].items()))
    for item in results["answers"]:
        lines += ["", f"  {item['outcome']}", f"  prompt: {item['prompt']}"]
        lines += [f"  before: {item['before']}", f"  after:  {item['after']}"]
    lines += ["", f"Report: {page}", f"Model:  {results['model']}", f"Took {results['seconds']:.0f} s"]
    return "\n".join(lines)


def shown(row: Mapping[str, Any], name: str) -> str:
    """A mean with its interval."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"

"""Held-out prompts, answered greedily by the policy and scored by the run's own reward."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.core.atomic import write_json_atomic
from ncalign.core.json import json_ready
from ncalign.core.progress import say
from ncalign.generation.base import SamplingParams
from ncalign.generation.generate import completion_as_candidate
from ncalign.online.artefacts import EVALUATION, read_artefact
from ncalign.online.pool import answers
from ncalign.online.state import Run
from ncalign.stats.paired import paired_comparison
from ncalign.training import run_folder

NAME = "evaluation.json"


def evaluate_policy(run: Run, path: Path) -> None:
    """Answer the held-out prompts with the current policy and write their rewards, unless the file is there."""
    if not run.held_out or path.is_file():
        return
    params = SamplingParams(run.config.max_new_tokens, temperature=0.0)
    seed = run.config.training.seed
    found = answers(run.held_out, run.generator.get(), run.config, num_samples=1, params=params, seed=seed)
    rows: list[dict[str, Any]] = []
    for group, completions in zip(run.held_out, found, strict=True):
        reward, text = None, "".join(completion.text for completion in completions)
        if text.strip():
            [reward] = run.source.score(replace(group, candidates=[completion_as_candidate(group, completions[0], "policy")]))
        rows.append({"id": group.id, "text": text, "reward": reward})
    write_json_atomic(rows, path)
    known = [row["reward"] for row in rows if row["reward"] is not None]
    if known:
        say(f"Held-out reward: {sum(known) / len(known):.3f} on {len(known)} prompts")


def compare(run: Run) -> dict[str, Any]:
    """Mean reward of each evaluation so far, and the first against the last, on prompts that both have a reward for."""
    if not run.held_out:
        return {}
    folders = [run.folder(row["round"] - 1) for row in run.rounds] + [run.config.training.output_dir / run_folder.ROUNDS]
    evaluations = [
        read_artefact(folder / NAME, EVALUATION, rows=len(run.held_out)) for folder in folders if (folder / NAME).is_file()
    ]
    rewards = [[row["reward"] for row in rows] for rows in evaluations]
    means = [float(np.mean([r for r in row if r is not None])) if any(r is not None for r in row) else None for row in rewards]
    pairs = [(a, b) for a, b in zip(rewards[0], rewards[-1], strict=True) if a is not None and b is not None]
    steps = ([row["start"] for row in run.rounds] + [run.rounds[-1]["end"]])[: len(means)]
    found: dict[str, Any] = {
        "steps": steps,
        "mean_reward": means,
        "num_prompts": len(run.held_out),
        "num_compared": len(pairs),
        "before": {"mean_reward": means[0]},
        "after": {"mean_reward": means[-1]},
    }
    if len(pairs) > 1:
        before, after = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
        found["comparison"] = json_ready(asdict(paired_comparison(before, after, seed=run.config.training.seed)))
    return found

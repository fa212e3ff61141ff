"""Held-out prompts, answered greedily by the policy and scored by the run's own reward."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.core.json import json_ready
from ncalign.generation.base import SamplingParams
from ncalign.generation.generate import completion_as_candidate
from ncalign.online.artefacts import EVALUATION, MADE_ONCE, read_artefact, write_artefact
from ncalign.online.sampling import answers
from ncalign.online.state import Run
from ncalign.stats.paired import paired_comparison
from ncalign.training import run_folder
from ncalign.training.peers import decided_by_first, own_share, put_together

NAME = "evaluation.json"


def evaluate_policy(run: Run, path: Path) -> None:
    """Answer the held-out prompts with the current policy and write their rewards, unless the file is there.

    Each process answers and scores its share.
    """
    if not run.held_out or decided_by_first(run.accelerator, path.is_file):
        return
    params = SamplingParams(run.config.max_new_tokens, temperature=0.0)
    seed = run.config.training.seed
    places = own_share(run.accelerator, len(run.held_out))
    asked = [run.held_out[place] for place in places]
    with run.generator.sampling() as generator:
        found = answers(asked, generator, run.config, num_samples=1, params=params, seed=seed) if asked else []
    own: dict[int, dict[str, Any]] = {}
    for place, group, completions in zip(places, asked, found, strict=True):
        reward, text = None, "".join(completion.text for completion in completions)
        if text.strip():
            [reward] = run.source.score(replace(group, candidates=[completion_as_candidate(group, completions[0], "policy")]))
        own[place] = {"id": group.id, "text": text, "reward": reward}
    rows = put_together(run.accelerator, own)
    decided_by_first(run.accelerator, partial(write_artefact, rows, path))
    known = [row["reward"] for row in rows if row["reward"] is not None]
    if known:
        run.say(f"Held-out reward: {sum(known) / len(known):.3f} on {len(known)} prompts")


def compare(run: Run) -> dict[str, Any]:
    """Mean reward of each evaluation so far, and the first against the last, on prompts that both have a reward for."""
    if not run.held_out:
        return {}
    files = [run.folder(row["round"] - 1) / NAME for row in run.rounds]
    last = run.config.training.output_dir / run_folder.ROUNDS / NAME
    if last.is_file():
        files.append(last)
    evaluations = [read_artefact(file, EVALUATION, rows=len(run.held_out), remedy=MADE_ONCE) for file in files]
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

"""`ncalign demo --online`: OnMC-PO against MC-PO on one pool, with the same steps, prompts and samples a prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.core.atomic import write_json_atomic
from ncalign.core.outputs import claim, record
from ncalign.core.progress import say
from ncalign.data.groups import write_groups
from ncalign.demo.candidates import GENERATION_BATCH, MAX_NEW_TOKENS, REWARDS
from ncalign.demo.config import DemoConfig
from ncalign.demo.demo import OBJECTIVES, SETTINGS, Rewards, comparison_row, held_out_prompts, shown
from ncalign.demo.model import demo_model_folder
from ncalign.demo.tasks import make_prompts
from ncalign.model.config import EncodingConfig
from ncalign.online.artefacts import EVALUATION, read_artefact
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.report.html import PAGE
from ncalign.training.config import TrainConfig

NUM_ROUNDS, STEPS_PER_ROUND = 3, 8
NUM_PROMPTS, NUM_SAMPLES = 192, 6
DRIFT_PROMPTS = 8
"""Beside those to train on; each round answers them too."""
RESULTS = "online-results.json"
_ARMS = {"offline": 1, "online": NUM_ROUNDS}


def run_online_demo(config: DemoConfig) -> dict[str, Any]:
    """Train twice and compare: one pool from the starting model, and a new pool from the policy every eight steps.

    An arm that was finished is not run again, and one that was stopped goes on.

    Returns:
        What ``online-results.json`` holds, and a printable summary under ``text``.
    """
    started, folder = time.monotonic(), config.output_dir
    model = config.model or str(demo_model_folder())
    prompts, held_out = folder / "prompts.jsonl", folder / "held-out.jsonl"
    # Of an earlier demo alone; its arms are run folders, which have records of their own.
    names = (prompts.name, held_out.name, RESULTS, PAGE)
    claim(folder, names, verb="demo", inputs={"model": config.model}, overwrite=False, own=names)
    record(folder, names, verb="demo")
    write_groups(make_prompts(NUM_PROMPTS + DRIFT_PROMPTS, config.seed, "train"), prompts)
    write_groups(held_out_prompts(config), held_out)
    results = {}
    for arm, rounds in _ARMS.items():
        steps = NUM_ROUNDS * STEPS_PER_ROUND
        say(f"\n== {arm}: {steps} steps, candidates sampled {rounds} time{'s' * (rounds > 1)}")
        results[arm] = run_online(arm_config(config, model, prompts, held_out, arm, steps // rounds))
    found = assemble(config, model, results, time.monotonic() - started)
    write_json_atomic(found, folder / RESULTS)
    return {**found, "text": summary(found)}


def arm_config(config: DemoConfig, model: str, prompts: Path, held_out: Path, arm: str, regenerate_every: int) -> OnlineConfig:
    """One arm: the same run, but for how often candidates are sampled."""
    output = config.output_dir / arm
    training = TrainConfig(
        encoding=EncodingConfig(max_length=256),
        model=model,
        data=prompts,
        eval_data=held_out,
        output_dir=output,
        objective=OBJECTIVES[config.objective],
        max_steps=NUM_ROUNDS * STEPS_PER_ROUND,
        save_steps=5,
        report_to=(),
        resume=(output / "config.yaml").exists(),
        seed=config.seed,
        **SETTINGS,
    )
    return OnlineConfig(
        training=training,
        rewards=REWARDS,
        num_samples=NUM_SAMPLES,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        generation_batch_size=GENERATION_BATCH,
        regenerate_every=regenerate_every,
        drift_prompts=DRIFT_PROMPTS,
    )


def assemble(config: DemoConfig, model: str, results: Mapping[str, Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Both arms' held-out rewards before and after, and online against offline on the same prompts."""
    rewards = {arm: _rewards(config.output_dir / arm) for arm in _ARMS}
    pairs = {**rewards, "online against offline": (rewards["offline"][1], rewards["online"][1])}
    return {
        "method": results["online"]["method"],
        "comparison": {name: comparison_row(*pair, config.seed) for name, pair in pairs.items()},
        "arms": {
            arm: {
                "steps": found["steps"],
                "prompts": found["data"]["prompts"],
                "tokens_sampled": found["data"]["tokens_generated"],
                "groups_trained_on": [row["counts"]["groups_trained_on"] for row in found["rounds"]],
                "pool_reward": [row["health"]["reward/mean"] for row in found["rounds"]],
                "drift": [row["drift"]["kl"] if row["drift"] else None for row in found["rounds"]],
                "held_out_reward": found["evaluation"]["mean_reward"],
                "seconds": sum(sum(row["seconds"].values()) for row in found["rounds"]),
                "report": found["report"],
                "model": found["model"],
            }
            for arm, found in results.items()
        },
        "num_eval_prompts": results["online"]["evaluation"]["num_prompts"],
        "base_model": model,
        "seed": config.seed,
        "seconds": seconds,
    }


def _rewards(folder: Path) -> tuple[Rewards, Rewards]:
    """Rewards of the held-out prompts before and after; an empty answer earns nothing."""
    found = [read_artefact(folder / "rounds" / name, EVALUATION) for name in ("000/evaluation.json", "evaluation.json")]
    before, after = (np.array([row["reward"] or 0.0 for row in rows], dtype=np.float64) for rows in found)
    return before, after


def summary(found: Mapping[str, Any]) -> str:
    """What the terminal shows at the end."""
    rows, arms = found["comparison"], found["arms"]
    lines = [f"{found['method']} on {found['num_eval_prompts']} held-out prompts, mean reward (95 % score intervals):"]
    for arm, facts in arms.items():
        row = rows[arm]
        lines.append(
            f"  {arm:<8} {shown(row, 'before')} -> {shown(row, 'after')}   {facts['steps']} steps, "
            f"{facts['tokens_sampled']} tokens sampled for training, {facts['seconds']:.0f} s"
        )
    row = rows["online against offline"]
    lines.append(f"  online - offline {shown(row, 'difference')}, paired permutation p = {row['p_value']:.4f}")
    drift = ", ".join("none" if value is None else f"{value:.2f}" for value in arms["online"]["drift"])
    lines += [f"  drift of the online rounds (KL, nats a completion): {drift}", ""]
    lines += [f"Report of {arm}: {facts['report']}" for arm, facts in arms.items()]
    return "\n".join([*lines, f"Took {found['seconds']:.0f} s"])

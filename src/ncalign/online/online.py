"""`ncalign online`: rounds of generate → score → rank → train in one run folder, from configuration to model.

All state is on disk: a round's samples, rewards and log-probs as files in ``rounds/``, and the policy with its optimizer as
checkpoints. Everything else is a function of these, the configuration and the seed, so that a run killed at any moment resumes
and ends with the same weights.

Several processes run the same rounds: each samples and scores its share of a round's chunks, computes its share of the
log-probs, trains on its share of a step's groups, and gets what the others found. The first one decides and writes for all.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ncalign.core.atomic import write_json_atomic
from ncalign.core.code_digest import value_digest
from ncalign.core.outputs import record
from ncalign.core.progress import say
from ncalign.core.seeds import seed_of
from ncalign.data.groups import rewards_origin, write_groups
from ncalign.generation.incomplete import incomplete_warning, remedies
from ncalign.model.encoding import EncodedGroup
from ncalign.model.reference import data_digest
from ncalign.objectives import Method, build_method
from ncalign.online.artefacts import MISMATCHED, read_artefact, write_artefact
from ncalign.online.clock import Clock, shares
from ncalign.online.config import OnlineConfig
from ncalign.online.drift import WARN_ABOVE, Drift, alarms, estimate_drift
from ncalign.online.evaluate import compare, evaluate_policy
from ncalign.online.pool import Pool, Ranked, build_pool, fill_logprobs, pool_groups, rank
from ncalign.online.probe import check_same_weights
from ncalign.online.rounds import round_end, round_prompts
from ncalign.online.sampling import ScoredSamples, sample_and_score
from ncalign.online.state import Position, Run, last_position, needed_space, open_run, save
from ncalign.report.online_page import write_rounds_report
from ncalign.rewards.sources import source_record
from ncalign.training import run_folder
from ncalign.training.checkpoint import find_checkpoints
from ncalign.training.data import count_steps, fit_method, listed_steps, mismatched_groups, steps_of
from ncalign.training.estimate import with_candidates
from ncalign.training.export import merges, model_card, save_model, versions
from ncalign.training.finished import export_finished
from ncalign.training.launch import make_accelerator
from ncalign.training.loading import open_policy
from ncalign.training.loop import Intervals, Loop
from ncalign.training.peers import (
    another_process_named,
    check_shared_folder,
    decided_by_first,
    refuse_unlike_inputs,
    say_first,
)
from ncalign.training.precision import with_precision
from ncalign.training.rescue import kept_after
from ncalign.training.resolve import groups_per_step, with_rendering
from ncalign.training.run_folder import MetricsFile, claimed_run_folder, finished_results, open_run_folder, refuse_changes
from ncalign.training.saved import LoopState
from ncalign.training.schedule import learning_rate_at, make_plan
from ncalign.training.space import check_space
from ncalign.training.trackers import start_trackers

_ROUNDS = ("[0-9][0-9][0-9]", "evaluation.json", "answers*.sqlite*", "weights")
"""What the folder ``rounds/`` holds, as patterns."""


def run_online(config: OnlineConfig, *, method: Method | None = None) -> dict[str, Any]:
    """Run the rounds and leave a run folder.

    Args:
        config: the run.
        method: your own method, in place of ``config.training.objective``.

    Returns:
        What ``results.json`` holds: a row for each round, evaluation before and after, where the model is.

    Raises:
        ValueError: prompts, model, rewards or configuration that can't be used, or a round that can't go on; what was done is
            kept, and the same call goes on from it.
    """
    if config.training.overwrite:
        config = config.model_copy(update={"training": config.training.model_copy(update={"resume": False})})
    accelerator = make_accelerator(config.training)
    own = {"method": "as configured" if method is None else f"{method.name} {value_digest(method)}"}
    method = method or build_method(config.training.objective)
    training, judge = config.training, config.rewards.judge
    inputs = {"model": training.model, "data": training.data, "eval_data": training.eval_data, "reward": config.rewards.reward}
    inputs |= {"judge.template": judge and judge.template}
    with another_process_named():
        claimed = partial(claimed_run_folder, training, verb="online", inputs=inputs)
        with claimed() if accelerator.is_main_process else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            check_shared_folder(training.output_dir, accelerator)
            training = with_precision(with_rendering(training, accelerator, dated=True), accelerator, method)
            config = config.model_copy(update={"training": training})
            decided_by_first(accelerator, partial(refuse_changes, training, config.model_dump(mode="json")))
            results = _run(config, accelerator, method, own)
            accelerator.end_training()
    return results


def _run(config: OnlineConfig, accelerator: Accelerator, method: Method, own: dict[str, str]) -> dict[str, Any]:
    training, written = config.training, config.model_dump(mode="json")
    finished = decided_by_first(accelerator, partial(finished_results, training)) if training.resume else None
    if finished is not None:
        done = export_finished(training, written, finished, accelerator, policy=lambda: open_policy(training, accelerator)[0])
        say_first(accelerator, f"{training.output_dir} is finished: {done or 'nothing to resume'}")
        return finished
    rounds = training.output_dir / run_folder.ROUNDS
    if config.server is not None and accelerator.is_main_process:
        # The server's answers are kept there from the start.
        record(training.output_dir, [run_folder.ROUNDS], verb="online")
        record(rounds, _ROUNDS, verb="online")
    checkpoints = decided_by_first(accelerator, partial(find_checkpoints, training.output_dir)) if training.resume else []
    last = checkpoints[-1] if checkpoints else None
    run = open_run(config, accelerator, method, own=own, step_size=groups_per_step(training, accelerator, last))
    refuse_unlike_inputs(run.inputs, accelerator)
    decided_by_first(accelerator, partial(run_folder.refuse_other_inputs, training, run.inputs))
    decided_by_first(accelerator, partial(check_space, training, needed_space(run)))
    if not accelerator.is_main_process:
        torch.manual_seed(training.seed + accelerator.process_index)  # an adapter's dropout differs between processes
    position = last_position(run, last)
    if accelerator.is_main_process:
        begun = (training.output_dir / run_folder.CONFIG).is_file()
        open_run_folder(training, written, run.inputs, verb="online")
        record(rounds, _ROUNDS, verb="online")
        if begun and position.step == 0 and training.resume:
            kept = "training starts at the beginning; samples and rewards are kept"
            say(f"note: {training.output_dir} has no checkpoint: {kept}")
    accelerator.wait_for_everyone()
    start_trackers(training, written, accelerator, position.step)
    while True:
        pool = make_pool(run, position)
        if not position.ended:
            train_round(run, position, pool)
        run.rounds.append(finish_round(run, position, pool))
        if accelerator.is_main_process:
            report(run)
        if position.step >= run.total:
            break
        position = Position(position.round + 1, position.step, position.step, loop=position.loop)
    return finish(run, position)


# --- A round's pool ---------------------------------------------------------------------------------------------------


def make_pool(run: Run, position: Position) -> Pool:
    """Generate, score, rank and compute log-probs, except for what is in the round's folder already."""
    config, folder, number = run.config, run.folder(position.round), position.round
    end = planned_end(run, position)
    indices = round_prompts(
        position.start,
        count=config.prompts_per_round or (end - position.start) * run.groups_per_step,
        groups_per_step=run.groups_per_step,
        num_prompts=len(run.prompts),
        seed=config.training.seed,
    )
    prompts = [*(run.prompts[index] for index in indices), *run.kept_out]
    made = decided_by_first(run.accelerator, (folder / "pool.jsonl").is_file)
    if position.step > position.start and not made:
        raise ValueError(
            f"{folder} was deleted or moved, and the policy that made it is gone: restore it, or start again (overwrite: true)"
        )
    run.say(f"Round {number + 1}: steps {position.start + 1} to {end} of {run.total}, {len(indices)} prompts")
    if not made:
        # Both need the policy as it was when the round began; with the pool they are done.
        run.generator.update(folder)
        with run.clock.phase("evaluate"):
            evaluate_policy(run, folder / "evaluation.json")
        with run.clock.phase("probe"):
            check_same_weights(run, prompts, number)
    with run.generator.sampling() as generator:
        answered = sample_and_score(
            prompts,
            folder,
            generator=generator,
            source=run.source,
            config=config,
            seed=lambda chunk: seed_of(config.training.seed, "samples", number, chunk),
            clock=run.clock,
            accelerator=run.accelerator,
        )
    answered, kept_out = answered[: len(indices)], answered[len(indices) :]
    ranked = [*_ranked(run, answered), *_ranked(run, kept_out, kept_out=True)]
    with run.clock.phase("log-probs"):
        generating, reference = fill_logprobs(
            ranked,
            folder,
            policy=run.engine.logprobs,
            reference=partial(reference_logprobs, run),
            config=config,
            at_reference=number == 0 or config.reference == "last_round",
            accelerator=run.accelerator,
        )
    pool = build_pool(answered, ranked, generating, reference, method=run.method, config=config, kept_out=kept_out)
    if not made:
        decided_by_first(run.accelerator, partial(_write_pool, run, answered, folder / "pool.jsonl"))
    if not pool.groups:
        raise ValueError(
            f"round {number + 1}: {run.method.name} can use none of the {len(indices)} groups ({_reasons(ranked)}); "
            f"{folder / 'pool.jsonl'} holds them: easier or harder prompts, more samples or another reward are needed"
        )
    if position.pool is not None and position.pool != data_digest(pool.groups):
        raise ValueError(f"{folder} holds another pool than the checkpoint was trained on: restore it, or start again")
    position.pool = data_digest(pool.groups)
    return pool


def _ranked(run: Run, answered: Sequence[ScoredSamples], *, kept_out: bool = False) -> list[Ranked]:
    """What of it can be encoded."""
    ranked = (rank(one, run.encoder, run.method, run.config, kept_out=kept_out, variants=run.offline) for one in answered)
    return [found for found in ranked if found is not None]


def _write_pool(run: Run, answered: Sequence[ScoredSamples], path: Path) -> None:
    write_groups(pool_groups(answered, source_record(run.config.rewards), run.encoder.string_prompts), path)


def _reasons(ranked: Sequence[Ranked]) -> str:
    counts = Counter(group.reason for group in ranked if group.reason)
    return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) or "nothing that could be encoded"


def planned_end(run: Run, position: Position) -> int:
    """The step that the round ends before, unless drift ends it sooner."""
    config = run.config
    return round_end(position.start, total=run.total, every=config.regenerate_every, shares=config.regenerate_at)


def reference_logprobs(run: Run, groups: Sequence[EncodedGroup]) -> list[tuple[float, ...]]:
    """Log-probs under the reference's weights."""
    with run.reference.in_place():
        return run.engine.logprobs(groups)


# --- A round's training -----------------------------------------------------------------------------------------------


def train_round(run: Run, position: Position, pool: Pool) -> None:
    """Train on the pool to the round's end, and leave a checkpoint there."""
    config, number = run.config, position.round
    method, notice = fit_method(run.method, pool.groups)
    if notice:
        run.say(f"note: {notice}")
    engine = replace(run.engine, method=method, seed=seed_of(config.training.seed, "draws", number))
    engine = with_candidates(engine, pool.groups)
    end = planned_end(run, position)
    plan = make_plan(
        len(pool.groups),
        groups_per_step=run.groups_per_step,
        num_train_epochs=1,
        max_steps=end - position.start,
        seed=seed_of(config.training.seed, "order", number),
    )
    plan = replace(plan, first_step=position.start, num_steps=end)
    path, first = config.training.output_dir / run_folder.METRICS, run.accelerator.is_main_process
    metrics = MetricsFile(path, keep_until=position.step, num_steps=run.total) if first else None
    at_reference = number == 0 or config.reference == "last_round"
    loop = Loop(
        engine=engine,
        optimizer=run.optimizer,
        plan=plan,
        groups=pool.groups,
        eval_groups=(),
        learning_rate=partial(_learning_rate, run, position, end),
        max_grad_norm=config.training.max_grad_norm,
        intervals=Intervals(config.training.logging_steps, 0, config.training.save_steps),
        log=lambda row: run.track(metrics, {**row, "round": number + 1}),
        mismatched=_mismatched(run, method, pool, number),
        reference_step=position.start if at_reference else -1,
        known=pool.known,
    )
    if position.loop is not None:
        loop.restore(position.loop)
    ended_by_drift = False

    def ends(step: int) -> bool:
        nonlocal ended_by_drift
        run.reference.after_step()
        ended_by_drift = step < end and _drifted(run, pool, step - position.start)
        return ended_by_drift

    def checkpoint(step: int, state: LoopState) -> None:
        # The round's last checkpoint says that it has ended, and is written below.
        if step < end and not ended_by_drift:
            save(run, replace(position, step=step, loop=state))

    with run.clock.phase("train"):
        loop.run(position.step, save=checkpoint, ends=ends)
    # A run that goes on logs what it logged last: which step that was, the metrics say.
    position.step, position.loop, position.ended = int(loop.last["step"]), loop.state(), True
    # The next round has other candidates.
    position.loop.pop("last_visits", None)
    save(run, position)


def _learning_rate(run: Run, position: Position, end: int, step: int) -> float:
    config = run.config
    first, steps = (position.start, end - position.start) if config.learning_rate_over == "round" else (0, run.total)
    return learning_rate_at(
        step - first,
        peak=config.training.learning_rate * config.learning_rate_decay**position.round,
        num_steps=steps,
        warmup_ratio=config.training.warmup_ratio,
        kind=config.training.lr_scheduler_type,
    )


def _mismatched(run: Run, method: Method, pool: Pool, number: int) -> list[EncodedGroup]:
    """Prompts with completions of others, for methods that measure from them, with reference log-probs."""
    if method.hooks.baseline is None or not method.hooks.baseline.mismatched:
        return []
    groups = mismatched_groups(pool.groups, max_length=run.config.training.encoding.max_length)
    path = run.folder(number) / "mismatched.json"
    if not decided_by_first(run.accelerator, path.is_file):
        decided_by_first(run.accelerator, partial(write_artefact, reference_logprobs(run, groups), path))
    found = decided_by_first(run.accelerator, partial(read_artefact, path, MISMATCHED, rows=len(groups)))
    return [replace(group, reference_logprobs=tuple(row)) for group, row in zip(groups, found, strict=True)]


def _drifted(run: Run, pool: Pool, steps: int) -> bool:
    """Whether the policy's drift is above the limit; measured every ``drift_steps`` steps."""
    limit = run.config.regenerate_on_drift
    if limit is None or steps % run.config.drift_steps:
        return False
    drift = measure_drift(run, pool)
    if drift is None or drift.kl <= limit:
        return False
    run.say(f"Drift: KL of generating and current policy is {drift.kl:.3f} nats, above {limit}: generating again")
    return True


def measure_drift(run: Run, pool: Pool) -> Drift | None:
    """Drift since the pool was generated, on the prompts kept out of training; None where none was, or none was answered."""
    if not pool.measured:
        return None
    with run.clock.phase("drift"):
        current = run.engine.logprobs(pool.measured)
        rewards = [group.rewards for group in pool.measured]
        # One process decides for all whether a round ends.
        return decided_by_first(run.accelerator, partial(estimate_drift, pool.generating, current, rewards))


# --- Ends -------------------------------------------------------------------------------------------------------------


def finish_round(run: Run, position: Position, pool: Pool) -> dict[str, Any]:
    """Measure the round's drift, look at its health, and write ``round.json``."""
    drift = measure_drift(run, pool)
    first = run.rounds[0]["health"] if run.rounds else pool.health
    found = alarms(pool.health, first)
    if drift is not None and drift.kl > WARN_ABOVE:
        found.append(
            f"the policy moved {drift.kl:.2f} nats (KL) from the one that made this round's completions, above {WARN_ABOVE}: "
            "regenerate sooner (regenerate_every, regenerate_on_drift) or lower the learning rate"
        )
    found += _incomplete(run, pool)
    row: dict[str, Any] = {
        "round": position.round + 1,
        "start": position.start,
        "end": position.step,
        "counts": pool.counts,
        "health": {name: value for name, value in pool.health.items() if math.isfinite(value)},
        "drift": None if drift is None else drift.as_json(),
        "alarms": found,
        "seconds": dict(run.clock.seconds),
    }
    decided_by_first(run.accelerator, partial(write_json_atomic, row, run.folder(position.round) / "round.json"))
    run.say(f"Round {position.round + 1}: {_round_line(row)}\n  time: {shares(run.clock.seconds)}")
    for alarm in found:
        run.say(f"warning: round {position.round + 1}: {alarm}")
    run.clock = Clock()
    return row


def _incomplete(run: Run, pool: Pool) -> list[str]:
    """A warning where more than a tenth of the round's completions are empty or cut."""
    strings = any(isinstance(group.prompt, str) for group in run.prompts)
    for_empty, for_cut = remedies(
        run.encoder.string_prompts if strings else None,
        has_template=bool(run.policy.tokenizer.chat_template),
        max_new_tokens=run.config.max_new_tokens,
    )
    counts = pool.counts
    warning = incomplete_warning(counts["empty"], counts["cut"], counts["completions"], for_empty=for_empty, for_cut=for_cut)
    return [] if warning is None else [warning]


def _round_line(row: dict[str, Any]) -> str:
    health, drift = row["health"], row["drift"]
    parts = [f"reward {health.get('reward/mean', math.nan):.3f} (best {health.get('reward/best', math.nan):.3f})"]
    if drift is not None:
        low, high = drift["kl_interval"]
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        parts.append(f"drift {drift['kl']:.3f} nats{interval} on {drift['num_prompts']} prompts kept out of training")
    return ", ".join(parts)


def summary(results: dict[str, Any]) -> str:
    """What the terminal shows at the end."""
    lines = [f"{results['method']}, online: {results['steps']} steps in {len(results['rounds'])} rounds"]
    for row in results["rounds"]:
        lines.append(f"  round {row['round']} (steps {row['start'] + 1}-{row['end']}): {_round_line(row)}")
    comparison = results["evaluation"].get("comparison")
    if comparison is not None:
        low, high = comparison["ci_difference"]
        # Where every reward is the same.
        interval = f"[{low:.3f}, {high:.3f}] (95 % score interval)" if low is not None else "(no interval can be told)"
        lines.append(
            f"  {results['evaluation']['num_compared']} held-out prompts: mean reward {comparison['mean_before']:.3f} -> "
            f"{comparison['mean_after']:.3f}, difference {comparison['difference']:.3f} {interval}, "
            f"p = {comparison['p_value']:.4f}"
        )
    lines += [f"  round {row['round']}: {alarm}" for row in results["rounds"] for alarm in row["alarms"]]
    return "\n".join([*lines, f"Report: {results['report']}", f"Model:  {results['model']}"])


def report(run: Run) -> Path:
    """Write the report page of the rounds so far."""
    return write_rounds_report(run.config.training.output_dir, run.rounds, compare(run), method=run.method.name)


def reward_steps(run: Run) -> list[dict[str, Any]]:
    """The steps that made the rewards of the new candidates, and of the data's where these are mixed in."""
    rows = [{"candidates": "fresh", "steps": [source_record(run.config.rewards)], "groups": len(run.prompts)}]
    if run.config.candidates == "fresh":
        return rows
    counts: Counter[tuple[str, ...]] = Counter()
    for group in run.prompts:
        if any(candidate.reward is not None for candidate in group.candidates):
            count_steps(counts, steps_of(group) or (rewards_origin(run.config.training.data, None),))
    return [*rows, *({"candidates": "offline", **row} for row in listed_steps(counts))]


def finish(run: Run, position: Position) -> dict[str, Any]:
    """The last evaluation, the model and results.json."""
    config = run.config
    run.generator.update(config.training.output_dir / run_folder.ROUNDS)
    evaluate_policy(run, config.training.output_dir / run_folder.ROUNDS / "evaluation.json")
    evaluation = decided_by_first(run.accelerator, partial(compare, run))
    counts = [row["counts"] for row in run.rounds]
    data = {
        "prompts": len(run.prompts),
        "groups_trained_on": sum(count["groups_trained_on"] for count in counts),
        "candidates_used": sum(count["completions"] for count in counts),
        "tokens_generated": sum(count["tokens"] for count in counts),
        "tokens_for_drift": sum(count["tokens_kept_out"] for count in counts),
        **run.offline.counts,
    }
    page = decided_by_first(run.accelerator, partial(report, run))
    results = {
        "method": run.method.name,
        "report": str(page),
        "steps": position.step,
        "data": data,
        "reward_steps": reward_steps(run),
        "before": evaluation.get("before"),
        "after": evaluation.get("after", position.loop["last"] if position.loop else {}),
        "evaluation": evaluation,
        "rounds": run.rounds,
        "dtype": config.training.dtype,
        "scoring_dtype": config.training.scoring_dtype,
        "seed": config.training.seed,
        "model": str(config.training.output_dir / run_folder.MODEL),
        "versions": versions(),
    }
    target = config.training.output_dir / run_folder.MODEL
    card = model_card(run.policy, config.training, config.model_dump(mode="json"), results)
    merge = merges(run.policy, config.training)
    write = partial(save_model, run.policy, run.engine.model, run.accelerator, merge=merge, card=card)
    try:
        write(target=target)
        if run.accelerator.is_main_process:
            write_json_atomic(results, config.training.output_dir / run_folder.RESULTS)
    except OSError as error:
        # The round's end has left a checkpoint.
        raise kept_after(
            error,
            config.training.output_dir,
            position.step,
            save_checkpoint=lambda: save(run, position),
            save_model=lambda elsewhere: write(target=elsewhere),
        ) from error
    return results

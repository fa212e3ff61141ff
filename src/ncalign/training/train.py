"""`ncalign train`: from a configuration to a finished run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ncalign.core.atomic import check_writable, write_json_atomic
from ncalign.core.cache import cache_folder
from ncalign.core.code_digest import value_digest
from ncalign.core.store import Store
from ncalign.model.attention import shares_prompts
from ncalign.model.batching import GroupBatch
from ncalign.model.encoding import EncodedGroup, Encoder
from ncalign.model.logprobs import base_causal_model
from ncalign.model.policy import Policy, reference_mode
from ncalign.model.reference import ReferenceCache, data_digest, missing_groups, reference_folder, with_reference
from ncalign.objectives import Method, build_method
from ncalign.report.page import report_at_end
from ncalign.training import run_folder
from ncalign.training.assembly import make_engine
from ncalign.training.best import Best
from ncalign.training.checkpoint import delete_old, find_checkpoints, load_checkpoint, refuse_other_run, save_checkpoint
from ncalign.training.config import TrainConfig
from ncalign.training.data import (
    LoadedGroups,
    fit_method,
    held_out_places,
    listed_steps,
    load_groups,
    made_otherwise,
    mismatched_groups,
)
from ncalign.training.ends import begun, check_best, take_best
from ncalign.training.engine import Engine
from ncalign.training.estimate import with_candidates
from ncalign.training.export import merges, model_card, save_model, versions
from ncalign.training.finished import export_finished
from ncalign.training.launch import is_sharded, make_accelerator
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
from ncalign.training.resolve import check_data_files, groups_per_step, with_rendering
from ncalign.training.run_folder import MetricsFile, claimed_run_folder, finished_results, open_run_folder, refuse_changes
from ncalign.training.samples import make_sampler
from ncalign.training.saved import TRAIN_STATE, LoopState
from ncalign.training.schedule import DataPlan, learning_rate_at, make_plan
from ncalign.training.selfcheck import check_first_step
from ncalign.training.space import DiskNeed, check_space, disk_need
from ncalign.training.trackers import log_to_trackers, samples_to_trackers, start_trackers
from ncalign.training.variants import vary_groups

_TOKEN = 8
"""Bytes of a token's text."""
_NUM_CHECKED = 64
"""Groups whose references are checked when they come with the data."""


@dataclass
class Prepared:
    """A run before its first step."""

    policy: Policy
    engine: Engine
    optimizer: torch.optim.Optimizer
    plan: DataPlan
    train: list[EncodedGroup]
    held_out: list[EncodedGroup]
    loaded: LoadedGroups
    encoder: Encoder
    mismatched: list[EncodedGroup]
    eval_mismatched: list[EncodedGroup]
    variants: dict[str, Any]

    def counts(self) -> dict[str, Any]:
        """Of groups and candidates, for results.json and the dry run."""
        found = self.loaded.counts()
        found["candidates_used"] -= self.variants.get("candidates_left_out", 0)
        return found | {"groups_trained_on": len(self.train), "groups_held_out": len(self.held_out)} | self.variants


def run_training(config: TrainConfig, *, method: Method | None = None) -> dict[str, Any]:
    """Train as configured and leave a run folder.

    Args:
        config: the run.
        method: your own method, in place of ``config.objective``.

    Returns:
        What ``results.json`` holds: counts, the last metrics, evaluation before and after, versions, where the model is.

    Raises:
        ValueError: data, model or configuration that can't be used; nothing is half-written.
    """
    own = {"method": "as configured" if method is None else f"{method.name} {value_digest(method)}"}
    accelerator, method = make_accelerator(config), method or build_method(config.objective)
    inputs = {"model": config.model, "data": config.data, "eval_data": config.eval_data}
    with another_process_named():
        claimed = partial(claimed_run_folder, config, verb="train", inputs=inputs)
        with claimed() if accelerator.is_main_process else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            check_shared_folder(config.output_dir, accelerator)
            config = with_precision(with_rendering(config, accelerator), accelerator, method)
            decided_by_first(accelerator, partial(refuse_changes, config, config.model_dump(mode="json")))
            results = _run(config, accelerator, method, own)
            accelerator.end_training()
    return results


def _run(config: TrainConfig, accelerator: Accelerator, method: Method, own: dict[str, str]) -> dict[str, Any]:
    finished = decided_by_first(accelerator, partial(finished_results, config)) if config.resume else None
    started, written = time.monotonic(), config.model_dump(mode="json")
    if finished is not None:
        done = export_finished(config, written, finished, accelerator, policy=lambda: open_policy(config, accelerator)[0])
        say_first(accelerator, f"{config.output_dir} is finished: {done or 'nothing to resume'}")
        return finished
    checkpoints = decided_by_first(accelerator, partial(find_checkpoints, config.output_dir)) if config.resume else []
    step_size = groups_per_step(config, accelerator, checkpoints[-1] if checkpoints else None)
    prepared = prepare_training(config, accelerator, method, step_size)
    decided_by_first(accelerator, partial(check_space, config, needed_space(config, prepared)))
    engine, inputs = prepared.engine, _inputs(config, prepared) | own
    refuse_unlike_inputs(inputs, accelerator)
    _fill_reference(config, prepared)
    prepared.engine = with_candidates(prepared.engine, prepared.train)
    torch.manual_seed(config.seed + accelerator.process_index)  # an adapter's dropout differs between processes
    state: Any = {"step": 0, "before": None, "seconds": 0.0, "weights": inputs["weights"], "data": inputs["data"]}
    if checkpoints:
        decided_by_first(accelerator, partial(run_folder.refuse_other_inputs, config, inputs))
        state = load_checkpoint(
            checkpoints[-1],
            TRAIN_STATE,
            num_steps=prepared.plan.num_steps,
            model=engine.model,
            optimizer=prepared.optimizer,
            accelerator=accelerator,
        )
        refuse_other_run(checkpoints[-1], state, weights=inputs["weights"], data=inputs["data"], what="the training groups")
        say_first(accelerator, f"Resuming from {checkpoints[-1]}")
    else:
        if config.resume:
            say_first(accelerator, f"note: {config.output_dir} has no checkpoint: training starts at the beginning")
        self_check(config, prepared)
    # Not before all that can be wrong with the configuration, the data and the model has been looked at.
    if accelerator.is_main_process:
        open_run_folder(config, written, inputs, verb="train")
    accelerator.wait_for_everyone()
    loop = _loop(config, prepared, state["step"])
    if checkpoints:
        loop.restore(state["loop"])
        check_best(config.output_dir, loop)
    else:
        state["before"] = begun(loop)
    save = partial(_save, config, prepared, state, started)
    after = take_best(config.output_dir, loop, _trained(config, loop, state["step"], save), save=save)
    seconds = state["seconds"] + time.monotonic() - started
    results = _results(config, prepared, loop, before=state["before"], after=after, seconds=seconds)
    merge, card = merges(prepared.policy, config), model_card(prepared.policy, config, written, results)
    write = partial(save_model, prepared.policy, engine.model, accelerator, merge=merge, card=card)
    _finish(config, loop, results, save=save, write=lambda target: write(target=target))
    return results


def _results(
    config: TrainConfig, prepared: Prepared, loop: Loop, *, before: Any, after: dict[str, float], seconds: float
) -> dict[str, Any]:
    """What ``results.json`` holds."""
    return {
        "method": prepared.engine.method.name,
        "steps": loop.done,
        **({} if loop.best is None else {"best": loop.best.result(), "stopped_early": loop.stopped_early}),
        "data": prepared.counts(),
        "reward_steps": listed_steps(prepared.loaded.reward_steps),
        "before": before,
        "after": after,
        "dtype": config.dtype,
        "scoring_dtype": config.scoring_dtype,
        "seed": config.seed,
        "seconds": seconds,
        "model": str(config.output_dir / run_folder.MODEL),
        "versions": versions(),
    }


def _trained(config: TrainConfig, loop: Loop, start: int, save: Callable[[int, LoopState], None]) -> dict[str, float]:
    """Train; where a file can't be written, what was learned is kept in a checkpoint."""
    try:
        return loop.run(start, save=save)
    except OSError as error:
        # Other processes wait elsewhere, and a checkpoint needs all of them.
        if loop.engine.accelerator.num_processes > 1 or loop.done == start:
            raise
        raise kept_after(error, config.output_dir, loop.done, save_checkpoint=lambda: save(loop.done, loop.state())) from error


def _finish(
    config: TrainConfig,
    loop: Loop,
    results: dict[str, Any],
    *,
    save: Callable[[int, LoopState], None],
    write: Callable[[Path], None],
) -> None:
    """Write the model and the results; where that fails, what was learned is kept in a checkpoint or elsewhere."""
    try:
        write(config.output_dir / run_folder.MODEL)
        if loop.engine.accelerator.is_main_process:
            write_json_atomic(results, config.output_dir / run_folder.RESULTS)
    except OSError as error:
        checkpoint = partial(save, loop.done, loop.state())
        raise kept_after(error, config.output_dir, loop.done, save_checkpoint=checkpoint, save_model=write) from error
    report_at_end(config.output_dir, first=loop.engine.accelerator.is_main_process)


def needed_space(config: TrainConfig, prepared: Prepared) -> DiskNeed:
    """What a run will write to its folder."""
    steps = prepared.plan.num_steps
    answers = (steps // config.sample_steps + 2) * config.num_sample_prompts if config.sample_steps else 0
    return disk_need(
        config,
        prepared.engine.inner.model,
        merged=prepared.policy.merged_dtype if merges(prepared.policy, config) else None,
        num_steps=steps,
        num_saves=steps // config.save_steps if config.save_steps else 0,
        num_best=steps // config.eval_steps + 1 if config.load_best_model_at_end else 0,
        samples=_TOKEN * answers * (config.sample_max_new_tokens + config.encoding.max_length),
    )


def prepare_training(config: TrainConfig, accelerator: Accelerator, method: Method, step_size: int) -> Prepared:
    """Load model and data, and hand both to accelerate; ``step_size`` is the number of groups in a step."""
    torch.manual_seed(config.seed)
    check_data_files(config)
    say_first(accelerator, f"Loading {config.model}")
    policy, encoder = open_policy(config, accelerator)
    load = partial(
        load_groups,
        encoder=encoder,
        method=method,
        schema=config.schema_name,
        on_bad_row=config.on_bad_row,
        join_rows=config.join_rows,
        shown=accelerator.is_main_process,
    )
    loaded = load(config.data)
    notices, warned = [loaded.notice], [made_otherwise(loaded, encoder, config.data)]
    if config.eval_data is not None:
        evaluated = load(config.eval_data)
        notices.append(evaluated.notice)
        warned.append(made_otherwise(evaluated, encoder, config.eval_data))
        train, held_out = loaded.groups, evaluated.groups
    else:
        out = held_out_places(loaded.prompts, fraction=config.eval_fraction, seed=config.seed)
        train = [group for place, group in enumerate(loaded.groups) if place not in out]
        held_out = [group for place, group in enumerate(loaded.groups) if place in out]
    if config.eval_fraction and not held_out:
        notices.append(f"eval_fraction={config.eval_fraction} holds out no group: all {len(train)} have the same prompt")
    varied = vary_groups(
        train,
        max_candidates=config.max_candidates,
        corrupt=config.corrupt,
        seed=config.seed,
        max_length=config.encoding.max_length,
        refuse=method.refuse,
    )
    train, variants = varied.groups, varied.counts(config.max_candidates, config.corrupt)
    method, notice = fit_method(method, train)
    notices.append(notice)
    for notice in filter(None, (*notices, *encoder.report.notices())):
        say_first(accelerator, f"note: {notice}")
    for warning in filter(None, warned):
        say_first(accelerator, warning)
    engine, optimizer = make_engine(config, policy, method, accelerator, tokens=[group.num_tokens for group in train])
    plan = make_plan(
        len(train),
        groups_per_step=step_size,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    mismatched: list[list[EncodedGroup]] = [[], []]
    if method.hooks.baseline is not None and method.hooks.baseline.mismatched:
        mismatched = [mismatched_groups(groups, max_length=config.encoding.max_length) for groups in (train, held_out)]
    return Prepared(policy, engine, optimizer, plan, train, held_out, loaded, encoder, mismatched[0], mismatched[1], variants)


def self_check(config: TrainConfig, prepared: Prepared) -> None:
    """Run :func:`check_first_step` on the first step's groups, and with references from the data, on others too."""
    engine = prepared.engine
    _, indices = prepared.plan.step_groups(0)
    folder = _reference_folder(config, prepared)
    source = str(folder)
    if config.reference == "data":
        source = "the data"
        apart = max(1, len(prepared.train) // _NUM_CHECKED)
        indices = sorted({*indices, *range(0, len(prepared.train), apart)})
    for part in engine.passes(indices, [prepared.train[index] for index in indices]):
        batch = engine.batch(part)

        def fresh(read: torch.Tensor | None, batch: GroupBatch = batch) -> torch.Tensor:
            with reference_mode(engine.inner.model):
                return engine.score(batch, read=read)

        check_first_step(
            engine.method,
            batch,
            policy=engine.training_logprobs(batch),
            fresh_reference=fresh,
            dtype=config.dtype,
            source=source,
            agreed=lambda off: any(gather_object([off])) if engine.accelerator.num_processes > 1 else off,
        )


def _fill_reference(config: TrainConfig, prepared: Prepared) -> None:
    if config.reference == "data":
        for group in (*prepared.train, *prepared.held_out):
            if None in group.reference_logprobs:
                raise ValueError(
                    f"{group.origin}: group {group.id!r} has a candidate without reference_logprob: reference: data needs "
                    "one for each candidate; reference: compute fills them in"
                )
    given = config.reference == "data"
    # Completions paired with other prompts than their own are in nobody's data.
    groups = [*([] if given else [*prepared.train, *prepared.held_out]), *prepared.mismatched, *prepared.eval_mismatched]
    if not groups:
        return
    cache = ReferenceCache(_reference_folder(config, prepared))
    try:
        # One process on each machine: a check removes the folders that it made, which another may be about to write to.
        if prepared.engine.accelerator.is_local_main_process and missing_groups(groups, cache):
            check_writable(cache.folder / "part.parquet")
        prepared.engine.fill_reference(groups, cache)
    except OSError as error:
        raise OSError(
            f"{error.strerror or error}. Reference log-probs are kept there: set cache_dir, or NCALIGN_CACHE, to "
            "a folder with room that you may write to"
        ) from error
    fill = partial(with_reference, lookup=cache.values.__getitem__)
    if not given:
        prepared.train, prepared.held_out = fill(prepared.train), fill(prepared.held_out)
    prepared.mismatched, prepared.eval_mismatched = fill(prepared.mismatched), fill(prepared.eval_mismatched)


def _loop(config: TrainConfig, prepared: Prepared, start: int) -> Loop:
    accelerator, plan = prepared.engine.accelerator, prepared.plan
    first = accelerator.is_main_process
    metrics, samples = (
        MetricsFile(config.output_dir / name, keep_until=start, num_steps=plan.num_steps) if first and wanted else None
        for name, wanted in ((run_folder.METRICS, True), (run_folder.SAMPLES, config.sample_steps > 0))
    )
    start_trackers(config, config.model_dump(mode="json"), accelerator, start)

    def log(row: dict[str, float]) -> None:
        if metrics is not None:
            metrics.write(row)
        log_to_trackers(config, accelerator, row)

    def keep(step: int, rows: list[dict[str, Any]]) -> None:
        assert samples is not None
        samples.write(*rows)
        samples_to_trackers(config, accelerator, step, rows)

    sampler, best = None, None
    if config.sample_steps:
        done = set() if samples is None else samples.steps
        sampler = make_sampler(config, prepared.policy, prepared.engine, prepared.held_out, write=keep, done=done)
    if config.best_metric is not None:
        best = Best(
            config.best_metric, config.greater_is_better, config.early_stopping_patience, config.early_stopping_threshold
        )
    return Loop(
        engine=prepared.engine,
        optimizer=prepared.optimizer,
        plan=plan,
        groups=prepared.train,
        eval_groups=prepared.held_out,
        learning_rate=partial(
            learning_rate_at,
            peak=config.learning_rate,
            num_steps=plan.num_steps,
            warmup_ratio=config.warmup_ratio,
            kind=config.lr_scheduler_type,
        ),
        max_grad_norm=config.max_grad_norm,
        intervals=Intervals(config.logging_steps, config.eval_steps, config.save_steps, config.sample_steps),
        log=log,
        mismatched=prepared.mismatched,
        eval_mismatched=prepared.eval_mismatched,
        best=best,
        keep_best=config.load_best_model_at_end,
        sample=sampler,
    )


def _inputs(config: TrainConfig, prepared: Prepared) -> dict[str, str]:
    """Digests of what the run reads."""
    # As encoded: with it, the tokenizer and the chat template are the same.
    found = {"weights": prepared.policy.fingerprint, "data": data_digest(prepared.train)}
    found |= {"eval_data": data_digest(prepared.held_out)} if prepared.held_out else {}
    if config.reference == "data":
        found["data"] += Store.key([group.reference_logprobs for group in (*prepared.train, *prepared.held_out)])
    return found


def _save(config: TrainConfig, prepared: Prepared, state: dict[str, Any], started: float, step: int, loop: LoopState) -> None:
    seconds = state["seconds"] + time.monotonic() - started
    save_checkpoint(
        config.output_dir,
        step,
        model=prepared.engine.model,
        optimizer=prepared.optimizer,
        accelerator=prepared.engine.accelerator,
        state={"before": state["before"], "seconds": seconds, "loop": loop, "weights": state["weights"], "data": state["data"]}
        | {"groups_per_step": prepared.plan.groups_per_step},
    )
    best = loop.get("best") if config.load_best_model_at_end else None
    accelerator = prepared.engine.accelerator
    delete_old(config.output_dir, accelerator, keep=config.save_total_limit, best=best["step"] if best else 0)


def _reference_folder(config: TrainConfig, prepared: Prepared) -> Path:
    return reference_folder(
        config.cache_dir or cache_folder(),
        prepared.policy.fingerprint,
        shared=shares_prompts(base_causal_model(prepared.policy.model)),
        uncast=config.dtype == "bfloat16" and is_sharded(prepared.engine.accelerator),
        fused=prepared.engine.inner.fused_head,
        compiled=config.compile_norms_and_mlps,
    )

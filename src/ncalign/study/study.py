"""`ncalign study`: arms × seeds of ordinary runs, measured on the same held-out prompts and compared with intervals."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ncalign.core.atomic import write_json_atomic
from ncalign.core.json import json_ready
from ncalign.core.locks import held
from ncalign.core.outputs import claim, record
from ncalign.core.progress import say
from ncalign.online.config import OnlineConfig
from ncalign.report.tables import to_text
from ncalign.study.analysis import CAPTION, arm_means, claims_table, comparisons, headline
from ncalign.study.config import BEFORE, Scale, StudyConfig
from ncalign.study.material import DATA, with_material, write_tiny_material
from ncalign.study.on_ray import on_ray
from ncalign.study.page import FIGURE, PAGE, TABLES, write_outputs
from ncalign.study.runs import (
    LOGS,
    MEASURES,
    REFERENCE,
    RUNS,
    TASKS,
    Engine,
    Failures,
    Job,
    in_processes,
    in_this_process,
    run_jobs,
)
from ncalign.study.spec import Load, Study, read_study, run_config, training_of
from ncalign.study.win_rates import measured_of_runs, win_rates
from ncalign.training.config import TrainConfig
from ncalign.training.plan import dry_run

TINY_MODEL = "tiny-model"
RESULTS = "study.json"
_FOLDERS = (RUNS, MEASURES, LOGS, REFERENCE, DATA, TASKS)
_ENTRIES = (*_FOLDERS, RESULTS, *TABLES, FIGURE, PAGE)
_TEXT_WIDTH = 110


def run_study(config: StudyConfig, *, load: Load) -> dict[str, Any]:
    """Run a study, or go on with one, and write what came of it.

    Args:
        config: which study, and where.
        load: reads a run's settings from a YAML file and flags, as the command line does.

    Returns:
        What ``study.json`` holds, and a printable summary under ``text``.

    Raises:
        ConfigError: the study's file can't be used.
        ValueError: model or data can't be, or the folder holds something else.
    """
    if config.study == TINY_MODEL:
        return write_tiny_material(config.output_dir or Path("tiny"))
    study = read_study(config.study, scale=config.scale, seeds=config.seeds, data=config.data)
    folder = study_folder(config, study)
    check_arms(study, load=load)
    claim(folder, _ENTRIES, verb="study", inputs=_inputs(study), overwrite=False, own=_ENTRIES)
    with held(folder, busy=f"another process runs a study in {folder}: wait for it, or give another output_dir"):
        record(folder, _ENTRIES, verb="study")
        for name in _FOLDERS:
            record(folder / name, ["*"], verb="study")
        study = with_material(study, folder)
        jobs = jobs_of(study, folder, load=load)
        failures = run_jobs(jobs, engine=_engine(config))
        return _finish(study, folder, jobs, failures, scale=config.scale)


def plan_study(config: StudyConfig, *, load: Load) -> dict[str, Any]:
    """What a study would run: its runs, and the estimates of one of them where model and data are here.

    Raises:
        ConfigError: the study's file can't be used.
    """
    study = read_study(config.study, scale=config.scale, seeds=config.seeds, data=config.data)
    material = study.file.material
    arms = list(study.file.arms)
    facts: dict[str, Any] = {"study": study.name, "arms": arms, "seeds": study.file.seeds, "runs": len(arms) * study.file.seeds}
    lines = [f"{study.name}: {len(arms)} arms ({', '.join(arms)}) x {study.file.seeds} seeds = {facts['runs']} runs"]
    lines += [f"compares: {one.text()}" for one in study.claims]
    first = check_arms(study, load=load)
    if material is not None:
        made = f"{material.num_prompts} prompts of {material.num_samples} candidates, {material.num_held_out} held out"
        lines.append(
            f"{'data' if material.kind == 'programs' else 'model and data'} are made by ncalign ({material.kind}): {made}"
        )
        if material.kind == "programs" and material.data is None:
            lines.append("to run it, give the file of programs: --data FILE")
    if isinstance(first, OnlineConfig) or material is not None:
        return {**facts, "text": "\n".join(lines)}
    training = training_of(first)
    if not (Path(training.model).is_dir() and Path(str(training.data).rpartition(":")[0] or training.data).exists()):
        lines.append(f"no estimate: {training.model} or {training.data} is not here; all settings are valid")
        return {**facts, "text": "\n".join(lines)}
    plan = dry_run(training)
    facts |= {name: plan[name] for name in ("memory_mib", "seconds", "scored_tokens", "steps") if name in plan}
    lines += [f"one run of {arms[0]}:", *(f"  {line}" for line in str(plan["text"]).splitlines())]
    if "seconds" in plan:
        hours = plan["seconds"] * facts["runs"] / config.workers / 3600
        lines.append(f"all runs: about {hours:.2f} h with {config.workers} worker(s), evaluation not counted")
    return {**facts, "text": "\n".join(lines)}


def check_arms(study: Study, *, load: Load) -> TrainConfig | OnlineConfig:
    """Read the settings of every arm, before anything is made; returns the first one's.

    Raises:
        ConfigError: an arm's settings can't be used.
    """
    # What a material brings is not there yet.
    made = {} if study.file.material is None else {"model": str(study.file.base.get("model", "elsewhere")), "data": "elsewhere"}
    own = {"seed": "0", "output_dir": str(Path(RUNS) / study.name), **made}
    first, *_ = [run_config(study, arm, own, load=load) for arm in study.file.arms]
    return first


def study_folder(config: StudyConfig, study: Study) -> Path:
    """Where a study is written."""
    return config.output_dir or Path("runs") / f"{study.name}-{config.scale}"


def jobs_of(study: Study, folder: Path, *, load: Load) -> list[Job]:
    """The study's runs, seed by seed: what is there when it is stopped can be compared.

    Raises:
        ConfigError: an arm's settings can't be used.
    """
    evaluation = study.file.evaluate
    jobs = []
    for seed in range(study.file.seeds):
        for arm in study.file.arms:
            own = {"seed": str(seed), "output_dir": str(folder / RUNS / arm / f"seed-{seed}"), "report_to": "[]"}
            # Measured once it is done, and not by training.
            own |= {"eval_data": "null"}
            # Of its own: what other runs on this machine computed in other batches differs by rounding.
            own |= {"cache_dir": str(folder / REFERENCE)}
            config = run_config(study, arm, own, load=load)
            jobs.append(
                Job(
                    arm=arm,
                    seed=seed,
                    config=config.model_dump(mode="json"),
                    held_out=Path(str(study.file.base["eval_data"])),
                    online=isinstance(config, OnlineConfig),
                    evaluation=None if evaluation is None else evaluation.model_dump(mode="json"),
                    tasks=None if study.file.tasks is None else study.file.tasks.model_dump(mode="json"),
                    measures=measured_of_runs(study.measures),
                    folder=folder,
                    keep_model=study.file.keep_models,
                    trained=not (study.file.before and arm == BEFORE),
                )
            )
    return jobs


def _engine(config: StudyConfig) -> Engine:
    """What makes the runs."""
    if config.ray is not None:
        return partial(on_ray, address=config.ray, cpus=config.ray_cpus, gpus=config.ray_gpus)
    return in_this_process if config.workers == 1 else partial(in_processes, workers=config.workers)


def _finish(study: Study, folder: Path, jobs: Sequence[Job], failures: Failures, *, scale: Scale) -> dict[str, Any]:
    runs = {(job.arm, job.seed): kept for job in jobs if (kept := job.found()) is not None}
    measured = {name: kept.values for name, kept in runs.items()}
    wins = win_rates(study, runs, jobs)
    rows, claims = arm_means(study, measured, wins), comparisons(study, measured, wins)
    found: dict[str, Any] = json_ready(
        {
            "study": study.name,
            "claim": study.file.claim,
            "source": study.file.source,
            "scale": scale,
            "seeds": study.file.seeds,
            "arm_settings": study.file.arms,
            "before": study.file.before,
            "measures": study.measures,
            "comparisons": claims,
            "arms": rows,
            "failed": failures,
            "ncalign": importlib.metadata.version("ncalign"),
        }
    )
    write_json_atomic(found, folder / RESULTS)
    # The lines above it say why.
    table = claims_table(claims, caption=CAPTION, why=False)
    page = write_outputs(folder, found)
    lines = [headline(one, row) for one, row in zip(study.claims, claims, strict=True)]
    lines = [*([study.file.claim] if study.file.claim else []), *lines, "", to_text(table, width=_TEXT_WIDTH)]
    lines += [f"failed: {name}: {reason.splitlines()[0]}" for name, reason in failures.items()]
    if failures:
        say(
            f"warning: {len(failures)} of {len(jobs)} runs failed; rerun to try them again. A run whose settings changed "
            f"starts anew once its folder in {folder / RUNS} is deleted"
        )
    return {**found, "text": "\n".join([*lines, "", f"Report: {page}"])}


def _inputs(study: Study) -> dict[str, object]:
    return {name: study.file.base[name] for name in ("model", "data", "eval_data") if name in study.file.base}

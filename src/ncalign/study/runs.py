"""A study's runs: each an ordinary run folder, made and measured once, in this process or in several."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import TypeAdapter

from ncalign.core.atomic import delete_folder, write_json_atomic
from ncalign.core.kept import read_kept
from ncalign.core.parallel import begin_worker, num_workers
from ncalign.core.progress import Bar, say
from ncalign.core.store import Store
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.study.config import Evaluation, Measure, TaskSuite
from ncalign.study.measure import Found, Plan, measure_run
from ncalign.study.spec import training_of
from ncalign.training import run_folder
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training

RUNS, MEASURES, LOGS, REFERENCE, TASKS = "runs", "measures", "logs", "reference", "tasks"
_MEASURED = TypeAdapter(dict[str, Any])
_ATTEMPTS = 2
"""Of a run whose process is killed, as the system does when memory runs out."""


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed.

    Attributes:
        arm: its name.
        seed: of the run.
        config: its configuration, as JSON values.
        held_out: groups on which it is measured.
        online: whether it is an online run.
        evaluation: how held-out prompts are answered, as JSON values; None where they are not.
        tasks: reasoning tasks that are asked, likewise.
        measures: what is measured of the run.
        folder: of the study.
        keep_model: whether the model stays once it is measured.
        trained: false for the starting model, which is only measured.
    """

    arm: str
    seed: int
    config: Mapping[str, Any]
    held_out: Path
    online: bool
    evaluation: Mapping[str, Any] | None
    tasks: Mapping[str, Any] | None
    measures: tuple[Measure, ...]
    folder: Path
    keep_model: bool
    trained: bool = True

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}/seed-{self.seed}"

    @property
    def measured(self) -> Path:
        """Where its measures are kept."""
        return self.folder / MEASURES / f"{self.name}.json"

    def key(self) -> str:
        """A digest of what its measures depend on."""
        return Store.key(
            self.config,
            str(self.held_out),
            self.evaluation,
            self.tasks,
            list(self.measures),
            "trained" if self.trained else "before",
        )

    def training(self) -> TrainConfig:
        """The training settings of the run."""
        return training_of(self._config())

    def make(self) -> None:
        """Train, unless the run is the starting model."""
        config = self._config()
        training = training_of(config)
        resumed = training.model_copy(update={"resume": (training.output_dir / run_folder.CONFIG).is_file()})
        if not self.trained:
            return
        if isinstance(config, OnlineConfig):
            run_online(config.model_copy(update={"training": resumed}))
        else:
            run_training(resumed)

    def plan(self) -> Plan:
        """What is measured of it."""
        return Plan(
            held_out=self.held_out,
            measures=self.measures,
            evaluation=None if self.evaluation is None else Evaluation.model_validate(self.evaluation),
            tasks=None if self.tasks is None else TaskSuite.model_validate(self.tasks),
            tasks_folder=self.folder / TASKS / self.name,
        )

    def found(self) -> Found | None:
        """Its measures; None where they have not been made, or of another run."""
        if not self.measured.is_file():
            return None
        kept = read_kept(self.measured, _MEASURED, remedy="delete it: the run is measured again")
        return Found(kept["values"], kept.get("answers", {})) if kept.get("key") == self.key() else None

    def _config(self) -> TrainConfig | OnlineConfig:
        return (OnlineConfig if self.online else TrainConfig).model_validate(self.config)


Failures: TypeAlias = dict[str, str]
"""What went wrong, by the run's name."""
Engine: TypeAlias = Callable[[Sequence[Job]], Iterator[tuple[Job, str | None]]]
"""Makes runs, and gives each as it ends, with why it failed where it did."""


def run_jobs(jobs: Sequence[Job], *, engine: Engine) -> Failures:
    """Make and measure the runs that are not measured yet; one that fails is told, and the others go on.

    Args:
        jobs: in the order in which they are begun.
        engine: makes them.

    Returns:
        What failed, and why.
    """
    waiting = [job for job in jobs if job.found() is None]
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done already")
    failures: Failures = {}
    with Bar("Runs", len(jobs), completed=len(jobs) - len(waiting)) as bar:
        for job, reason in engine(waiting) if waiting else ():
            if reason is not None:
                failures[job.name] = reason
                say(f"error: the run {job.name} failed: {reason.splitlines()[0]} (see {_log(job)})")
            bar.advance(note=job.name)
    return failures


def do_job(job: Job) -> str | None:
    """Make and measure one run; returns why that failed. What it says is kept in a file of its own."""
    log = _log(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            _make(job)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            traceback.print_exc(file=file)
            return str(error) or type(error).__name__
        except Exception as error:
            # One run's bug is told like its other failures: the study is not to lose the rest.
            traceback.print_exc(file=file)
            return f"this is a bug in ncalign, please report it: {type(error).__name__}: {error}"
        finally:
            gc.collect()
    return None


def _make(job: Job) -> None:
    job.make()
    training = job.training()
    found = measure_run(training, job.plan(), trained=job.trained)
    job.measured.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic({"key": job.key(), "values": found.values, "answers": found.answers}, job.measured)
    if job.trained and not job.keep_model:
        delete_folder(training.output_dir / run_folder.MODEL)
        shutil.rmtree(training.output_dir / run_folder.CHECKPOINTS, ignore_errors=True)


def in_this_process(jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
    """Runs one after the other."""
    for job in jobs:
        yield job, do_job(job)


def in_processes(jobs: Sequence[Job], *, workers: int) -> Iterator[tuple[Job, str | None]]:
    """Runs in worker processes; where one is killed, the runs that were under way are begun again in new ones."""
    attempts: dict[str, int] = {}
    left = list(jobs)
    while left:
        pool = _pool(workers)
        futures: dict[Future[str | None], Job] = {}
        try:
            while left or futures:
                # No more than the workers can begin: those under way are those that a killed worker takes with it.
                while left and len(futures) < workers:
                    job = left.pop(0)
                    attempts[job.name] = attempts.get(job.name, 0) + 1
                    futures[pool.submit(do_job, job)] = job
                for future in wait(futures, return_when="FIRST_COMPLETED").done:
                    job = futures[future]
                    reason = future.result()
                    del futures[future]
                    yield job, reason
            # Workers that end by themselves leave nothing behind.
            pool.shutdown(wait=True)
        except BrokenProcessPool:
            again = [job for job in futures.values() if attempts[job.name] < _ATTEMPTS]
            for job in futures.values():
                if job not in again:
                    yield job, "its process was killed twice, perhaps for want of memory"
            say(f"note: a worker process was killed; begun again: {', '.join(job.name for job in again) or 'none'}")
            left = [*again, *left]
        finally:
            _end(pool)


def _pool(workers: int) -> ProcessPoolExecutor:
    threads = max(1, num_workers() // workers)
    # Not forked: torch's threads don't survive that.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(), threads))


def _begin(parent: int, threads: int) -> None:
    """In a worker: its share of the cores, and an end with its parent."""
    begin_worker(parent, killed_with_it=True)
    torch.set_num_threads(threads)
    # What is imported stays, and needn't be looked through after every run.
    gc.freeze()


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool now: after Ctrl-C its runs are not waited for."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _log(job: Job) -> Path:
    return job.folder / LOGS / f"{job.name}.txt"

"""A study's runs on a Ray cluster: each run is a task with its cores and GPUs, and Ray decides where it runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ncalign.core.errors import MissingPackageError
from ncalign.core.install import install_hint
from ncalign.study.runs import Job, do_job

_RETRIES = 1
"""Of a run whose process or machine is lost; Ray begins it again elsewhere."""


def on_ray(
    jobs: Sequence[Job], *, address: str, cpus: int, gpus: float, do: Callable[[Job], str | None] = do_job
) -> Iterator[tuple[Job, str | None]]:
    """Make runs on a Ray cluster, whose machines see the study's folder under the same path.

    Args:
        jobs: in the order in which they are submitted.
        address: as ``ray.init`` takes it: ``auto``, ``local`` or ``ray://HOST:PORT``.
        cpus: cores of each run.
        gpus: GPUs of each run; a fraction shares one.
        do: makes a run.

    Yields:
        Each run as it ends, and why it failed where it did.

    Raises:
        MissingPackageError: Ray is not installed.
        ValueError: there is no such cluster.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingPackageError(f"ray: {address} needs the package ray: {install_hint('ray')}")
    ray: Any = importlib.import_module("ray")
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"ray: {address}: no cluster can be reached ({error}); start one with `ray start --head`") from error
    try:
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(_in_task)
        under_way = {task.remote(do, job, str(Path.cwd()), cpus): job for job in jobs}
        while under_way:
            ended, _ = ray.wait(list(under_way), num_returns=1)
            for reference in ended:
                job = under_way.pop(reference)
                try:
                    reason = ray.get(reference)
                except ray.exceptions.RayError as error:
                    reason = f"its process was lost: {error}"
                yield job, reason
    finally:
        ray.shutdown()


def _in_task(do: Callable[[Job], str | None], job: Job, folder: str, cpus: int) -> str | None:
    """In a worker: relative paths are those of the machine that the study was started on."""
    os.chdir(folder)
    torch.set_num_threads(cpus)
    return do(job)

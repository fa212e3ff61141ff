"""The trackers of a run: TensorBoard and whatever else accelerate knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ncalign.core.errors import ConfigError
from ncalign.core.outputs import record
from ncalign.training import run_folder
from ncalign.training.config import TrainConfig


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise where a tracker is not known, or its package is not installed.

    Raises:
        ConfigError: it names the tracker.
    """
    known = [tracker.value for tracker in LoggerType]
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in report_to:
        if name not in known:
            raise ConfigError([f"report_to: unknown tracker {name!r}; must be one of {', '.join(known)}, or an empty list"])
        if name != "all" and name not in installed:
            raise ConfigError([f"report_to: the package of tracker {name!r} is not installed; install it or leave it out"])


def start_trackers(config: TrainConfig, written: dict[str, Any], accelerator: Accelerator, start: int) -> None:
    """Open the trackers of a run that begins, or goes on, at a step."""
    if config.report_to:
        # TensorBoard shows what a killed run logged after its last checkpoint once, not twice.
        options = {"tensorboard": {"purge_step": start + 1}} if start else {}
        if accelerator.is_main_process and {"tensorboard", "all"} & set(config.report_to):
            record(config.output_dir / run_folder.TENSORBOARD, ["*"], verb="train")
        flat = _flat(written)
        accelerator.init_trackers(run_folder.TENSORBOARD, config=flat, init_kwargs=options)


def log_to_trackers(config: TrainConfig, accelerator: Accelerator, row: dict[str, float]) -> None:
    """Hand a row of metrics to the trackers.

    Raises:
        ValueError: one of them failed.
    """
    try:
        accelerator.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))
    except Exception as error:  # each tracker raises classes of its own
        cause = getattr(error, "strerror", None) or error
        raise ValueError(
            f"step {row['step']:.0f}: a tracker of report_to ({', '.join(config.report_to)}) failed: {cause}; fix it, or "
            "resume without it. The last checkpoint and metrics are kept"
        ) from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Trackers take flat scalars only."""
    flat: dict[str, int | float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat

"""The trackers of a run: TensorBoard and whatever else accelerate knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType

from ncalign.core.errors import ConfigError
from ncalign.core.outputs import record
from ncalign.data.rendering import transcript
from ncalign.training import run_folder
from ncalign.training.config import TrainConfig

_NAME_OPTIONS = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}
"""What trackers that file a run under a project call the run's own name."""
_SAMPLES, _COLUMNS = "samples", ("id", "prompt", "completion", "tokens", "finished")
_MARKUP = frozenset("<>&\"'\\|`*_[]()#~!")
"""What means something in Markdown or HTML."""


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
    if not config.report_to:
        return
    if accelerator.is_main_process and {"tensorboard", "all"} & set(config.report_to):
        record(config.output_dir / run_folder.TENSORBOARD, ["*"], verb="train")
    # TensorBoard shows what a killed run logged after its last checkpoint once, not twice.
    purge = {"purge_step": start + 1} if start else {}
    # Its files lie in the run's folder, under a name of their own; accelerate would take the project's.
    accelerator.log_with = [
        TensorBoardTracker(run_folder.TENSORBOARD, accelerator.logging_dir, **purge) if str(one) == "tensorboard" else one
        for one in accelerator.log_with
    ]
    name = config.run_name or config.output_dir.resolve().name
    accelerator.init_trackers(
        config.project,
        config=_flat(written),
        init_kwargs={tracker: {option: name} for tracker, option in _NAME_OPTIONS.items()},
    )


def samples_to_trackers(config: TrainConfig, accelerator: Accelerator, step: int, rows: Sequence[dict[str, Any]]) -> None:
    """Hand a step's answers to the trackers that show tables or text; call it in the first process.

    Args:
        config: of the run.
        accelerator: this process's.
        step: the answers' step.
        rows: as `samples.jsonl` has them.

    Raises:
        ValueError: a tracker failed.
    """
    asked = [row["prompt"] if isinstance(row["prompt"], str) else transcript(row["prompt"]) for row in rows]
    table = [[row["id"], text, *(row[name] for name in _COLUMNS[2:])] for row, text in zip(rows, asked, strict=True)]
    with _failures_told(config, step):
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.tracker.add_text(_SAMPLES, _markdown(table), global_step=step)
            elif tracker.name in ("wandb", "clearml"):
                tracker.log_table(_SAMPLES, columns=list(_COLUMNS), data=table, step=step)
            elif tracker.name == "trackio":
                frame = import_module("pandas").DataFrame(table, columns=list(_COLUMNS))
                tracker.log({_SAMPLES: import_module("trackio").Table(dataframe=frame)}, step=step)


def _markdown(table: Sequence[Sequence[Any]]) -> str:
    """A Markdown table in which nothing that a model writes is markup."""
    rows = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
    rows += [" | ".join(_cell(value) for value in row) for row in table]
    return "\n".join(f"| {row} |" for row in rows)


def _cell(value: object) -> str:
    return "".join(f"&#{ord(mark)};" if mark in _MARKUP else mark for mark in str(value)).replace("\n", "<br>")


@contextlib.contextmanager
def _failures_told(config: TrainConfig, step: float) -> Iterator[None]:
    """Raise ValueError for whatever a tracker raises: each has classes of its own."""
    try:
        yield
    except Exception as error:
        cause = getattr(error, "strerror", None) or error
        raise ValueError(
            f"step {step:.0f}: a tracker of report_to ({', '.join(config.report_to)}) failed: {cause}; fix it, or "
            "resume without it. The last checkpoint and metrics are kept"
        ) from error


def log_to_trackers(config: TrainConfig, accelerator: Accelerator, row: dict[str, float]) -> None:
    """Hand a row of metrics to the trackers.

    Raises:
        ValueError: one of them failed.
    """
    with _failures_told(config, row["step"]):
        accelerator.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Trackers take flat scalars only."""
    flat: dict[str, int | float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat

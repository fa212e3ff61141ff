"""The run folder: what a run leaves, and whether a new one may begin there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from ncalign.core import yaml as bounded_yaml
from ncalign.core.atomic import explained, write_json_atomic, write_text_atomic
from ncalign.core.json import json_ready
from ncalign.core.kept import read_kept
from ncalign.core.locks import held
from ncalign.core.logs import read_log
from ncalign.core.outputs import Inputs, claim, recorded, remove
from ncalign.core.progress import say
from ncalign.training.config import TrainConfig
from ncalign.training.saved import RESULTS as SAVED_RESULTS

RESULTS, METRICS, SAMPLES, CONFIG, INPUTS, MODEL, CHECKPOINTS, TENSORBOARD, ROUNDS, REPORT = (
    "results.json",
    "metrics.jsonl",
    "samples.jsonl",
    "config.yaml",
    "inputs.json",
    "model",
    "checkpoints",
    "tensorboard",
    "rounds",
    "report.html",
)
ADAPTER = "adapter"
"""The adapter of a finished run that was merged later."""
ENTRIES = (RESULTS, METRICS, SAMPLES, CONFIG, INPUTS, MODEL, ADAPTER, CHECKPOINTS, TENSORBOARD, ROUNDS, REPORT)
"""What a run leaves in its folder."""
_FREE_ON_RESUME = frozenset(
    {
        "resume",
        "accept_changes",
        "overwrite",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "report_to",
        "project",
        "run_name",
        "sample_steps",
        "num_sample_prompts",
        "sample_max_new_tokens",
        "sample_temperature",
        "merge",
        "cache_dir",
        "output_dir",
        "ddp_timeout",
        "max_tokens_per_batch",
    }
)
_WHERE = frozenset(
    {"base_url", "base_urls", "api_key_env", "max_concurrency", "requests_per_minute", "timeout_seconds", "max_retries"}
)
"""Of the section server: where the generator's servers are, and how they are asked."""
_FIXED = {
    "weights": "the model's weights or precision",
    "tokenizer": "its tokenizer, chat template or end tokens",
    "data": "the training groups",
    "eval_data": "the held-out groups",
}
"""Inputs that a run can't go on without, by their names in ``inputs.json``, and what messages call them."""


@contextlib.contextmanager
def claimed_run_folder(config: TrainConfig, *, verb: str, inputs: Inputs) -> Iterator[None]:
    """Make the folder and lock it for this process; an earlier run's files are examined and not yet touched.

    Args:
        config: of the training.
        verb: that runs.
        inputs: what the run reads, by the names of the fields.

    Raises:
        ValueError: another process runs in it, or :func:`ncalign.core.outputs.claim` refuses it.
        OSError: it can't be made, or written to.
    """
    folder = config.output_dir
    busy = f"another process is training in {folder}: wait for it, or choose another output_dir"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(folder, busy=busy))
        except OSError as error:
            raise explained(error, folder, left="Give another output_dir") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"output_dir {folder} may not be written to: change its permissions or give another one")
        claim(
            folder,
            ENTRIES,
            verb=verb,
            inputs=inputs,
            overwrite=config.overwrite and not config.resume,
            own=ENTRIES if config.resume else (),
            instead="--resume goes on with it, ",
        )
        yield


def open_run_folder(config: TrainConfig, written: dict[str, Any], inputs: Mapping[str, str], *, verb: str) -> None:
    """Remove an overwritten run, or a killed run's half-written files, and write inputs.json and config.yaml."""
    folder = config.output_dir
    if config.overwrite and not config.resume:
        remove(folder, ENTRIES)
    places = ("", f"{CHECKPOINTS}/", f"{ROUNDS}/", f"{ROUNDS}/*/")
    for stale in [path for place in places for path in folder.glob(f"{place}.*.tmp")]:
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    with recorded(folder, ENTRIES, verb=verb):
        # First: where there is a configuration, there is what the run began with.
        write_json_atomic(dict(inputs), folder / INPUTS)
        write_text_atomic(yaml.safe_dump(written, sort_keys=False), folder / CONFIG)


def finished_results(config: TrainConfig) -> dict[str, Any] | None:
    """The results of the run in the folder; None when it did not finish."""
    results = config.output_dir / RESULTS
    if not (results.is_file() and any((config.output_dir / name).is_dir() for name in (MODEL, ADAPTER))):
        return None
    remedy = "delete it, and --resume writes it again from the last checkpoint"
    loaded = read_kept(results, SAVED_RESULTS, remedy=remedy)
    return {**loaded}


def recorded_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration that the run to resume was begun with; empty where there is none."""
    path = config.output_dir / CONFIG
    if not (config.resume and path.is_file()):
        return {}
    return _read_config(path)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        written = bounded_yaml.load(bounded_yaml.read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"{path} can't be read: {reason}; the run can't be resumed: start it again with overwrite: true"
        ) from error
    if not isinstance(written, dict):
        raise ValueError(f"{path} is no configuration: the run can't be resumed; start it again with overwrite: true")
    return written


def refuse_changes(config: TrainConfig, now: dict[str, Any]) -> None:
    """Compare a run that is resumed with what its ``config.yaml`` says.

    Args:
        config: of the training.
        now: the run's whole configuration, in which nothing is left to be decided.

    Raises:
        ValueError: it was started with another configuration, and that is not accepted, or it is finished.
    """
    path = config.output_dir / CONFIG
    if not (config.resume and path.is_file()):
        return
    before = _read_config(path)
    changed = [
        f"  {name}: {before.get(name)!r} -> {now[name]!r}"
        for name in now
        if name not in _FREE_ON_RESUME and _settled(name, before.get(name)) != _settled(name, now[name])
    ]
    if not changed:
        return
    listing = f"the run in {path.parent} was started with another configuration:\n" + "\n".join(changed)
    if finished_results(config) is not None:
        raise ValueError(
            f"{listing}\nIt is finished, and they would change nothing: train on from {path.parent / MODEL} in another "
            "output_dir"
        )
    if not config.accept_changes:
        raise ValueError(f"{listing}\nResume it with its own, or set accept_changes: true to go on with this one")
    say(f"note: {listing}\nIt goes on with the new one")


def _settled(name: str, value: Any) -> Any:
    """A field's value without what a resumed run may change in it."""
    if name != "server" or not isinstance(value, dict):
        return value
    return {field: inner for field, inner in value.items() if field not in _WHERE}


def refuse_other_inputs(config: TrainConfig, now: Mapping[str, str]) -> None:
    """Compare what the inputs of a run that is resumed hold with what they held when it was begun, as ``inputs.json`` says.

    Args:
        config: of the training.
        now: a digest of what each input holds, by the input's name.

    Raises:
        ValueError: model or data hold something else; or another file does, and that is not accepted; or the record is gone.
    """
    folder = config.output_dir
    if not (config.resume and (folder / CONFIG).is_file()):
        return
    remedy = "it says what the run began with; restore it, or start again with overwrite: true"
    before = read_kept(folder / INPUTS, TypeAdapter(dict[str, str]), remedy=remedy)
    changed = {name: f"{before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]}
    if fixed := [what for name, what in _FIXED.items() if name in changed]:
        raise ValueError(
            f"the run in {folder} was begun with other inputs: {' and '.join(fixed)} changed since; restore them, or start "
            "again with overwrite: true"
        )
    if not changed:
        return
    listing = "\n".join(f"  {name}: {digests}" for name, digests in changed.items())
    listing = f"what the run in {folder} reads holds something else than when it was begun (digests):\n{listing}"
    if not config.accept_changes:
        raise ValueError(f"{listing}\nRestore it, or set accept_changes: true to go on with what it holds now")
    say(f"note: {listing}\nThe run goes on with what it holds now; what is done already stays as it is")


class MetricsFile:
    """``metrics.jsonl`` or ``samples.jsonl``: lines of a step, appended as it happens.

    Args:
        path: the file.
        keep_until: on resume, lines of later steps are dropped: they will be written again.
        num_steps: of the run; its last evaluation and samples come after its last checkpoint, and are written again too.

    Attributes:
        steps: of which there are lines.
    """

    def __init__(self, path: Path, *, keep_until: int, num_steps: int) -> None:
        kept, self.steps = [], set[int]()
        if keep_until and path.is_file():
            for row in read_log(path, key="step"):
                at_end = row["step"] == num_steps and bool({"eval/loss", "completion"} & row.keys())
                if row["step"] <= keep_until and not at_end:
                    kept.append(json.dumps(row) + "\n")
                    self.steps.add(row["step"])
        write_text_atomic("".join(kept), path)
        self._path = path

    def write(self, *rows: dict[str, Any]) -> None:
        """Append a line a row, all or none; NaN and infinities become null."""
        whole = self._path.stat().st_size
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(json_ready(row)) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that says these steps are logged
        except OSError as error:
            os.truncate(self._path, whole)
            raise explained(error, self._path, left="Earlier lines and the last checkpoint are kept") from error
        self.steps.update(row["step"] for row in rows)

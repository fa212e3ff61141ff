"""A run whose last files can't be written keeps what it learned: in a checkpoint, or in a folder on another disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from ncalign.core.cache import cache_folder, private_folder
from ncalign.training.checkpoint import checkpoint_folder, find_checkpoints


def kept_after(
    error: OSError,
    run_folder: Path,
    step: int,
    *,
    save_checkpoint: Callable[[], object],
    save_model: Callable[[Path], object] | None = None,
) -> OSError:
    """The error to raise, which says where the training is kept and how to go on.

    Args:
        error: what went wrong.
        run_folder: of the run.
        step: steps taken.
        save_checkpoint: writes a checkpoint of this step.
        save_model: writes the model to another folder, where training is over.
    """
    checkpoint, found = checkpoint_folder(run_folder, step), error.strerror or str(error)
    if checkpoint not in find_checkpoints(run_folder):
        try:
            save_checkpoint()
        except OSError as further:
            return OSError(error.errno, f"{found}. {_elsewhere(run_folder, save_model) or _lost(run_folder, further)}")
    rest = "only the model is left to write" if save_model is not None else "it goes on from there"
    return OSError(error.errno, f"{found}. The training up to step {step} is kept in {checkpoint}: rerun with --resume, {rest}")


def _elsewhere(run_folder: Path, save_model: Callable[[Path], object] | None) -> str:
    """Save the model in another place; a sentence that says where, or nothing where there is no such place."""
    for place in (cache_folder(), Path(tempfile.gettempdir())) if save_model is not None else ():
        target = place / f"ncalign-{run_folder.resolve().name}-model"
        if target.exists():
            continue
        try:
            assert save_model is not None
            private_folder(place)
            save_model(target)
        except OSError:
            continue
        return f"The trained model was saved in {target} instead: move it to where you want it"
    return ""


def _lost(run_folder: Path, further: OSError) -> str:
    last = find_checkpoints(run_folder)[-1:]
    if last:
        return f"{last[0]} is the last checkpoint: rerun with --resume to go on from there"
    return f"Nothing of the training could be kept ({further.strerror or further})"

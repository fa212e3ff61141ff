"""What comes before a loop's first step and after its last one: evaluation, samples, and the best evaluation's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ncalign.training.checkpoint import checkpoint_folder, find_checkpoints, load_weights
from ncalign.training.loop import Loop
from ncalign.training.peers import decided_by_first, say_first
from ncalign.training.saved import LoopState


def begun(loop: Loop) -> dict[str, float] | None:
    """Evaluate and sample before the first step; returns the evaluation, None where no groups are held out.

    Raises:
        ValueError: evaluations lack the metric that they are to be compared by.
    """
    row = loop.evaluate(0) if loop.eval_groups else None
    if loop.best is not None:
        assert row is not None
        loop.best.check(row)
    if loop.sample is not None:
        loop.sample(0)
    return row


def check_best(run_folder: Path, loop: Loop) -> None:
    """Have a run that goes on forget a best evaluation whose checkpoint is gone."""
    best = loop.best
    if best is None or not loop.keep_best or not best.step:
        return
    folder, accelerator = checkpoint_folder(run_folder, best.step), loop.engine.accelerator
    if not decided_by_first(accelerator, lambda: folder in find_checkpoints(run_folder)):
        say_first(accelerator, f"warning: {folder}, the best evaluation's, is gone: the best of those that follow is taken")
        best.forget()


def take_best(
    run_folder: Path, loop: Loop, after: dict[str, float], *, save: Callable[[int, LoopState], None]
) -> dict[str, float]:
    """Give the model the weights of the best evaluation, where these are wanted.

    A checkpoint of the last step is left, from which a run goes on whose model can't be written.

    Args:
        run_folder: of the run.
        loop: that has ended.
        after: the last evaluation.
        save: writes a checkpoint.

    Returns:
        The evaluation of the model as it is now.
    """
    best, accelerator = loop.best, loop.engine.accelerator
    if best is None or best.row is None or not loop.keep_best or best.step == loop.done:
        return after
    last, folder = checkpoint_folder(run_folder, loop.done), checkpoint_folder(run_folder, best.step)
    if not decided_by_first(accelerator, lambda: last in find_checkpoints(run_folder)):
        save(loop.done, loop.state())
    load_weights(folder, model=loop.engine.model, optimizer=loop.optimizer, accelerator=accelerator)
    say_first(accelerator, f"The model is that of step {best.step}, the best by {best.metric} ({best.value:.6g})")
    return best.row

"""Processes that train together: they decide alike, share the run folder and end together."""

from __future__ import annotations

import contextlib
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ncalign.core.progress import say

Decision = TypeVar("Decision")
Part = TypeVar("Part")

PATIENCE = 10.0
"""Seconds after which a file that another node wrote counts as not shared: network file systems may show it late."""

_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_SILENCE = "Timed out waiting"


def say_first(accelerator: Accelerator, text: str) -> None:
    """A line on stderr, of the first process alone."""
    if accelerator.is_main_process:
        say(text)


@contextlib.contextmanager
def another_process_named() -> Iterator[None]:
    """Report a failure caused by another process's end as such: that process's message holds the cause; or by its silence.

    Raises:
        ValueError: in place of the communication library's error.
    """
    try:
        yield
    except RuntimeError as error:
        if _SILENCE in str(error):
            raise ValueError(
                "another process of this run has not answered within ddp_timeout: it hangs, or has more to do, which a larger "
                "ddp_timeout allows"
            ) from error
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise ValueError("another process of this run has stopped; its own message says why") from error


def decided_by_first(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """What the first process decides, on all of them: disks of different nodes may differ, and the others would part ways.

    Args:
        accelerator: this process's.
        decide: called in the first process alone.

    Raises:
        ValueError: ``decide`` refuses; in every process.
        OSError: ``decide`` could not read or write something, likewise.
    """
    if accelerator.num_processes == 1:
        return decide()
    decided: list[Any] = [None, None]
    failure: ValueError | OSError | None = None
    if accelerator.is_main_process:
        try:
            decided[0] = decide()
        except (ValueError, OSError) as error:
            failure, decided[1] = error, str(error)
    broadcast_object_list(decided)
    if failure is not None:
        raise failure
    if decided[1] is not None:
        raise ValueError(decided[1])
    found: Decision = decided[0]
    return found


def own_share(accelerator: Accelerator, number: int) -> range:
    """The places, of ``number``, that this process works on: every process has some of them, and no two the same."""
    return range(accelerator.process_index, number, accelerator.num_processes)


def put_together(accelerator: Accelerator, own: Mapping[int, Part]) -> list[Part]:
    """What all processes found for their shares, in order; every process calls it.

    Args:
        accelerator: this process's.
        own: what this process found, by place.
    """
    found = {place: part for some in gather_object([dict(own)]) for place, part in some.items()}
    return [found[place] for place in range(len(found))]


def check_shared_folder(folder: Path, accelerator: Accelerator) -> None:
    """Refuse a run folder that is not the same one for all processes: each writes its part of a checkpoint there.

    Raises:
        ValueError: a process does not see what the first one writes.
    """
    if accelerator.num_processes == 1:
        return
    # open_run_folder removes what a kill leaves of such a name.
    name = f".shared-{uuid.uuid4().hex}.tmp"
    name = decided_by_first(accelerator, lambda: _left(folder / name))
    seen = gather_object([(accelerator.process_index, platform.node(), _appears(folder / name))])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / name).unlink(missing_ok=True)
    blind = [f"{index} (on {node})" for index, node, appeared in seen if not appeared]
    if blind:
        raise ValueError(
            f"output_dir {folder} is not the same folder for all processes: process {', '.join(blind)} does not see what "
            f"process 0 (on {seen[0][1]}) writes there. output_dir must be on a file system that all nodes share; where it is "
            "a relative path, start all processes in the same folder"
        )


def refuse_unlike_inputs(inputs: Mapping[str, str], accelerator: Accelerator) -> None:
    """Refuse a run whose processes read something else each: nodes may hold copies of model and data.

    Args:
        inputs: a digest of what each input holds, by the input's name.
        accelerator: this process's.

    Raises:
        ValueError: a process has another digest than the first one; in every process.
    """
    if accelerator.num_processes == 1:
        return
    found = gather_object([(accelerator.process_index, platform.node(), dict(inputs))])
    _, home, first = found[0]
    for index, node, other in found:
        unlike = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        if unlike:
            raise ValueError(
                f"process {index} (on {node}) reads something else than process 0 (on {home}): {', '.join(unlike)} differ; "
                "give all nodes the same files"
            )


def _left(file: Path) -> str:
    file.write_text(file.name, encoding="utf-8")
    return file.name


def _appears(file: Path) -> bool:
    until = time.monotonic() + PATIENCE
    while not file.is_file():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True

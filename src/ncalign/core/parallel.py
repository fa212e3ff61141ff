"""Work on many items in worker processes, in order, with a bounded number of them under way."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 64
"""Items handed to a worker at a time."""
ALONE = 8
"""Chunks that this process works on before it forks: small inputs never do."""
_AHEAD = 4
_LOOK_EVERY = 0.5
_SET_PDEATHSIG = 1

_function: Callable[[list[Any]], Any] | None = None


def num_workers() -> int:
    """Cores for each process of a run on this machine; 1, which means no workers, where processes can't be forked safely."""
    if sys.platform != "linux":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def map_chunks(
    function: Callable[[list[Item]], Result],
    items: Iterable[Item],
    *,
    workers: int,
    size: int = CHUNK,
    alone: int = ALONE,
) -> Iterator[Result]:
    """Apply a function to chunks of the items, in worker processes where there are many; results come in the items' order.

    Workers are forked: only items and results are sent, not the function and what it refers to. A few chunks are read ahead.
    Workers end with this process, however it ends.

    Args:
        function: of a list of items.
        items: read as results are asked for.
        workers: processes; 1 for none beside this one.
        size: items of a chunk.
        alone: chunks that this process works on before it forks.

    Raises:
        RuntimeError: a worker was killed, as systems do when memory runs out. What the function raises is raised here.
    """
    source = iter(items)
    chunks = iter(lambda: list(islice(source, size)), [])
    yield from map(function, chunks if workers == 1 else islice(chunks, alone))
    first = next(chunks, None)
    if first is None:
        return
    global _function
    _function = function
    forked = multiprocessing.get_context("fork")
    # The system takes a thread that ends for the parent's end; the main thread ends last.
    in_main = threading.current_thread() is threading.main_thread()
    pool = ProcessPoolExecutor(workers, mp_context=forked, initializer=begin_worker, initargs=(os.getpid(), in_main))
    under_way: deque[Future[Any]] = deque([pool.submit(_call, first)])
    try:
        while under_way:
            under_way.extend(pool.submit(_call, chunk) for chunk in islice(chunks, _AHEAD * workers - len(under_way)))
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process was killed, perhaps for want of memory") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _function = None


def begin_worker(parent: int, killed_with_it: bool) -> None:
    """In a worker: Ctrl-C is the parent's to handle, and tokenizers must not start threads of their own after a fork."""
    if killed_with_it and sys.platform == "linux":
        # At once, so that it writes nothing beside the parent's successor.
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before this was asked for
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed can't stop its workers, which would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os._exit(1)


def _call(items: list[Any]) -> Any:
    assert _function is not None
    return _function(items)

"""Work in worker processes gives what work in this process gives."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import group_row
from ncalign.core import parallel
from ncalign.core.locks import locked
from ncalign.core.parallel import ALONE, CHUNK, map_chunks
from ncalign.model.encoding import Encoder
from ncalign.objectives import NCA, build_method
from ncalign.training import data
from ncalign.training.data import load_groups

MANY = CHUNK * (ALONE + 20) + 5


def test_results_come_in_order_from_other_processes() -> None:
    found = list(map_chunks(lambda items: (os.getpid(), items), range(MANY), workers=3))
    assert [item for _, items in found for item in items] == list(range(MANY))
    assert {process for process, _ in found[:ALONE]} == {os.getpid()}
    assert os.getpid() not in {process for process, _ in found[ALONE:]}


def test_a_small_input_forks_nothing() -> None:
    assert {*map_chunks(lambda items: os.getpid(), range(ALONE * CHUNK), workers=4)} == {os.getpid()}


def test_items_are_not_read_far_ahead() -> None:
    read = []
    results = map_chunks(len, (read.append(item) or item for item in count()), workers=2)
    for _ in range(ALONE + 3):
        next(results)
    assert len(read) <= (ALONE + 3 + 4 * 2 + 1) * CHUNK
    results.close()


@pytest.mark.parametrize(
    ("act", "error"), [(lambda: int("x"), ValueError), (lambda: os.kill(os.getpid(), signal.SIGKILL), RuntimeError)]
)
def test_what_happens_in_a_worker_is_raised_here(act: Callable[[], object], error: type[Exception]) -> None:
    def work(items: list[int]) -> None:
        if items[0] >= ALONE * CHUNK:
            act()

    with pytest.raises(error, match=r"invalid literal|worker process was killed"):
        list(map_chunks(work, range(MANY), workers=2))


def test_encoding_is_the_same_in_workers(
    tiny_tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards: list[list[float | None]] = [[1.0, 0.0], [0.1, None, 0.4], [0.2], [0.3, 0.6, 1.0]]
    path = write_jsonl([group_row(index, rewards[index % 4]) for index in range(MANY)])
    found = []
    for workers in (1, 2):
        monkeypatch.setattr(data, "num_workers", lambda workers=workers: workers)
        encoder = Encoder(tiny_tokenizer, max_length=48)
        loaded = load_groups(path, encoder, method=build_method(NCA()), on_bad_row="skip")
        texts = [tiny_tokenizer.decode(group.completions[-1]) for group in loaded.groups]
        found.append((loaded.counts(), loaded.notice, [group.id for group in loaded.groups], texts, encoder.report))
    assert found[0] == found[1]
    assert found[0][0]["groups_left_out"] == {"only one candidate": MANY // 4}
    assert found[0][4].completions_truncated > 0


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_a_worker_whose_parent_is_gone_before_it_begins_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.threading, "Thread", Mock())  # it would end the worker too, a moment later
    for parent, code in ((os.getpid(), 0), (os.getpid() + 1, 1)):
        worker = multiprocessing.get_context("fork").Process(target=parallel.begin_worker, args=(parent, True))
        worker.start()
        worker.join()
        assert worker.exitcode == code


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_killed_while_it_encodes_a_run_leaves_no_worker_and_no_lock(tmp_path: Path) -> None:
    """Of a parent killed by kill -9 the workers end, and the run folder can be locked at once."""
    program = f"""
import os, sys, time
from pathlib import Path
from unittest.mock import Mock
from ncalign.core.parallel import map_chunks
from ncalign.core import parallel
from ncalign.core.locks import locked

def work(items):
    Path({str(tmp_path)!r}, str(os.getpid())).touch()
    time.sleep(0.2)

with locked(Path({str(tmp_path)!r}), busy='busy'):
    list(map_chunks(work, range(10**6), workers=2, size=1, alone=0))
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        workers = wait_for(lambda: [int(path.name) for path in tmp_path.iterdir()], lambda found: len(found) == 2)
    finally:
        parent.kill()
        parent.wait()
    with locked(tmp_path, busy="busy"):
        wait_for(lambda: [pid for pid in workers if is_running(pid)], lambda left: not left)


def wait_for(look: Callable[[], list[int]], enough: Callable[[list[int]], bool]) -> list[int]:
    end = time.monotonic() + 60
    while not enough(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False

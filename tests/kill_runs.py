"""Commands in processes that are forked from one which has imported everything: a run takes its own time, and can be killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PARENT = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch, peft, matplotlib.pyplot
import transformers.models.llama.modeling_llama
from ncalign.adjust import adjust
from ncalign.audit import audit
from ncalign.cli.app import main
from ncalign.data import shards
from ncalign.demo import demo, online_demo
from ncalign.generation import generate
from ncalign.judging import answer, evaluate
from ncalign.online import online
from ncalign.rewards import score
from ncalign.training import train
for name in sys.argv[1:]:
    __import__(name)

def run(words, log, variables):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    code = 99
    try:
        code = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    words, log, ranks, kill_after, victims, stop, begun = json.loads(line)
    start, running, codes, doomed = time.monotonic(), [], [], set()
    for rank, variables in enumerate(ranks):
        child = os.fork()
        if child == 0:
            run(words, log, variables)
        running.append(child)
        if victims is None or rank in victims:
            doomed.add(child)
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        if begun and os.path.exists(begun):
            kill_after, begun = kill_after + time.monotonic() - start, None
        # Who has not been waited for has its number still.
        if kill_after is not None and not begun and time.monotonic() - start >= kill_after:
            for child in doomed & set(running):
                # One that is stopped is there still, and says nothing, until the others have ended.
                os.kill(child, signal.SIGSTOP if stop and set(running) - doomed else signal.SIGKILL)
        time.sleep(0.002)
    print(json.dumps([codes, time.monotonic() - start]), flush=True)
"""


class Done(NamedTuple):
    """What became of a command: its processes' worst exit code, its seconds, and what it wrote."""

    code: int
    seconds: float
    said: str


class Commands:
    """Runs commands of `ncalign`; close it at the end.

    Args:
        log: a file for what they write.
        imports: modules that are imported beforehand.
    """

    def __init__(self, log: Path, *imports: str) -> None:
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NCALIGN_CACHE": str(log.parent / "cache")}
        command = [sys.executable, "-c", PARENT, *imports]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment, cwd=log.parent
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(
        self,
        words: list[str],
        *,
        kill_after: float | None = None,
        processes: int = 1,
        victims: list[int] | None = None,
        stop: bool = False,
        begun: Path | None = None,
    ) -> Done:
        """Run a command to its end, or kill its processes (some, by rank), but not their children, after some seconds.

        With ``stop`` they are stopped then, and killed when the others have ended. With ``begun`` the seconds count from when
        that path is there.
        """
        assert self._process.stdin is not None
        self._log.write_text("")
        ranks = [{}] if processes == 1 else _ranks(processes)
        self._process.stdin.write(
            json.dumps([words, str(self._log), ranks, kill_after, victims, stop, str(begun) if begun else None]) + "\n"
        )
        codes, seconds = json.loads(self._read())
        return Done(min(codes) if min(codes) < 0 else max(codes), seconds, self._log.read_text())

    def close(self) -> None:
        """End the process that commands are forked from."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _ranks(number: int) -> list[dict[str, str]]:
    """The variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]

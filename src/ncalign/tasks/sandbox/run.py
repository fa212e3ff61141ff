"""Running programs that a model wrote, in a process that reaches no network and writes no file outside its folder.

The process locks itself in before it reads the first line of the program (:mod:`ncalign.tasks.sandbox.child`):

- seccomp refuses sockets, new processes, signals to others and everything that administers the machine;
- Landlock, else a read-only mount namespace, refuses writes outside the folder, and Landlock reads outside Python's own files;
- user, network, mount and IPC namespaces are a second wall where the system allows them;
- limits bound CPU time, memory, file sizes and open files; the parent bounds wall time, threads, output and the folder.

It withstands programs that are wrong, use too much or attack the machine. It can't keep a program from deceiving the tests in
its own process, for instance with objects that claim to equal anything; a program that exits early is detected.
"""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import selectors
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from ncalign.core.progress import say

Status = Literal["completed", "error", "exited", "timeout", "limit", "killed"]

MINIMUM = "seccomp, and Landlock or read-only mounts"
"""Walls without which no program of a model is run, unless the user gives their word for it."""
MIN_MEMORY_BYTES = 128 << 20
"""Python alone takes much of this."""
_START_SECONDS = 60.0
_MAX_THREADS = 32
_MAX_ENTRIES = 2000
_MAX_MAPPINGS_BYTES = 1 << 20
"""Of their list: some ten thousand. Looking through more would leave a program long alone with the disk."""
_CHECK_SECONDS = 0.05
_WITHOUT: tuple[str, ...] = ()
"""Walls that are not put up: tests take some away, to see that the others stand alone."""
_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: ``completed``: it ran to its last line. ``error``: it raised. ``exited``: it exited before its end, with any
            code. ``timeout``: wall or CPU time ran out. ``limit``: it had too many threads or too much in its folder.
            ``killed``: a signal ended it, as a stack that overflows does.
        stdout: what it printed, up to the limit.
        stderr: the same of stderr, with the traceback of what it raised.
        truncated: whether some of either was discarded.
        seconds: wall time, from its first line.
        isolation: the means that confined it.
    """

    status: Status
    stdout: str
    stderr: str
    truncated: bool
    seconds: float
    isolation: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether it ran to its last line."""
        return self.status == "completed"


def run_sandboxed(
    code: str,
    *,
    timeout: float = 10.0,
    cpu_seconds: int | None = None,
    memory_bytes: int = 1 << 30,
    folder_bytes: int = 64 << 20,
    max_output_bytes: int = 1 << 16,
    folder: Path | None = None,
    allow_weak: bool = False,
) -> Outcome:
    """Run an untrusted Python program.

    Args:
        code: the program. Its working directory is a folder of its own; its stdin is empty and its environment is bare.
        timeout: seconds of wall time, from the program's first line.
        cpu_seconds: CPU time of all threads together; None for ``timeout`` rounded up.
        memory_bytes: address space, that of Python and its libraries included.
        folder_bytes: largest size of what it writes, in all and of one file.
        max_output_bytes: of stdout and of stderr each; the rest is discarded.
        folder: where it runs, existing and kept; None for a temporary folder that is deleted.
        allow_weak: run without the walls of `MINIMUM`, where network or outside writes are not refused, and say so once.

    Raises:
        ValueError: an argument is out of range, or this system lacks the walls of `MINIMUM` and ``allow_weak`` is off.
        RuntimeError: Python did not start.
    """
    if timeout <= 0 or (cpu_seconds is not None and cpu_seconds < 1):
        raise ValueError(f"timeout is {timeout} and cpu_seconds {cpu_seconds}: both must be positive")
    if memory_bytes < MIN_MEMORY_BYTES:
        raise ValueError(
            f"memory_bytes is {memory_bytes}: Python needs at least {MIN_MEMORY_BYTES} ({MIN_MEMORY_BYTES >> 20} MiB)"
        )
    _check_system(allow_weak)
    settings: dict[str, object] = {
        "cpu_seconds": cpu_seconds or int(-(-timeout // 1)),
        "memory_bytes": memory_bytes,
        "file_bytes": folder_bytes,
        "allow_weak": allow_weak,
        "parent": os.getpid(),
        "without": _WITHOUT,
    }
    with _folder(folder) as place:
        run = _Run(place, max_output_bytes)
        try:
            run.start(code, settings)
            run.watch(timeout, folder_bytes)
        finally:
            run.stop()
        return run.outcome(allow_weak)


def isolation(*, allow_weak: bool = False) -> tuple[str, ...]:
    """The means that confine programs on this system, determined by running an empty one.

    Raises:
        ValueError: nothing refuses network or outside writes on this system, and ``allow_weak`` is off.
    """
    return run_sandboxed("", timeout=60, allow_weak=allow_weak).isolation


def _check_system(allow_weak: bool) -> None:
    system: str = sys.platform
    if system == "linux" or (allow_weak and os.name == "posix"):
        return
    weak = (
        "" if os.name != "posix" else ", or give your word with --allow_weak, which lets them reach the network and your files"
    )
    raise ValueError(
        f"programs of a model are run only behind {MINIMUM}, which needs Linux, and this is {system}: use a Linux machine or "
        f"container{weak}"
    )


@functools.cache
def _say_weak(doors: tuple[str, ...]) -> None:
    say(f"Sandbox: this system does not refuse {', '.join(doors)} to the programs that are run (allow_weak)")


@functools.cache
def _say_missing(walls: tuple[str, ...]) -> None:
    say(f"Sandbox: this system has no {', '.join(walls)}; the other walls hold the programs that are run")


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder.resolve(strict=True)
        return
    temporary = Path(os.path.realpath(tempfile.mkdtemp(prefix="ncalign-sandbox-")))
    try:
        yield temporary
    finally:
        _delete(temporary)


def _delete(folder: Path) -> None:
    """Delete a folder of any depth, with folders in it that forbid it."""
    # What lies deeper is moved up first: paths stay short, and nothing is recursive.
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, stat.S_IRWXU)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, stat.S_IRWXU)
                os.rename(inner.path, folder / uuid.uuid4().hex)
            os.rmdir(entry.path)
    os.rmdir(folder)


@dataclass
class _Capture:
    """The first bytes of a stream."""

    room: int
    data: bytearray = field(default_factory=bytearray)
    truncated: bool = False

    def add(self, chunk: bytes) -> None:
        kept = chunk[: self.room - len(self.data)]
        self.data += kept
        self.truncated |= len(kept) < len(chunk)

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


class _Run:
    """One program: started, watched and stopped."""

    def __init__(self, folder: Path, output_bytes: int) -> None:
        self._folder = folder
        self._secret = secrets.token_hex(32).encode()
        self._stdout, self._stderr = _Capture(output_bytes), _Capture(output_bytes)
        self._report = _Capture(1 << 16)
        self._process: subprocess.Popen[bytes] | None = None
        self._report_file: IO[bytes] | None = None
        self._selector = selectors.DefaultSelector()
        self._stopped: Status | None = None
        self._began: float | None = None
        self._seconds = 0.0

    def start(self, code: str, settings: dict[str, object]) -> None:
        report_read, report_write = os.pipe()
        secret_read, secret_write = os.pipe()
        try:
            os.write(secret_write, self._secret)
            settings = {**settings, "folder": str(self._folder), "report": report_write, "secret": secret_read}
            with tempfile.TemporaryFile() as source:
                # A lone surrogate is no Python either; the program gets to say so.
                source.write(code.encode("utf-8", "replace"))
                source.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-B", "-X", "utf8", str(_CHILD), json.dumps(settings)],
                    stdin=source,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=self._folder,
                    env=_environment(self._folder),
                    pass_fds=(report_write, secret_read),
                    start_new_session=True,
                )
        finally:
            for descriptor in (report_write, secret_read, secret_write):
                os.close(descriptor)
            self._report_file = os.fdopen(report_read, "rb", buffering=0)
        files = (self._process.stdout, self._process.stderr, self._report_file)
        for file, capture in zip(files, (self._stdout, self._stderr, self._report), strict=True):
            assert file is not None
            os.set_blocking(file.fileno(), False)
            self._selector.register(file, selectors.EVENT_READ, capture)

    def watch(self, timeout: float, folder_bytes: int) -> None:
        """Keep what it prints until it ends or exceeds a limit."""
        assert self._process is not None
        deadline, next_check = time.monotonic() + _START_SECONDS, 0.0
        while self._selector.get_map():
            ready = self._selector.select(_CHECK_SECONDS)
            for key, _ in ready:
                self._take(key)
            now = time.monotonic()
            if self._began is None and b"\n" in self._report.data:
                self._began, deadline = now, now + timeout
            if now > deadline:
                self._stopped = "timeout"
                return
            if not ready and self._report.data.partition(b"\n")[2]:
                # It has ended; a process that it started, where that was not refused, keeps the pipes open.
                return
            # A check may take at most a tenth of the time between two checks.
            if self._began is not None and now > next_check:
                room = folder_bytes - _deleted_bytes(self._process.pid, self._folder)
                if room < 0 or _num_threads(self._process.pid) > _MAX_THREADS or _is_larger(self._folder, room):
                    self._stopped = "limit"
                    return
                next_check = time.monotonic() + max(_CHECK_SECONDS, 10 * (time.monotonic() - now))

    def _take(self, key: selectors.SelectorKey) -> None:
        with suppress(BlockingIOError):
            chunk = os.read(key.fd, 1 << 16)
            if chunk:
                key.data.add(chunk)
            else:
                self._selector.unregister(key.fileobj)

    def stop(self) -> None:
        """Kill the process and its group, and close everything."""
        if self._process is not None:
            # It has not been waited for, so the system can't have given its number to another process yet.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._seconds = 0.0 if self._began is None else time.monotonic() - self._began
            for file in (self._process.stdout, self._process.stderr):
                if file is not None:
                    file.close()
        if self._report_file is not None:
            self._report_file.close()
        self._selector.close()

    def outcome(self, allow_weak: bool) -> Outcome:
        assert self._process is not None
        first, newline, rest = bytes(self._report.data).partition(b"\n")
        if not newline:
            reason = self._stderr.text.strip() or f"it ended with {self._process.returncode}"
            raise RuntimeError(f"the sandbox did not start: {reason[-2000:]}")
        state = json.loads(first)
        doors = tuple(state["open"])
        missing = tuple(f"{name} ({reason})" for name, reason in state["absent"].items())
        if missing and not doors:
            _say_missing(missing)
        if doors:
            if not allow_weak:
                raise ValueError(
                    f"programs of a model are run only behind {MINIMUM}, and this system can't keep them from "
                    f"{' and '.join(doors)}: no {'; no '.join(missing)}. Use a kernel from 5.13 on that lets this user set up "
                    "Landlock and seccomp (a container's profile may forbid it), or give your word for what they do with "
                    "--allow_weak"
                )
            _say_weak(doors)
        return Outcome(
            status=self._status(rest),
            stdout=self._stdout.text,
            stderr=self._stderr.text,
            truncated=self._stdout.truncated or self._stderr.truncated,
            seconds=self._seconds,
            isolation=tuple(state["held"]),
        )

    def _status(self, word: bytes) -> Status:
        assert self._process is not None
        if secrets.compare_digest(word, self._secret[::-1]):
            return "completed"
        if self._stopped is not None:
            return self._stopped
        code = self._process.returncode
        if code == -signal.SIGXCPU:
            return "timeout"
        if code < 0:
            return "killed"
        return "error" if word == b"error" else "exited"


def _environment(folder: Path) -> dict[str, str]:
    """A bare environment: of this process's variables only what Python may need to start."""
    bare = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(folder), "TMPDIR": str(folder)}
    # Thread pools of numerical libraries reserve address space for each core.
    bare |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return bare | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _num_threads(process: int) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/task"))
    except OSError:
        # It has just ended, or there is no such folder on this system.
        return 0


def _deleted_bytes(process: int, folder: Path) -> float:
    """Size of the files that lie nowhere any more and that the process keeps, open or mapped into its memory.

    More mappings than are looked through are infinitely many.
    """
    held: dict[int, int] = {}
    mappings: bytes | None = None
    # Each thread is looked at: the first shows nothing once it has ended alone. All of it may end, or close them, while they
    # are looked at; and there is no such folder on other systems.
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError):
                for entry in os.scandir(f"/proc/{process}/task/{thread}/fd"):
                    with suppress(OSError):
                        found = entry.stat()
                        if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
                            held[found.st_ino] = found.st_blocks * 512
                mappings = mappings or _mappings(process, thread)
    lines = (mappings or b"").splitlines()
    for line in lines:
        if line.endswith(b" (deleted)"):
            addresses, _, _, _, inode, *path = line.split(maxsplit=5)
            if path and path[0].startswith(os.fsencode(folder) + b"/"):
                first, last = (int(address, 16) for address in addresses.split(b"-"))
                held[int(inode)] = max(held.get(int(inode), 0), last - first)
    return math.inf if len(mappings or b"") >= _MAX_MAPPINGS_BYTES else sum(held.values())


def _mappings(process: int, thread: str) -> bytes:
    with open(f"/proc/{process}/task/{thread}/maps", "rb") as file:
        return file.read(_MAX_MAPPINGS_BYTES)


def _is_larger(folder: Path, limit: float) -> bool:
    """Whether a folder holds more bytes than the limit, or more entries than are counted."""
    total = entries = 0
    pending = [os.fspath(folder)]
    while pending:
        try:
            with os.scandir(pending.pop()) as found:
                for entry in found:
                    entries += 1
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    if entries > _MAX_ENTRIES or total > limit:
                        return True
        except (FileNotFoundError, PermissionError):
            # Deleted meanwhile, or a folder that the program forbade itself to read.
            continue
        except OSError:
            # The path is too long, which no ordinary program's is.
            return True
    return False

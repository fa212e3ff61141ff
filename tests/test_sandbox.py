"""What a model's program can't do: each way out of the sandbox is tried."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncalign.tasks.sandbox import run as sandbox
from ncalign.tasks.sandbox.run import Outcome, isolation, run_sandboxed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


CLONE = 56 if platform.machine() == "x86_64" else 220


def run(code: str, **options: object) -> Outcome:
    return run_sandboxed(textwrap.dedent(code), **{"timeout": 10.0, **options})  # type: ignore[arg-type]


def living(marker: str) -> list[str]:
    """Processes whose command line holds the marker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if marker in line:
            found.append(line)
    return found


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sandboxes' folders are made: empty again after the test, with no process of theirs left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.glob("ncalign-sandbox-*"))
    assert not living(str(tmp_path))


@pytest.fixture(
    params=["all", *(pytest.param(f"without {wall}", marks=pytest.mark.slow) for wall in ("namespaces", "landlock"))]
)
def walls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sandbox as it is, and with one wall taken away."""
    name = request.param.removeprefix("without ")
    if name != "all":
        monkeypatch.setattr(sandbox, "_WITHOUT", (name,))
        try:
            isolation()
        except ValueError as error:
            pytest.skip(str(error))
    return str(request.param)


def test_a_program_runs_and_says_what_it_has_to_say(folders: Path) -> None:
    outcome = run("import sys; print('out'); print('err', file=sys.stderr); open('a', 'w').write('b'); print(open('a').read())")
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("completed", "out\nb\n", "err\n")
    assert outcome.passed
    assert not outcome.truncated
    assert "seccomp" in outcome.isolation


def test_libraries_dataclasses_threads_and_asyncio_work(folders: Path) -> None:
    outcome = run(
        """
        import asyncio, hashlib, json, pickle, threading
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: "int" = 1
        assert pickle.loads(pickle.dumps(Point())) == Point()
        found = []
        threads = [threading.Thread(target=found.append, args=(i,)) for i in range(4)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert sorted(found) == [0, 1, 2, 3]
        async def one(): return 1
        assert asyncio.run(one()) == 1
        if __name__ == "__main__": raise RuntimeError
        """
    )
    assert outcome.status == "completed", outcome.stderr


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("assert 1 == 2, 'no'", "error", "AssertionError: no"),
        ("def f(:", "error", "SyntaxError"),
        ("x = '\ud800'", "completed", ""),
        ("a\0b", "error", "null bytes"),
        ("input()", "error", "EOFError"),
        ("import sys; sys.exit(0)", "exited", ""),
        ("import sys; sys.exit('bad')", "exited", ""),
        ("import os; os._exit(0)", "exited", ""),
        ("raise SystemExit", "exited", ""),
        ("import os; os.abort()", "killed", ""),
        ("import ctypes; ctypes.string_at(0)", "killed", ""),
    ],
)
def test_only_the_last_line_counts_as_the_end(folders: Path, code: str, status: str, said: str) -> None:
    outcome = run(code)
    assert outcome.status == status
    assert said in outcome.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'completed')\n    except OSError: pass\nos._exit(0)",
        "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass",
        "print('completed'); import atexit, os; atexit.register(os._exit, 0); raise SystemExit(0)",
        "import os\ndata = b''\nfor fd in range(3, 64):\n    try: os.set_blocking(fd, False); data += os.read(fd, 64)\n"
        "    except OSError: pass\nfor fd in range(3, 64):\n    try: os.write(fd, data)\n    except OSError: pass\nos._exit(0)",
        "import os, threading; threading.Timer(0, os._exit, (0,)).start(); import time; time.sleep(5)",
    ],
)
def test_a_program_that_fakes_its_end_has_not_passed(folders: Path, code: str) -> None:
    assert not run(code + "\n").passed


def test_what_comes_after_a_word_on_every_descriptor_does_not_pass(folders: Path) -> None:
    # Even a program that then runs to its end: what it wrote is not the secret.
    code = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0' * 64)\n    except OSError: pass\n"
    assert not run(code).passed


# -- time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import signal\nfor n in {1, 2, 3, 6, 14, 15, 24}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import time; time.sleep(1000)",
        "x = 3 ** (10 ** 9)",
        "raise type('E', (Exception,), {'__str__': lambda self: self.__str__() if False else [1 for _ in iter(int, 1)]})",
    ],
)
def test_an_endless_program_is_stopped(folders: Path, code: str) -> None:
    assert run(code, timeout=0.7, cpu_seconds=5).status in ("timeout", "killed")


def test_cpu_time_is_bounded_on_its_own(folders: Path) -> None:
    assert run("while True: pass", timeout=30, cpu_seconds=1).status == "timeout"


# -- processes and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(100)",
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])",
        "import os; os.posix_spawn('/bin/sleep', ['sleep', '100'], {})",
        "import os; assert os.system('true') == 0",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
        "import ctypes; assert ctypes.CDLL(None).vfork() >= 0",
        f"import ctypes; assert ctypes.CDLL(None).syscall({CLONE}, 17, 0, 0, 0, 0) > 0",
    ],
)
def test_no_process_is_started(folders: Path, walls: str, code: str) -> None:
    assert not run(code, timeout=0.7).passed
    assert not living("time.sleep(100)")


@pytest.mark.parametrize("size", [0, 1 << 15])
def test_a_thread_bomb_is_stopped(folders: Path, size: int) -> None:
    code = f"""
    import threading, time
    threading.stack_size({size})
    while True:
        threading.Thread(target=time.sleep, args=(100,)).start()
    """
    assert run(code, timeout=20).status in ("limit", "error")


@pytest.mark.parametrize("target", ["os.getppid()", "-1", "0", "1", "-os.getppid()"])
def test_no_other_process_is_signalled(folders: Path, walls: str, target: str) -> None:
    outcome = run(f"import os, signal; os.kill({target}, signal.SIGTERM)")
    assert outcome.status == "error"
    assert "PermissionError" in outcome.stderr


def test_no_other_process_is_limited_or_looked_into(folders: Path, walls: str) -> None:
    code = """
    import os, resource
    parent = os.getppid()
    for attempt in (
        lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE, (3, 3)),
        lambda: open(f"/proc/{parent}/environ").read(),
        lambda: open(f"/proc/{parent}/mem", "rb"),
        lambda: os.sched_setaffinity(parent, {0}),
    ):
        try:
            attempt()
        except OSError:
            continue
        raise SystemExit(1)
    """
    assert run(code).passed


@pytest.mark.parametrize(
    "code",
    [
        # A file that would send signals to the parent.
        "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, 10, 9)",
        # The same asked in another way: FIOSETOWN, SIOCSPGRP, FIOASYNC.
        "import fcntl, os, socket, struct; fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', os.getppid()))",
        "import fcntl, os, socket, struct; fcntl.ioctl(socket.socketpair()[0], 0x8902, struct.pack('i', os.getppid()))",
        "import fcntl, os, socket, struct; fcntl.ioctl(socket.socketpair()[0], 0x5452, struct.pack('i', 1))",
        # Descriptors handed over; hiding from the parent, which looks at the files that it holds.
        "import array, socket; socket.socketpair()[0].sendmsg([b'x'], [(1, 1, array.array('i', [1]))])",
        "import ctypes; assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0",
        # Outliving the parent, becoming its tracer, asking a ring of the kernel to connect.
        "import ctypes; libc = ctypes.CDLL(None); assert libc.prctl(1, 0, 0, 0, 0) == 0",
        "import ctypes, os; libc = ctypes.CDLL(None); assert libc.ptrace(16, os.getppid(), 0, 0) == 0",
        "import ctypes; assert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) >= 0",
        "import ctypes; assert ctypes.CDLL(None).syscall(435, ctypes.create_string_buffer(88), 88) >= 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "import os; os.setuid(12345)",
    ],
)
def test_ways_around_are_closed(folders: Path, walls: str, code: str) -> None:
    assert run(code).status == "error"


# Other processes' memory and descriptors, keys, faults and files by handle; rings and watches that all share; mounts.
CALLS = {
    "process_vm_writev": (311, 271), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "keyctl": (250, 219),
    "add_key": (248, 217), "userfaultfd": (323, 282), "open_by_handle_at": (304, 265), "mq_open": (240, 180),
    "io_setup": (206, 0), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "syncfs": (306, 267),
    "open_tree": (428, 428), "bpf": (321, 280),
}  # fmt: skip


def test_no_call_reaches_what_processes_share(folders: Path, walls: str) -> None:
    column = 0 if platform.machine() == "x86_64" else 1
    code = f"""
    import ctypes, errno
    libc = ctypes.CDLL(None, use_errno=True)
    for name, number in { ({name: numbers[column] for name, numbers in CALLS.items()})!r}.items():
        result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
        print(*([name] if result != -1 or ctypes.get_errno() != errno.EPERM else []), end="")
    """
    outcome = run(code)
    assert (outcome.status, outcome.stdout) == ("completed", "")


@pytest.mark.parametrize(
    "code",
    [
        # A lease on a file outside: who opens it to write, such as an update, would wait. A watch of its folder. More than its
        # share of the pipes' memory, and socket buffers that no limit counts.
        "import fcntl, os; fcntl.fcntl(open(os.__file__), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
        "import fcntl, os; fcntl.fcntl(os.open(os.path.dirname(os.__file__), os.O_RDONLY), fcntl.F_NOTIFY, 2)",
        "import fcntl, os; fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
        "import socket; socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)",
        # TIPC's pairs of streams have addresses on other machines.
        "import socket; socket.socketpair(30, socket.SOCK_STREAM)",
        # Characters put into the terminal that ncalign was started from.
        "import fcntl; fcntl.ioctl(1, 0x5412, b'x')",
    ],
)
def test_nothing_outside_waits_is_watched_or_fed(folders: Path, walls: str, code: str) -> None:
    assert "PermissionError" in run(code).stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these calls are x86's")
@pytest.mark.parametrize(
    "machine_code",
    [
        "b814000000cd80c3",  # int 0x80: getpid of the 32-bit table
        "b827000040" + "0f05c3",  # syscall 0x40000027: getpid of the x32 table
    ],
)
def test_other_tables_of_system_calls_are_closed(folders: Path, machine_code: str) -> None:
    code = f"""
    import ctypes, mmap
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("{machine_code}"))
    call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    call()
    """
    assert run(code).status == "killed"


# -- memory, output, files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 24))",
        "import mmap; x = mmap.mmap(-1, 10 << 30)",
        "x = [0] * (10 << 27)",
    ],
)
def test_ten_gigabytes_are_not_to_be_had(folders: Path, code: str) -> None:
    outcome = run(code)
    assert outcome.status == "error"
    assert "MemoryError" in outcome.stderr or "Cannot allocate memory" in outcome.stderr


def test_memory_in_files_that_lie_nowhere_is_refused(folders: Path) -> None:
    assert "PermissionError" in run("import os; os.memfd_create('x')").stderr


def test_endless_output_is_cut_and_not_kept(folders: Path) -> None:
    outcome = run("while True: print('x' * 1000)", timeout=0.7, max_output_bytes=5000)
    assert outcome.status == "timeout"
    assert outcome.truncated
    assert len(outcome.stdout) == 5000


def test_much_output_does_not_stop_a_program(folders: Path) -> None:
    outcome = run("for _ in range(2000): print('x' * 1000)", max_output_bytes=100)
    assert (outcome.status, len(outcome.stdout), outcome.truncated) == ("completed", 100, True)


@pytest.mark.parametrize(
    "code",
    [
        "def f(): return f()\nf()",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()",
        "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)",
        "eval('(' * 10 ** 5 + ')' * 10 ** 5)",
        "print(10 ** 10 ** 7)",
    ],
)
def test_deep_recursion_and_huge_numbers_end(folders: Path, code: str) -> None:
    assert not run(code, timeout=2.0).passed


def test_the_disk_is_not_filled(folders: Path) -> None:
    one = run("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()", folder_bytes=8 << 20)
    assert one.status in ("error", "limit")
    many = "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(1 << 20))"
    assert run(many, folder_bytes=8 << 20).status == "limit"


@pytest.mark.parametrize(
    "code",
    [
        # Deleted and open; deleted, closed and mapped; made without a name.
        "kept = []\nfor _ in range(40):\n"
        "    kept.append(open('a', 'wb')); os.unlink('a'); kept[-1].write(bytes(1 << 20)); kept[-1].flush()\ntime.sleep(5)",
        "for name in 'ab':\n"
        "    f = open(name, 'w+b'); f.truncate(6 << 20); m = mmap.mmap(f.fileno(), 6 << 20); os.unlink(name); f.close()\n"
        "    for i in range(0, 6 << 20, 4096): m[i] = 1\n"
        "    kept = [m, *globals().get('kept', [])]\n"
        "time.sleep(5)",
        "for _ in range(40): os.write(os.open('.', os.O_TMPFILE | os.O_RDWR), bytes(1 << 20))\ntime.sleep(5)",
        "os.posix_fallocate(f := os.open('a', os.O_CREAT | os.O_RDWR), 0, 6 << 20); os.unlink('a')\n"
        "os.posix_fallocate(g := os.open('b', os.O_CREAT | os.O_RDWR), 0, 6 << 20); os.unlink('b'); time.sleep(5)",
    ],
)
def test_deleted_files_count(folders: Path, code: str) -> None:
    # Reserving space takes none where the file system has no such call; there each write would be one of the others.
    assert run(f"import mmap, os, time\n{code}", folder_bytes=8 << 20).status == "limit"


FILL = """
import ctypes, mmap, os, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def fill():
    kept = []
    for _ in range(40):
        kept.append(open('a', 'wb')); os.unlink('a'); kept[-1].write(bytes(1 << 20)); kept[-1].flush()
    time.sleep(5)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the call has this number there")
def test_deleted_files_count_when_the_first_thread_has_ended(folders: Path) -> None:
    # What a first thread that has ended holds is no longer shown; the others hold it still.
    assert run(f"{FILL}threading.Thread(target=fill).start(); libc.syscall(60, 0)", folder_bytes=8 << 20).status == "limit"


def test_no_thread_has_descriptors_of_its_own(folders: Path, walls: str) -> None:
    # CLONE_VM | CLONE_SIGHAND | CLONE_THREAD without CLONE_FILES.
    code = f"{FILL}r = libc.syscall({CLONE}, 0x10900, 0, 0, 0, 0); e = ctypes.get_errno(); print(r, e)"
    assert run(code).stdout == "-1 1\n"


def test_mappings_that_are_slow_to_look_through_are_a_limit(folders: Path) -> None:
    # Every second page is protected otherwise than its neighbours: sixty thousand mappings.
    code = f"""{FILL}
pages = mmap.mmap(-1, 120000 * 4096)
first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
for page in range(0, 120000, 2): libc.mprotect(ctypes.c_void_p(first + page * 4096), 4096, 1)
time.sleep(5)
"""
    assert run(code).status == "limit"


def test_holes_in_files_and_second_names_are_counted_as_the_disk_does(folders: Path) -> None:
    code = "import os; f = open('a', 'wb'); f.truncate(60 << 20); f.close(); [os.link('a', str(i)) for i in range(100)]"
    assert run(f"{code}; import time; time.sleep(0.2)", folder_bytes=64 << 20).passed
    assert run("i = 0\nwhile True:\n    i += 1; open(str(i), 'w').close()", folder_bytes=8 << 20).status == "limit"


@pytest.mark.parametrize(
    "code",
    [
        "os.mkdir('d', 0o300)",
        "os.mkdir('d', 0o300, dir_fd=os.open('.', os.O_RDONLY))",
        "os.umask(0o400); os.mkdir('d')",
        "os.mkdir('d'); os.chmod('d', 0o300)",
    ],
)
def test_no_folder_hides_what_it_holds(folders: Path, code: str) -> None:
    # umask has no errors of its own, of which Python would know.
    assert "PermissionError" in (said := run(f"import os\n{code}").stderr) or "OSError: [Errno 0]" in said


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')",
        "import os\nos.makedirs('a/b/c'); os.mkdir('a/closed', 0o400); open('a/b/f', 'w'); os.symlink('/etc', 'a/b/link')",
    ],
)
def test_folders_of_any_shape_are_deleted(folders: Path, code: str) -> None:
    # The fixture looks whether they are.
    assert run(code).status in ("completed", "limit", "error")


def outside_writes(target: Path) -> list[str]:
    path = str(target)
    return [
        f"open({path!r}, 'w').write('overwritten')",
        f"open({path!r}, 'a').write('overwritten')",
        f"open({path!r}, 'r+').write('overwritten')",
        f"import os; os.truncate({path!r}, 0)",
        f"import os; os.remove({path!r})",
        f"import os; os.rename({path!r}, 'mine')",
        f"import os; os.link({path!r}, 'mine'); open('mine', 'w').write('overwritten')",
        f"import os; os.symlink({path!r}, 'link'); open('link', 'w').write('overwritten')",
        f"import os; os.chmod({path!r}, 0)",
        f"import os; os.utime({path!r}, (0, 0))",
        f"import os; os.setxattr({path!r}, 'user.x', b'1')",
        f"import os; open('mine', 'w').write('x'); os.replace('mine', {path!r})",
        f"open({str(target.parent / 'new')!r}, 'w')",
        f"import os; os.mkdir({str(target.parent / 'new')!r})",
        f"import os; os.mkfifo({str(target.parent / 'new')!r})",
        f"import os; os.symlink('x', {str(target.parent / 'new')!r})",
        "open('../new', 'w')",
        f"import os; os.chdir({str(target.parent)!r}); open('new', 'w')",
        "import os; open(os.path.expanduser('~root/new'), 'w')",
        f"import os; os.remove({str(Path(sandbox.__file__))!r})",
        "open('/tmp/ncalign-new', 'w')",
        "open('/dev/shm/ncalign-new', 'w')",
        "open('/proc/self/oom_score_adj', 'w').write('0')",
        "import os; os.chroot('.')",
        "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0",
    ]


@pytest.mark.parametrize("number", range(len(outside_writes(Path("x")))))
def test_nothing_is_written_outside(folders: Path, walls: str, number: int) -> None:
    target = folders / "precious"
    target.write_text("as it was")
    before = (target.stat().st_mode, target.stat().st_mtime_ns)
    outcome = run(outside_writes(target)[number])
    assert outcome.status == "error", outcome
    assert target.read_text() == "as it was"
    assert (target.stat().st_mode, target.stat().st_mtime_ns) == before
    assert {path.name for path in folders.iterdir()} == {"precious"}
    assert not Path("/tmp/ncalign-new").exists()
    assert Path(sandbox.__file__).exists()


def test_a_folder_of_ones_own_is_kept(tmp_path: Path) -> None:
    assert run("open('made', 'w').write('kept')", folder=tmp_path).passed
    assert (tmp_path / "made").read_text() == "kept"


# -- network ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[tuple[int, list[object]]]:
    """A TCP server and what came to it."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        ended = threading.Event()

        def accept() -> None:
            while not ended.is_set():
                try:
                    connection, address = server.accept()
                except TimeoutError:
                    continue
                connection.close()
                came.append(address)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], came
        finally:
            time.sleep(0.1)
            ended.set()
            thread.join()


def test_the_server_of_the_next_test_can_be_reached(listening: tuple[int, list[object]]) -> None:
    port, came = listening
    socket.create_connection(("127.0.0.1", port)).close()
    while not came:
        time.sleep(0.01)


def test_no_tcp_connection_is_made(folders: Path, walls: str, listening: tuple[int, list[object]]) -> None:
    port, came = listening
    outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)")
    time.sleep(0.1)
    assert outcome.status == "error"
    assert came == []


def test_no_datagram_is_sent(folders: Path, walls: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        address = server.getsockname()
        outcome = run(f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {address!r})")
        assert outcome.status == "error"
        with pytest.raises(TimeoutError):
            server.recv(1)


@pytest.mark.parametrize("abstract", [False, True])
def test_no_unix_socket_is_reached(folders: Path, walls: str, tmp_path: Path, abstract: bool) -> None:
    name = "\0ncalign-sandbox-test" if abstract else str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(name)
        server.listen()
        server.settimeout(0.2)
        outcome = run(f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})")
        assert outcome.status == "error"
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_SEQPACKET", "SOCK_RAW"])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_pair_of_sockets_sends_to_nobody_else(folders: Path, walls: str, tmp_path: Path, abstract: bool, kind: str) -> None:
    name = "\0ncalign-sandbox-pair" if abstract else str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(name)
        server.setblocking(False)
        code = f"import socket; socket.socketpair(socket.AF_UNIX, socket.{kind})[0].sendto(b'x', {name!r})"
        assert "PermissionError" in run(code).stderr
        assert run(f"import socket; socket.socketpair()[0].sendto(b'x', {name!r})").status == "error"
        with pytest.raises(BlockingIOError):
            server.recv(1)


@pytest.mark.parametrize("family", ["AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"])
def test_no_socket_of_any_family_is_made(folders: Path, family: str) -> None:
    outcome = run(f"import socket; socket.socket(socket.{family}, socket.SOCK_RAW)")
    assert "PermissionError" in outcome.stderr


# -- secrets ------------------------------------------------------------------------------------------------------------


def test_the_environment_is_bare(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "swordfish")
    outcome = run("import os; print(dict(os.environ))")
    assert outcome.passed
    assert "swordfish" not in outcome.stdout
    assert "SECRET_TOKEN" not in outcome.stdout


def test_files_of_ones_own_are_not_read(folders: Path) -> None:
    if not any(name.startswith("landlock") for name in isolation()):
        pytest.skip("this system has no Landlock")
    (folders / "key").write_text("swordfish")
    outcome = run(f"print(open({str(folders / 'key')!r}).read())")
    assert outcome.status == "error"
    assert "swordfish" not in outcome.stdout


# -- where it can't be held ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "door"),
    [
        (("seccomp",), "network"),
        (("landlock", "namespaces"), "writes outside its folder"),
        (("landlock", "read-only mounts"), "writes"),
    ],
)
def test_a_system_that_can_not_hold_it_is_refused(
    folders: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...], door: str
) -> None:
    monkeypatch.setattr(sandbox, "_WITHOUT", without)
    with pytest.raises(ValueError, match=door) as raised:
        run(f"open({str(folders / 'ran')!r}, 'w')")
    assert not (folders / "ran").exists()
    assert without[0] in str(raised.value)
    assert f"only behind {sandbox.MINIMUM}" in str(raised.value)
    assert "--allow_weak" in str(raised.value)


def test_allow_weak_goes_on_and_says_so_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "_WITHOUT", ("landlock", "namespaces"))
    sandbox._say_weak.cache_clear()
    for _ in range(2):
        assert run("print('ran')", allow_weak=True).stdout == "ran\n"
    assert capsys.readouterr().err.count("writes outside its folder") == 1


def test_walls_that_are_missing_are_told_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "_WITHOUT", ("landlock",))
    sandbox._say_missing.cache_clear()
    for _ in range(2):
        run("")
    assert capsys.readouterr().err.count("Sandbox: this system has no landlock (left out)") == 1


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(ValueError, match=f"needs Linux, and this is {system}"):
        run_sandboxed("print()")


@pytest.mark.parametrize(("option", "value"), [("timeout", 0), ("cpu_seconds", 0), ("memory_bytes", 1 << 20)])
def test_limits_out_of_range_are_refused(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=option):
        run("", **{option: value})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("without", [(), ("namespaces",)])
def test_an_ordinary_user_is_held_as_well(monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]) -> None:
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}

    def everybodys(python: str) -> bool:
        with contextlib.suppress(OSError):
            return subprocess.run([python, "-c", ""], **nobody, cwd="/", env={}).returncode == 0  # type: ignore[call-overload]
        return False

    python = next(filter(everybodys, (sys.executable, "/usr/bin/python3")), None)
    if python is None:
        pytest.skip("no Python here can be read by everybody")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        child = shutil.copy(sandbox._CHILD, place)
        (place / "run").mkdir()
        shutil.chown(place / "run", 65534, 65534)
        monkeypatch.setattr(sandbox, "_CHILD", child)
        monkeypatch.setattr(sandbox, "_WITHOUT", without)
        monkeypatch.setattr(sys, "executable", python)
        monkeypatch.setattr(subprocess, "Popen", functools.partial(subprocess.Popen, **nobody))
        assert run("import os; print(os.getuid())", folder=place / "run").stdout == "65534\n"
        for code in (
            "import os; os.fork()",
            f"open({str(place / 'x')!r}, 'w')",
            "open('/var/tmp/ncalign-new', 'w')",
            "import socket; socket.socket()",
            "import os; os.kill(os.getppid(), 0)",
            "x = bytearray(10 << 30)",
        ):
            assert run(code, folder=place / "run").status == "error", code
        assert run("import os; os.mkdir('closed', 0o400); os.makedirs('a/b')", folder=place / "run").passed

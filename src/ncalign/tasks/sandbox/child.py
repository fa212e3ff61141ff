"""Run by :mod:`ncalign.tasks.sandbox.run` in a process of its own: confines itself, then runs the program it was given.

A script of the standard library alone: ``python -I child.py SETTINGS``, the program on stdin. It is not imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# Numbers on x86_64 and on aarch64; -1 where there is no such call.
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_DENIED = {
    # Network. Pairs of streams that are joined to each other reach nobody, and asyncio needs them.
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
    # They hand open files over.
    "sendmsg": (46, 211), "sendmmsg": (307, 269),
    # io_uring does all of the above, and opens files, past this filter.
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # Processes: none is started, so that none is left.
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1),
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "setpriority": (141, 140), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # Mounts and namespaces.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # Changes to files that Landlock does not see.
    "truncate": (76, 45), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "lchown": (94, -1), "fchown": (93, 55), "fchownat": (260, 54), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
    "utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # What outlives a process, and memory outside its limit.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semtimedop": (220, 192), "semctl": (66, 191), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # What all processes of a user, or of the machine, share: rings, watches (also of files outside), what is not on disk yet.
    "io_setup": (206, 0), "inotify_init": (253, -1), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "sync": (162, 81),
    "syncfs": (306, 267),
    # The machine.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "syslog": (103, 116), "quotactl": (179, 60), "acct": (163, 89), "vhangup": (153, 58),
    "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1),
}  # fmt: skip
_CLONE, _CLONE3, _KILL = (56, 220), (435, 435), {"kill": (62, 129), "tgkill": (234, 131)}
_TKILL, _PRCTL, _FCNTL, _PRLIMIT, _IOCTL = (200, 130), (157, 167), (72, 25), (302, 261), (16, 29)
_SOCKETPAIR, _SETSOCKOPT, _MKDIR, _MKDIRAT, _UMASK = (53, 199), (54, 208), (83, -1), (258, 34), (95, 166)
# A pair of datagram sockets sends to any address; SOCK_STREAM alone, and with SOCK_CLOEXEC, SOCK_NONBLOCK or both, does not.
_STREAMS = (0x1, 0x80001, 0x801, 0x80801)
# Of the families that make pairs, TIPC's reach other machines.
_AF_UNIX = 1
# SO_SNDBUF, SO_RCVBUF and their forced twins: memory that no limit of the process counts.
_BUFFERS = (7, 8, 32, 33)
# What Python asks of descriptors: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Others make a file signal somebody.
_ASKED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_OWNER_READS = 0o400
# A thread with descriptors of its own (no CLONE_FILES) would have as many again, and files that the parent does not find.
_CLONE_FILES, _CLONE_THREAD = 0x400, 0x10000
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 1, 4, 38, 22, 2
# F_SETOWN, F_SETSIG, F_SETOWN_EX: a file that sends signals to another process. F_SETLEASE, F_NOTIFY: others wait for a file
# outside, or are watched. F_SETPIPE_SZ: memory of which all processes of a user have one share.
_NOT_ASKED = (8, 10, 15, 1024, 1026, 1031)

# classic BPF: load a word of seccomp_data, jump on it, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_NUMBER, _ARCH = 0, 4

_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000 | 0x08000000 | 0x04000000  # user, net, mount, IPC, UTS
_NEWUSER = 0x10000000


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def _syscall(number: int, *arguments: Any) -> int:
    """The raw system call; OSError where it fails."""
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise _failed(f"system call {number}")
    return result


def _prctl(option: int, value: int, pointer: ctypes.c_char_p | None = None) -> None:
    rest = (ctypes.c_ulong(0),) * (3 if pointer is None else 2)
    arguments = () if pointer is None else (pointer,)
    if _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), *arguments, *rest) != 0:
        raise _failed(f"prctl {option}")


# -- seccomp ------------------------------------------------------------------------------------------------------------


def _argument(index: int) -> int:
    """Where the low half of an argument lies in seccomp_data; both architectures are little-endian."""
    return 16 + 8 * index


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _refuse(number: int, answer: int = _EPERM) -> Iterator[bytes]:
    yield _instruction(_EQUAL, number, 0, 1)
    yield _instruction(_RETURN, answer)


def _only_for(number: int, index: int, values: tuple[int, ...], *, allowed: bool) -> Iterator[bytes]:
    """Refuse a call without one of these values in an argument, or with one of them; other rules may refuse it as well."""
    yield _instruction(_EQUAL, number, 0, len(values) + 3)
    yield _instruction(_LOAD, _argument(index))
    for rest, value in zip(reversed(range(len(values))), values, strict=True):
        # Past the refusal, or to it; the last value decides both ways.
        yield _instruction(_EQUAL, value, rest + 1, 0) if allowed else _instruction(_EQUAL, value, rest, int(not rest))
    yield _instruction(_RETURN, _EPERM)
    yield _instruction(_LOAD, _NUMBER)


def _only_bits(number: int, index: int, bit: int, *, wanted: bool) -> list[bytes]:
    """Refuse a call where an argument lacks the bit, or where it has it; other rules may refuse it as well."""
    return [
        _instruction(_EQUAL, number, 0, 4),
        _instruction(_LOAD, _argument(index)),
        _instruction(_ANY_BIT, bit, int(wanted), int(not wanted)),
        _instruction(_RETURN, _EPERM),
        _instruction(_LOAD, _NUMBER),
    ]


def _filter() -> bytes:
    """The program that decides about each system call.

    Raises:
        OSError: the numbers of this architecture's calls are not known here.
    """
    if platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(0, f"no list of system calls for {platform.machine()}")
    column, audit = _ARCHITECTURES[platform.machine()]
    me = os.getpid()
    program = [_instruction(_LOAD, _ARCH), _instruction(_EQUAL, audit, 1, 0), _instruction(_RETURN, _KILL_PROCESS)]
    program.append(_instruction(_LOAD, _NUMBER))
    if column == 0:
        # The x32 calls have numbers of their own.
        program += [_instruction(_AT_LEAST, 0x40000000, 0, 1), _instruction(_RETURN, _KILL_PROCESS)]
    for numbers in _DENIED.values():
        if numbers[column] >= 0:
            program += _refuse(numbers[column])
    # Threads stay; glibc asks clone3 first, whose flags can't be read here, and takes clone where there is none.
    program += _refuse(_CLONE3[column], _ENOSYS)
    for bit in (_CLONE_THREAD, _CLONE_FILES):
        program += _only_bits(_CLONE[column], 0, bit, wanted=True)
    # A folder that its owner can't read could not be measured.
    for call, index in ((_MKDIR, 1), (_MKDIRAT, 2)):
        program += _only_bits(call[column], index, _OWNER_READS, wanted=True) if call[column] >= 0 else []
    program += _only_bits(_UMASK[column], 0, _OWNER_READS, wanted=False)
    program += _only_for(_SOCKETPAIR[column], 0, (_AF_UNIX,), allowed=True)
    program += _only_for(_SOCKETPAIR[column], 1, _STREAMS, allowed=True)
    program += _only_for(_SETSOCKOPT[column], 2, _BUFFERS, allowed=False)
    program += _only_for(_IOCTL[column], 1, _ASKED, allowed=True)
    for call in _KILL.values():
        program += _only_for(call[column], 0, (me,), allowed=True)
    program += _only_for(_PRLIMIT[column], 0, (0, me), allowed=True)
    # The parent looks at the files that it holds, which a process that is not dumpable hides.
    program += _only_for(_PRCTL[column], 0, (_SET_PDEATHSIG, _SET_DUMPABLE), allowed=False)
    program += _only_for(_FCNTL[column], 1, _NOT_ASKED, allowed=False)
    program += _refuse(_TKILL[column])
    program.append(_instruction(_RETURN, _ALLOW))
    return b"".join(program)


def _install_filter() -> None:
    """Refuse network, processes, signals to others and administration, for good."""
    program = _filter()
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.c_char_p(header))


# -- Landlock -----------------------------------------------------------------------------------------------------------

_READ_FILE, _READ_DIR, _WRITE_FILE, _DEVICE_IOCTL = 1 << 2, 1 << 3, 1 << 1, 1 << 15
_EXECUTE = 1 << 0


def _restrict_files(folder: str, readable: list[str]) -> int:
    """Writes below the folder alone, reads there and below ``readable``; TCP and signals to others where the kernel can.

    Returns:
        the version of the kernel's interface.
    """
    version = _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    rules = struct.pack("=QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _syscall(444, ctypes.c_char_p(rules), ctypes.c_size_t(size), ctypes.c_uint(0))
    try:
        _allow(ruleset, folder, files & ~_EXECUTE)
        _allow(ruleset, "/dev/null", _READ_FILE | _WRITE_FILE)
        for path in readable:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _allow(ruleset, path, _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0))
        _syscall(446, ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", access, descriptor)
        _syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.c_char_p(rule), ctypes.c_uint(0))
    finally:
        os.close(descriptor)


def _readable() -> list[str]:
    """Where Python and its libraries lie, and the little of the system that they look at."""
    system = ["/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/dev/zero", "/dev/urandom"]
    system += ["/dev/random", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"]
    own = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, *sys.path]
    return [path for path in dict.fromkeys(system + [os.path.realpath(path) for path in own if path]) if path != "/"]


# -- namespaces ---------------------------------------------------------------------------------------------------------


def _enter_namespaces() -> None:
    """Give this process a network without interfaces, and its own mounts and IPC."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NAMESPACES) != 0:
        # Where user namespaces are forbidden, root can do without one.
        if _libc.unshare(_NAMESPACES & ~_NEWUSER) != 0:
            raise _failed("unshare")
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _mount_read_only(folder: str) -> None:
    """Everything read-only but the folder, in this mount namespace."""
    here = os.fsencode(folder)
    for source, target, flags in ((b"none", b"/", 0x4000 | 0x40000), (here, here, 0x1000)):  # private; bind
        if _libc.mount(source, target, None, ctypes.c_ulong(flags), None) != 0:
            raise _failed("mount")
    for path, flags, setting, clearing in ((b"/", 0x8000, 1, 0), (here, 0, 0, 1)):
        attributes = struct.pack("=QQQQ", setting, clearing, 0, 0)
        _syscall(
            442,
            ctypes.c_int(-100),
            ctypes.c_char_p(path),
            ctypes.c_uint(flags),
            ctypes.c_char_p(attributes),
            ctypes.c_size_t(len(attributes)),
        )


# -- all of it ----------------------------------------------------------------------------------------------------------


def _drop_capabilities() -> None:
    header, none = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6)
    if _libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(none)) != 0:
        raise _failed("capset")


def _limit(settings: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: (settings["cpu_seconds"], settings["cpu_seconds"] + 1),
        resource.RLIMIT_FSIZE: (settings["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_AS: (settings["memory_bytes"],) * 2,
    }
    for kind, (soft, hard) in limits.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        try:
            resource.setrlimit(kind, (soft, hard))
        except ValueError:
            # macOS knows RLIMIT_AS and does not take it.
            if sys.platform == "linux":
                raise


def _isolate(settings: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Confine this process by every means that the system offers.

    Returns:
        the means in force, and for each that is not the reason.
    """
    held: list[str] = []
    absent: dict[str, str] = {}
    if sys.platform != "linux":
        _limit(settings)
        return held, {"seccomp": f"there is none on {sys.platform}", "landlock": f"there is none on {sys.platform}"}
    folder = settings["folder"]

    def put_up(name: str, wall: Callable[[], object]) -> None:
        try:
            if name in settings["without"]:
                raise OSError("left out")
            version = wall()
        except OSError as error:
            absent[name] = str(error)
        else:
            held.append(name if version is None else f"{name} {version}")

    put_up("namespaces", _enter_namespaces)
    if held:
        put_up("read-only mounts", lambda: _mount_read_only(folder))
    # The old working directory is below the mount that was laid over it.
    os.chdir(folder)
    _limit(settings)
    _prctl(_SET_NO_NEW_PRIVS, 1)
    put_up("landlock", lambda: _restrict_files(folder, _readable()))
    _drop_capabilities()
    put_up("seccomp", _install_filter)
    return held, absent


def _open_doors(settings: dict[str, Any], held: list[str]) -> list[str]:
    """What the program could still reach, found by trying."""
    doors = [] if "seccomp" in held else ["network", "processes"]
    outside = os.path.join(os.path.dirname(settings["folder"]), os.path.basename(settings["folder"]) + ".outside")
    try:
        os.mkdir(outside)
    except OSError:
        pass
    else:
        os.rmdir(outside)
        doors.append("writes outside its folder")
    # A folder that nobody may write to proves nothing.
    if "writes outside its folder" not in doors and not any(name.startswith(("landlock", "read-only")) for name in held):
        doors.append("writes outside its folder")
    return doors


def _run(source: bytes, report: int, secret: int) -> NoReturn:
    """Run the program; the secret is read, and shown, only once it has come to its end."""
    read, write, leave, flush = os.read, os.write, os._exit, (sys.stdout.flush, sys.stderr.flush)
    # Dataclasses and pickle look a class's module up by its name.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
        # Reversed, so that copying bytes from one descriptor to another is not enough.
        word = read(secret, 64)[::-1]
    except SystemExit:
        word = b"exited"
    except BaseException:  # whatever the program raised, which ends here
        word = b"error"
        with contextlib.suppress(BaseException):
            traceback.print_exc(limit=-8)
    for each in flush:
        with contextlib.suppress(BaseException):
            each()
    write(report, word)
    # Threads and exit handlers of the program are not waited for.
    leave(0)


def main() -> NoReturn:
    """Confine this process, report how, and run the program."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    report, secret = settings["report"], settings["secret"]
    if sys.platform == "linux":
        _prctl(_SET_PDEATHSIG, 9)
        if os.getppid() != settings["parent"]:
            os._exit(1)
    source = sys.stdin.buffer.read()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    held, absent = _isolate(settings)
    doors = _open_doors(settings, held)
    os.write(report, json.dumps({"held": held, "absent": absent, "open": doors}).encode() + b"\n")
    if doors and not settings["allow_weak"]:
        os._exit(1)
    _run(source, report, secret)


if __name__ == "__main__":
    main()

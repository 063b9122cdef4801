"""
What the Linux kernel takes from a process before it runs a program: used in the interpreters of `code_judge`, which
import nothing but the standard library.

`confine` is for a fresh process with one thread. It forks: a supervisor stays behind, which ends the process and, with
a PID namespace, every process that it started. Each of LAYERS needs something of the kernel and works alone; the
limits, and giving up all capabilities, need nothing.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from contextlib import suppress
from typing import Any

# A process of its own user, PID, network and IPC namespaces, all mounts read-only, and a small file system in memory
# in place of its folder; Landlock (files read and written by list, Linux 6.2); seccomp (system calls refused by list).
LAYERS = ("namespaces", "landlock", "seccomp")
LARGEST_FILE = 2**24
_FOLDER_SIZE, _FOLDER_FILES = 2**26, 4096

_READABLE = (
    *("/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime"),
    *("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/dev/zero", "/dev/random", "/dev/urandom"),
)

# Numbers of system calls: x86_64, aarch64 (None where it has no such call). From 424 on they are the same everywhere.
_SYSTEM_CALLS: dict[str, tuple[int | None, int | None]] = {
    # other processes, programs, and their memory
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281)},
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438)},
    # network, and what outlives a process
    **{"socket": (41, 198), "socketpair": (53, 199), "memfd_create": (319, 279)},
    **{"shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180)},
    # attributes of files, which Landlock does not cover, and special files
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
    **{"setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469)},
    **{"mknod": (133, None), "mknodat": (259, 33), "open_by_handle_at": (304, 265)},
    # mounts and namespaces
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429)},
    **{"fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"mount_setattr": (442, 442)},
    # rarely needed doors to the kernel
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105)},
    **{"finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104)},
    **{"kexec_file_load": (320, 294)},
}
# Refused with ENOSYS, so that the C library starts threads by `clone`, whose flags a filter can read.
_CLONE3, _CLONE_THREAD = 435, 0x10000
# Architecture in the filter; clone, capset, and the calls that send a signal to the process in their first argument.
_MACHINES = {
    "x86_64": (0xC000003E, 56, 126, (62, 200, 234)),
    "aarch64": (0xC00000B7, 220, 91, (129, 130, 131)),
}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38


def confine(folder: str, memory: int, cpu_seconds: int, layers: list[str], readable: list[str]) -> None:
    """
    Forks. The parent only waits, and ends with its child, or ends the child on SIGTERM. The child returns, in
    `folder`, with limits in bytes and seconds and the given `layers`; with Landlock it reads the interpreter, the
    libraries of the system and what is `readable`.

    Raises:
        OSError: if the kernel refuses one of the layers.
        ValueError: for a layer that does not exist.
    """
    if not set(layers) <= set(LAYERS):
        raise ValueError(f"Layers are {', '.join(LAYERS)}; got {layers}.")
    if "namespaces" in layers:
        _enter_namespaces(folder)
    _fork_supervised(hide_processes="namespaces" in layers)
    os.chdir(folder)
    _set_limits(memory, cpu_seconds)
    if sys.platform != "linux":
        return
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Without these two, a process of the same user could open this one's memory and files in /proc.
    _drop_capabilities()
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if "landlock" in layers:
        _restrict_files(folder, readable)
    if "seccomp" in layers:
        _refuse_system_calls()


def refuse_outside(folder: str) -> None:
    """
    An audit hook, for good: it raises errors that say what is not allowed, and is all there is where the kernel has
    none of the layers. It stops accidents; code that means to gets around it.
    """
    writing = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
    processes = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "pty.")
    changes = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
    changes |= {"os.chmod", "os.chown", "os.utime", "sqlite3.connect"}

    def outside(path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)) or path in ("", ":memory:"):
            return False
        path = os.path.realpath(os.fsdecode(path))
        return path != os.devnull and os.path.commonpath([path, folder]) != folder

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith("socket.") or event.startswith(processes):
            raise PermissionError(f"{event} is not allowed")
        # An open folder would be a way around: shutil.rmtree names what it deletes relative to one.
        opens = event == "open" and outside(arguments[0])
        opens = opens and bool(arguments[2] & writing or os.path.isdir(arguments[0]))
        if opens or (event in changes and any(map(outside, arguments))):
            raise PermissionError(f"{event} is not allowed outside the program's folder: {arguments[0]}")

    sys.addaudithook(watch)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    """A function of the C library; OSError if it fails."""
    integers = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(_library(), name)(*integers)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _machine() -> tuple[int, int, int, tuple[int, ...]]:
    found = _MACHINES.get(platform.machine())
    if found is None or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"no system call numbers for {platform.machine()}")
    return found


def _enter_namespaces(folder: str) -> None:
    new_mounts, new_ipc, new_user, new_pid, new_network = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
    user, group = os.geteuid(), os.getegid()
    _call("unshare", new_user | new_mounts | new_pid | new_network | new_ipc)
    # Nothing below reaches the mounts of others: the line above raised where they are not this process' own.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    private_and_recursive = 1 << 18 | 1 << 14
    _call("mount", b"none", b"/", None, private_and_recursive, None)
    recursive, read_only, here, mount_setattr = 0x8000, 1, -100, 442
    attributes = struct.pack("=QQQQ", read_only, 0, 0, 0)
    _call("syscall", mount_setattr, here, b"/", recursive, attributes, len(attributes))
    options = f"size={_FOLDER_SIZE},nr_inodes={_FOLDER_FILES},mode=700"
    _mount("tmpfs", folder, options)


def _mount(kind: str, folder: str, options: str = "") -> None:
    no_suid_devices_programs = 2 | 4 | 8
    name = kind.encode()
    _call("mount", name, os.fsencode(folder), name, no_suid_devices_programs, options.encode() or None)


def _fork_supervised(hide_processes: bool) -> None:
    """The child returns. The supervisor ends it when told to, and when whoever started the supervisor ends."""
    ending = {signal.SIGTERM, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    child = os.fork()
    if child:
        if sys.platform == "linux":
            _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        signal.sigwait(ending)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)  # with a PID namespace, after every process in it
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # and without one, those that are left of the group; this one too
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if hide_processes:
        try:
            _mount("proc", "/proc")
        except OSError:  # a container hides parts of its /proc, so a new one is refused
            _mount("tmpfs", "/proc", "size=4k")


def _set_limits(memory: int, cpu_seconds: int) -> None:
    # No limit on processes: it would count all those of the user.
    import resource

    limits = {"AS": memory, "CPU": cpu_seconds, "FSIZE": LARGEST_FILE, "NOFILE": 256, "CORE": 0}
    for name, value in limits.items():
        # Where a limit is already lower, or is not supported (address space on macOS), it stays.
        with suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _drop_capabilities() -> None:
    version_3 = struct.pack("=Ii", 0x20080522, 0)
    with suppress(OSError):  # of other machines: only root has any
        _call("syscall", _machine()[2], version_3, bytes(24))


def _restrict_files(folder: str, readable: list[str]) -> None:
    """Landlock: read the interpreter and libraries, write in `folder`, neither anywhere else; no TCP, no signals."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    version = _call("syscall", create_ruleset, None, 0, 1)
    if version < 3:
        raise OSError(errno.ENOSYS, f"Landlock of version {version} does not stop truncation")
    everything = (1 << (16 if version >= 5 else 15)) - 1
    execute, write, read, read_folder, truncate = 1, 2, 4, 8, 1 << 14
    rules = dict.fromkeys((*_READABLE, sys.base_prefix, sys.base_exec_prefix, *readable), read | read_folder)
    rules |= {"/dev/null": read | write | truncate, folder: everything & ~execute}
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("=QQQ", everything, network, scoped)
    rule_set = _call("syscall", create_ruleset, attributes, len(attributes), 0)
    for path, access in rules.items():
        with suppress(FileNotFoundError, NotADirectoryError):
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                access &= ~read_folder
            _call("syscall", add_rule, rule_set, 1, struct.pack("=Qi", access, beneath), 0)
            os.close(beneath)
    _call("syscall", restrict_self, rule_set, 0)
    os.close(rule_set)


def _refuse_system_calls() -> None:
    """A seccomp filter: what _SYSTEM_CALLS lists fails with EPERM, and so do new processes and signals to others."""
    architecture, clone, _, signal_calls = _machine()
    column = list(_MACHINES).index(platform.machine())
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000

    def refuse(number: int) -> tuple[int, ...]:
        return (give, 0, 0, 0x50000 | number)

    def where(comparison: int, value: int, *then: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(comparison, 0, len(then), value), *then]

    def allowed_if(comparison: int, value: int) -> list[tuple[int, ...]]:
        """By the first argument."""
        return [(load, 0, 0, 16), *where(comparison, value, (give, 0, 0, allow)), refuse(errno.EPERM)]

    code: list[tuple[int, ...]] = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += where(at_least, 1 << 30, refuse(errno.EPERM))  # the 32-bit calls of x86_64
    for numbers in _SYSTEM_CALLS.values():
        if (number := numbers[column]) is not None:
            code += where(equal, number, refuse(errno.EPERM))
    code += where(equal, _CLONE3, refuse(errno.ENOSYS))
    code += where(equal, clone, *allowed_if(any_bit, _CLONE_THREAD))
    for number in signal_calls:
        code += where(equal, number, *allowed_if(equal, os.getpid()))
    code.append((give, 0, 0, allow))
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(instructions)))
    _call("prctl", _PR_SET_SECCOMP, 2, program, 0, 0)

"""
Programs a model wrote, run in a limited process.

A program has limited time, memory and file size, a folder of its own that is deleted afterwards, and an audit hook
that refuses sockets, further processes, and changes to files outside that folder. Where an ordinary user may make
namespaces (Linux, `unshare`), it has no network interface either, and ends together with all processes it started.

This stops accidents and careless code, not malicious code, which can read the user's files and runs in the process of
the hook that watches it. Run code that you do not trust in a container or virtual machine.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")
_LONGEST_REASON = 300

# The verdict is a number the program does not know: leaving early with exit code 0 does not pass.
_RUNNER = """
import os, resource, sys

verdict, memory, seconds = sys.stdin.read().split()
sys.stdin = open(os.devnull)
folder, error_file, verdict_file = map(os.path.realpath, ("work", "error", "verdict"))
for name, value in {"AS": int(memory), "CPU": int(seconds), "FSIZE": 2**24, "CORE": 0}.items():
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
with open("program.py", encoding="utf-8") as file:
    source = file.read()
os.chdir(folder)
sys.setrecursionlimit(10_000)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
PROCESSES = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "pty.")
FILES = {f"os.{name}" for name in "remove rename rmdir mkdir link symlink truncate chmod chown".split()}
watching = True

def outside(path):
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    path = os.path.realpath(os.fsdecode(path))
    return path != os.devnull and os.path.commonpath([path, folder]) != folder

def watch(event, arguments):
    if not watching:
        return
    if event.startswith("socket.") or event.startswith(PROCESSES):
        raise PermissionError(f"{event} is not allowed")
    # An open folder would be a way around: shutil.rmtree names what it deletes relative to one.
    opens = event == "open" and outside(arguments[0]) and (arguments[2] & WRITES or os.path.isdir(arguments[0]))
    if opens or event in FILES and any(map(outside, arguments)):
        raise PermissionError(f"{event} is not allowed outside the program's folder: {arguments[0]}")

sys.addaudithook(watch)
try:
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
except BaseException as error:
    outcome, text = error_file, f"{type(error).__name__}: {error}".rstrip(": ")
else:
    outcome, text = verdict_file, verdict
watching = False
with open(outcome, "w", encoding="utf-8", errors="replace") as file:
    file.write(text)
os._exit(0)
"""


@dataclass(frozen=True)
class ExecutionLimits:
    """Of a program: `seconds` on the wall clock, the start of Python included, and `memory_mb` of address space."""

    seconds: float = 10.0
    memory_mb: int = 1024

    def __post_init__(self):
        if not self.seconds > 0 or self.memory_mb < 1:
            raise ValueError(f"Limits must be above 0, got {self.seconds} seconds and {self.memory_mb} MB.")


@dataclass(frozen=True)
class ExecutionResult:
    """Whether a program ran to its end without an error, and why not."""

    passed: bool
    reason: str = ""


def run_program(program: str, limits: ExecutionLimits | None = None) -> ExecutionResult:
    """
    Runs a Python program, such as one of `checking_program`, in a limited process; see the top of this file.

    Raises:
        OSError: if no process can be started. Whatever the program does is a result.
    """
    limits = limits or ExecutionLimits()
    with tempfile.TemporaryDirectory(prefix="llada-trm-program-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "work").mkdir()
        (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
        verdict = secrets.token_hex(16)
        in_time = _run(name, f"{verdict} {limits.memory_mb * 2**20} {int(limits.seconds) + 1}", limits.seconds)
        if _read(folder / "verdict") == verdict:
            return ExecutionResult(True)
        if not in_time:
            return ExecutionResult(False, f"time limit of {limits.seconds:g} s")
        reason = _read(folder / "error") or "the process ended before the program did"
        return ExecutionResult(False, " ".join(reason.split())[:_LONGEST_REASON])


@cache
def has_namespaces() -> bool:
    """Whether this system lets an ordinary user run a process without network, in a process tree of its own."""
    try:
        return subprocess.run([*_NAMESPACES, "true"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _run(folder: str, instructions: str, seconds: float) -> bool:
    """Whether the process ended in time. Afterwards nothing of it is left."""
    process = subprocess.Popen(
        [*(_NAMESPACES if has_namespaces() else ()), sys.executable, "-I", "-B", "-c", _RUNNER],
        cwd=folder,
        env={"PATH": os.defpath, "HOME": folder, "TMPDIR": os.path.join(folder, "work"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        process.communicate(instructions, timeout=seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""

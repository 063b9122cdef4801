"""
Programs a model wrote, tested in limited processes.

The tests run in an interpreter of their own, which asks the program's for results and compares them itself
(`code_judge`): a program cannot reach the verdict, nor what is expected of it. Results cross as values. On objects of
the program's own classes tests cannot use `==`, `<` and arithmetic, nor catch its own exceptions by their names, nor
share variables with it.

A program has limited time, memory and file size, and a folder of its own that is deleted afterwards. What else holds
it back depends on the kernel; `sandbox_protections` says what is active here:

- `namespaces` (Linux 5.12, where users may make them): no network, other processes out of sight, all processes it
  started end with it, no file but those of its folder can change, and these hold 64 MB together.
- `landlock` (Linux 6.2): it reads Python, its packages and the system's libraries, and writes in its folder only.
- `seccomp` (x86_64, aarch64): no further processes, sockets, signals to others, or changes of modes, owners and times.

With none of them, an audit hook stops careless code, but not malicious code, which can then change the user's files,
leave processes behind and write to the memory of others, the verdict's included. Even with all, a program shares the
kernel, can use a processor until its time is over, and can measure time. For models that you do not trust, run the
command in a container without network (`docker run --network none --read-only --tmpfs /tmp --cap-drop ALL ...`) or a
virtual machine; Landlock and seccomp work in there, too.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .process_confinement import LAYERS

logger = logging.getLogger(__name__)

_LONGEST_REASON = 300
# The folder of these files as a package, without what importing `llada_trm_hf` would run.
_START = """
import sys, types
package = types.ModuleType("sandbox")
package.__path__ = [{folder!r}]
sys.modules["sandbox"] = package
from sandbox.code_judge import main
main(**{arguments!r})
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
    """Whether a program passed its tests, and why not."""

    passed: bool
    reason: str = ""


def run_tests(
    solution: str, tests: str, entry_point: str = "", limits: ExecutionLimits | None = None
) -> ExecutionResult:
    """
    Runs a program and tests of it in limited processes; see the top of this file.

    Args:
        solution: source text of the program.
        tests: source text that raises where the solution is wrong. Names that it does not define are Python's or the
            solution's. If it names `SOLUTION`, that is the program, not run yet: `SOLUTION.load()` runs it,
            `SOLUTION.find(name)` is what it defines, `SOLUTION.run(text)` what it prints for a standard input.
        entry_point: the function of the solution that is tested: needed where it has the name of one of Python's.
        limits: of the solution, and of the tests.

    Raises:
        OSError: if no process can be started. Whatever the program does is a result.
    """
    limits = limits or ExecutionLimits()
    task = json.dumps({"solution": solution, "tests": tests, "entry_point": entry_point}).encode()
    try:
        answer = _judge(task, limits, sandbox_protections())
    except subprocess.TimeoutExpired:
        return ExecutionResult(False, f"time limit of {limits.seconds:g} s")
    reason = json.loads(answer)[0] if answer else "the process ended before the tests did"
    return ExecutionResult(not reason, " ".join(reason.split())[:_LONGEST_REASON])


@cache
def sandbox_protections() -> tuple[str, ...]:
    """Which of `namespaces`, `landlock` and `seccomp` programs run with here. Tried once; a warning names others."""
    active: list[str] = []
    for layer in LAYERS:
        with _folder() as folder:
            process = _start("probe", folder, ExecutionLimits(), (*active, layer))
            try:
                answer, _ = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                continue
            finally:
                _stop(process)
            if answer == b"confined":
                active.append(layer)
    lacking = [layer for layer in LAYERS if layer not in active]
    if lacking:
        logger.warning(
            "Programs run without %s, which this system lacks: use a container for models that you do not trust.",
            " and ".join(lacking),
        )
    return tuple(active)


def _judge(task: bytes, limits: ExecutionLimits, layers: tuple[str, ...]) -> bytes:
    """The judge's answer, empty if it ended before; afterwards nothing is left of the processes."""
    with ExitStack() as stack:
        folders = stack.enter_context(_folder()), stack.enter_context(_folder())
        with ExitStack() as pipes:
            ends = [*os.pipe(), *os.pipe()]
            for end in ends:
                pipes.callback(os.close, end)
            question, ask, reply, answer = ends
            program = _start("program", folders[0], limits, layers, question, answer)
            stack.callback(_stop, program)
            judge = _start("judge", folders[1], limits, layers, reply, ask)
            stack.callback(_stop, judge)
        return judge.communicate(task, timeout=limits.seconds)[0]


def _start(
    role: str, folder: Path, limits: ExecutionLimits, layers: tuple[str, ...], reading: int = -1, writing: int = -1
) -> subprocess.Popen:
    arguments: dict[str, Any] = {
        "role": role,
        "reading": reading,
        "writing": writing,
        "folder": os.path.realpath(folder),
        "libraries": [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))],
        "limits": {
            "memory": limits.memory_mb * 2**20,
            "cpu_seconds": int(limits.seconds) + 1,
            "layers": list(layers),
        },
    }
    here = os.path.dirname(os.path.abspath(__file__))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _START.format(folder=here, arguments=arguments)],
        cwd=folder,
        env={"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE if role == "judge" else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if role == "program" else subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[end for end in (reading, writing) if end >= 0],
        start_new_session=True,
    )


def _stop(process: subprocess.Popen) -> None:
    """Tells the supervisor to end the process and what that started."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that is deleted afterwards, however deep a program nested others in it."""
    name = tempfile.mkdtemp(prefix="llada-trm-program-")
    try:
        yield Path(name)
    finally:
        try:
            shutil.rmtree(name, ignore_errors=True)
        except RecursionError:
            subprocess.run(["rm", "-rf", "--", name], check=False)

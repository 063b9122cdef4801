"""
Runs commands in forks of a process that has imported everything, and kills them while they write.

The forks are of a process of its own, in which no thread runs: a fork of one with threads (torch's, pyarrow's) may
wait forever for a lock that another thread held.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR
DEADLINE = 200.0  # seconds, fewer than the 300 after which pytest ends a test
POLL = 0.02  # seconds between two looks at whether the command has ended


class Commands:
    """Talks to the process."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def run(self, arguments: list[str], folder: Any, **moment: Any) -> dict[str, Any]:
        """
        Args:
            folder: whose file operations count: files opened to be written, flushed, moved and removed, new folders.
            moment: `kill_at`, the number of the file operation at which it is killed, or `kill_after` so many seconds;
                `size_limit` of a file in bytes, from the start or, with `limit_from`, once a file whose name contains
                this is written; its `umask`; `deadline` in seconds.

        Returns:
            `code`, None if it was killed; the number of file `operations`; `stderr`, its end; `hung`, true if it was
            killed because it had not ended at the deadline: then the code is None and `stderr` says so.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"arguments": [str(argument) for argument in arguments], "folder": str(folder), **moment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process that runs commands has ended, with code {self.process.wait()}"
        return json.loads(answer)


@contextmanager
def commands() -> Iterator[Commands]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # else pyarrow starts a thread
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)  # type: ignore[call-overload]
    try:
        yield Commands(process)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:  # a test was ended while its command ran
            process.kill()
            process.wait()


# --- In the process ---


def _serve() -> None:
    import importlib

    import torch

    recipes = ("run_setup", "masked_diffusion", "compressor", "demo", "trm", "latent_answer")
    for name in recipes:
        importlib.import_module(f"llada_trm_hf.recipes.{name}")
    for name in ("train", "trace", "generate", "evaluate", "datagen", "publish"):
        importlib.import_module(f"llada_trm_hf.cli.{name}")
    torch.set_num_threads(1)
    with suppress(FileNotFoundError):  # where there is no /proc
        assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.setsid()
            os._exit(_run(request, write))
        os.close(write)
        print(json.dumps(_watch(child, read, request)), flush=True)
        os.close(read)
    os._exit(0)  # without taking down all that was imported


def _watch(child: int, pipe: int, request: dict[str, Any]) -> dict[str, Any]:
    """Waits for the child to end, or ends it; what became of it. (What it started itself may hold the pipe longer.)"""
    deadline = request.get("deadline", DEADLINE)
    limit = min(request.get("kill_after", deadline), deadline)
    start, written, status = time.monotonic(), b"", None
    while status is None:
        if select.select([pipe], [], [], POLL)[0]:
            chunk = os.read(pipe, 1 << 16)
            written += chunk
            if not chunk:
                time.sleep(POLL)
        ended, found = os.waitpid(child, os.WNOHANG)
        if ended:
            status = found
        elif time.monotonic() - start > limit:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    while select.select([pipe], [], [], 0)[0] and (chunk := os.read(pipe, 1 << 16)):
        written += chunk
    errors, _, operations = written.decode(errors="replace").partition("\0")
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    hung = code is None and limit == deadline and time.monotonic() - start > limit
    if hung:
        errors += f"\nIt had not ended after {deadline} s and was killed."
    return {"code": code, "operations": int(operations or 0), "stderr": errors[-6000:], "hung": hung}


def _run(request: dict[str, Any], pipe: int) -> int:
    """In the fork: one command, its errors into the pipe."""
    from llada_trm_hf.cli.main import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(pipe, 2)
    os.umask(request.get("umask", 0o022))
    if request.get("size_limit") and not request.get("limit_from"):
        _limit_files(request["size_limit"])
    count = _count_operations(request)
    try:
        code = main(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(pipe, f"\0{count[0]}".encode())
    return code


def _limit_files(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _count_operations(request: dict[str, Any]) -> list[int]:
    """Counts the file operations in the folder from now on, in the list returned, and kills this process at one."""
    folder, kill_at, limit_from = os.path.abspath(request["folder"]), request.get("kill_at"), request.get("limit_from")
    count = [0]

    def step() -> None:
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            mode, flags = arguments[1] or "", arguments[2] or 0
            if not (set(mode) & set("wax+") or flags & WRITES):
                return
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.fsdecode(path)
            # (`rmtree` names files relative to an open folder.)
            if os.path.isabs(path) and not path.startswith(folder):
                return
            if limit_from and limit_from in os.path.basename(path):
                _limit_files(request["size_limit"])
        step()

    flush = os.fsync

    def counted_fsync(descriptor: int) -> None:
        step()
        flush(descriptor)

    os.fsync = counted_fsync  # it has no audit event, and safetensors and torch write without one
    sys.addaudithook(audit)
    return count


if __name__ == "__main__":
    _serve()

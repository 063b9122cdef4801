"""Runs commands in forks of a process that has imported everything, and kills them while they write."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR


class Commands:
    """Talks to the process. `run` gives the exit code, None if it was killed, and the number of file operations."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def run(self, arguments: list[str], folder: Any, **moment: float) -> dict[str, Any]:
        """
        Args:
            folder: whose file operations count.
            moment: `kill_at`, the number of the file operation at which it is killed, or `kill_after` so many seconds;
                `size_limit` of a file in bytes.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"arguments": [str(argument) for argument in arguments], "folder": str(folder), **moment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def commands() -> Iterator[Commands]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)  # type: ignore[call-overload]
    try:
        yield Commands(process)
    finally:
        process.stdin.close()
        process.wait()


def _serve() -> None:
    import importlib

    import torch

    for name in ("recipes.run_setup", "recipes.masked_diffusion", "recipes.compressor", "recipes.demo", "recipes.trm"):
        importlib.import_module(f"llada_trm_hf.{name}")
    for name in ("train", "trace", "generate", "evaluate", "datagen"):
        importlib.import_module(f"llada_trm_hf.cli.{name}")
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os._exit(_run(request, write))
        os.close(write)
        timer = threading.Timer(request.get("kill_after", 3600), os.kill, (child, signal.SIGKILL))
        timer.start()
        with os.fdopen(read, errors="replace") as pipe:
            errors = pipe.read()
        _, status = os.waitpid(child, 0)
        timer.cancel()
        errors, _, operations = errors.partition("\0")
        code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(json.dumps({"code": code, "operations": int(operations or 0), "stderr": errors[-6000:]}), flush=True)


def _run(request: dict[str, Any], pipe: int) -> int:
    """In the fork: one command, its errors into the pipe."""
    from llada_trm_hf.cli.main import main

    folder, kill_at, count = os.path.abspath(request["folder"]), request.get("kill_at"), 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
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
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(pipe, 2)
    if request.get("size_limit"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["size_limit"],) * 2)
    sys.addaudithook(watch)
    try:
        code = main(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(pipe, f"\0{count}".encode())
    return code


if __name__ == "__main__":
    _serve()

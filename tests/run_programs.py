"""Programs that tests run. One that hangs is ended, with all that it started, and says where each process was."""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SECONDS = 200.0  # fewer than the 300 after which pytest ends a test


def run_program(
    command: Sequence[str],
    *,
    seconds: float = SECONDS,
    input: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess:
    """
    `subprocess.run` with its output captured as text, in files: what a program leaves behind could hold a pipe open.

    Raises:
        AssertionError: it has not ended after so many seconds, with the end of its stderr, where Python programs wrote
            their stacks; or, with `check`, it has failed.
    """
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+", errors="replace") as stdout,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        stdin.write(input)
        stdin.seek(0)
        streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        with subprocess.Popen(command, env=_telling(env), cwd=cwd, **streams) as process:
            hung = False
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                hung = True
            finally:
                if process.returncode is None:
                    end(process)
        stdout.seek(0)
        stderr.seek(0)
        result = subprocess.CompletedProcess(command, process.returncode, stdout.read(), stderr.read())
    assert not hung, f"{_name(command)} had not ended after {seconds} s:\n{result.stderr[-20_000:]}"
    assert not check or result.returncode == 0, f"{_name(command)}:\n{result.stderr[-3000:]}"
    return result


@contextmanager
def talk_to(command: Sequence[str], *, seconds: float = SECONDS, env=None, **settings) -> Iterator[subprocess.Popen]:
    """`subprocess.Popen` of a program that is ended, likewise, if it has not ended by itself after so many seconds."""
    with subprocess.Popen(command, env=_telling(env), **settings) as process:
        timer = threading.Timer(seconds, end, [process])
        timer.start()
        try:
            yield process
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                end(process)


def end(process: subprocess.Popen) -> None:
    """Ends it and all that it started, also in other sessions: first so that Python writes where it was."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        children = top.children(recursive=True)
        for number in (signal.SIGABRT, signal.SIGKILL):
            for member in (*children, top):
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(number)
            psutil.wait_procs(children, timeout=5)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)


def _telling(env: Mapping[str, str] | None) -> dict[str, str]:
    return {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}


def _name(command: Sequence[str]) -> str:
    test = os.environ.get("PYTEST_CURRENT_TEST", "a test")
    return f"{' '.join(map(str, command))[:1000]}, which {test} has started,"

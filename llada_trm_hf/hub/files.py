"""Files that appear complete or not at all, and output folders that one run at a time writes to."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


def write_atomically(path: str, write: Callable[[str], object]) -> None:
    """
    Calls `write` with a temporary name in the folder of `path`, then moves the file to `path` in one step. It is on
    the disk when this returns. The temporary name is always the same: the next call overwrites what a killed process
    left. If `write` raises (a full disk, say), `path` is as it was.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    _flush(folder)


def write_text(path: str, text: str) -> None:
    """Writes a text file atomically, its line ends as they are."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", newline=""))


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_processes(number: int, folder: str) -> None:
    """
    Raises RuntimeError if more processes were launched (`WORLD_SIZE` in the environment) than the `number` that work
    together: each would take itself for the only one, and write all of `folder`.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > number:
        raise RuntimeError(
            f"{launched} processes were launched, but they do not work together, so each would write the same files "
            f"in {folder}. Without GPUs launch them with examples/accelerate/cpu.yaml or torchrun, and say --use_cpu."
        )


@contextmanager
def output_dir_lock(folder: str, lock_name: str = ".training.lock") -> Iterator[None]:
    """
    Locks the output folder for this run, and creates it if need be. The lock ends with the process, however that
    ends; of several processes (`RANK` in the environment) the first holds it for all.

    Raises:
        RuntimeError: if another run is writing to the folder.
    """
    os.makedirs(folder, exist_ok=True)
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    lock = FileLock(os.path.join(folder, lock_name), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(f"Another run is writing to {folder}: choose another --output_dir.") from None
    try:
        yield
    finally:
        lock.release()

"""A file appears under its name when it is complete, or not at all."""

import os
from collections.abc import Callable
from contextlib import suppress


def write_atomically(path: str, write: Callable[[str], object]) -> None:
    """
    Calls `write` with a temporary name in the folder of `path`, then moves the file to `path` in one step. Data and
    name are on the disk when this returns. The temporary name is always the same: the next call overwrites what a
    killed process left.

    Raises:
        OSError: such as a full disk; `path` is as it was before.
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


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

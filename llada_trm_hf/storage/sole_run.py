"""One run at a time on an output folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout


@contextmanager
def output_dir_lock(folder: str, lock_name: str = ".training.lock") -> Iterator[None]:
    """
    Locks the output folder for this run, creating it if need be; the lock ends with the process, however that ends.
    Of several processes (`RANK` in the environment) the first one holds it for all.

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

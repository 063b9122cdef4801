"""Files that appear complete or not at all, and output folders that one run at a time writes to."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch import distributed

_NOT_WRITTEN = "could not write"
_FAILED_TORCH_SAVE = re.compile(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+")
_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def write_atomically(path: str, write: Callable[[str], object]) -> None:
    """
    Calls `write` with the name of a file to be in a temporary folder beside `path`, then moves it to `path` in one
    step. It is on the disk when this returns, with the mode that the umask gives. The temporary names are always the
    same: the next call removes what a killed process left, also what `write` named otherwise (safetensors writes to a
    file of a random name first). If `write` raises (a full disk, say), `path` is as it was.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.tmp")
    scratch = f"{temporary}.d"
    inside = os.path.join(scratch, name)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        with writing(path):
            os.mkdir(scratch)
            write(inside)
            give_usual_mode(inside)
            _flush(inside)
        # The folder goes before the file gets its name: a file that is there is not written again by the next run.
        os.replace(inside, temporary)
        shutil.rmtree(scratch)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    _flush(folder)


def give_usual_mode(path: str, new: str | None = None) -> None:
    """
    Lets those read and write a file who may do so with others that this process makes (safetensors writes files that
    only their owner can read, whatever the umask), going by a `new` file or, by default, the new folder it lies in.
    """
    usual, mode = os.stat(new or os.path.dirname(path)).st_mode & 0o666, os.stat(path).st_mode
    if usual & ~mode:
        with suppress(PermissionError):  # of file systems without modes
            os.chmod(path, stat.S_IMODE(mode) | usual)


def move_folder(temporary: str, path: str) -> None:
    """Gives a finished folder its name in one step, once it is on the disk; an older folder `path` is replaced."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            give_usual_mode(os.path.join(folder, name))
            _flush(os.path.join(folder, name))
        _flush(folder)
    replaced = f"{temporary}.replaced"
    if os.path.isdir(path):
        os.replace(path, replaced)
    os.replace(temporary, path)
    _flush(os.path.dirname(os.path.abspath(path)))
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Within it, a full disk or a limit on the size of files is an OSError that names `path`, whoever writes."""
    try:
        yield
    except Exception as error:
        problem = disk_problem(error, path)
        if problem is None or problem == error.args[-1]:
            raise
        raise OSError(_disk_error_number(error), problem) from error


def disk_problem(error: BaseException, path: str | None = None) -> str | None:
    """One line for the user if `error` means that a disk or a quota is full, or a file too large; else None."""
    number = _disk_error_number(error)
    if number is None:
        return None
    if str(error.args[-1]).startswith(_NOT_WRITTEN):
        return error.args[-1]
    path = path or getattr(error, "filename", None)
    return (
        f"{_NOT_WRITTEN} {path or 'a file'}: {os.strerror(number)}. Free space, or raise the limit on the size of "
        f"files (ulimit -f, a quota), and run the same command again."
    )


def _disk_error_number(error: BaseException) -> int | None:
    """The system's number of the error, which safetensors has in its text; torch does not tell the two apart."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _DISK_ERRORS else None
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"os error (\d+)", str(error))
        return int(found[1]) if found is not None and int(found[1]) in _DISK_ERRORS else None
    # torch says that a write failed, or that the file does not end where it should.
    if not isinstance(error, RuntimeError) or not _FAILED_TORCH_SAVE.search(str(error)):
        return None
    return errno.EFBIG if _file_size_is_limited() else errno.ENOSPC


def _file_size_is_limited() -> bool:
    try:
        import resource
    except ImportError:  # Windows has none
        return False
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY


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


# --- Models that replace others ---

# Shards, one file for all, or the index: the name, and the variant, before the shard's number or at the index's end.
_WEIGHTS_FILE = re.compile(
    r"(?:pytorch_)?(model|adapter_model)"
    r"(?:(\.[^.]+?)?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)|\.(?:safetensors|bin)\.index(\.[^.]+)?\.json)"
)
_UNFINISHED_SAVE = ".saving-"


@contextmanager
def replacing_files(folder: str | os.PathLike) -> Iterator[str]:
    """
    A temporary folder within `folder`; at the end, what was written there takes the place of an older model's files:
    the old weights go first, index before shards, and the new ones come last, shards before index.
    """
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{_UNFINISHED_SAVE}{os.getpid()}")
    os.makedirs(temporary)
    try:
        yield temporary
        names = sorted(os.listdir(temporary), key=_is_weights)
        kinds = {_kind_of_weights(name) for name in names} - {None}
        old = [name for name in os.listdir(folder) if _kind_of_weights(name) in kinds]
        for name in sorted(old, key=_is_weights, reverse=True):
            os.remove(os.path.join(folder, name))
        for name in names:
            if os.path.isfile(os.path.join(temporary, name)):
                give_usual_mode(os.path.join(temporary, name))
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not (
        distributed.is_available() and distributed.is_initialized()
    ):  # else other processes may be saving here too
        for name in os.listdir(folder):
            if name.startswith(_UNFINISHED_SAVE):  # of a process that was killed
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def _is_weights(name: str) -> int:
    """For sorting: 0 for other files, 1 for weights, 2 for their index."""
    return 0 if _kind_of_weights(name) is None else 1 + (".index." in name)


def _kind_of_weights(name: str) -> str | None:
    """`model` or `adapter_model`, with its variant (`model.fp16`), of files that are loaded together; else None."""
    file = _WEIGHTS_FILE.fullmatch(name)
    return f"{file[1]}{file[2] or file[3] or ''}" if file else None

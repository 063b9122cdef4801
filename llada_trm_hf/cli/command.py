"""What the commands share: parsers whose errors are one line, checks of options, the end of a distributed run."""

import argparse
import gc
import os
import sys
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser


class _OneLineErrors:
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the options)", file=sys.stderr)  # type: ignore[attr-defined]
        raise SystemExit(2)


class CommandParser(_OneLineErrors, argparse.ArgumentParser):
    """For a command with its own options."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)


class DataclassParser(_OneLineErrors, HfArgumentParser):
    """For a command whose options are the fields of dataclasses."""


def options_for(settings_class: type, options: argparse.Namespace) -> dict[str, Any]:
    """The options that have the name of a field of `settings_class`, a dataclass."""
    names = {field.name for field in fields(settings_class)}
    return {name: value for name, value in vars(options).items() if name in names}


def check_output_file(path: str | None, *endings: str) -> None:
    """Raises an error, before the work, if the folder of `path` is missing or it has none of `endings`."""
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder} to write {path} in.")
    if endings and not path.endswith(endings):
        raise ValueError(f"{path} has to end in {' or '.join(endings)}.")


def finish_distributed() -> None:
    """
    Ends the processes of a run together: one that leaves while others still write would bring them down.

    `destroy_process_group` drops only torch's own references. A DDP model holds the group too, and the trainer around
    it is in reference cycles: without a collection, gloo's worker threads outlive `main`, and one that releases a
    tensor while the interpreter shuts down aborts the process (pytorch issue 179291).
    """
    from accelerate import PartialState  # not in the base install, which `push` does with

    processes = PartialState()
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        processes.destroy_process_group()
        gc.collect()

"""What the commands share: parsers whose errors are one line, checks of options, the end of a distributed run."""

import argparse
import gc
import importlib
import importlib.util
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

DTYPES = ("auto", "float32", "bfloat16", "float16")
_LARGEST_INTEGER = 2**63 - 1
# Libraries whose announcements of coming changes are for their developers, not for who types a command.
_LIBRARIES = r"(transformers|huggingface_hub|datasets|accelerate|peft|trl|lm_eval|torch)(\.|$)"


class OneLineErrors(argparse.ArgumentParser):
    """Errors on one line; numbers that are neither NaN nor infinite, and fit into 64 bits."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register("type", float, _finite_number)
        self.register("type", int, _whole_number)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {' '.join(message.split())} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


class CommandParser(OneLineErrors):
    """For a command with its own options, imported before torch is."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=DefaultsOfValues, **kwargs)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """The options, with `--import_module` among them; if they are right, `prepare` follows."""
        add_import_module(self)
        options = self.parse_args(arguments)
        prepare(options.import_module)
        return options


class DefaultsOfValues(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of an option, unless it is not set or a switch that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def prepare(modules: Iterable[str] | None = None) -> None:
    """
    Does what importing the package does in a program (models are registered, debug mode works), without what the
    libraries print for their developers; then imports the user's own `modules`, files or names.
    """
    # Not: warnings of this package, of user code, of anything but a coming change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=_LIBRARIES)
    logging.getLogger("transformers.configuration_utils").addFilter(_names_a_model_type)
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # which log what this machine has no use for
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub_bars_are_off = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if not hub_bars_are_off:
        enable_progress_bars()  # a download may take an hour
    for folder in ("models", "generation", "inspection"):
        importlib.import_module(f"llada_trm_hf.{folder}")
    importlib.import_module("llada_trm_hf")._fill_hub_hooks()
    for module in modules or ():
        _import_users_module(module)


def options_for(settings_class: type, options: argparse.Namespace) -> dict[str, Any]:
    """The options that have the name of a field of `settings_class`, a dataclass."""
    names = {field.name for field in fields(settings_class)}
    return {name: value for name, value in vars(options).items() if name in names}


def add_import_module(parser: argparse.ArgumentParser) -> None:
    """Adds `--import_module`, for `prepare`."""
    parser.add_argument(
        "--import_module", action="append", help="a .py file or module to import first, which registers a refiner"
    )


def add_problem_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Adds what says which problems a command works on; `split` is the default one."""
    parser.add_argument("--dataset_name", default="gsm8k", help="gsm8k, math, humaneval, ..., or a file of problems")
    parser.add_argument("--split", default=split, help="split or slice, e.g. test[:200]")
    parser.add_argument("--data_files", help="a local file to read instead of the Hub's, in the dataset's format")
    parser.add_argument("--columns", nargs="+", default=[], help="columns of a local file, e.g. prompt=question")
    add_generator_options(parser)


def add_generator_options(parser: argparse.ArgumentParser) -> None:
    """Adds the `GeneratorOptions`, which are in a module that would import torch before `--help` is answered."""
    parser.add_argument("--num_terms", type=int, help="digits of generated arithmetic (8) or bits of prefix_sum (32)")
    parser.add_argument("--puzzle_size", type=int, help="side of a generated sudoku: 4, 6 or 9 (4), or maze: odd (9)")
    parser.add_argument("--num_clues", type=int, nargs="+", help="of a generated sudoku: a number, or least and most")
    parser.add_argument("--num_guesses", type=int, nargs="+", help="that a plain solver needs for it, in the same way")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, for `checked_device`."""
    parser.add_argument("--device", help="cuda, cuda:1, cpu, mps, ...; cuda where there is one, else cpu")


def checked_device(name: str | None) -> str:
    """`name`, or the default; raises ValueError for a device that this machine does not have."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):  # of torch, each kind of device in its own words
        hint = "" if torch.cuda.is_available() else ", which has no GPU that torch can use"
        raise ValueError(
            f"--device {name}: there is no such device on this machine{hint}; try --device cpu."
        ) from None
    return name


def check_output_file(path: str | None, *endings: str) -> None:
    """Raises an error, before the work, if `path` cannot be a file: its folder is missing, or its ending wrong."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not path or os.path.isdir(path):
        raise IsADirectoryError(f"{path!r} is a folder: name a file to write.")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder} to write {path} in.")
    if endings and not path.endswith(endings):
        raise ValueError(f"{path} has to end in {' or '.join(endings)}.")


def check_output_dir(path: str) -> None:
    """Raises an error, before the work, if `path` cannot be a folder: it is empty, or a file is in the way."""
    if not path.strip():
        raise ValueError("--output_dir is empty: name a folder.")
    for place in (Path(path), *Path(path).parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"{place} is a file: choose another --output_dir.")


def finish_distributed() -> None:
    """
    Ends the processes of a run together: one that leaves while others still write would bring them down.

    `destroy_process_group` drops only torch's own references. A DDP model holds the group too, and the trainer around
    it is in reference cycles. Uncollected, gloo's worker threads outlive `main`, and one that releases a tensor while
    the interpreter shuts down aborts the process (pytorch issue 179291). Collected afterwards, the model ends the
    group: it waits for these threads and holds the GIL, which one that releases a tensor waits for.
    """
    from accelerate import PartialState  # not in the base install, which `push` does with

    processes = PartialState()
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        gc.collect()
        processes.destroy_process_group()  # lets go of the GIL while it waits for the threads


def _finite_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _whole_number(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if abs(value) > _LARGEST_INTEGER:
        raise argparse.ArgumentTypeError(f"must be a number of at most 64 bits, got {text}")
    return value


def _names_a_model_type(record: logging.LogRecord) -> bool:
    """False for transformers' warning that a tokenizer reads the config of a model, "a model of type ``"."""
    return "of type ``" not in record.getMessage()


def _import_users_module(name: str) -> None:
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0] and error.name != name:
                raise
            raise ValueError(f"--import_module: there is no module {name}; name one, or a .py file.") from None
        return
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"--import_module: there is no file {name}.")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where pickles, dataclasses and the export of code look a class's module up
    spec.loader.exec_module(module)

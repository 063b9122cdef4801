"""`llada-trm COMMAND ...`: finds the command and turns mistakes into one clear line."""

import dis
import importlib
import json
import os
import sys
import traceback
from typing import Any

# Nothing here imports torch or transformers, which takes seconds: commands do, when their options are right.

# Name of the command: its module and function, and what it does.
COMMANDS = {
    "demo": ("train:run_demo", "train a small model from scratch and watch the refiner help (no download, no GPU)"),
    "train": ("train:run_train", "train a refiner, or a backbone with it, from a recipe"),
    "generate": ("generate:run", "generate text from prompts"),
    "trace": ("trace:run", "show how the answer to a prompt came about: a page, a picture, data"),
    "evaluate": ("evaluate:run_evaluate", "accuracy on a dataset, with an interval and a line for every problem"),
    "calibrate": ("calibrate:run", "which chunks a hybrid refines, and when they stop: measured, and saved"),
    "compare": ("evaluate:run_compare", "evaluations of the same problems side by side"),
    "lm-eval": ("evaluate:run_lm_eval", "lm-evaluation-harness with --model llada_trm or latent_thinking"),
    "export-onnx": ("publish:export_onnx", "the forward pass of a hybrid, a backbone or a thinker as an ONNX graph"),
    "push": ("publish:push", "upload a checkpoint to the Hub, with a model card"),
    "datagen": ("datagen:run", "make hidden pairs: a language model's states before and after it thinks"),
}
# What a user can get wrong.
WRONG_PATHS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# What else has a message for the user, if it was raised for the user: a folder another run writes to, a NaN loss.
FAILURES = (RuntimeError, FloatingPointError)
# These check what users hand in; transformers_modules is a checkpoint's own code.
CHECKING_PACKAGES = {"llada_trm_hf", "transformers", "transformers_modules", "huggingface_hub", "datasets"}
CHECKING_PACKAGES |= {"accelerate", "peft", "trl", "lm_eval"}


def main(arguments: list[str] | None = None) -> int:
    """
    Runs one command. Returns 0 on success; 2 for a user's mistake, with one line on stderr; 1 for a failure, with a
    traceback if it is a bug (with LLADA_TRM_DEBUG=1 always); 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"llada-trm {sys.modules[__name__.partition('.')[0]].__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        print(f"llada-trm: unknown command {command!r}; one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[command][0].partition(":")
    try:
        getattr(importlib.import_module(f".{module}", __package__), function)(arguments[1:])
    except SystemExit as exit:  # argparse: --help or a wrong flag
        return int(exit.code or 0)
    except BrokenPipeError:  # whoever read what is printed has gone, as in `llada-trm ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter would print the same error once more)
        return 1
    except KeyboardInterrupt:
        print("\nllada-trm: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        from ..inspection.debug_report import debug_enabled

        message, code = _explain(error)
        if message is None or debug_enabled():
            traceback.print_exception(error)
        text = message or str(error) or type(error).__name__
        print(f"llada-trm {command}: {' '.join(text.split())}", file=sys.stderr)
        return code
    return 0


def _explain(error: Exception) -> tuple[str | None, int]:
    """The message for the user, None for a bug, and the exit code."""
    from huggingface_hub.errors import StrictDataclassError  # a config's field of the wrong type
    from safetensors import SafetensorError

    from ..hub.files import disk_problem

    mistakes = (ValueError, StrictDataclassError, *WRONG_PATHS)
    message = str(error) or type(error).__name__
    full = disk_problem(error)
    if full is not None:
        return full, 1
    if isinstance(error, SafetensorError):
        return f"a weights file is damaged or cut short ({error}): copy or download the checkpoint again.", 2
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; this command needs an extra: pip install 'llada-trm-hf[train,demo,eval]'.", 2
    if isinstance(error, (ImportError, json.JSONDecodeError, UnicodeDecodeError)):  # the first says what to install
        return message, 2
    if isinstance(error, OSError):
        # transformers raises a bare OSError for a model that cannot be found; the system's have a number.
        return message, 2 if isinstance(error, WRONG_PATHS) or error.errno is None else 1
    if isinstance(error, (*mistakes, *FAILURES)) and _raised_for_the_user(error):
        return message, 2 if isinstance(error, mistakes) else 1
    return None, 1


def _raised_for_the_user(error: Exception) -> bool:
    """From a `raise` in a package that checks what users hand in; from torch or the interpreter it is our bug."""
    innermost: Any = error.__traceback__
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    frame = innermost.tb_frame
    raised = frame.f_code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and str(frame.f_globals.get("__name__")).partition(".")[0] in CHECKING_PACKAGES


def _help() -> str:
    commands = "\n".join(f"  {name:<11} {description}" for name, (_, description) in COMMANDS.items())
    more = "llada-trm COMMAND --help lists a command's options; llada-trm --version."
    return f"usage: llada-trm COMMAND [options]\n\n{commands}\n\n{more}"

"""`llada-trm COMMAND ...`: finds the command and turns mistakes into one clear line."""

import importlib
import sys
import traceback

from safetensors import SafetensorError

from ..inspection.debug_report import debug_enabled

COMMANDS = {
    "demo": "train a small model from scratch and watch the refiner help (no download, no GPU)",
    "train": "train a refiner, or a backbone with it, from a recipe",
    "generate": "generate text from prompts",
    "trace": "show how the answer to a prompt came about: a page, a picture, data",
    "evaluate": "accuracy on a dataset, with an interval and a line for every problem",
    "compare": "evaluations of the same problems side by side",
    "lm-eval": "lm-evaluation-harness, with --model llada_trm and --model latent_thinking",
    "export-onnx": "the forward pass of a hybrid or a backbone as an ONNX graph",
    "push": "upload a checkpoint to the Hub, with a model card",
    "datagen": "make hidden pairs: a language model's states before and after it thinks",
}
# What a user can get wrong; anything else that is raised is a failure of ours.
USER_MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError)


def main(arguments: list[str] | None = None) -> int:
    """
    Runs one command.

    Returns:
        0 on success; 2 for a user's mistake, with one line on stderr; 1 for a failure; 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    command = arguments[0]
    if command not in COMMANDS:
        print(f"llada-trm: unknown command {command!r}; one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        importlib.import_module(f".{command.replace('-', '_')}", __package__).run(arguments[1:])
    except SystemExit as exit:  # argparse: --help or a wrong flag
        return int(exit.code or 0)
    except KeyboardInterrupt:
        print("\nllada-trm: interrupted.", file=sys.stderr)
        return 130
    except USER_MISTAKES as error:
        return _report(command, error, 2)
    except SafetensorError as error:
        damaged = f"a weights file is damaged or cut short ({error}): copy or download the checkpoint again."
        return _report(command, OSError(damaged), 2)
    except ModuleNotFoundError as error:
        hint = "the command needs more than the base install: pip install 'llada-trm-hf[train,demo,eval]'"
        return _report(command, ImportError(f"{error}; {hint}."), 2)
    except ImportError as error:  # which says itself what to install
        return _report(command, error, 2)
    except OSError as error:
        # transformers raises a bare OSError for a model that cannot be found; the system's have a number.
        return _report(command, error, 2 if error.errno is None else 1)
    except Exception as error:
        if debug_enabled():
            traceback.print_exc()
        return _report(command, error, 1)
    return 0


def _report(command: str, error: BaseException, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"llada-trm {command}: {text}", file=sys.stderr)
    return code


def _help() -> str:
    commands = "\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items())
    return f"usage: llada-trm COMMAND [options]\n\n{commands}\n\nllada-trm COMMAND --help lists a command's options."

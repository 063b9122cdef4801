"""Checkpoints to resume from: which is complete, what in it is damaged, whether the settings are still the same."""

import glob
import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..hub.training_record import TRAINING_SETTINGS_FILE, read_json

logger = logging.get_logger(__name__)

UNFINISHED = ".unfinished"  # the folder, within the output folder, where a checkpoint lies until all of it is written
# Settings of transformers and TRL on which the weights at the end depend. (Of the package's own, all but those below.)
_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16"),
    *("seed", "data_seed", "max_steps", "num_train_epochs", "gradient_accumulation_steps"),
    *(
        "num_generations",
        "num_iterations",
        "max_completion_length",
        "beta",
        "temperature",
        "top_p",
        "top_k",
        "epsilon",
    ),
)
_WITHOUT_EFFECT = (
    *("hub_strategy", "logging_nan_inf_filter", "remove_unused_columns", "per_device_train_batch_size"),
    *("early_stopping_patience", "early_stopping_threshold", "profile_steps", "save_backbone", "resume_with_changes"),
)
_NUM_HASHED_ROWS = 32
_PACKAGE = __name__.partition(".")[0]


# --- Finding a checkpoint ---


def trainer_state_problem(folder: str) -> str | None:
    """Why the `trainer_state.json` in a folder, which is written last, cannot be read; None if it can."""
    path = os.path.join(folder, TRAINER_STATE_NAME)
    if not os.path.isfile(path):
        return f"{path} is missing"
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return f"{path} is damaged or cut short"
    return None if isinstance(state, dict) and "global_step" in state else f"{path} is not the state of a training run"


def checkpoints_in(folder: str) -> tuple[list[str], list[str]]:
    """The complete checkpoints of a run, the last one at the end, and why each of the others cannot be resumed."""
    numbered = {}
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdecimal():
            numbered[int(number)] = os.path.join(folder, path.name)
    ordered = [numbered[number] for number in sorted(numbered)]
    problems = {path: trainer_state_problem(path) for path in ordered}
    return [path for path in ordered if problems[path] is None], [found for found in problems.values() if found]


def remove_leftovers(folder: str) -> None:
    """Removes what a run that was killed while it saved left in its output folder, and says so."""
    unfinished = os.path.join(folder, UNFINISHED)
    if os.path.isdir(unfinished):
        names = ", ".join(sorted(os.listdir(unfinished))) or "a checkpoint"
        logger.warning(f"An earlier run was stopped while it saved {names}: the unfinished files are removed.")
        shutil.rmtree(unfinished)
    path = os.path.join(folder, TRAINER_STATE_NAME)
    if os.path.isfile(path) and trainer_state_problem(folder):
        logger.warning(f"{path} was not written to its end: it is removed, and written again when the run has ended.")
        os.remove(path)


# --- What a checkpoint holds ---


def check_files(checkpoint: str, *names: str) -> None:
    """
    Raises ValueError naming which of these files, as `torch.save` writes them, `checkpoint` lacks or cannot be read.
    (`torch.load` checks that a file is whole, but not the tensors in it.)
    """
    missing = [path for name in names if not os.path.isfile(path := os.path.join(checkpoint, name))]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing. {_remedy(checkpoint)}")
    for path in (os.path.join(checkpoint, name) for name in names):
        try:
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip() if torch.serialization.get_crc32_options() else None
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError) as error:
            raise _damaged(path, error) from error
        if wrong is not None:
            raise _damaged(path, f"the checksum of {wrong}")


def check_trainer_state(checkpoint: str) -> None:
    """Raises ValueError if the `trainer_state.json` of `checkpoint` is missing or damaged."""
    problem = trainer_state_problem(checkpoint)
    if problem is not None:
        raise ValueError(f"{problem}. {_remedy(checkpoint)}")


def raise_if_weights_are_damaged(checkpoint: str) -> None:
    """Raises ValueError naming the first file of weights, of the model or the trainer, that cannot be read."""
    for path in sorted(glob.glob(os.path.join(glob.escape(checkpoint), "*.safetensors"))):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise _damaged(path, error) from error


def _damaged(path: str, reason: object) -> ValueError:
    return ValueError(f"{path} is damaged or cut short ({reason}). {_remedy(os.path.dirname(path))}")


def _remedy(checkpoint: str) -> str:
    return (
        f"Copy {os.path.basename(checkpoint)} again, resume from another with --resume_from_checkpoint FOLDER, or "
        f"start a new run in another --output_dir."
    )


# --- The settings of a run ---


def run_settings(
    args: TrainingArguments, dataset: Any, description: dict[str, str] | None, recipe: dict[str, Any] | None
) -> dict[str, Any]:
    """
    On what the weights at the end depend, as JSON has it: settings of the trainer and the recipe, and which data.

    Args:
        dataset: the training data, of which a hash is kept.
        description: of the data, with its `name` and `split`.
        recipe: the recipe's own settings.
    """
    ours = [name for cls in type(args).__mro__ if cls.__module__.startswith(_PACKAGE) for name in cls.__annotations__]
    names = dict.fromkeys(name for name in (*_SETTINGS, *ours) if name not in _WITHOUT_EFFECT and hasattr(args, name))
    described = {f"dataset {name}": (description or {}).get(name) for name in ("name", "split")}
    settings = {name: getattr(args, name) for name in names} | {
        "batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "number of processes": args.world_size,
        **described,
        "training data": dataset_digest(dataset),
        **(recipe or {}),
    }
    return {name: _as_json(value) for name, value in settings.items()}


def dataset_digest(dataset: Any) -> str | None:
    """Number of rows and a hash of some of them, or of the ids of hidden pairs; None for a stream."""
    order: Any = None
    if isinstance(dataset, Subset):
        dataset, order = dataset.dataset, dataset.indices
    if not hasattr(dataset, "__len__"):
        return None
    number = len(dataset) if order is None else len(order)
    rows: Any = None
    if isinstance(dataset, Dataset):
        chosen = range(0, number, max(number // _NUM_HASHED_ROWS, 1))
        rows = dataset.select(chosen if order is None else [order[row] for row in chosen]).to_list()
    elif hasattr(dataset, "ids"):
        rows = list(dataset.ids) if order is None else [dataset.ids[row] for row in order]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{number} rows, {digest}"


def check_settings(checkpoint: str, settings: dict[str, Any], may_differ: bool) -> None:
    """
    Raises ValueError naming each setting that is not as the run that made `checkpoint` had it; a warning if they
    `may_differ`. Checkpoints of earlier versions tell less.
    """
    recorded = read_json(os.path.join(checkpoint, TRAINING_SETTINGS_FILE))
    before = recorded.get("run")
    if before is None:
        before = {name: recorded[name] for name in ("learning_rate", "batch_size", "seed") if name in recorded}
        if settings["max_steps"] > 0:
            before["max_steps"] = read_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).get("max_steps")
    changes = [
        f"{name}={old!r} (now {settings[name]!r})"
        for name, old in before.items()
        if name in settings and settings[name] != old
    ]
    if changes and not may_differ:
        raise ValueError(
            f"{checkpoint} was made with {', '.join(changes)}. Give the old values to go on with that run, "
            f"--resume_with_changes true to go on with the new ones, or another --output_dir for a new run."
        )
    if changes:
        logger.warning(f"The run goes on with changes, and so {checkpoint} was made with {', '.join(changes)}.")


def optimizer_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What is set of each parameter group, such as its learning rate."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore_optimizer_settings(
    optimizer: torch.optim.Optimizer, scheduler: Any, settings: list[dict[str, Any]]
) -> None:
    """Undoes what loading a checkpoint changed of them: the run goes on with these, at its place in the schedule."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [own["initial_lr"] for own in settings]
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
            group["lr"] = base * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _as_json(value: Any) -> Any:
    """As it will be when it was written and read again."""
    return json.loads(json.dumps(value.value if isinstance(value, Enum) else value, default=str))


# --- Quantised backbones ---


@contextmanager
def quantized_backbone_kept(model: Any) -> Iterator[None]:
    """
    Within it, `model.load_state_dict` leaves what does not train of a quantised backbone as it is: quantised weights
    are saved in a form that it cannot load. ValueError if they are others than those of the checkpoint.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not hasattr(model, "backbone"):
        yield
        return
    load_state_dict = model.load_state_dict

    def load(state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """`load_state_dict` that compares what is quantised instead of loading it."""
        trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
        kept = {n: tensor for n, tensor in state_dict.items() if n.startswith("backbone.") and n not in trainable}
        present, _ = quantizer.get_state_dict_and_metadata(model)
        for name, tensor in kept.items():
            # (Scales in floating point may be stored in another format on another device.)
            if tensor.is_floating_point():
                continue
            if name not in present or not torch.equal(present[name].cpu(), tensor.cpu()):
                raise ValueError(f"{name} is not as in the checkpoint: resume on the backbone it was quantised from.")
        others = {name: tensor for name, tensor in state_dict.items() if name not in kept}
        result = load_state_dict(others, *args, **kwargs)
        result.missing_keys[:] = [name for name in result.missing_keys if not name.startswith("backbone.")]
        return result

    model.load_state_dict = load
    try:
        yield
    finally:
        del model.load_state_dict

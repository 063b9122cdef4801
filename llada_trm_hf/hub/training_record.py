"""What a training run leaves beside the weights: its settings, how long it took, what the last evaluation found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers

from .files import write_text

if TYPE_CHECKING:  # the card of a model that is saved needs neither, and the second takes a second
    from transformers import PreTrainedModel, TrainingArguments

TRAINING_SETTINGS_FILE = "training_settings.json"
# Logged by an evaluation, but not about the model.
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
# Settings that are written unless they have no effect (0, None, False). None names a person, a machine or a token.
_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "seed",
    "use_ema",
    "ema_decay",
    "use_muon",
)


class TrainingRecord(NamedTuple):
    """What a folder says of the run; empty or None where it says nothing."""

    settings: dict[str, Any]
    data: dict[str, str]  # `name`, `hub_name`, `split` and `eval_split` of the dataset
    num_steps: int | None
    num_epochs: float | None
    metrics: dict[str, float]  # of the saved weights, else of the last evaluation, without the prefix `eval_`
    metrics_step: int | None
    weights_step: int | None


def write_training_settings(
    folder: str,
    model: PreTrainedModel,
    args: TrainingArguments,
    data: dict[str, str] | None = None,
    run: dict[str, Any] | None = None,
) -> None:
    """
    Writes `training_settings.json`; for `data` see [`TrainingRecord`]. What is in `run` has to be the same when the
    run is resumed.
    """
    settings = {name: getattr(args, name, None) for name in _SETTINGS}
    if not settings["use_ema"]:
        settings["ema_decay"] = None
    parameters = list(model.parameters())
    rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    content = {
        "data": data,
        **{name: value for name, value in settings.items() if value},
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "batch_size": rows,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "load_best_model_at_end": args.load_best_model_at_end,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "run": run,
    }
    write_text(os.path.join(folder, TRAINING_SETTINGS_FILE), json.dumps(content, indent=2))


def read_training_record(folder: str | os.PathLike) -> TrainingRecord:
    """From `training_settings.json` and `trainer_state.json`; pickles such as `training_args.bin` are not opened."""
    settings, state = read_json(Path(folder, TRAINING_SETTINGS_FILE)), read_json(Path(folder, "trainer_state.json"))
    data = settings.pop("data", None) or {}
    settings.pop("run", None)
    step = state.get("global_step")
    if settings.pop("load_best_model_at_end", False) and state.get("best_global_step"):
        step = state["best_global_step"]
    evaluations = [row for row in state.get("log_history", ()) if "eval_loss" in row]
    row = next((row for row in evaluations if row.get("step") == step), evaluations[-1] if evaluations else {})
    metrics = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
    return TrainingRecord(
        settings=settings,
        data=data,
        num_steps=state.get("global_step"),
        num_epochs=state.get("epoch"),
        metrics={name: value for name, value in metrics.items() if name not in _NOT_METRICS},
        metrics_step=row.get("step"),
        weights_step=step,
    )


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file; a ValueError for anything else."""
    if not os.path.isfile(path):
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content

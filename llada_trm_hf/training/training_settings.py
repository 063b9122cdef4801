"""The settings of a run that its model card shows."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, TrainingArguments

# Those without effect (0, None, False) are left out. Nothing here names a person, a machine or a token.
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


def training_settings(
    model: PreTrainedModel, args: TrainingArguments, data: dict[str, str] | None = None
) -> dict[str, Any]:
    """
    What `training_settings.json` holds.

    Args:
        model: with gradients where it trains.
        args: of the run.
        data: describes the dataset; see `BaseTrainer.data_description`.
    """
    settings = {name: getattr(args, name, None) for name in _SETTINGS}
    if not settings["use_ema"]:
        settings["ema_decay"] = None
    parameters = list(model.parameters())
    rows = args.per_device_train_batch_size * max(args.n_gpu, 1) * args.world_size * args.gradient_accumulation_steps
    return {
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
    }

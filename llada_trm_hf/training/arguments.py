"""Arguments of the trainers; what each field does is its `help`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import HubStrategy

_POSITIVE, _NOT_NEGATIVE, _SEED = (1, math.inf), (0, math.inf), (0, 2**32 - 1)
# The least and the largest value of settings that are numbers.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length", "save_total_limit"), _POSITIVE),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _POSITIVE),
    **dict.fromkeys(("compressed_size", "num_latents", "n_layers", "n_heads", "chunk_size"), _POSITIVE),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon"), _NOT_NEGATIVE),
    **dict.fromkeys(("logging_steps", "eval_steps", "dataloader_num_workers"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "dropout"), (0, 1)),
    "num_terms": (2, 1000),
}


def check_ranges(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a number that libraries take as it is and fail on later, or not at all."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}.")
        least, most = _RANGES.get(name, (-math.inf, math.inf))
        if not least <= value <= most:
            expected = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise ValueError(f"{name} must be {expected}, got {value}.")
    number = settings.get("max_steps")
    if isinstance(number, (int, float)) and number < 1 and number != -1:
        raise ValueError(f"max_steps must be at least 1 (-1: num_train_epochs decides), got {number}.")
    for name, remedy in (("num_train_epochs", ""), ("save_steps", " (save_strategy=no saves nothing)")):
        number = settings.get(name)
        if isinstance(number, (int, float)) and not number > 0:
            raise ValueError(f"{name} must be above 0{remedy}, got {number}.")


def learning_rate_field(default: float) -> Any:
    """`learning_rate`, or `--lr` for short, with another default."""
    return HfArg(default=default, aliases=["--lr"], help="The initial learning rate of AdamW.")


@dataclass
class CommonTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with what the package's trainers share. `--lr`, `--batch_size` and `--num_epochs` are short for
    `learning_rate`, `per_device_train_batch_size` and `num_train_epochs`.
    """

    learning_rate: float = learning_rate_field(5e-5)
    per_device_train_batch_size: int = HfArg(default=8, aliases=["--batch_size"], help="Training rows per device.")
    num_train_epochs: float = HfArg(default=3.0, aliases=["--num_epochs"], help="Total number of training epochs.")
    remove_unused_columns: bool = HfArg(default=False, help="Off: the collator needs columns the model does not.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Off: a loss of NaN stops the run, and is not hidden.")
    hub_strategy: HubStrategy | str = HfArg(
        default="end",
        help="What push_to_hub uploads: 'end' the finished model, 'every_save' that of each checkpoint too, "
        "'checkpoint' and 'all_checkpoints' also what it takes to resume.",
    )
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after this many evaluations without a better metric_for_best_model."
    )
    early_stopping_threshold: float = HfArg(default=0.0, help="Less than this is no improvement.")
    resume_with_changes: bool = HfArg(
        default=False,
        help="Resume with another learning rate, batch size, seed, length or data than the run began with.",
    )
    profile_steps: int | None = HfArg(
        default=None, help="Record so many steps, from the third on, as profile.txt and profile.json."
    )

    def __getstate__(self) -> dict[str, Any]:
        """Without the Hub token: the Trainer pickles its arguments into checkpoints."""
        return {**self.__dict__, "hub_token": None}

    def __post_init__(self):
        check_ranges(vars(self))
        super().__post_init__()
        for name in ("profile_steps", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} would replace the model's own loss by the "
                f"Trainer's, over all labels: leave it out."
            )
        no_metric = self.eval_strategy == "no" or self.metric_for_best_model is None
        if self.early_stopping_patience is not None and no_metric:
            raise ValueError(
                "early_stopping_patience needs evaluations and a metric: set eval_strategy, and metric_for_best_model "
                "or load_best_model_at_end."
            )


@dataclass
class EMATrainingArguments(CommonTrainingArguments):
    """[`CommonTrainingArguments`] of [`EMATrainer`]."""

    use_ema: bool = HfArg(default=False, help="Evaluate and save an exponential moving average of the weights.")
    ema_decay: float = HfArg(default=0.999, help="Each step, average = decay * average + (1 - decay) * weights.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}.")


@dataclass
class MaskedDiffusionTrainingArguments(EMATrainingArguments):
    """
    [`EMATrainingArguments`] with the settings of the forward process and the optimizer. Muon's updates are scaled to
    the size of AdamW's, so the same learning rate works for both.
    """

    mask_epsilon: float = HfArg(default=1e-3, help="Smallest masking probability: p_mask = (1 - eps) t + eps.")
    learn_padding: bool = HfArg(default=True, help="Pad with the end of the sequence and learn it, as in LLaDA's SFT.")
    random_length_probability: float = HfArg(
        default=0.0, help="Share of rows cut to a random length (0.01 in LLaDA's pre-training)."
    )
    save_backbone: bool = HfArg(default=True, help="Whether checkpoints of a hybrid hold the backbone too.")
    use_muon: bool = HfArg(default=False, help="Muon for the matrices of the hidden layers; optim for all the rest.")
    muon_learning_rate: float | None = HfArg(default=None, help="Initial learning rate of Muon; learning_rate.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_epsilon <= 1:
            raise ValueError(f"mask_epsilon must be above 0 and at most 1, got {self.mask_epsilon}.")
        if not 0 <= self.random_length_probability <= 1:
            raise ValueError(
                f"random_length_probability must be between 0 and 1, got {self.random_length_probability}."
            )
        if self.muon_learning_rate is not None and not self.use_muon:
            raise ValueError(f"muon_learning_rate={self.muon_learning_rate} has no effect without use_muon.")


@dataclass
class CompressorTrainingArguments(CommonTrainingArguments):
    """[`CommonTrainingArguments`] of [`CompressorTrainer`]."""

    learning_rate: float = learning_rate_field(1e-3)
    weight_decay: float = HfArg(default=0.01, help="Weight decay of AdamW.")

    def __post_init__(self):
        super().__post_init__()
        # Evaluation collects hidden states on the CPU, batch by batch, since lengths differ.
        self.eval_do_concat_batches = False
        self.eval_accumulation_steps = 1


@dataclass
class LatentAnswerTrainingArguments(CommonTrainingArguments):
    """[`CommonTrainingArguments`] of [`LatentAnswerTrainer`]."""

    learning_rate: float = learning_rate_field(1e-4)
    save_backbone: bool = HfArg(
        default=True, help="Whether checkpoints hold the backbone too; without it they need the one they name."
    )


@dataclass
class TRMTrainingArguments(EMATrainingArguments):
    """
    [`EMATrainingArguments`] with the settings of [`TRMTrainer`]. Those that are None by default override a field of
    the model's config: `bce_halt_loss` sets `halt_loss`, `halt_threshold` sets `cosine_threshold`, and the others
    the fields of the same names.
    """

    learning_rate: float = learning_rate_field(1e-4)
    weight_decay: float = HfArg(default=0.1, help="Weight decay of AdamW.")
    adam_beta2: float = HfArg(default=0.95, help="Beta2 of AdamW.")
    per_step_updates: bool = HfArg(
        default=True, help="An optimizer step after every supervision step, or one per batch on their mean loss."
    )
    use_ema: bool = HfArg(default=True, help="Evaluate and save an exponential moving average of the weights.")
    adaptive_halt_threshold: bool = HfArg(
        default=False, help="Raise halt_threshold after each epoch to 0.95 times its mean cosine similarity."
    )
    bce_halt_loss: bool | None = HfArg(
        default=None, help="Halting learns if the cosine is above halt_threshold (BCE), or else the cosine (MSE)."
    )
    halt_threshold: float | None = HfArg(default=None, help="Cosine similarity above which a sample is solved.")
    halt_loss_weight: float | None = HfArg(default=None, help="Weight of the halting loss.")
    n_latent_steps: int | None = HfArg(default=None, help="Updates of z in a latent recursion.")
    n_deep_recursions: int | None = HfArg(default=None, help="Latent recursions in a supervision step.")
    n_trained_recursions: int | None = HfArg(default=None, help="How many of them, the last, have gradients.")
    n_supervision_steps: int | None = HfArg(default=None, help="Supervision steps for each batch.")
    max_free_steps: int | None = HfArg(default=None, help="Most steps without gradient before a batch's first.")
    free_steps_probability: float | None = HfArg(default=None, help="Share of batches with such steps.")

    def __post_init__(self):
        super().__post_init__()
        if self.halt_threshold is not None and not -1 <= self.halt_threshold <= 1:
            raise ValueError(f"halt_threshold is a cosine, between -1 and 1; got {self.halt_threshold}.")

    def config_fields(self) -> dict[str, object]:
        """The fields of `SequenceTRMConfig` that are set here."""
        fields: dict[str, object] = {
            "cosine_threshold": self.halt_threshold,
            "halt_loss": {None: None, True: "bce", False: "mse"}[self.bce_halt_loss],
            "halt_loss_weight": self.halt_loss_weight,
            "n_latent_steps": self.n_latent_steps,
            "n_deep_recursions": self.n_deep_recursions,
            "n_trained_recursions": self.n_trained_recursions,
            "n_supervision_steps": self.n_supervision_steps,
            "max_free_steps": self.max_free_steps,
            "free_steps_probability": self.free_steps_probability,
        }
        return {name: value for name, value in fields.items() if value is not None}

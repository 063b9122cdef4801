"""Arguments of the trainers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy


def _learning_rate(default: float) -> Any:
    return field(default=default, metadata={"aliases": ["--lr"], "help": "The initial learning rate of AdamW."})


@dataclass
class CommonTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with what the package's trainers share. `--lr`, `--batch_size` and `--num_epochs` are short for
    `learning_rate`, `per_device_train_batch_size` and `num_train_epochs`.

    Args:
        early_stopping_patience: stop after this many evaluations without a better `metric_for_best_model`.
        early_stopping_threshold: how much better it has to be.
        profile_steps: record this many optimizer steps, from the third on, with `torch.profiler`: the table
            `profile.txt` and the trace `profile.json` in the output folder.
        hub_strategy: only `"end"`: `push_to_hub` uploads the finished model, not the checkpoints before it.
    """

    learning_rate: float = _learning_rate(5e-5)
    per_device_train_batch_size: int = field(
        default=8, metadata={"aliases": ["--batch_size"], "help": "The batch size per device in training."}
    )
    num_train_epochs: float = field(
        default=3.0, metadata={"aliases": ["--num_epochs"], "help": "Total number of training epochs."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Off: the collator needs columns the model does not."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is NaN stops the run instead of being hidden."}
    )
    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "With push_to_hub, when to upload: at the end."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without improvement."}
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "Less than this is no improvement."})
    profile_steps: int | None = field(
        default=None, metadata={"help": "Record so many steps with torch.profiler: profile.txt and profile.json."}
    )

    def __getstate__(self) -> dict[str, Any]:
        """Without the Hub token: the Trainer pickles its arguments into checkpoints."""
        return {**self.__dict__, "hub_token": None}

    def __post_init__(self):
        super().__post_init__()
        if self.profile_steps is not None and self.profile_steps < 1:
            raise ValueError(f"profile_steps must be at least 1, got {self.profile_steps}.")
        strategy = HubStrategy(self.hub_strategy)
        if self.push_to_hub and strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy must be 'end', got {strategy.value!r}: earlier uploads would lack the model's code and "
                f"hold pickles. Upload a checkpoint with llada-trm push."
            )
        if self.early_stopping_patience is None:
            return
        if self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1, got {self.early_stopping_patience}.")
        if self.eval_strategy == "no" or self.metric_for_best_model is None:
            raise ValueError(
                "early_stopping_patience needs evaluations and a metric: set eval_strategy, and metric_for_best_model "
                "or load_best_model_at_end."
            )


@dataclass
class EMATrainingArguments(CommonTrainingArguments):
    """
    [`CommonTrainingArguments`] of [`EMATrainer`].

    Args:
        use_ema: keep an exponential moving average of the weights that train; evaluate and save the average.
        ema_decay: after every optimizer step `average = decay * average + (1 - decay) * weights`.
    """

    use_ema: bool = field(default=False, metadata={"help": "Evaluate and save an average of the weights."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of that average."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}.")


@dataclass
class MaskedDiffusionTrainingArguments(EMATrainingArguments):
    """
    [`EMATrainingArguments`] with the settings of the forward process and the optimizer.

    Args:
        mask_epsilon: smallest masking probability; `p_mask = (1 - eps) t + eps`.
        learn_padding: pad responses with the end-of-sequence token and learn it, as LLaDA's fine-tuning does.
        random_length_probability: share of rows cut to a random length; 0.01 in LLaDA's pre-training.
        save_backbone: whether checkpoints of a hybrid hold the backbone too.
        use_muon: train the matrices of the hidden layers with `torch.optim.Muon`, and embeddings, LM head, norms,
            biases and stacked experts as `optim` says.
        muon_learning_rate: of Muon, whose updates are scaled to the size of AdamW's; `learning_rate` by default.
    """

    mask_epsilon: float = field(default=1e-3, metadata={"help": "Smallest masking probability."})
    learn_padding: bool = field(default=True, metadata={"help": "Learn the padding after a response as its end."})
    random_length_probability: float = field(
        default=0.0, metadata={"help": "Share of rows cut to a random length (pre-training: 0.01)."}
    )
    save_backbone: bool = field(
        default=True, metadata={"help": "Whether checkpoints of a hybrid hold the backbone too."}
    )
    use_muon: bool = field(default=False, metadata={"help": "Muon for the matrices of the hidden layers."})
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "The initial learning rate of Muon; learning_rate by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_epsilon <= 1:
            raise ValueError(f"mask_epsilon must be above 0 and at most 1, got {self.mask_epsilon}.")
        if not 0 <= self.random_length_probability <= 1:
            raise ValueError(
                f"random_length_probability must be between 0 and 1, got {self.random_length_probability}."
            )
        if self.use_muon and not hasattr(torch.optim, "Muon"):
            raise ValueError(f"use_muon needs torch 2.9 or newer, this is {torch.__version__}.")
        if self.muon_learning_rate is not None and not self.use_muon:
            raise ValueError(f"muon_learning_rate={self.muon_learning_rate} has no effect without use_muon.")


@dataclass
class CompressorTrainingArguments(CommonTrainingArguments):
    """[`CommonTrainingArguments`] with the defaults for a compressor: AdamW, learning rate 1e-3, weight decay 0.01."""

    learning_rate: float = _learning_rate(1e-3)
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})

    def __post_init__(self):
        super().__post_init__()
        # Evaluation collects hidden states on the CPU, batch by batch, since lengths differ.
        self.eval_do_concat_batches = False
        self.eval_accumulation_steps = 1


@dataclass
class LatentAnswerTrainingArguments(CommonTrainingArguments):
    """
    [`CommonTrainingArguments`] of [`LatentAnswerTrainer`].

    Args:
        save_backbone: whether checkpoints hold the backbone too. Without it they need the one they name.
    """

    learning_rate: float = _learning_rate(1e-4)
    save_backbone: bool = field(default=True, metadata={"help": "Whether checkpoints hold the backbone too."})


@dataclass
class TRMTrainingArguments(EMATrainingArguments):
    """
    [`EMATrainingArguments`] with the settings of [`TRMTrainer`]. Those that are None by default override a field of
    the model's config.

    Args:
        per_step_updates: an optimizer step after every supervision step; otherwise one per batch, on the mean loss of
            its supervision steps.
        adaptive_halt_threshold: raise the threshold after each epoch to 0.95 times its mean cosine similarity.
        bce_halt_loss: the halting head learns whether the prediction's cosine similarity to the target is above a
            threshold (binary cross-entropy); if False, the similarity itself (squared error). `config.halt_loss`.
        halt_threshold: that threshold. `config.cosine_threshold`.
        halt_loss_weight, n_latent_steps, n_deep_recursions, n_supervision_steps: the fields of the same names.
    """

    learning_rate: float = _learning_rate(1e-4)
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    per_step_updates: bool = field(
        default=True, metadata={"help": "An optimizer step after every supervision step, or one per batch."}
    )
    use_ema: bool = field(default=True, metadata={"help": "Evaluate and save an average of the weights."})
    adaptive_halt_threshold: bool = field(
        default=False, metadata={"help": "Raise halt_threshold after each epoch to 0.95 times its mean cosine."}
    )
    bce_halt_loss: bool | None = field(
        default=None, metadata={"help": "Halting learns if the cosine is above halt_threshold, or else the cosine."}
    )
    halt_threshold: float | None = field(default=None, metadata={"help": "Cosine above which a sample is solved."})
    halt_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the halting loss."})
    n_latent_steps: int | None = field(default=None, metadata={"help": "Updates of z in a latent recursion."})
    n_deep_recursions: int | None = field(default=None, metadata={"help": "Latent recursions in a supervision step."})
    n_supervision_steps: int | None = field(default=None, metadata={"help": "Supervision steps for each batch."})

    def __post_init__(self):
        super().__post_init__()
        if self.halt_threshold is not None and not -1 <= self.halt_threshold <= 1:
            raise ValueError(f"halt_threshold is a cosine, between -1 and 1; got {self.halt_threshold}.")

    def config_fields(self) -> dict[str, object]:
        """The fields of `SequenceTRMConfig` that are set here."""
        fields: dict[str, object] = {
            "cosine_threshold": self.halt_threshold,
            "halt_loss_weight": self.halt_loss_weight,
            "n_latent_steps": self.n_latent_steps,
            "n_deep_recursions": self.n_deep_recursions,
            "n_supervision_steps": self.n_supervision_steps,
        }
        if self.bce_halt_loss is not None:
            fields["halt_loss"] = "bce" if self.bce_halt_loss else "mse"
        return {name: value for name, value in fields.items() if value is not None}

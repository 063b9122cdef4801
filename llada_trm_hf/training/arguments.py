"""Arguments of the masked-diffusion trainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class MaskedDiffusionTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the settings of the forward process. `--lr`, `--batch_size` and `--num_epochs` are short
    for `learning_rate`, `per_device_train_batch_size` and `num_train_epochs`.

    Args:
        mask_epsilon: smallest masking probability; `p_mask = (1 - eps) t + eps`.
        learn_padding: pad responses with the end-of-sequence token and learn it, as LLaDA's fine-tuning does.
        random_length_probability: share of rows cut to a random length; 0.01 in LLaDA's pre-training.
        save_backbone: whether checkpoints of a hybrid hold the backbone too.
    """

    learning_rate: float = field(
        default=5e-5, metadata={"aliases": ["--lr"], "help": "The initial learning rate of AdamW."}
    )
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
    mask_epsilon: float = field(default=1e-3, metadata={"help": "Smallest masking probability."})
    learn_padding: bool = field(default=True, metadata={"help": "Learn the padding after a response as its end."})
    random_length_probability: float = field(
        default=0.0, metadata={"help": "Share of rows cut to a random length (pre-training: 0.01)."}
    )
    save_backbone: bool = field(
        default=True, metadata={"help": "Whether checkpoints of a hybrid hold the backbone too."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_epsilon <= 1:
            raise ValueError(f"mask_epsilon must be above 0 and at most 1, got {self.mask_epsilon}.")
        if not 0 <= self.random_length_probability <= 1:
            raise ValueError(
                f"random_length_probability must be between 0 and 1, got {self.random_length_probability}."
            )

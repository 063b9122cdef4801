"""Arguments of GRPO."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from ..training.arguments import CommonTrainingArguments

# Checkpointing needs training mode, a synchronised reference would overwrite the backbone it shares, and the others
# replace the model's own generation or expect an `lm_head`.
_UNSUPPORTED = (
    "gradient_checkpointing",
    "sync_ref_model",
    "use_vllm",
    "use_transformers_continuous_batching",
    "use_liger_kernel",
    "cast_lm_head_to_fp32",
)


@dataclass
class LatentGRPOTrainingArguments(CommonTrainingArguments, GRPOConfig):
    """
    TRL's `GRPOConfig` (`num_generations`, `max_completion_length`, `temperature`, `beta`, `num_iterations`, ...) and
    [`CommonTrainingArguments`], whose defaults win.

    Args:
        curriculum: order the problems from easy to hard, by the initial model's share of right samples. With
            `max_steps`, only as many problems as the run will see.
        curriculum_samples: samples of each problem for this; `num_generations` by default.
        drop_uninformative: leave out problems that all or none of these samples solve: there is nothing to compare.
        save_backbone: whether checkpoints hold the backbone too. Without it they need the one they name.

    Raises:
        ValueError: for fewer than 2 samples, batches that do not divide into groups of samples, and settings of TRL
            that do not work with latent thoughts.
    """

    learning_rate: float = field(
        default=1e-5, metadata={"aliases": ["--lr"], "help": "The initial learning rate of AdamW."}
    )
    curriculum: bool = field(
        default=False, metadata={"help": "Order the problems from easy to hard, by the model's own pass rate."}
    )
    curriculum_samples: int | None = field(
        default=None, metadata={"help": "Samples of a problem that measure its pass rate; num_generations."}
    )
    drop_uninformative: bool = field(
        default=False, metadata={"help": "Leave out problems that all or none of these samples solve."}
    )
    save_backbone: bool = field(default=True, metadata={"help": "Whether checkpoints hold the backbone too."})

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, answers to compare; got {self.num_generations}.")
        for name in _UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(f"{name} does not work with latent thoughts: leave it out.")
        super().__post_init__()
        if self.curriculum_samples is not None and self.curriculum_samples < 1:
            raise ValueError(f"curriculum_samples must be at least 1, got {self.curriculum_samples}.")
        if not self.curriculum and (self.drop_uninformative or self.curriculum_samples is not None):
            raise ValueError("drop_uninformative and curriculum_samples have no effect without curriculum.")

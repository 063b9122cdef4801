"""Arguments of GRPO; what each field does is its `help`."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg
from trl import GRPOConfig

from ..training.arguments import CommonTrainingArguments, learning_rate_field

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
    [`CommonTrainingArguments`], whose defaults win. With `curriculum` and `max_steps`, only as many problems are
    measured as the run will see. Settings of TRL that do not work with latent thoughts raise ValueError.
    """

    learning_rate: float = learning_rate_field(1e-5)
    curriculum: bool = HfArg(
        default=False, help="Order the problems from easy to hard, by the initial model's share of right samples."
    )
    curriculum_samples: int | None = HfArg(default=None, help="Samples that measure this share; num_generations.")
    drop_uninformative: bool = HfArg(default=False, help="Leave out problems that all or none of these samples solve.")
    save_backbone: bool = HfArg(
        default=True, help="Whether checkpoints hold the backbone too; without it they need the one they name."
    )

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

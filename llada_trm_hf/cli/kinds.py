"""The kinds of training a recipe can ask for."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..training.arguments import (
    CompressorTrainingArguments,
    LatentAnswerTrainingArguments,
    MaskedDiffusionTrainingArguments,
    TRMTrainingArguments,
)
from ..training.recipe_arguments import (
    CompressorRecipeArguments,
    LatentAnswerRecipeArguments,
    RecipeArguments,
    TRMRecipeArguments,
)
from ..training.run import run_training
from ..training.run_compressor import run_compressor_training
from ..training.run_latent_answer import run_latent_answer_training
from ..training.run_trm import run_trm_training


@dataclass(frozen=True)
class TrainingKind:
    """
    Attributes:
        recipe_arguments: dataclass of what is trained on what.
        training_arguments: the arguments of the trainer.
        run: trains, from an instance of each.
    """

    recipe_arguments: type
    training_arguments: type
    run: Callable[[Any, Any], Any]

    def field_names(self) -> list[str]:
        """The keys a recipe of this kind may have."""
        return [field.name for part in (self.recipe_arguments, self.training_arguments) for field in fields(part)]


def _grpo() -> TrainingKind:
    """Imported where it is asked for: TRL is optional, and takes seconds."""
    from ..rl.arguments import GRPORecipeArguments, LatentGRPOTrainingArguments
    from ..rl.run_grpo import run_grpo_training

    return TrainingKind(GRPORecipeArguments, LatentGRPOTrainingArguments, run_grpo_training)


DEFAULT_KIND = "masked_diffusion"
KINDS: dict[str, Callable[[], TrainingKind]] = {
    DEFAULT_KIND: lambda: TrainingKind(RecipeArguments, MaskedDiffusionTrainingArguments, run_training),
    "compressor": lambda: TrainingKind(
        CompressorRecipeArguments, CompressorTrainingArguments, run_compressor_training
    ),
    "trm": lambda: TrainingKind(TRMRecipeArguments, TRMTrainingArguments, run_trm_training),
    "latent_answer": lambda: TrainingKind(
        LatentAnswerRecipeArguments, LatentAnswerTrainingArguments, run_latent_answer_training
    ),
    "grpo": _grpo,
}

"""A training run of GRPO on latent thoughts."""

from typing import Literal

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..data import latent_thinking_prompt, load_reasoning_dataset
from ..data.reasoning import column_mapping
from ..data.rows import check_prompts
from ..evaluation.code_execution import ExecutionLimits
from ..evaluation.scoring import scoring_kind
from ..models import LatentThinkingConfig, LatentThinkingForCausalLM
from ..storage import output_dir_lock
from ..training.freezing import set_trainable
from ..training.output_folder import checkpoint_to_resume, train_and_save
from ..training.samples import check_folder, check_length, describe_data, pretrained_tokenizer, splits
from .arguments import GRPORecipeArguments, LatentGRPOTrainingArguments
from .grpo_trainer import LatentGRPOTrainer
from .rewards import correctness_reward


def run_grpo_training(what: GRPORecipeArguments, training: LatentGRPOTrainingArguments) -> LatentGRPOTrainer:
    """
    Trains as the settings say and saves the model and its tokenizer in `training.output_dir`.

    Raises:
        ValueError, OSError: for settings that cannot work, before anything is written.
        RuntimeError: if another run is writing to the folder.
        FloatingPointError: if weights become NaN.
    """
    if what.checkpoint is None:
        raise ValueError("Say what is to learn: --checkpoint with a latent-thinking model, as latent_answer makes it.")
    if what.streaming:
        raise ValueError("GRPO goes through its problems in an order of its own: leave out streaming.")
    check_folder(what.checkpoint)
    resume_from = checkpoint_to_resume(training)
    torch.manual_seed(training.seed)
    tokenizer = pretrained_tokenizer(what.tokenizer or what.checkpoint)
    model = _load_model(what)
    check_length(what.max_length, model)
    limit = what.max_length - training.max_completion_length
    problems, kinds = zip(*(_problems(what, tokenizer, model.config, limit, *source) for source in splits(what)))
    set_trainable(model, ["thinker"])
    # No gradient reaches it: when a thought ends is no part of the answer's probability.
    model.thinker.trm.halt_head.requires_grad_(False)
    with output_dir_lock(training.output_dir):
        trainer = LatentGRPOTrainer(
            model,
            correctness_reward(kinds[0], ExecutionLimits(what.code_seconds, what.code_memory)),
            training,
            train_dataset=problems[0],
            eval_dataset=problems[1] if len(problems) > 1 else None,
            processing_class=tokenizer,
        )
        trainer.data_description = describe_data(what)
        train_and_save(trainer, resume_from)
    return trainer


def _load_model(what: GRPORecipeArguments) -> LatentThinkingForCausalLM:
    assert what.checkpoint is not None
    model_type = PreTrainedConfig.get_config_dict(what.checkpoint)[0].get("model_type")
    if model_type != LatentThinkingConfig.model_type:
        raise ValueError(
            f"{what.checkpoint} holds a {model_type} model: GRPO goes on from a latent-thinking model, as the recipe "
            f"latent_answer makes one."
        )
    return LatentThinkingForCausalLM.from_pretrained(what.checkpoint, dtype=what.dtype)


def _problems(
    what: GRPORecipeArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: LatentThinkingConfig,
    limit: int,
    split: str,
    path: str | None,
) -> tuple[Dataset, Literal["answer", "code"]]:
    """The problems whose prompts have at most `limit` tokens, and what decides whether an answer is right."""
    problems, response = load_reasoning_dataset(
        what.dataset_name, split, data_files=path, columns=column_mapping(what.columns), num_terms=what.num_terms
    )
    source = path or what.dataset_name
    check_prompts(problems, source)
    is_code = scoring_kind(problems.column_names, response) == "code"
    if is_code and not what.allow_code_execution:
        raise ValueError(
            f"The answers to {source} are programs, which have to run: say so with --allow_code_execution true, "
            f"preferably in a container."
        )
    fitting = problems.filter(lambda row: len(latent_thinking_prompt(row["prompt"], tokenizer, config)) <= limit)
    if not len(fitting):
        raise ValueError(
            f"No prompt of {source} [{split}] leaves room for max_completion_length={what.max_length - limit} tokens "
            f"of the max_length={what.max_length}: raise max_length."
        )
    if len(fitting) < len(problems):
        print(f"Dropped {len(problems) - len(fitting)} of {len(problems)} problems: over {what.max_length} tokens.")
    return fitting, "code" if is_code else "answer"

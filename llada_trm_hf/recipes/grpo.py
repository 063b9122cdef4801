"""Reinforcement learning of latent thoughts with GRPO."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig
from transformers.hf_argparser import HfArg

from ..data import latent_thinking_prompt
from ..data.rows import check_prompts
from ..evaluation.code_execution import ExecutionLimits
from ..evaluation.scoring import ScoringKind, scoring_kind
from ..hub.files import output_dir_lock
from ..hub.model_folders import LATENT_THINKING, load_tokenizer
from ..models import LatentThinkingConfig, LatentThinkingForCausalLM
from ..rl import LatentGRPOTrainer, LatentGRPOTrainingArguments, correctness_reward
from ..training import set_trainable
from .run_setup import (
    DATA_MODELS,
    DataArguments,
    TrainingMethod,
    check_length,
    load_problems,
    start_run,
    train_and_eval,
    train_and_save,
)


@dataclass
class GRPOScriptArguments(DataArguments):
    """What is rewarded for right answers. The rest are [`LatentGRPOTrainingArguments`]."""

    checkpoint: str | None = HfArg(default=None, help="The latent-thinking model to go on from.")
    allow_code_execution: bool = HfArg(default=False, help="Run programs the model writes, for datasets of code.")
    code_seconds: float = HfArg(default=10.0, help="Time limit of such a program.")
    code_memory: int = HfArg(default=1024, help="Memory limit of such a program, in MB.")


def run_grpo(script_args: GRPOScriptArguments, training_args: LatentGRPOTrainingArguments) -> LatentGRPOTrainer:
    """
    Trains as the settings say and saves the model and its tokenizer in `training_args.output_dir`.
    Raises the same errors as `run_masked_diffusion`.
    """
    if script_args.checkpoint is None:
        raise ValueError("Say what is to learn: --checkpoint with a latent-thinking model, as latent_answer makes it.")
    if script_args.streaming:
        raise ValueError("GRPO goes through its problems in an order of its own: leave out streaming.")
    METHOD.check(script_args)
    resume_from = start_run(training_args)
    tokenizer = load_tokenizer(script_args.tokenizer or script_args.checkpoint)
    model = _load_model(script_args)
    check_length(script_args.max_length, model)
    config, longest = model.config, script_args.max_length - training_args.max_completion_length

    def fits(row: dict[str, Any]) -> bool:
        return len(latent_thinking_prompt(row["prompt"], tokenizer, config)) <= longest

    (train, kind), held_out = train_and_eval(script_args, partial(_problems, script_args, fits))
    set_trainable(model, ["thinker"])
    # No gradient reaches it: when a thought ends is no part of the answer's probability.
    model.thinker.trm.halt_head.requires_grad_(False)
    with output_dir_lock(training_args.output_dir):
        trainer = LatentGRPOTrainer(
            model,
            correctness_reward(kind, ExecutionLimits(script_args.code_seconds, script_args.code_memory)),
            training_args,
            train_dataset=train,
            eval_dataset=None if held_out is None else held_out[0],
            processing_class=tokenizer,
        )
        train_and_save(trainer, resume_from, script_args)
    return trainer


def _load_model(script_args: GRPOScriptArguments) -> LatentThinkingForCausalLM:
    assert script_args.checkpoint is not None
    model_type = PreTrainedConfig.get_config_dict(script_args.checkpoint)[0].get("model_type")
    if model_type != LatentThinkingConfig.model_type:
        needed = "GRPO goes on from a latent-thinking model, as latent_answer makes it"
        raise ValueError(f"{script_args.checkpoint} holds a {model_type} model: {needed}.")
    return LatentThinkingForCausalLM.from_pretrained(script_args.checkpoint, dtype=script_args.dtype)


def _problems(
    script_args: GRPOScriptArguments, fits: Callable[[dict[str, Any]], bool], split: str, path: str | None
) -> tuple[Dataset, ScoringKind]:
    """The problems whose prompts leave room for an answer, and what decides whether it is right."""
    problems, response = load_problems(script_args, split, path)
    source = path or script_args.dataset_name
    check_prompts(problems, source)
    kind = scoring_kind(problems.column_names, response)
    if kind == "response" and "{reasoning}" in response:  # which is a thought here
        kind = "answer"
    if kind == "code" and not script_args.allow_code_execution:
        hint = "allow it with --allow_code_execution true, preferably in a container"
        raise ValueError(f"The answers to {source} are programs, which have to run: {hint}.")
    fitting = problems.filter(fits)
    if not len(fitting):
        raise ValueError(
            f"No prompt of {source} [{split}] leaves room for max_completion_length tokens within "
            f"max_length={script_args.max_length}: raise max_length."
        )
    dropped = len(problems) - len(fitting)
    if dropped:
        print(f"Dropped {dropped} of {len(problems)} problems: more than {script_args.max_length} tokens.")
    return fitting, kind


METHOD = TrainingMethod(
    GRPOScriptArguments, LatentGRPOTrainingArguments, run_grpo, models={"checkpoint": LATENT_THINKING, **DATA_MODELS}
)

"""What every training method shares: the data and its tokenizer, and a run from its start to the saved model."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from ..data import GeneratorOptions, load_reasoning_dataset, tokenize_reasoning
from ..data.generated_problems import GENERATORS, options_taken
from ..data.reasoning import column_mapping
from ..data.reasoning_sources import SOURCES
from ..data.rows import Rows, is_data_file, parse_split, slices_overlap
from ..hidden_pairs.settings import DTYPES
from ..hub.files import check_processes
from ..hub.model_folders import BACKBONE, TOKENIZER, check_model
from ..training.base_trainer import BaseTrainer
from ..training.resuming import check_trainer_state, checkpoints_in, trainer_state_problem

logger = logging.get_logger(__name__)
T = TypeVar("T")
DATA_MODELS = {"tokenizer": TOKENIZER}  # the models that DataArguments name
# Settings of recipes that may be others when a run is resumed: where things are (of the data, a hash tells whether it
# is the same), what is measured, and limits. All other settings must not.
_MAY_CHANGE = {
    *("backbone", "checkpoint", "refiner", "compressor", "trm", "tokenizer", "pca_batches", "compressed_sizes"),
    *("dataset_name", "data_files", "columns", "split", "eval_split", "eval_data_files", "num_eval_samples"),
    *("allow_code_execution", "code_seconds", "code_memory"),
}


@dataclass
class DataArguments(GeneratorOptions):
    """Text to train on, and the tokenizer that reads it."""

    tokenizer: str | None = HfArg(default=None, help="Name or folder; the model's own, or bytes for a new model.")
    dtype: str = HfArg(default="float32", help="Of the weights: float32, bfloat16, float16 or auto.")
    dataset_name: str = HfArg(default="arithmetic", help=f"{', '.join(SOURCES)}, or a .jsonl, .csv or .parquet file.")
    data_files: str | None = HfArg(default=None, help="A local file with the rows of dataset_name.")
    columns: list[str] | None = HfArg(default=None, help="Columns of a local file: prompt=question ...")
    split: str = HfArg(default="train", help="Split or slice to train on, e.g. train[:1000].")
    eval_split: str | None = HfArg(default=None, help="Split or slice to evaluate on.")
    eval_data_files: str | None = HfArg(default=None, help="Local file to evaluate on.")
    streaming: bool = HfArg(default=False, help="Read rows as they are needed; needs max_steps.")
    max_length: int = HfArg(default=512, help="Tokens of prompt and response together.")


@dataclass(frozen=True)
class TrainingMethod:
    """
    The dataclasses that a recipe fills, and the function that takes both.

    Attributes:
        models: the script's arguments that name a model, and the kind each takes (see `check_model`).
        new_model_settings: those that describe a new model; one in `checkpoint` has its own.
    """

    script_arguments: type
    training_arguments: type
    run: Callable[[Any, Any], Any]
    models: dict[str, str] = field(default_factory=dict)
    new_model_settings: tuple[str, ...] = ()

    def option_names(self) -> list[str]:
        """The keys of a recipe, and the options of the command line."""
        return [field.name for cls in (self.script_arguments, self.training_arguments) for field in fields(cls)]

    def check(self, script_args: Any) -> None:
        """
        Raises ValueError if `script_args` describe a model that their `checkpoint` holds already, or a dtype that does
        not exist, and what `check_model` raises for the models they name.
        """
        defaults = {field.name: field.default for field in fields(self.script_arguments)}
        given = [name for name in self.new_model_settings if getattr(script_args, name) != defaults[name]]
        if given and getattr(script_args, "checkpoint", None) is not None:
            raise ValueError(f"The model in --checkpoint has its own {', '.join(given)}: leave them out.")
        for option, kind in self.models.items():
            name = getattr(script_args, option)
            if name is not None and not (kind == BACKBONE and name.endswith(".json")):  # the config of a new one
                check_model(name, option, kind)
        if getattr(script_args, "dtype", "auto") not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {script_args.dtype!r}.")


def vocabulary_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The fields of a new model's config that follow from its tokenizer."""
    names = ("mask_token_id", "pad_token_id", "eos_token_id", "bos_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def check_length(max_length: int, model: PreTrainedModel) -> None:
    """Raises ValueError if samples could be longer than the model's context."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ValueError(f"max_length={max_length} is more than the model's context of {longest} tokens.")


def train_and_eval(script_args: DataArguments, load: Callable[[str, str | None], T]) -> tuple[T, T | None]:
    """`load(split, local file)` of the training data, and of the evaluation data if there is any."""
    is_file = script_args.data_files is not None or is_data_file(script_args.dataset_name)
    if script_args.eval_split is not None and script_args.eval_data_files is None:
        (train_name, train_rows), (eval_name, eval_rows) = map(
            parse_split, (script_args.split, script_args.eval_split)
        )
        # A file is one split, whatever it is called.
        if (is_file or train_name == eval_name) and slices_overlap(train_rows, eval_rows):
            source = script_args.data_files or script_args.dataset_name
            found = f"--eval_split {script_args.eval_split} of {source} holds what is trained on"
            remedy = "Name a file with --eval_data_files, or slices such as --split train[100:]"
            raise ValueError(f"{found} (--split {script_args.split}). {remedy} --eval_split train[:100].")
    train = load(script_args.split, script_args.data_files)
    if script_args.eval_split is None and script_args.eval_data_files is None:
        return train, None
    return train, load(script_args.eval_split or "test", script_args.eval_data_files or script_args.data_files)


def load_problems(
    script_args: DataArguments, split: str, path: str | None, streaming: bool = False
) -> tuple[Rows, str]:
    """Problems, and the template of their response; see `load_reasoning_dataset`."""
    columns = column_mapping(script_args.columns)
    return load_reasoning_dataset(
        script_args.dataset_name, split, path, columns, streaming=streaming, **script_args.generator_options()
    )


def reasoning_samples(
    script_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    path: str | None,
    align_steps_to_chunks: int | None = None,
) -> Rows:
    """Prompt, reasoning and answer of each problem as tokens; see `tokenize_reasoning`."""
    problems, response = load_problems(script_args, split, path, script_args.streaming)
    return tokenize_reasoning(problems, tokenizer, response, script_args.max_length, align_steps_to_chunks)


def describe_data(script_args: DataArguments) -> dict[str, str]:
    """The dataset, for a trainer's `data_description`; the name of a local file would mean nothing to others."""
    source = SOURCES.get(script_args.dataset_name)
    is_local = script_args.data_files is not None or is_data_file(script_args.dataset_name)
    described = {
        "name": "a local file" if is_local else script_args.dataset_name,
        "split": script_args.split,
        "hub_name": None if is_local else script_args.dataset_name if source is None else source.hub_name,
        "eval_split": script_args.eval_split,
    }
    return {name: value for name, value in described.items() if value}


def start_run(training_args: TrainingArguments) -> str | None:
    """
    Sets the seed and returns the checkpoint to resume from, if any. Raises as `check_processes` and
    `checkpoint_to_resume`.
    """
    set_up_processes(training_args)
    torch.manual_seed(training_args.seed)
    return checkpoint_to_resume(training_args)


def set_up_processes(training_args: TrainingArguments) -> None:
    """Suits the settings to the machine; RuntimeError if the processes of this run do not know of each other."""
    check_processes(training_args.world_size, training_args.output_dir)
    if not torch.accelerator.is_available():  # torch would warn in every epoch that it has nothing to pin memory for
        training_args.dataloader_pin_memory = False


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` names, for `true` the last complete one; None to start anew, with a
    warning where a run that was to be resumed has none. Raises ValueError if the output folder's earlier run is not
    resumed, or has ended without a checkpoint.
    """
    folder, wanted = training_args.output_dir, training_args.resume_from_checkpoint
    complete, problems = checkpoints_in(folder)
    ended = trainer_state_problem(folder) is None
    if wanted is None or str(wanted).lower() == "false":
        if complete or problems or ended:
            raise ValueError(
                f"{folder} holds an earlier run: go on with --resume_from_checkpoint true, or choose another "
                f"--output_dir."
            )
        return None
    if str(wanted).lower() != "true":
        check_trainer_state(str(wanted))
        return str(wanted)
    if ended and not complete:
        raise ValueError(f"{folder} holds a run that has ended, and no checkpoint: choose another --output_dir.")
    if training_args.process_index == 0:
        remedy = f"the run goes on from {complete[-1]}" if complete else "the run starts anew"
        for problem in problems:
            logger.warning(f"{problem}: {remedy}.")
        if not complete and not problems:
            logger.warning(f"{folder} holds no checkpoint to resume from: {remedy}.")
    return complete[-1] if complete else None


def train_and_save(trainer: BaseTrainer, resume_from: str | None, script_args: DataArguments | None = None) -> None:
    """Trains, from `resume_from` if given, and leaves model, state and a record of the data in the output folder."""
    if script_args is not None:
        trainer.data_description = describe_data(script_args)
        options = {field.name for field in fields(GeneratorOptions)}
        given = {name: value for name, value in vars(script_args).items() if name not in _MAY_CHANGE | options}
        if script_args.dataset_name in GENERATORS:
            given |= options_taken(script_args.dataset_name) | script_args.generator_options()
        trainer.recipe_settings = given
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    trainer.save_state()

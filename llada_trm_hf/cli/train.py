"""`llada-trm train` and `llada-trm demo`. The first is also what `accelerate launch` runs."""

from dataclasses import fields
from typing import Any

from .command import (
    CommandParser,
    DefaultsOfValues,
    OneLineErrors,
    add_import_module,
    check_output_dir,
    checked_device,
    finish_distributed,
    prepare,
)

_OVERVIEW = """usage: llada-trm train --recipe NAME [options]

Trains what a recipe says. --recipe NAME --help lists all its settings with their defaults, in a few seconds.

recipes:
  warmup, slot_warmup        a TRM refiner, a slot refiner, on a frozen backbone (slot_warmup_cpu: a small one)
  finetune, slot_full        the refiner and its whole backbone; slot_finetune: and the backbone's last layers
  cot_specialized            both, on long reasoning
  sudoku_4, sudoku_6         both, a small new model, on sudokus of 4x4 or 6x6 cells, on a CPU
  compressor_1a, _1b         a compressor of a language model's hidden states
  trm                        a SequenceTRM on hidden pairs
  latent_answer, grpo        both, and a projector, on answers, or on rewards

what most runs set:
  --recipe NAME or FILE      settings to start from: one of the above, or your own .yaml or .json
  --config FILE              settings that override the recipe's
  --backbone MODEL           name or folder of the model; a .json with sizes for a new one of random weights
  --checkpoint FOLDER        an earlier result to go on from, instead of a backbone
  --dataset_name NAME        a dataset, or a .jsonl, .csv or .parquet file; --split, --eval_split: which part
  --max_length N             tokens of prompt and response together
  --output_dir FOLDER        for the model, checkpoints and metrics
  --learning_rate, --lr      --batch_size (of a device), --gradient_accumulation_steps
  --num_epochs, --max_steps  how long; --save_steps, --eval_strategy, --eval_steps: what happens on the way
  --resume_from_checkpoint true   go on where a run in --output_dir stopped
  --device cpu|cuda          where; --bf16 true: in half precision

"""
# What most runs set, of the Trainer's own settings: listed before the rest.
_COMMON = """
    output_dir resume_from_checkpoint learning_rate per_device_train_batch_size gradient_accumulation_steps
    num_train_epochs max_steps weight_decay max_grad_norm lr_scheduler_type warmup_steps optim seed data_seed bf16 fp16
    gradient_checkpointing use_cpu eval_strategy eval_steps per_device_eval_batch_size save_strategy save_steps
    save_total_limit load_best_model_at_end metric_for_best_model greater_is_better logging_steps report_to run_name
    dataloader_num_workers push_to_hub hub_model_id
"""


def run_train(arguments: list[str]) -> None:
    """A training run from a recipe, a file and flags."""
    sources = CommandParser(prog="llada-trm train", add_help=False)
    for name in ("--recipe", "--config", "--device"):
        sources.add_argument(name)
    sources.add_argument("-h", "--help", action="store_true")
    add_import_module(sources)
    chosen, rest = sources.parse_known_args(arguments)
    if chosen.help and chosen.recipe is None and chosen.config is None:
        print(_OVERVIEW)
        return
    prepare(chosen.import_module)
    from ..recipes.recipe import load_settings, parse_recipe

    method, settings = load_settings(chosen.recipe, chosen.config, _flags(rest))
    parser = _parser(method)
    if chosen.help:
        rest = ["--help"]
    elif chosen.device is not None and checked_device(chosen.device) == "cpu":
        rest.append("--use_cpu")
    script_args, training_args = parse_recipe(parser, rest, settings)
    check_output_dir(training_args.output_dir)
    method.run(script_args, training_args)
    if training_args.process_index == 0:
        print(f"Model and metrics are in {training_args.output_dir}")
    finish_distributed()


def run_demo(arguments: list[str]) -> None:
    """The whole journey on generated arithmetic, from scratch."""
    parser = CommandParser(
        prog="llada-trm demo",
        description="Trains a masked-diffusion model from scratch, then a refiner on top of it, and compares.",
    )
    parser.add_argument("--output_dir", default="outputs/demo", help="a new folder for checkpoint, trace and results")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and masks")
    parser.add_argument("--smoke_test", action="store_true", help="a few steps only, to see that everything runs")
    options = parser.parse(arguments)
    check_output_dir(options.output_dir)
    if not 0 <= options.seed < 2**32 - 1:
        raise ValueError(f"--seed must be between 0 and {2**32 - 2}, got {options.seed}.")
    from ..recipes.demo import run_demo

    run_demo(options.output_dir, options.seed, options.smoke_test)


def _flags(arguments: list[str]) -> set[str]:
    """The names of the options in a command line."""
    return {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}


def _parser(method: Any) -> Any:
    """A parser of a method's settings, whose help shows first what most runs set, then the Trainer's rest."""
    from transformers import HfArgumentParser, TrainingArguments

    class DataclassParser(OneLineErrors, HfArgumentParser):
        pass

    parser = DataclassParser(
        (method.script_arguments, method.training_arguments),
        prog="llada-trm train",
        usage="llada-trm train --recipe NAME [--config FILE] [--device cpu|cuda] [--import_module FILE] [options]",
        allow_abbrev=False,
        formatter_class=DefaultsOfValues,
        description="The settings of this recipe with their defaults. In a .yaml or .json they stand without --.",
    )
    common, own = _COMMON.split(), {field.name for field in fields(method.script_arguments)}
    trainers = {f.name for f in fields(method.training_arguments)} - {f.name for f in fields(TrainingArguments)}
    titles = ("what is trained on what", "the run", "the method", "everything else of transformers' TrainingArguments")
    groups = [parser.add_argument_group(title) for title in titles]
    plain = parser._action_groups[1]  # where argparse puts options; only the help reads these lists
    for action in plain._group_actions:
        name = action.dest
        # Of `--x_y`, `--x-y` and `--no_x_y` the first; of a Trainer's help, which may be a page, the first sentence.
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        order = 0 if name in own else 1 if name in common else 2 if name in trainers else 3
        if order in (1, 3) and action.help:
            action.help = " ".join(action.help.split()).split(". ")[0]
        if f"--{name}" in action.option_strings:
            groups[order]._group_actions.append(action)
    groups[1]._group_actions.sort(key=lambda action: common.index(action.dest))
    plain._group_actions = []
    return parser

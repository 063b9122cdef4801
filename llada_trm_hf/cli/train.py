"""`llada-trm train`: a training run from a recipe, a file and flags. Also what `accelerate launch` runs."""

from ..training.arguments import MaskedDiffusionTrainingArguments
from ..training.recipe import RecipeArguments, parse_recipe
from ..training.run import run_training
from .parser import CommandParser, DataclassParser


def run(arguments: list[str]) -> None:
    sources = CommandParser(prog="llada-trm train", add_help=False)
    sources.add_argument("--recipe")
    sources.add_argument("--config")
    sources.add_argument("--device", choices=("cpu", "cuda"))
    chosen, rest = sources.parse_known_args(arguments)

    parser = DataclassParser(
        (RecipeArguments, MaskedDiffusionTrainingArguments),
        prog="llada-trm train",
        allow_abbrev=False,
        description="Trains a masked-diffusion model with a refiner. --recipe NAME (warmup, finetune) or FILE sets "
        "the defaults, --config FILE changes some of them, the options below the rest; --device cpu|cuda.",
    )
    if chosen.device == "cpu":
        rest.append("--use_cpu")
    trainer = run_training(*parse_recipe(parser, rest, chosen.recipe, chosen.config))
    if trainer.is_world_process_zero():
        print(f"Model, tokenizer and metrics are in {trainer.args.output_dir}")

"""`llada-trm train`: a training run from a recipe, a file and flags. Also what `accelerate launch` runs."""

from .parser import CommandParser, DataclassParser
from .processes import part
from .recipe import load_settings, parse_recipe


def run(arguments: list[str]) -> None:
    sources = CommandParser(prog="llada-trm train", add_help=False)
    sources.add_argument("--recipe")
    sources.add_argument("--config")
    sources.add_argument("--device", choices=("cpu", "cuda"))
    chosen, rest = sources.parse_known_args(arguments)
    kind, settings = load_settings(chosen.recipe, chosen.config)

    parser = DataclassParser(
        (kind.recipe_arguments, kind.training_arguments),
        prog="llada-trm train",
        allow_abbrev=False,
        description="--recipe NAME or FILE says what is trained and sets the defaults: a refiner (warmup, "
        "slot_warmup, slot_warmup_cpu) and its masked-diffusion model (finetune, cot_specialized, slot_finetune, "
        "slot_full), a compressor of hidden states (compressor_1a, compressor_1b), a model that reasons over them "
        "(trm), or both on answers after latent thoughts (latent_answer) or on rewards for right ones (grpo). "
        "--config FILE changes some of them, the options below, which depend on the recipe, the rest; --device "
        "cpu|cuda.",
    )
    if chosen.device == "cpu":
        rest.append("--use_cpu")
    what, training = parse_recipe(parser, rest, settings)
    kind.run(what, training)
    if training.process_index == 0:
        print(f"Model and metrics are in {training.output_dir}")
    part()

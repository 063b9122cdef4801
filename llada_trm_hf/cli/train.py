"""`llada-trm train` and `llada-trm demo`. The first is also what `accelerate launch` runs."""

from ..recipes.recipe import load_settings, parse_recipe
from .command import CommandParser, DataclassParser, finish_distributed


def run_train(arguments: list[str]) -> None:
    """A training run from a recipe, a file and flags."""
    sources = CommandParser(prog="llada-trm train", add_help=False)
    sources.add_argument("--recipe")
    sources.add_argument("--config")
    sources.add_argument("--device", choices=("cpu", "cuda"))
    chosen, rest = sources.parse_known_args(arguments)
    method, settings = load_settings(chosen.recipe, chosen.config)

    parser = DataclassParser(
        (method.script_arguments, method.training_arguments),
        prog="llada-trm train",
        allow_abbrev=False,
        description="--recipe NAME or FILE says what is trained and sets the defaults: a refiner (warmup, "
        "slot_warmup, slot_warmup_cpu), its masked-diffusion model too (finetune, cot_specialized, slot_finetune, "
        "slot_full), a compressor of hidden states (compressor_1a, compressor_1b), a SequenceTRM over them (trm), or "
        "both on answers (latent_answer) or rewards (grpo). --config FILE and the options below, which depend on the "
        "recipe, change them; --device cpu|cuda.",
    )
    if chosen.device == "cpu":
        rest.append("--use_cpu")
    script_args, training_args = parse_recipe(parser, rest, settings)
    method.run(script_args, training_args)
    if training_args.process_index == 0:
        print(f"Model and metrics are in {training_args.output_dir}")
    finish_distributed()


def run_demo(arguments: list[str]) -> None:
    """The whole journey on generated arithmetic, from scratch."""
    parser = CommandParser(
        prog="llada-trm demo",
        description="Trains a masked-diffusion model from scratch, then a recursive head on top of it, and compares.",
    )
    parser.add_argument("--output_dir", default="outputs/demo", help="a new folder for checkpoint, trace and results")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and masks")
    parser.add_argument("--smoke_test", action="store_true", help="a few steps only, to see that everything runs")
    options = parser.parse_args(arguments)
    from ..recipes.demo import run_demo

    run_demo(options.output_dir, options.seed, options.smoke_test)

"""`llada-trm calibrate`: which chunks to refine, and when to stop, measured and saved in the checkpoint."""

import json
import os

from .command import (
    DTYPES,
    CommandParser,
    add_device,
    add_problem_options,
    checked_device,
    options_for,
)


def run(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="llada-trm calibrate",
        description="Measures on masked samples what a hybrid gets right, by min_confidence (which chunks are "
        "refined) and convergence_threshold (when they stop), and saves the cheapest that lose nothing.",
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a hybrid")
    add_problem_options(parser, split="test[:200]")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt and response together")
    parser.add_argument("--batch_size", type=int, default=32, help="samples at a time")
    parser.add_argument("--tolerance", type=float, default=0.005, help="share of the tokens that may be lost")
    parser.add_argument("--dry_run", action="store_true", help="save nothing")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as they are stored")
    add_device(parser)
    options = parser.parse(arguments)
    for name in ("batch_size", "max_length"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    config_file = os.path.join(options.checkpoint, "config.json")
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"--checkpoint: there is no folder {options.checkpoint} with a config.json.")

    from ..data import GeneratorOptions, load_reasoning_dataset, tokenize_reasoning
    from ..data.reasoning import column_mapping
    from ..evaluation.refiner_calibration import calibrate_refiner
    from ..hub.files import write_text
    from ..hub.training_record import read_json
    from ..models import LLaDATRMForMaskedDiffusion
    from .generation import load

    model, tokenizer = load(options.checkpoint, options.dtype, checked_device(options.device))
    if not isinstance(model, LLaDATRMForMaskedDiffusion):
        raise ValueError(
            f"{options.checkpoint} is a {type(model).__name__}: only hybrids have a refiner to calibrate."
        )
    generator = GeneratorOptions(**options_for(GeneratorOptions, options)).generator_options()
    rows, response = load_reasoning_dataset(
        options.dataset_name, options.split, options.data_files, column_mapping(options.columns), **generator
    )
    samples = tokenize_reasoning(rows, tokenizer, response, options.max_length)
    found = calibrate_refiner(model, samples, tokenizer.pad_token_id, options.batch_size, options.tolerance)
    print(found.table())
    if options.dry_run:
        return
    config = read_json(config_file)
    config["min_confidence"] = found.min_confidence
    if found.convergence_threshold is not None:
        config["refiner_config"]["convergence_threshold"] = found.convergence_threshold
    write_text(config_file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    print(f"\nSaved in {config_file}.")

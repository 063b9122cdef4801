"""Recipes: everything a training run needs, as YAML, each value overridable on the command line."""

import difflib
import os
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml
from transformers import HfArgumentParser

from .arguments import MaskedDiffusionTrainingArguments


@dataclass
class RecipeArguments:
    """What is trained on what. The rest of a recipe are [`MaskedDiffusionTrainingArguments`]."""

    backbone: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Name or folder of a masked-diffusion model, or a config .json to train one from scratch.",
        },
    )
    checkpoint: str | None = field(default=None, metadata={"help": "A hybrid to go on from, instead of a backbone."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or folder; the model's own, or a byte tokenizer for a new model."}
    )
    refiner: str = field(
        default="recursive_refinement_head",
        metadata={"help": "The kind of refiner, the folder of one, or 'none' to train the backbone alone."},
    )
    chunk_size: int = field(default=16, metadata={"help": "Tokens refined together."})
    head_hidden_size: int = field(default=512, metadata={"help": "Width of a chunk's code."})
    head_layers: int = field(default=2, metadata={"help": "SwiGLU layers of the refinement head."})
    max_recursive_steps: int = field(default=8, metadata={"help": "Largest number of updates of a chunk."})
    convergence_threshold: float = field(default=0.01, metadata={"help": "When a chunk stops; 0 never."})
    step_size: float = field(default=0.1, metadata={"help": "Factor of every update."})
    min_confidence: float = field(default=0.5, metadata={"help": "Chunks below it are refined."})
    deep_supervision_weight: float = field(default=0.3, metadata={"help": "Weight of the loss over the steps."})
    deep_supervision_schedule: str = field(default="constant", metadata={"help": "constant, linear or exponential."})
    confidence_loss_weight: float = field(default=0.05, metadata={"help": "Weight of the confidence's calibration."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the refiner only."})
    trainable: list[str] | None = field(
        default=None, metadata={"help": "Patterns of module names that train, instead of freeze_backbone."}
    )
    train_layer_norms: bool = field(default=False, metadata={"help": "Train all normalisation layers as well."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16 or auto."})
    dataset_name: str = field(
        default="arithmetic", metadata={"help": "arithmetic, gsm8k, or a .json, .jsonl, .csv or .parquet file."}
    )
    data_files: str | None = field(default=None, metadata={"help": "A local file with the rows of dataset_name."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of a local file, e.g. prompt=question answer=solution."}
    )
    split: str = field(default="train", metadata={"help": "Split or slice to train on, e.g. train[:1000]."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split or slice to evaluate on; of eval_data_files for a local file."}
    )
    eval_data_files: str | None = field(default=None, metadata={"help": "A local file with the rows to evaluate on."})
    num_terms: int = field(default=8, metadata={"help": "Difficulty of generated arithmetic."})
    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and response together."})


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """
    Reads a recipe of the package by name, or a YAML or JSON file.

    Raises:
        ValueError: for an unknown recipe, a file that is not a mapping, or an unknown key, with the nearest known one.
    """
    folder = files(__package__).joinpath("recipes")
    if os.path.splitext(name_or_path)[1] in (".yaml", ".yml", ".json"):
        if not os.path.isfile(name_or_path):
            raise FileNotFoundError(f"There is no recipe file {name_or_path}.")
        with open(name_or_path, encoding="utf-8") as file:
            text = file.read()
    else:
        known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if name_or_path not in known:
            raise ValueError(
                f"Unknown recipe {name_or_path!r}{_nearest(name_or_path, known)}. Known: {', '.join(known)}."
            )
        text = folder.joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{name_or_path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{name_or_path} must be a mapping of settings, got a {type(recipe).__name__}.")
    known = _field_names()
    for key in recipe:
        if key not in known:
            raise ValueError(f"{name_or_path}: unknown key {key!r}{_nearest(str(key), known)}.")
    return recipe


def parse_recipe(
    parser: HfArgumentParser, arguments: list[str], recipe: str | None = None, config: str | None = None
) -> tuple[RecipeArguments, MaskedDiffusionTrainingArguments]:
    """
    The settings of a run: those of `arguments` (a command line) over the file `config` over `recipe` over the
    defaults. Every value gets the type of its field: `1e-4` is a number.
    """
    settings: dict[str, Any] = {}
    for source in (recipe, config):
        if source:
            settings.update(load_recipe(source))
    # argparse converts defaults given as text like text from the command line.
    parser.set_defaults(
        **{name: str(value) if isinstance(value, (int, float, str)) else value for name, value in settings.items()}
    )
    for action in parser._actions:
        if isinstance(settings.get(action.dest), bool):
            action.default = settings[action.dest]
    what, training, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"Unknown option {unknown[0]}{_nearest(unknown[0], known)}.")
    return what, training


def _field_names() -> list[str]:
    return [*RecipeArguments.__dataclass_fields__, *MaskedDiffusionTrainingArguments.__dataclass_fields__]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

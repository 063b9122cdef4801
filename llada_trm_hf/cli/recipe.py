"""Recipes: everything a training run needs, as YAML, each value overridable on the command line."""

import difflib
import os
from importlib.resources import files
from typing import Any

import yaml
from transformers import HfArgumentParser

from .. import training
from .kinds import DEFAULT_KIND, KINDS, TrainingKind


def load_recipe(name_or_path: str, kind: str | None = None) -> dict[str, Any]:
    """
    Reads a recipe of the package by name, or a YAML or JSON file. Its key `kind` says what it trains, one of `KINDS`;
    without that key it is `kind`, or `masked_diffusion`.

    Raises:
        ValueError: for an unknown recipe or kind, a file that is not a mapping, or a key that this kind of training
            does not know, with the nearest known one.
    """
    recipe = _read_mapping(name_or_path)
    kind = recipe.get("kind", kind or DEFAULT_KIND)
    if kind not in KINDS:
        raise ValueError(f"{name_or_path}: unknown kind {kind!r}{_nearest(str(kind), list(KINDS))}.")
    known = ["kind", *KINDS[kind]().field_names()]
    for key in recipe:
        if key not in known:
            raise ValueError(f"{name_or_path}: unknown key {key!r}{_nearest(str(key), known)}.")
    return recipe


def load_settings(recipe: str | None = None, config: str | None = None) -> tuple[TrainingKind, dict[str, Any]]:
    """
    What `recipe` and the file `config` say, `config` over `recipe`, and the kind of training they are for.

    Raises:
        ValueError: as `load_recipe`, or if the two are for different kinds.
    """
    settings = load_recipe(recipe) if recipe else {}
    kind = settings.get("kind", DEFAULT_KIND)
    if config:
        changes = load_recipe(config, kind)
        if recipe and changes.get("kind", kind) != kind:
            raise ValueError(f"{recipe} is a recipe for {kind}, {config} for {changes['kind']}.")
        settings.update(changes)
    return KINDS[settings.pop("kind", DEFAULT_KIND)](), settings


def parse_recipe(parser: HfArgumentParser, arguments: list[str], settings: dict[str, Any]) -> tuple[Any, ...]:
    """
    The dataclasses of `parser`, filled from `arguments` (a command line) over `settings` over the defaults. Every
    value gets the type of its field: `1e-4` is a number.
    """
    # argparse converts defaults given as text like text from the command line.
    parser.set_defaults(
        **{name: str(value) if isinstance(value, (int, float, str)) else value for name, value in settings.items()}
    )
    for action in parser._actions:
        if isinstance(settings.get(action.dest), bool):
            action.default = settings[action.dest]
    *filled, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"Unknown option {unknown[0]}{_nearest(unknown[0], known)}.")
    return tuple(filled)


def _read_mapping(name_or_path: str) -> dict[str, Any]:
    folder = files(training).joinpath("recipes")
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
    return recipe


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

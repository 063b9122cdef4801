"""Reading a recipe: everything a training run needs, as YAML, each value overridable on the command line."""

import importlib
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..models.hub_model import nearest_name
from ..training.arguments import check_ranges
from .run_setup import TrainingMethod

DEFAULT_KIND = "masked_diffusion"
# The modules of this folder that define a METHOD.
KINDS = (DEFAULT_KIND, "compressor", "trm", "latent_answer", "grpo")


def training_method(kind: str) -> TrainingMethod:
    """The method a recipe of this kind trains with. Imported when needed: TRL is optional and takes seconds."""
    return importlib.import_module(f".{kind}", __package__).METHOD


def load_recipe(name_or_path: str, kind: str = DEFAULT_KIND) -> dict[str, Any]:
    """
    Reads a recipe of the package by name, or a YAML or JSON file. Its key `kind`, by default `kind`, says what it
    trains.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown recipe, kind or key, with the nearest known one, or a file that is not a mapping.
    """
    recipe = _read_mapping(name_or_path)
    kind = recipe.get("kind", kind)
    if kind not in KINDS:
        raise ValueError(f"{name_or_path}: unknown kind {kind!r}{nearest_name(str(kind), KINDS)}.")
    known = ["kind", *training_method(kind).option_names()]
    for key in recipe:
        if key not in known:
            raise ValueError(f"{name_or_path}: unknown key {key!r}{nearest_name(str(key), known)}.")
    return recipe


def load_settings(
    recipe: str | None = None, config: str | None = None, flags: Collection[str] = ()
) -> tuple[TrainingMethod, dict[str, Any]]:
    """
    The training method, and the settings in `recipe` and the file `config`, which overrides it. If a checkpoint is
    named, in `config` or by one of the `flags` of the command line, what the recipe says of a new model is left out.
    Raises as `load_recipe`, and a ValueError if recipe and config are for different kinds.
    """
    settings = load_recipe(recipe) if recipe else {}
    kind = settings.get("kind", DEFAULT_KIND)
    if config:
        changes = load_recipe(config, kind)
        if recipe and changes.get("kind", kind) != kind:
            raise ValueError(f"{recipe} is a recipe for {kind}, {config} for {changes['kind']}.")
        flags = {*flags, *changes}
    else:
        changes = {}
    if "checkpoint" in flags:
        fixed = training_method(kind).new_model_settings
        settings = {name: value for name, value in settings.items() if name not in fixed}
    settings.update(changes)
    return training_method(settings.pop("kind", DEFAULT_KIND)), settings


def parse_recipe(parser: HfArgumentParser, arguments: list[str], settings: dict[str, Any]) -> tuple[Any, ...]:
    """
    The dataclasses of `parser`, filled from `arguments` (a command line) over `settings` over the defaults. Every
    value gets the type of its field: `1e-4`, a text in YAML, is a number. An unknown option is a ValueError.
    """
    # argparse converts a default that is a text as if it stood on the command line.
    defaults = {name: str(value) if type(value) in (int, float) else value for name, value in settings.items()}
    parser.set_defaults(**defaults)
    # (Before the dataclasses are made: transformers checks some of it with messages that name no setting.)
    check_ranges(vars(parser.parse_known_args(arguments)[0]))
    *filled, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        known = [f"--{name}" for instance in filled for name in vars(instance)]
        raise ValueError(f"Unknown option {unknown[0]}{nearest_name(unknown[0], known)}.")
    return tuple(filled)


def _read_mapping(name_or_path: str) -> dict[str, Any]:
    file = Path(name_or_path)
    if file.suffix not in (".yaml", ".yml", ".json"):
        recipes = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"))}
        if name_or_path not in recipes:
            hint = nearest_name(name_or_path, recipes)
            raise ValueError(f"Unknown recipe {name_or_path!r}{hint}. Known: {', '.join(recipes)}.")
        file = recipes[name_or_path]
    elif not file.is_file():
        raise FileNotFoundError(f"There is no recipe file {name_or_path}.")
    try:
        recipe = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{name_or_path} is not a text in UTF-8: {error}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name_or_path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{name_or_path} must be a mapping of settings, got a {type(recipe).__name__}.")
    return recipe


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML where a key that stands twice is an error: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

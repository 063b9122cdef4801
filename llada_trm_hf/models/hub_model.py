"""What every model of the package shares: settings that are checked, complete checkpoints, code beside the weights."""

import ast
import difflib
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# The masked-diffusion families and the refiners by `model_type`, filled by `registered_models.py` and
# `register_refiner`. (Not by config class: remote code may load the same class twice, from two files.)
BACKBONES: dict[str, type[PreTrainedModel]] = {}
REFINERS: dict[str, type[PreTrainedModel]] = {}

_HERE = Path(__file__).resolve().parent
_REGISTRY_FILE = "registered_models.py"
_RELATIVE_IMPORT = re.compile(r"from\s+\.[\w.]*")


class HubModel:
    """
    Mixin for `PreTrainedModel` classes.

    `save_pretrained` also writes the Python files of the model and the `auto_map` of `config.json`, so that
    `AutoModel*.from_pretrained(folder, trust_remote_code=True)` works where this package is not installed.

    Attributes:
        auto_classes: the Auto classes the model answers to.
    """

    auto_classes: ClassVar[tuple[str, ...]] = ()
    # Attention goes through the library's interface; a part without attention runs beside any implementation.
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers, except that tensors missing from the checkpoint are an error instead of being initialised
        at random, and so are tensors of another shape.

        Raises:
            ValueError: naming the tensors.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if info["mismatched_keys"] and not may_differ:
            shapes = [
                f"{n} {tuple(found)} instead of {tuple(expected)}" for n, found, expected in info["mismatched_keys"]
            ]
            raise ValueError(
                f"{pretrained_model_name_or_path} holds tensors of another shape than {cls.__name__} with its config: "
                f"{', '.join(sorted(shapes)[:8])}{', ...' if len(shapes) > 8 else ''}."
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} of the tensors of {cls.__name__}: "
                f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. Load the class it was saved from, or "
                f"a complete checkpoint."
            )
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As in transformers, except that tensors keep this package's names unless `save_original_format=True` asks for
        those of the official checkpoints. (The HF Trainer resumes by the names in memory.)
        """
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            self.export_code(save_directory)
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, save_original_format=save_original_format, **kwargs
        )

    def export_code(self, folder: str | os.PathLike) -> None:
        """Writes the Python files of the model and its config into `folder`, and fills `config.auto_map`."""
        config, model_class = self.config, type(self)  # type: ignore[attr-defined]
        if model_class.__name__.startswith("FSDP"):  # FSDP2 gives a sharded model a class of its own, made on the spot
            model_class = model_class.__bases__[-1]
        parts = (getattr(module, "config", None) for module in self.modules())  # type: ignore[attr-defined]
        held = {getattr(part, "model_type", None) for part in parts}
        if not self.auto_classes or not write_code(folder, type(config), model_class, held=held):
            return
        # The config through the model's file, where that has it. Of a folder, transformers tells versions of the code
        # apart by what an entry file imports: a config with an entry file of its own would keep the model class it
        # was first loaded with, whatever the model's file says later.
        entry = module_name(model_class)
        if not hasattr(sys.modules[model_class.__module__], type(config).__name__):
            entry = module_name(type(config))
        config.auto_map = {"AutoConfig": f"{entry}.{type(config).__name__}"}
        config.auto_map.update(
            {name: f"{module_name(model_class)}.{model_class.__name__}" for name in self.auto_classes}
        )


# --- The code of a class, flat ---


def module_name(cls: Any) -> str | None:
    """The name of the file that defines `cls`, also for a script that is being run; None in a notebook."""
    try:
        return Path(inspect.getfile(cls)).stem
    except (OSError, TypeError):
        return None


def write_code(folder: str | os.PathLike, *classes: Any, held: Collection[str | None] = ()) -> bool:
    """
    Writes the Python files that `classes` (or functions) are made of into `folder`; False if one of a notebook has
    none. Of the registered backbones and refiners, only those of the model types in `held` come along.
    """
    registered = [cls for registry in (BACKBONES, REFINERS) for name, cls in registry.items() if name in held]
    for cls in (*classes, *registered):
        if module_name(cls) is None:
            warnings.warn(
                f"{cls.__name__} is not defined in a file, so its code is not saved with the model: it has to be "
                f"defined again where the model is loaded.",
                stacklevel=2,
            )
            if cls in classes:
                return False
    os.makedirs(folder, exist_ok=True)
    with_file = [cls for cls in registered if module_name(cls) and module_name(cls.config_class)]
    for name, text in source_files(*classes, held=with_file).items():
        Path(folder, name).write_text(text, encoding="utf-8")
    return True


def source_files(*classes: Any, held: Iterable[Any] = ()) -> dict[str, str]:
    """
    The files that `classes` stand in and, recursively, what these import, as name -> text. They are to lie in one
    folder, without this package: `from ...generation.x import y` becomes `from .x import y`, and so does what a user's
    own file imports from the package. `registered_models.py`, where it is imported, lists only the classes in `held`.

    Raises:
        ValueError: for a user's file with the name of one of the package's.
    """
    package_files = _package_files()
    files: dict[str, str] = {}
    seen: set[Path] = set()
    waiting = [Path(inspect.getfile(cls)).resolve() for cls in classes]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if path == _HERE / _REGISTRY_FILE:
            files[path.name] = _registry(held)
            parts = {part for cls in held for part in (cls, cls.config_class)}
            waiting += [Path(inspect.getfile(part)).resolve() for part in parts]
            continue
        text, imported = _flattened(path, package_files)
        ours = package_files.get(path.name, path)
        if ours != path and text != _flattened(ours, package_files)[0]:
            raise ValueError(f"{path} has the name of a file that travels with every checkpoint: rename it.")
        files[path.name] = text
        waiting += imported
    return files


def _package_files() -> dict[str, Path]:
    """The files that can travel, by name."""
    files = (*_HERE.rglob("*.py"), *_HERE.with_name("generation").glob("*.py"))
    return {path.name: path for path in files if path.name != "__init__.py"}


def _flattened(path: Path, package_files: dict[str, Path]) -> tuple[str, list[Path]]:
    """The text of a file with every import of this package or of a sibling as `from .file import name`, and the files
    imported. Line numbers stay."""
    text = path.read_text(encoding="utf-8")
    lines, imported = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        first, last = node.lineno, node.end_lineno or node.lineno
        if node.level:
            target = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            imported.append(target if target.exists() else _HERE / target.name)
            lines[first - 1] = _RELATIVE_IMPORT.sub(f"from .{target.stem}", lines[first - 1], count=1)
        elif node.module.split(".")[0] == __name__.split(".")[0]:  # a user's file: a name of this package
            source, statements = importlib.import_module(node.module), []
            for alias in node.names:
                defined_in = getattr(getattr(source, alias.name), "__module__", node.module)  # a constant has none
                origin, module = Path(inspect.getfile(sys.modules[defined_in])).resolve(), node.module
                if origin == package_files.get(origin.name):  # what does not travel stays an import of the package
                    imported.append(origin)
                    module = f".{origin.stem}"
                renamed = f" as {alias.asname}" if alias.asname else ""
                statements.append(f"{' ' * node.col_offset}from {module} import {alias.name}{renamed}\n")
            # All in the first line, so that the numbers of the others stay.
            lines[first - 1 : last] = ["".join(statements), *[""] * (last - first)]
    return "".join(lines), imported


def _registry(held: Iterable[Any]) -> str:
    """The `registered_models.py` of a checkpoint that holds these classes."""
    classes = sorted(held, key=lambda cls: cls.__name__)
    imports = {cls: f"from .{module_name(cls)} import {cls.__name__}\n" for cls in classes}
    entries = {cls: f"[{cls.config_class.model_type!r}] = {cls.__name__}\n" for cls in classes}
    backbones = [cls for cls in classes if cls in BACKBONES.values()]
    refiners = [cls for cls in classes if cls not in backbones]
    return (
        '"""The backbone and the refiners that this checkpoint holds."""\n\n'
        "from .hub_model import BACKBONES, REFINERS\n"
        + "".join(imports[cls] for cls in backbones)
        + "".join(f"\nBACKBONES{entries[cls]}" for cls in backbones)
        + "\n\ndef register_held_refiners():\n"
        + "".join(f"    {imports[cls]}" for cls in refiners)
        + "".join(f"    REFINERS{entries[cls]}" for cls in refiners)
        + "    return REFINERS\n"
    )


# --- Settings ---


def model_type_of(config_dict: dict[str, Any]) -> str | None:
    """The `model_type` of a config file. LLaDA-MoE's official files say "llada" too: their expert fields tell."""
    model_type = config_dict.get("model_type")
    return "llada_moe" if model_type == "llada" and "num_experts" in config_dict else model_type


def nearest_name(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the known name closest to a misspelt one; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_token_id(name: str, token_id: int | None, vocab_size: int) -> None:
    """Raises ValueError if `token_id` is not a row of the embedding matrix."""
    if token_id is not None and not 0 <= token_id < vocab_size:
        raise ValueError(
            f"{name}={token_id} is outside the vocabulary (0 to {vocab_size - 1}). "
            f"Pass the id the model was trained with, or a larger vocab_size."
        )


def check_at_least_one(config: PreTrainedConfig, *names: str) -> None:
    """Raises ValueError if one of the fields `names` is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


def check_functions(config: PreTrainedConfig) -> None:
    """Raises ValueError for an activation function or kind of rotary embedding that transformers does not know."""
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    for name, value, known in (
        ("hidden_act", config.hidden_act, ACT2FN),
        ("rope_type", rope_type, {"default", *ROPE_INIT_FUNCTIONS}),
    ):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}{nearest_name(str(value), known)}; one of {', '.join(known)}.")


def check_heads(config: PreTrainedConfig) -> None:
    """Raises ValueError if the attention heads do not divide the width, or the key/value heads the query heads."""
    check_at_least_one(config, "num_attention_heads", "num_key_value_heads")
    for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(f"{whole}={getattr(config, whole)} is not a multiple of {part}={getattr(config, part)}.")

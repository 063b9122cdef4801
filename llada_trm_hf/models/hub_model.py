"""What every model of the package shares: settings that are checked, complete checkpoints, code beside the weights."""

import ast
import difflib
import importlib
import inspect
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import fields
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, find_adapter_config_file, is_peft_available

# The masked-diffusion families and the refiners by `model_type`, filled by `registered_models.py` and
# `register_refiner`. (Not by config class: remote code may load the same class twice, from two files.)
BACKBONES: dict[str, type[PreTrainedModel]] = {}
REFINERS: dict[str, type[PreTrainedModel]] = {}

# What saving, loading and pushing do beyond transformers, filled where the package is imported: "save_card",
# "push_model", "push_folder", "replacing_files", "check_stored_weights", "backbone_fingerprint" and "check_backbone",
# of its `hub`. Empty in the code that travels with a checkpoint.
HUB_HOOKS: dict[str, Callable[..., Any]] = {}
# Fields of a config with ids of tokens that a model cannot do without.
NEEDED_TOKENS = ("mask_token_id", "latent_token_id", "think_start_token_ids", "think_end_token_ids")

_HERE = Path(__file__).resolve().parent
_REGISTRY_FILE = "registered_models.py"
_SAVE_ARGUMENTS = {*inspect.signature(PreTrainedModel.save_pretrained).parameters} - {"token"}  # that is for pushing
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
            ValueError: naming the tensors, or for PEFT adapters that do not say which model they belong to.
        """
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            adapter_and_base(pretrained_model_name_or_path)
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
        if "check_stored_weights" in HUB_HOOKS and getattr(model, "hf_quantizer", None) is None:
            HUB_HOOKS["check_stored_weights"](pretrained_model_name_or_path, kwargs)
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
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As in transformers, except that tensors keep this package's names unless `save_original_format=True` asks for
        those of the official checkpoints. (The HF Trainer resumes by the names in memory.) Where the package is
        imported, three things more. Over an older model, all files are written first and then take the place of the
        old ones: a save that is cut short leaves the old model, the new one or, for a moment, none that could be
        loaded, never parts of both. A model card is written, but never over a README.md that a person wrote or
        changed. And `push_to_hub=True` uploads as `push_to_hub` does.

        Raises:
            ValueError: for quantised weights that cannot be saved, before anything is written.
        """
        _check_weights_can_be_saved(self, kwargs.get("state_dict"), save_original_format)
        has_adapters = getattr(self, "_hf_peft_config_loaded", False)  # they are saved alone, as PEFT does
        hooks = {} if has_adapters else HUB_HOOKS
        upload: dict[str, Any] = {}
        if push_to_hub and hooks:
            upload = {name: kwargs.pop(name) for name in list(kwargs) if name not in _SAVE_ARGUMENTS}
        # transformers uploads by the name of the folder it wrote to; its distributed format has many writers.
        in_place = not is_main_process or (push_to_hub and not hooks) or kwargs.get("distributed_checkpoint", False)
        replacing_files = nullcontext if in_place else HUB_HOOKS.get("replacing_files", nullcontext)
        with replacing_files(save_directory) as folder:
            if is_main_process and not has_adapters:
                os.makedirs(folder, exist_ok=True)
                self.export_code(folder)
            super().save_pretrained(  # type: ignore[misc]
                folder,
                is_main_process=is_main_process,
                save_original_format=save_original_format,
                push_to_hub=push_to_hub and not hooks,
                **kwargs,
            )
        if hooks and is_main_process:
            tags = self.model_tags  # type: ignore[attr-defined]
            hooks["save_card"](save_directory, tags=tags)
            if push_to_hub:
                hooks["push_folder"](save_directory, **{"tags": tags, **upload})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        As in transformers. Where the package is imported, it uploads what `llada-trm push` does, a complete model with
        its card and nothing else, in one commit.

        Args:
            repo_id: `owner/name`, or the name alone for a repository of your own.
            kwargs: those of transformers (`private`, `revision`, `create_pr`, `commit_message`, `commit_description`,
                `token`, `tags`, `max_shard_size`); with the package also `description`, `license` and `base_model` for
                the card, and `save_backbone=False` for the trained part of a hybrid or a latent thinker alone.

        Raises:
            ValueError: without a token, and for a model that nobody else could load.
        """
        if "push_model" in HUB_HOOKS and not getattr(self, "_hf_peft_config_loaded", False):
            return HUB_HOOKS["push_model"](self, repo_id, **kwargs)
        return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """
        As in transformers, except that the tokens a model cannot do without have to stay.

        Raises:
            ValueError: for fewer embeddings than that, naming the token; nothing has changed then.
        """
        if new_num_tokens is not None:
            size = -(-new_num_tokens // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
            for name in NEEDED_TOKENS:
                ids = getattr(self.config, name, None)  # type: ignore[attr-defined]
                largest = max(ids, default=-1) if isinstance(ids, (list, tuple)) else -1 if ids is None else ids
                if largest >= size:
                    raise ValueError(
                        f"{size} token embeddings leave out {name}={ids}, which the model cannot do without: keep at "
                        f"least {largest + 1}."
                    )
        return super().resize_token_embeddings(  # type: ignore[misc]
            new_num_tokens, pad_to_multiple_of, mean_resizing
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


def _check_weights_can_be_saved(model: Any, state_dict: dict[str, Any] | None, save_original_format: bool) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        weights = dict(model.named_parameters()) if state_dict is None else state_dict
        for name, weight in weights.items():
            is_of_torch = type(weight).__module__.startswith("torch.")  # a DTensor, which transformers gathers
            if is_traceable_wrapper_subclass(weight) and not is_of_torch:
                raise ValueError(
                    f"{name} is a {type(weight).__name__}, quantised after loading, which no checkpoint could "
                    f"tell: load the model with quantization_config instead."
                )
    elif not quantizer.is_serializable():
        method = getattr(quantizer.quantization_config.quant_method, "value", "this method")
        raise ValueError(f"Weights quantised by {method} cannot be saved: save the model before, or a part without.")
    elif save_original_format:
        raise ValueError("Quantised weights have no official format: leave out save_original_format.")


# --- Adapters ---


def adapter_and_base(path: Any, **place: Any) -> tuple[Any, Any]:
    """
    The folder or repository of PEFT adapters that `path` is, or None, and that of their model, by default `path`.

    Args:
        place: says where files come from, `cache_dir`, `revision`, `token`, ...

    Raises:
        ValueError: for adapters that do not say which model they belong to.
    """
    file = find_adapter_config_file(path, **place) if is_peft_available() else None
    if file is None:
        return None, path
    if os.path.isfile(os.path.join(path, CONFIG_NAME)):  # adapters beside their model
        return path, path
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{path} holds adapters, and its adapter_config.json names no base model: build the model as it was "
            f"before training and use PeftModel.from_pretrained(model, folder). Adapters name it if it was loaded "
            f"from a folder or repository."
        )
    return path, base


# --- Backbones of checkpoints without one ---


def lasting_name(name_or_path: str) -> str:
    """A folder's name in full, so that it is found from anywhere; that of a repository as it is."""
    return os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path


def backbone_place(name_or_path: str, checkpoint: Any) -> str:
    """
    Where the backbone is that a checkpoint without one names: a repository, a folder, or one relative to the
    checkpoint. Raises FileNotFoundError for a folder that is not there.
    """
    beside = os.path.join(checkpoint, name_or_path)
    if not os.path.isdir(name_or_path) and os.path.isdir(beside):
        return os.path.normpath(beside)
    is_path = os.path.isabs(name_or_path) or name_or_path.startswith(".") or name_or_path.count("/") > 1
    if is_path and not os.path.isdir(name_or_path):
        raise FileNotFoundError(
            f"{checkpoint} holds no backbone, and the folder of the one it names is not there: {name_or_path}. Put it "
            f"there, or change backbone_name_or_path in the config.json of {checkpoint}."
        )
    return name_or_path


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


def check_at_least_one(config: PreTrainedConfig, *names: str) -> None:
    """Raises ValueError if one of the fields `names` is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


def check_fields(config: PreTrainedConfig) -> None:
    """Raises ValueError for a field of another type than declared, and for a number that is NaN or infinite."""
    dtype = str(config.dtype).removeprefix("torch.")
    if dtype not in ("None", "auto") and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or another of torch, got {config.dtype!r}.")
    for field in fields(config):
        value, declared = getattr(config, field.name), field.type
        kinds: tuple[Any, ...] = declared.__args__ if isinstance(declared, UnionType) else (declared,)
        if field.name in PreTrainedConfig.__dataclass_fields__ or not {*kinds} <= {int, float, bool, str, NoneType}:
            continue
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds) or value is field.default
        is_odd = (isinstance(value, bool) and bool not in kinds) or value in (math.inf, -math.inf) or value != value
        if not fits or is_odd:
            expected = "a finite number" if float in kinds else f"of type {kinds[0].__name__}"
            raise ValueError(f"{field.name} must be {expected}, got {value!r}.")


# --- Offloading ---

_Method = TypeVar("_Method", bound=Callable[..., Any])


def with_device_hooks(method: _Method) -> _Method:
    """
    Decorator for a method that uses its module's weights and is called from outside instead of `forward`: on a model
    that accelerate has dispatched or offloaded, the hook around `forward`, which brings weights and inputs to the
    device, runs around this method too. `forward` itself must not call it.
    """

    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is None:
            return method(self, *args, **kwargs)
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return hook.post_forward(self, method(self, *args, **kwargs))

    return wrapper  # type: ignore[return-value]

"""Which files of a checkpoint's folder are uploaded, and whether somebody else could load them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from ..models.latent_thinking.thinking_chat_template import latent_thinking_template_files
from .model_card import read_config
from .readme_file import README, is_generated, new_card, read_readme, sign
from .training_record import TRAINING_SETTINGS_FILE, read_json

# What loads the model, besides the code that `auto_map` names. The rest stays: optimizer states, pickles, logs and
# metrics (the card has the results), and `trainer_state.json`, which names folders of this machine.
UPLOADED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    TRAINING_SETTINGS_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    README,
)
_ADAPTER = ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them
_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # smaller ones are quantised
_INDEX = "model.safetensors.index.json"


def files_to_publish(
    folder: str | os.PathLike,
    repo_id: str,
    description: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] | None = None,
) -> dict[str, str | bytes]:
    """
    The files of `folder` that are uploaded, without contacting the Hub. Of its Python files only those that `auto_map`
    names, and what they import. The chat template of a latent thinker is that of `latent_thinking_tokenizer`. A
    README.md that a person wrote or changed is uploaded as it is; else a card is made from the checkpoint. (An
    adapter's is made by PEFT.)

    Args:
        folder, repo_id, description, revision, base_model, license, tags: see `model_card`; the config names
            `base_model` too.

    Returns:
        Path in the repository -> path on this machine, or the file's bytes.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that nobody else could load, or whose weights are damaged, NaN
            or infinite, and for an impossible name.
    """
    for name in (repo_id, base_model):
        if name is not None:
            check_repo_id(name)
    folder = Path(folder)
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
    config_file, base_field = "config.json", "backbone_name_or_path"
    if is_adapter:
        config_file, base_field = ADAPTER_CONFIG, "base_model_name_or_path"
    config = read_json(folder / ADAPTER_CONFIG) if is_adapter else read_config(folder)
    code = _code_files(folder, config.get("auto_map"))
    tokenizer_code = _code_files(folder, read_json(folder / "tokenizer_config.json").get("auto_map"))
    paths = [path for pattern in (*UPLOADED, *(_ADAPTER if is_adapter else ())) for path in folder.glob(pattern)]
    paths += [folder / name for name in code | tokenizer_code]
    paths = [path for path in paths if path.is_file()]
    _check_inside(folder, paths)
    contents: dict[str, str | bytes] = {path.relative_to(folder).as_posix(): str(path) for path in paths}
    contents |= latent_thinking_template_files(folder)
    readme = read_readme(folder)
    base = config.get(base_field)
    # A whole model does not need to say where its backbone was on this machine.
    is_private = not is_adapter and config.get("backbone_in_checkpoint", True) and base and _is_local(folder, base)
    if base_model is not None or is_private:
        if is_adapter and base_model and readme is not None:  # PEFT's card names the base in several places
            contents[README] = readme.replace(str(config.get(base_field)), base_model).encode()
        config[base_field] = base_model
        contents[config_file] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    _check_loadable(folder, config, code, set(contents))
    if not is_adapter and (readme is None or is_generated(readme)):
        about = {"description": description, "revision": revision, "base_model": base_model, "tags": tags}
        contents[README] = sign(new_card(folder, repo_id, license, **about)).encode()
    elif given := [name for name, value in {"description": description, "license": license}.items() if value]:
        whose = "the card of an adapter is PEFT's" if is_adapter else f"{folder} has a README.md of yours"
        raise ValueError(f"{whose}, which is uploaded as it is: put the {' and the '.join(given)} there.")
    return dict(sorted(contents.items()))


def check_repo_id(name: str, needs_owner: bool = True) -> None:
    """Raises ValueError for an impossible name of a repository."""
    validate_repo_id(name)
    if needs_owner and name.count("/") != 1:
        raise ValueError(f"A repository is named owner/name, got {name!r}.")


def _check_inside(folder: Path, paths: list[Path]) -> None:
    """Raises a ValueError for a link out of `folder`, except to the blobs of the Hub's cache, where it is made so."""
    allowed = [
        folder.resolve(),
        *([folder.resolve().parents[1] / "blobs"] if folder.parent.name == "snapshots" else []),
    ]
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise ValueError(
                f"{path} is a link to {target}, outside of the checkpoint: put a copy there to upload it."
            )


def _code_files(folder: Path, auto_map: Any) -> set[str]:
    """The files that an `auto_map` names and, recursively, those that they import, whether they exist or not."""
    files: set[str] = set()
    waiting = [f"{reference.split('.')[0]}.py" for reference in _references(auto_map) if "--" not in reference]
    while waiting:
        name = waiting.pop()
        if name not in files and (folder / name).is_file():
            waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
        files.add(name)
    return files


def _references(auto_map: Any) -> list[str]:
    """Of a model's map (Auto class -> reference) or a tokenizer's (Auto class -> two references, maybe None)."""
    if isinstance(auto_map, str):
        return [auto_map]
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map or ()
    return [reference for value in values for reference in _references(value)]


def _check_loadable(folder: Path, config: dict[str, Any], code: set[str], names: set[str]) -> None:
    """Raises an error for what another machine could not load."""
    is_adapter = ADAPTER_CONFIG in names
    where = read_json(folder / _INDEX).get("weight_map", {})  # tensor -> file
    weights = set(where.values()) or {ADAPTER_WEIGHTS if is_adapter else "model.safetensors"}
    if elsewhere := sorted(name for name in weights if Path(name).name != name):
        raise ValueError(f"{folder / _INDEX} names {elsewhere[0]}, which is no file of this folder.")
    missing = sorted((weights | code) - names)
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: save the model with save_pretrained.")
    if "auto_map" not in config and not is_adapter:
        raise ValueError(f"{folder}/config.json names no code (auto_map): save the model with this package.")
    base = config.get("base_model_name_or_path" if is_adapter else "backbone_name_or_path") or ""
    has_base = not is_adapter and config.get("backbone_in_checkpoint", True)
    if not has_base and _is_local(folder, base):
        hint = "name its repository (--base_model owner/name), or save the model whole"
        raise ValueError(f"{folder} holds no backbone and names a folder of this machine, {base}: {hint}.")
    _check_weights(folder, {name: {key for key in where if where[key] == name} for name in sorted(weights)})


def _is_local(folder: Path, base: str) -> bool:
    """
    Whether a base model's name is that of a folder, which another machine could take for somebody's repository: older
    checkpoints name it relative to where training ran, mostly a folder above the checkpoint.
    """
    if os.path.isabs(base) or base.startswith(".") or base.count("/") > 1 or os.path.isdir(base):
        return True
    return any((place / base).is_dir() for place in (folder.resolve(), *folder.resolve().parents))


def _check_weights(folder: Path, tensors: dict[str, set[str]]) -> None:
    """
    Raises a ValueError if one of the files (name -> the tensors an index expects in it) was not written to its end,
    lacks a tensor, or holds NaN or infinite numbers. They are read once, a tensor at a time.
    """
    broken: list[str] = []
    for name, expected in tensors.items():
        try:
            with safe_open(folder / name, "pt") as file:
                if lacking := sorted(expected - set(file.keys())):
                    raise ValueError(f"{folder / name} lacks {', '.join(lacking[:8])}: save the model again.")
                for key in file.keys():  # noqa: SIM118 (a file, not a dict)
                    tensor = file.get_tensor(key)
                    if tensor.dtype in _CHECKED and not tensor.isfinite().all():
                        broken.append(key)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged ({error}): save the model again.") from error
    if broken:
        raise ValueError(
            f"{folder} holds NaN or infinite numbers in {len(broken)} tensors: {', '.join(broken[:8])}"
            f"{', ...' if len(broken) > 8 else ''}. Upload an earlier checkpoint."
        )

"""Whether weights are what they are taken for: stored as numbers with a fraction, and of the backbone a head knows."""

import json
import math
import os
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..models.backbone_wrapper import HUB_ARGUMENTS
from .training_record import read_json

_VALUES_OF_A_TENSOR = 64
_NUMBERS = 16
# Between two fingerprints as vectors, per number, where each is about 1. Rounding to bfloat16 makes 0.001, quantising
# to eight bits 0.005 or more, a model fine-tuned at usual learning rates from 0.01, another model 1.4.
_ROUNDING = 0.004
_ANOTHER_MODEL = 0.7
_WHOLE_NUMBERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64"}
_PREFIX = "backbone."


def check_stored_weights(name_or_path: Any, arguments: dict[str, Any]) -> None:
    """
    Raises ValueError if weights are stored as whole (or complex) numbers, which transformers converts without a word.

    Args:
        name_or_path: the folder or repository of a model. One that is quantised, or has a part that is, is not looked
            at.
        arguments: of `from_pretrained`; some say where files come from.
    """
    place = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments and name != "force_download"}

    def find(name: str) -> str | None:
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        return cached_file(name_or_path, name, **quiet, **place)

    config = find(CONFIG_NAME)
    if config is not None and _is_quantised(read_json(config)):
        return
    index = find(SAFE_WEIGHTS_INDEX_NAME) if find(SAFE_WEIGHTS_NAME) is None else None
    names = [SAFE_WEIGHTS_NAME] if index is None else sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        file = find(name)
        if file is None:
            continue
        for tensor, entry in _header(file).items():
            if tensor.endswith(("weight", "bias")) and entry["dtype"] in _WHOLE_NUMBERS:
                raise ValueError(
                    f"{os.path.basename(file)} of {name_or_path} holds {tensor} as {entry['dtype']}, which no weight "
                    f"can be: save the model again in float32, bfloat16 or float16."
                )


def check_index(folder: str) -> None:
    """Raises ValueError if the index of sharded weights in `folder`, where there is one, is not one."""
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    where = read_json(index).get("weight_map", {})
    metadata = read_json(index).get("metadata", {})
    files = list(where.values()) if isinstance(where, dict) else [None]
    has_files = not os.path.isfile(index) or (files and all(isinstance(file, str) for file in files))
    if not has_files or not isinstance(metadata, dict):
        raise ValueError(f"{index} does not say which file each tensor is in: save or download the model again.")


def backbone_fingerprint(state_dict: dict[str, torch.Tensor]) -> list[float] | None:
    """
    What tells the backbone in the `state_dict` of a model from others, and from itself after more training: sums over
    samples of its matrices. Rounding to another dtype hardly changes them.

    Returns:
        16 numbers of about 1, or None if the weights are not all at hand: quantised, sharded, offloaded, or under an
        adapter.
    """
    samples = []
    for weight in _matrices(state_dict):
        if weight is None:
            return None
        flat = weight.detach().reshape(-1)
        stride = max(flat.numel() // _VALUES_OF_A_TENSOR, 1)
        values = flat[::stride][:_VALUES_OF_A_TENSOR].float()
        samples.append(values / values.square().mean().sqrt().clamp(min=1e-12))
    if not samples:
        return None
    values = torch.cat([sample.cpu() for sample in samples])
    per_number = len(values) // _NUMBERS
    sums = values[: per_number * _NUMBERS].view(per_number, _NUMBERS).sum(0) / max(per_number, 1) ** 0.5
    return [round(number, 4) for number in sums.tolist()]


def check_backbone(config: PreTrainedConfig, backbone: PreTrainedModel, checkpoint: str) -> None:
    """
    Compares a `backbone` with the one that the recursive module in `checkpoint`, which has this `config`, was saved
    with. (Older checkpoints have no fingerprint: they fit any.)

    Raises:
        ValueError: for another model. One that was trained further is a warning.
    """
    saved, name = config.backbone_fingerprint, config.backbone_name_or_path
    numbers = saved if isinstance(saved, list) else [saved]
    if saved is not None and not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ValueError(f"{checkpoint}: backbone_fingerprint of the config must be a list of numbers, got {saved!r}.")
    found = None if saved is None else backbone_fingerprint(backbone.state_dict(prefix=_PREFIX))
    if saved is None or found is None:
        return
    difference = torch.tensor(numbers) - torch.tensor(found) if len(numbers) == len(found) else torch.tensor(2.0)
    distance = difference.square().mean().sqrt().item()
    if distance > _ANOTHER_MODEL:
        raise ValueError(
            f"{checkpoint} was trained on another backbone than {name}, whose weights have nothing in common with it: "
            f"pass backbone_name_or_path to name the right one."
        )
    if distance > _ROUNDING:
        warnings.warn(
            f"The weights of {name} are not those that {checkpoint} was trained on: they were trained further, or "
            f"have an adapter merged into them. Pass backbone_name_or_path to name the backbone as it was.",
            stacklevel=2,
        )


def _matrices(state_dict: dict[str, torch.Tensor]) -> Iterator[torch.Tensor | None]:
    """
    The backbone's matrices by their names, None for one whose numbers are not at hand. Not the LM head, which stands
    in some files only if it is not tied.
    """
    for name in sorted(name for name in state_dict if name.startswith(_PREFIX)):
        weight = state_dict[name]
        if name.endswith("lm_head.weight") or (weight.ndim < 2 and weight.is_floating_point()):
            continue
        is_plain = weight.is_floating_point() and not is_traceable_wrapper_subclass(weight) and not weight.is_meta
        yield weight if is_plain and "lora_" not in name and ".base_layer." not in name else None


def _is_quantised(config: Any) -> bool:
    if isinstance(config, dict):
        return config.get("quantization_config") is not None or any(map(_is_quantised, config.values()))
    return isinstance(config, list) and any(map(_is_quantised, config))


def _header(file: str) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes in a safetensors file; whether it is whole, the library has checked."""
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}

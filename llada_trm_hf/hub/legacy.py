"""The models of the older llm-trm trainers, from their pickled `.pt` files."""

import os
from typing import Any

import torch

from ..models import DimensionCompressor, DimensionCompressorConfig, SequenceTRM, SequenceTRMConfig
from ..storage import read_legacy_pickle

_NEEDED_SETTINGS = ("n_layers", "n_heads", "n_latent_steps", "n_deep_recursions")
_TRAINING_SETTINGS = ("n_supervision_steps", "dropout", "halt_loss_weight")


def import_legacy(path: str | os.PathLike, use_ema: bool = True) -> DimensionCompressor | SequenceTRM:
    """
    The model of an older `compressor.pt` / `trm.pt` (`stage1a_best.pt`, `best.pt`, ...), on the CPU and in evaluation
    mode.

    Args:
        path: the file.
        use_ema: take the averaged weights of a SequenceTRM if the file has them.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for `read_legacy_pickle`.
        ValueError: for a file that holds no such model, or an incomplete one.
    """
    content = read_legacy_pickle(path)
    try:
        if "compressor" in content:
            return _compressor(_without_compile_prefix(content["compressor"]))
        if "trm_state_dict" in content:
            weights = (use_ema and content.get("ema_shadow")) or content["trm_state_dict"]
            return _sequence_trm(_without_compile_prefix(weights), content["config"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete checkpoint of an older trainer: {error}") from error
    hint = " It holds hidden pairs: use read_legacy_hidden_pairs." if "hidden_pre" in content else ""
    raise ValueError(
        f"{path} holds neither a compressor ('compressor') nor a TRM ('trm_state_dict'), but {list(content)}.{hint}"
    )


def _compressor(weights: dict[str, torch.Tensor]) -> DimensionCompressor:
    if set(weights) != {"compress.weight"}:
        raise ValueError(f"A compressor has one tensor, compress.weight, not {sorted(weights)}.")
    weight = weights["compress.weight"]
    compressed_size, hidden_size = weight.shape
    model = DimensionCompressor(DimensionCompressorConfig(hidden_size=hidden_size, compressed_size=compressed_size))
    model.load_state_dict({"weight": weight})
    return model.eval()


def _sequence_trm(weights: dict[str, torch.Tensor], settings: Any) -> SequenceTRM:
    saved = vars(settings)
    unknown = [name for name in _NEEDED_SETTINGS if name not in saved]
    if unknown:
        raise ValueError(f"its configuration lacks {unknown}, which the weights' shapes do not tell.")
    fields = {name: saved[name] for name in (*_NEEDED_SETTINGS, *_TRAINING_SETTINGS) if name in saved}
    if "halt_threshold" in saved:
        fields["cosine_threshold"] = saved["halt_threshold"]
    config = SequenceTRMConfig(
        block_style="llm_trm",
        hidden_size=weights["reasoning_token"].shape[-1],
        intermediate_size=len(weights["net.layers.0.mlp.0.weight"]),
        halt_loss="bce" if saved.get("bce_halt_loss", False) else "mse",
        **fields,
    )
    model = SequenceTRM(config)
    model.load_state_dict({name.replace(".in_proj_", ".in_proj."): tensor for name, tensor in weights.items()})
    return model.eval()


def _without_compile_prefix(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}

"""Models and hidden pairs of the older llm-trm trainers, from their pickled `.pt` files."""

import os
import zipfile
from types import SimpleNamespace
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..models import DimensionCompressor, DimensionCompressorConfig, SequenceTRM, SequenceTRMConfig

# The trainers' configurations, pickled by a script or by an imported module: read as plain attributes.
_CONFIGS: list[Any] = [
    (SimpleNamespace, "__main__.Phase1Config"),
    (SimpleNamespace, "__main__.Phase2Config"),
    (SimpleNamespace, "src.train.phase1_compressor.Phase1Config"),
    (SimpleNamespace, "src.train.phase2_trm.Phase2Config"),
]
_NEEDED_SETTINGS = ("n_layers", "n_heads", "n_latent_steps", "n_deep_recursions")
_TRAINING_SETTINGS = ("n_supervision_steps", "dropout", "halt_loss_weight")
_PAIRS_KEYS = ("hidden_pre", "hidden_post", "seq_lengths", "num_thinking_tokens", "problems", "hidden_size")


def import_legacy(path: str | os.PathLike, use_ema: bool = True) -> DimensionCompressor | SequenceTRM:
    """
    The model of an older `compressor.pt` / `trm.pt` (`stage1a_best.pt`, `best.pt`, ...), on the CPU and in evaluation
    mode; with `use_ema` the averaged weights of a SequenceTRM if the file has them. Nothing in it is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: with torch before 2.10, in which a crafted file can corrupt memory even with `weights_only=True`
            (CVE-2026-24747).
        ValueError: for a file that holds no such model, or an incomplete one, a damaged file, or a pickle that names
            a class or function these files do not need (the message says which), or a zip bomb.
    """
    content = _read_pickle(path)
    try:
        if "compressor" in content:
            return _compressor(_without_compile_prefix(content["compressor"])).eval()
        if "trm_state_dict" in content:
            weights = (use_ema and content.get("ema_shadow")) or content["trm_state_dict"]
            return _sequence_trm(_without_compile_prefix(weights), vars(content["config"])).eval()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete checkpoint of an older trainer: {error}") from error
    hint = " It holds hidden pairs: use read_legacy_hidden_pairs." if "hidden_pre" in content else ""
    raise ValueError(
        f"{path} holds neither a compressor ('compressor') nor a TRM ('trm_state_dict'), but {list(content)}.{hint}"
    )


def read_legacy_hidden_pairs(path: str | os.PathLike) -> dict[str, Any]:
    """
    The dictionary of an older `hidden_pairs.pt`: `hidden_pre`, a list of `[L_i, D]`; `hidden_post` `[N, D]`;
    `seq_lengths`, `num_thinking_tokens` and `problems`, lists of N; `hidden_size`, D. Raises the errors of
    `import_legacy`.
    """
    content = _read_pickle(path)
    missing = [key for key in _PAIRS_KEYS if key not in content]
    if missing:
        raise ValueError(f"{path} does not hold hidden pairs: it lacks {missing} and has {list(content)}.")
    pre, post, size = content["hidden_pre"], content["hidden_post"], content["hidden_size"]
    try:
        shapes = [tuple(states.shape) for states in pre]
        fits = shapes == [(length, size) for length in content["seq_lengths"]] and post.shape == (len(pre), size)
        counts = {key: len(content[key]) for key in _PAIRS_KEYS[:-1]}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not hold hidden pairs: {error}") from error
    if not fits:
        raise ValueError(f"{path}: the shapes of hidden_pre and hidden_post differ from seq_lengths and hidden_size.")
    if len(set(counts.values())) > 1:
        raise ValueError(f"{path}: its parts are of different lengths: {counts}.")
    return content


def _read_pickle(path: str | os.PathLike) -> dict[str, Any]:
    """The dictionary in the file, its tensors on the CPU."""
    if torch.__version__ < "2.10":  # compared as versions
        raise ImportError(f"Reading {path} safely needs torch 2.10 or newer, but this is {torch.__version__}.")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(archive, os.path.getsize(path))
            damaged = archive.testzip()  # torch does not compare checksums
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged.")
        with safe_globals(_CONFIGS):
            # Asked first because the error of `torch.load` recommends weights_only=False.
            refused = get_unsafe_globals_in_checkpoint(path)
            if refused:
                raise ValueError(f"its pickle names {', '.join(sorted(refused))}, which could run code: refused.")
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"Cannot read {path}: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary.")
    return content


def _check_size(archive: zipfile.ZipFile, size: int) -> None:
    """`torch.save` does not compress; a file that would grow (a zip bomb, or parts that overlap) is not unpacked."""
    unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > size:
        raise ValueError(f"its {size} bytes would unpack to {unpacked}, which no file of torch.save does: refused.")


def _check_tensors(content: Any) -> None:
    """Refuses tensors that repeat what is stored, for which a copy would need any amount of memory."""
    if isinstance(content, torch.Tensor):
        stored = content.untyped_storage().nbytes()
        if content.numel() * content.element_size() > stored:
            raise ValueError(f"a tensor of shape {tuple(content.shape)} in it has {stored} bytes only: refused.")
    elif isinstance(content, (dict, list, tuple)):
        for part in content.values() if isinstance(content, dict) else content:
            _check_tensors(part)


def _compressor(weights: dict[str, torch.Tensor]) -> DimensionCompressor:
    if set(weights) != {"compress.weight"}:
        raise ValueError(f"A compressor has one tensor, compress.weight, not {sorted(weights)}.")
    compressed_size, hidden_size = weights["compress.weight"].shape
    model = DimensionCompressor(DimensionCompressorConfig(hidden_size=hidden_size, compressed_size=compressed_size))
    model.load_state_dict({"weight": weights["compress.weight"]})
    return model


def _sequence_trm(weights: dict[str, torch.Tensor], saved: dict[str, Any]) -> SequenceTRM:
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
    return model


def _without_compile_prefix(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}

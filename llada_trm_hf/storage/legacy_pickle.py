"""Reads the pickled `.pt` files of the older llm-trm project without executing anything they hold."""

import os
import zipfile
from types import SimpleNamespace
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# The trainers' configurations, pickled by a script or by an imported module: read as plain attributes.
_CONFIGS: list[Any] = [
    (SimpleNamespace, "__main__.Phase1Config"),
    (SimpleNamespace, "__main__.Phase2Config"),
    (SimpleNamespace, "src.train.phase1_compressor.Phase1Config"),
    (SimpleNamespace, "src.train.phase2_trm.Phase2Config"),
]
_PAIRS_KEYS = ("hidden_pre", "hidden_post", "seq_lengths", "num_thinking_tokens", "problems", "hidden_size")


def read_legacy_pickle(path: str | os.PathLike) -> dict[str, Any]:
    """
    The dictionary in the file, its tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: with torch before 2.10, in which a crafted file can corrupt memory even with `weights_only=True`
            (CVE-2026-24747).
        ValueError: for another kind of file, a damaged one, or a pickle that names a class or function these files do
            not need (the message says which).
    """
    if torch.__version__ < "2.10":  # compared as versions
        raise ImportError(f"Reading {path} safely needs torch 2.10 or newer, but this is {torch.__version__}.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare checksums
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged.")
        with safe_globals(_CONFIGS):
            # Asked first because the error of `torch.load` recommends weights_only=False.
            refused = get_unsafe_globals_in_checkpoint(path)
            content = None if refused else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"Cannot read {path}: {error or type(error).__name__}") from error
    if refused:
        names = ", ".join(sorted(refused))
        raise ValueError(f"Cannot read {path}: its pickle names {names}, which could run code: refused.")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary.")
    return content


def read_legacy_hidden_pairs(path: str | os.PathLike) -> dict[str, Any]:
    """
    The dictionary of an older `hidden_pairs.pt`: `hidden_pre`, a list of `[L_i, D]`; `hidden_post` `[N, D]`;
    `seq_lengths`, `num_thinking_tokens` and `problems`, lists of N; `hidden_size`, D.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as for `read_legacy_pickle`, or if the parts do not fit together.
    """
    content = read_legacy_pickle(path)
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

"""
Reads the pickled `.pt` files of the older llm-trm project without executing anything they hold.

The files are zip archives: a pickle that names tensors and classes, and the tensors' bytes. Not read by `torch.load`:
even with `weights_only=True`, before torch 2.10 a crafted file corrupts memory (CVE-2026-24747). Here the unpickler
knows the few names these files need, none of which runs anything, and tensors are views of the bytes that are there,
with their bounds checked.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch

# The trainers' configurations, pickled by a script or by an imported module: read as plain attributes.
_CONFIGS = {
    *(("__main__", name) for name in ("Phase1Config", "Phase2Config")),
    ("src.train.phase1_compressor", "Phase1Config"),
    ("src.train.phase2_trm", "Phase2Config"),
}
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
_PAIRS_KEYS = ("hidden_pre", "hidden_post", "seq_lengths", "num_thinking_tokens", "problems", "hidden_size")


def read_legacy_pickle(path: str | os.PathLike) -> dict[str, Any]:
    """
    The dictionary in the file, its tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another kind of file, a damaged one, or a pickle that names anything these files do not need
            (the message names it).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = _TensorUnpickler(archive).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it meets
        raise ValueError(f"Cannot read {path}: {error or type(error).__name__}") from error
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


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors, containers and attribute bags from the pickle of `archive`, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile):
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        self.archive, self.folder = archive, pickled.removesuffix("data.pkl")
        self.storages: dict[str, torch.Tensor] = {}
        super().__init__(io.BytesIO(archive.read(pickled)))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONFIGS:
            return SimpleNamespace
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise ValueError(f"its pickle names {module}.{name}, which could run code and is not needed: refused.")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """A storage as a flat tensor on the CPU, wherever it was when it was saved."""
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _rebuild_tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)  # which refuses to leave the storage

"""Hidden pairs on disk: numbered shards, their index, and the dataset and collator that read them."""

import errno
import json
import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..data.thoughts import COMPLETE
from ..hub import read_legacy_hidden_pairs
from ..hub.files import disk_problem, write_atomically
from ..hub.training_record import read_json
from ..models import DimensionCompressor

METADATA_FILE = "metadata.jsonl"
CONFIG_FILE = "datagen_config.json"
_MAX_OPEN_SHARDS = 16


def compressed(compressor: DimensionCompressor | None, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """States on the CPU, compressed if there is a compressor."""
    if compressor is None:
        return states
    return tuple(compressor.compress(each.to(compressor.device)).cpu() for each in states)


def shard_name(number: int) -> str:
    return f"pairs-{number:05d}.safetensors"


def write_shard(
    path: str, hidden_pre: torch.Tensor, hidden_post: torch.Tensor, problems: list[dict[str, Any]]
) -> None:
    """
    Writes `hidden_pre` `[sum of lengths, D]`, `hidden_post` `[pairs, D]` and, in the header, the metadata of each
    problem. The same content gives the same bytes; an OSError, such as a full disk, leaves nothing behind.
    """
    # A single entry: safetensors writes several in any order.
    header = {"problems": json.dumps(problems, ensure_ascii=False)}
    tensors = {"hidden_pre": hidden_pre, "hidden_post": hidden_post}
    _save_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def read_shard_problems(path: str) -> list[dict[str, Any]]:
    """The metadata of a shard's problems; raises ValueError if the file is missing or damaged."""
    with _open_shard(path) as shard:
        return json.loads((shard.metadata() or {}).get("problems", "null")) or []


class HiddenPairsDataset(Dataset):
    """
    The pairs of `llada-trm datagen`, or of the older single `.pt` file. An item is `{"context": [L, D], "target":
    [D], "id": str}`, float32: the states before `<think>` and the state at `</think>`.

    Indexing reads only the item's own rows from its shard; `lengths` is known without, for `LengthGroupedSampler`.

    Args:
        folder_or_file: of a finished run, or an older `.pt` file (held in memory; nothing in it is executed).
        compressor: maps the states to `[L, D']` and `[D']`, where they are not stored compressed.

    Attributes:
        lengths, ids, problems: of each pair its number of context positions, id and line of `metadata.jsonl`.
        num_skipped: problems of the run without a pair.
        hidden_size: the width of the items, D or D'.
        model_name: the name or folder of the language model whose states they are; None for an older file.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: for an unfinished run, damaged shards, no pairs, or a compressor of another width.
    """

    def __init__(self, folder_or_file: str | os.PathLike, compressor: DimensionCompressor | None = None):
        self.path = os.fspath(folder_or_file)
        self.compressor = compressor
        self.model_name: str | None = None
        self._legacy: dict[str, Any] | None = None
        self._shards: OrderedDict[int, Any] = OrderedDict()
        if os.path.isdir(self.path):
            problems = self._read_metadata()
            self.problems = [problem for problem in problems if problem["status"] == COMPLETE]
            stored_size = self._check_shards()
            states = read_json(os.path.join(self.path, CONFIG_FILE)).get("states")
            self.model_name = states.get("model") if isinstance(states, dict) else None
        else:
            problems = self.problems = self._read_legacy()
            stored_size = self._legacy["hidden_size"] if self._legacy else 0
        self.num_skipped = len(problems) - len(self.problems)
        if not self.problems:
            raise ValueError(f"{self.path} holds no pairs: none of {len(problems)} problems has a complete thought.")
        self.lengths = [problem["length"] for problem in self.problems]
        self.ids = [problem["id"] for problem in self.problems]
        if compressor is not None and compressor.config.hidden_size != stored_size:
            takes = f"hidden_size={compressor.config.hidden_size}"
            raise ValueError(f"The pairs of {self.path} are {stored_size} wide, the compressor takes {takes}.")
        self.hidden_size = stored_size if compressor is None else compressor.config.compressed_size

    def __len__(self) -> int:
        return len(self.problems)

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, Any]:
        context, target = compressed(self.compressor, *self.stored(index))
        return {"context": context.float(), "target": target.float(), "id": self.ids[index]}

    def stored(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Context and target of a pair as stored, in the dtype of the model that made them."""
        if self._legacy is not None:
            return self._legacy["hidden_pre"][index].clone(), self._legacy["hidden_post"][index].clone()
        problem = self.problems[index]
        shard, start = self._shard(problem["shard"]), problem["offset"]
        context = shard.get_slice("hidden_pre")[start : start + problem["length"]]
        # Clones: a slice keeps alive, and sends to other processes, everything it is a view of.
        return context.clone(), shard.get_slice("hidden_post")[problem["row"]].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict()}  # open files do not travel to data loader workers

    def _shard(self, number: int) -> Any:
        if number not in self._shards:
            if len(self._shards) >= _MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
            self._shards[number] = _open_shard(os.path.join(self.path, shard_name(number)))
        self._shards.move_to_end(number)
        return self._shards[number]

    def _read_metadata(self) -> list[dict[str, Any]]:
        path = os.path.join(self.path, METADATA_FILE)
        if not os.path.isfile(path):
            started = os.path.exists(os.path.join(self.path, CONFIG_FILE))
            found = "an unfinished run of datagen: start it again" if started else "no hidden pairs"
            raise ValueError(f"{self.path} holds {found} (there is no {METADATA_FILE}).")
        try:
            with open(path, encoding="utf-8") as file:
                problems = [json.loads(line) for line in file]
            _check_places(problems)
        except (ValueError, KeyError, TypeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is damaged ({found}): delete it and run datagen on the folder again.") from error
        return problems

    def _check_shards(self) -> int:
        """Checks that every shard is whole and fits the metadata; returns the width of the states."""
        lengths = defaultdict(list)
        for problem in self.problems:
            lengths[problem["shard"]].append(problem["length"])
        sizes = set()
        for number, expected in lengths.items():
            path = os.path.join(self.path, shard_name(number))
            with _open_shard(path) as shard:
                if not {"hidden_pre", "hidden_post"} <= {*shard.keys()}:
                    raise ValueError(f"{path} holds no hidden pairs: run datagen on the folder again.")
                pre, post = (shard.get_slice(name).get_shape() for name in ("hidden_pre", "hidden_post"))
            if len(pre) != 2 or len(post) != 2:
                raise ValueError(f"{path} holds states of shape {pre} and {post}: run datagen on the folder again.")
            if (pre[0], post[0]) != (sum(expected), len(expected)):
                raise ValueError(
                    f"{shard_name(number)} of {self.path} holds {post[0]} pairs of {pre[0]} positions, but "
                    f"{METADATA_FILE} says {len(expected)} of {sum(expected)}: they are from different runs."
                )
            sizes |= {pre[1], post[1]}
        if len(sizes) > 1:
            raise ValueError(f"The shards of {self.path} hold states of different widths: {sorted(sizes)}.")
        return sizes.pop() if sizes else 0

    def _read_legacy(self) -> list[dict[str, Any]]:
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"There is no file or folder {self.path}.")
        self._legacy = pairs = read_legacy_hidden_pairs(self.path)
        columns = {"length": "seq_lengths", "num_thought_tokens": "num_thinking_tokens", "problem": "problems"}
        return [
            {"id": str(number), "status": COMPLETE} | {name: pairs[key][number] for name, key in columns.items()}
            for number in range(len(pairs["problems"]))
        ]


class HiddenPairsCollator:
    """
    Pads the contexts of a batch on the right, with zeros, to the longest: `{"context": [B, L, D], "mask": BoolTensor
    [B, L] (False at padding), "target": [B, D], "ids": list of B}`.
    """

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([len(item["context"]) for item in items])
        return {
            "context": pad_sequence([item["context"] for item in items], batch_first=True),
            "mask": torch.arange(int(lengths.max())) < lengths[:, None],
            "target": torch.stack([item["target"] for item in items]),
            "ids": [item["id"] for item in items],
        }


def export_legacy_hidden_pairs(folder: str | os.PathLike, path: str | os.PathLike) -> int:
    """
    Writes the pairs of a finished run as the older single `.pt` dictionary, made in memory; returns their number.

    Raises:
        ValueError, FileNotFoundError: as [`HiddenPairsDataset`] does.
        OSError: if the file cannot be written; one that was there stays.
    """
    pairs = HiddenPairsDataset(folder)
    states = [pairs.stored(index) for index in range(len(pairs))]
    content = {
        "hidden_pre": [context for context, _ in states],
        "hidden_post": torch.stack([target for _, target in states]),
        "seq_lengths": pairs.lengths,
        "num_thinking_tokens": [problem["num_thought_tokens"] for problem in pairs.problems],
        "problems": [problem["problem"] for problem in pairs.problems],
        "hidden_size": pairs.hidden_size,
    }
    _save_atomically(os.fspath(path), lambda temporary: torch.save(content, temporary))
    return len(pairs)


def _check_places(problems: list[dict[str, Any]]) -> None:
    """
    Raises ValueError, KeyError or TypeError if lines of the metadata lack something, or name other rows of the shards
    than those where their states were written, one pair after the other.
    """
    shards: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for problem in problems:
        if problem["status"] == COMPLETE:
            places = [problem[name] for name in ("shard", "row", "offset", "length")]
            if not isinstance(problem["id"], str) or any(type(place) is not int or place < 0 for place in places):
                raise ValueError(f"the places of {problem['id']!r} are {places}")
            shards[places[0]].append((places[1], places[2], places[3]))
    for number, pairs in shards.items():
        offset = 0
        for expected, (row, start, length) in enumerate(sorted(pairs)):
            if (row, start) != (expected, offset):
                raise ValueError(f"shard {number} has row {row} at {start} instead of {expected} at {offset}")
            offset += length


def _save_atomically(path: str, save: Callable[[str], object]) -> None:
    def write(temporary: str) -> None:
        try:
            save(temporary)
        except (SafetensorError, RuntimeError) as error:
            if disk_problem(error) is not None:
                raise  # `write_atomically` says it better
            raise OSError(errno.EIO, f"cannot write {path}: {error}") from error

    write_atomically(path, write)


def _open_shard(path: str) -> Any:
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: run datagen on the folder again.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): run datagen on the folder again.") from error

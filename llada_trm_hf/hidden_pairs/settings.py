"""The settings of a datagen run: its problems, and what is recorded beside its files and must not change."""

import glob
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..data import GeneratorOptions, load_reasoning_dataset
from ..data.generated_problems import GENERATORS, options_taken
from ..data.rows import check_columns_exist, check_prompts, fingerprint, is_data_file, read_rows
from ..models import DimensionCompressor
from .dataset import CONFIG_FILE
from .traces import TraceSettings

STAGES = ("traces", "states", "all")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_TRACE_COLUMNS = ("id", "prompt", "reasoning", "completion", "completion_ids", "status")


@dataclass
class DatagenSettings(GeneratorOptions):
    """
    What a datagen run makes.

    Attributes:
        model: name or folder of a causal language model.
        output_dir: where everything goes.
        stage: `traces` writes thoughts, `states` takes the states of finished traces, `all` does both in one go and
            keeps the states while the model writes.
        dataset, split, num_samples, columns: the problems, with the generator options; see `load_problems`.
        traces_file: finished traces instead of a dataset, for `states`; see `load_traces`.
        think_start, think_end: the markers around a thought.
        batch_size: problems that go through the model together.
        checkpoint_every: problems per shard, the most an interrupted run loses.
        auto_resume: continue an earlier run in `output_dir`.
        compressor: name or folder of a `DimensionCompressor`: store D' states.
        dtype: of the model.
        device: where it runs; with several processes and `cuda`, each takes its own.
    """

    model: str
    output_dir: str
    stage: str = "all"
    dataset: list[str] = field(default_factory=list)
    split: str = "train"
    num_samples: int | None = None
    columns: dict[str, str] | None = None
    traces_file: str | None = None
    traces: TraceSettings = field(default_factory=TraceSettings)
    think_start: str = "<think>"
    think_end: str = "</think>"
    batch_size: int = 8
    checkpoint_every: int = 128
    auto_resume: bool = True
    compressor: str | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self):
        for name, choices in (("stage", STAGES), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("batch_size", "checkpoint_every", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if bool(self.dataset) == (self.traces_file is not None):
            raise ValueError("Say which problems: either --dataset, or --traces_file with finished traces.")
        if self.traces_file is not None and self.stage != "states":
            raise ValueError("--traces_file holds finished traces: use it with --stage states.")
        if self.compressor is not None and self.stage == "traces":
            raise ValueError("--compressor is for states; --stage traces makes none.")

    def load_rows(self) -> Dataset:
        """The problems, or the finished traces, with the columns `id` and `prompt`."""
        if self.traces_file is not None:
            rows = load_traces(self.traces_file, self.split, self.num_samples, self.columns)
        else:
            options = self.generator_options()
            rows = load_problems(self.dataset, self.split, self.num_samples, self.columns, **options)
        check_prompts(rows, self.traces_file or ", ".join(self.dataset))
        return rows

    def recorded(self, rows: Dataset, compressor: DimensionCompressor | None) -> dict[str, Any]:
        """What the files of these stages depend on, as `datagen_config.json` records it."""
        problems = {name: getattr(self, name) for name in ("dataset", "traces_file", "split", "num_samples")}
        counted = {"num_problems": len(rows), "sha256_of_problems": fingerprint(rows)}
        config: dict[str, Any] = {"problems": {**problems, **counted, "checkpoint_every": self.checkpoint_every}}
        model = {name: getattr(self, name) for name in ("model", "dtype", "think_start", "think_end", "batch_size")}
        if self.traces_file is None:
            config["traces"] = {**model, **vars(self.traces)}
        if self.stage != "traces":
            weights = None if compressor is None else compressor.weight.detach().float().cpu().numpy().tobytes()
            config["states"] = {
                **model,
                "states_from": "generation" if self.stage == "all" else "traces",
                "compressor": self.compressor,
                "sha256_of_compressor": None if weights is None else hashlib.sha256(weights).hexdigest(),
            }
        return config

    def check_recorded(self, config: dict[str, Any]) -> dict[str, Any]:
        """What an earlier run recorded in the folder, if any; raises ValueError where `config` differs from it."""
        folder, path = self.output_dir, os.path.join(self.output_dir, CONFIG_FILE)
        if not os.path.exists(path):
            left = [name for name in os.listdir(folder) if re.fullmatch(r"(pairs|traces)-\d+\.\w+", name)]
            if left:
                raise ValueError(f"{folder} holds {left[0]}, but no {CONFIG_FILE}: choose another --output_dir.")
            return {}
        if not self.auto_resume:
            remedy = "Continue it without --no_auto_resume, or choose another --output_dir"
            raise ValueError(f"{folder} holds an earlier run. {remedy}.")
        try:
            with open(path, encoding="utf-8") as file:
                recorded = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): choose another --output_dir.") from error
        for section in config.keys() & recorded.keys():
            for name in {**recorded[section], **config[section]}:
                old, new = recorded[section].get(name), config[section].get(name)
                if old != new:
                    change = f"{folder} was made with {name}={old!r}, now it is {new!r} ({section})"
                    raise ValueError(f"{change}. Continue with the old value, or choose another --output_dir.")
        return recorded


def load_problems(
    datasets: list[str],
    split: str = "train",
    num_samples: int | None = None,
    columns: dict[str, str] | None = None,
    **generator_options: Any,
) -> Dataset:
    """
    The first `num_samples` problems of each dataset, as `load_reasoning_dataset` reads it, with the columns `id`
    (`name:split:number`) and `prompt`. `columns` is for local files; of `generator_options`, each of several datasets
    gets those it takes. Raises ValueError for a dataset named twice.
    """
    names = [os.path.basename(name) for name in datasets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"The dataset {twice[0]} is named twice: ids would not be unique.")
    parts = []
    for name, source in zip(names, datasets):
        file_columns = columns if is_data_file(source) else None
        options = generator_options
        if len(datasets) > 1 and source in GENERATORS:
            options = {option: value for option, value in options.items() if option in options_taken(source)}
        rows, _ = load_reasoning_dataset(source, split, columns=file_columns, **options)
        rows = _first(rows.select_columns("prompt"), num_samples)
        parts.append(rows.add_column("id", [f"{name}:{split}:{number}" for number in range(len(rows))]))
    return concatenate_datasets(parts)


def load_traces(
    path: str, split: str = "train", num_samples: int | None = None, columns: dict[str, str] | None = None
) -> Dataset:
    """
    Finished traces: a data file, or a folder of the `traces-*.jsonl` of datagen. Each row has a `prompt` and one of
    `completion_ids`, `completion` and `reasoning` (see `ThoughtFormat.trace`), and may have an `id`, by default its
    number; `columns` says what the file calls them. A file in the format of a known dataset, such as GSM8K's
    `question` and `answer`, gives that dataset's own reasoning.

    Raises:
        FileNotFoundError, ValueError: for a missing, malformed or empty file, missing columns, or repeated ids.
    """
    files: list[str] | str = path
    if os.path.isdir(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "traces-*.jsonl")))
        if not files:
            raise FileNotFoundError(f"There are no traces-*.jsonl in {path}.")
    rows = read_rows(files, split)
    check_columns_exist(columns or {}, rows.column_names, path)
    new_names = {column: name for name, column in (columns or {}).items() if column != name}
    found = {new_names.get(column, column) for column in rows.column_names}
    if {"prompt"} < found & {"prompt", "completion", "completion_ids", "reasoning"}:
        replaced = [name for name in new_names.values() if name in rows.column_names]
        rows = rows.remove_columns(replaced).rename_columns(new_names)
    elif isinstance(files, str):
        rows, _ = load_reasoning_dataset(path, split, columns=columns)
    else:
        raise ValueError(f"The traces in {path} lack a prompt, or what was written after it.")
    rows = _first(rows.select_columns([name for name in _TRACE_COLUMNS if name in rows.column_names]), num_samples)
    if "id" not in rows.column_names:
        return rows.add_column("id", [str(number) for number in range(len(rows))])
    ids = [str(name) for name in rows["id"]]
    if len(set(ids)) < len(ids):
        raise ValueError(f"The ids of {path} are not unique: {len(set(ids))} different ones in {len(ids)} rows.")
    return rows.remove_columns("id").add_column("id", ids)


def _first(rows: Dataset, number: int | None) -> Dataset:
    return rows if number is None else rows.select(range(min(len(rows), number)))

"""The settings of a datagen run, and what of them is recorded beside its files and must not change."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from ..models import DimensionCompressor
from .hidden_pairs import CONFIG_FILE
from .problem_rows import fingerprint
from .trace_generation import TraceSettings

STAGES = ("traces", "states", "all")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class DatagenSettings:
    """
    What a datagen run makes.

    Attributes:
        model: name or folder of a causal language model.
        output_dir: where everything goes.
        stage: `traces` writes thoughts, `states` takes the states of finished traces, `all` does both in one go, with
            the states kept while the model writes.
        dataset, split, num_samples, columns, num_terms: the problems, see `load_problems`.
        traces_file: finished traces instead of a dataset, for `states`; see `load_traces`.
        traces: how thoughts are written.
        think_start, think_end: the markers around a thought.
        batch_size: problems that go through the model together.
        checkpoint_every: problems of a shard, which is what an interrupted run loses at most.
        auto_resume: go on with what an earlier run left in `output_dir`.
        compressor: name or folder of a `DimensionCompressor`: store D' states.
        dtype: of the model.
        device: where it runs; with several processes and `cuda`, each takes its own.

    Raises:
        ValueError: for settings that cannot work.
    """

    model: str
    output_dir: str
    stage: str = "all"
    dataset: list[str] = field(default_factory=list)
    split: str = "train"
    num_samples: int | None = None
    columns: dict[str, str] | None = None
    num_terms: int = 8
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
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
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


def recorded_settings(what: DatagenSettings, rows: Dataset, compressor: DimensionCompressor | None) -> dict[str, Any]:
    """What the files of the stages at hand depend on."""
    config: dict[str, Any] = {
        "problems": {
            "dataset": what.dataset,
            "traces_file": what.traces_file,
            "split": what.split,
            "num_samples": what.num_samples,
            "num_problems": len(rows),
            "sha256_of_problems": fingerprint(rows),
            "checkpoint_every": what.checkpoint_every,
        }
    }
    model = {
        "model": what.model,
        "dtype": what.dtype,
        "think_start": what.think_start,
        "think_end": what.think_end,
        "batch_size": what.batch_size,
    }
    if what.traces_file is None:
        config["traces"] = {**model, **vars(what.traces)}
    if what.stage != "traces":
        config["states"] = {
            **model,
            "states_from": "generation" if what.stage == "all" else "traces",
            "compressor": what.compressor,
            "sha256_of_compressor": None if compressor is None else _sha256(compressor.weight),
        }
    return config


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().numpy().tobytes()).hexdigest()


def check_recorded(what: DatagenSettings, config: dict[str, Any]) -> dict[str, Any]:
    """The settings an earlier run recorded in the folder, if any; raises ValueError where they differ."""
    path = os.path.join(what.output_dir, CONFIG_FILE)
    if not os.path.exists(path):
        left = [name for name in os.listdir(what.output_dir) if re.fullmatch(r"(pairs|traces)-\d+\.\w+", name)]
        if left:
            raise ValueError(f"{what.output_dir} holds {left[0]}, but no {CONFIG_FILE}: choose another --output_dir.")
        return {}
    if not what.auto_resume:
        raise ValueError(
            f"{what.output_dir} holds an earlier run. Go on from it without --no_auto_resume, or choose another "
            f"--output_dir."
        )
    try:
        with open(path, encoding="utf-8") as file:
            recorded = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): choose another --output_dir.") from error
    for section in config.keys() & recorded.keys():
        for name in {**recorded[section], **config[section]}:
            old, new = recorded[section].get(name), config[section].get(name)
            if old != new:
                raise ValueError(
                    f"{what.output_dir} was made with {name}={old!r}, now it is {new!r} ({section}). Give the old "
                    f"value to go on, or choose another --output_dir."
                )
    return recorded

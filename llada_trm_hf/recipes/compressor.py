"""Training of a compressor, or of several widths side by side."""

import copy
import csv
import io
import os
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from ..data import load_text_dataset, tokenize_texts
from ..data.reasoning_sources import SOURCES
from ..data.rows import Rows
from ..hub.files import output_dir_lock, write_text
from ..hub.model_folders import BACKBONE, COMPRESSOR, check_model, load_tokenizer
from ..models import DimensionCompressor, DimensionCompressorConfig
from ..models.hub_model import lasting_name
from ..training import CompressorTrainer, CompressorTrainingArguments
from ..training.reconstruction_metrics import head_width
from ..training.resuming import trainer_state_problem
from .run_setup import (
    DATA_MODELS,
    DataArguments,
    TrainingMethod,
    check_length,
    checkpoint_to_resume,
    reasoning_samples,
    set_up_processes,
    start_run,
    train_and_eval,
    train_and_save,
)

INITIALISATIONS = ("orthogonal", "pca", "checkpoint")


@dataclass
class CompressorScriptArguments(DataArguments):
    """A compressor, and whose hidden states on which text. The rest are [`CompressorTrainingArguments`]."""

    backbone: str | None = HfArg(default=None, aliases=["--model"], help="The causal language model; it stays frozen.")
    init: str = HfArg(default="orthogonal", help="orthogonal (random), pca or checkpoint (--compressor).")
    compressor: str | None = HfArg(default=None, help="A compressor to go on from.")
    compressed_size: int | None = HfArg(default=None, help="Width to compress to; 256, or that of --compressor.")
    compressed_sizes: list[int] | None = HfArg(default=None, help="Several widths, a run each, and sweep.csv.")
    pca_batches: int | None = HfArg(default=None, help="Batches that PCA sees; all.")
    text_column: str | None = HfArg(default=None, help="Train on this column of plain text, not on problems.")
    num_eval_samples: int = HfArg(default=0, help="Hold out so many first samples, without eval_split.")


def run_compressor(script_args: CompressorScriptArguments, training_args: CompressorTrainingArguments) -> None:
    """
    Trains a compressor as the settings say and saves it in `training_args.output_dir`; of `compressed_sizes` each in
    its own folder, with `sweep.csv`, which compares them with PCA. Raises the same errors as `run_masked_diffusion`.
    """
    _check_settings(script_args)
    METHOD.check(script_args)
    set_up_processes(training_args)
    resume_from = None if script_args.compressed_sizes else start_run(training_args)
    compressors = [_load_compressor(script_args)] if script_args.init == "checkpoint" else []
    backbone = script_args.backbone or _backbone_of(script_args.compressor, compressors)
    tokenizer = load_tokenizer(script_args.tokenizer or backbone)
    language_model = AutoModelForCausalLM.from_pretrained(lasting_name(backbone), dtype=script_args.dtype)
    check_length(script_args.max_length, language_model)
    width = head_width(language_model.get_output_embeddings())
    torch.manual_seed(training_args.seed)
    if not compressors:
        sizes = script_args.compressed_sizes or [script_args.compressed_size or 256]
        configs = [DimensionCompressorConfig(hidden_size=width, compressed_size=size) for size in sizes]
        compressors = [DimensionCompressor(config) for config in configs]
    train, held_out = _datasets(script_args, tokenizer)
    if script_args.compressed_sizes and held_out is None:
        raise ValueError("compressed_sizes are compared on held-out text: set eval_split or num_eval_samples.")

    parts = {"language_model": language_model, "train_dataset": train, "eval_dataset": held_out}
    with output_dir_lock(training_args.output_dir):
        if script_args.compressed_sizes:
            _sweep(script_args, training_args, compressors, parts)
        else:
            _train(script_args, CompressorTrainer(compressors[0], training_args, **parts), resume_from)


def _check_settings(script_args: CompressorScriptArguments) -> None:
    if script_args.backbone is None and script_args.compressor is None:
        raise ValueError("Say whose hidden states to compress: --backbone with the name or folder of a causal LM.")
    if script_args.init not in INITIALISATIONS:
        raise ValueError(f"init must be one of {', '.join(INITIALISATIONS)}, got {script_args.init!r}.")
    if (script_args.compressor is not None) != (script_args.init == "checkpoint"):
        found = f"init={script_args.init}, --compressor {script_args.compressor}"
        raise ValueError(f"To go on from a compressor, name it with --compressor and init=checkpoint; got {found}.")
    if script_args.compressed_sizes and (script_args.init == "checkpoint" or script_args.compressed_size is not None):
        raise ValueError("compressed_sizes are trained from the start: leave out compressed_size and init=checkpoint.")
    needs_pca = script_args.init == "pca" or script_args.compressed_sizes
    if script_args.streaming and needs_pca and script_args.pca_batches is None:
        raise ValueError("A stream may not end: say with pca_batches how much of it PCA sees.")
    if script_args.pca_batches is not None and script_args.pca_batches < 1:
        raise ValueError(f"pca_batches must be at least 1, got {script_args.pca_batches}.")
    if script_args.num_eval_samples < 0:
        raise ValueError(f"num_eval_samples must not be negative, got {script_args.num_eval_samples}.")


def _load_compressor(script_args: CompressorScriptArguments) -> DimensionCompressor:
    compressor = DimensionCompressor.from_pretrained(script_args.compressor)
    size, width = script_args.compressed_size, compressor.config.compressed_size
    if size not in (None, width):
        raise ValueError(f"{script_args.compressor} compresses to {width}, not to {size}.")
    return compressor


def _backbone_of(name: str | None, compressors: list[DimensionCompressor]) -> str:
    """The language model that the compressor to go on from was made for."""
    backbone = compressors[0].config.backbone_name_or_path if compressors else None
    if backbone is None:
        raise ValueError(f"{name} does not say whose hidden states it compresses: name the model with --backbone.")
    check_model(backbone, f"compressor {name}, made for another model", BACKBONE)
    return backbone


def _datasets(
    script_args: CompressorScriptArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, Dataset | None]:
    """Training samples, and held-out ones if there are any."""

    def samples(split: str, path: str | None) -> Rows:
        if script_args.dataset_name in SOURCES or script_args.text_column is None:
            return reasoning_samples(script_args, tokenizer, split, path)
        source = (script_args.dataset_name, split, path, script_args.text_column, script_args.streaming)
        return tokenize_texts(load_text_dataset(*source), tokenizer, script_args.max_length)

    train, held_out = train_and_eval(script_args, samples)
    number = script_args.num_eval_samples
    if held_out is None and number:
        if isinstance(train, Dataset) and len(train) <= number:
            raise ValueError(f"num_eval_samples={number} of {len(train)} samples leaves none to train on.")
        train, held_out = train.skip(number), train.take(number)
    if isinstance(held_out, IterableDataset):
        held_out = Dataset.from_list(list(held_out))
    return train, held_out


def _train(script_args: CompressorScriptArguments, trainer: CompressorTrainer, resume_from: str | None) -> None:
    if script_args.init == "pca" and resume_from is None:
        fit = trainer.fit_pca(script_args.pca_batches)
        if trainer.is_world_process_zero():
            print(f"PCA of {fit.num_samples:,} hidden states keeps {fit.variance_kept:.2%} of their mean square.")
    train_and_save(trainer, resume_from, script_args)


def _sweep(
    script_args: CompressorScriptArguments,
    training_args: CompressorTrainingArguments,
    compressors: list[DimensionCompressor],
    parts: dict[str, Any],
) -> None:
    """One run for each compressor, continued if resuming is asked for and it has begun; then the table."""
    resuming = str(training_args.resume_from_checkpoint).lower() == "true"
    rows: list[dict[str, Any]] = []
    pca: torch.Tensor | None = None
    for compressor in compressors:
        size = compressor.config.compressed_size
        arguments = copy.copy(training_args)
        arguments.output_dir = os.path.join(training_args.output_dir, f"compressed_size_{size}")
        finished = resuming and trainer_state_problem(arguments.output_dir) is None
        if finished:
            compressor = DimensionCompressor.from_pretrained(arguments.output_dir)
        trainer = CompressorTrainer(compressor, arguments, **parts)
        if pca is None:
            pca = _principal_directions(script_args, trainer, max(script_args.compressed_sizes or []))
        if not finished:
            _train(script_args, trainer, checkpoint_to_resume(arguments))
        rows.append({"compressed_size": size, "method": "trained", **_measure(trainer)})
        with torch.no_grad():
            compressor.weight.copy_(pca[:size])
        rows.append({"compressed_size": size, "method": "pca", **_measure(trainer)})
        if trainer.is_world_process_zero():
            _write_table(os.path.join(training_args.output_dir, "sweep.csv"), rows)


def _principal_directions(
    script_args: CompressorScriptArguments, trainer: CompressorTrainer, size: int
) -> torch.Tensor:
    """`[size, D]`, leading first: the PCA of every smaller size too."""
    weight = trainer.model.weight
    config = DimensionCompressorConfig(hidden_size=weight.shape[1], compressed_size=size)
    widest = DimensionCompressor(config).to(weight.device)
    widest.fit_pca(trainer.hidden_states(script_args.pca_batches))
    return widest.weight.detach()


def _measure(trainer: CompressorTrainer) -> dict[str, float]:
    """Held-out metrics, without logging them."""
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), description="Evaluation", metric_key_prefix="eval")
    metrics = {name.removeprefix("eval_"): value for name, value in output.metrics.items()}
    return {name: value for name, value in metrics.items() if name not in ("loss", "model_preparation_time")}


def _write_table(path: str, rows: list[dict[str, Any]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


METHOD = TrainingMethod(
    CompressorScriptArguments,
    CompressorTrainingArguments,
    run_compressor,
    models={"backbone": BACKBONE, "compressor": COMPRESSOR, **DATA_MODELS},
)

"""A training run of a compressor, or of several widths side by side."""

import copy
import csv
import os
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from ..data import load_text_dataset, tokenize_texts
from ..data.reasoning_sources import SOURCES
from ..models import DimensionCompressor, DimensionCompressorConfig
from ..storage import output_dir_lock, write_atomically
from .arguments import CompressorTrainingArguments
from .compressor_trainer import CompressorTrainer
from .language_model import head_width
from .output_folder import checkpoint_to_resume, train_and_save
from .recipe_arguments import CompressorRecipeArguments
from .samples import check_folder, check_length, describe_data, pretrained_tokenizer, reasoning_samples, splits

INITIALISATIONS = ("orthogonal", "pca", "checkpoint")


def run_compressor_training(what: CompressorRecipeArguments, training: CompressorTrainingArguments) -> None:
    """
    Trains a compressor as the settings say and saves it in `training.output_dir`; with `compressed_sizes`, one for
    each size in a folder of its own, and `sweep.csv`, where PCA and the trained compressors stand side by side.

    Raises:
        ValueError, OSError: for settings that cannot work, before anything is written.
        RuntimeError: if another run is writing to the folder.
        FloatingPointError: if the loss becomes NaN.
    """
    sizes = _check_settings(what)
    resume_from = None if what.compressed_sizes else checkpoint_to_resume(training)
    compressors = [_new_compressor(what, size) for size in sizes] if what.init == "checkpoint" else []
    assert what.backbone is not None
    tokenizer = pretrained_tokenizer(what.tokenizer or what.backbone)
    language_model = AutoModelForCausalLM.from_pretrained(what.backbone, dtype=what.dtype)
    check_length(what.max_length, language_model)
    width = head_width(language_model.get_output_embeddings())
    torch.manual_seed(training.seed)
    compressors = compressors or [_new_compressor(what, size, width) for size in sizes]
    train, held_out = _datasets(what, tokenizer)
    if what.compressed_sizes and held_out is None:
        raise ValueError("compressed_sizes are compared on held-out text: set eval_split or num_eval_samples.")

    def trainer(compressor: DimensionCompressor, arguments: CompressorTrainingArguments) -> CompressorTrainer:
        new_trainer = CompressorTrainer(compressor, arguments, language_model, train, held_out)
        new_trainer.data_description = describe_data(what)
        return new_trainer

    with output_dir_lock(training.output_dir):
        if what.compressed_sizes:
            _sweep(what, training, compressors, trainer)
        else:
            _train(what, trainer(compressors[0], training), resume_from)


def _check_settings(what: CompressorRecipeArguments) -> list[int | None]:
    """The sizes to train."""
    if what.backbone is None:
        raise ValueError("Say whose hidden states to compress: --backbone with the name or folder of a causal LM.")
    if what.init not in INITIALISATIONS:
        raise ValueError(f"init must be one of {', '.join(INITIALISATIONS)}, got {what.init!r}.")
    if (what.compressor is not None) != (what.init == "checkpoint"):
        raise ValueError(
            "init=checkpoint goes on from a compressor: name it with --compressor."
            if what.compressor is None
            else f"--compressor {what.compressor} is used with init=checkpoint only, got init={what.init}."
        )
    if what.compressed_sizes and (what.init == "checkpoint" or what.compressed_size is not None):
        raise ValueError("compressed_sizes are trained from the start: leave out compressed_size and init=checkpoint.")
    if what.streaming and what.pca_batches is None and (what.init == "pca" or what.compressed_sizes):
        raise ValueError("A stream may not end: say with pca_batches how much of it PCA sees.")
    if what.compressor is not None:
        check_folder(what.compressor)
    if what.pca_batches is not None and what.pca_batches < 1:
        raise ValueError(f"pca_batches must be at least 1, got {what.pca_batches}.")
    if what.num_eval_samples < 0:
        raise ValueError(f"num_eval_samples must not be negative, got {what.num_eval_samples}.")
    return [*what.compressed_sizes] if what.compressed_sizes else [what.compressed_size]


def _new_compressor(
    what: CompressorRecipeArguments, size: int | None, hidden_size: int | None = None
) -> DimensionCompressor:
    if what.init == "checkpoint":
        compressor = DimensionCompressor.from_pretrained(what.compressor)
        if size not in (None, compressor.config.compressed_size):
            raise ValueError(f"{what.compressor} compresses to {compressor.config.compressed_size}, not to {size}.")
        return compressor
    return DimensionCompressor(DimensionCompressorConfig(hidden_size=hidden_size, compressed_size=size or 256))


def _datasets(
    what: CompressorRecipeArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Training samples, and held-out ones if there are any."""
    train, *rest = (_samples(what, tokenizer, split, path) for split, path in splits(what))
    number = what.num_eval_samples
    if rest:
        held_out = rest[0]
        return train, held_out if isinstance(held_out, Dataset) else Dataset.from_list(list(held_out))
    if not number:
        return train, None
    if isinstance(train, IterableDataset):
        return train.skip(number), Dataset.from_list(list(train.take(number)))
    if len(train) <= number:
        raise ValueError(f"num_eval_samples={number} of {len(train)} samples leaves none to train on.")
    return train.select(range(number, len(train))), train.select(range(number))


def _samples(
    what: CompressorRecipeArguments, tokenizer: PreTrainedTokenizerBase, split: str, path: str | None
) -> Dataset | IterableDataset:
    if what.dataset_name in SOURCES or what.text_column is None:
        return reasoning_samples(what, tokenizer, split, path)
    texts = load_text_dataset(what.dataset_name, split, path, what.text_column, what.streaming)
    return tokenize_texts(texts, tokenizer, what.max_length)


def _train(what: CompressorRecipeArguments, trainer: CompressorTrainer, resume_from: str | None) -> None:
    if what.init == "pca" and resume_from is None:
        fit = trainer.fit_pca(what.pca_batches)
        if trainer.is_world_process_zero():
            print(f"PCA of {fit.num_samples:,} hidden states keeps {fit.variance_kept:.2%} of their mean square.")
    train_and_save(trainer, resume_from)


def _sweep(
    what: CompressorRecipeArguments,
    training: CompressorTrainingArguments,
    compressors: list[DimensionCompressor],
    new_trainer: Any,
) -> None:
    """One run for each compressor, continued if resuming is asked for and it has begun; then the table."""
    resuming = str(training.resume_from_checkpoint).lower() == "true"
    rows: list[dict[str, Any]] = []
    pca: torch.Tensor | None = None
    for compressor in compressors:
        size = compressor.config.compressed_size
        arguments = copy.copy(training)
        arguments.output_dir = os.path.join(training.output_dir, f"compressed_size_{size}")
        finished = resuming and os.path.isfile(os.path.join(arguments.output_dir, "trainer_state.json"))
        if finished:
            compressor = DimensionCompressor.from_pretrained(arguments.output_dir)
        elif resuming and (
            not os.path.isdir(arguments.output_dir) or get_last_checkpoint(arguments.output_dir) is None
        ):
            arguments.resume_from_checkpoint = None
        trainer = new_trainer(compressor, arguments)
        if pca is None:
            pca = _principal_directions(what, trainer, max(what.compressed_sizes or []))
        if not finished:
            _train(what, trainer, checkpoint_to_resume(arguments))
        rows.append({"compressed_size": size, "method": "trained", **_measure(trainer)})
        with torch.no_grad():
            compressor.weight.copy_(pca[:size])
        rows.append({"compressed_size": size, "method": "pca", **_measure(trainer)})
        if trainer.is_world_process_zero():
            _write_table(os.path.join(training.output_dir, "sweep.csv"), rows)


def _principal_directions(what: CompressorRecipeArguments, trainer: CompressorTrainer, size: int) -> torch.Tensor:
    """`[size, D]`, leading first: the PCA of every smaller size too."""
    weight = trainer.model.weight
    config = DimensionCompressorConfig(hidden_size=weight.shape[1], compressed_size=size)
    widest = DimensionCompressor(config).to(weight.device)
    widest.fit_pca(trainer.hidden_states(what.pca_batches))
    return widest.weight.detach()


def _measure(trainer: CompressorTrainer) -> dict[str, float]:
    """Held-out metrics, without logging them."""
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), description="Evaluation", metric_key_prefix="eval")
    metrics = {name.removeprefix("eval_"): value for name, value in output.metrics.items()}
    return {name: value for name, value in metrics.items() if name not in ("loss", "model_preparation_time")}


def _write_table(path: str, rows: list[dict[str, Any]]) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)

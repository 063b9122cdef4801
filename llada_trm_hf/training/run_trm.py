"""A training run of a SequenceTRM on hidden pairs."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM

from ..hidden_pairs import HiddenPairsDataset
from ..models import DimensionCompressor, SequenceTRM, SequenceTRMConfig
from ..storage import output_dir_lock
from .arguments import TRMTrainingArguments
from .output_folder import checkpoint_to_resume, train_and_save
from .recipe_arguments import TRMRecipeArguments
from .samples import check_folder
from .trm_trainer import TRMTrainer


def run_trm_training(what: TRMRecipeArguments, training: TRMTrainingArguments) -> None:
    """
    Trains a SequenceTRM as the settings say and saves it in `training.output_dir`.

    Raises:
        ValueError, OSError: for settings that cannot work, before anything is written.
        RuntimeError: if another run is writing to the folder.
        FloatingPointError: if the loss becomes NaN.
    """
    if what.pairs_dir is None:
        raise ValueError("Say what to learn: --pairs_dir with a folder or file of hidden pairs.")
    if not 0 <= what.eval_fraction < 1:
        raise ValueError(f"eval_fraction must be at least 0 and below 1, got {what.eval_fraction}.")
    for folder in (what.compressor, what.checkpoint):
        if folder is not None:
            check_folder(folder)
    resume_from = checkpoint_to_resume(training)
    torch.manual_seed(training.seed)
    compressor = None if what.compressor is None else DimensionCompressor.from_pretrained(what.compressor)
    pairs = _states(what.pairs_dir, compressor)
    train, held_out = _pairs(what, pairs, training.seed, compressor)
    model = _new_model(what, pairs.hidden_size)
    compressed_from = None if compressor is None else compressor.config.backbone_name_or_path
    model.config.backbone_name_or_path = (
        pairs.model_name or compressed_from or what.backbone or model.config.backbone_name_or_path
    )
    lm_head = None if what.backbone is None else _lm_head(what.backbone, what.dtype)
    with output_dir_lock(training.output_dir):
        trainer = TRMTrainer(
            model,
            training,
            train_dataset=train,
            eval_dataset=held_out,
            lm_head=lm_head,
            compressor=compressor,
        )
        train_and_save(trainer, resume_from)


def _pairs(
    what: TRMRecipeArguments, pairs: HiddenPairsDataset, seed: int, compressor: DimensionCompressor | None
) -> tuple[Any, Any]:
    """Pairs to train on, and held-out ones if there are any."""
    if what.eval_pairs_dir is not None:
        return pairs, _states(what.eval_pairs_dir, compressor)
    if not what.eval_fraction:
        return pairs, None
    number = round(what.eval_fraction * len(pairs))
    if number < 2 or number == len(pairs):
        raise ValueError(
            f"eval_fraction={what.eval_fraction} of {len(pairs)} hidden pairs is {number}: evaluation needs two, and "
            f"training the rest."
        )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(pairs, order[number:]), Subset(pairs, order[:number])


def _states(pairs_dir: str, compressor: DimensionCompressor | None) -> HiddenPairsDataset:
    """The pairs, compressed now or already when they were stored."""
    pairs = HiddenPairsDataset(pairs_dir)
    if not len(pairs):
        raise ValueError(f"{pairs_dir} holds no hidden pairs.")
    if compressor is None or pairs[0]["context"].shape[-1] == compressor.config.compressed_size:
        return pairs
    return HiddenPairsDataset(pairs_dir, compressor=compressor)


def _new_model(what: TRMRecipeArguments, width: int) -> SequenceTRM:
    if what.checkpoint is None:
        return SequenceTRM(
            SequenceTRMConfig(
                hidden_size=width,
                n_layers=what.n_layers,
                n_heads=what.n_heads,
                block_style=what.block_style,
                dropout=what.dropout,
            )
        )
    model = SequenceTRM.from_pretrained(what.checkpoint)
    if model.config.hidden_size != width:
        raise ValueError(
            f"{what.checkpoint} has hidden_size={model.config.hidden_size}, but the pairs are {width} wide: name the "
            f"--compressor it was trained with."
        )
    return model


def _lm_head(name_or_path: str, dtype: str) -> nn.Module:
    """The LM head alone: the rest of the language model is let go."""
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype).get_output_embeddings()

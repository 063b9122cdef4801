"""A training run from its settings: tokenizer, model, data, trainer, and what is left in the output folder."""

import json
import os
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import byte_tokenizer
from ..models import LLaDAConfig, LLaDATRMForMaskedDiffusion
from ..models.backbones import BACKBONES, build_backbone, load_backbone
from ..storage import output_dir_lock
from .arguments import MaskedDiffusionTrainingArguments
from .freezing import last_layers, set_trainable
from .output_folder import checkpoint_to_resume, train_and_save
from .recipe_arguments import RecipeArguments
from .recipe_refiners import refiners_of
from .samples import check_length, describe_data, pretrained_tokenizer, reasoning_samples, splits
from .trainer import MaskedDiffusionTrainer


def run_training(what: RecipeArguments, training: MaskedDiffusionTrainingArguments) -> MaskedDiffusionTrainer:
    """
    Trains as the settings say, from the last checkpoint in `training.output_dir` if
    `training.resume_from_checkpoint` is set, and saves the final model and tokenizer in that folder.

    Raises:
        ValueError, OSError: for settings that cannot work, before anything is written.
        RuntimeError: if another run is writing to the folder, or the loss becomes NaN.
    """
    resume_from = checkpoint_to_resume(training)
    torch.manual_seed(training.seed)
    tokenizer = load_tokenizer(what)
    model = load_model(what, tokenizer)
    check_length(what.max_length, model)
    # A checkpoint has its own chunk size; a backbone trained alone is laid out for the refiner it will get.
    chunk_size = getattr(model.config, "chunk_size", what.chunk_size or 16) if what.align_steps_to_chunks else None
    datasets = [reasoning_samples(what, tokenizer, split, path, chunk_size) for split, path in splits(what)]
    set_trainable(model, _trainable(what, model), train_layer_norms=what.train_layer_norms)

    with output_dir_lock(training.output_dir):
        trainer = MaskedDiffusionTrainer(
            model,
            training,
            train_dataset=datasets[0],
            eval_dataset=datasets[1] if len(datasets) > 1 else None,
            processing_class=tokenizer,
        )
        trainer.data_description = describe_data(what)
        train_and_save(trainer, resume_from)
    return trainer


def _trainable(what: RecipeArguments, model: PreTrainedModel) -> list[str]:
    """Patterns of what trains."""
    if what.trainable is None and not what.freeze_backbone:
        if what.train_last_layers is not None:
            raise ValueError("Without freeze_backbone or trainable, everything trains: leave out train_last_layers.")
        return ["*"]
    patterns = ["refiner"] if what.trainable is None else what.trainable
    return [*patterns, *([] if what.train_last_layers is None else last_layers(model, what.train_last_layers))]


def load_tokenizer(what: RecipeArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named, or the model's own, or the byte tokenizer for a model that starts from a config."""
    source = what.tokenizer or what.checkpoint or what.backbone
    if source is None or (what.tokenizer is None and source.endswith(".json")):
        return byte_tokenizer()
    return pretrained_tokenizer(source)


def load_model(what: RecipeArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train: a hybrid from a checkpoint, or a refiner on a backbone, or the backbone alone."""
    if what.checkpoint is not None:
        return LLaDATRMForMaskedDiffusion.from_pretrained(what.checkpoint, dtype=what.dtype)
    if what.backbone is None:
        raise ValueError(
            "Say what to train: --backbone with the name or folder of a masked-diffusion model, a config .json for a "
            "new one, or --checkpoint with a hybrid to go on from."
        )
    backbone: Any = what.backbone
    if what.backbone.endswith(".json"):
        backbone = new_backbone(what.backbone, tokenizer)
    if what.refiner == "none":
        return load_backbone(backbone, dtype=what.dtype) if isinstance(backbone, str) else backbone
    config = AutoConfig.from_pretrained(backbone) if isinstance(backbone, str) else backbone.config
    return LLaDATRMForMaskedDiffusion.from_backbone(
        backbone,
        refiners_of(what, config.get_text_config().hidden_size),
        freeze_backbone=False,
        integration=what.integration,
        min_confidence=what.min_confidence,
        deep_supervision_weight=what.deep_supervision_weight,
        deep_supervision_schedule=what.deep_supervision_schedule,
        confidence_loss_weight=what.confidence_loss_weight,
        orthogonality_weight=what.orthogonality_weight,
        **({"dtype": what.dtype} if isinstance(backbone, str) else {}),
    )


def new_backbone(config_file: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A LLaDA model with random weights; sizes from a .json file, vocabulary and token ids from the tokenizer."""
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"There is no config file {config_file}.")
    with open(config_file, encoding="utf-8") as file:
        try:
            sizes = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{config_file} is not valid JSON: {error}.") from error
    if not isinstance(sizes, dict) or sizes.get("model_type", "llada") not in BACKBONES:
        raise ValueError(f"{config_file} must hold the fields of a config of {', '.join(BACKBONES)}.")
    token_ids = {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    return build_backbone(LLaDAConfig.from_dict({**sizes, **token_ids}))

"""A training run of answers after latent thoughts."""

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data import load_reasoning_dataset, tokenize_latent_answers
from ..data.reasoning import column_mapping
from ..models import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LatentThinkingConfig,
    LatentThinkingForCausalLM,
    SequenceTRM,
    SequenceTRMConfig,
)
from ..storage import output_dir_lock
from .arguments import LatentAnswerTrainingArguments
from .freezing import set_trainable
from .latent_answer_trainer import LatentAnswerTrainer
from .output_folder import checkpoint_to_resume, train_and_save
from .recipe_arguments import LatentAnswerRecipeArguments
from .samples import check_folder, check_length, describe_data, pretrained_tokenizer, splits

# What the settings may change in a SequenceTRM, a trained one too.
_TRM_FIELDS = ("n_latent_steps", "n_deep_recursions", "n_supervision_steps", "dropout")


def run_latent_answer_training(
    what: LatentAnswerRecipeArguments, training: LatentAnswerTrainingArguments
) -> LatentAnswerTrainer:
    """
    Trains as the settings say and saves the model and its tokenizer in `training.output_dir`.

    Raises:
        ValueError, OSError: for settings that cannot work, before anything is written.
        RuntimeError: if another run is writing to the folder.
        FloatingPointError: if the loss becomes NaN.
    """
    source = what.checkpoint or what.backbone
    if source is None or (what.checkpoint and what.backbone):
        raise ValueError(
            "Say what is to learn: either --backbone with the name or folder of a causal language model, or "
            "--checkpoint with a latent-thinking model to go on from."
        )
    unused = [name for name in ("compressor", "trm", *_TRM_FIELDS) if getattr(what, name) is not None]
    if what.checkpoint and unused:
        raise ValueError(f"The model in --checkpoint has its own {', '.join(unused)}: leave them out.")
    for folder in (what.checkpoint, what.compressor, what.trm):
        if folder is not None:
            check_folder(folder)
    resume_from = checkpoint_to_resume(training)
    torch.manual_seed(training.seed)
    tokenizer = pretrained_tokenizer(what.tokenizer or source)
    model = load_model(what, tokenizer)
    check_length(what.max_length, model)
    datasets = [_samples(what, tokenizer, model.config, split, path) for split, path in splits(what)]
    set_trainable(model, ["thinker"] if what.freeze_backbone else ["*"])
    # No answer says when to stop thinking: halting stays as distillation left it.
    model.thinker.trm.halt_head.requires_grad_(False)
    with output_dir_lock(training.output_dir):
        trainer = LatentAnswerTrainer(
            model,
            training,
            train_dataset=datasets[0],
            eval_dataset=datasets[1] if len(datasets) > 1 else None,
            processing_class=tokenizer,
        )
        trainer.data_description = describe_data(what)
        train_and_save(trainer, resume_from)
    return trainer


def load_model(what: LatentAnswerRecipeArguments, tokenizer: PreTrainedTokenizerBase) -> LatentThinkingForCausalLM:
    """The checkpoint to go on from, or a backbone with trained or new parts."""
    if what.checkpoint is not None:
        return LatentThinkingForCausalLM.from_pretrained(what.checkpoint, dtype=what.dtype)
    assert what.backbone is not None
    backbone = AutoModelForCausalLM.from_pretrained(what.backbone, dtype=what.dtype)
    compressor, trm = _thinker_parts(what, backbone)
    return LatentThinkingForCausalLM.from_backbone(
        backbone, compressor=compressor, trm=trm, tokenizer=tokenizer, num_latents=what.num_latents
    )


def _thinker_parts(what: LatentAnswerRecipeArguments, backbone: PreTrainedModel) -> tuple[Any, Any]:
    """Compressor and SequenceTRM, trained ones or the configs of new ones."""
    changes = {name: getattr(what, name) for name in _TRM_FIELDS if getattr(what, name) is not None}
    compressor: Any = None if what.compressor is None else DimensionCompressor.from_pretrained(what.compressor)
    trm: Any = None if what.trm is None else SequenceTRM.from_pretrained(what.trm, **changes)
    width = backbone.config.get_text_config().hidden_size
    size = what.compressed_size or min(256, width)
    if compressor is None:
        size = size if trm is None else trm.config.hidden_size
        compressor = DimensionCompressorConfig(hidden_size=width, compressed_size=size)
    if trm is None:
        size = compressor.compressed_size if what.compressor is None else compressor.config.compressed_size
        trm = SequenceTRMConfig(hidden_size=size, n_layers=what.n_layers, n_heads=what.n_heads, **changes)
    return compressor, trm


def _samples(
    what: LatentAnswerRecipeArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: LatentThinkingConfig,
    split: str,
    path: str | None,
) -> Dataset:
    """Prompt with thought, and answer, of each problem as tokens."""
    problems, response = load_reasoning_dataset(
        what.dataset_name,
        split,
        data_files=path,
        columns=column_mapping(what.columns),
        num_terms=what.num_terms,
    )
    return tokenize_latent_answers(problems, tokenizer, config, response, what.max_length)

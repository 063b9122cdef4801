"""Training of a refiner, of a masked-diffusion model with it, or of the model alone."""

import math
import os
import warnings
from dataclasses import dataclass, fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from ..data import byte_tokenizer
from ..hub.files import output_dir_lock
from ..hub.model_folders import BACKBONE, HYBRID, load_tokenizer
from ..hub.training_record import read_json
from ..models import LLaDATRMForMaskedDiffusion
from ..models.backbone_wrapper import build_backbone, load_backbone
from ..models.hub_model import BACKBONES, REFINERS, nearest_name
from ..training import MaskedDiffusionTrainer, MaskedDiffusionTrainingArguments, set_trainable
from ..training.freezing import last_layers
from .run_setup import (
    DATA_MODELS,
    DataArguments,
    TrainingMethod,
    check_length,
    reasoning_samples,
    start_run,
    train_and_eval,
    train_and_save,
    vocabulary_settings,
)

# Settings that every kind of refiner may have: a recipe sets them for whichever it is used with.
DEFAULT_REFINER = "trm_refiner"
_DEPTH_IN_TRAINING = ("trained_steps", "max_free_steps", "free_steps_probability")
_SHARED_REFINER_SETTINGS = ("chunk_size", "max_recursive_steps", "convergence_threshold", *_DEPTH_IN_TRAINING)
_HYBRID_SETTINGS = (
    "integration",
    "min_confidence",
    "deep_supervision_weight",
    "deep_supervision_schedule",
    "change_loss_weight",
    "confidence_loss_weight",
    "orthogonality_weight",
)


@dataclass
class MaskedDiffusionScriptArguments(DataArguments):
    """What is trained on what. The rest of a recipe are [`MaskedDiffusionTrainingArguments`]."""

    backbone: str | None = HfArg(default=None, aliases=["--model"], help="Model, or a config .json for a new one.")
    checkpoint: str | None = HfArg(default=None, help="A hybrid to go on from, instead of a backbone.")
    refiner: str | None = HfArg(default=None, help="Kinds or folders, with commas; trm_refiner. none: no refiner.")
    integration: str | None = HfArg(default=None, help="How several refiners work together: cascade or mix.")
    chunk_size: int | None = HfArg(default=None, help="Tokens refined together; 16.")
    align_steps_to_chunks: bool = HfArg(default=False, help="Start reasoning steps and answer in a new chunk.")
    max_recursive_steps: int | None = HfArg(default=None, help="Most updates of a chunk; 16, of a head 8, of slots 4.")
    convergence_threshold: float | None = HfArg(default=None, help="When a chunk stops, 0 never; 0.01, of slots 1e-4.")
    trained_steps: int | None = HfArg(default=None, help="Recursion steps with gradient in training; 4.")
    max_free_steps: int | None = HfArg(default=None, help="Most steps without gradient before them; 8.")
    free_steps_probability: float | None = HfArg(default=None, help="Share of batches with such steps; 0.5.")
    recall: bool | None = HfArg(default=None, help="Whether head or slots read their input in every step; false.")
    recursion_size: int | None = HfArg(default=None, help="Width of a TRM refiner; an eighth, 64 to 512.")
    n_latent_steps: int | None = HfArg(default=None, help="Updates of its z in a recursion step; 1.")
    damping: float | None = HfArg(default=None, help="Share of its state that an update keeps; 0.")
    noise_std: float | None = HfArg(default=None, help="Noise on its z, in training and on trajectories; 0.")
    num_trajectories: int | None = HfArg(default=None, help="Its noisy recursions, of which the best is kept; 1.")
    head_hidden_size: int | None = HfArg(default=None, help="Width of a chunk's code in a recursive head; 512.")
    head_layers: int | None = HfArg(default=None, help="SwiGLU layers of a recursive head; 2.")
    step_size: float | None = HfArg(default=None, help="Factor of a recursive head's updates; 0.1.")
    preset: str | None = HfArg(default=None, help="Size of a slot refiner: tiny, base or large; base.")
    context_slot_size: int | None = HfArg(default=None, help="Of a slot refiner's context slot; half the width.")
    reasoning_slot_size: int | None = HfArg(default=None, help="Of its reasoning slot; a quarter.")
    refinement_slot_size: int | None = HfArg(default=None, help="Of its refinement slot; a quarter.")
    confidence_slot_size: int | None = HfArg(default=None, help="Of its confidence slot; an eighth.")
    use_gating: bool | None = HfArg(default=None, help="Whether its slots have gates; true.")
    delta_scale: float | None = HfArg(default=None, help="Factor of a slot refiner's updates; 0.1.")
    dropout: float | None = HfArg(default=None, help="Of a slot refiner; 0.")
    min_confidence: float | None = HfArg(default=None, help="Chunks below it are refined; 0.5.")
    deep_supervision_weight: float | None = HfArg(default=None, help="Of the loss over the steps; 0.3.")
    deep_supervision_schedule: str | None = HfArg(default=None, help="constant (default), linear or exponential.")
    change_loss_weight: float | None = HfArg(default=None, help="Of what the refiner adds, read alone; 1 or 0.")
    confidence_loss_weight: float | None = HfArg(default=None, help="Of the confidence's calibration; 0.05.")
    orthogonality_weight: float | None = HfArg(default=None, help="Of the overlap between slots; 0.01.")
    freeze_backbone: bool = HfArg(default=False, help="Train the refiner only.")
    trainable: list[str] | None = HfArg(default=None, help="Patterns of module names that train.")
    train_last_layers: int | None = HfArg(default=None, help="Last layers of the backbone that train as well.")
    train_layer_norms: bool = HfArg(default=False, help="Train all normalisation layers as well.")


def run_masked_diffusion(
    script_args: MaskedDiffusionScriptArguments, training_args: MaskedDiffusionTrainingArguments
) -> MaskedDiffusionTrainer:
    """
    Trains as the settings say, resuming if `training_args.resume_from_checkpoint` is set, and saves the final model
    and tokenizer in `training_args.output_dir`.

    Raises:
        ValueError, OSError: for settings that cannot work, before anything is written.
        RuntimeError: if another run is writing to the folder.
        FloatingPointError: if the loss becomes NaN.
    """
    METHOD.check(script_args)
    resume_from = start_run(training_args)
    tokenizer = _load_tokenizer(script_args)
    model = _load_model(script_args, tokenizer)
    check_length(script_args.max_length, model)
    # A checkpoint has its own chunk size; a backbone trained alone is laid out for the refiner it will get.
    chunk_size = getattr(model.config, "chunk_size", script_args.chunk_size or 16)
    if chunk_size > script_args.max_length:
        raise ValueError(
            f"chunk_size={chunk_size} is more than the longest sample, max_length={script_args.max_length}: raise "
            f"max_length, or make chunk_size smaller."
        )
    align = chunk_size if script_args.align_steps_to_chunks else None
    train, held_out = train_and_eval(
        script_args, lambda split, path: reasoning_samples(script_args, tokenizer, split, path, align)
    )
    set_trainable(model, _trainable_patterns(script_args, model), train_layer_norms=script_args.train_layer_norms)
    _warn_of_frozen_random_weights(script_args, model)
    with output_dir_lock(training_args.output_dir):
        trainer = MaskedDiffusionTrainer(
            model, training_args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )
        train_and_save(trainer, resume_from, script_args)
    return trainer


def _trainable_patterns(script_args: MaskedDiffusionScriptArguments, model: PreTrainedModel) -> list[str]:
    number = script_args.train_last_layers
    if script_args.trainable is None and not script_args.freeze_backbone:
        if number is not None:
            raise ValueError("Without freeze_backbone or trainable, everything trains: leave out train_last_layers.")
        return ["*"]
    patterns = ["refiner"] if script_args.trainable is None else script_args.trainable
    return patterns if number is None else [*patterns, *last_layers(model, number)]


def _warn_of_frozen_random_weights(script_args: MaskedDiffusionScriptArguments, model: PreTrainedModel) -> None:
    """A refiner cannot learn anything on a new backbone that stays as it is."""
    is_new = script_args.checkpoint is None and str(script_args.backbone).endswith(".json")
    backbone = getattr(model, "backbone", None)
    if is_new and backbone is not None and not any(weight.requires_grad for weight in backbone.parameters()):
        warnings.warn(
            f"{script_args.backbone} makes a backbone of random weights, and they are frozen: a refiner has nothing "
            f"to learn from it. Train a backbone first (--recipe finetune --refiner none --backbone "
            f"{script_args.backbone}), then the refiner on it (--backbone with that run's folder).",
            stacklevel=2,
        )


def _load_tokenizer(script_args: MaskedDiffusionScriptArguments) -> PreTrainedTokenizerBase:
    """The named tokenizer, or the model's own, or the byte tokenizer for a new model."""
    source = script_args.tokenizer or script_args.checkpoint or script_args.backbone
    if source is None or (script_args.tokenizer is None and source.endswith(".json")):
        return byte_tokenizer()
    return load_tokenizer(source)


def _load_model(script_args: MaskedDiffusionScriptArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A hybrid from a checkpoint, or a new refiner on a backbone, or the backbone alone."""
    if script_args.checkpoint is not None:
        return LLaDATRMForMaskedDiffusion.from_pretrained(script_args.checkpoint, dtype=script_args.dtype)
    if script_args.backbone is None:
        raise ValueError("Say what to train: --backbone MODEL or CONFIG.json (a new one), or --checkpoint HYBRID.")
    is_new = script_args.backbone.endswith(".json")
    backbone: Any = _new_backbone(script_args.backbone, tokenizer) if is_new else script_args.backbone
    if script_args.refiner == "none":
        return backbone if is_new else load_backbone(backbone, dtype=script_args.dtype)
    config = backbone.config if is_new else AutoConfig.from_pretrained(backbone)
    if getattr(config.get_text_config(), "mask_token_id", None) is None:
        needed = "a refiner needs a masked-diffusion model, such as GSAI-ML/LLaDA-8B-Instruct"
        raise ValueError(f"--backbone: {backbone} is a {config.model_type} model without a mask token: {needed}.")
    refiners = refiner_configs(script_args, config.get_text_config().hidden_size)
    given = {name: getattr(script_args, name) for name in _HYBRID_SETTINGS}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not is_new:
        settings["dtype"] = script_args.dtype
    return LLaDATRMForMaskedDiffusion.from_backbone(backbone, refiners, freeze_backbone=False, **settings)


def _new_backbone(config_file: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights; sizes from a .json file, vocabulary and token ids from the tokenizer."""
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"There is no config file {config_file}.")
    sizes = read_json(config_file)
    family = BACKBONES.get(sizes.get("model_type", "llada"))
    if family is None:
        raise ValueError(f"{config_file} must hold the fields of a config of {', '.join(BACKBONES)}.")
    known = {field.name for field in fields(family.config_class)} | {"model_type", "auto_map", "transformers_version"}
    for name, value in sizes.items():
        if name not in known:
            raise ValueError(f"{config_file}: unknown field {name!r}{nearest_name(name, known)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{config_file}: {name} must be a finite number, got {value}.")
    return build_backbone(family.config_class.from_dict({**sizes, **vocabulary_settings(tokenizer)}))


def refiner_configs(script_args: MaskedDiffusionScriptArguments, hidden_size: int) -> list[PreTrainedConfig | str]:
    """
    For each refiner in `script_args.refiner` its config, for a backbone of width `hidden_size`; or its folder.

    Raises:
        ValueError: for a setting that only other kinds of refiners have, or a value out of range.
    """
    given = {name: value for name, value in vars(script_args).items() if value is not None}
    inherited = {field.name for field in fields(PreTrainedConfig)}
    known = {name: {field.name for field in fields(kind.config_class)} - inherited for name, kind in REFINERS.items()}
    unused = (set(given) - set(_SHARED_REFINER_SETTINGS)) & set().union(*known.values())
    configs: list[PreTrainedConfig | str] = []
    for name in (script_args.refiner or DEFAULT_REFINER).split(","):
        if name not in REFINERS:
            if not os.path.isdir(name) and "/" not in name:
                kinds = f"a folder, or {', '.join(REFINERS)}"
                raise ValueError(f"--refiner: there is no {name!r}{nearest_name(name, REFINERS)}; it takes {kinds}.")
            configs.append(name)
            continue
        unused -= known[name]
        settings = {field: value for field, value in given.items() if field in known[name]}
        configs.append(REFINERS[name].config_class(hidden_size=hidden_size, **settings))
    if unused:
        raise ValueError(
            f"{', '.join(sorted(unused))}: not a setting of {script_args.refiner or DEFAULT_REFINER}. Leave it out."
        )
    return configs


_REFINER_SETTINGS = [
    "chunk_size",
    "max_recursive_steps",
    "convergence_threshold",
    *_DEPTH_IN_TRAINING,
    "recall",
    "recursion_size",
    "n_latent_steps",
    "damping",
    "noise_std",
    "num_trajectories",
    "head_hidden_size",
    "head_layers",
    "step_size",
    "preset",
    "dropout",
    "context_slot_size",
    "reasoning_slot_size",
    "refinement_slot_size",
    "confidence_slot_size",
    "use_gating",
    "delta_scale",
]
METHOD = TrainingMethod(
    MaskedDiffusionScriptArguments,
    MaskedDiffusionTrainingArguments,
    run_masked_diffusion,
    models={"backbone": BACKBONE, "checkpoint": HYBRID, **DATA_MODELS},
    new_model_settings=("backbone", "refiner", *_REFINER_SETTINGS, *_HYBRID_SETTINGS),
)

"""Training of answers after latent thoughts."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from ..data import tokenize_latent_answers
from ..hub.files import output_dir_lock
from ..hub.model_folders import BACKBONE, COMPRESSOR, LATENT_THINKING, SEQUENCE_TRM, load_tokenizer
from ..models import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LatentThinkingForCausalLM,
    SequenceTRM,
    SequenceTRMConfig,
)
from ..training import LatentAnswerTrainer, LatentAnswerTrainingArguments, set_trainable
from .run_setup import (
    DATA_MODELS,
    DataArguments,
    TrainingMethod,
    check_length,
    load_problems,
    start_run,
    train_and_eval,
    train_and_save,
)

# Settings of a SequenceTRM that may be changed in a trained one too.
_TRM_SETTINGS = (
    "n_latent_steps",
    "n_deep_recursions",
    "n_trained_recursions",
    "n_supervision_steps",
    "max_free_steps",
    "free_steps_probability",
    "dropout",
)


@dataclass
class LatentAnswerScriptArguments(DataArguments):
    """What learns to answer after latent thoughts. The rest are [`LatentAnswerTrainingArguments`]."""

    backbone: str | None = HfArg(default=None, aliases=["--model"], help="Name or folder of a causal language model.")
    checkpoint: str | None = HfArg(default=None, help="A latent-thinking model to go on from, instead of a backbone.")
    compressor: str | None = HfArg(default=None, help="A trained compressor; without, a new one.")
    trm: str | None = HfArg(default=None, help="A SequenceTRM trained on hidden pairs; without, a new one.")
    num_latents: int = HfArg(default=4, help="Input embeddings a thought is turned into.")
    compressed_size: int | None = HfArg(default=None, help="Width of a new compressor; at most 256.")
    n_layers: int = HfArg(default=2, help="Blocks of a new SequenceTRM's network.")
    n_heads: int = HfArg(default=8, help="Attention heads of a new SequenceTRM.")
    n_latent_steps: int | None = HfArg(default=None, help="Updates of z in a latent recursion; the model's, or 6.")
    n_deep_recursions: int | None = HfArg(default=None, help="Latent recursions in a step; the model's, or 3.")
    n_trained_recursions: int | None = HfArg(default=None, help="Those with gradient, the last; the model's, or 1.")
    n_supervision_steps: int | None = HfArg(default=None, help="Steps of a thought; the model's, or 8.")
    max_free_steps: int | None = HfArg(default=None, help="Most further steps in training; the model's, or 0.")
    free_steps_probability: float | None = HfArg(default=None, help="Share of batches with them; the model's, or 0.5.")
    dropout: float | None = HfArg(default=None, help="Dropout in the SequenceTRM; its own by default.")
    freeze_backbone: bool = HfArg(default=True, help="Train compressor, SequenceTRM and projector only.")


def run_latent_answer(
    script_args: LatentAnswerScriptArguments, training_args: LatentAnswerTrainingArguments
) -> LatentAnswerTrainer:
    """
    Trains as the settings say and saves the model and its tokenizer in `training_args.output_dir`.
    Raises the same errors as `run_masked_diffusion`.
    """
    source = script_args.checkpoint or script_args.backbone
    if source is None or (script_args.checkpoint and script_args.backbone):
        raise ValueError("Say what learns: either --backbone CAUSAL_LM or --checkpoint LATENT_THINKING_MODEL.")
    METHOD.check(script_args)
    resume_from = start_run(training_args)
    tokenizer = load_tokenizer(script_args.tokenizer or source)
    model = _load_model(script_args, tokenizer)
    check_length(script_args.max_length, model)

    def samples(split: str, path: str | None) -> Dataset:
        problems, response = load_problems(script_args, split, path)
        return tokenize_latent_answers(problems, tokenizer, model.config, response, script_args.max_length)

    train, held_out = train_and_eval(script_args, samples)
    set_trainable(model, ["thinker"] if script_args.freeze_backbone else ["*"])
    # No answer says when to stop thinking: halting stays as distillation left it.
    model.thinker.trm.halt_head.requires_grad_(False)
    with output_dir_lock(training_args.output_dir):
        trainer = LatentAnswerTrainer(
            model, training_args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )
        train_and_save(trainer, resume_from, script_args)
    return trainer


def _load_model(
    script_args: LatentAnswerScriptArguments, tokenizer: PreTrainedTokenizerBase
) -> LatentThinkingForCausalLM:
    """The checkpoint to go on from, or a backbone with trained or new parts."""
    if script_args.checkpoint is not None:
        return LatentThinkingForCausalLM.from_pretrained(script_args.checkpoint, dtype=script_args.dtype)
    assert script_args.backbone is not None
    backbone = AutoModelForCausalLM.from_pretrained(script_args.backbone, dtype=script_args.dtype)
    parts = _thinker_parts(script_args, backbone.config.get_text_config().hidden_size)
    return LatentThinkingForCausalLM.from_backbone(
        backbone, tokenizer=tokenizer, num_latents=script_args.num_latents, **parts
    )


def _thinker_parts(script_args: LatentAnswerScriptArguments, width: int) -> dict[str, Any]:
    """Compressor and SequenceTRM, trained ones or the configs of new ones, which fit them."""
    changes = {name: getattr(script_args, name) for name in _TRM_SETTINGS if getattr(script_args, name) is not None}
    size, compressor, trm = script_args.compressed_size or min(256, width), None, None
    if script_args.compressor is not None:
        compressor = DimensionCompressor.from_pretrained(script_args.compressor)
        size = compressor.config.compressed_size
    if script_args.trm is not None:
        trm = SequenceTRM.from_pretrained(script_args.trm, **changes)
        size = trm.config.hidden_size
    new_compressor = DimensionCompressorConfig(hidden_size=width, compressed_size=size)
    network = {"n_layers": script_args.n_layers, "n_heads": script_args.n_heads, **changes}
    return {"compressor": compressor or new_compressor, "trm": trm or SequenceTRMConfig(hidden_size=size, **network)}


METHOD = TrainingMethod(
    LatentAnswerScriptArguments,
    LatentAnswerTrainingArguments,
    run_latent_answer,
    models={
        "backbone": BACKBONE,
        "checkpoint": LATENT_THINKING,
        "compressor": COMPRESSOR,
        "trm": SEQUENCE_TRM,
        **DATA_MODELS,
    },
    new_model_settings=("compressor", "trm", "num_latents", "compressed_size", "n_layers", "n_heads", *_TRM_SETTINGS),
)

"""Training of a SequenceTRM on hidden pairs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM
from transformers.hf_argparser import HfArg

from ..hidden_pairs import HiddenPairsDataset
from ..hub.files import output_dir_lock
from ..hub.model_folders import COMPRESSOR, LANGUAGE_MODEL, SEQUENCE_TRM
from ..models import DimensionCompressor, SequenceTRM, SequenceTRMConfig
from ..models.hub_model import lasting_name
from ..training import TRMTrainer, TRMTrainingArguments
from .run_setup import TrainingMethod, start_run, train_and_save

_NETWORK_SETTINGS = ("n_layers", "n_heads", "block_style", "dropout", "halt_bias")


@dataclass
class TRMScriptArguments:
    """A SequenceTRM, and the hidden pairs it learns. The rest are [`TRMTrainingArguments`]."""

    pairs_dir: str | None = HfArg(default=None, help="Folder or file of hidden pairs.")
    eval_pairs_dir: str | None = HfArg(default=None, help="Hidden pairs to evaluate on.")
    eval_fraction: float = HfArg(default=0.0, help="Share of the pairs held out, without eval_pairs_dir.")
    compressor: str | None = HfArg(default=None, help="Of the pairs, if they are uncompressed or for --backbone.")
    backbone: str | None = HfArg(
        default=None, aliases=["--model"], help="The pairs' language model, to compare tokens."
    )
    checkpoint: str | None = HfArg(default=None, help="A SequenceTRM to go on from.")
    n_layers: int = HfArg(default=2, help="Blocks of a new network.")
    n_heads: int = HfArg(default=8, help="Attention heads of a new network.")
    block_style: str = HfArg(default="trm", help="trm (the paper's block) or llm_trm.")
    dropout: float = HfArg(default=0.1, help="Dropout of a new network.")
    halt_bias: float = HfArg(default=0.0, help="Where a new network's halting logit starts.")
    dtype: str = HfArg(default="float32", help="Of the language model: float32, bfloat16, float16 or auto.")


def run_trm(script_args: TRMScriptArguments, training_args: TRMTrainingArguments) -> None:
    """
    Trains a SequenceTRM as the settings say and saves it in `training_args.output_dir`.
    Raises the same errors as `run_masked_diffusion`.
    """
    if script_args.pairs_dir is None:
        raise ValueError("Say what to learn: --pairs_dir with a folder or file of hidden pairs.")
    if not 0 <= script_args.eval_fraction < 1:
        raise ValueError(f"eval_fraction must be at least 0 and below 1, got {script_args.eval_fraction}.")
    METHOD.check(script_args)
    resume_from = start_run(training_args)
    name = script_args.compressor
    compressor = None if name is None else DimensionCompressor.from_pretrained(name)
    pairs = _load_pairs(script_args.pairs_dir, compressor)
    train, held_out = _train_and_held_out(script_args, pairs, training_args.seed, compressor)
    model = _new_model(script_args, pairs.hidden_size)
    names = (pairs.model_name, compressor and compressor.config.backbone_name_or_path, script_args.backbone)
    name = next(filter(None, names), model.config.backbone_name_or_path)
    model.config.backbone_name_or_path = name and lasting_name(name)
    lm_head = None
    if script_args.backbone is not None:  # the rest of the language model is freed
        language_model = AutoModelForCausalLM.from_pretrained(script_args.backbone, dtype=script_args.dtype)
        lm_head = language_model.get_output_embeddings()
        del language_model
    with output_dir_lock(training_args.output_dir):
        trainer = TRMTrainer(
            model, training_args, train_dataset=train, eval_dataset=held_out, lm_head=lm_head, compressor=compressor
        )
        train_and_save(trainer, resume_from)


def _train_and_held_out(
    script_args: TRMScriptArguments, pairs: HiddenPairsDataset, seed: int, compressor: DimensionCompressor | None
) -> tuple[Any, Any]:
    """Pairs to train on, and held-out ones if there are any."""
    if script_args.eval_pairs_dir is not None:
        return pairs, _load_pairs(script_args.eval_pairs_dir, compressor)
    if not script_args.eval_fraction:
        return pairs, None
    number = round(script_args.eval_fraction * len(pairs))
    if number < 2 or number == len(pairs):
        fraction = f"eval_fraction={script_args.eval_fraction} of {len(pairs)} hidden pairs"
        raise ValueError(f"{fraction} is {number}: evaluation needs two, training one.")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(pairs, order[number:]), Subset(pairs, order[:number])


def _load_pairs(pairs_dir: str, compressor: DimensionCompressor | None) -> HiddenPairsDataset:
    """The pairs, compressed by `compressor` unless they are stored so."""
    pairs = HiddenPairsDataset(pairs_dir)
    if not len(pairs):
        raise ValueError(f"{pairs_dir} holds no hidden pairs.")
    if compressor is None or pairs[0]["context"].shape[-1] == compressor.config.compressed_size:
        return pairs
    return HiddenPairsDataset(pairs_dir, compressor=compressor)


def _new_model(script_args: TRMScriptArguments, width: int) -> SequenceTRM:
    if script_args.checkpoint is None:
        settings = {name: getattr(script_args, name) for name in _NETWORK_SETTINGS}
        return SequenceTRM(SequenceTRMConfig(hidden_size=width, **settings))
    model = SequenceTRM.from_pretrained(script_args.checkpoint)
    if model.config.hidden_size != width:
        found = f"{script_args.checkpoint} has hidden_size={model.config.hidden_size}, but the pairs are {width} wide"
        raise ValueError(f"{found}: name the --compressor it was trained with.")
    return model


METHOD = TrainingMethod(
    TRMScriptArguments,
    TRMTrainingArguments,
    run_trm,
    models={"compressor": COMPRESSOR, "backbone": LANGUAGE_MODEL, "checkpoint": SEQUENCE_TRM},
    new_model_settings=_NETWORK_SETTINGS,
)

"""Small models, their data and a trainer for them, for the tests of training."""

from pathlib import Path

import torch
from transformers import TrainerCallback

from llada_trm_hf import (
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
)
from llada_trm_hf.data import byte_tokenizer, load_reasoning_dataset, tokenize_reasoning
from llada_trm_hf.training import MaskedDiffusionTrainer, MaskedDiffusionTrainingArguments

TOKENIZER = byte_tokenizer()
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def new_backbone(**config) -> LLaDAForMaskedDiffusion:
    torch.manual_seed(0)
    ids = {
        name: getattr(TOKENIZER, name) for name in ("mask_token_id", "pad_token_id", "eos_token_id", "bos_token_id")
    }
    return LLaDAForMaskedDiffusion(LLaDAConfig(**{"vocab_size": len(TOKENIZER), **SIZES, **ids, **config}))


def new_hybrid(freeze_backbone: bool = True, **config) -> LLaDATRMForMaskedDiffusion:
    """A hybrid; `config` goes to its backbone."""
    head = RecursiveRefinementHeadConfig(
        hidden_size=32, chunk_size=5, head_hidden_size=24, max_recursive_steps=3, convergence_threshold=0.0
    )
    return LLaDATRMForMaskedDiffusion.from_backbone(
        new_backbone(**config), head, freeze_backbone=freeze_backbone, min_confidence=0.9
    )


def new_samples():
    """Generated arithmetic as tokens."""
    dataset, response = load_reasoning_dataset("arithmetic", "train[:400]", num_terms=4)
    return tokenize_reasoning(dataset, TOKENIZER, response)


def trainer(model, folder: Path, samples, **arguments) -> MaskedDiffusionTrainer:
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return MaskedDiffusionTrainer(
        model,
        MaskedDiffusionTrainingArguments(output_dir=str(folder), **{**settings, **arguments}),
        train_dataset=samples.select(range(320)),
        eval_dataset=samples.select(range(320, 400)),
        processing_class=TOKENIZER,
    )


def losses(run: MaskedDiffusionTrainer) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.state.log_history if "loss" in row}


class StopAt(TrainerCallback):
    """Ends training after a step, as if the machine had gone."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step

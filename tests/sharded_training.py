"""
What the Trainers make of the models when two CPU processes share the work, with the files of examples/accelerate:

    torchrun --nproc_per_node 2 tests/sharded_training.py ddp|fsdp2|deepspeed_zero2|deepspeed_zero3 FOLDER

accelerate shards on accelerators only, so it is told that these processes have one; what is sharded, gathered and
saved, and how, is then as on a GPU. Without `torchrun`, and with `ddp`, one process does all of it.
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from latent_thinking_models import backbone_for, make_model, new_tokenizer
from tiny_training import SIZES, TOKENIZER, StopAt, losses, new_backbone, new_hybrid, new_samples, trainer

from llada_trm_hf import (
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
    SequenceTRMConfig,
    SlotTRMRefinerConfig,
    TRMRefinerConfig,
    thought_token_ids,
)
from llada_trm_hf.cli.command import finish_distributed
from llada_trm_hf.data import tokenize_latent_answers
from llada_trm_hf.training import LatentAnswerTrainer, LatentAnswerTrainingArguments

CONFIGS = Path(__file__).resolve().parents[1] / "examples/accelerate"
ADDED_BY_LAUNCHER = ("ACCELERATE_", "FSDP_")
STEPS = 3
MODES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")


def launch_settings(mode: str) -> dict[str, str]:
    """The environment `accelerate launch --config_file` makes of the file, in full precision."""
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / f"{mode}.yaml"), "--mixed_precision", "no", "-m", "llada_trm_hf.cli"]
    )
    arguments = _validate_launch_command(arguments)[0]
    arguments.deepspeed_fields_from_accelerate_config = "zero_stage"  # what the launcher notes of the file
    made = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    return {name: value for name, value in made.items() if name.startswith(ADDED_BY_LAUNCHER)}


def pretend_accelerators() -> None:
    PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_GPU)  # type: ignore
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def put_on(*refiners, **fields) -> LLaDATRMForMaskedDiffusion:
    torch.manual_seed(1)
    return LLaDATRMForMaskedDiffusion.from_backbone(new_backbone(), list(refiners), min_confidence=1.0, **fields)


def new_moe() -> LLaDAMoEForMaskedDiffusion:
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ids = {name: getattr(TOKENIZER, name) for name in ("mask_token_id", "pad_token_id", "eos_token_id")}
    return LLaDAMoEForMaskedDiffusion(LLaDAMoEConfig(**SIZES | experts, vocab_size=len(TOKENIZER), **ids))


HEAD = RecursiveRefinementHeadConfig(
    hidden_size=32, chunk_size=5, head_hidden_size=24, max_recursive_steps=2, convergence_threshold=0.0
)
SLOTS = SlotTRMRefinerConfig(hidden_size=32, chunk_size=5, max_recursive_steps=2, dropout=0.0)
TRM = TRMRefinerConfig(hidden_size=32, chunk_size=5, recursion_size=16, num_attention_heads=2, trained_steps=2)
# Diffusion models that train, by name. The balancing loss of experts is one of a whole batch, so it is left out.
DIFFUSION = {
    "llada": new_backbone,
    "llada_moe": new_moe,
    "head": new_hybrid,
    "hybrid": lambda: new_hybrid(freeze_backbone=False),
    "slots": lambda: put_on(SLOTS, freeze_backbone=False),
    "trm_refiner": lambda: put_on(TRM, freeze_backbone=False),
    "cascade": lambda: put_on(HEAD, SLOTS, integration="cascade"),
    "mix": lambda: put_on(HEAD, SLOTS, integration="mix"),
}
NAMES = (*DIFFUSION, "thinker")


def new_trainer(name: str, folder: Path, world: int, use_cpu: bool, **more):
    """A Trainer of three steps, with 8 rows in each of them from all processes together; `more` settings."""
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 8 // world, "use_cpu": use_cpu}
    arguments |= {"save_strategy": "no", "report_to": "none", "max_grad_norm": 0.0}
    arguments |= {"optim": "sgd", "learning_rate": 0.03, "lr_scheduler_type": "constant", **more}
    if name in DIFFUSION:
        model = DIFFUSION[name]()
        if hasattr(model.config, "confidence_loss_weight"):
            model.config.confidence_loss_weight = 0.0  # a mean over chunks: its halves do not add up to the whole
        if hasattr(model.config, "router_aux_loss_coef"):
            model.config.router_aux_loss_coef = 0.0
        return trainer(model, folder, new_samples(), **arguments)
    tokenizer = new_tokenizer()
    trm = SequenceTRMConfig(hidden_size=16, n_heads=2, n_latent_steps=2, n_supervision_steps=2, dropout=0.0)
    model = make_model(backbone=backbone_for(tokenizer), trm=trm, **thought_token_ids(tokenizer))
    rows = [{"prompt": f"{a}+{a % 7}=", "answer": str(10 + a)} for a in range(10, 58)]  # answers of equal length
    samples = tokenize_latent_answers(Dataset.from_list(rows), tokenizer, model.config, "{answer}", 40)
    settings = LatentAnswerTrainingArguments(output_dir=str(folder), logging_steps=1, disable_tqdm=True, **arguments)
    return LatentAnswerTrainer(model, settings, train_dataset=samples)


def train_all(folder: Path, use_cpu: bool = True) -> dict[str, dict[int, float]]:
    """Trains each model, saves it in `folder`, and returns the losses."""
    found = {}
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in NAMES:
        run = new_trainer(name, folder / name, world, use_cpu)
        run.train()
        run.save_model()
        found[name] = losses(run)
        forget(run)
    return found


def train_and_resume(folder: Path, use_cpu: bool) -> dict[str, dict[int, float]]:
    """A hybrid trained in one go, and one that stops after two steps and goes on from its checkpoint; the losses."""
    found = {}
    world = int(os.environ["WORLD_SIZE"])
    settings = {"optim": "adamw_torch", "learning_rate": 3e-3, "lr_scheduler_type": "linear", "save_strategy": "steps"}
    for name, stop, resume in (("whole", STEPS, None), ("cut", 2, None), ("cut", STEPS, True)):
        run = new_trainer("hybrid", folder / name, world, use_cpu, save_steps=2, **settings)
        run.add_callback(StopAt(stop))
        run.train(resume_from_checkpoint=resume)
        if stop == STEPS:
            run.save_model()
        found[name] = losses(run)
        forget(run)
    return found


def forget(run) -> None:
    """So that the next trainer starts as in a process of its own."""
    run.accelerator.free_memory()
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def main(mode: str, folder: str) -> None:
    torch.set_num_threads(1)
    if "LOCAL_RANK" in os.environ and mode != "ddp":
        pretend_accelerators()
    with patch.dict(os.environ, launch_settings(mode)):
        found = train_all(Path(folder), use_cpu=mode == "ddp")
        found |= train_and_resume(Path(folder), use_cpu=mode == "ddp")
    if os.environ.get("RANK", "0") == "0":
        Path(folder, "losses.json").write_text(json.dumps(found))
    finish_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""
Train a refinement head on a masked-diffusion model with the HF Trainer, in Python.

    python examples/train_head.py BACKBONE OUTPUT_FOLDER [--dataset gsm8k] [--max_steps 1000]

BACKBONE is the folder or Hub name of a LLaDA checkpoint. Only the head is saved; it names its backbone.
"""

import argparse

from transformers import AutoTokenizer

from llada_trm_hf import LLaDATRMForMaskedDiffusion
from llada_trm_hf.data import load_reasoning_dataset, tokenize_reasoning
from llada_trm_hf.training import MaskedDiffusionTrainer, MaskedDiffusionTrainingArguments, set_trainable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("backbone")
parser.add_argument("output_folder")
parser.add_argument("--dataset", default="gsm8k", help="a name, or a .json, .jsonl, .csv or .parquet file")
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--chunk_size", type=int, default=16)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.backbone)
model = LLaDATRMForMaskedDiffusion.from_backbone(options.backbone, chunk_size=options.chunk_size)
set_trainable(model, ["refiner"])

problems, response = load_reasoning_dataset(options.dataset)
arguments = MaskedDiffusionTrainingArguments(
    output_dir=options.output_folder,
    max_steps=options.max_steps,
    learning_rate=1e-4,
    warmup_steps=min(100, options.max_steps // 10),
    save_backbone=False,
)
trainer = MaskedDiffusionTrainer(
    model, arguments, train_dataset=tokenize_reasoning(problems, tokenizer, response), processing_class=tokenizer
)
trainer.train()
trainer.save_model()

"""
Train a refinement head and low-rank adapters (LoRA) on the backbone together, with PEFT.

    python examples/train_lora.py BACKBONE OUTPUT_FOLDER [--dataset gsm8k] [--max_steps 1000] [--quantize 4bit]

BACKBONE is the folder or Hub name of a LLaDA checkpoint. OUTPUT_FOLDER then holds adapters and head; load them with

    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(BACKBONE, chunk_size=16)
    model = PeftModel.from_pretrained(hybrid, OUTPUT_FOLDER)

With --quantize the backbone is loaded in 8 bits (torchao, also on a CPU) or 4 (QLoRA, arXiv 2305.14314, bitsandbytes);
adapters and head are trained in full precision. Load the hybrid with the same `quantization_config`.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from llada_trm_hf import LLaDATRMForMaskedDiffusion
from llada_trm_hf.data import load_reasoning_dataset, tokenize_reasoning
from llada_trm_hf.training import MaskedDiffusionTrainer, MaskedDiffusionTrainingArguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("backbone")
parser.add_argument("output_folder")
parser.add_argument("--dataset", default="gsm8k", help="a name, or a .json, .jsonl, .csv or .parquet file")
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--chunk_size", type=int, default=16)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--quantize", choices=["int8", "4bit"], help="the backbone; needs the extra `quantize`")
options = parser.parse_args()

quantization = None
if options.quantize == "int8":
    from torchao.quantization import Int8WeightOnlyConfig

    quantization = TorchAoConfig(Int8WeightOnlyConfig())
elif options.quantize == "4bit":
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )

tokenizer = AutoTokenizer.from_pretrained(options.backbone)
hybrid = LLaDATRMForMaskedDiffusion.from_backbone(
    options.backbone, chunk_size=options.chunk_size, quantization_config=quantization
)
lora = LoraConfig(
    r=options.rank,
    lora_alpha=2 * options.rank,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    modules_to_save=["refiner"],  # trained whole, and saved beside the adapters
)
model = get_peft_model(hybrid, lora)
model.print_trainable_parameters()

problems, response = load_reasoning_dataset(options.dataset)
arguments = MaskedDiffusionTrainingArguments(
    output_dir=options.output_folder,
    max_steps=options.max_steps,
    learning_rate=1e-4,
    warmup_steps=min(100, options.max_steps // 10),
)
trainer = MaskedDiffusionTrainer(
    model, arguments, train_dataset=tokenize_reasoning(problems, tokenizer, response), processing_class=tokenizer
)
trainer.train()
trainer.save_model()

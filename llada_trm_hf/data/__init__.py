"""What goes into training: reasoning datasets, generated arithmetic, a byte tokenizer, and masking."""

from .arithmetic import difference_chains
from .masking import MaskedDiffusionCollator
from .reasoning import load_reasoning_dataset, tokenize_reasoning
from .tokenizer import byte_tokenizer, prompt_tokens

__all__ = [
    "MaskedDiffusionCollator",
    "byte_tokenizer",
    "difference_chains",
    "load_reasoning_dataset",
    "prompt_tokens",
    "tokenize_reasoning",
]

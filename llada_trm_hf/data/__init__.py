"""What goes into training: reasoning datasets, generated arithmetic, plain text, a byte tokenizer, and masking."""

from .arithmetic import difference_chains
from .masking import MaskedDiffusionCollator
from .reasoning import load_reasoning_dataset, tokenize_reasoning
from .text import TextCollator, load_text_dataset, tokenize_texts
from .tokenizer import byte_tokenizer, prompt_tokens

__all__ = [
    "MaskedDiffusionCollator",
    "TextCollator",
    "byte_tokenizer",
    "difference_chains",
    "load_reasoning_dataset",
    "load_text_dataset",
    "prompt_tokens",
    "tokenize_reasoning",
    "tokenize_texts",
]

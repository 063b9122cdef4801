"""What goes into training: reasoning datasets, generated arithmetic, plain text, tokens, masking, thoughts."""

from .arithmetic import difference_chains
from .masking import MaskedDiffusionCollator
from .reasoning import load_reasoning_dataset
from .thoughts import (
    LatentAnswerCollator,
    ThoughtFormat,
    latent_thinking_prompt,
    tokenize_latent_answers,
)
from .tokenization import (
    TextCollator,
    byte_tokenizer,
    load_text_dataset,
    prompt_tokens,
    tokenize_reasoning,
    tokenize_texts,
)

__all__ = [
    "LatentAnswerCollator",
    "MaskedDiffusionCollator",
    "TextCollator",
    "ThoughtFormat",
    "byte_tokenizer",
    "difference_chains",
    "latent_thinking_prompt",
    "load_reasoning_dataset",
    "load_text_dataset",
    "prompt_tokens",
    "tokenize_latent_answers",
    "tokenize_reasoning",
    "tokenize_texts",
]

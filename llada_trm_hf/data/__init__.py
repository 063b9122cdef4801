"""What goes into training: reasoning datasets, generated problems, plain text, tokens, masking, thoughts."""

from .arithmetic import difference_chains
from .generated_problems import GeneratorOptions
from .masking import MaskedDiffusionCollator
from .maze import mazes
from .prefix_sum import prefix_sums
from .reasoning import load_reasoning_dataset
from .sudoku import sudoku_guesses, sudoku_puzzles
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
    "GeneratorOptions",
    "LatentAnswerCollator",
    "MaskedDiffusionCollator",
    "TextCollator",
    "ThoughtFormat",
    "byte_tokenizer",
    "difference_chains",
    "latent_thinking_prompt",
    "load_reasoning_dataset",
    "load_text_dataset",
    "mazes",
    "prefix_sums",
    "prompt_tokens",
    "sudoku_guesses",
    "sudoku_puzzles",
    "tokenize_latent_answers",
    "tokenize_reasoning",
    "tokenize_texts",
]

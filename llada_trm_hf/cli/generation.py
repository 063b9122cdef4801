"""What the commands that generate share: flags, the checkpoint, generation that stops at NaN."""

import argparse
from typing import TYPE_CHECKING, Any

from .command import DTYPES, CommandParser, add_device, checked_device

if TYPE_CHECKING:  # --help does not wait for torch
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


def add_generation_flags(parser: CommandParser) -> None:
    """Adds the settings of generation to a command, and where and how the model runs."""
    parser.add_argument("--max_length", type=int, help="tokens of prompt and answer together")
    parser.add_argument("--max_new_tokens", type=int, help="tokens of the answer")
    parser.add_argument("--num_diffusion_steps", type=int, help="denoising steps, shared equally among blocks")
    parser.add_argument("--block_length", type=int, help="tokens decoded together")
    parser.add_argument("--temperature", type=float, help="0 takes the most probable token")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--cfg_scale", type=float, help="classifier-free guidance")
    parser.add_argument("--remasking", help="low_confidence, random, entropy, margin or refiner")
    parser.add_argument("--confidence_threshold", type=float, help="commit every token that reaches it")
    parser.add_argument("--confidence_factor", type=float, help="commit more, the surer the model is of all of them")
    parser.add_argument("--kv_cache", help="none, prefix or dual: what a step does not compute again")
    parser.add_argument("--remask_committed", type=float, help="mask committed tokens again below this probability")
    parser.add_argument("--remask_budget", type=int, help="how often a token can be masked again")
    parser.add_argument("--stop_at_eos", action="store_true", default=None, help="end an answer at its end token")
    parser.add_argument("--compile", action="store_true", default=None, help="run through torch.compile")
    parser.add_argument("--no_refinement", action="store_true", help="the bare backbone")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as they are stored")


def generation_settings(options: argparse.Namespace) -> dict[str, Any]:
    """
    The settings given on the command line; the model's own hold for the rest. Raises ValueError for two that exclude
    each other, and for a device or seed that cannot be.
    """
    from ..generation import MaskedDiffusionGenerationConfig

    options.device = checked_device(options.device)
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and {2**32 - 1}, got {options.seed}.")
    if options.max_length is not None and options.max_new_tokens is not None:
        raise ValueError("--max_length and --max_new_tokens both limit the answer: give one of them.")
    if options.remask_budget is not None and options.remask_committed is None:
        raise ValueError("--remask_budget has no effect without --remask_committed: nothing is masked again.")
    known = vars(MaskedDiffusionGenerationConfig())
    settings = {name: value for name, value in vars(options).items() if name in known and value is not None}
    return settings | {"enable_refinement": False} if options.no_refinement else settings


def check_generation(settings: dict[str, Any], texts: list[str]) -> None:
    """Raises ValueError for settings that cannot work, and for a prompt that is empty or no text."""
    from ..generation import MaskedDiffusionGenerationConfig

    MaskedDiffusionGenerationConfig(**settings)
    for number, text in enumerate(texts, start=1):
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python keeps bytes of no character
            raise ValueError(f"Prompt {number} is not a text in UTF-8: {text[:40]!a}.")
        if not text.strip():
            raise ValueError(f"Prompt {number} is empty.")


def load(checkpoint: str, dtype: str, device: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A hybrid or a backbone with its tokenizer, ready to generate."""
    from ..evaluation.language_models import load_model
    from ..generation import MaskedDiffusionGenerationMixin

    model, tokenizer = load_model(checkpoint, dtype, device)
    if not isinstance(model, MaskedDiffusionGenerationMixin):
        raise ValueError(f"{checkpoint} is a {type(model).__name__}, which does not generate by diffusion.")
    return model, tokenizer


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    settings: dict[str, Any],
    streamer: "BaseStreamer | None" = None,
) -> "tuple[Any, torch.Tensor]":
    """
    The [`MaskedDiffusionGenerateOutput`] for a batch of prompts, and the answers in it, LongTensor `[B, L]`. NaN or
    Inf is a FloatingPointError that names the module it came from.
    """
    from ..data import prompt_tokens
    from ..inspection import generate_finite

    batch = tokenizer.pad({"input_ids": [prompt_tokens(prompt, tokenizer) for prompt in prompts]}, return_tensors="pt")
    batch = batch.to(model.device)
    output = generate_finite(model, streamer=streamer, **batch, **settings, return_dict_in_generate=True)
    return output, output.sequences[:, batch["input_ids"].shape[1] :]

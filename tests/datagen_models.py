"""Tiny causal language models that think: random weights, the byte tokenizer, a fondness for the closing marker."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from llada_trm_hf.data import byte_tokenizer

# A system prompt that names the markers, as SmolLM3's does, and a line break after the opening one, as R1's has.
CHAT_TEMPLATE = (
    "{{ 'Think between <think> and </think>.' if enable_thinking else 'Do not think.' }}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "smollm3": (SmolLM3Config, SmolLM3ForCausalLM)}


def tokenizer_with_markers(markers: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    if markers:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


def save_model(
    folder: Path,
    kind: str = "llama",
    markers: bool = True,
    chat_template: str | None = None,
    favourites: dict[str, float] | None = None,
    **config,
) -> str:
    """
    Saves a model and its tokenizer, and returns the folder. `favourites` are factors on the LM head's rows of tokens:
    at 2.5 a token is the most probable one at some steps and not at most.
    """
    tokenizer = tokenizer_with_markers(markers, chat_template)
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(0)
    model = model_class(
        config_class(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "initializer_range": 0.3,
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "tie_word_embeddings": False,
                **config,
            }
        )
    )
    with torch.no_grad():
        for token, factor in (favourites if favourites is not None else {"</think>": 2.0}).items():
            model.lm_head.weight[tokenizer(token, add_special_tokens=False)["input_ids"]] *= factor
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load_model(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def plain_states(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """`[L, D]`, from a forward pass over one sequence without any padding or cache."""
    output = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0]


@torch.no_grad()
def plain_greedy(model: PreTrainedModel, tokens: list[int], stop: list[int], eos: int, limit: int) -> list[int]:
    """What the model writes after `tokens`, one plain forward pass per token; ends with `stop`, or without it."""
    written: list[int] = []
    while len(written) < limit:
        token = int(model(torch.tensor([tokens + written]), use_cache=False).logits[0, -1].argmax())
        written.append(token)
        if written[-len(stop) :] == stop:
            return written
        if token == eos:
            return written[:-1]
    return written

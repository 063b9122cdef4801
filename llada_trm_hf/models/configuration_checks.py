"""Checks that several configurations share."""

from transformers import PreTrainedConfig


def check_token_id(name: str, token_id: int | None, vocab_size: int) -> None:
    """Raises ValueError if `token_id` is not a row of the embedding matrix."""
    if token_id is not None and not 0 <= token_id < vocab_size:
        raise ValueError(
            f"{name}={token_id} is outside the vocabulary (0 to {vocab_size - 1}). "
            f"Pass the id the model was trained with, or a larger vocab_size."
        )


def check_at_least_one(config: PreTrainedConfig, *names: str) -> None:
    """Raises ValueError if one of the fields `names` is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


def check_heads(config: PreTrainedConfig) -> None:
    """Raises ValueError if the attention heads do not divide the width, or the key/value heads the query heads."""
    check_at_least_one(config, "num_attention_heads", "num_key_value_heads")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_attention_heads}."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}."
        )

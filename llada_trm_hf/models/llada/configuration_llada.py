"""LLaDA (dense) model configuration."""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..hub_model import check_at_least_one, check_fields, model_type_of
from ..rotary import check_functions, check_heads, check_token_id

# Field names of the official `config.json` files and what they are called in transformers.
_OFFICIAL_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "init_std": "initializer_range",
}

# Official switches with the one value the released checkpoints use. Another value is another network: refused.
_OFFICIAL_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (None, False),
    "rope": (True,),
    "rope_full_precision": (True,),
    "scale_logits": (False,),
}

# Official fields without a meaning for inference or fine-tuning in transformers.
_OFFICIAL_IGNORED = (
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    "embedding_dropout",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "mlp_ratio",
    "precision",
    "residual_dropout",
    "use_cache",
)


class LLaDAConfig(PreTrainedConfig):
    r"""
    Configuration of [`LLaDAModel`] and [`LLaDAForMaskedDiffusion`]. The defaults are those of LLaDA-8B
    (arXiv 2502.09992). The field names of the official `config.json` (`d_model`, `n_layers`, ...) are accepted too.

    Args:
        vocab_size (`int`, defaults to 126464):
            Rows of the embedding matrix and columns of the logits (the official `embedding_size`).
        hidden_size (`int`, defaults to 4096): Width of the residual stream, `D`.
        intermediate_size (`int`, defaults to 12288): Width of the SwiGLU MLP.
        num_hidden_layers (`int`, defaults to 32): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 32): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key/value heads; `num_attention_heads` if not given.
        max_position_embeddings (`int`, defaults to 4096): Longest sequence `generate` accepts.
        rope_parameters (`dict`, *optional*): RoPE settings, `{"rope_theta": 500000.0}` by default.
        rms_norm_eps (`float`, defaults to 1e-5): Epsilon of the RMSNorms.
        attention_dropout (`float`, defaults to 0.0): Dropout on attention probabilities in training.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the LM head shares the embedding matrix.
        mask_token_id (`int`, defaults to 126336): The token that stands for "not decided yet".
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special tokens.

    Raises:
        ValueError: for sizes that do not fit together, a mask id outside the vocabulary, or an official switch that
            describes a network other than LLaDA's.
    """

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {**_OFFICIAL_NAMES, "embedding_size": "vocab_size"}
    default_theta = 500_000.0

    vocab_size: int = 126464
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mask_token_id: int = 126336
    pad_token_id: int | None = 126081
    bos_token_id: int | None = 126080
    eos_token_id: int | list[int] | None = 126081

    def __post_init__(self, **kwargs):
        self._read_official_fields(kwargs)
        check_fields(self)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; LLaDA-MoE's official files, which say "llada" too, give a [`LLaDAMoEConfig`]."""
        if model_type_of(config_dict) == "llada_moe":
            if "llada_moe" not in CONFIG_MAPPING:
                raise ValueError(
                    "This config describes LLaDA-MoE, which needs the package: import llada_trm_hf first."
                )
            return CONFIG_MAPPING["llada_moe"].from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def _read_official_fields(self, kwargs: dict[str, Any]) -> None:
        """Moves the fields of an official `config.json` into those above; `kwargs` keeps the rest."""
        if "num_experts" in kwargs:
            raise ValueError(
                "This config has expert fields (num_experts): it describes LLaDA-MoE, for LLaDAMoEConfig, "
                "LLaDAMoEModel and LLaDAMoEForMaskedDiffusion."
            )
        for official, allowed in _OFFICIAL_FIXED.items():
            value = kwargs.pop(official, allowed[0])
            if value not in allowed:
                raise ValueError(f"{official}={value!r} is not supported: LLaDA checkpoints use {allowed[0]!r}.")
        ratio, width = kwargs.get("mlp_ratio"), kwargs.get("d_model")
        if "mlp_hidden_size" in kwargs and kwargs["mlp_hidden_size"] is None:
            kwargs["mlp_hidden_size"] = (ratio or 4) * (width or self.hidden_size)
        if kwargs.get("embedding_size"):
            self.vocab_size = kwargs.pop("embedding_size")
        for official, name in _OFFICIAL_NAMES.items():
            if kwargs.get(official) is not None:
                setattr(self, name, kwargs[official])
        for name in (*_OFFICIAL_NAMES, *_OFFICIAL_IGNORED, "embedding_size"):
            kwargs.pop(name, None)

    def _check_sizes(self) -> None:
        check_at_least_one(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        check_heads(self)
        check_functions(self)
        check_token_id("mask_token_id", self.mask_token_id, self.vocab_size)

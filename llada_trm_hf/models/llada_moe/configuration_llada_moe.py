"""LLaDA-MoE model configuration."""

from typing import Any

from transformers import PreTrainedConfig

from ..hub_model import check_at_least_one, check_fields, model_type_of
from ..rotary import check_functions, check_heads, check_token_id

# The mask token of the released checkpoints, whose config files do not name it.
RELEASED_MASK_TOKEN_ID = 156895

# Official switches with the values the released checkpoints use. Another value is another network: refused.
_OFFICIAL_FIXED: dict[str, tuple[Any, ...]] = {
    "clip_qkv": (None,),
    "rope_scaling": (None,),
}

# Official fields that the official code does not read, or that have no meaning here.
_OFFICIAL_IGNORED = (
    "moe_router_score_function",
    "norm_topk_prob",
    "routed_scaling_factor",
    "router_num_group",
    "router_topk_group",
    "use_cache",
)


class LLaDAMoEConfig(PreTrainedConfig):
    r"""
    Configuration of [`LLaDAMoEModel`] and [`LLaDAMoEForMaskedDiffusion`]. The defaults are those of
    LLaDA-MoE-7B-A1B (arXiv 2509.24389), and the fields are named as in its official `config.json`.

    Args:
        vocab_size (`int`, defaults to 157184): Rows of the embedding matrix and columns of the logits.
        hidden_size (`int`, defaults to 2048): Width of the residual stream, `D`.
        dense_intermediate_size (`int`, defaults to 8192): Width of the SwiGLU MLP of a layer without experts.
        expert_intermediate_size (`int`, defaults to 1024): Width of the SwiGLU MLP of each expert.
        shared_expert_intermediate_size (`int`, *optional*): Width of an expert that sees every token, unweighted; by
            default there is none.
        num_hidden_layers (`int`, defaults to 16): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 16): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key/value heads; `num_attention_heads` if not given.
        max_position_embeddings (`int`, defaults to 8192): Longest sequence `generate` accepts.
        rope_parameters (`dict`, *optional*): RoPE settings, `{"rope_theta": 50000.0}` by default. The official
            top-level `rope_theta` and `partial_rotary_factor` (share of a head that is rotated) are accepted.
        qk_layernorm (`bool`, defaults to `True`): Whether each head of queries and keys is normalised before RoPE.
        num_experts (`int`, defaults to 64): Experts in a layer, `E`.
        num_experts_per_tok (`int`, defaults to 8): Experts each token goes to.
        moe_layer_freq (`list[int]`, *optional*): For each layer 1 (experts) or 0 (dense MLP); by default all 1.
        moe_router_enable_expert_bias (`bool`, defaults to `False`): Whether routers have a bias for each expert, added
            to its probability.
        router_aux_loss_coef (`float`, defaults to 0.01): Weight of the balancing loss in training.
        output_router_logits (`bool`, defaults to `False`): Whether outputs hold the router logits.
        rms_norm_eps (`float`, defaults to 1e-5): Epsilon of the RMSNorms.
        attention_dropout (`float`, defaults to 0.0): Dropout on attention probabilities in training.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the LM head shares the embedding matrix.
        mask_token_id (`int`, *optional*): The token that stands for "not decided yet". By default that of the released
            checkpoints, 156895, if the vocabulary is large enough; official config files do not name it.
        pad_token_id (`int`, *optional*): Padding, whose embedding is not trained.
        bos_token_id, eos_token_id (`int`, *optional*): Special tokens.

    Raises:
        ValueError: for sizes that do not fit together, a mask or padding id outside the vocabulary, or an official
            switch that describes a network other than LLaDA-MoE's.
    """

    model_type = "llada_moe"
    default_theta = 50_000.0

    vocab_size: int = 157184
    hidden_size: int = 2048
    dense_intermediate_size: int = 8192
    expert_intermediate_size: int = 1024
    shared_expert_intermediate_size: int | None = None
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rope_parameters: dict | None = None
    qk_layernorm: bool = True
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] = None  # type: ignore[assignment]
    moe_router_enable_expert_bias: bool = False
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    rms_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    attention_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mask_token_id: int | None = None
    pad_token_id: int | None = 156892
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 156892

    def __post_init__(self, **kwargs):
        self._read_official_fields(kwargs)
        check_fields(self)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.moe_layer_freq is None:
            self.moe_layer_freq = [1] * self.num_hidden_layers
        if self.mask_token_id is None and self.vocab_size > RELEASED_MASK_TOKEN_ID:
            self.mask_token_id = RELEASED_MASK_TOKEN_ID
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"partial_rotary_factor rotates {self.rotary_dim} of a head of {self.head_dim}: it must "
                f"be an even number from 2 to {self.head_dim}."
            )

    @property
    def rotary_dim(self) -> int:
        """Components of a head that RoPE rotates: the first ones."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1))  # type: ignore[union-attr]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return {**config_dict, "model_type": model_type_of(config_dict)}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; an official `config_dict`, whose `model_type` is "llada", is accepted."""
        if model_type_of(config_dict) == "llada":
            raise ValueError(
                "This config has no expert fields (num_experts): it is a dense LLaDA checkpoint, for LLaDAConfig, "
                "LLaDAModel and LLaDAForMaskedDiffusion."
            )
        loaded = super().from_dict({k: v for k, v in config_dict.items() if k != "model_type"}, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        check_token_id("mask_token_id", config.mask_token_id, config.vocab_size)
        return loaded

    def _read_official_fields(self, kwargs: dict[str, Any]) -> None:
        """Takes the fields of an official `config.json` that are not among those above out of `kwargs`."""
        if self.attention_bias:
            raise ValueError("attention_bias=True is not supported: LLaDA-MoE checkpoints use False.")
        for official, allowed in _OFFICIAL_FIXED.items():
            value = kwargs.pop(official, allowed[0])
            if value not in allowed:
                raise ValueError(f"{official}={value!r} is not supported: LLaDA-MoE checkpoints use {allowed[0]!r}.")
        for official in _OFFICIAL_IGNORED:
            kwargs.pop(official, None)

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "dense_intermediate_size", "expert_intermediate_size")
        check_at_least_one(self, *sizes, "num_hidden_layers", "num_experts", "num_experts_per_tok")
        if self.shared_expert_intermediate_size is not None:
            check_at_least_one(self, "shared_expert_intermediate_size")
        check_heads(self)
        check_functions(self)
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than there are experts "
                f"(num_experts={self.num_experts})."
            )
        if len(self.moe_layer_freq) != self.num_hidden_layers or not set(self.moe_layer_freq) <= {0, 1}:
            raise ValueError(
                f"moe_layer_freq needs a 0 (dense) or 1 (experts) for each of the {self.num_hidden_layers} layers, "
                f"got {self.moe_layer_freq}."
            )
        if not any(self.moe_layer_freq):
            raise ValueError("No layer has experts (moe_layer_freq is 0 everywhere): that is LLaDAConfig's network.")
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef must be 0 or more, got {self.router_aux_loss_coef}.")
        check_token_id("mask_token_id", self.mask_token_id, self.vocab_size)
        check_token_id("pad_token_id", self.pad_token_id, self.vocab_size)

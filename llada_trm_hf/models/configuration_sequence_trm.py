"""Configuration of the recursive model that reasons over a sequence of compressed hidden states."""

from typing import ClassVar

from transformers import PreTrainedConfig


class SequenceTRMConfig(PreTrainedConfig):
    r"""
    Configuration of [`SequenceTRM`].

    Args:
        hidden_size (`int`, defaults to 256): Width of context, state and prediction, `D'`.
        n_layers (`int`, defaults to 2): Transformer blocks of the network that is applied again and again.
        n_heads (`int`, defaults to 8): Attention heads.
        intermediate_size (`int`, *optional*): Width of the MLP. By default `4 * hidden_size` in the `llm_trm` style,
            and in the `trm` style (SwiGLU) the multiple of 64 above `8/3 * hidden_size`, about as many weights.
        block_style (`str`, defaults to `"trm"`): `"trm"`, the block of the TRM paper (RoPE, SwiGLU, post-norm, no
            biases), or `"llm_trm"`, that of the published llm-trm weights (no positions, GELU, pre-norm, biases).
        n_latent_steps (`int`, defaults to 6): Updates of z in a latent recursion, `n`.
        n_deep_recursions (`int`, defaults to 3): Latent recursions in a supervision step, `T`; the last one has
            gradients.
        n_supervision_steps (`int`, defaults to 8): Supervision steps, and the most that `reason` takes by default.
        dropout (`float`, defaults to 0.1): In the `trm` style on the output of attention and MLP, in the `llm_trm`
            style on attention probabilities.
        halt_loss (`str`, defaults to `"bce"`): What the halting probability learns: `"bce"`, whether the cosine
            similarity of prediction and target exceeds `cosine_threshold`, or `"mse"`, the cosine similarity itself.
        cosine_threshold (`float`, defaults to 0.8): See `halt_loss`.
        halt_loss_weight (`float`, defaults to 0.5): Weight of the halting loss.
        backbone_name_or_path (`str`, *optional*): The language model whose compressed hidden states it was trained on.

    Raises:
        ValueError: for an unknown style or loss, sizes below 1, heads that do not divide the width, or a dropout
            outside [0, 1).
    """

    model_type = "sequence_trm"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}

    hidden_size: int = 256
    n_layers: int = 2
    n_heads: int = 8
    intermediate_size: int = None  # type: ignore[assignment]
    block_style: str = "trm"
    n_latent_steps: int = 6
    n_deep_recursions: int = 3
    n_supervision_steps: int = 8
    dropout: float = 0.1
    halt_loss: str = "bce"
    cosine_threshold: float = 0.8
    halt_loss_weight: float = 0.5
    backbone_name_or_path: str | None = None

    def __post_init__(self, **kwargs):
        for name, values in {"block_style": ("trm", "llm_trm"), "halt_loss": ("bce", "mse")}.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be {values[0]!r} or {values[1]!r}, got {getattr(self, name)!r}.")
        if self.intermediate_size is None:
            gated_size = -(-8 * self.hidden_size // 3)
            self.intermediate_size = -(-gated_size // 64) * 64 if self.block_style == "trm" else 4 * self.hidden_size
        sizes = ("hidden_size", "n_layers", "n_heads", "intermediate_size")
        for name in (*sizes, "n_latent_steps", "n_deep_recursions", "n_supervision_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        # Rotary embeddings turn pairs of channels.
        width = self.n_heads * (2 if self.block_style == "trm" else 1)
        if self.hidden_size % width:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of {width} for n_heads={self.n_heads} in the "
                f"{self.block_style!r} style."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}.")
        super().__post_init__(**kwargs)

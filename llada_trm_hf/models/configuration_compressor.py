"""Configuration of the compressor of hidden states."""

from transformers import PreTrainedConfig


class DimensionCompressorConfig(PreTrainedConfig):
    r"""
    Configuration of [`DimensionCompressor`].

    Args:
        hidden_size (`int`, defaults to 2048): Width of the hidden states, `D`; that of the language model (2048 for
            SmolLM3-3B).
        compressed_size (`int`, defaults to 256): Width they are compressed to, `D'`.
        backbone_name_or_path (`str`, *optional*): The language model whose hidden states it was fitted to.

    Raises:
        ValueError: unless 1 <= compressed_size <= hidden_size.
    """

    model_type = "dimension_compressor"

    hidden_size: int = 2048
    compressed_size: int = 256
    backbone_name_or_path: str | None = None

    def __post_init__(self, **kwargs):
        if not 1 <= self.compressed_size <= self.hidden_size:
            raise ValueError(
                f"compressed_size must be between 1 and hidden_size={self.hidden_size}, got {self.compressed_size}."
            )
        super().__post_init__(**kwargs)

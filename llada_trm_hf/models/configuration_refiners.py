"""Configurations of the refiners."""

from transformers import PreTrainedConfig


class RecursiveRefinementHeadConfig(PreTrainedConfig):
    r"""
    Configuration of [`RecursiveRefinementHead`].

    Args:
        hidden_size (`int`, defaults to 2048): Width of the hidden states it refines, `D`; that of the backbone.
        chunk_size (`int`, defaults to 16): Tokens refined together, `C`.
        head_hidden_size (`int`, defaults to 512): Width of the code a chunk is encoded to.
        head_layers (`int`, defaults to 2): SwiGLU layers between code and update.
        head_intermediate_size (`int`, *optional*): Width of those layers, `3 * head_hidden_size` if not given.
        max_recursive_steps (`int`, defaults to 8): Largest number of updates of a chunk, `K`.
        convergence_threshold (`float`, defaults to 0.01): A chunk stops when the cosine similarity of its code with
            that of the step before exceeds `1 - convergence_threshold`. 0 never stops.
        step_size (`float`, defaults to 0.1): Factor of every update.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.

    Raises:
        ValueError: for a size below 1, or a threshold outside [0, 2].
    """

    model_type = "recursive_refinement_head"

    hidden_size: int = 2048
    chunk_size: int = 16
    head_hidden_size: int = 512
    head_layers: int = 2
    head_intermediate_size: int = None  # type: ignore[assignment]
    max_recursive_steps: int = 8
    convergence_threshold: float = 0.01
    step_size: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.head_intermediate_size is None:
            self.head_intermediate_size = 3 * self.head_hidden_size
        sizes = ("hidden_size", "chunk_size", "head_hidden_size", "head_layers", "max_recursive_steps")
        for name in (*sizes, "head_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.convergence_threshold <= 2:
            raise ValueError(f"convergence_threshold must be between 0 and 2, got {self.convergence_threshold}.")
        super().__post_init__(**kwargs)

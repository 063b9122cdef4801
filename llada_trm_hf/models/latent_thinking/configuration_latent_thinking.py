"""Configuration of a causal language model that thinks in compressed hidden states."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..backbone_wrapper import config_from_dict, for_the_backbone_only
from ..hub_model import check_at_least_one, check_fields
from ..rotary import check_token_id
from .dimension_compressor import DimensionCompressor, DimensionCompressorConfig
from .sequence_trm import SequenceTRM, SequenceTRMConfig
from .sequence_trm_layers import check_selection

THINKER_MODELS: dict[str, type[PreTrainedModel]] = {
    model.config_class.model_type: model for model in (DimensionCompressor, SequenceTRM)
}


class LatentThinkingConfig(PreTrainedConfig):
    r"""
    Configuration of [`LatentThinkingForCausalLM`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`): The causal language model.
        compressor_config (`PreTrainedConfig` or `dict`, *optional*): The [`DimensionCompressor`]; by default one for
            the backbone's width, to at most 256.
        trm_config (`PreTrainedConfig` or `dict`, *optional*): The [`SequenceTRM`]; by default one as wide as the
            compressed states.
        num_latents (`int`, defaults to 4): Input embeddings a thought is turned into.
        think_start_token_ids (`list[int]`): The marker before a thought, one token or several. The thought reads the
            hidden states before it.
        think_end_token_ids (`list[int]`): The marker after a thought.
        latent_token_id (`int`): The token that holds a place for a latent. It takes part in nothing else: its own
            embedding is never read, and it is never generated. It is not the padding, start or end token.
        max_reasoning_steps (`int`, *optional*): The most supervision steps a thought takes at inference; by default
            `trm_config.n_supervision_steps`, as in training.
        halt_threshold (`float`, defaults to 0.5): At inference, a thought ends when its halting probability exceeds
            this; 1 never ends it early.
        convergence_threshold (`float`, defaults to 0.0): At inference, a thought ends too when its residual (see
            [`SequenceTRMReasoning`]) is below this; 0 does without.
        num_trajectories (`int`, defaults to 1): Trajectories of a thought at inference, of which one is kept.
        select_by (`str`, defaults to `"halt"`): Which: `"halt"`, that with the highest halting probability, or
            `"residual"`, that with the smallest residual.
        noise_std (`float`, defaults to 0.0): Standard deviation of the noise that makes them differ.
        backbone_name_or_path (`str`, *optional*): Where the backbone came from; a checkpoint without it needs it.
        backbone_in_checkpoint (`bool`, defaults to `True`): Whether the checkpoint holds the backbone's weights.
        backbone_fingerprint (`list[float]`, *optional*): Of a checkpoint without it, what tells the backbone from
            others; written and compared where the package is imported.
        thinker_dtype (`str`, *optional*): Set when the thinker is saved in another dtype than its backbone. It is
            loaded in that dtype again; a float32 one stays so whatever dtype is asked for.

    Raises:
        ValueError: for values out of range, tokens outside the vocabulary, or parts that do not fit together.
    """

    model_type = "latent_thinking"
    # Plain class attributes. There is no default backbone; the parts get attn_implementation and dtype changes too.
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "reasoning_steps", "halt_probability"]
    sub_configs: ClassVar[dict[str, Any]] = {
        "backbone_config": AutoConfig,
        "compressor_config": DimensionCompressorConfig,
        "trm_config": SequenceTRMConfig,
    }

    backbone_config: Any = None
    compressor_config: Any = None
    trm_config: Any = None
    num_latents: int = 4
    think_start_token_ids: list[int] = None  # type: ignore[assignment]
    think_end_token_ids: list[int] = None  # type: ignore[assignment]
    latent_token_id: int = None  # type: ignore[assignment]
    max_reasoning_steps: int = None  # type: ignore[assignment]
    halt_threshold: float = 0.5
    convergence_threshold: float = 0.0
    num_trajectories: int = 1
    select_by: str = "halt"
    noise_std: float = 0.0
    backbone_name_or_path: str | None = None
    backbone_in_checkpoint: bool = True
    backbone_fingerprint: list[float] | None = None
    thinker_dtype: str | None = None

    def __post_init__(self, **kwargs):
        check_fields(self)
        if self.backbone_config is None:
            raise ValueError("A latent_thinking config needs the backbone_config of a causal language model.")
        self.backbone_config = config_from_dict(self.backbone_config, {})
        text_config = self.backbone_config.get_text_config()
        if self.compressor_config is None:
            width = text_config.hidden_size
            self.compressor_config = DimensionCompressorConfig(hidden_size=width, compressed_size=min(256, width))
        self.compressor_config = config_from_dict(self.compressor_config, THINKER_MODELS)
        if self.trm_config is None:
            self.trm_config = SequenceTRMConfig(hidden_size=self.compressor_config.compressed_size)
        self.trm_config = config_from_dict(self.trm_config, THINKER_MODELS)
        if self.max_reasoning_steps is None:
            self.max_reasoning_steps = self.trm_config.n_supervision_steps
        self._check_parts(text_config)
        self._check_tokens(text_config)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        # Setting these on this config sets them on the backbone's as well: keep what a loaded backbone runs with.
        kwargs.setdefault("attn_implementation", self.backbone_config._attn_implementation)
        experts = kwargs.get("experts_implementation", self.backbone_config._experts_implementation)
        kwargs["experts_implementation"] = for_the_backbone_only(experts)
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The backbone's: what code that asks for `vocab_size` or `hidden_size` means."""
        return self.backbone_config.get_text_config(*args, **kwargs)

    @property
    def thought_token_ids(self) -> list[int]:
        """A thought as tokens: the opening marker, the places of the latents, the closing marker."""
        return [*self.think_start_token_ids, *[self.latent_token_id] * self.num_latents, *self.think_end_token_ids]

    def _check_parts(self, text_config: PreTrainedConfig) -> None:
        check_at_least_one(self, "num_latents", "max_reasoning_steps", "num_trajectories")
        compressor, trm = self.compressor_config, self.trm_config
        made_for = compressor.backbone_name_or_path
        if compressor.hidden_size != text_config.hidden_size:
            raise ValueError(
                f"The compressor has hidden_size={compressor.hidden_size}, the backbone {text_config.hidden_size}: "
                f"it was made for another language model{f' ({made_for})' if made_for else ''}."
            )
        if compressor.compressed_size != trm.hidden_size:
            raise ValueError(
                f"The compressor has compressed_size={compressor.compressed_size}, the SequenceTRM "
                f"hidden_size={trm.hidden_size}: they have to be the same."
            )
        if not 0 <= self.halt_threshold <= 1:
            raise ValueError(f"halt_threshold must be between 0 and 1, got {self.halt_threshold}.")
        for name in ("noise_std", "convergence_threshold"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        check_selection(self.select_by)

    def _check_tokens(self, text_config: PreTrainedConfig) -> None:
        for name in ("think_start_token_ids", "think_end_token_ids"):
            ids = getattr(self, name)
            if not ids:
                raise ValueError(f"{name} must name at least one token, got {ids}.")
            for token_id in ids:
                check_token_id(name, token_id, text_config.vocab_size)
        if self.latent_token_id is None:
            raise ValueError("latent_token_id is missing: name a token the backbone has no other use for.")
        check_token_id("latent_token_id", self.latent_token_id, text_config.vocab_size)
        taken: dict[str, list[Any]] = {
            "think_start_token_ids": self.think_start_token_ids,
            "think_end_token_ids": self.think_end_token_ids,
        }
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(text_config, name, None)
            taken[name] = ids if isinstance(ids, list) else [ids]
        for name, ids in taken.items():
            if self.latent_token_id in ids:
                raise ValueError(
                    f"latent_token_id={self.latent_token_id} is the {name} too: name a token the backbone has no "
                    f"other use for."
                )

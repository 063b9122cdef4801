"""Configuration of the hybrid: a masked-diffusion backbone and a refiner."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from ..backbone_wrapper import config_from_dict, for_the_backbone_only
from ..hub_model import check_at_least_one, check_fields
from ..refiners.refiner_integration import combine_refiner_configs
from ..registered_models import BACKBONES
from ..rotary import check_token_id

DEEP_SUPERVISION_SCHEDULES = ("constant", "linear", "exponential")


class LLaDATRMConfig(PreTrainedConfig):
    r"""
    Configuration of [`LLaDATRMForMaskedDiffusion`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`): The masked-diffusion model; LLaDA-8B by default.
        refiner_config (`PreTrainedConfig` or `dict`, or a `list` of them): The refiner, or several; by default a
            [`TRMRefiner`] for the backbone's width. Several become one, the config of a
            [`RefinerCascade`] or [`RefinerMix`].
        integration (`str`, *optional*): How several refiners work together: `"cascade"` (one after the other) or
            `"mix"` (side by side, with a learned gate). A single refiner means `"replace"`.
        chunk_size (`int`, defaults to 16): Tokens in a chunk; the refiner's.
        refine_low_confidence_only (`bool`, defaults to `True`): Refine only chunks whose confidence is below
            `min_confidence`, instead of every chunk with something to decide.
        min_confidence (`float`, defaults to 0.5): See above; the confidence of a chunk is the backbone's mean
            probability of its best guess over the chunk's undecided tokens.
        deep_supervision_weight (`float`, defaults to 0.3): Weight of the mean loss over the recursion steps.
        deep_supervision_schedule (`str`, defaults to `"constant"`): How much each step counts in that mean: the same,
            in proportion to its number (`"linear"`), or twice the step before (`"exponential"`).
        change_loss_weight (`float`, *optional*): Weight of the same loss of what the refiner adds to the hidden
            states, read by the LM head without them. A refiner that starts near zero learns only from the tokens that
            the backbone gets wrong, few of them; this lets it learn from all that are masked. By default 1 for a
            [`TRMRefiner`], for which it was measured, and 0 for others.
        confidence_loss_weight (`float`, defaults to 0.05): Weight of the calibration of the refiner's confidence.
        orthogonality_weight (`float`, defaults to 0.01): Weight of the overlap between a refiner's slots, where it has
            slots.
        mask_token_id (`int`, *optional*): The backbone's by default.
        backbone_name_or_path (`str`, *optional*): Where the backbone came from; a checkpoint without it needs it.
        backbone_in_checkpoint (`bool`, defaults to `True`): Whether the checkpoint holds the backbone's weights.
        backbone_fingerprint (`list[float]`, *optional*): Of a checkpoint without it, what tells the backbone from
            others; written and compared where the package is imported.
        refiner_dtype (`str`, *optional*): Set when a refiner is saved in another dtype than its backbone. It is loaded
            in that dtype again; a float32 one stays so whatever dtype is asked for.

    Raises:
        ValueError: for values out of range, a refiner that does not fit the backbone, or an unknown refiner.
    """

    model_type = "llada_trm"
    # A plain class attribute: sub-configurations get attn_implementation and dtype changes too.
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig, "refiner_config": AutoConfig}
    # Exported code knows the families of its checkpoint only, so there may be no default to compare
    # with when it is saved. Only transformers before 5.20 reads this.
    has_no_defaults_at_init: ClassVar[bool] = True

    backbone_config: Any = None
    refiner_config: Any = None
    integration: str = None  # type: ignore[assignment]
    chunk_size: int = 16
    refine_low_confidence_only: bool = True
    min_confidence: float = 0.5
    deep_supervision_weight: float = 0.3
    deep_supervision_schedule: str = "constant"
    change_loss_weight: float = None  # type: ignore[assignment]
    confidence_loss_weight: float = 0.05
    orthogonality_weight: float = 0.01
    mask_token_id: int = None  # type: ignore[assignment]
    backbone_name_or_path: str | None = None
    backbone_in_checkpoint: bool = True
    backbone_fingerprint: list[float] | None = None
    refiner_dtype: str | None = None

    def __post_init__(self, **kwargs):
        check_fields(self)
        self.backbone_config = config_from_dict(self.backbone_config or {"model_type": "llada"}, BACKBONES)
        text_config = self.backbone_config.get_text_config()
        if self.refiner_config is None:
            self.refiner_config = {
                "model_type": "trm_refiner",
                "hidden_size": text_config.hidden_size,
                "chunk_size": self.chunk_size,
            }
        self.refiner_config = combine_refiner_configs(self.refiner_config, self.integration)
        self.integration = getattr(self.refiner_config, "integration", "replace")
        if self.change_loss_weight is None:
            self.change_loss_weight = float(self.refiner_config.model_type == "trm_refiner")
        if self.mask_token_id is None:
            self.mask_token_id = getattr(text_config, "mask_token_id", None)
        self._check(text_config)
        kwargs.setdefault("pad_token_id", getattr(text_config, "pad_token_id", None))
        kwargs.setdefault("eos_token_id", getattr(text_config, "eos_token_id", None))
        # Setting these on this config sets them on the backbone's as well: keep what a loaded backbone runs with.
        kwargs.setdefault("attn_implementation", self.backbone_config._attn_implementation)
        experts = kwargs.get("experts_implementation", self.backbone_config._experts_implementation)
        kwargs["experts_implementation"] = for_the_backbone_only(experts)
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The backbone's: what code that asks for `vocab_size` or `hidden_size` means."""
        return self.backbone_config.get_text_config(*args, **kwargs)

    def _check(self, text_config: PreTrainedConfig) -> None:
        if self.mask_token_id is None:
            raise ValueError(
                f"The backbone's config ({self.backbone_config.model_type}) names no mask token: pass mask_token_id."
            )
        check_token_id("mask_token_id", self.mask_token_id, text_config.vocab_size)
        refiner = self.refiner_config
        if refiner.hidden_size != text_config.hidden_size:
            raise ValueError(
                f"The refiner has hidden_size={refiner.hidden_size}, the backbone {text_config.hidden_size}: "
                f"build the refiner with hidden_size={text_config.hidden_size}."
            )
        check_at_least_one(self, "chunk_size")
        if refiner.chunk_size != self.chunk_size:
            raise ValueError(f"chunk_size={self.chunk_size}, but the refiner has chunk_size={refiner.chunk_size}.")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must be between 0 and 1, got {self.min_confidence}.")
        if self.deep_supervision_schedule not in DEEP_SUPERVISION_SCHEDULES:
            raise ValueError(
                f"deep_supervision_schedule must be one of {DEEP_SUPERVISION_SCHEDULES}, got "
                f"{self.deep_supervision_schedule!r}."
            )
        for name in (
            "deep_supervision_weight",
            "change_loss_weight",
            "confidence_loss_weight",
            "orthogonality_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")

"""Masked-diffusion decoding, for every family: `generate`, its settings, its rules, its cache, its trace."""

from .block_kv_cache import BlockKVCache
from .configuration_masked_diffusion import MaskedDiffusionGenerationConfig
from .masked_diffusion_mixin import MaskedDiffusionGenerateOutput, MaskedDiffusionGenerationMixin
from .refinement_trace import RefinementPass, RefinementTrace

MaskedDiffusionGenerationMixin.trace_class = RefinementTrace

__all__ = [
    "BlockKVCache",
    "MaskedDiffusionGenerateOutput",
    "MaskedDiffusionGenerationConfig",
    "MaskedDiffusionGenerationMixin",
    "RefinementPass",
    "RefinementTrace",
]

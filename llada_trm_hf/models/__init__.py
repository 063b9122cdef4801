"""
Models and configurations, a folder for each family. Importing this registers every model with the Auto classes.

Files here and in `generation/` travel with the weights, flat (`hub_model.py`): no two share a name, and they import
only torch, transformers and each other, relatively.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .latent_thinking.configuration_latent_thinking import LatentThinkingConfig
from .latent_thinking.dimension_compressor import (
    CompressorOutput,
    DimensionCompressor,
    DimensionCompressorConfig,
    PCAFit,
)
from .latent_thinking.latent_passes import LatentThinkingOutput
from .latent_thinking.latent_thinker import LatentThinker, LatentThought
from .latent_thinking.modeling_latent_thinking import LatentThinkingForCausalLM
from .latent_thinking.sequence_trm import SequenceTRM, SequenceTRMConfig, SequenceTRMOutput, SequenceTRMReasoning
from .latent_thinking.thinking_chat_template import latent_thinking_tokenizer
from .latent_thinking.thought_tokens import thought_token_ids
from .llada.configuration_llada import LLaDAConfig
from .llada.modeling_llada import LLaDAForMaskedDiffusion, LLaDAModel
from .llada_moe.configuration_llada_moe import LLaDAMoEConfig
from .llada_moe.modeling_llada_moe import LLaDAMoEForMaskedDiffusion, LLaDAMoEModel, LLaDAMoEOutput
from .llada_trm.configuration_llada_trm import LLaDATRMConfig
from .llada_trm.modeling_llada_trm import LLaDATRMForMaskedDiffusion, LLaDATRMOutput
from .refiners.modeling_refiner import ChunkLayout, PreTrainedRefiner, RefinerOutput, register_refiner
from .refiners.recursive_refinement_head import RecursiveRefinementHead, RecursiveRefinementHeadConfig
from .refiners.refiner_integration import RefinerCascade, RefinerCascadeConfig, RefinerMix, RefinerMixConfig
from .refiners.slot_trm_refiner import SlotTRMRefiner, SlotTRMRefinerConfig
from .refiners.trm_refiner import TRMRefiner, TRMRefinerConfig

_MASKED_DIFFUSION = (LLaDAForMaskedDiffusion, LLaDAMoEForMaskedDiffusion, LLaDATRMForMaskedDiffusion)
_AUTO_CLASSES = {
    AutoModel: (
        LLaDAModel,
        LLaDAMoEModel,
        LLaDATRMForMaskedDiffusion,
        RecursiveRefinementHead,
        SlotTRMRefiner,
        TRMRefiner,
        RefinerCascade,
        RefinerMix,
        DimensionCompressor,
        SequenceTRM,
    ),
    AutoModelForMaskedLM: _MASKED_DIFFUSION,
    AutoModelForCausalLM: (*_MASKED_DIFFUSION, LatentThinkingForCausalLM),
}
for _auto_class, _models in _AUTO_CLASSES.items():
    for _model in _models:
        AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
        _auto_class.register(_model.config_class, _model, exist_ok=True)

__all__ = [
    "ChunkLayout",
    "CompressorOutput",
    "DimensionCompressor",
    "DimensionCompressorConfig",
    "LLaDAConfig",
    "LLaDAForMaskedDiffusion",
    "LLaDAMoEConfig",
    "LLaDAMoEForMaskedDiffusion",
    "LLaDAMoEModel",
    "LLaDAMoEOutput",
    "LLaDAModel",
    "LLaDATRMConfig",
    "LLaDATRMForMaskedDiffusion",
    "LLaDATRMOutput",
    "LatentThinker",
    "LatentThinkingConfig",
    "LatentThinkingForCausalLM",
    "LatentThinkingOutput",
    "LatentThought",
    "PCAFit",
    "PreTrainedRefiner",
    "RecursiveRefinementHead",
    "RecursiveRefinementHeadConfig",
    "RefinerCascade",
    "RefinerCascadeConfig",
    "RefinerMix",
    "RefinerMixConfig",
    "RefinerOutput",
    "SequenceTRM",
    "SequenceTRMConfig",
    "SequenceTRMOutput",
    "SequenceTRMReasoning",
    "SlotTRMRefiner",
    "SlotTRMRefinerConfig",
    "TRMRefiner",
    "TRMRefinerConfig",
    "latent_thinking_tokenizer",
    "register_refiner",
    "thought_token_ids",
]

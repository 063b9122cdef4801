"""
The backbone families and the refiners of the package, by `model_type`. `save_pretrained` writes a file of this name that
lists only what the checkpoint holds, so that no other code travels with it.
"""

from .hub_model import BACKBONES, REFINERS
from .llada.modeling_llada import LLaDAForMaskedDiffusion
from .llada_moe.modeling_llada_moe import LLaDAMoEForMaskedDiffusion
from .refiners.recursive_refinement_head import RecursiveRefinementHead
from .refiners.slot_trm_refiner import SlotTRMRefiner

BACKBONES.update(
    {model.config_class.model_type: model for model in (LLaDAForMaskedDiffusion, LLaDAMoEForMaskedDiffusion)}
)
REFINERS.update({model.config_class.model_type: model for model in (RecursiveRefinementHead, SlotTRMRefiner)})

"""
The backbone families and refiners of the package. `save_pretrained` writes a file of this name that lists only what a
checkpoint holds, so that no other code travels with it.
"""

from .hub_model import BACKBONES, REFINERS
from .llada.modeling_llada import LLaDAForMaskedDiffusion
from .llada_moe.modeling_llada_moe import LLaDAMoEForMaskedDiffusion
from .refiners.recursive_refinement_head import RecursiveRefinementHead
from .refiners.slot_trm_refiner import SlotTRMRefiner

for _model in (LLaDAForMaskedDiffusion, LLaDAMoEForMaskedDiffusion):
    BACKBONES[_model.config_class.model_type] = _model
for _model in (RecursiveRefinementHead, SlotTRMRefiner):
    REFINERS[_model.config_class.model_type] = _model

"""
The backbone families and refiners of the package. `save_pretrained` writes a file of this name that lists only what a
checkpoint holds, so that no other code travels with it.
"""

from transformers import PreTrainedModel

from .hub_model import BACKBONES, REFINERS
from .llada.modeling_llada import LLaDAForMaskedDiffusion
from .llada_moe.modeling_llada_moe import LLaDAMoEForMaskedDiffusion
from .refiners.recursive_refinement_head import RecursiveRefinementHead
from .refiners.slot_trm_refiner import SlotTRMRefiner
from .refiners.trm_refiner import TRMRefiner

for _model in (LLaDAForMaskedDiffusion, LLaDAMoEForMaskedDiffusion):
    BACKBONES[_model.config_class.model_type] = _model
for _model in (RecursiveRefinementHead, SlotTRMRefiner, TRMRefiner):
    REFINERS[_model.config_class.model_type] = _model


def register_held_refiners() -> dict[str, type[PreTrainedModel]]:
    """
    The refiners by `model_type`. In a checkpoint, this imports those it holds, when one is first needed: the file of
    your own refiner may import any other.
    """
    return REFINERS

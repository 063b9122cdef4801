"""The code beside a checkpoint's weights: what it needs, once, and no other."""

import ast
from pathlib import Path

import pytest
import torch
from latent_thinking_models import make_model

from llada_trm_hf import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
    RefinerCascadeConfig,
    SequenceTRM,
    SequenceTRMConfig,
    SlotTRMRefinerConfig,
    TRMRefinerConfig,
)
from llada_trm_hf.models.hub_model import BACKBONES, REFINERS
from llada_trm_hf.models.refiners.refiner_integration import build_refiner

HEAD = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=4, head_hidden_size=16)
SLOTS = SlotTRMRefinerConfig(hidden_size=32, chunk_size=4, num_hidden_layers=1, num_attention_heads=2)
LOOP = TRMRefinerConfig(hidden_size=32, chunk_size=4, recursion_size=16)
COMPRESSOR = DimensionCompressorConfig(hidden_size=8, compressed_size=4)
MOE = LLaDAMoEConfig(
    vocab_size=50,
    hidden_size=32,
    dense_intermediate_size=32,
    expert_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_experts=4,
    num_experts_per_tok=2,
    mask_token_id=49,
    pad_token_id=0,
    eos_token_id=1,
)


def hybrid(backbone, refiner, **fields):
    return LLaDATRMForMaskedDiffusion.from_backbone(backbone, refiner=refiner, **fields)


MODELS = {
    "llada": (lambda backbone: backbone, 10),
    "llada_moe": (lambda backbone: LLaDAMoEForMaskedDiffusion(MOE), 10),
    "head": (lambda backbone: build_refiner(HEAD), 5),
    "slots": (lambda backbone: build_refiner(SLOTS), 5),
    "trm": (lambda backbone: build_refiner(LOOP), 5),
    "cascade": (lambda backbone: build_refiner(RefinerCascadeConfig(refiner_configs=[HEAD, SLOTS])), 8),
    "hybrid": (lambda backbone: hybrid(backbone, HEAD), 20),
    "hybrid of a TRM refiner": (lambda backbone: hybrid(backbone, LOOP), 20),
    "hybrid of a cascade": (lambda backbone: hybrid(backbone, [HEAD, SLOTS], integration="cascade"), 21),
    "hybrid on experts": (lambda backbone: hybrid(LLaDAMoEForMaskedDiffusion(MOE), SLOTS), 20),
    "latent thinker": (lambda backbone: make_model(), 20),
    "compressor": (
        lambda backbone: DimensionCompressor(DimensionCompressorConfig(hidden_size=8, compressed_size=4)),
        4,
    ),
    "sequence TRM": (lambda backbone: SequenceTRM(SequenceTRMConfig(hidden_size=8, n_heads=2)), 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_carries_what_it_needs(name, make_backbone, tmp_path):
    make, most = MODELS[name]
    model = make(make_backbone())
    model.save_pretrained(tmp_path)
    files = {path.name: path.read_text() for path in tmp_path.rglob("*.py")}
    assert len(list(tmp_path.rglob("*.py"))) == len(files) == len(list(tmp_path.glob("*.py"))) <= most
    entries = {reference.split(".")[0] for reference in model.config.auto_map.values()}
    reached = set()
    while entries:
        module = entries.pop()
        reached.add(f"{module}.py")
        for node in ast.walk(ast.parse(files[f"{module}.py"])):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
                entries |= {node.module} - {name.removesuffix(".py") for name in reached}
    assert reached == set(files)

    # The classes of other families and refiners do not come along, nor what debugging and drawing need.
    types = {part.config.model_type for part in model.modules() if hasattr(part, "config")}
    code = "\n".join(files.values())
    for registry in (BACKBONES, REFINERS):
        for model_type, model_class in registry.items():
            if model_type not in types and not model_type.startswith("refiner_"):
                assert f"class {model_class.__name__}(" not in code, model_type
    assert not any("debug" in name or "finite" in name or "drawing" in name for name in files)
    if name.startswith("llada"):
        assert not any("refine" in name or "trm" in name for name in files)


def test_saving_over_another_hybrid_replaces_its_registry(make_backbone, tmp_path):
    torch.manual_seed(0)
    hybrid(make_backbone(), SLOTS).save_pretrained(tmp_path)
    hybrid(make_backbone(), HEAD).save_pretrained(tmp_path)
    registry = Path(tmp_path, "registered_models.py").read_text()
    assert "RecursiveRefinementHead" in registry and "SlotTRMRefiner" not in registry

"""Every model class of the package, held to what `common.py` and `common_generation.py` say of an ordinary model."""

import copy

import torch
from common import LENGTH, ROWS, WIDTH, ModelTesterMixin
from common_generation import GenerationTesterMixin, TokenModelMixin
from conftest import randomise
from latent_thinking_models import backbone_for, make_model, new_tokenizer
from sharded_training import new_moe
from tiny_training import TOKENIZER, new_backbone

import llada_trm_hf
from llada_trm_hf import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LLaDATRMForMaskedDiffusion,
    PreTrainedRefiner,
    RecursiveRefinementHeadConfig,
    SequenceTRM,
    SequenceTRMConfig,
    SlotTRMRefinerConfig,
    TRMRefinerConfig,
    thought_token_ids,
)

CHUNK = 4
HEAD = RecursiveRefinementHeadConfig(
    hidden_size=WIDTH, chunk_size=CHUNK, head_hidden_size=24, max_recursive_steps=3, convergence_threshold=0.02
)
SLOTS = SlotTRMRefinerConfig(hidden_size=WIDTH, chunk_size=CHUNK, max_recursive_steps=2, dropout=0.0)
LOOP = TRMRefinerConfig(
    hidden_size=WIDTH,
    chunk_size=CHUNK,
    recursion_size=16,
    num_attention_heads=2,
    max_recursive_steps=2,  # more steps of random weights are chaotic
)
TRM = SequenceTRMConfig(hidden_size=16, n_heads=2, n_latent_steps=2, n_supervision_steps=2, dropout=0.0)
NO_LAYERS = "has no stack of layers"


def random_states(width, seed):
    return torch.randn(ROWS, LENGTH, width, generator=torch.Generator().manual_seed(seed))


# --- Masked diffusion ---


class DiffusionTester(ModelTesterMixin):
    """Half of each row is masked."""

    def new_inputs(self, seed=0):
        tokens = torch.randint(10, 200, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
        tokens[0, 3:6] = tokens[1, 5:] = TOKENIZER.mask_token_id
        return {"input_ids": tokens}

    def training_inputs(self, seed=0):
        inputs = self.new_inputs(seed)
        answers = self.new_inputs(seed + 1)["input_ids"].clamp(max=199)
        return {**inputs, "labels": torch.where(inputs["input_ids"] == TOKENIZER.mask_token_id, answers, -100)}


class TestLLaDA(DiffusionTester, GenerationTesterMixin):
    def new_model(self):
        return new_backbone(initializer_range=0.3)


class TestLLaDAMoE(DiffusionTester, GenerationTesterMixin):
    def new_model(self):
        model = new_moe()
        randomise(model)
        return model


class TestLLaDAModel(DiffusionTester, TokenModelMixin):
    output = "last_hidden_state"

    def new_model(self):
        return new_backbone(initializer_range=0.3).model

    def training_inputs(self, seed=0):
        return self.new_inputs(seed)


class TestLLaDAMoEModel(TestLLaDAModel):
    def new_model(self):
        model = new_moe()
        randomise(model)
        return model.model


class HybridTester(DiffusionTester, GenerationTesterMixin):
    recursive = ("refiner",)
    fixed_arguments = {"max_steps": 2}
    refiners = [HEAD]
    integration = None

    def new_model(self):
        torch.manual_seed(0)
        model = LLaDATRMForMaskedDiffusion.from_backbone(
            new_backbone(initializer_range=0.3),
            copy.deepcopy(self.refiners),
            integration=self.integration,
            min_confidence=0.9,
            freeze_backbone=False,
        )
        randomise(model.refiner)
        return model


class TestHybrid(HybridTester):
    pass


class TestHybridWithSlots(HybridTester):
    refiners = [SLOTS]


class TestHybridWithTRM(HybridTester):
    refiners = [LOOP]


class TestHybridWithCascade(HybridTester):
    refiners, integration = [HEAD, SLOTS], "cascade"


class TestHybridWithMix(HybridTester):
    refiners, integration = [HEAD, SLOTS], "mix"


# --- Refiners ---


class RefinerTester(ModelTesterMixin):
    output = "hidden_states"
    fixed_arguments = {"max_steps": 2}
    refiners = [HEAD]
    integration = None
    exempt = {"test_hidden_states": NO_LAYERS, "test_attentions": NO_LAYERS}

    def new_model(self):
        return HybridTester.new_model(self).refiner

    def new_inputs(self, seed=0):
        return {"hidden_states": random_states(WIDTH, seed)}

    def loss(self, output, inputs):
        return output.hidden_states.square().mean() + output.confidence.square().mean()


class TestHead(RefinerTester):
    pass


class TestSlots(RefinerTester):
    refiners = [SLOTS]


class TestTRMRefiner(RefinerTester):
    refiners = [LOOP]


class TestCascade(RefinerTester):
    refiners, integration = [HEAD, SLOTS], "cascade"


class TestMix(RefinerTester):
    refiners, integration = [HEAD, SLOTS], "mix"


# --- Latent thinking ---


class TestCompressor(ModelTesterMixin):
    output = "compressed"
    exempt = {
        "test_hidden_states": NO_LAYERS,
        "test_attentions": NO_LAYERS,
        "test_limited_memory": "is one tensor, which is either here or there",
    }

    def new_model(self):
        torch.manual_seed(0)
        return DimensionCompressor(DimensionCompressorConfig(hidden_size=WIDTH, compressed_size=16))

    def new_inputs(self, seed=0):
        return {"hidden_states": random_states(WIDTH, seed)}


class TestSequenceTRM(ModelTesterMixin):
    output, mask = "prediction", "mask"
    exempt = {"test_hidden_states": NO_LAYERS, "test_attentions": NO_LAYERS}

    def new_model(self):
        torch.manual_seed(0)
        model = SequenceTRM(copy.deepcopy(TRM))
        torch.nn.init.normal_(model.halt_head.weight)
        return model

    def new_inputs(self, seed=0):
        return {"context": random_states(16, seed)}

    def training_inputs(self, seed=0):
        return {**self.new_inputs(seed), "target": random_states(16, seed + 1)[:, 0]}


class LatentThinkingTester(ModelTesterMixin):
    def new_whole_model(self):
        tokenizer = new_tokenizer()
        model = make_model(backbone=backbone_for(tokenizer), trm=copy.deepcopy(TRM), **thought_token_ids(tokenizer))
        return model.requires_grad_(True)


class TestThinker(LatentThinkingTester):
    untrained = ("halt_head",)
    output, mask = "latents", "mask"
    fixed_arguments, fixed_config = {"max_steps": 2}, {"halt_threshold": 1.0}
    exempt = {"test_hidden_states": NO_LAYERS, "test_attentions": NO_LAYERS}

    def new_model(self):
        return self.new_whole_model().thinker

    def new_inputs(self, seed=0):
        return {"hidden_states": random_states(WIDTH, seed)}


class TestLatentThinking(LatentThinkingTester, GenerationTesterMixin):
    recursive = ("thinker",)
    untrained = ("halt_head",)
    exempt = {
        "test_compiled": "where thoughts stand decides the passes; its backbone and its thinker compile",
        "test_exported": "where thoughts stand decides the passes; its backbone and its thinker are exported",
    }

    def new_model(self):
        return self.new_whole_model()

    def new_tokenizer(self):
        return new_tokenizer()

    def new_inputs(self, seed=0):
        tokens = torch.randint(10, 200, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
        thought = torch.tensor(self.new_whole_model().config.thought_token_ids)
        tokens[:, 4 : 4 + len(thought)] = thought
        return {"input_ids": tokens}

    def training_inputs(self, seed=0):
        inputs = self.new_inputs(seed)
        labels = inputs["input_ids"].clone()
        labels[:, :9] = -100
        return {**inputs, "labels": labels}


def test_every_class_is_here():
    """A new class joins."""
    public = {getattr(llada_trm_hf, name) for name in llada_trm_hf.__all__}
    classes = {cls for cls in public if isinstance(cls, type) and getattr(cls, "auto_classes", ())}
    testers = [cls for name, cls in globals().items() if name.startswith("Test")]
    missing = classes - {PreTrainedRefiner} - {type(tester().new_model()) for tester in testers}
    assert not missing, missing

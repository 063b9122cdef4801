"""What models return on request, with Llama and BERT as the truth for how it is asked for and what comes."""

import pytest
import torch
from conftest import MASK, PAD
from latent_thinking_models import THOUGHT, make_model
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from llada_trm_hf.models import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHead,
    RecursiveRefinementHeadConfig,
    RefinerCascade,
    RefinerCascadeConfig,
    SequenceTRM,
    SequenceTRMConfig,
    SlotTRMRefiner,
    SlotTRMRefinerConfig,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
REQUESTS = [False, True, 1, -1, [1], [0, -1], [-2], [7]]


def make_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64)).eval()


def make_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 16}
    special = {"mask_token_id": MASK, "pad_token_id": PAD, "eos_token_id": 1}
    return LLaDAMoEForMaskedDiffusion(LLaDAMoEConfig(**SIZES, **experts, **special, num_key_value_heads=4)).eval()


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, MASK, (2, 6), generator=generator)
    input_ids[:, 3] = MASK
    return input_ids


def shapes(outputs, name):
    """A shape for each layer, None for one left out; None without the field."""
    layers = outputs.get(name)
    return layers if layers is None else [None if layer is None else tuple(layer.shape) for layer in layers]


@pytest.fixture(params=["llada", "llada base", "llada_moe"])
def backbone(request, make_backbone):
    model = make_moe() if request.param == "llada_moe" else make_backbone()
    return model.model if request.param.endswith("base") else model


# --- Hidden states and attentions ---


@pytest.mark.parametrize("asked", REQUESTS, ids=str)
def test_hidden_states_by_number_as_of_llama(backbone, tokens, asked):
    llama = make_llama()
    expected = shapes(llama(tokens, output_hidden_states=asked), "hidden_states")
    assert shapes(backbone(tokens, output_hidden_states=asked), "hidden_states") == expected
    for model in (llama, backbone):
        model.config.output_hidden_states = True
    assert shapes(backbone(tokens), "hidden_states") == shapes(llama(tokens), "hidden_states") == [(2, 6, 32)] * 3
    assert backbone(tokens, output_hidden_states=False).get("hidden_states") is None


@pytest.mark.parametrize("asked", REQUESTS, ids=str)
@pytest.mark.parametrize("native", [True, False])
def test_hidden_states_of_a_hybrid(make_backbone, make_hybrid, bert, tokens, asked, native):
    """All of them, by plain indexing of the tuple: the backbone's three, and the refined ones."""
    model = make_hybrid(make_backbone() if native else bert, mask_token_id=MASK)
    everything = model(tokens, output_hidden_states=True).hidden_states
    assert len(everything) == 4 and not torch.equal(everything[-1], everything[-2])
    wanted = {everything[n].data_ptr() for n in ([asked] if isinstance(asked, int) else asked) if n in range(-4, 4)}
    found = model(tokens, output_hidden_states=asked).hidden_states
    if asked is False:
        assert found is None
    elif asked is True:
        torch.testing.assert_close(found, everything)
    else:
        expected = [states if states.data_ptr() in wanted else None for states in everything]
        assert [states is None for states in found] == [states is None for states in expected]
        torch.testing.assert_close([s for s in found if s is not None], [s for s in expected if s is not None])
    alone = model(tokens, output_hidden_states=[-1], enable_refinement=False).hidden_states
    torch.testing.assert_close(alone, (None, None, everything[-2]))
    model.config.output_hidden_states = True
    torch.testing.assert_close(model(tokens).hidden_states, everything)
    assert model(tokens, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attentions_as_of_llama(backbone, tokens, implementation):
    found = []
    for model in (make_llama(), backbone):
        model.set_attn_implementation(implementation)
        found.append([shapes(model(tokens, output_attentions=asked), "attentions") for asked in (True, False)])
        if implementation == "eager":
            model.config.output_attentions = True
            found[-1].append(shapes(model(tokens), "attentions"))
        else:
            with pytest.raises(ValueError, match="eager"):
                model.config.output_attentions = True
    assert found[0] == found[1]
    assert found[1][0] == ([(2, 4, 6, 6)] * 2 if implementation == "eager" else [])


@pytest.fixture
def bert():
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 64, "initializer_range": 0.3, "pad_token_id": PAD}
    return BertForMaskedLM(BertConfig(**sizes)).eval()


@pytest.mark.parametrize("family", ["llada", "llada_moe", "bert"])
@pytest.mark.parametrize("training", [False, True])
def test_attentions_of_a_hybrid_are_its_backbones(make_backbone, make_hybrid, bert, tokens, family, training):
    backbone = {"llada": make_backbone, "llada_moe": make_moe, "bert": lambda: bert}[family]()
    backbone.set_attn_implementation("eager")
    model = make_hybrid(backbone, mask_token_id=MASK)
    asked = {"output_attentions": True, "enable_refinement": None}
    labels = {"labels": tokens.masked_fill(tokens == MASK, 5)} if training else {}
    mask = (torch.arange(6) < torch.tensor([[6], [4]])).long()
    expected = backbone(tokens, attention_mask=mask, output_attentions=True).attentions
    assert len(expected) == 2
    torch.testing.assert_close(model(tokens, attention_mask=mask, **labels, **asked).attentions, expected)
    asked["enable_refinement"] = False
    torch.testing.assert_close(model(tokens, attention_mask=mask, **labels, **asked).attentions, expected)
    assert model(tokens, attention_mask=mask).attentions is None
    model.config.output_attentions = True
    torch.testing.assert_close(model(tokens, attention_mask=mask).attentions, expected)
    assert model(tokens, attention_mask=mask, output_attentions=False).attentions is None


def test_config_of_a_checkpoint_asks(make_hybrid, tokens, tmp_path):
    """Also where there are generation settings, which these fields are none of."""
    model = make_hybrid()
    model.generation_config.block_length = 4
    model.save_pretrained(tmp_path)
    asked = {"output_attentions": True, "output_hidden_states": True, "attn_implementation": "eager"}
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path, **asked)
    outputs = loaded(tokens)
    assert len(outputs.attentions) == 2 and len(outputs.hidden_states) == 4
    assert loaded.generation_config.block_length == 4


# --- Tuples ---


def new_refiner(model_class):
    head = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=4, head_hidden_size=16)
    slots = SlotTRMRefinerConfig(hidden_size=32, chunk_size=4, preset="tiny")
    configs = {RecursiveRefinementHead: head, SlotTRMRefiner: slots}
    return model_class(configs.get(model_class) or RefinerCascadeConfig(refiner_configs=[head, slots])).eval()


STATES = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
MODELS = {
    "moe": lambda: (make_moe(), None),
    "head": lambda: (new_refiner(RecursiveRefinementHead), STATES),
    "slots": lambda: (new_refiner(SlotTRMRefiner), STATES),
    "cascade": lambda: (new_refiner(RefinerCascade), STATES),
    "compressor": lambda: (DimensionCompressor(DimensionCompressorConfig(hidden_size=32, compressed_size=8)), STATES),
    "trm": lambda: (SequenceTRM(SequenceTRMConfig(hidden_size=32, n_heads=4)).eval(), STATES),
    "thinker": lambda: (make_model().thinker, STATES),
}


@pytest.mark.parametrize("kind", ["llada", "llada base", "hybrid", *MODELS])
def test_tuples(kind, make_backbone, make_hybrid, tokens):
    """The fields that are there, in their order, by argument and by config."""
    if kind in MODELS:
        model, inputs = MODELS[kind]()
    else:
        native = make_backbone()
        model, inputs = {"llada": native, "llada base": native.model, "hybrid": make_hybrid(native)}[kind], None
    inputs = tokens if inputs is None else inputs
    expected = model(inputs).to_tuple()
    assert len(expected) > 1 or kind.startswith(("llada", "moe"))
    torch.testing.assert_close(model(inputs, return_dict=False), expected)
    model.config.return_dict = False
    torch.testing.assert_close(model(inputs), expected)
    torch.testing.assert_close(model(inputs, return_dict=True).to_tuple(), expected)


def test_parts_that_give_tuples_by_themselves(make_backbone, make_hybrid, tokens):
    """Their configs say so; the model they are part of still reads their outputs by name."""
    model = make_hybrid()
    expected = model(tokens).logits
    generated = model.generate(tokens[:, :3], max_new_tokens=4)
    for config in (model.config.backbone_config, model.config.refiner_config):
        config.return_dict = False
    assert isinstance(model.refiner(STATES), tuple) and isinstance(model.backbone(tokens), tuple)
    assert torch.equal(model(tokens).logits, expected)
    model.config.return_dict = False
    assert torch.equal(model.generate(tokens[:, :3], max_new_tokens=4), generated)
    assert torch.equal(model.backbone.generate(tokens[:, :3], max_new_tokens=4)[:, :3], tokens[:, :3])
    thinking = make_model()
    prompt = torch.tensor([[8, 9, 10, *THOUGHT, 11]])
    logits = thinking(prompt).logits
    thinking.config.return_dict = False
    assert torch.equal(thinking(prompt)[0], logits)


def test_main_input_of_refiners():
    for model_class in (RecursiveRefinementHead, SlotTRMRefiner, RefinerCascade):
        assert new_refiner(model_class).main_input_name == "hidden_states"


# --- Vocabulary ---


@pytest.mark.parametrize("kind", ["llada", "llada base", "hybrid", "thinking"])
def test_tokens_that_have_to_stay(kind, make_backbone, make_hybrid, tokens):
    """The mask token (49) and those of a thought are refused by name, and nothing has changed then."""
    native = make_backbone()
    models = {"llada": native, "llada base": native.model, "hybrid": make_hybrid(native)}
    model = models[kind] if kind in models else make_model()
    name, needed = ("latent_token_id=6", 7) if kind == "thinking" else ("mask_token_id=49", 50)
    before, size = model(tokens)[0], model.config.get_text_config().vocab_size
    for asked in ({"new_num_tokens": needed - 1}, {"new_num_tokens": 3, "pad_to_multiple_of": 6}):
        with pytest.raises(ValueError, match=rf"{name}.*at least {needed}"):
            model.resize_token_embeddings(**asked)
        assert model.config.get_text_config().vocab_size == size == len(model.get_input_embeddings().weight)
        assert torch.equal(model(tokens)[0], before)
    model.resize_token_embeddings(needed)
    assert len(model.get_input_embeddings().weight) == needed == model.config.get_text_config().vocab_size
    model.resize_token_embeddings(needed - 1, pad_to_multiple_of=16)
    assert len(model.get_input_embeddings().weight) == -(-(needed - 1) // 16) * 16

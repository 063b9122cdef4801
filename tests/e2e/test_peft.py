"""PEFT on every class: task types, ways to save and load, generation, what cannot work."""

import pytest
import torch
from conftest import randomise
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_training import SIZES, TOKENIZER, new_backbone, new_hybrid
from transformers import AutoModel

from llada_trm_hf import (
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHead,
    RecursiveRefinementHeadConfig,
    SlotTRMRefiner,
    SlotTRMRefinerConfig,
)

MASK = TOKENIZER.mask_token_id


def new_moe():
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ids = {"vocab_size": 300, "mask_token_id": MASK, "pad_token_id": 0, "eos_token_id": 1}
    return LLaDAMoEForMaskedDiffusion(LLaDAMoEConfig(**SIZES | experts | ids))


MODELS = {"llada": new_backbone, "llada_moe": new_moe, "hybrid": new_hybrid}
REFINERS = {
    "head": lambda: RecursiveRefinementHead(RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=5)),
    "slot": lambda: SlotTRMRefiner(SlotTRMRefinerConfig(hidden_size=32, chunk_size=5, preset="tiny")),
}


@pytest.fixture
def tokens():
    return torch.randint(5, 200, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noisy(tokens):
    noisy = tokens.clone()
    noisy[:, 6:] = MASK
    return noisy


def lora(name, **changes):
    whole = ["refiner"] if name == "hybrid" else None
    return LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 2, "modules_to_save": whole, **changes})


def train_a_step(model, noisy, tokens):
    """Far enough that the adapters are seen."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # in the first, only one of LoRA's two factors has a gradient
        model.train()(input_ids=noisy, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model, noisy):
    return model.eval()(input_ids=noisy).logits


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_train_and_load_in_every_way(tmp_path, name, task_type, tokens, noisy):
    MODELS[name]().save_pretrained(tmp_path / "base")
    model_class = type(MODELS[name]())

    def load():
        return model_class.from_pretrained(tmp_path / "base")

    before = logits(load(), noisy)
    trained = train_a_step(get_peft_model(load(), lora(name, task_type=task_type)), noisy, tokens)
    expected = logits(trained, noisy)
    assert not torch.allclose(expected, before, atol=1e-3)
    trained.save_pretrained(tmp_path / "adapter")

    ways = {"peft": PeftModel.from_pretrained(load(), tmp_path / "adapter")}
    if task_type is not None:
        ways["auto_peft"] = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ways["class"] = model_class.from_pretrained(tmp_path / "adapter")
    ways["load_adapter"] = load()
    ways["load_adapter"].load_adapter(str(tmp_path / "adapter"))
    for way, loaded in ways.items():
        torch.testing.assert_close(logits(loaded, noisy), expected, msg=way)
    prompt = tokens[:, :6]
    for settings in ({}, {"kv_cache": "dual", "block_length": 4}):
        settings = {"max_new_tokens": 8, "num_diffusion_steps": 8, **settings}
        wanted = trained.get_base_model().generate(prompt, **settings)
        for way, loaded in {**ways, "trained": trained}.items():
            assert torch.equal(loaded.generate(input_ids=prompt, **settings), wanted), way

    merged = trained.merge_and_unload()
    assert type(merged) is model_class and not any("lora" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, noisy), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(model_class.from_pretrained(tmp_path / "merged"), noisy), logits(merged, noisy))


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_transformers_own_integration(tmp_path, name, tokens, noisy):
    MODELS[name]().save_pretrained(tmp_path / "base")
    model_class = type(MODELS[name]())
    model = model_class.from_pretrained(tmp_path / "base")
    model.add_adapter(lora(name))
    expected = logits(train_a_step(model, noisy, tokens), noisy)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.py")) and not (tmp_path / "adapter/config.json").exists()
    torch.testing.assert_close(logits(model_class.from_pretrained(tmp_path / "adapter"), noisy), expected)
    again = model_class.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(again, tmp_path / "adapter"), noisy), expected)


def test_adapters_on_a_checkpoint_without_backbone(tmp_path, tokens, noisy):
    new_backbone().save_pretrained(tmp_path / "backbone")
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(str(tmp_path / "backbone"), chunk_size=5)
    randomise(hybrid.refiner)
    hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    base = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "head")
    trained = train_a_step(get_peft_model(base, lora("hybrid", task_type="CAUSAL_LM")), noisy, tokens)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, noisy), logits(trained, noisy))
    assert loaded.active_adapters() == ["default"]


def test_adapters_that_name_no_base_model_say_so(tmp_path, tokens, noisy):
    """Those of a hybrid that was never saved."""
    get_peft_model(new_hybrid(), lora("hybrid")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no base model.*PeftModel.from_pretrained"):
        LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llada", "llada_moe"])
def test_base_models_give_features(tmp_path, name, noisy):
    MODELS[name]().model.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModel.from_pretrained(tmp_path / "base"),
        lora(name, task_type="FEATURE_EXTRACTION", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        states = [m.eval()(input_ids=noisy).last_hidden_state for m in (model, loaded, model.get_base_model())]
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=noisy).last_hidden_state, states[0], atol=1e-3)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", REFINERS)
def test_adapters_on_refiners(tmp_path, name):
    REFINERS[name]().save_pretrained(tmp_path / "base")
    refiner = AutoModel.from_pretrained(tmp_path / "base")
    linear = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    states = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    model = get_peft_model(refiner, linear).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    by_class = type(refiner).from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(states).hidden_states
        for other in (loaded, by_class, model.merge_and_unload()):
            torch.testing.assert_close(other(states).hidden_states, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(REFINERS[name]()(states).hidden_states, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["llada", "hybrid"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_prompt_learning_is_refused_before_it_trains_and_generates(kind, name, tokens, noisy):
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)
    model = get_peft_model(MODELS[name](), config)
    with pytest.raises(ValueError, match=r"[Pp]rompt (learning|tuning).* use LoRA"):
        model.train()(input_ids=noisy, labels=tokens)
    with pytest.raises(ValueError, match=r"[Pp]rompt (learning|tuning).* use LoRA"):
        model.eval().generate(input_ids=tokens, max_new_tokens=4)


def test_generation_goes_through_ia3_and_disabled_adapters(tokens, noisy):
    model = new_backbone()
    plain = model.generate(tokens, max_new_tokens=4)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    peft_model = get_peft_model(model, config)
    for n, p in peft_model.named_parameters():
        if "ia3_l" in n:
            p.data.fill_(3.0)
    with peft_model.disable_adapter():
        assert torch.equal(peft_model.generate(input_ids=tokens, max_new_tokens=4), plain)
    assert not torch.allclose(logits(peft_model, noisy), logits(new_backbone(), noisy), atol=1e-2)


def test_nothing_calls_the_preparation_for_a_next_token(tokens):
    model = new_backbone()
    assert type(model).can_generate()
    with pytest.raises(ValueError, match="call its own generate"):
        model.prepare_inputs_for_generation(tokens)

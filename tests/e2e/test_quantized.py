"""Quantised backbones: saved, checkpointed by the Trainer, loaded again as they were; the rest stays as it is."""

import json

import pytest
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from conftest import randomise
from latent_thinking_models import LATENT, THOUGHT, make_lm, make_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_training import SIZES, TOKENIZER, losses, new_backbone, trainer
from torch import nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from llada_trm_hf import (
    LatentThinkingForCausalLM,
    LLaDAForMaskedDiffusion,
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
)

WIDTH = 64  # bitsandbytes quantises 64 values together
QUANTIZATIONS = {
    "int8": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), Int8Tensor),
    "nf4": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), Params4bit),
    "bnb_int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), Int8Params),
}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(autouse=True)
def portable_kernels(monkeypatch):
    """On some CPUs bitsandbytes repacks 4-bit weights when it first evaluates, and rounds their scales to bfloat16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def noisy():
    ids = torch.randint(5, 200, (2, 13), generator=torch.Generator().manual_seed(0))
    ids[:, 6:] = TOKENIZER.mask_token_id
    return ids


@pytest.fixture
def backbone_folder(tmp_path):
    new_backbone(hidden_size=WIDTH).save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


def new_hybrid(folder, kind="int8", refiner_seed=1, **arguments):
    head = RecursiveRefinementHeadConfig(hidden_size=WIDTH, chunk_size=5, head_hidden_size=24)
    quantization = {} if kind is None else {"quantization_config": QUANTIZATIONS[kind][0]()}
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(folder, head, min_confidence=1.0, **quantization, **arguments)
    randomise(hybrid.refiner, refiner_seed)
    return hybrid


@torch.no_grad()
def logits(model, noisy):
    return model.eval()(noisy.to(model.device)).logits.float().cpu()


def quantized_linears(model, kind):
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {name for name, weight in weights.items() if isinstance(weight, QUANTIZATIONS[kind][1])}
    return found, weights.keys() - found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_backbones(tmp_path, backbone_folder, noisy, kind, device):
    plain = LLaDAForMaskedDiffusion.from_pretrained(backbone_folder)
    quantized = LLaDAForMaskedDiffusion.from_pretrained(
        backbone_folder, quantization_config=QUANTIZATIONS[kind][0](), device_map={"": device}
    )
    assert quantized_linears(quantized, kind)[1] == {"lm_head"}
    expected = logits(quantized, noisy)
    assert 1e-4 < (expected - logits(plain, noisy)).abs().max() < 2
    if kind == "int8":  # half a step of each row's 255, plus rounding of the scale
        for name in quantized_linears(quantized, kind)[0]:
            weight, exact = quantized.get_submodule(name).weight.dequantize().cpu(), plain.get_submodule(name).weight
            assert ((weight - exact).abs() <= exact.abs().amax(1, keepdim=True) / 250).all()
    quantized.save_pretrained(tmp_path / "saved")
    assert "quantization_config" in json.loads((tmp_path / "saved/config.json").read_text())
    for loader in (LLaDAForMaskedDiffusion, AutoModelForMaskedLM):
        loaded = loader.from_pretrained(tmp_path / "saved", device_map={"": device})
        assert quantized_linears(loaded, kind) == quantized_linears(quantized, kind)
        torch.testing.assert_close(logits(loaded, noisy), expected, atol=1e-4, rtol=1e-4)


def test_of_a_mixture_of_experts_the_linear_layers_are_quantised(tmp_path, noisy):
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = LLaDAMoEConfig(**SIZES | experts, vocab_size=300, mask_token_id=TOKENIZER.mask_token_id, pad_token_id=0)
    LLaDAMoEForMaskedDiffusion(config).save_pretrained(tmp_path / "moe")
    quantization = QUANTIZATIONS["int8"][0]()
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(
        str(tmp_path / "moe"), chunk_size=5, quantization_config=quantization
    )
    found, _ = quantized_linears(hybrid, "int8")
    assert {name.split(".")[4] for name in found} == {"self_attn"} and len(found) == 8
    hybrid.save_pretrained(tmp_path / "saved")
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "saved")
    for name, weight in hybrid.state_dict().items():
        if "experts" in name:
            assert torch.equal(loaded.state_dict()[name], weight)
    torch.testing.assert_close(logits(loaded, noisy), logits(hybrid, noisy), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("save_backbone", [True, False])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_hybrids(tmp_path, backbone_folder, noisy, kind, save_backbone, device):
    hybrid = new_hybrid(backbone_folder, kind, device_map={"": device})
    expected = logits(hybrid, noisy)
    assert (expected - logits(new_hybrid(backbone_folder, None), noisy)).abs().max() > 1e-4
    for folder in (tmp_path / "saved", tmp_path / "again"):
        hybrid.save_pretrained(folder, save_backbone=save_backbone)
        config = json.loads((folder / "config.json").read_text())
        assert "quantization_config" in config["backbone_config"] and "quantization_config" not in config
        for loader in (LLaDATRMForMaskedDiffusion, AutoModelForMaskedLM, AutoModelForCausalLM):
            loaded = loader.from_pretrained(folder, device_map={"": device})
            found, others = quantized_linears(loaded, kind)
            assert (found, others) == quantized_linears(hybrid, kind)
            assert found and all(name.startswith("backbone.model.") for name in found)
            for name, parameter in loaded.refiner.named_parameters():
                assert torch.equal(parameter, hybrid.refiner.get_parameter(name)) and parameter.is_floating_point()
            torch.testing.assert_close(logits(loaded, noisy), expected, atol=1e-4, rtol=1e-4)
        hybrid = loaded  # what was loaded is saved like what was built
    whole = sum(p.numel() * 4 for p in new_hybrid(backbone_folder, None).parameters())
    assert (tmp_path / "saved/model.safetensors").stat().st_size < 0.9 * whole


def test_modules_left_out_stay_so_in_a_hybrid(tmp_path, backbone_folder, noisy):
    """Their names are the backbone's own."""
    skipped = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["model.layers.0"]
    )
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(backbone_folder, chunk_size=5, quantization_config=skipped)
    hybrid.save_pretrained(tmp_path / "saved")
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "saved")
    found, _ = quantized_linears(loaded, "nf4")
    assert found == quantized_linears(hybrid, "nf4")[0]
    assert {name.split(".")[3] for name in found if "layers" in name} == {"1"}
    torch.testing.assert_close(logits(loaded, noisy), logits(hybrid, noisy), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "head, backbone", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_each_part_keeps_its_dtype(tmp_path, backbone_folder, noisy, head, backbone):
    hybrid = new_hybrid(backbone_folder, dtype=backbone)
    hybrid.refiner.to(getattr(torch, head))
    hybrid.save_pretrained(tmp_path / "saved")
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "saved")
    assert loaded.refiner.dtype == getattr(torch, head)
    assert loaded.backbone.model.norm.weight.dtype == getattr(torch, backbone)
    for name, parameter in hybrid.state_dict().items():
        if not isinstance(parameter, Int8Tensor):
            assert torch.equal(loaded.state_dict()[name], parameter), name


def test_quantising_a_hybrid_while_it_is_loaded(tmp_path, backbone_folder, noisy):
    new_hybrid(backbone_folder, None).save_pretrained(tmp_path / "whole")
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(
        tmp_path / "whole", quantization_config=QUANTIZATIONS["int8"][0]()
    )
    expected = new_hybrid(backbone_folder)
    assert quantized_linears(loaded, "int8") == quantized_linears(expected, "int8")
    torch.testing.assert_close(logits(loaded, noisy), logits(expected, noisy), atol=1e-4, rtol=1e-4)
    expected.save_pretrained(tmp_path / "head", save_backbone=False)
    plain = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "head", quantization_config=None)
    assert not quantized_linears(plain, "int8")[0]
    whole = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(plain, noisy), logits(whole, noisy), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kind, save_backbone", [("int8", True), ("int8", False), ("nf4", True), ("bnb_int8", True), ("bnb_int8", False)]
)
def test_checkpoints_resume_exactly(tmp_path, backbone_folder, samples, kind, save_backbone):
    def start(folder):
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        steps |= {"load_best_model_at_end": True, "use_ema": kind == "int8", "save_backbone": save_backbone}
        return trainer(new_hybrid(backbone_folder, kind), tmp_path / folder, samples, **steps)

    whole = start("whole")
    whole.train()
    resumed = start("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    for name, parameter in whole.model.refiner.named_parameters():
        torch.testing.assert_close(resumed.model.refiner.get_parameter(name), parameter)
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(whole.state.best_model_checkpoint)
    batch = torch.tensor([samples[0]["input_ids"]])
    torch.testing.assert_close(logits(loaded, batch), logits(whole.model, batch), atol=1e-4, rtol=1e-4)


def test_resuming_on_another_backbone_is_refused(tmp_path, backbone_folder, samples):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer(new_hybrid(backbone_folder), tmp_path / "run", samples, **settings).train()
    torch.manual_seed(7)
    other = new_backbone(hidden_size=WIDTH)
    nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    changed = {"max_steps": 2, "resume_with_changes": True}
    resumed = trainer(new_hybrid(str(tmp_path / "other")), tmp_path / "again", samples, **changed)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.* is not as in the checkpoint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))


@pytest.mark.parametrize("save_backbone", [True, False])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_latent_thinkers(tmp_path, kind, save_backbone):
    make_lm().save_pretrained(tmp_path / "lm")
    quantization = QUANTIZATIONS[kind][0]()
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", quantization_config=quantization)
    model = make_model(backbone=lm)
    model.config.backbone_name_or_path = str(tmp_path / "lm")
    row = torch.tensor([tokens(9, seed=0) + THOUGHT + tokens(3, seed=1)])
    expected = logits(model, row)
    model.save_pretrained(tmp_path / "saved", save_backbone=save_backbone)
    for loader in (LatentThinkingForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path / "saved")
        found, others = quantized_linears(loaded, kind)
        assert found and all(name.startswith("backbone.model.") for name in found)
        assert any(name.startswith("thinker.") for name in others)
        torch.testing.assert_close(logits(loaded, row), expected, atol=1e-4, rtol=1e-4)
        written = loaded.generate(row[:, :-3], max_new_tokens=4, do_sample=False)
        assert LATENT not in written[0, -4:]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_adapters_and_refiner_on_a_quantised_backbone(tmp_path, backbone_folder, noisy, kind):
    def adapted():
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["refiner"], task_type="CAUSAL_LM")
        return get_peft_model(new_hybrid(backbone_folder, kind), lora)

    trained = adapted()
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    frozen = {name: p.detach().clone() for name, p in trained.named_parameters() if not p.requires_grad}
    clean = noisy.clamp(max=199)
    for _ in range(2):
        trained.train()(input_ids=noisy, labels=clean).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in frozen.items():
        current = trained.get_parameter(name)
        if kind == "int8" and isinstance(current, Int8Tensor):
            current, parameter = current.dequantize(), parameter.dequantize()
        assert torch.equal(current, parameter), name
    assert any(p.abs().sum() > 0 for n, p in trained.named_parameters() if "lora_B" in n)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(new_hybrid(backbone_folder, kind, refiner_seed=9), tmp_path / "adapter")
    expected = logits(trained, noisy)
    torch.testing.assert_close(logits(loaded, noisy), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(new_hybrid(backbone_folder, kind), noisy)).abs().max() > 1e-3
    # Merged, the weights are quantised again: as close as a quantised weight is to the exact one.
    merged = loaded.merge_and_unload()
    assert quantized_linears(merged, kind) == quantized_linears(new_hybrid(backbone_folder, kind), kind)
    assert (logits(merged, noisy) - expected).abs().max() < 2


def test_weights_that_cannot_be_saved_leave_nothing_behind(tmp_path, backbone_folder, monkeypatch):
    by_hand = new_hybrid(backbone_folder, None)
    quantize_(by_hand.backbone.model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"is a Int8Tensor, quantised after loading.*quantization_config"):
        by_hand.save_pretrained(tmp_path / "saved")
    quantized = new_hybrid(backbone_folder)
    with pytest.raises(ValueError, match="leave out save_original_format"):
        quantized.save_pretrained(tmp_path / "saved", save_original_format=True)
    monkeypatch.setattr(TorchAoHfQuantizer, "is_serializable", lambda self: False)
    for model in (quantized, quantized.backbone):
        with pytest.raises(ValueError, match="quantised by torchao cannot be saved"):
            model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    quantized.save_pretrained(tmp_path / "head", save_backbone=False)
    assert (tmp_path / "head/model.safetensors").exists()

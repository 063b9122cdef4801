"""What larger models need: adapters, quantised backbones, weights on several devices, launcher configs."""

import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from conftest import ROOT
from peft import PeftModel
from sharded_training import launch_settings
from tiny_training import SIZES, TOKENIZER, new_backbone, new_hybrid, trainer
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from llada_trm_hf import LLaDAMoEConfig, LLaDAMoEForMaskedDiffusion, LLaDATRMForMaskedDiffusion

EXAMPLES = ROOT / "examples"


@pytest.fixture
def tokens():
    ids = torch.randint(5, 200, (2, 13), generator=torch.Generator().manual_seed(0))
    ids[:, 6:] = TOKENIZER.mask_token_id
    return ids


@pytest.fixture
def backbone_folder(tmp_path):
    new_backbone().save_pretrained(tmp_path / "backbone")
    TOKENIZER.save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    return model.eval()(tokens).logits


# --- LoRA ---


def test_lora_example_trains_and_reloads(tmp_path, backbone_folder, tokens, monkeypatch, capsys):
    folder = str(tmp_path / "adapter")
    flags = f"{backbone_folder} {folder} --dataset arithmetic --max_steps 3 --chunk_size 5 --rank 2"
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *flags.split()])
    trained = runpy.run_path(str(EXAMPLES / "train_lora.py"))["model"]
    assert "trainable params" in capsys.readouterr().out
    untrained = LLaDATRMForMaskedDiffusion.from_backbone(backbone_folder, chunk_size=5)
    for name, parameter in trained.get_base_model().named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
    assert any(p.abs().sum() > 0 for n, p in trained.named_parameters() if "lora_B" in n)
    before = logits(untrained, tokens)
    loaded = PeftModel.from_pretrained(untrained, folder)
    assert torch.equal(logits(loaded, tokens), logits(trained, tokens))
    assert not torch.equal(logits(loaded, tokens), before)
    head = sum(p.numel() for p in loaded.get_base_model().refiner.modules_to_save["default"].parameters())
    written = os.path.getsize(os.path.join(folder, "adapter_model.safetensors"))
    usual = tmp_path / "usual"
    usual.touch()
    modes = {path.stat().st_mode for path in Path(folder).glob("*.*")}
    assert modes == {usual.stat().st_mode}  # others may read what they may read elsewhere
    assert written < 4 * (head + 2 * 2 * 32 * 4 * 2) + 20_000  # rank 2, two factors, width 32, four maps, two layers
    prompt = TOKENIZER("3942=", return_tensors="pt")["input_ids"]
    assert torch.equal(
        loaded.generate(input_ids=prompt, max_new_tokens=5), trained.generate(input_ids=prompt, max_new_tokens=5)
    )


@pytest.mark.parametrize("quantize", ["int8", "4bit"])
def test_qlora_example_trains_and_reloads(tmp_path, tokens, monkeypatch, quantize):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    new_backbone(hidden_size=64).save_pretrained(tmp_path / "backbone")
    TOKENIZER.save_pretrained(tmp_path / "backbone")
    folder = str(tmp_path / "adapter")
    flags = f"{tmp_path}/backbone {folder} --dataset arithmetic --max_steps 2 --chunk_size 5 --rank 2"
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *flags.split(), "--quantize", quantize])
    script = runpy.run_path(str(EXAMPLES / "train_lora.py"))
    trained = script["model"]
    kinds = {type(m.weight).__name__ for n, m in trained.named_modules() if n.endswith("q_proj.base_layer")}
    assert kinds == {{"int8": "Int8Tensor", "4bit": "Params4bit"}[quantize]}
    again = LLaDATRMForMaskedDiffusion.from_backbone(
        str(tmp_path / "backbone"), chunk_size=5, quantization_config=script["quantization"]
    )
    before = logits(again, tokens)
    loaded = logits(PeftModel.from_pretrained(again, folder), tokens)
    torch.testing.assert_close(loaded, logits(trained, tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loaded, before, atol=1e-3)


# --- Quantised backbones ---


class HalfStepsConfig(QuantizationConfigMixin):
    def __init__(self, steps: int = 8, **kwargs):
        self.quant_method, self.steps = "half_steps", steps


class CoarseLinear(nn.Linear):
    """Rounds its weight to a few steps in every forward."""

    steps = 8

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scale = self.weight.abs().amax() / self.steps
        return nn.functional.linear(states, (self.weight / scale).round() * scale, self.bias)


class HalfStepsQuantizer(HfQuantizer):
    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if type(module) is nn.Linear and module is not model.get_output_embeddings():
                module.__class__ = CoarseLinear
                module.steps = self.quantization_config.steps

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


@pytest.fixture
def coarse():
    """A quantisation known to transformers as any other is."""
    register_quantization_config("half_steps")(HalfStepsConfig)
    register_quantizer("half_steps")(HalfStepsQuantizer)
    yield HalfStepsConfig(steps=3)
    del AUTO_QUANTIZATION_CONFIG_MAPPING["half_steps"], AUTO_QUANTIZER_MAPPING["half_steps"]


def test_a_quantised_backbone_is_passed_through(tmp_path, backbone_folder, tokens, samples, coarse):
    def check(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                coarse = isinstance(module, CoarseLinear)
                assert coarse == (name.startswith("backbone.") and "lm_head" not in name), name
                assert not coarse or module.steps == 3
        return logits(model, tokens)

    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(backbone_folder, quantization_config=coarse, chunk_size=5)
    trainer(hybrid, tmp_path / "run", samples, max_steps=2).train()
    expected = check(hybrid)
    assert not torch.allclose(expected, logits(new_hybrid(), tokens), atol=1e-2)
    hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "head", quantization_config=coarse)
    torch.testing.assert_close(check(loaded), expected)


# --- Several devices ---


@pytest.mark.parametrize("save_backbone", [True, False])
@pytest.mark.parametrize("memory", [None, "60KB", "110KB"])
def test_device_map_auto(tmp_path, backbone_folder, tokens, save_backbone, memory):
    hybrid = new_hybrid()
    hybrid.config.backbone_name_or_path = backbone_folder
    hybrid.save_pretrained(tmp_path / "hybrid", save_backbone=save_backbone)
    limits = {} if memory is None else {"max_memory": {"cpu": memory}, "offload_folder": str(tmp_path / "offloaded")}
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "hybrid", device_map="auto", **limits)
    on_disk = [name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"]
    assert bool(on_disk) == (memory is not None)
    if not save_backbone:
        assert not any(name.startswith("refiner.") for name in on_disk)
    assert torch.equal(logits(loaded, tokens), logits(hybrid, tokens))
    arguments = {"max_new_tokens": 5, "num_diffusion_steps": 3, "block_length": 5}
    assert torch.equal(loaded.generate(tokens, **arguments), hybrid.generate(tokens, **arguments))


def test_from_backbone_on_disk_with_device_map(tmp_path, backbone_folder, tokens):
    limits = {"max_memory": {"cpu": "60KB"}, "offload_folder": str(tmp_path / "offloaded")}
    loaded = LLaDATRMForMaskedDiffusion.from_backbone(backbone_folder, device_map="auto", chunk_size=5, **limits)
    assert loaded.refiner.device.type == "cpu" and loaded.backbone.device.type == "meta"
    assert logits(loaded, tokens).isfinite().all()


# --- Launcher configs ---


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_reads_the_configs(name):
    file = str(EXAMPLES / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(file)
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    known = {option.dest for option in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= known
    assert set(config.deepspeed_config) <= known | {"gradient_accumulation_steps", "gradient_clipping"}
    assert config.deepspeed_config.get("zero_stage") == {"deepspeed_zero2": 2, "deepspeed_zero3": 3}.get(name)
    assert config.num_processes > 1 and config.mixed_precision == "bf16"


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_layers_and_refiner_are_sharded_one_by_one(family):
    """The policy of fsdp2.yaml finds real layers, whatever the backbone."""
    hybrid = new_hybrid()
    if family == "llada_moe":
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        config = LLaDAMoEConfig(**SIZES | sizes, vocab_size=300, mask_token_id=299, pad_token_id=0, eos_token_id=1)
        hybrid = LLaDATRMForMaskedDiffusion.from_backbone(LLaDAMoEForMaskedDiffusion(config), chunk_size=4)
    with patch.dict(os.environ, launch_settings("fsdp2")):
        plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(hybrid)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, hybrid)
    sharded = [name for name, module in hybrid.named_modules() if policy(module)]
    assert sharded == ["backbone.model.layers.0", "backbone.model.layers.1", "refiner"]

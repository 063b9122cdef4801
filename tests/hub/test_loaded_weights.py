"""A head meets its own backbone, rounded, trained further or another; weights stored as whole numbers."""

import json
import shutil
import warnings

import pytest
import torch
from conftest import MASK
from latent_thinking_models import make_model
from safetensors.torch import load_file, save_file

from llada_trm_hf import LatentThinkingForCausalLM, LLaDAForMaskedDiffusion, LLaDATRMForMaskedDiffusion
from llada_trm_hf.hub.loaded_weights import backbone_fingerprint

IDS = torch.tensor([[5, 6, MASK, 7, MASK]])


@pytest.fixture
def head(make_hybrid, tmp_path):
    """A folder with a head alone, and its backbone in a folder beside."""
    hybrid = make_hybrid()
    hybrid.backbone.save_pretrained(tmp_path / "backbone")
    hybrid.config.backbone_name_or_path = str(tmp_path / "backbone")
    hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    return tmp_path / "head"


def load(head, backbone):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LLaDATRMForMaskedDiffusion.from_pretrained(head, backbone_name_or_path=str(backbone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_backbone_in_another_dtype(head, tmp_path, dtype):
    LLaDAForMaskedDiffusion.from_pretrained(tmp_path / "backbone", dtype=dtype).save_pretrained(tmp_path / "rounded")
    load(head, tmp_path / "rounded")


def test_other_weights_of_the_same_size(head, make_backbone, tmp_path):
    make_backbone(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"head was trained on another backbone than .*other"):
        load(head, tmp_path / "other")
    # As older checkpoints are, without a fingerprint: any of its size is taken.
    config = json.loads((head / "config.json").read_text())
    del config["backbone_fingerprint"]
    (head / "config.json").write_text(json.dumps(config))
    load(head, tmp_path / "other")


def test_weights_that_were_trained_further(head, tmp_path):
    backbone = LLaDAForMaskedDiffusion.from_pretrained(tmp_path / "backbone").train()
    optimizer = torch.optim.AdamW(backbone.parameters(), 1e-2)
    for _ in range(3):
        backbone(IDS, labels=torch.full_like(IDS, 9)).loss.backward()
        optimizer.step()
    backbone.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserWarning, match=r"weights of .*trained are not those that .*head was trained on"):
        load(head, tmp_path / "trained")


def test_an_adapter_merged_into_two_of_seven_matrices(head, tmp_path):
    backbone = LLaDAForMaskedDiffusion.from_pretrained(tmp_path / "backbone")
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in backbone.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight):
                update = torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
                weight += 0.05 * weight.norm() / update.norm() * update
    backbone.save_pretrained(tmp_path / "merged")
    with pytest.raises(UserWarning, match="adapter merged"):
        load(head, tmp_path / "merged")


def test_what_cannot_be_told_is_not_compared(tiny_backbone):
    weights = tiny_backbone.state_dict(prefix="backbone.")
    assert len(backbone_fingerprint(weights)) == 16
    name = "backbone.model.layers.0.self_attn.q_proj.weight"
    assert backbone_fingerprint({**weights, name: weights[name].to("meta")}) is None
    assert backbone_fingerprint({**weights, name: weights[name].char()}) is None  # quantised
    assert backbone_fingerprint({**weights, name.replace(".weight", ".base_layer.weight"): weights[name]}) is None
    assert backbone_fingerprint({"refiner.weight": weights[name]}) is None


def test_a_whole_checkpoint_has_none(make_hybrid, head, tmp_path):
    hybrid = load(head, tmp_path / "backbone")
    hybrid.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole/config.json").read_text()).get("backbone_fingerprint") is None


def test_a_thinker_knows_its_backbone(tmp_path):
    model = make_model()
    model.backbone.save_pretrained(tmp_path / "lm")
    model.config.backbone_name_or_path = str(tmp_path / "lm")
    model.save_pretrained(tmp_path / "thinker", save_backbone=False)
    LatentThinkingForCausalLM.from_pretrained(tmp_path / "thinker")
    torch.manual_seed(9)
    type(model.backbone)(model.backbone.config).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="another backbone"):
        LatentThinkingForCausalLM.from_pretrained(tmp_path / "thinker")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_weights_stored_as_whole_numbers(tiny_backbone, tmp_path, dtype):
    tiny_backbone.save_pretrained(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    weights = load_file(tmp_path / "good/model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(dtype)
    save_file(weights, tmp_path / "bad/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight as .*, which no weight can be"):
        LLaDAForMaskedDiffusion.from_pretrained(tmp_path / "bad")
    tiny_backbone.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    LLaDAForMaskedDiffusion.from_pretrained(tmp_path / "shards")

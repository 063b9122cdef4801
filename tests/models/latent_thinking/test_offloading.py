"""Latent thinkers whose weights lie on disk or in main memory until they are needed: bit for bit the plain model."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from latent_thinking_models import THOUGHT, make_lm, make_model, pad_rows, tokens
from transformers import AutoModelForCausalLM

from llada_trm_hf import LatentThinkingForCausalLM

ROWS = [tokens(9, 1) + THOUGHT, tokens(4, 2) + THOUGHT + tokens(3, 3)]
MAPS = {
    "the thinker": {"backbone": "cpu", "thinker": "disk"},
    "its parts": {
        "backbone": "cpu",
        "thinker.compressor": "disk",
        "thinker.trm": "disk",
        "thinker.norm": "cpu",
        "thinker.projector": "cpu",
    },
    "nearly everything": {
        "backbone.model.embed_tokens": "cpu",
        "backbone.model.rotary_emb": "cpu",
        "backbone.model.layers": "disk",
        "backbone.model.norm": "disk",
        "backbone.lm_head": "disk",
        "thinker": "disk",
    },
}


def size_of(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.fixture(scope="module")
def model():
    return make_model(backbone=make_lm(tie_word_embeddings=False))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def assert_same(offloaded, model):
    assert any(parameter.is_meta for parameter in offloaded.thinker.parameters())
    input_ids, mask = pad_rows(ROWS)
    found, expected = (each(input_ids, attention_mask=mask) for each in (offloaded, model))
    # Weights from the disk may be unaligned: on some CPUs other kernels round differently.
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.reasoning_steps, expected.reasoning_steps)
    prompts, mask = pad_rows([ROWS[0], ROWS[1][: -len(tokens(3, 3))]])
    found, expected = (each.generate(prompts, attention_mask=mask, max_new_tokens=3) for each in (offloaded, model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, LatentThinkingForCausalLM])
@pytest.mark.parametrize("on_disk", MAPS)
def test_device_map(model, saved, tmp_path, auto_class, on_disk):
    offloaded = auto_class.from_pretrained(saved, device_map=MAPS[on_disk], offload_folder=tmp_path)
    assert_same(offloaded, model)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_max_memory(model, saved, tmp_path, share):
    limit = {"cpu": int(share * size_of(model))}
    offloaded = AutoModelForCausalLM.from_pretrained(
        saved, device_map="auto", max_memory=limit, offload_folder=tmp_path
    )
    assert_same(offloaded, model)


@pytest.mark.parametrize("at_once", [None, ["LatentThinker"]])
def test_dispatched_and_offloaded_by_accelerate(model, tmp_path, at_once):
    """Layer by layer, or the thinker's weights all at once."""
    placed = dispatch_model(
        copy.deepcopy(model),
        MAPS["the thinker"],
        main_device="cpu",
        offload_dir=tmp_path / "dispatched",
        preload_module_classes=at_once,
    )
    assert_same(placed, model)
    assert_same(cpu_offload(copy.deepcopy(model), "cpu", preload_module_classes=at_once), model)
    folder = tmp_path / "offloaded"
    assert_same(disk_offload(copy.deepcopy(model), folder, "cpu", preload_module_classes=at_once), model)


def test_parts_by_themselves(model, tmp_path):
    """Their methods, which no hook wraps, like their `forward`; twice, since the weights go away again."""
    compressor, trm, states = model.thinker.compressor, model.thinker.trm, torch.randn(2, 5, 32)
    context = compressor.compress(states)
    far_compressor = cpu_offload(copy.deepcopy(compressor), "cpu")
    far_trm = disk_offload(copy.deepcopy(trm), tmp_path, "cpu")
    for _ in range(2):
        assert torch.equal(far_compressor.compress(states), context)
        assert torch.equal(far_compressor.decompress(context), compressor.decompress(context))
        assert torch.equal(far_compressor(states).loss, compressor(states).loss)
        assert torch.equal(far_trm.reason(context).prediction, trm.reason(context).prediction)
        assert torch.equal(far_trm(context).prediction, trm(context).prediction)
        assert far_compressor.weight.is_meta and far_trm.reasoning_token.is_meta
    with pytest.raises(ValueError, match="is offloaded: fit the compressor on a device"):
        far_compressor.fit_pca([states])

"""PEFT adapters on latent thinkers: trained, saved, and loaded by whoever loads a model."""

import copy
import os
import sys

import pytest
import torch
from latent_thinking_models import THOUGHT, make_lm, make_model, pad_rows, tokens
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from run_programs import run_program
from transformers import AutoModelForCausalLM

from llada_trm_hf import LatentThinkingForCausalLM

ROWS = [tokens(9, 1) + THOUGHT + tokens(3, 4), tokens(4, 2) + THOUGHT + tokens(3, 3)]
# On the backbone, with the thinker trained as a whole beside it, and on the thinker.
TARGETS = {
    "backbone": {"target_modules": ["q_proj", "v_proj"]},
    "whole thinker": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["thinker"]},
    "thinker": {"target_modules": ["in_proj", "gate_up_proj", "projector"]},
}
CLASSES = [LatentThinkingForCausalLM, AutoModelForCausalLM, AutoPeftModelForCausalLM]
# Merged weights round differently, and a thought must not end a step earlier for that.
SETTINGS = {"max_reasoning_steps": 2, "use_cache": False}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    make_lm().save_pretrained(folder / "backbone")
    model = make_model(backbone=str(folder / "backbone"), halt_threshold=1.0)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "thinker", save_backbone=False)
    return folder


@pytest.fixture(params=["whole", "thinker"])
def saved(request, checkpoints):
    return checkpoints / request.param


def adapter_config(target):
    return LoraConfig(task_type="CAUSAL_LM", r=4, **TARGETS[target])


def train_a_step(model):
    """Large enough to matter; LoRA starts at no change, so two."""
    input_ids, mask = pad_rows(ROWS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model.train()(input_ids=input_ids, attention_mask=mask, labels=input_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model):
    input_ids, mask = pad_rows(ROWS)
    return model.eval().double()(input_ids=input_ids, attention_mask=mask, **SETTINGS).logits


def assert_same(found, expected):
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_trained_saved_and_loaded(saved, tmp_path, target):
    base = LatentThinkingForCausalLM.from_pretrained(saved)
    plain = logits(copy.deepcopy(base))
    model = train_a_step(get_peft_model(base, adapter_config(target)))
    model.save_pretrained(tmp_path)
    assert not any(path.suffix == ".py" for path in tmp_path.iterdir())
    # The merged one is made before the other is turned to float64, in which it would be merged.
    merged = copy.deepcopy(model).double().merge_and_unload()
    expected = logits(model)
    assert (expected - plain).abs().max() > 1e-2
    for auto_class in CLASSES:
        loaded = auto_class.from_pretrained(tmp_path)
        assert isinstance(loaded, PeftModel) == (auto_class is AutoPeftModelForCausalLM)
        assert_same(loaded, expected)
    assert_same(PeftModel.from_pretrained(LatentThinkingForCausalLM.from_pretrained(saved), tmp_path), expected)

    assert isinstance(merged, LatentThinkingForCausalLM)
    assert not any("lora" in name for name in merged.state_dict())
    assert_same(merged, expected)
    merged.save_pretrained(tmp_path / "merged")
    assert_same(LatentThinkingForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto"), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_adapters_of_transformers(saved, tmp_path, target):
    """`add_adapter` and `load_adapter`, without a `PeftModel` around the model."""
    model = LatentThinkingForCausalLM.from_pretrained(saved)
    plain = logits(copy.deepcopy(model))
    model.add_adapter(adapter_config(target))
    train_a_step(model).save_pretrained(tmp_path)
    expected = logits(model)
    assert (expected - plain).abs().max() > 1e-2
    loaded = LatentThinkingForCausalLM.from_pretrained(saved)
    loaded.load_adapter(str(tmp_path))
    assert_same(copy.deepcopy(loaded), expected)
    loaded.disable_adapters()
    assert_same(loaded, plain)
    assert_same(LatentThinkingForCausalLM.from_pretrained(tmp_path), expected)


REMOTE = """
import sys, torch
sys.modules["llada_trm_hf"] = None
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
inputs, found = torch.load("inputs.pt"), []
for folder in ("whole", "thinker"):
    for auto_class in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            found.append(model(**inputs).logits)
torch.save(found, "outputs.pt")
"""


def test_loaded_where_the_package_is_not_installed(checkpoints, tmp_path):
    inputs, expected = {**dict(zip(("input_ids", "attention_mask"), pad_rows(ROWS))), **SETTINGS}, []
    for name in ("whole", "thinker"):
        base = LatentThinkingForCausalLM.from_pretrained(checkpoints / name)
        model = train_a_step(get_peft_model(base, adapter_config("whole thinker")))
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected += [model(**inputs).logits] * 2
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE]
    done = run_program(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for found, logits_before in zip(torch.load(tmp_path / "outputs.pt"), expected, strict=True):
        torch.testing.assert_close(found, logits_before, atol=1e-4, rtol=1e-4)

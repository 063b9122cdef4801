"""NaN and Inf are named with the module they came from: in a forward pass, in training, in generation."""

import re

import pytest
import torch
from conftest import MASK
from torch import nn
from transformers import TrainerCallback

from llada_trm_hf.cli.main import main
from llada_trm_hf.data import byte_tokenizer, load_reasoning_dataset, tokenize_reasoning
from llada_trm_hf.inspection import NonFiniteWatch, generate_finite
from llada_trm_hf.models import SequenceTRM, SequenceTRMConfig
from llada_trm_hf.training import (
    MaskedDiffusionTrainer,
    MaskedDiffusionTrainingArguments,
    TRMTrainer,
    TRMTrainingArguments,
)

IDS = torch.full((2, 12), MASK)
MODULES = [
    "backbone.model.embed_tokens",
    "backbone.model.layers.0.input_layernorm",
    "backbone.model.layers.0.self_attn.v_proj",
    "backbone.model.layers.1.mlp.down_proj",
    "backbone.model.norm",
    "backbone.lm_head",
    "refiner.encoder.0",
    "refiner.layers.1.gate_proj",
    "refiner.projector",
    "refiner.confidence.2",
]


@pytest.fixture
def hybrid(make_hybrid):
    return make_hybrid(min_confidence=1.0)  # every chunk is refined


def plant(module: nn.Module, value=torch.nan):
    with torch.no_grad():
        module.weight[-1] = value  # of the embedding, the mask token's


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", MODULES)
def test_planted_weight_is_named(hybrid, name, value):
    module = hybrid.get_submodule(name)
    plant(module, value)
    with NonFiniteWatch(hybrid) as watch:
        hybrid(IDS)
    assert (watch.finding.module, watch.finding.kind) == (name, type(module).__name__)
    size = module.weight[-1].numel()
    counts = f"{size} NaN, 0 Inf" if value != value else f"0 NaN, {size} Inf"
    assert watch.finding.parameters == [f"weight: {counts} of {module.weight.numel()} values"]
    assert str(watch.finding).startswith(f"NaN or Inf first appeared in {name} ({type(module).__name__}), output: ")


def test_own_arithmetic_of_a_module_is_told_from_its_parts(hybrid):
    mlp = hybrid.backbone.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda *args: own(*args).masked_fill(torch.arange(32) == 5, torch.nan)
    with NonFiniteWatch(hybrid) as watch:
        hybrid(IDS)
    assert watch.finding.module == "backbone.model.layers.1.mlp" and watch.finding.parameters == []
    assert watch.finding.where == "output: 24 NaN, 0 Inf of 768 values"
    mlp.forward = own
    hybrid.refiner.config.step_size = torch.nan  # the next to see it is the encoder, in the second step
    with NonFiniteWatch(hybrid) as watch:
        hybrid(IDS)
    assert watch.finding.module == "refiner" and watch.finding.where.startswith("output.hidden_states: ")


def test_what_came_in_is_told_from_what_came_up(hybrid):
    embeddings = hybrid.get_input_embeddings()(IDS).detach()
    embeddings[0, 3, 7] = torch.inf
    with NonFiniteWatch(hybrid) as watch:
        hybrid(inputs_embeds=embeddings)
    assert watch.finding.in_inputs and "inputs_embeds: 0 NaN, 1 Inf of 768 values" in str(watch.finding)


def test_loss_alone_is_the_models_own(hybrid):
    with NonFiniteWatch(hybrid) as watch:
        hybrid(IDS, labels=torch.ones_like(IDS), p_mask=torch.zeros(2))
    assert (watch.finding.module, watch.finding.kind) == ("", "LLaDATRMForMaskedDiffusion")
    assert watch.finding.where.startswith("output.loss: ")


def test_what_is_meant_to_be_infinite_or_nan_is_not_reported(hybrid):
    with NonFiniteWatch(hybrid) as watch:
        hybrid.refiner(torch.randn(1, 8, 32), output_statistics=True)  # similarities are NaN where there are none
        hybrid(IDS)
    assert watch.finding is None

    class Masked(nn.Module):
        def forward(self, scores, mask):
            return (scores + mask).softmax(-1).log() * 0  # -inf * 0

    with NonFiniteWatch(nn.ModuleDict({"inner": Masked()})) as watch:
        watch.model["inner"](torch.zeros(2, 4), torch.tensor([0.0, 0.0, -torch.inf, 0.0]))
    assert watch.finding.module == "inner"


def test_watch_leaves_nothing_behind_and_changes_nothing(hybrid):
    expected = hybrid(IDS).logits
    with NonFiniteWatch(hybrid):
        assert torch.equal(hybrid(IDS).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hybrid.modules())
    hybrid.gradient_checkpointing_enable()
    with NonFiniteWatch(hybrid):
        loss = hybrid.train()(IDS, labels=torch.ones_like(IDS)).loss
    loss.backward()  # computes layers again, now without the watch


@pytest.mark.parametrize("name", MODULES)
def test_debug_mode_names_it(hybrid, name, monkeypatch, capsys):
    plant(hybrid.get_submodule(name))
    monkeypatch.setenv("LLADA_TRM_DEBUG", "1")
    hybrid(IDS)
    report = capsys.readouterr().out
    assert "NOT ALL VALUES FINITE" in report and f"NaN or Inf first appeared in {name} (" in report


def test_debug_mode_names_inputs_and_losses(hybrid, monkeypatch, capsys):
    monkeypatch.setenv("LLADA_TRM_DEBUG", "1")
    hybrid(inputs_embeds=torch.full((1, 8, 32), torch.nan))
    assert "came in with what LLaDATRMForMaskedDiffusion was given, inputs_embeds: 256 NaN" in capsys.readouterr().out
    hybrid(IDS, labels=torch.ones_like(IDS), p_mask=torch.zeros(2))
    assert "first appeared in LLaDATRMForMaskedDiffusion, output.loss" in capsys.readouterr().out


# --- In training ---


class PlantAfter(TrainerCallback):
    """Breaks a weight after a step."""

    def __init__(self, step, module):
        self.step, self.module = step, module

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            plant(self.module)


def test_training_stops_before_the_weights_are_lost(make_backbone, make_hybrid, tmp_path):
    tokenizer = byte_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "pad_token_id", "eos_token_id")}
    hybrid = make_hybrid(make_backbone(vocab_size=len(tokenizer), **ids))
    dataset, response = load_reasoning_dataset("arithmetic", "train[:32]", num_terms=4)
    trainer = MaskedDiffusionTrainer(
        hybrid,
        MaskedDiffusionTrainingArguments(
            output_dir=str(tmp_path), max_steps=6, logging_steps=100, use_cpu=True, disable_tqdm=True
        ),
        train_dataset=tokenize_reasoning(dataset, tokenizer, response),
        processing_class=tokenizer,
        callbacks=[PlantAfter(2, hybrid.backbone.model.layers[0].mlp.up_proj)],
    )
    expected = (
        r"became nan in step 3\. NaN or Inf first appeared in backbone\.model\.layers\.0\.mlp\.up_proj \(Linear\)"
    )
    with pytest.raises(FloatingPointError, match=expected) as caught:
        trainer.train()
    assert "In all, 1 of its parameters and buffers hold NaN or Inf." in str(caught.value)
    broken = [name for name, parameter in hybrid.named_parameters() if not parameter.isfinite().all()]
    assert broken == ["backbone.model.layers.0.mlp.up_proj.weight"]


def test_training_a_sequence_trm_names_module_or_input(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def train(break_weight):
        pairs = [
            {
                "context": torch.randn(3, 8, generator=generator),
                "target": torch.randn(8, generator=generator),
                "id": f"pair-{number}",
            }
            for number in range(4)
        ]
        model = SequenceTRM(SequenceTRMConfig(hidden_size=8, n_layers=1, n_heads=2))
        if break_weight:
            plant(model.get_submodule(break_weight))
        else:
            pairs[1]["context"][0, 0] = torch.nan
        arguments = TRMTrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True)
        TRMTrainer(model, arguments, train_dataset=pairs).train()

    with pytest.raises(FloatingPointError, match=r"first appeared in net\.layers\.0\.down_proj \(Linear\)"):
        train("net.layers.0.down_proj")
    with pytest.raises(
        FloatingPointError, match=r"pair-1\..* NaN or Inf came in with what SequenceTRM was given, context"
    ):
        train(None)


# --- In generation ---


@pytest.mark.parametrize("name", ["backbone.model.layers.1.mlp.down_proj", "refiner.projector"])
def test_generation_does_not_go_on_in_silence(hybrid, name):
    settings = {"max_new_tokens": 8, "num_diffusion_steps": 4}
    expected = hybrid.generate(IDS[:, :4], **settings)
    assert torch.equal(generate_finite(hybrid, input_ids=IDS[:, :4], **settings), expected)
    assert not hybrid.get_output_embeddings()._forward_hooks
    plant(hybrid.get_submodule(name))
    with pytest.raises(FloatingPointError, match=f"first appeared in {re.escape(name)} "):
        generate_finite(hybrid, input_ids=IDS[:, :4], **settings)


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_commands_name_it_and_write_nothing(make_backbone, make_hybrid, tmp_path, capsys, command):
    tokenizer = byte_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "pad_token_id", "eos_token_id")}
    hybrid = make_hybrid(make_backbone(vocab_size=len(tokenizer), **ids), min_confidence=1.0)
    plant(hybrid.refiner.projector)
    hybrid.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    where = {"generate": ["--output_file", str(tmp_path / "out")], "trace": ["--output_dir", str(tmp_path / "out")]}
    flags = ["--checkpoint", str(tmp_path / "checkpoint"), "--prompt", "12=", "--max_new_tokens", "4"]
    assert main([command, *flags, "--device", "cpu", *where[command]]) == 1
    assert "NaN or Inf first appeared in refiner.projector (Linear)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""LLaDA-MoE against experts written as a loop over tokens, and everything a user does with such a model."""

import json
import os
import sys

import pytest
import torch
from conftest import EOS, MASK, PAD
from run_programs import run_program
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, silu
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from llada_trm_hf.generation.block_kv_cache import BlockKVCache
from llada_trm_hf.models import (
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDAModel,
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDAMoEModel,
    LLaDATRMForMaskedDiffusion,
)
from llada_trm_hf.models.llada_moe.modeling_llada_moe import LLaDAMoESparseMLP

EXPERTS = ["eager", "batched_mm", "grouped_mm"]
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "dense_intermediate_size": 48,
    "expert_intermediate_size": 24,
    "num_hidden_layers": 3,
    "moe_layer_freq": [1, 0, 1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mask_token_id": MASK,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
OPTIONAL_PARTS = {
    "shared_expert_intermediate_size": 20,
    "moe_router_enable_expert_bias": True,
    "partial_rotary_factor": 0.5,
}


def make_moe(seed=0, **config):
    torch.manual_seed(seed)
    model = LLaDAMoEForMaskedDiffusion(LLaDAMoEConfig(**TINY | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("expert_bias"):
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(params=[{}, OPTIONAL_PARTS], ids=["plain", "optional parts"])
def moe(request):
    return make_moe(**request.param)


@pytest.fixture
def batch():
    """Noisy tokens, labels and p_mask `[3, 14]`."""
    clean = torch.randint(2, MASK, (3, 14), generator=torch.Generator().manual_seed(0))
    masked = torch.rand(3, 14, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[:, :3] = False
    return clean.masked_fill(masked, MASK), clean.masked_fill(torch.arange(14) < 3, -100), torch.full((3,), 0.5)


def config_dict_of(folder):
    return json.loads((folder / "config.json").read_text())


# --- Configuration ---


def test_defaults_are_those_of_the_released_model():
    config = LLaDAMoEConfig()
    model_size = 2 * config.vocab_size * 2048 + 16 * (4 * 2048**2 + 64 * 3 * 2048 * 1024)
    assert 7.3e9 < model_size < 7.4e9
    assert (config.hidden_size, config.num_hidden_layers, config.expert_intermediate_size) == (2048, 16, 1024)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_layer_freq) == (64, 8, [1] * 16)
    assert (config.mask_token_id, config.eos_token_id, config.qk_layernorm) == (156895, 156892, True)
    assert config.rope_parameters["rope_theta"] == 50000 and config.rotary_dim == config.head_dim == 128
    with torch.device("meta"):
        parameters = LLaDAMoEForMaskedDiffusion(config).num_parameters()
    assert abs(parameters - model_size) < 0.001 * model_size


def test_mask_token_of_a_small_vocabulary_is_the_callers(batch, tmp_path):
    config = LLaDAMoEConfig(**TINY | {"mask_token_id": None})
    assert config.mask_token_id is None
    model = LLaDAMoEForMaskedDiffusion(config)
    with pytest.raises(ValueError, match="No mask token: pass mask_token_id"):
        model.generate(batch[0], max_new_tokens=4)
    with pytest.raises(ValueError, match="labels need the mask token"):
        model(batch[0], labels=batch[1])
    model.save_pretrained(tmp_path)
    assert LLaDAMoEForMaskedDiffusion.from_pretrained(tmp_path, mask_token_id=MASK).config.mask_token_id == MASK
    assert AutoModelForMaskedLM.from_pretrained(tmp_path, mask_token_id=MASK).config.mask_token_id == MASK
    with pytest.raises(ValueError, match=r"mask_token_id=50\b"):
        AutoConfig.from_pretrained(tmp_path, mask_token_id=50)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok=6 is more than there are experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"expert_intermediate_size": 0}, "expert_intermediate_size must be at least 1"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be at least 1"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1"),
        ({"moe_layer_freq": [1, 1]}, "for each of the 3 layers, got \\[1, 1\\]"),
        ({"moe_layer_freq": [1, 2, 1]}, "0 \\(dense\\) or 1 \\(experts\\)"),
        ({"moe_layer_freq": [0, 0, 0]}, "No layer has experts"),
        ({"partial_rotary_factor": 0.4}, "rotates 3 of a head of 8"),
        ({"partial_rotary_factor": 0.1}, "rotates 0 of a head of 8"),
        ({"partial_rotary_factor": 1.5}, "rotates 12 of a head of 8"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef must be 0 or more"),
        ({"mask_token_id": 50}, "mask_token_id=50 is outside the vocabulary"),
        ({"pad_token_id": 50}, "pad_token_id=50 is outside the vocabulary"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.* is not supported"),
    ],
)
def test_config_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        LLaDAMoEConfig(**TINY | fields)


def test_fields_without_effect_are_not_kept():
    ignored = {"norm_topk_prob": True, "router_num_group": 4, "router_topk_group": 2, "use_cache": False}
    assert LLaDAMoEConfig(**TINY, **ignored).to_dict() == LLaDAMoEConfig(**TINY).to_dict()


def test_official_files_say_llada(goldens, tmp_path):
    """The expert fields tell the families apart, whichever way a checkpoint is opened."""
    folder = goldens / "moe_mixed/checkpoint"
    official = config_dict_of(folder)
    assert official["model_type"] == config_dict_of(goldens / "dense_mha/checkpoint")["model_type"] == "llada"
    config = LLaDAConfig.from_pretrained(folder)
    others = [LLaDAMoEConfig.from_pretrained(folder), AutoConfig.from_pretrained(folder)]
    others += [LLaDAConfig.from_dict(dict(official)), LLaDAMoEConfig.from_dict(dict(official))]
    assert all(type(c) is LLaDAMoEConfig and c.model_type == "llada_moe" for c in (config, *others))
    assert config.rotary_dim == 6 and config.rope_parameters["rope_theta"] == 10000
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LLaDAMoEConfig and config_dict_of(tmp_path)["model_type"] == "llada_moe"
    assert again.rotary_dim == 6 and again.rope_parameters == config.rope_parameters

    for auto_class, model_class in (
        (AutoModel, LLaDAMoEModel),
        (AutoModelForMaskedLM, LLaDAMoEForMaskedDiffusion),
        (AutoModelForCausalLM, LLaDAMoEForMaskedDiffusion),
        (LLaDAMoEModel, LLaDAMoEModel),
    ):
        assert type(auto_class.from_pretrained(folder)) is model_class
    assert type(AutoConfig.from_pretrained(goldens / "dense_mha/checkpoint")) is LLaDAConfig
    assert type(AutoModel.from_pretrained(goldens / "dense_mha/checkpoint")) is LLaDAModel


def test_classes_of_the_other_family_are_refused(moe, make_backbone):
    with pytest.raises(ValueError, match=r"LLaDAMoEModel.*LLaDAMoEForMaskedDiffusion"):
        LLaDAForMaskedDiffusion(moe.config)
    with pytest.raises(ValueError, match=r"LLaDAModel.*LLaDAForMaskedDiffusion"):
        LLaDAMoEModel(make_backbone().config)
    with pytest.raises(ValueError, match="LLaDAMoEConfig"):
        LLaDAConfig(num_experts=8)


# --- Experts ---


def plain_sparse_mlp(block, config, tokens):
    """The experts of each of `tokens` `[T, D]` one after the other, in the token's dtype."""
    gates, ups = block.experts.gate_up_proj.chunk(2, dim=1)
    outputs = []
    for token in tokens:
        probabilities = torch.softmax((block.gate.weight @ token).float(), 0)
        if config.moe_router_enable_expert_bias:
            probabilities = probabilities + block.gate.expert_bias
        output = torch.zeros_like(token)
        for expert in probabilities.argsort(descending=True)[: config.num_experts_per_tok]:
            hidden = silu(gates[expert] @ token) * (ups[expert] @ token)
            weight = probabilities[expert].to(token.dtype)  # not divided by the sum of the chosen
            output = output + weight * (block.experts.down_proj[expert] @ hidden)
        if config.shared_expert_intermediate_size:
            shared = block.shared_expert
            hidden = silu(linear(token, shared.gate_proj.weight)) * linear(token, shared.up_proj.weight)
            output = output + linear(hidden, shared.down_proj.weight)
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("experts", EXPERTS)
def test_experts_against_a_loop_over_tokens(moe, experts, dtype, tolerance):
    moe = moe.to(dtype)
    moe.set_experts_implementation(experts)
    block = moe.model.layers[0].mlp
    assert isinstance(block, LLaDAMoESparseMLP) and moe.config._experts_implementation == experts
    hidden_states = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = {}, {}
    for outputs, result in (
        (found, block(hidden_states)),
        (expected, plain_sparse_mlp(block, moe.config, hidden_states.flatten(0, 1)).view_as(hidden_states)),
    ):
        block.zero_grad()
        (result.float() ** 2).sum().backward()
        outputs |= {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
        outputs["result"] = result
    assert ("gate.expert_bias" in found) == moe.config.moe_router_enable_expert_bias
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0, name
        assert (found[name] - tensor).abs().max() < tolerance * tensor.abs().max(), name


def test_experts_implementation_of_a_loaded_model(moe, batch, tmp_path):
    moe.save_pretrained(tmp_path)
    expected = moe(batch[0]).logits
    for experts in EXPERTS:
        model = AutoModelForMaskedLM.from_pretrained(tmp_path, experts_implementation=experts)
        assert model.config._experts_implementation == experts
        torch.testing.assert_close(model(batch[0]).logits, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="fastest"):
        LLaDAMoEForMaskedDiffusion.from_pretrained(tmp_path, experts_implementation="fastest")


def test_dense_models_beside_it_do_not_take_the_choice_of_experts_away(make_backbone):
    assert not make_backbone()._can_set_experts_implementation()
    assert make_moe().config._experts_implementation == "grouped_mm"
    assert LLaDAMoEModel(LLaDAMoEConfig(**TINY, experts_implementation="grouped_mm"))


def test_rotary_in_the_working_dtype():
    """Angles are computed in float32, whatever the model's dtype; cos and sin are rounded to it."""
    model, positions = make_moe(partial_rotary_factor=0.5), torch.arange(100)[None]
    exact = torch.arange(100)[:, None] * 50000.0 ** (-torch.arange(0, 4, 2) / 4)
    model = model.to(torch.bfloat16)
    cos, sin = model.model.rotary_emb(torch.zeros(1, 100, 32, dtype=torch.bfloat16), positions)
    assert cos.shape == sin.shape == (1, 100, 4) and cos.dtype == torch.bfloat16
    assert torch.equal(cos[0, :, :2], exact.cos().bfloat16()) and torch.equal(sin[0, :, 2:], exact.sin().bfloat16())
    cos, _ = make_moe().model.rotary_emb(torch.zeros(1, 100, 32), positions)
    assert cos.shape == (1, 100, 8) and cos.dtype == torch.float32


def test_query_and_key_norms():
    """Scaling the projections of queries changes nothing, if their heads are normalised."""
    tokens = torch.arange(2, 12)[None]
    for qk_layernorm in (True, False):
        model = make_moe(qk_layernorm=qk_layernorm, rms_norm_eps=1e-12)
        expected = model(tokens).logits
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 3
            layer.self_attn.k_proj.weight.data *= 2
        difference = (model(tokens).logits - expected).abs().max()
        assert difference < 1e-4 if qk_layernorm else difference > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("experts", EXPERTS)
@torch.no_grad()
def test_padding_and_batch_change_nothing(moe, attention, experts):
    moe.set_attn_implementation(attention)
    moe.set_experts_implementation(experts)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 50, (length,), generator=generator) for length in (9, 5, 12)]
    for left in (0, 1):
        input_ids = torch.randint(0, 50, (3, 12), generator=generator)  # whatever padding holds
        mask = torch.zeros(3, 12, dtype=torch.long)
        for b, row in enumerate(rows):
            columns = slice(12 - len(row), 12) if left else slice(len(row))
            input_ids[b, columns], mask[b, columns] = row, 1
        outputs = moe(input_ids, attention_mask=mask, output_router_logits=True)
        routed = torch.cat([r.view(3, 12, 5)[mask.bool()] for r in outputs.router_logits])
        alone = [moe(row[None], output_router_logits=True) for row in rows]
        expected = torch.cat([row.logits[0] for row in alone])
        assert (outputs.logits[mask.bool()] - expected).abs().max() < 2e-5
        expected = torch.cat([row.router_logits[layer] for layer in range(2) for row in alone])
        assert (routed - expected).abs().max() < 2e-5
        # What padding routes to does not count either.
        logits = tuple(torch.cat([row.router_logits[layer] for row in alone]) for layer in range(2))
        torch.testing.assert_close(outputs.aux_loss, moe.balancing_loss(logits))
        torch.testing.assert_close(moe.expert_load(outputs.router_logits, mask), moe.expert_load(logits))
        assert (outputs.aux_loss - moe(input_ids, output_router_logits=True).aux_loss).abs() > 1e-3


def test_balancing_loss_and_expert_load(moe):
    k, experts = 2, 5
    logits = tuple(torch.randn(2, 30, experts, generator=torch.Generator().manual_seed(0)))
    # Equation by equation: f is the share of (token, layer) pairs that choose an expert, P its mean probability.
    chosen, probability, load = torch.zeros(experts), torch.zeros(experts), torch.zeros(2, experts)
    biases = [getattr(moe.model.layers[i].mlp.gate, "expert_bias", None) for i in (0, 2)]
    for layer, of_layer in enumerate(logits):
        for token in of_layer:
            p = token.softmax(0)
            probability += p / 60
            chosen[p.argsort(descending=True)[:k]] += 1 / 60
            routed = p if biases[layer] is None else p + biases[layer]
            load[layer, routed.argsort(descending=True)[:k]] += 1 / 30
    torch.testing.assert_close(moe.balancing_loss(logits), experts * (chosen * probability).sum())
    torch.testing.assert_close(moe.expert_load(logits), load)
    torch.testing.assert_close(moe.model.expert_load(logits).sum(-1), torch.tensor([2.0, 2.0]))
    even = torch.zeros(30, experts).scatter_(1, (torch.arange(30)[:, None] + torch.arange(k)) % experts, 1e-6)
    torch.testing.assert_close(moe.balancing_loss((even,)), torch.tensor(float(k)))


# --- Training ---


def test_balancing_loss_in_training_only(moe, batch):
    input_ids, labels, p_mask = batch
    evaluated = moe(input_ids, labels=labels, p_mask=p_mask)
    assert evaluated.aux_loss is None and evaluated.router_logits is None and evaluated.logits.shape == (3, 14, 50)
    recorded = moe(input_ids, labels=labels, p_mask=p_mask, output_router_logits=True)
    assert [r.shape for r in recorded.router_logits] == [(42, 5), (42, 5)]
    assert torch.equal(recorded.loss, evaluated.loss) and torch.equal(recorded.logits, evaluated.logits)

    moe.train()
    outputs = moe(input_ids, labels=labels, p_mask=p_mask)
    assert outputs.logits is None and outputs.router_logits is None
    torch.testing.assert_close(outputs.aux_loss, recorded.aux_loss)
    torch.testing.assert_close(outputs.loss, evaluated.loss + 0.01 * recorded.aux_loss)
    assert moe(input_ids).aux_loss is None
    kept = moe(input_ids, labels=labels, p_mask=p_mask, logits_to_keep=2, output_router_logits=True)
    assert kept.logits.shape == (3, 2, 50) and len(kept.router_logits) == 2
    moe.config.router_aux_loss_coef = 0.0
    without = moe(input_ids, labels=labels, p_mask=p_mask)
    assert without.aux_loss is None and torch.equal(without.loss, evaluated.loss)


def test_balancing_loss_trains_the_routers(moe, batch):
    input_ids, labels, p_mask = batch
    gradients = []
    for coefficient in (0.0, 0.5):
        moe.train().zero_grad()
        moe.config.router_aux_loss_coef = coefficient
        moe(input_ids, labels=labels, p_mask=p_mask).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in moe.named_parameters()})
    last = "model.layers.2.mlp."
    assert (gradients[0][f"{last}gate.weight"] - gradients[1][f"{last}gate.weight"]).abs().max() > 1e-2
    assert torch.equal(gradients[0][f"{last}experts.down_proj"], gradients[1][f"{last}experts.down_proj"])


def test_repeated_steps_lower_loss_and_imbalance(moe, batch):
    input_ids, labels, p_mask = batch
    optimizer, seen = torch.optim.Adam(moe.parameters(), lr=3e-3), []
    moe.config.router_aux_loss_coef = 0.5
    for _ in range(20):
        outputs = moe.train()(input_ids, labels=labels, p_mask=p_mask)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        seen.append((outputs.loss.item(), outputs.aux_loss.item()))
    assert seen[-1][0] < 0.5 * seen[0][0] and seen[-1][1] < seen[0][1] - 0.05, seen


@pytest.mark.parametrize("experts", EXPERTS)
def test_gradient_checkpointing(moe, batch, experts):
    """The same gradients, of the balancing loss too."""
    moe.set_experts_implementation(experts)
    moe.config.router_aux_loss_coef = 0.5
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            moe.gradient_checkpointing_enable()
        moe.train().zero_grad()
        outputs = moe(batch[0], labels=batch[1], p_mask=batch[2])
        outputs.loss.backward()
        gradients.append([outputs.loss, *(p.grad for p in moe.parameters())])
    assert moe.model.layers[0].gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-7)


def test_padding_embedding_is_not_trained(moe):
    tokens = torch.tensor([[PAD, 5, MASK, PAD, 7, MASK]])
    moe.train()(tokens, labels=torch.arange(5, 11)[None]).loss.backward()
    gradient = moe.model.embed_tokens.weight.grad
    assert gradient[PAD].abs().max() == 0 and gradient[5].abs().max() > 0


def test_initial_weights():
    model = make_moe(expert_intermediate_size=200, initializer_range=0.05)
    mlp = model.model.layers[0].mlp
    for weight in (mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight):
        assert 0.04 < weight.std() < 0.06 and abs(weight.mean()) < 0.02
        assert not torch.equal(weight[0], weight[1])
    config = LLaDAMoEConfig(**TINY | OPTIONAL_PARTS)
    assert LLaDAMoEForMaskedDiffusion(config).model.layers[0].mlp.gate.expert_bias.abs().max() == 0


# --- Checkpoints ---


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints(moe, batch, tmp_path, dtype, original):
    moe = moe.to(dtype)
    moe.save_pretrained(tmp_path, save_original_format=original)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(".experts.3.up_proj.weight" in n for n in names) == original
    assert ("model.layers.0.mlp.experts.gate_up_proj" in names) != original
    if moe.config.moe_router_enable_expert_bias:
        assert ("model.layers.0.mlp.expert_bias" in names) == original
        assert ("model.layers.0.shared_expert.up_proj.weight" in names) == original
    loaded, info = LLaDAMoEForMaskedDiffusion.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == dtype
    state, expected = loaded.state_dict(), moe.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)
    assert torch.equal(loaded(batch[0]).logits, moe(batch[0]).logits)
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path, dtype="auto")(batch[0]).last_hidden_state,
        moe.model(batch[0]).last_hidden_state,
    )


@pytest.mark.parametrize("lacking", ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_tensors_are_an_error(moe, tmp_path, lacking):
    moe.save_pretrained(tmp_path, save_original_format=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=lacking):
        LLaDAMoEForMaskedDiffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_a_missing_expert_is_an_error(moe, tmp_path, part):
    moe.save_pretrained(tmp_path, save_original_format=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.2.mlp.experts.4.{part}.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"layers\.2\.mlp\.experts|conversion"):
        LLaDAMoEForMaskedDiffusion.from_pretrained(tmp_path)


def test_tied_embeddings(batch, tmp_path):
    model = make_moe(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(batch[0]).logits, model(batch[0]).logits, rtol=0, atol=1e-5)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_resized_vocabulary(moe, batch, tmp_path):
    expected = moe(batch[0]).logits
    moe.resize_token_embeddings(60)
    assert moe.config.vocab_size == 60 and moe.model.embed_tokens.padding_idx == PAD
    logits = moe(batch[0]).logits
    assert logits.shape[-1] == 60 and torch.equal(logits[..., :50], expected)
    moe.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(batch[0]).logits, logits)


def test_recorded_outputs(moe, batch):
    moe.set_attn_implementation("eager")
    outputs = moe(batch[0], output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [h.shape for h in outputs.hidden_states] == [(3, 14, 32)] * 4
    assert [a.shape for a in outputs.attentions] == [(3, 4, 14, 14)] * 3
    torch.testing.assert_close(moe.lm_head(outputs.hidden_states[-1]), outputs.logits)
    moe.config.output_router_logits = True
    assert all(map(torch.equal, moe(batch[0]).router_logits, outputs.router_logits))
    assert all(map(torch.equal, moe.model(batch[0]).router_logits, outputs.router_logits))


# --- Hybrid ---


def test_hybrid_on_an_official_folder(goldens, tmp_path):
    folder = goldens / "moe_mixed/checkpoint"
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(folder, mask_token_id=319, experts_implementation="eager")
    assert type(hybrid.backbone) is LLaDAMoEForMaskedDiffusion and hybrid.config.mask_token_id == 319
    assert hybrid.backbone.config._experts_implementation == "eager"
    tokens = torch.arange(300, 320)[None]
    expected = hybrid.backbone(tokens).logits
    assert torch.equal(hybrid(tokens, enable_refinement=False).logits, expected)
    assert (hybrid.generate(tokens, max_new_tokens=8, block_length=4) != 319).all()
    for save_backbone in (True, False):
        hybrid.save_pretrained(tmp_path, save_backbone=save_backbone)
        loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path, experts_implementation="grouped_mm")
        assert type(loaded.config.backbone_config) is LLaDAMoEConfig
        assert loaded.backbone.config._experts_implementation == "grouped_mm"
        torch.testing.assert_close(loaded(tokens).logits, hybrid(tokens).logits, rtol=0, atol=1e-4)
    hybrid.save_pretrained(tmp_path, save_original_format=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any("mlp.experts.5.down_proj.weight" in name for name in file.keys())  # noqa: SIM118
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, hybrid(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("refine", [True, False])
def test_balancing_loss_in_the_hybrid(moe, make_hybrid, batch, refine):
    input_ids, labels, p_mask = batch
    mask = (torch.arange(14) < torch.tensor([[14], [11], [9]])).long()
    inputs = {"labels": labels.masked_fill(mask == 0, -100), "p_mask": p_mask, "enable_refinement": refine}
    aux_loss = moe(input_ids, attention_mask=mask, output_router_logits=True).aux_loss

    hybrid = make_hybrid(moe, freeze_backbone=False).train()
    losses, gradients = [], []
    for coefficient in (0.0, 0.5):
        moe.config.router_aux_loss_coef = coefficient
        hybrid.zero_grad()
        outputs = hybrid(input_ids, attention_mask=mask, **inputs)
        torch.testing.assert_close(outputs.loss_components["router_aux"], aux_loss)
        outputs.loss.backward()
        losses.append(outputs.loss)
        gradients.append(moe.model.layers[2].mlp.gate.weight.grad.clone())
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * aux_loss.detach(), rtol=1e-4, atol=1e-5)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-2
    if not refine:
        alone = moe(input_ids, attention_mask=mask, labels=inputs["labels"], p_mask=p_mask)
        torch.testing.assert_close(losses[1], alone.loss)

    assert "router_aux" not in hybrid.eval()(input_ids, attention_mask=mask, **inputs).loss_components
    if refine:  # a frozen backbone has no loss of its own
        moe.requires_grad_(False)
        assert "router_aux" not in hybrid.train()(input_ids, attention_mask=mask, **inputs).loss_components


# --- Without this package ---

IN_A_PROCESS_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["llada_trm_hf"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

torch.set_num_threads(1)
inputs, outputs = torch.load("inputs.pt", weights_only=True), {}
for folder in ("moe", "official layout", "hybrid"):
    for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True, experts_implementation="eager")
        assert "llada_trm_hf" not in type(model).__module__.split("."), type(model).__module__
        outputs[folder, auto_class.__name__] = model(inputs).logits.detach()
model.save_pretrained("again")
outputs["again"] = AutoModel.from_pretrained("again", trust_remote_code=True)(inputs).logits.detach()
torch.save(outputs, "outputs.pt")
"""


def test_loads_where_the_package_is_not_installed(moe, make_hybrid, batch, tmp_path):
    hybrid = make_hybrid(moe)
    moe.save_pretrained(tmp_path / "moe")
    moe.save_pretrained(tmp_path / "official layout", save_original_format=True)
    hybrid.save_pretrained(tmp_path / "hybrid")
    torch.save(batch[0], tmp_path / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = run_program(
        [sys.executable, "-c", IN_A_PROCESS_WITHOUT_THE_PACKAGE],
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = torch.load(tmp_path / "outputs.pt")
    assert len(outputs) == 7
    for name, logits in outputs.items():
        expected = (hybrid if "hybrid" in name or name == "again" else moe)(batch[0]).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


# --- Decoding with caches ---


@pytest.mark.parametrize("kv_cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("settings", [{}, {"confidence_threshold": 0.1, "cfg_scale": 0.5}], ids=str)
def test_ragged_generation(moe, kv_cache, settings):
    prompts = [[5, 11, 23, 7], [30, 31], [9, MASK, 40]]
    settings = {"max_new_tokens": 10, "block_length": 4, "kv_cache": kv_cache, **settings}
    ids = torch.tensor([[0] * (4 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (4 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    together = moe.generate(ids, attention_mask=mask, **settings)
    for i, prompt in enumerate(prompts):
        alone = moe.generate(torch.tensor([prompt]), **settings)[0].tolist()
        assert together[i, 4 - len(prompt) :].tolist() == alone, i


@pytest.mark.parametrize("kv_cache", ["prefix", "dual"])
def test_what_is_exact_with_a_cache(kv_cache):
    ids, settings = torch.tensor([[5, 11, 23, 7]]), {"max_new_tokens": 10, "block_length": 5}
    for num_layers in (1, 3):
        model = make_moe(num_hidden_layers=num_layers, moe_layer_freq=[1] * num_layers)
        same = torch.equal(model.generate(ids, kv_cache=kv_cache, **settings), model.generate(ids, **settings))
        assert same == (num_layers == 1)


def test_cached_pass_matches_full_pass(moe):
    ids = torch.randint(2, MASK, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = BlockKVCache(moe.config.num_hidden_layers)
    full = moe(ids, past_key_values=cache).logits
    cache.columns = torch.arange(3, 6)
    torch.testing.assert_close(moe(ids[:, 3:6], past_key_values=cache).logits, full[:, 3:6])


def test_hybrid_in_training_mode_generates(moe):
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(moe, chunk_size=4).train()
    ids, mask = torch.tensor([[0, 5, 11], [7, 30, 31]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    settings = {"max_new_tokens": 6, "block_length": 3, "kv_cache": "dual"}
    trained = hybrid.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(trained, hybrid.eval().generate(ids, attention_mask=mask, **settings))


def test_adapters_on_the_backbone_keep_the_balancing_loss_and_the_caches(batch):
    peft = pytest.importorskip("peft")
    noisy, labels, p_mask = batch
    plain = LLaDATRMForMaskedDiffusion.from_backbone(make_moe(), chunk_size=4, freeze_backbone=False).train()
    expected = plain(noisy, labels=labels, p_mask=p_mask).loss_components
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(make_moe(), chunk_size=4)
    hybrid.refiner.load_state_dict(plain.refiner.state_dict())
    hybrid.backbone = peft.get_peft_model(hybrid.backbone, peft.LoraConfig(target_modules=["q_proj"]))
    found = hybrid.train()(noisy, labels=labels, p_mask=p_mask).loss_components
    torch.testing.assert_close(found["router_aux"], expected["router_aux"])
    settings = {"max_new_tokens": 6, "block_length": 3, "kv_cache": "dual"}
    sequences = hybrid.eval().generate(noisy[:1, :3], **settings)
    assert torch.equal(sequences, plain.eval().generate(noisy[:1, :3], **settings))

"""The backbones and their sampler against numbers recorded from the official LLaDA, LLaDA-MoE and Fast-dLLM code."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from llada_trm_hf.generation.commit_rules import num_transfer_tokens, sample_tokens
from llada_trm_hf.models import LLaDAForMaskedDiffusion, LLaDAMoEForMaskedDiffusion
from llada_trm_hf.models.modeling_masked_diffusion import masked_targets

# The ids that the golden cases put in place of LLaDA-8B's.
EOS, END_OF_TURN = 257, 260


class Golden:
    """One golden folder: its model, loaded from the official layout, and its recordings."""

    def __init__(self, folder):
        self.folder = folder
        self.mask = json.loads((folder / "forward.json").read_text())["mask_id"]
        # A LLaDA-MoE config carries no mask id.
        given = {"mask_token_id": self.mask} if self.has_experts else {}
        self.model = AutoModelForMaskedLM.from_pretrained(folder / "checkpoint", **given)
        family = LLaDAMoEForMaskedDiffusion if self.has_experts else LLaDAForMaskedDiffusion
        assert type(self.model) is family and self.model.config.mask_token_id == self.mask

    @property
    def has_experts(self):
        return self.folder.name.startswith("moe")

    def settings(self, name):
        return json.loads((self.folder / f"{name}.json").read_text())["cases"]

    def tensors(self, name):
        """Tensors by case and field."""
        cases = {}
        for key, tensor in load_file(self.folder / f"{name}.safetensors").items():
            if ".router_logits." in key:
                continue
            case, field = key.rsplit(".", 1)
            cases.setdefault(case, {})[field] = tensor
        return cases

    def router_logits(self, case, n):
        return load_file(self.folder / "forward.safetensors")[f"{case}.router_logits.{n}"]

    def parameters(self):
        """Every parameter and its gradient; of merged experts, every expert's part of it."""
        for name, parameter in self.model.named_parameters():
            if ".experts." not in name:
                yield parameter, parameter.grad
                continue
            for expert in range(len(parameter)):
                parts = 2 if "gate_up" in name else 1
                yield from zip(parameter[expert].chunk(parts), parameter.grad[expert].chunk(parts), strict=True)


@pytest.fixture(scope="module", params=["dense_mha", "dense_gqa", "moe_plain", "moe_mixed"])
def golden(request, goldens):
    return Golden(goldens / request.param)


@pytest.mark.parametrize("attention, experts", [("sdpa", "grouped_mm"), ("eager", "eager"), ("sdpa", "batched_mm")])
@torch.no_grad()
def test_forward(golden, attention, experts, monkeypatch):
    monkeypatch.setattr(golden.model.config, "_attn_implementation", attention)
    monkeypatch.setattr(golden.model.config, "_experts_implementation", experts)
    before_norm = []
    hook = golden.model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    for case, recorded in golden.tensors("forward").items():
        mask = recorded.get("attention_mask")
        if case == "cfg":
            conditional, unconditional = (golden.model(recorded[n]).logits for n in ("input_ids", "uncond_input_ids"))
            logits = unconditional + (1.5 + 1) * (conditional - unconditional)
            assert (logits - recorded["logits"]).abs().max() < 3e-4  # 2.5 times the difference of two logits
            continue
        outputs = golden.model(recorded["input_ids"], attention_mask=mask, output_hidden_states=True)
        real = torch.ones_like(recorded["input_ids"]).bool() if mask is None else mask.bool()
        found = {
            "logits": outputs.logits,
            "last_hidden": outputs.hidden_states[-1],
            "pre_final_norm": before_norm[-1],
        }
        for field, tensor in found.items():
            if field in recorded:
                assert (tensor - recorded[field])[real].abs().max() < 1e-4, (case, field)
        if "hidden_states" in recorded:
            layers_with_experts = sum(getattr(golden.model.config, "moe_layer_freq", []))
            assert outputs.get("router_logits") is None
            found = golden.model(recorded["input_ids"], output_router_logits=True).get("router_logits", ())
            assert len(found) == layers_with_experts
            for n, logits in enumerate(found):
                expected = golden.router_logits(case, n)
                assert (logits.view_as(expected) - expected).abs().max() < 1e-4, (case, n)
            states = torch.stack(outputs.hidden_states)
            assert (states - recorded["hidden_states"]).abs().max() < 1e-4, case
    hook.remove()


def test_loss_and_gradients(golden):
    model, settings = golden.model, golden.settings("loss")
    official = load_file(golden.folder / "checkpoint/model.safetensors")
    for case in ("pretrain", "sft"):
        recorded = golden.tensors("loss")[case]
        batch, length = recorded["noisy"].shape
        prompt_lengths = recorded.get("prompt_lengths", torch.zeros(batch, dtype=torch.long))
        is_prompt = torch.arange(length) < prompt_lengths[:, None]
        labels = recorded["input_ids"].masked_fill(is_prompt, -100)
        num_labelled = length - prompt_lengths

        model.zero_grad()
        outputs = model(recorded["noisy"], labels=labels, p_mask=recorded["p_mask"])
        torch.testing.assert_close(outputs.loss, recorded["loss"], rtol=1e-5, atol=0)
        outputs.loss.backward()
        # p_mask may be given once per row, and logits need not be built.
        rows = (1 - 1e-3) * recorded["t"] + 1e-3
        model.train()
        without_logits = model(recorded["noisy"], labels=labels, p_mask=rows)
        model.eval()
        assert without_logits.logits is None
        # In training, LLaDA-MoE adds the balancing loss.
        balancing = 0.01 * without_logits.aux_loss if golden.has_experts else 0
        torch.testing.assert_close(without_logits.loss, recorded["loss"] + balancing, rtol=1e-5, atol=0)
        if golden.has_experts and case == "pretrain":
            expected = golden.tensors("loss")["aux"]["load_balancing_loss"]
            torch.testing.assert_close(without_logits.aux_loss, expected, rtol=1e-5, atol=0)

        targets = masked_targets(recorded["noisy"], labels, golden.mask, recorded["p_mask"])
        assert torch.equal(targets.positions, recorded["masked"].bool())
        cross_entropy = -outputs.logits.log_softmax(-1)[targets.positions].gather(1, targets.tokens[:, None])[:, 0]
        scale = (num_labelled * batch)[:, None].expand(batch, length)[targets.positions]
        token_loss = cross_entropy * targets.weights * scale
        torch.testing.assert_close(token_loss, recorded["token_loss"], rtol=1e-4, atol=1e-5)

        parameters = list(golden.parameters())
        assert len(parameters) == len(official)
        # Back-propagation to the expert bias does not work in the official code.
        assert {n for n in official if not n.endswith("expert_bias")} == settings[case]["grad_l2"].keys()
        for name, norm in settings[case]["grad_l2"].items():
            # The parameter that holds the official tensor.
            (gradient,) = (gradient for ours, gradient in parameters if torch.equal(ours, official[name]))
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), (case, name)


def test_official_layout_can_be_written_again(golden, tmp_path):
    golden.model.save_pretrained(tmp_path, save_original_format=True)
    written, official = (load_file(f / "model.safetensors") for f in (tmp_path, golden.folder / "checkpoint"))
    assert set(written) == set(official)
    assert all(torch.equal(tensor, official[name]) for name, tensor in written.items())


def generation_arguments(case):
    return {
        "max_new_tokens": case["gen_length"],
        "num_diffusion_steps": case["steps"],
        "block_length": case["block_length"],
        "cfg_scale": case.get("cfg_scale", 0.0),
        "confidence_threshold": case.get("threshold"),
        "suppress_tokens": [EOS] if case.get("logits_eos_inf") else None,
        "defer_tokens": [EOS, END_OF_TURN] if case.get("confidence_eos_eot_inf") else None,
        "return_dict_in_generate": True,
        "output_history": True,
    }


def test_official_sampler(golden):
    recordings = golden.tensors("generate")
    for case, settings in golden.settings("generate").items():
        recorded, arguments = recordings[case], generation_arguments(settings)
        outputs = golden.model.generate(recorded["prompt"], attention_mask=recorded.get("attention_mask"), **arguments)
        if case.startswith("prompt_with_masks"):
            # The official sampler may leave masks; ours fills every one, and only those.
            prompt = recorded["prompt"]
            assert (prompt == golden.mask).any() and not (outputs.sequences == golden.mask).any(), case
            given = prompt != golden.mask
            assert torch.equal(outputs.sequences[:, : prompt.shape[1]][given], prompt[given]), case
            continue
        assert torch.equal(outputs.sequences, recorded["output"]), case
        assert outputs.num_forward_passes == settings["forward_calls"], case
        if settings.get("has_canvas"):
            assert torch.equal(outputs.history, recorded["canvas"].long()), case


def test_fast_dllm_sampler(golden):
    recordings, cases = golden.tensors("fastdllm"), golden.settings("fastdllm")
    caches = ["none"] if golden.folder.name.startswith("moe") else ["dual", "none", "prefix"]
    for of_threshold in (False, True):
        assert sorted({c["cache"] for c in cases.values() if bool(c["threshold"]) == of_threshold}) == caches
    for case, settings in cases.items():
        arguments = generation_arguments(settings)
        outputs = golden.model.generate(recordings[case]["prompt"], kv_cache=settings["cache"], **arguments)
        assert torch.equal(outputs.sequences, recordings[case]["output"]), case
        assert outputs.num_forward_passes == settings["nfe"], case
        undecided = (outputs.history == golden.mask).sum((1, 2))
        assert (undecided[:-1] - undecided[1:]).tolist() == settings["tokens_transferred_per_forward"], case


def test_schedule(goldens):
    for case in json.loads((goldens / "schedule.json").read_text()):
        masked = torch.tensor(case["masked"]).reshape(-1)
        expected = torch.tensor(case["tokens_per_step"]).reshape(len(masked), -1)
        assert torch.equal(num_transfer_tokens(masked, case["steps"]), expected), case


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gumbel_noise(goldens, temperature):
    recorded = load_file(goldens / "gumbel.safetensors")
    logits, uniform, argmax = (recorded[f"t{temperature}.{name}"] for name in ("logits", "uniform", "argmax"))
    assert not torch.equal(argmax, logits.argmax(-1))
    assert torch.equal(sample_tokens(logits.double(), temperature, uniform=uniform), argmax)


@pytest.mark.parametrize(
    "model_class, name, right",
    [
        (LLaDAForMaskedDiffusion, "moe_plain", "LLaDAMoEForMaskedDiffusion"),
        (LLaDAMoEForMaskedDiffusion, "dense_mha", "LLaDAForMaskedDiffusion"),
    ],
)
def test_checkpoint_of_the_other_family(goldens, model_class, name, right):
    with pytest.raises(ValueError, match=rf"\b{right}\b"):
        model_class.from_pretrained(goldens / name / "checkpoint")

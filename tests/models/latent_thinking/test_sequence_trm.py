"""SequenceTRM against recorded numbers of the llm-trm project and a plain loop over samples, heads and pairs."""

import cmath
import json
import os
import sys

import pytest
import torch
from conftest import randomise
from run_programs import run_program
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, pad
from transformers import AutoModel

from llada_trm_hf.hub import import_legacy
from llada_trm_hf.models import DimensionCompressor, DimensionCompressorConfig, SequenceTRM, SequenceTRMConfig
from llada_trm_hf.models.latent_thinking.sequence_trm_layers import PackedSequences

WIDTH, HEADS, LENGTH = 8, 2, 7
STYLES = ["trm", "llm_trm"]
MASKS = {
    "none": None,
    "left": torch.tensor([[0] * 3 + [1] * 4, [0] * 6 + [1], [1] * 7]),
    "right": torch.tensor([[1] * 4 + [0] * 3, [1] + [0] * 6, [1] * 7]),
    "holes": torch.tensor([[0, 1, 1, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0], [1] * 7]),
    "empty": torch.tensor([[0] * 7, [1] * 7, [0] * 7]),
}


def make_trm(block_style="trm", dtype=torch.float64, seed=1, **config):
    sizes = {"hidden_size": WIDTH, "n_heads": HEADS, "intermediate_size": 12, "n_latent_steps": 2}
    model = SequenceTRM(SequenceTRMConfig(**sizes | {"n_deep_recursions": 2, "block_style": block_style} | config))
    randomise(model, seed)
    return model.to(dtype).eval()


@pytest.fixture
def context():
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def target():
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# --- The same in plain words: one sample, one head, one pair of positions at a time ---


class PlainTRM:
    """A SequenceTRM for one sample without padding: `[n, D']`."""

    def __init__(self, model):
        self.config, self.weights = model.config, dict(model.named_parameters())
        self.published = model.config.block_style == "llm_trm"

    def dense(self, name, x):
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, x, name=None):
        scaled = x / (x.square().mean(-1, keepdim=True) + (2.0**-23 if self.published else 1e-5)).sqrt()
        return scaled * self.weights[f"{name}.weight"] if name else scaled

    def turn(self, vector, position):
        """RoPE: channels i and i + half are one complex number."""
        half = len(vector) // 2
        angles = [cmath.exp(1j * position * 10000 ** (-i / half)) for i in range(half)]
        turned = torch.complex(vector[:half], vector[half:]) * torch.tensor(angles, dtype=torch.complex128)
        return torch.cat([turned.real, turned.imag])

    def attend(self, name, x):
        size = WIDTH // self.config.n_heads
        queries, keys, values = self.dense(f"{name}.in_proj", x).split(WIDTH, dim=-1)
        rows = []
        for i in range(len(x)):
            heads = []
            for h in range(self.config.n_heads):
                part = slice(h * size, (h + 1) * size)
                query, scores = queries[i, part], []
                for j in range(len(x)):
                    key = keys[j, part]
                    pair = (query, key) if self.published else (self.turn(query, i), self.turn(key, j))
                    scores.append((pair[0] * pair[1]).sum() / size**0.5)
                heads.append(torch.stack(scores).softmax(0) @ values[:, part])
            rows.append(torch.cat(heads))
        return self.dense(f"{name}.out_proj", torch.stack(rows))

    def net(self, x):
        for i in range(self.config.n_layers):
            name = f"net.layers.{i}"
            if self.published:
                x = x + self.attend(f"{name}.self_attn", self.norm(x, f"{name}.norm1"))
                hidden = self.dense(f"{name}.mlp.0", self.norm(x, f"{name}.norm2"))
                x = x + self.dense(f"{name}.mlp.2", hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
            else:
                x = self.norm(x + self.attend(f"{name}.self_attn", x))
                gate, up = self.dense(f"{name}.gate_up_proj", x).chunk(2, dim=-1)
                x = self.norm(x + self.dense(f"{name}.down_proj", gate * gate.sigmoid() * up))
        return self.norm(x, "output_norm") if self.published else x

    def start(self, context):
        x = context if self.published else self.norm(self.dense("input_head.0", context))
        x = torch.cat([x, self.weights["reasoning_token"][0]])
        return x, torch.zeros_like(x), torch.zeros_like(x)

    def step(self, x, y, z):
        """A supervision step: prediction, halting probability, state."""
        for recursion in range(self.config.n_deep_recursions):
            if recursion == 0 or recursion <= self.config.n_deep_recursions - self.config.n_trained_recursions:
                y, z = y.detach(), z.detach()
            for _ in range(self.config.n_latent_steps):
                z = self.net(x + y + z)
            y = self.net(y + z)
        prediction = y[-1] if self.published else self.dense("output_head", y[-1])
        return prediction, self.dense("halt_head", y[-1]).sigmoid()[0], y, z

    def reason(self, context, max_steps, halt_threshold, noise=(), convergence_threshold=0.0):
        """Predictions, probabilities and residuals after each step until it halts."""
        x, y, z = self.start(context)
        steps = []
        for step in range(max_steps):
            z, before = z + noise[step] if len(noise) else z, y[-1]
            prediction, probability, y, z = self.step(x, y, z)
            squares = [(y[-1] - before).square().sum().item(), y[-1].square().sum().item()]
            steps.append((prediction, probability, (squares[0] / squares[1]) ** 0.5))
            if probability > halt_threshold or steps[-1][2] < convergence_threshold:
                break
        return steps


def real_rows(context, mask):
    return [row if mask is None else row[mask[b].bool()] for b, row in enumerate(context)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("padding", MASKS)
@torch.no_grad()
def test_equals_plain_loop(context, style, padding):
    model, mask = make_trm(style, n_layers=2), MASKS[padding]
    plain, y, z = PlainTRM(model), None, None
    states = [plain.start(row) for row in real_rows(context, mask)]
    filled = context if mask is None else context.masked_fill(mask[..., None] == 0, float("nan"))
    for _ in range(2):
        outputs = model(filled, mask, y, z)
        y, z = outputs.y, outputs.z
        for b, (x, *state) in enumerate(states):
            prediction, probability, *state = plain.step(x, *state)
            states[b] = (x, *state)
            torch.testing.assert_close(outputs.prediction[b], prediction)
            torch.testing.assert_close(outputs.halt_probability[b], probability)
            real = torch.ones(LENGTH + 1).bool() if mask is None else pad(mask[b], (0, 1), value=1).bool()
            torch.testing.assert_close(outputs.y[b][real], state[0])
            torch.testing.assert_close(outputs.z[b][real], state[1])
    assert outputs.y.shape == (3, LENGTH + 1, WIDTH)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("halt_loss, trained", [("bce", 1), ("mse", 1), ("bce", 2), ("mse", 3), ("mse", 9)])
def test_loss_and_gradients_equal_those_of_the_plain_loop(context, target, style, halt_loss, trained):
    depth = {"n_deep_recursions": max(2, min(trained, 3)), "n_trained_recursions": trained}
    model = make_trm(style, halt_loss=halt_loss, halt_loss_weight=0.7, **depth)
    mask, plain = MASKS["holes"], PlainTRM(model)
    first = model(context, mask)
    second = model(context, mask, first.y, first.z)
    threshold = cosine_similarity(second.prediction, target, dim=-1).median().item() + 1e-3  # one of three is above
    model.config.cosine_threshold = threshold
    contexts = [context.clone().requires_grad_() for _ in range(2)]
    outputs = model(contexts[0], mask, first.y, first.z, target)
    outputs.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    squares, halts, cosines = [], [], []
    for b, row in enumerate(real_rows(contexts[1], mask)):
        x, y, z = plain.start(row)
        _, _, y, z = plain.step(x, y, z)
        prediction, probability, *_ = plain.step(x, y, z)
        squares.append((prediction - target[b]).square())
        lengths = [v.square().sum().sqrt() for v in (prediction.detach(), target[b])]
        cosines.append((prediction.detach() * target[b]).sum() / (lengths[0] * lengths[1]))
        if halt_loss == "bce":
            halts.append(-(probability if cosines[-1] > threshold else 1 - probability).log())
        else:
            halts.append((probability - cosines[-1]) ** 2)
    mse, halt = torch.cat(squares).mean(), torch.stack(halts).mean()
    (mse + 0.7 * halt).backward()
    torch.testing.assert_close(outputs.loss, mse + 0.7 * halt)
    torch.testing.assert_close(outputs.loss_components, {"mse": mse.detach(), "halt": halt.detach()})
    torch.testing.assert_close(outputs.cosine_similarity, torch.stack(cosines))
    for name, parameter in model.named_parameters():
        assert found[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], parameter.grad)
    torch.testing.assert_close(contexts[0].grad, contexts[1].grad)


# --- Random depth in training ---


def gradients_of(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("trained", [1, 2])
def test_free_steps_move_the_state_and_have_no_gradient(context, target, style, trained):
    model = make_trm(style, n_trained_recursions=trained, dropout=0.0, max_free_steps=3, free_steps_probability=1.0)
    mask, plain, depths = MASKS["holes"], PlainTRM(model.train()), set()
    for seed in range(8):
        torch.manual_seed(seed)
        outputs = model(context, mask, target=target)
        found = gradients_of(model, (outputs.prediction - target).square().sum())
        for free in (1, 2, 3):
            predictions, states = [], []
            for row in real_rows(context, mask):
                x, y, z = plain.start(row)
                for _ in range(free):
                    with torch.no_grad():
                        _, _, y, z = plain.step(x, y, z)
                prediction, _, y, z = plain.step(x, y, z)
                predictions.append(prediction)
                states.append(y[-1].detach())
            if not torch.allclose(torch.stack(predictions), outputs.prediction):
                continue
            depths.add(free)
            torch.testing.assert_close(outputs.y[:, -1], torch.stack(states))
            expected = gradients_of(model, (torch.stack(predictions) - target).square().sum())
            expected["halt_head.weight"] = expected["halt_head.bias"] = None
            for name, gradient in found.items():
                assert name.startswith("halt_head") or gradient.abs().max() > 0, name
                torch.testing.assert_close(gradient, expected[name], msg=name)
            break
        else:
            raise AssertionError("of no depth from 1 to 3")
    assert depths == {1, 2, 3}


def test_free_steps_only_before_a_batch_and_only_in_training(context, monkeypatch):
    model, calls = make_trm(max_free_steps=4, free_steps_probability=1.0, dropout=0.0), []
    deep_recursion = SequenceTRM.deep_recursion
    monkeypatch.setattr(SequenceTRM, "deep_recursion", lambda *args: calls.append(args) or deep_recursion(*args))

    def steps_of(call):
        calls.clear()
        call()
        return len(calls)

    assert steps_of(lambda: model(context)) == 1
    model.train()
    assert {steps_of(lambda: model(context)) for _ in range(60)} == {2, 3, 4, 5}
    state = torch.zeros(3, LENGTH + 1, WIDTH, dtype=torch.float64)
    assert {steps_of(lambda: model(context, y=state, z=state)) for _ in range(10)} == {1}
    assert {steps_of(lambda: model.reason(context, None, 2, halt_threshold=1.0)) for _ in range(10)} == {2}
    model.config.free_steps_probability = 0.5
    assert 20 < sum(steps_of(lambda: model(context)) == 1 for _ in range(60)) < 40


def test_a_config_of_before_trains_as_before(context, target, tmp_path):
    """Without the fields that came later: one depth, and gradients of the last latent recursion."""
    model = make_trm(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    later = ("n_trained_recursions", "max_free_steps", "free_steps_probability", "halt_bias")
    assert [config.pop(name) for name in later] == [1, 0, 0.5, 0.0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = SequenceTRM.from_pretrained(tmp_path).train()
    loaded.config.dropout = 0.0
    for module in loaded.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(loaded(context.float()).prediction, model(context.float()).prediction)


# --- Golden data ---


@pytest.fixture(scope="module")
def golden(llm_trm):
    (facts,) = json.loads((llm_trm / "manifest.json").read_text())["trms"]
    return llm_trm / facts["checkpoint"], load_file(llm_trm / facts["eval_golden"]), facts


def supervision_steps(model, context, mask, count):
    """The outputs of the supervision steps in order."""
    y, z, outputs = None, None, []
    for _ in range(count):
        outputs.append(model(context, mask, y, z))
        y, z = outputs[-1].y, outputs[-1].z
    return outputs


@pytest.mark.parametrize("dtype, suffix, tolerance", [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-12)])
@pytest.mark.parametrize("use_ema", [False, True])
@torch.no_grad()
def test_golden_steps(golden, dtype, suffix, tolerance, use_ema):
    path, recorded, _ = golden
    model = import_legacy(path, use_ema=use_ema).to(dtype)
    real = pad(recorded["mask"], (0, 1), value=1).bool()
    outputs = supervision_steps(model, recorded["contexts"].to(dtype), recorded["mask"], 8)
    for step in (4,) if use_ema else (1, 2, 4, 8):
        expected = recorded[f"{'ema_' if use_ema else ''}y_steps_{step}{suffix}"]
        assert (outputs[step - 1].y - expected)[real].abs().max() < tolerance
        assert torch.equal(outputs[step - 1].prediction, outputs[step - 1].y[:, -1])
    halt = torch.stack([output.halt_probability for output in outputs])
    if use_ema:
        assert (halt[: len(recorded["ema_halt_prob"])] - recorded["ema_halt_prob"]).abs().max() < 1e-5
    else:
        assert (halt - recorded["halt_prob" + suffix]).abs().max() < tolerance
        if not suffix:
            assert (outputs[7].z - recorded["z_steps_8"])[real].abs().max() < tolerance


@torch.no_grad()
def test_golden_parts(golden):
    path, recorded, _ = golden
    model = import_legacy(path, use_ema=False)
    inputs = model.build_input(recorded["contexts"], recorded["mask"])
    assert torch.equal(inputs.x, recorded["x_augmented"].flatten(0, 1)[inputs.places])
    found = {
        "layer0_out": model.net.layers[0](inputs.x, inputs.sequences, inputs.rotary),
        "net_out": model.net(inputs.x, inputs.sequences, inputs.rotary),
    }
    zeros = torch.zeros_like(inputs.x)
    y, z = model.latent_recursion(inputs, zeros, zeros)
    found |= {"latent_recursion_1_y": y, "latent_recursion_1_z": z}
    for name, tensor in found.items():
        assert (tensor - recorded[name].flatten(0, 1)[inputs.places]).abs().max() < 1e-5, name
    without = supervision_steps(model, recorded["contexts"], None, 2)[-1].y
    assert (without - recorded["y_nomask_steps_2"]).abs().max() < 1e-5
    real = pad(recorded["mask"], (0, 1), value=1).bool()
    assert (without - recorded["y_steps_2"])[real].abs().max() > 0.01


@torch.no_grad()
def test_golden_padding_and_order(golden):
    path, recorded, _ = golden
    model, expected = import_legacy(path, use_ema=False), recorded["reasoning_unpadded_steps_4"]
    lengths = recorded["lengths"].tolist()
    rows = [row[:length] for row, length in zip(recorded["contexts"], lengths)]
    left = torch.stack([pad(row, (0, 0, 13 - len(row), 0), value=7.0) for row in rows])
    left_mask = torch.stack([torch.arange(13) >= 13 - length for length in lengths])
    assert (supervision_steps(model, left, left_mask, 4)[-1].prediction - expected).abs().max() < 1e-5
    for row, alone in zip(rows, expected):
        assert (supervision_steps(model, row[None], None, 4)[-1].prediction[0] - alone).abs().max() < 1e-5
        assert (supervision_steps(model, row.flip(0)[None], None, 4)[-1].prediction[0] - alone).abs().max() < 1e-5


@torch.no_grad()
def test_golden_halting(golden):
    path, recorded, facts = golden
    model = import_legacy(path, use_ema=False)
    for threshold, expected in facts["halting_by_threshold"].items():
        outputs = model.reason(recorded["contexts"], recorded["mask"], 8, halt_threshold=float(threshold))
        steps = outputs.num_steps.tolist()
        assert steps == expected["per_sample_steps"], threshold
        found = torch.stack([recorded["halt_prob"][step - 1, b] for b, step in enumerate(steps)])
        assert (outputs.halt_probability - found).abs().max() < 1e-5
    outputs = model.reason(recorded["contexts"], recorded["mask"], 8)
    assert (outputs.prediction - recorded["reasoning_early_stop_each_alone"]).abs().max() < 1e-5


def published_name(name):
    return name.replace(".in_proj.", ".in_proj_")


@pytest.fixture
def training(golden, llm_trm):
    """A model to train, its batch, and what was recorded."""
    path, recorded, facts = golden
    model = import_legacy(path, use_ema=False).train()
    for layer in model.net.layers:
        layer.self_attn.dropout = facts["train"]["dropout"]
    batch = {name: recorded[key] for name, key in (("context", "contexts"), ("mask", "mask"), ("target", "targets"))}
    return model, batch, load_file(llm_trm / facts["train_golden"]), facts["train"]


@pytest.mark.parametrize("case", ["bce", "mse", "mse_detached_target"])
@pytest.mark.parametrize("dtype, suffix", [(torch.float32, "_f32"), (torch.float64, "_f64")])
def test_golden_loss_and_gradients(training, case, dtype, suffix):
    model, batch, recorded, facts = training
    model.to(dtype)
    expected, real = facts["results"][case + suffix], pad(batch["mask"], (0, 1), value=1).bool()
    model.config.halt_loss, model.config.halt_loss_weight = case[:3], facts["halt_loss_weight"]
    batch = {name: tensor.to(dtype) for name, tensor in batch.items()}
    outputs = model(**batch, cosine_threshold=facts["halt_threshold"])
    loss = outputs.loss
    if case == "mse":  # as published: the cosine is not detached, and pulls the prediction
        cosine = cosine_similarity(outputs.prediction, batch["target"], dim=-1)
        loss = outputs.loss_components["mse"] - outputs.loss_components["mse"]
        loss = loss + (outputs.prediction - batch["target"]).square().mean()
        loss = loss + facts["halt_loss_weight"] * (outputs.halt_probability - cosine).square().mean()
    rel = 1e-5 if dtype == torch.float32 else 1e-12
    assert loss.item() == pytest.approx(expected["loss"], rel=rel)
    if case != "mse_detached_target":
        assert outputs.loss_components["mse"].item() == pytest.approx(expected["metrics"]["mse"], rel=rel)
        assert outputs.loss_components["halt"].item() == pytest.approx(expected["metrics"]["halt_loss"], rel=rel)
    loss.backward()
    norms = {published_name(name): p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-4 if dtype == torch.float32 else 1e-10)
    for name, parameter in model.named_parameters():
        gradient = recorded.get(f"grad_{case}.{published_name(name)}")
        assert (gradient is None) == (case == "mse_detached_target")
        if gradient is not None:
            assert (parameter.grad - gradient).abs().max() < 1e-4 * gradient.abs().max(), name
    if case == "bce":
        assert (outputs.y - recorded["y_after_step_1"])[real].abs().max() < 1e-5
        assert (outputs.z - recorded["z_after_step_1"])[real].abs().max() < 1e-5


@pytest.mark.parametrize("dtype, suffix", [(torch.float32, ""), (torch.float64, "_f64")])
def test_golden_five_updates(training, dtype, suffix):
    model, batch, recorded, facts = training
    model.to(dtype)
    settings = {name: value for name, value in facts["optimizer"].items() if name not in ("name", "clip_norm")}
    optimizer, y, z, losses, norms = torch.optim.AdamW(model.parameters(), **settings), None, None, [], []
    for _ in range(5):
        outputs = model(**batch, y=y, z=z, cosine_threshold=facts["halt_threshold"])
        optimizer.zero_grad()
        outputs.loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), facts["optimizer"]["clip_norm"]).item())
        optimizer.step()
        losses.append(outputs.loss.item())
        y, z = outputs.y, outputs.z
    expected = facts["results"]["updates5_token_refreshed"]
    assert losses == pytest.approx(expected["losses" + suffix], rel=1e-5 if not suffix else 1e-12)
    assert norms == pytest.approx(expected["grad_norms_before_clip"], rel=1e-4)
    prefix = "param_after5_token_refreshed."
    after = {name.removeprefix(prefix): tensor for name, tensor in recorded.items() if name.startswith(prefix)}
    parameters = {published_name(name): parameter for name, parameter in model.named_parameters()}
    assert len(after) == 6
    for name, tensor in after.items():
        assert (parameters[name] - tensor).abs().max() < 1e-5, name


# --- Padding, batch mates, order ---


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("padding", ["left", "right", "holes", "empty"])
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(context, style, padding):
    model, mask = make_trm(style), MASKS[padding]
    outputs = supervision_steps(model, context, mask, 3)[-1]
    reasoned = model.reason(context, mask, 6)
    for b, row in enumerate(real_rows(context, mask)):
        alone = supervision_steps(model, row[None], None, 3)[-1]
        torch.testing.assert_close(outputs.prediction[b], alone.prediction[0])
        torch.testing.assert_close(outputs.halt_logits[b], alone.halt_logits[0])
        reasoned_alone = model.reason(row[None], None, 6)
        assert reasoned.num_steps[b] == reasoned_alone.num_steps[0]
        torch.testing.assert_close(reasoned.prediction[b], reasoned_alone.prediction[0])


@torch.no_grad()
def test_only_the_paper_style_sees_the_order(context):
    for style, sees in (("trm", True), ("llm_trm", False)):
        model = make_trm(style)
        change = (model(context).prediction - model(context.flip(1)).prediction).abs().max()
        assert (change > 1e-2) if sees else (change < 1e-12), style


# --- Reasoning ---


def halting_trm(context, style="trm"):
    """A model whose samples halt after different numbers of steps at 0.5."""
    for seed in range(1, 200):
        model = make_trm(style, seed=seed)
        with torch.no_grad():
            outputs = supervision_steps(model, context, None, 6)
            model.halt_head.bias -= torch.stack([o.halt_logits for o in outputs]).median()
            halted = torch.stack([o.halt_logits for o in supervision_steps(model, context, None, 6)]) > 0
        first = {tuple(row).index(True) if any(row) else 6 for row in halted.T.tolist()}
        if len(first) == 3:
            return model
    raise AssertionError("no such model")


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_reason_equals_each_sample_alone(context, style):
    model = halting_trm(context, style)
    plain = PlainTRM(model)
    outputs = model.reason(context, None, 6, output_steps=True)
    expected = [plain.reason(row, 6, 0.5) for row in context]
    assert outputs.num_steps.tolist() == [len(steps) for steps in expected]
    longest = max(map(len, expected))
    assert outputs.step_predictions.shape == (3, longest, WIDTH)
    for b, steps in enumerate(expected):
        torch.testing.assert_close(outputs.prediction[b], steps[-1][0])
        torch.testing.assert_close(outputs.halt_probability[b], steps[-1][1])
        assert outputs.residual[b].item() == pytest.approx(steps[-1][2])
        for s in range(longest):
            prediction, probability, _ = steps[min(s, len(steps) - 1)]
            torch.testing.assert_close(outputs.step_predictions[b, s], prediction)
            torch.testing.assert_close(outputs.step_halt_probability[b, s], probability)
    short = model.reason(context, None, 2)
    assert short.num_steps.tolist() == [min(2, len(steps)) for steps in expected]
    assert short.step_predictions is None


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("halt_threshold", [0.5, 1.0])
@torch.no_grad()
def test_a_sample_whose_state_has_converged_halts(context, style, halt_threshold):
    model = halting_trm(context, style)
    plain, all_steps = PlainTRM(model), 9
    curves = [[step[2] for step in plain.reason(row, all_steps, 1.0)] for row in context]
    assert all(curve[0] == pytest.approx(1.0) for curve in curves)
    threshold = torch.tensor(curves)[:, 1:].quantile(0.4).item()
    for padding in ("none", "left"):
        mask = MASKS[padding]
        found = model.reason(context, mask, all_steps, halt_threshold, convergence_threshold=threshold)
        rows = real_rows(context, mask)
        expected = [plain.reason(row, all_steps, halt_threshold, (), threshold) for row in rows]
        assert found.num_steps.tolist() == [len(steps) for steps in expected]
        for b, steps in enumerate(expected):
            torch.testing.assert_close(found.prediction[b], steps[-1][0])
            assert found.residual[b].item() == pytest.approx(steps[-1][2])
            assert len(steps) == all_steps or steps[-1][1] > halt_threshold or steps[-1][2] < threshold
    assert min(map(len, expected)) < all_steps


@torch.no_grad()
def test_halted_samples_leave_the_batch(context):
    model, rows = halting_trm(context), []
    hook = model.net.register_forward_pre_hook(lambda _, args: rows.append(len(args[1].lengths)))
    num_steps = model.reason(context, MASKS["left"] | 1, 6).num_steps
    hook.remove()
    config = model.config
    per_step = config.n_deep_recursions * (config.n_latent_steps + 1)
    expected = [int((num_steps >= step).sum()) for step in range(1, int(num_steps.max()) + 1)]
    assert rows == [count for count in expected for _ in range(per_step)] and len(set(rows)) == 3
    rows.clear()
    assert (model.reason(context, halt_threshold=1.0).num_steps == config.n_supervision_steps).all()
    assert (model.reason(context, halt_threshold=0.0).num_steps == 1).all()


@torch.no_grad()
def test_the_threshold_itself_does_not_halt(context):
    torch.manual_seed(0)
    model = SequenceTRM(SequenceTRMConfig(hidden_size=WIDTH, n_heads=HEADS)).double().eval()
    model.halt_head.bias.zero_()
    outputs = model.reason(context, None, 3)  # 0.5 exactly: the weight is zero
    assert (outputs.halt_probability == 0.5).all() and (outputs.num_steps == 3).all()
    assert (model.reason(context, None, 3, halt_threshold=0.499).num_steps == 1).all()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("select_by", ["halt", "residual"])
@torch.no_grad()
def test_best_of_several_noisy_trajectories(context, padding, select_by, monkeypatch):
    model, mask, trajectories, drawn = halting_trm(context), MASKS[padding], 4, []
    randn_like = torch.randn_like

    def record(*args, **kwargs):
        drawn.append(randn_like(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", record)
    torch.manual_seed(8)
    settings = {"noise_std": 0.5, "select_by": select_by}
    outputs = model.reason(context, mask, 5, 0.6, trajectories, output_steps=True, **settings)
    monkeypatch.undo()
    rows = real_rows(context, mask)
    lengths = [len(row) + 1 for row in rows for _ in range(trajectories)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)  # in which tokens are packed
    pieces = zip(*((0.5 * step).split(sorted(lengths)) for step in drawn))
    noises = dict(zip(order, pieces))  # of each trajectory, step by step
    plain, chosen = PlainTRM(model), set()
    for b, row in enumerate(rows):
        tries = [plain.reason(row, len(drawn), 0.6, noises[b * trajectories + t]) for t in range(trajectories)]
        column, sign = (1, 1) if select_by == "halt" else (2, -1)
        best = max(range(trajectories), key=lambda t: sign * tries[t][-1][column])
        chosen.add(best)
        torch.testing.assert_close(outputs.prediction[b], tries[best][-1][0])
        torch.testing.assert_close(outputs.halt_probability[b], tries[best][-1][1])
        assert outputs.num_steps[b] == len(tries[best])
        assert outputs.residual[b].item() == pytest.approx(tries[best][-1][2])
        for s, (prediction, *_) in enumerate(tries[best]):
            torch.testing.assert_close(outputs.step_predictions[b, s], prediction)
    assert chosen != {0}
    torch.manual_seed(8)
    again = model.reason(context, mask, 5, 0.6, trajectories, **settings)
    assert torch.equal(again.prediction, outputs.prediction)
    still = model.reason(context, mask, 5, 0.6, trajectories)
    torch.testing.assert_close(still.prediction, model.reason(context, mask, 5, 0.6).prediction)


@pytest.mark.parametrize("trained", [1, 2])
@pytest.mark.parametrize("halt_threshold", [0.5, 1.0])
def test_reason_has_the_gradients_of_each_last_step(context, trained, halt_threshold):
    model, weight = halting_trm(context), torch.randn(3, WIDTH, dtype=torch.float64)
    model.config.n_trained_recursions = trained
    contexts = [context.clone().requires_grad_() for _ in range(2)]
    outputs = model.reason(contexts[0], None, 6, halt_threshold)
    ((outputs.prediction * weight).sum() + outputs.halt_probability.sum()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    plain = PlainTRM(model)
    for b, row in enumerate(contexts[1]):
        prediction, probability, _ = plain.reason(row, 6, halt_threshold)[-1]
        ((prediction * weight[b]).sum() + probability).backward()
    torch.testing.assert_close(contexts[0].grad, contexts[1].grad)
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(found[name], parameter.grad)


# --- Training ---


def test_predictions_reach_the_length_of_their_targets():
    """A state of fixed length must not fix the length of the prediction."""
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor([1.0, 3.0, 10.0])
    context, target = (torch.randn(3, *shape, 16, generator=generator) for shape in ((LENGTH,), ()))
    target *= lengths[:, None] / target.norm(dim=-1, keepdim=True)
    torch.manual_seed(0)
    config = SequenceTRMConfig(hidden_size=16, n_heads=HEADS, dropout=0.0, n_latent_steps=2, halt_loss="mse")
    model = SequenceTRM(config)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(250):
        optimizer.zero_grad()
        outputs = model(context, target=target)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert (outputs.prediction - target).norm(dim=-1).max() < 0.5
    assert (outputs.prediction.norm(dim=-1) - lengths).abs().max() < 0.3
    assert (outputs.halt_probability - outputs.cosine_similarity).abs().max() < 0.1


@pytest.mark.parametrize("style", STYLES)
def test_dropout_is_where_it_should_be(context, style, monkeypatch):
    probabilities, masks = [], []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(*args, attn_mask=None, dropout_p=0.0):
        probabilities.append(dropout_p)
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    model = make_trm(style, dropout=0.25)
    assert torch.equal(model(context).prediction, model(context).prediction)
    assert set(probabilities) == {0.0} and set(masks) == {None}
    model.train()
    assert (model(context).prediction - model(context).prediction).abs().max() > 1e-3
    assert set(probabilities) == ({0.0} if style == "trm" else {0.0, 0.25})
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts == ([0.25, 0.25] if style == "trm" else [])


# --- Dtypes ---


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_any_mix_of_dtypes(context, target, style, weights, dtype, autocast):
    exact, mask = make_trm(style), MASKS["left"]
    expected = exact(context, mask, target=target)
    expected.loss.backward()
    model = make_trm(style, dtype=weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(context.to(dtype), mask, target=target.to(dtype))
        outputs = model(context.to(dtype), mask, torch.zeros_like(outputs.y), None, target.to(dtype))
        reasoned = model.reason(context.to(dtype), mask, 2)
    outputs.loss.backward()
    assert outputs.loss.dtype == outputs.halt_probability.dtype == torch.float32
    assert outputs.y.dtype == outputs.prediction.dtype == reasoned.prediction.dtype == weights
    assert (outputs.prediction - expected.prediction).norm() < 0.15 * expected.prediction.norm()
    gradients = [torch.cat([p.grad.flatten().double() for p in m.parameters()]) for m in (model, exact)]
    assert cosine_similarity(*gradients, dim=0) > 0.9
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


# --- Initial weights, mistakes ---


def test_initial_weights():
    torch.manual_seed(0)
    model = SequenceTRM(SequenceTRMConfig())
    assert model.reasoning_token.std().item() == pytest.approx(0.02, rel=0.2)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name != "halt_head.weight":
            assert parameter.std().item() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.1), name
    outputs = model(torch.randn(2, 20, 256))
    assert (outputs.halt_logits == 0).all() and 0.3 < outputs.prediction.std() < 3
    assert 1e6 < model.num_parameters() < 2.5e6
    late = SequenceTRM(SequenceTRMConfig(hidden_size=16, halt_bias=-5.0))
    assert (late(torch.randn(2, 20, 16)).halt_logits == -5).all()
    published = SequenceTRM(SequenceTRMConfig(block_style="llm_trm"))
    assert (published.output_norm.weight == 1).all() and not published.net.layers[0].mlp[0].bias.any()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"n_latent_steps": 0}, "n_latent_steps must be at least 1"),
        ({"n_deep_recursions": -1}, "n_deep_recursions must be at least 1, got -1"),
        ({"hidden_size": 36}, "hidden_size=36 must be a multiple of 16 for n_heads=8 in the 'trm' style"),
        ({"hidden_size": 36, "block_style": "llm_trm"}, "multiple of 8 for n_heads=8 in the 'llm_trm' style"),
        ({"block_style": "hrm"}, "block_style must be 'trm' or 'llm_trm', got 'hrm'"),
        ({"halt_loss": "l1"}, "halt_loss must be 'bce' or 'mse', got 'l1'"),
        ({"n_trained_recursions": 0}, "n_trained_recursions must be at least 1, got 0"),
        ({"max_free_steps": -1}, "max_free_steps must be 0 or more, got -1"),
        ({"free_steps_probability": 1.5}, "free_steps_probability must be between 0 and 1, got 1.5"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_impossible_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        SequenceTRMConfig(**fields)


def test_wrong_calls(context, target):
    model = make_trm()
    with pytest.raises(ValueError, match=r"hidden_size=8.*\(3, 7, 7\)"):
        model(context[..., :7])
    with pytest.raises(ValueError, match=r"mask.*\(3, 7\).*\(3, 8\)"):
        model(context, torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"\by\b.*\(3, 8, 8\).*\(3, 7, 8\)"):
        model(context, y=context)
    with pytest.raises(ValueError, match=r"target.*\(3, 8\).*\(1, 8\)"):
        model(context, target=target[:1])
    for arguments, message in (
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"num_trajectories": 0}, "num_trajectories must be at least 1, got 0"),
        ({"noise_std": -1.0}, "noise_std must not be negative, got -1.0"),
        ({"convergence_threshold": -1.0}, "convergence_threshold must not be negative, got -1.0"),
        ({"select_by": "loss"}, "select_by must be 'halt' or 'residual', got 'loss'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reason(context, **arguments)


# --- Checkpoints ---


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_alone(context, tmp_path, style, dtype):
    model = make_trm(style, dtype=dtype, halt_loss="mse", n_supervision_steps=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is SequenceTRM and loaded.dtype == dtype and not loaded.training
    assert loaded.config.to_diff_dict().items() >= {"n_supervision_steps": 3, "halt_loss": "mse"}.items()
    assert torch.equal(loaded(context).prediction, model(context).prediction)


IN_A_PROCESS_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["llada_trm_hf"] = None
import torch
from transformers import AutoModel

torch.set_num_threads(1)
context, outputs = torch.load("context.pt", weights_only=True), {}
for folder in ("trm", "llm_trm", "compressor"):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert "llada_trm_hf" not in type(model).__module__.split("."), type(model).__module__
    model.save_pretrained(folder + " again")
    again = AutoModel.from_pretrained(folder + " again", trust_remote_code=True)
    for name, model in ((folder, model), (folder + " again", again)):
        outputs[name] = (model(context).reconstructed if "comp" in name else model.reason(context).prediction).detach()
torch.save(outputs, "outputs.pt")
"""


def test_loads_where_the_package_is_not_installed(context, tmp_path):
    models = {style: make_trm(style, dtype=torch.float32) for style in STYLES}
    models["compressor"] = DimensionCompressor(DimensionCompressorConfig(hidden_size=WIDTH, compressed_size=3))
    for folder, model in models.items():
        model.save_pretrained(tmp_path / folder)
    context = context.float()
    torch.save(context, tmp_path / "context.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run_program(
        [sys.executable, "-c", IN_A_PROCESS_WITHOUT_THE_PACKAGE],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert len(outputs) == 6
    for name, found in outputs.items():
        model = models[name.removesuffix(" again")]
        expected = model(context).reconstructed if "comp" in name else model.reason(context).prediction
        torch.testing.assert_close(found, expected.detach())


def test_packing():
    lengths = torch.tensor([5, 1, 9, 8, 4, 9])
    packed = PackedSequences.of(lengths)
    assert [(group.num_rows, group.length) for group in packed.groups] == [(1, 1), (2, 5), (3, 9)]
    tokens = [(b, i) for b in (1, 4, 0, 3, 2, 5) for i in range(lengths[b])]  # the shortest first
    assert list(zip(packed.row.tolist(), packed.position.tolist())) == tokens
    assert [tokens[i] for i in packed.last.tolist()] == [(b, n - 1) for b, n in enumerate(lengths.tolist())]
    numbers = torch.arange(len(tokens))
    for group, own in zip(packed.groups, numbers.split([group.num_tokens for group in packed.groups])):
        rows = group.unpack(own + 1)
        assert rows.shape == (group.num_rows, group.length)
        real = rows > 0 if group.key_mask is None else group.key_mask[:, 0, 0]
        assert torch.equal(rows[real], own + 1) and not rows[~real].any()
        assert torch.equal(group.pack(rows), own + 1)
    kept, chosen = packed.keep(torch.tensor([2, 4]))
    assert [tokens[i] for i in chosen.tolist()] == [(4, i) for i in range(4)] + [(2, i) for i in range(9)]
    assert kept.lengths.tolist() == [9, 4]

"""The slot refiner against its equations written plainly, one row at a time, with attention spelled out."""

import json

import pytest
import torch
from conftest import randomise
from plain_refiners import MASKS, fix_depth, rotated, way
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, gelu, layer_norm, linear
from transformers import AutoModel

from llada_trm_hf.models import SlotTRMRefiner, SlotTRMRefinerConfig

WIDTH, LENGTH, CHUNK = 16, 11, 3


def make_refiner(dtype=torch.float64, **config):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_expansion": 2}
    defaults = {
        "hidden_size": WIDTH,
        "chunk_size": CHUNK,
        "convergence_threshold": 0.0135 if config.get("recall") else 0.0375,
        "delta_scale": 1.0,
        **sizes,
    }
    refiner = SlotTRMRefiner(SlotTRMRefinerConfig(**defaults | config)).eval()
    randomise(refiner)
    return refiner.to(dtype)


@pytest.fixture
def states():
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rms_norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def block(config, weights, x):
    """The output of a transformer block for `x` `[T, D]`, and its heads before the output projection."""
    normed = rms_norm(x, weights["attention_norm.weight"])
    split = (len(x), config.num_attention_heads, -1)
    query, key, value = (linear(normed, weights[f"self_attn.{name}_proj.weight"]).view(split) for name in "qkv")
    scores = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / query.shape[-1] ** 0.5
    heads = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
    x = x + linear(heads, weights["self_attn.o_proj.weight"])
    hidden = gelu(linear(rms_norm(x, weights["mlp_norm.weight"]), weights["mlp.0.weight"], weights["mlp.0.bias"]))
    return x + linear(hidden, weights["mlp.2.weight"], weights["mlp.2.bias"]), heads


def update(config, weights, slots):
    """The update of `[T, D]` and the tokens' confidence `[T]`, from the four raw slots."""
    ready = {}
    for i, (name, slot) in enumerate(slots.items()):
        slot = layer_norm(
            slot, slot.shape[-1:], weights[f"slots.norms.{name}.weight"], weights[f"slots.norms.{name}.bias"]
        )
        ready[name] = slot * weights["slots.gates"][i].sigmoid() if config.use_gating else slot
    dense = lambda name, x: linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])  # noqa: E731
    confidence = dense("token_confidence.2", gelu(dense("token_confidence.0", ready["confidence"]))).sigmoid()
    delta = dense("delta.2", dense("delta.0", torch.cat(list(ready.values()), dim=-1)).tanh())
    return (delta * confidence * config.delta_scale).clamp(-0.5, 0.5), confidence[:, 0]


def reference(refiner, hidden_states, mask=None, active=None, max_steps=None, free_steps=0):
    """The result, and for each row and chunk its confidence, steps and similarities, from the specification."""
    config, weights = refiner.config, dict(refiner.named_parameters())
    max_steps = config.max_recursive_steps if max_steps is None else max_steps
    batch, length, _ = hidden_states.shape
    num_chunks = -(-length // config.chunk_size)
    result = []
    confidence, num_steps = torch.ones(batch, num_chunks).double(), torch.zeros(batch, num_chunks).long()
    curves = [[[] for _ in range(num_chunks)] for _ in range(batch)]
    for b in range(batch):
        columns = [i for i in range(length) if mask is None or mask[b, i]]
        chunks = {
            n: range(n * config.chunk_size, min((n + 1) * config.chunk_size, len(columns))) for n in range(num_chunks)
        }
        running = {n for n in chunks if len(chunks[n]) and (active is None or active[b, n])}
        refined = torch.tensor([i // config.chunk_size in running for i in range(len(columns))])[:, None]
        came = hidden_states[b, columns]
        x, previous = came, None
        for step in range(max_steps):
            if step == free_steps:
                x = torch.where(refined, x.detach(), came) if step else x
            h, heads = x + linear(came, weights["recall.weight"]) if config.recall else x, []
            for i in range(config.num_hidden_layers):
                prefix = f"layers.{i}."
                of_layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
                h, own_heads = block(config, of_layer, h)
                heads.append(own_heads)
            context = sum(heads) / len(heads)
            project = lambda name, x: linear(x, weights[f"slots.projections.{name}.weight"])  # noqa: E731
            slots = {name: project(name, context) for name in ("context", "reasoning", "refinement")}
            slots["confidence"] = project("confidence", h)
            projected = slots["refinement"]
            if previous is not None:
                slots["refinement"] = projected - previous.detach()
            previous = projected
            change, token_confidence = update(config, weights, slots)
            for n in sorted(running):
                here = list(chunks[n])
                before = x[here]
                kept = (before + came[here]) / 2 if config.recall else before
                x = x.index_copy(0, torch.tensor(here), kept + change[here])
                num_steps[b, n] += 1
                confidence[b, n] = token_confidence[here].mean()
                similarity = cosine_similarity(before.flatten(), x[here].flatten(), dim=0)
                curves[b][n].append(similarity.item())
                stops = not (config.recall and refiner.training)
                if stops and similarity > 1 - config.convergence_threshold:
                    running.remove(n)
        result.append(hidden_states[b].index_copy(0, torch.tensor(columns), x))
    return torch.stack(result), confidence, num_steps, curves


def some_active():
    return torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) < 0.6


@pytest.mark.parametrize(
    "config",
    [{}, {"recall": True}, {"use_gating": False}, {"chunk_size": 4, "context_slot_size": 3}],
    ids=str,
)
@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("padding", MASKS)
def test_equals_the_equations(states, padding, subset, config):
    refiner, mask = make_refiner(**config), MASKS[padding]
    active = some_active()[:, : -(-LENGTH // refiner.config.chunk_size)] if subset else None
    outputs = refiner(states, active, mask, output_statistics=True)
    result, confidence, num_steps, curves = reference(refiner, states, mask, active)
    torch.testing.assert_close(outputs.hidden_states, result)
    torch.testing.assert_close(outputs.confidence, confidence.float())
    assert torch.equal(outputs.num_steps, num_steps)
    similarity = outputs.statistics["similarity"]
    assert similarity.shape == (*num_steps.shape, 4)
    for b, row in enumerate(curves):
        for n, curve in enumerate(row):
            expected = torch.tensor([*curve, *[float("nan")] * (4 - len(curve))])
            torch.testing.assert_close(similarity[b, n], expected, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("recall", [True, False])
def test_chunks_converge_after_different_numbers_of_steps_and_the_clamp_acts(states, recall):
    """What makes the test above worth something."""
    refiner = make_refiner(recall=recall)
    assert reference(refiner, states)[2].unique().tolist() == ([2, 3, 4] if recall else [1, 2, 3, 4])
    change = (refiner(states, max_steps=1).hidden_states - states).abs()
    at_the_limit = (change - 0.5).abs() < 1e-12
    assert change.max() < 0.5 + 1e-12 and 0.1 < at_the_limit.float().mean() < 0.9


@way
def test_gradients_equal_those_of_the_equations(states, monkeypatch, recall, free_steps):
    refiner, mask, depth = make_refiner(recall=recall), MASKS["holes"], {}
    if free_steps is not None:
        refiner.train()
        fix_depth(monkeypatch, free_steps)
        depth = {"max_steps": free_steps + 2, "free_steps": free_steps}
    weight = torch.randn_like(states)
    leaves = [states.clone().requires_grad_() for _ in range(2)]
    outputs = refiner(leaves[0], some_active(), mask, output_step_hidden_states=True)
    if free_steps is not None:
        assert len(outputs.step_hidden_states) == 2 and outputs.num_steps.unique().tolist() == [0, free_steps + 2]
    ((outputs.hidden_states * weight).sum() + outputs.confidence.double().square().sum()).backward()
    found = {name: parameter.grad for name, parameter in refiner.named_parameters()}
    refiner.zero_grad(set_to_none=True)
    result, confidence, _, _ = reference(refiner, leaves[1], mask, some_active(), **depth)
    torch.testing.assert_close(outputs.hidden_states, result)
    ((result * weight).sum() + confidence.square().sum()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-5)
    for name, parameter in refiner.named_parameters():
        assert found[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("padding", MASKS)
def test_inactive_chunks_are_untouched(states, padding):
    mask, active = MASKS[padding], some_active()
    outputs = make_refiner()(states, active, mask)
    real = torch.ones(3, LENGTH).bool() if mask is None else mask.bool()
    chunk = ((real.long().cumsum(-1) - 1) // CHUNK).clamp(min=0)
    expected = real & active.gather(1, chunk)
    assert torch.equal((outputs.hidden_states != states).any(-1), expected)  # bit for bit
    assert (outputs.num_steps[~active] == 0).all() and (outputs.confidence[~active] == 1).all()
    assert ((outputs.confidence[outputs.num_steps > 0] > 0) & (outputs.confidence[outputs.num_steps > 0] < 1)).all()


def test_chunks_inform_each_other(states):
    """Inactive chunks are read, though not written."""
    refiner, active = make_refiner(), torch.tensor([[False, True, False, False]] * 3)
    changed = states.clone()
    changed[:, -1] += 1  # in the last, partial chunk
    before, after = (refiner(x, active).hidden_states[:, CHUNK : 2 * CHUNK] for x in (states, changed))
    assert ((before - after).abs().amax(-1) > 1e-4).all()


def test_nothing_active_costs_no_pass_and_leaves_zero_gradients(states):
    refiner, passes = make_refiner(), []
    refiner.layers[0].register_forward_pre_hook(lambda *args: passes.append(len(args[1][0])))
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    outputs = refiner(states, nothing, output_step_hidden_states=True, output_statistics=True)
    assert torch.equal(outputs.hidden_states, states) and not outputs.num_steps.any() and not passes
    assert (outputs.confidence == 1).all() and outputs.step_hidden_states == ()
    assert set(outputs.statistics) == set(refiner(states, output_statistics=True).statistics)
    outputs.confidence.sum().backward()  # as DDP wants it
    assert all((parameter.grad == 0).all() for parameter in refiner.parameters())


def test_rows_that_have_converged_are_not_computed(states):
    refiner, passes = make_refiner(), []
    refiner.layers[0].register_forward_pre_hook(lambda *args: passes.append(len(args[1][0])))
    active = torch.tensor([[True, False, False, False], [False] * 4, [True] * 4])
    num_steps = refiner(states, active).num_steps
    expected = [(num_steps.amax(-1) > k).sum().item() for k in range(4)]
    assert passes == [count for count in expected if count] and max(passes) == 2 > min(passes)


@pytest.mark.parametrize(
    "attention, padding",
    [
        *((attention, padding) for attention in ("sdpa", "eager") for padding in ("left", "right", "holes")),
        pytest.param("flex_attention", "left", marks=pytest.mark.slow),
    ],
)
def test_padding_and_neighbours_change_nothing(states, attention, padding):
    refiner, mask = make_refiner(dtype=torch.float32), MASKS[padding].bool()
    refiner.set_attn_implementation(attention)
    states = states.float()
    with torch.no_grad():
        outputs = refiner(states, attention_mask=mask)
        with_nan = refiner(states.masked_fill(~mask[..., None], float("nan")), attention_mask=mask)
        assert torch.equal(with_nan.hidden_states[mask], outputs.hidden_states[mask])
        assert torch.equal(with_nan.confidence, outputs.confidence)
        for b in range(3):
            alone = refiner(states[b][mask[b]][None])
            num_chunks = alone.num_steps.shape[1]
            torch.testing.assert_close(outputs.hidden_states[b][mask[b]], alone.hidden_states[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(outputs.confidence[b, :num_chunks], alone.confidence[0], atol=1e-5, rtol=1e-5)
            assert torch.equal(outputs.num_steps[b, :num_chunks], alone.num_steps[0])
            assert not outputs.num_steps[b, num_chunks:].any()


@pytest.mark.parametrize("max_steps", [0, 1, 3, 12])
def test_max_steps(states, max_steps):
    refiner = make_refiner()
    outputs = refiner(states, max_steps=max_steps)
    result, confidence, num_steps, _ = reference(refiner, states, max_steps=max_steps)
    torch.testing.assert_close(outputs.hidden_states, result)
    torch.testing.assert_close(outputs.confidence, confidence.float())
    assert torch.equal(outputs.num_steps, num_steps) and num_steps.max() <= max_steps
    never = make_refiner(convergence_threshold=0.0)(states, max_steps=max_steps)
    assert (never.num_steps == max_steps).all()


def test_states_after_each_step(states):
    refiner, mask = make_refiner(), MASKS["left"]
    outputs = refiner(states, some_active(), mask, output_step_hidden_states=True)
    assert len(outputs.step_hidden_states) == outputs.num_steps.max()
    for step, found in enumerate(outputs.step_hidden_states, start=1):
        torch.testing.assert_close(found, reference(refiner, states, mask, some_active(), max_steps=step)[0])
    assert torch.equal(outputs.step_hidden_states[-1], outputs.hidden_states)
    assert refiner(states).step_hidden_states is None and not refiner(states).statistics


def test_statistics(states):
    """Those of the first step, taken from the parts of the reference; the rest by their meaning."""
    refiner = make_refiner(convergence_threshold=0.0)
    active = some_active()
    outputs = refiner(states, active, output_statistics=True)
    refined = active.repeat_interleave(CHUNK, 1)[:, :LENGTH]
    first = refiner(states, active, max_steps=1, output_statistics=True)
    moved = (first.hidden_states - states).norm(dim=-1)[refined].mean().float()
    torch.testing.assert_close(outputs.statistics["delta_norm"][0], moved)
    torch.testing.assert_close(first.statistics["delta_norm"][0], moved)
    sizes = active.long() * torch.tensor([3, 3, 3, 2])  # a chunk counts with its tokens
    confidence = (first.confidence * sizes).sum() / sizes.sum()
    torch.testing.assert_close(outputs.statistics["token_confidence"][0], confidence)
    for name, gate in zip(("context", "reasoning", "refinement", "confidence"), refiner.slots.gates):
        torch.testing.assert_close(outputs.statistics[f"gate_{name}"], gate.detach().sigmoid())
        assert outputs.statistics[f"slot_norm_{name}"].shape == (4,)
        assert not outputs.statistics[f"slot_norm_{name}"].requires_grad
    # The refinement slot is what has changed: large in the first step, small once little changes.
    refiner.config.delta_scale = 1e-4
    norms = refiner(states, output_statistics=True).statistics["slot_norm_refinement"]
    assert norms[0] > 100 * norms[1:].max()


def test_orthogonality_compares_the_projections_of_the_same_input(states):
    refiner = make_refiner()
    weights = {name: layer.weight.detach() for name, layer in refiner.slots.projections.items()}
    found = refiner(states, output_statistics=True)
    expected = []
    for a, b in (("context", "reasoning"), ("context", "refinement"), ("reasoning", "refinement")):
        cosines = torch.stack([torch.stack([cosine_similarity(x, y, dim=0) for y in weights[b]]) for x in weights[a]])
        expected.append(cosines.square().sum() / min(cosines.shape))
        torch.testing.assert_close(found.statistics[f"orthogonality_{a}_{b}"], expected[-1])
    torch.testing.assert_close(found.orthogonality_loss, torch.stack(expected).mean())
    found.orthogonality_loss.backward()
    reached = {name for name, parameter in refiner.named_parameters() if parameter.grad is not None}
    assert reached == {f"slots.projections.{name}.weight" for name in ("context", "reasoning", "refinement")}
    # Orthogonal projections, as they fit with the default sizes, have no loss.
    with torch.no_grad():
        parts = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0].split([8, 4, 4])
        for name, part in zip(("context", "reasoning", "refinement"), parts):
            refiner.slots.projections[name].weight.copy_(part)
    assert refiner(states, output_statistics=True).orthogonality_loss < 1e-12


def test_untrained_refiner_hardly_changes_anything(states):
    torch.manual_seed(0)
    refiner = SlotTRMRefiner(SlotTRMRefinerConfig(hidden_size=WIDTH, chunk_size=CHUNK, preset="tiny")).double()
    outputs = refiner(states)
    assert 0 < (outputs.hidden_states - states).abs().max() < 0.01
    (outputs.hidden_states.sum() + outputs.confidence.sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in refiner.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing(states):
    refiner, runs = make_refiner(dropout=0.2).train(), []
    refiner.layers[0].self_attn.register_forward_pre_hook(lambda *args: runs.append(1))

    def gradients():
        torch.manual_seed(0)
        refiner.zero_grad()
        refiner(states, max_steps=2).hidden_states.sum().backward()
        return [parameter.grad.clone() for parameter in refiner.parameters()]

    expected, before = gradients(), len(runs)
    refiner.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected)
    assert before == 2 and len(runs) == 2 + 4


# --- Dtypes ---


@pytest.mark.parametrize("refiner_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "states_dtype, autocast",
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, True),
        (torch.bfloat16, True),
    ],
)
def test_any_mix_of_dtypes(states, refiner_dtype, states_dtype, autocast):
    expected = reference(make_refiner(convergence_threshold=0.0), states, MASKS["left"], max_steps=2)[0]
    for threshold in (0.0, 0.0375):
        refiner = make_refiner(convergence_threshold=threshold, dtype=refiner_dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = refiner(
                states.to(states_dtype), None, MASKS["left"], 2, output_step_hidden_states=True, output_statistics=True
            )
        assert outputs.hidden_states.dtype == states_dtype and outputs.confidence.dtype == torch.float32
        (outputs.hidden_states.float().sum() + outputs.confidence.sum() + outputs.orthogonality_loss).backward()
        assert all(parameter.grad.isfinite().all() for parameter in refiner.parameters())
        if threshold == 0:
            moved = (expected - states).norm()
            assert (outputs.hidden_states - expected).norm() < 0.2 * moved


# --- Mistakes ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preset": "huge"}, "preset must be one of tiny, base, large, got 'huge'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"max_recursive_steps": 0}, "max_recursive_steps must be at least 1, got 0"),
        ({"confidence_slot_size": 0}, "confidence_slot_size must be at least 1, got 0"),
        ({"context_slot_size": 57}, r"slots are 97 wide together .* more than 1.5 \* hidden_size = 96"),
        ({"num_attention_heads": 3}, "hidden_size=64 must be a multiple of 6"),
        ({"num_attention_heads": 64}, "hidden_size=64 must be a multiple of 128"),
        ({"delta_scale": 0.0}, "delta_scale must be above 0, got 0.0"),
        ({"convergence_threshold": -0.1}, "convergence_threshold must be between 0 and 2"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
    ids=str,
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        SlotTRMRefinerConfig(**{"hidden_size": 64, **change})


def test_wrong_shapes(states):
    refiner = make_refiner()
    with pytest.raises(ValueError, match=r"\b15\b.*hidden_size=16.*hidden_size=15"):
        refiner(states[..., :15])
    with pytest.raises(ValueError, match=r"active_chunks.*\(3, 4\).*\b11\b.*\b3\b"):
        refiner(states, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attention_mask.*\(3, 10\).*\(3, 11\)"):
        refiner(states, attention_mask=torch.ones(3, 10))


def test_presets_and_slot_sizes():
    found = {}
    for preset in ("tiny", "base", "large"):
        config = SlotTRMRefinerConfig(hidden_size=256, preset=preset)
        found[preset] = (config.num_hidden_layers, config.num_attention_heads, config.ffn_expansion)
    assert found == {"tiny": (2, 4, 2), "base": (4, 8, 4), "large": (6, 16, 4)}
    assert config.slot_sizes == {"context": 128, "reasoning": 64, "refinement": 64, "confidence": 32}
    assert (config.max_recursive_steps, config.delta_scale, config.use_gating) == (4, 0.1, True)
    own = SlotTRMRefinerConfig(hidden_size=256, preset="tiny", num_hidden_layers=3, context_slot_size=224)
    assert (own.num_hidden_layers, own.num_attention_heads, own.slot_sizes["context"]) == (3, 4, 224)


# --- Checkpoints ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("auto_class", [AutoModel, SlotTRMRefiner])
def test_loads_alone(states, tmp_path, dtype, auto_class):
    refiner = make_refiner(dtype=dtype, context_slot_size=5)
    refiner.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is SlotTRMRefiner and loaded.dtype == dtype and not loaded.training
    assert loaded.config.context_slot_size == 5 and loaded.config.num_hidden_layers == 2
    for name, parameter in refiner.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    hidden = states.to(dtype)
    torch.testing.assert_close(loaded(hidden).hidden_states, refiner(hidden).hidden_states)
    assert "modeling_refiner.py" in {file.name for file in tmp_path.iterdir()}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "slot_trm_refiner.SlotTRMRefinerConfig",
        "AutoModel": "slot_trm_refiner.SlotTRMRefiner",
    }


def test_missing_tensor(tmp_path):
    make_refiner(dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["slots.gates"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1\b.*slots\.gates"):
        AutoModel.from_pretrained(tmp_path)

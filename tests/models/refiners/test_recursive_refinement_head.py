"""The recursive refinement head against a plain loop over chunks and steps."""

import copy
import json

import pytest
import torch
from conftest import randomise
from plain_refiners import MASKS, fix_depth, way
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, gelu, layer_norm, linear, silu
from transformers import AutoModel

from llada_trm_hf.models import RecursiveRefinementHead, RecursiveRefinementHeadConfig

WIDTH, LENGTH = 6, 11


def make_head(chunk_size=3, convergence_threshold=0.005, dtype=torch.float64, **config):
    config.setdefault("step_size", 0.5 if config.get("recall") else 0.1)
    head = RecursiveRefinementHead(
        RecursiveRefinementHeadConfig(
            hidden_size=WIDTH,
            chunk_size=chunk_size,
            head_hidden_size=10,
            convergence_threshold=convergence_threshold,
            **config,
        )
    ).eval()
    randomise(head)
    return head.to(dtype)


@pytest.fixture
def states():
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reference(head, hidden_states, mask=None, active=None, max_steps=None, free_steps=0):
    """The result, confidence and steps of every chunk, in the words of the specification."""
    config, weights = head.config, dict(head.named_parameters())
    max_steps = config.max_recursive_steps if max_steps is None else max_steps

    def dense(name, x):
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, x):
        return layer_norm(x, x.shape, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def encode(chunk, came):
        def code(chunk, recalled):
            return gelu(norm("encoder.1", dense("encoder.0", chunk.flatten()) + recalled))

        return code(chunk, dense("recall", code(came, 0.0)) if config.recall else 0.0)

    def update(code):
        for i in range(config.head_layers):
            x = norm(f"layers.{i}.norm", code)
            x = silu(dense(f"layers.{i}.gate_proj", x)) * dense(f"layers.{i}.up_proj", x)
            code = code + dense(f"layers.{i}.down_proj", x)
        return dense("projector", code).view(config.chunk_size, -1)

    batch, length, _ = hidden_states.shape
    num_chunks = -(-length // config.chunk_size)
    result, confidence, num_steps, curves = list(hidden_states.unbind(0)), {}, {}, {}
    for b in range(batch):
        columns = [i for i in range(length) if mask is None or mask[b, i]]
        for n in range(num_chunks):
            here = columns[n * config.chunk_size : (n + 1) * config.chunk_size]
            confidence[b, n], num_steps[b, n], curves[b, n] = torch.ones(()), 0, []
            if not here or (active is not None and not active[b, n]):
                continue
            missing = hidden_states.new_zeros(config.chunk_size - len(here), hidden_states.shape[-1])
            chunk = came = torch.cat([hidden_states[b, here], missing])
            previous = None
            for step in range(max_steps):
                if step == free_steps:
                    chunk = chunk.detach() if step else chunk
                code = encode(chunk, came)
                if previous is not None:
                    curves[b, n].append(cosine_similarity(code, previous, dim=0).item())
                    stops = not (config.recall and head.training)
                    if stops and curves[b, n][-1] > 1 - config.convergence_threshold:
                        break
                chunk = (came if config.recall else chunk) + config.step_size * update(code)
                num_steps[b, n] += 1
                previous = code
            hidden = gelu(dense("confidence.0", encode(chunk, came)))
            confidence[b, n] = dense("confidence.2", hidden).sigmoid().squeeze()
            result[b] = result[b].index_copy(0, torch.tensor(here), chunk[: len(here)])

    def table(values):
        return torch.stack(
            [torch.stack([torch.as_tensor(values[b, n]) for n in range(num_chunks)]) for b in range(batch)]
        )

    return torch.stack(result), table(confidence), table(num_steps), curves


def some_active(mask, chunk_size):
    return torch.rand(3, -(-LENGTH // chunk_size), generator=torch.Generator().manual_seed(3)) < 0.6


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 11, 16])
@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("recall", [True, False], ids=["recall", "first version"])
@pytest.mark.parametrize("padding", MASKS)
def test_equals_plain_loop(states, padding, recall, subset, chunk_size):
    head, mask = make_head(chunk_size, recall=recall), MASKS[padding]
    active = some_active(mask, chunk_size) if subset else None
    outputs = head(states, active, mask, output_statistics=True)
    result, confidence, num_steps, curves = reference(head, states, mask, active)
    torch.testing.assert_close(outputs.hidden_states, result)
    torch.testing.assert_close(outputs.confidence, confidence.float())
    assert torch.equal(outputs.num_steps, num_steps)
    similarity = outputs.statistics["similarity"]
    assert similarity.shape == (*num_steps.shape, 8)
    for (b, n), curve in curves.items():
        # Nothing to compare with in the first step, nothing to report after the last.
        expected = torch.tensor([float("nan"), *curve, *[float("nan")] * (7 - len(curve))])
        torch.testing.assert_close(similarity[b, n], expected, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("recall", [True, False])
def test_chunks_converge_after_different_numbers_of_steps(states, recall):
    """What makes the test above worth something."""
    num_steps = reference(make_head(recall=recall), states)[2]
    assert len(num_steps.unique()) > 3 and num_steps.max() == 8


@way
def test_gradients_equal_those_of_the_plain_loop(states, monkeypatch, recall, free_steps):
    head, mask, depth = make_head(recall=recall), MASKS["holes"], {}
    if free_steps is not None:
        head.train()
        fix_depth(monkeypatch, free_steps)
        depth = {"max_steps": free_steps + 2, "free_steps": free_steps}
    weight = torch.randn_like(states)
    leaves = [states.clone().requires_grad_() for _ in range(2)]
    outputs = head(leaves[0], some_active(mask, 3), mask, output_step_hidden_states=True)
    if free_steps is not None:
        assert len(outputs.step_hidden_states) == 2 and outputs.num_steps.unique().tolist() == [0, free_steps + 2]
    ((outputs.hidden_states * weight).sum() + outputs.confidence.double().square().sum()).backward()
    found = {name: parameter.grad for name, parameter in head.named_parameters()}
    head.zero_grad(set_to_none=True)
    result, confidence, _, _ = reference(head, leaves[1], mask, some_active(mask, 3), **depth)
    torch.testing.assert_close(outputs.hidden_states, result)
    ((result * weight).sum() + confidence.square().sum()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)
    for name, parameter in head.named_parameters():
        assert found[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_confidence_reaches_its_scorer_and_states_the_rest(states):
    head = make_head()
    head(states).hidden_states.sum().backward()
    unreached = {name for name, parameter in head.named_parameters() if parameter.grad is None}
    assert unreached == {f"confidence.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    head(states).confidence.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in head.parameters())


@pytest.mark.parametrize("padding", MASKS)
def test_inactive_chunks_are_untouched(states, padding):
    mask = MASKS[padding]
    active = some_active(mask, 3)
    outputs = make_head()(states, active, mask)
    changed = (outputs.hidden_states != states).any(-1)
    real = torch.ones(3, LENGTH).bool() if mask is None else mask.bool()
    chunk = (real.long().cumsum(-1) - 1) // 3
    expected = real & active.gather(1, chunk.clamp(min=0))
    assert torch.equal(changed, expected)  # bit for bit
    assert (outputs.num_steps[~active] == 0).all() and (outputs.confidence[~active] == 1).all()
    assert ((outputs.confidence >= 0) & (outputs.confidence <= 1)).all()
    nothing = make_head()(
        states, torch.zeros_like(active), mask, output_step_hidden_states=True, output_statistics=True
    )
    assert torch.equal(nothing.hidden_states, states) and not nothing.num_steps.any()


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_and_neighbours_change_nothing(states, padding):
    head, mask = make_head(), MASKS[padding].bool()
    outputs = head(states, attention_mask=mask)
    filled = states.masked_fill(~mask[..., None], float("nan"))
    with_nan = head(filled, attention_mask=mask)
    assert torch.equal(with_nan.hidden_states[mask], outputs.hidden_states[mask])
    assert torch.equal(with_nan.confidence, outputs.confidence)
    for b in range(3):
        alone = head(states[b][mask[b]][None])
        num_chunks = alone.num_steps.shape[1]
        torch.testing.assert_close(outputs.hidden_states[b][mask[b]], alone.hidden_states[0])
        torch.testing.assert_close(outputs.confidence[b, :num_chunks], alone.confidence[0])
        assert torch.equal(outputs.num_steps[b, :num_chunks], alone.num_steps[0])
        assert not outputs.num_steps[b, num_chunks:].any()


@pytest.mark.parametrize("max_steps", [0, 1, 3, 12])
def test_max_steps(states, max_steps):
    head = make_head()
    outputs = head(states, max_steps=max_steps)
    result, confidence, num_steps, _ = reference(head, states, max_steps=max_steps)
    torch.testing.assert_close(outputs.hidden_states, result)
    torch.testing.assert_close(outputs.confidence, confidence.float())
    assert torch.equal(outputs.num_steps, num_steps) and num_steps.max() <= max_steps
    never = make_head(convergence_threshold=0.0)(states, max_steps=max_steps)
    assert (never.num_steps == max_steps).all()


def test_states_after_each_step(states):
    head, mask = make_head(), MASKS["left"]
    outputs = head(states, attention_mask=mask, output_step_hidden_states=True)
    assert len(outputs.step_hidden_states) == outputs.num_steps.max()
    for step, found in enumerate(outputs.step_hidden_states, start=1):
        # A chunk that has converged keeps its result.
        torch.testing.assert_close(found, reference(head, states, mask, max_steps=step)[0])
    assert torch.equal(outputs.step_hidden_states[-1], outputs.hidden_states)
    assert head(states).step_hidden_states is None and not head(states).statistics


def test_untrained_head_hardly_changes_anything(states):
    torch.manual_seed(0)
    head = RecursiveRefinementHead(RecursiveRefinementHeadConfig(hidden_size=WIDTH, chunk_size=3)).double()
    outputs = head(states)
    assert 0 < (outputs.hidden_states - states).abs().max() < 0.01


def test_size_at_the_defaults():
    with torch.device("meta"):
        head = RecursiveRefinementHead(RecursiveRefinementHeadConfig())
    assert 30e6 < sum(parameter.numel() for parameter in head.parameters()) < 50e6


# --- Dtypes ---


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
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
def test_any_mix_of_dtypes(states, head_dtype, states_dtype, autocast):
    expected, _, _, _ = reference(make_head(convergence_threshold=0.0), states, max_steps=3)
    for threshold in (0.0, 0.005):
        head = make_head(convergence_threshold=threshold, dtype=head_dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = head(states.to(states_dtype), max_steps=3, output_step_hidden_states=True)
        assert outputs.hidden_states.dtype == states_dtype and outputs.confidence.dtype == torch.float32
        (outputs.hidden_states.float().sum() + outputs.confidence.sum()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
        if threshold == 0:
            moved = (expected - states).norm()
            assert (outputs.hidden_states - expected).norm() < 0.1 * moved


# --- Mistakes ---


def test_wrong_hidden_size(states):
    with pytest.raises(ValueError, match=r"\b5\b.*hidden_size=6.*hidden_size=5"):
        make_head()(states[..., :5])


@pytest.mark.parametrize("shape", [(3, 3), (1, 4), (3, LENGTH)])
def test_wrong_active_chunks(states, shape):
    with pytest.raises(ValueError, match=r"active_chunks.*\(3, 4\).*\b11\b.*\b3\b"):
        make_head()(states, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    "name", ["hidden_size", "chunk_size", "head_hidden_size", "head_layers", "max_recursive_steps"]
)
def test_sizes_of_zero(name):
    with pytest.raises(ValueError, match=rf"{name}.*\b1\b.*\b0\b"):
        RecursiveRefinementHeadConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"convergence_threshold.*\b0\b.*\b2\b"):
        RecursiveRefinementHeadConfig(convergence_threshold=-0.1)


# --- Checkpoints ---


@pytest.fixture
def checkpoint(tmp_path):
    head = make_head(dtype=torch.float32)
    head.save_pretrained(tmp_path)
    return head, tmp_path, tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("auto_class", [AutoModel, RecursiveRefinementHead])
def test_loads_alone(states, tmp_path, dtype, auto_class):
    head = make_head(dtype=dtype)
    head.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is RecursiveRefinementHead and loaded.dtype == dtype and not loaded.training
    assert loaded.config.to_diff_dict().items() >= {"hidden_size": WIDTH, "head_hidden_size": 10}.items()
    for name, parameter in head.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    hidden = states.to(dtype)
    torch.testing.assert_close(loaded(hidden).hidden_states, head(hidden).hidden_states)


@pytest.mark.parametrize("auto_class", [AutoModel, RecursiveRefinementHead])
def test_missing_tensor(checkpoint, auto_class):
    _, folder, file = checkpoint
    tensors = load_file(file)
    del tensors["projector.weight"], tensors["layers.1.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2\b.*layers\.1\.up_proj\.weight.*projector\.weight"):
        auto_class.from_pretrained(folder)


def test_misshapen_tensor(checkpoint):
    _, folder, file = checkpoint
    tensors = load_file(file)
    tensors["projector.bias"] = torch.zeros(7)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match=r"projector\.bias"):
        RecursiveRefinementHead.from_pretrained(folder)


def test_checkpoint_of_another_size(checkpoint):
    _, folder, _ = checkpoint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_hidden_size": 12}))
    with pytest.raises((RuntimeError, ValueError), match=r"encoder\.0\.weight"):
        RecursiveRefinementHead.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -8])
def test_truncated_file(checkpoint, keep):
    _, folder, file = checkpoint
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(Exception, match=r"(?i)safetensors|header|incomplete|corrupt"):
        RecursiveRefinementHead.from_pretrained(folder)


def test_saving_leaves_the_model_as_it_was(states, tmp_path):
    head = make_head()
    before = copy.deepcopy(head.state_dict())
    head.save_pretrained(tmp_path)
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in before.items())

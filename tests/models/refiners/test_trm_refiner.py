"""The TRM refiner against its equations written plainly, one row at a time, with attention spelled out."""

import copy

import pytest
import torch
from conftest import randomise
from plain_refiners import MASKS, fix_depth, rotated
from torch.nn.functional import linear, silu

from llada_trm_hf.models import TRMRefiner, TRMRefinerConfig

WIDTH, LENGTH, CHUNK = 12, 11, 3


def make_refiner(dtype=torch.float64, **config):
    sizes = {"hidden_size": WIDTH, "chunk_size": CHUNK, "recursion_size": 16, "num_attention_heads": 4}
    defaults = {"max_recursive_steps": 7, "convergence_threshold": 0.7, "n_latent_steps": 2}
    torch.manual_seed(0)  # of the start vectors
    refiner = TRMRefiner(TRMRefinerConfig(**sizes | defaults | config)).eval()
    randomise(refiner)
    return refiner.to(dtype)


@pytest.fixture
def states():
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def network(config, weights, x):
    """f of `x` `[T, w]`: blocks with the norm after each part."""
    for i in range(config.num_hidden_layers):
        dense = lambda name, x, i=i: linear(x, weights[f"layers.{i}.{name}.weight"])  # noqa: E731
        split = (len(x), config.num_attention_heads, -1)
        query, key, value = (dense(f"self_attn.{name}_proj", x).view(split) for name in "qkv")
        scores = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / query.shape[-1] ** 0.5
        heads = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
        x = norm(x + dense("self_attn.o_proj", heads))
        x = norm(x + dense("down_proj", silu(dense("gate_proj", x)) * dense("up_proj", x)))
    return x


def reference(refiner, hidden_states, mask=None, active=None, max_steps=None, free_steps=0):
    """The result, and for each row and chunk its confidence, steps, residuals, from the specification."""
    config, weights = refiner.config, dict(refiner.named_parameters())
    max_steps = config.max_recursive_steps if max_steps is None else max_steps
    batch, length, _ = hidden_states.shape
    num_chunks = -(-length // config.chunk_size)
    result = []
    confidence, num_steps = torch.ones(batch, num_chunks).double(), torch.zeros(batch, num_chunks).long()
    residuals = torch.full((batch, num_chunks, free_steps + max_steps), torch.nan).double()
    for b in range(batch):
        columns = [i for i in range(length) if mask is None or mask[b, i]]
        chunks = {
            n: range(n * config.chunk_size, min((n + 1) * config.chunk_size, len(columns))) for n in range(num_chunks)
        }
        running = {n for n in chunks if len(chunks[n]) and (active is None or active[b, n])}
        came = hidden_states[b, columns]
        x = linear(norm(came), weights["input_proj.weight"])
        y, z = (weights[name].expand_as(x) for name in ("y_start", "z_start"))
        refined = came
        for step in range(free_steps + max_steps):
            if step == free_steps and free_steps:
                y, z = y.detach(), z.detach()
            before = y
            for _ in range(config.n_latent_steps):
                z = config.damping * z + (1 - config.damping) * network(config, weights, x + y + z)
            y = config.damping * y + (1 - config.damping) * network(config, weights, y + z)
            for n in sorted(running):
                here = list(chunks[n])
                written = came[here] + linear(y[here], weights["output_proj.weight"])
                refined = refined.index_copy(0, torch.tensor(here), written)
                logits = linear(y[here], weights["confidence.weight"], weights["confidence.bias"])
                confidence[b, n] = logits.sigmoid().mean()
                num_steps[b, n] += 1
                residual = (y[here] - before[here]).norm() / y[here].norm()
                residuals[b, n, step] = residual.detach()
                if residual < config.convergence_threshold and not refiner.training:
                    running.remove(n)
        result.append(hidden_states[b].index_copy(0, torch.tensor(columns), refined))
    return torch.stack(result), confidence, num_steps, residuals


def some_active():
    return torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) < 0.6


CONFIGS = [{}, {"num_hidden_layers": 2, "n_latent_steps": 1}, {"damping": 0.3, "chunk_size": 4}]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("padding", MASKS)
def test_equals_the_equations(states, padding, subset, config):
    refiner, mask = make_refiner(**config), MASKS[padding]
    active = some_active()[:, : -(-LENGTH // refiner.config.chunk_size)] if subset else None
    outputs = refiner(states, active, mask, output_statistics=True)
    result, confidence, num_steps, residuals = reference(refiner, states, mask, active)
    torch.testing.assert_close(outputs.hidden_states, result)
    torch.testing.assert_close(outputs.confidence, confidence.float())
    assert torch.equal(outputs.num_steps, num_steps)
    torch.testing.assert_close(outputs.statistics["residual"].double(), residuals, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(outputs.statistics["similarity"].isnan(), residuals.isnan())


def test_chunks_converge_after_different_numbers_of_steps(states):
    """What makes the test above worth something."""
    num_steps = reference(make_refiner(), states)[2]
    assert len(num_steps.unique()) > 2 and num_steps.max() == 7


@pytest.mark.parametrize("free_steps", [0, 3])
def test_gradients_equal_those_of_the_equations(states, monkeypatch, free_steps):
    """In training nothing stops, and steps without gradient come first."""
    refiner, mask = make_refiner().train(), MASKS["holes"]
    fix_depth(monkeypatch, free_steps)
    weight = torch.randn_like(states)
    leaves = [states.clone().requires_grad_() for _ in range(2)]
    outputs = refiner(leaves[0], some_active(), mask)
    assert outputs.num_steps.unique().tolist() == [0, 2 + free_steps]
    ((outputs.hidden_states * weight).sum() + outputs.confidence.double().square().sum()).backward()
    found = {name: parameter.grad for name, parameter in refiner.named_parameters()}
    refiner.zero_grad(set_to_none=True)
    result, confidence, _, _ = reference(refiner, leaves[1], mask, some_active(), max_steps=2, free_steps=free_steps)
    torch.testing.assert_close(outputs.hidden_states, result)
    ((result * weight).sum() + confidence.square().sum()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)
    for name, parameter in refiner.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert found[name].abs().max() > 0 or (free_steps and name in ("y_start", "z_start")), name
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_depth_in_training_is_random(states):
    refiner = make_refiner(trained_steps=3, max_free_steps=5).train()
    torch.manual_seed(0)
    found = []
    for _ in range(200):
        outputs = refiner(states, output_step_hidden_states=True, output_statistics=True)
        assert len(outputs.step_hidden_states) == 3
        found.append(int(outputs.num_steps.max()))
        assert outputs.statistics["residual"].shape[-1] == found[-1]
    assert {*found} == {3, 4, 5, 6, 7, 8}
    assert 70 < found.count(3) < 130  # half of them
    refiner.config.free_steps_probability = 0.0
    assert refiner(states, max_steps=2).num_steps.max() == 2


@pytest.mark.parametrize("padding", MASKS)
def test_inactive_chunks_are_untouched(states, padding):
    mask, active = MASKS[padding], some_active()
    outputs = make_refiner()(states, active, mask)
    real = torch.ones(3, LENGTH).bool() if mask is None else mask.bool()
    chunk = ((real.long().cumsum(-1) - 1) // CHUNK).clamp(min=0)
    expected = real & active.gather(1, chunk)
    assert torch.equal((outputs.hidden_states != states).any(-1), expected)  # bit for bit
    assert (outputs.num_steps[~active] == 0).all() and (outputs.confidence[~active] == 1).all()


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_what_padding_holds_and_where_changes_nothing(states, value):
    refiner, length = make_refiner(), 7
    alone = refiner(states[:, :length])
    for side in (0, 1):
        filling = torch.full((3, LENGTH - length, WIDTH), value, dtype=states.dtype)
        parts, masks = [filling, states[:, :length]], [torch.zeros(3, LENGTH - length), torch.ones(3, length)]
        padded, mask = (torch.cat(x[::-1] if side else x, dim=1) for x in (parts, masks))
        outputs = refiner(padded, attention_mask=mask)
        torch.testing.assert_close(outputs.hidden_states[mask.bool()].view(3, length, -1), alone.hidden_states)
        assert torch.equal(outputs.num_steps[:, :3], alone.num_steps)


def test_rows_are_what_they_are_alone(states):
    refiner = make_refiner()
    together = refiner(states, some_active())
    for row in range(3):
        alone = refiner(states[row : row + 1], some_active()[row : row + 1])
        torch.testing.assert_close(together.hidden_states[row], alone.hidden_states[0])
        assert torch.equal(together.num_steps[row], alone.num_steps[0])


def test_rows_that_have_converged_are_not_computed(states):
    refiner, rows = make_refiner(convergence_threshold=0.7), []
    refiner.layers[0].register_forward_pre_hook(lambda *args: rows.append(len(args[1][0])))
    outputs = refiner(states)
    last = outputs.num_steps.amax(-1)
    assert len(last.unique()) > 1
    calls = refiner.config.n_latent_steps + 1  # of the network in a step
    assert rows[::calls] == [int((last > step).sum()) for step in range(int(last.max()))]


def test_nothing_active_leaves_zero_gradients(states):
    refiner = make_refiner().train()
    outputs = refiner(states, torch.zeros(3, 4, dtype=torch.bool), output_step_hidden_states=True)
    assert torch.equal(outputs.hidden_states, states)
    (outputs.hidden_states.sum() + outputs.confidence.sum()).backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in refiner.parameters())


def test_every_weight_has_a_gradient_with_steps_without(states):
    """`DistributedDataParallel` waits for the start vectors' too, which those steps hide."""
    refiner = make_refiner(free_steps_probability=1.0).train()
    refiner(states).hidden_states.sum().backward()
    assert all(
        parameter.grad is not None for name, parameter in refiner.named_parameters() if "confidence" not in name
    )


def test_the_best_of_several_trajectories(states):
    """Each chunk is that of the trajectory whose last change was the smallest, and one alone has no noise."""
    refiner = make_refiner(noise_std=0.5, num_trajectories=4, convergence_threshold=0.0, max_recursive_steps=3)
    torch.manual_seed(5)
    outputs = refiner(states, output_statistics=True)
    quiet = copy.deepcopy(refiner)
    quiet.config.num_trajectories, quiet.config.noise_std = 1, 0.0
    single = copy.deepcopy(refiner)
    single.config.num_trajectories = 1
    assert torch.equal(single(states).hidden_states, quiet(states).hidden_states)

    # All trajectories, as rows of a batch: the same noise in the same order.
    each, draw = states.repeat_interleave(4, dim=0), torch.randn_like
    torch.manual_seed(5)
    noise = [draw(states.new_empty(12, LENGTH, 16)) for _ in range(3)]
    step, drawn = TRMRefiner.recursion_step, iter(noise)

    class Noisy(TRMRefiner):
        def recursion_step(self, x, y, z, *args):
            return step(self, x, y, z + 0.5 * next(drawn), *args)

    noisy = Noisy(quiet.config).double().eval()
    noisy.load_state_dict(quiet.state_dict())
    all_of_them = noisy(each, output_statistics=True)
    last = all_of_them.statistics["residual"][..., -1].view(3, 4, 4)  # [row, trajectory, chunk]
    best = last.argmin(1)
    assert len(best.unique()) > 2
    for row in range(3):
        for chunk in range(4):
            where = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            expected = all_of_them.hidden_states[row * 4 + best[row, chunk], where]
            torch.testing.assert_close(outputs.hidden_states[row, where], expected)
            found = outputs.statistics["residual"][row, chunk, -1]
            torch.testing.assert_close(found, last[row, best[row, chunk], chunk])


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("recursion_size", 20, "multiple of 8"),
        ("damping", 1.0, "below 1"),
        ("noise_std", -1.0, "0 or more"),
        ("num_trajectories", 2, "noise_std"),
        ("trained_steps", 0, "at least 1"),
        ("max_free_steps", -1, "0 or more"),
        ("free_steps_probability", 1.5, "between 0 and 1"),
        ("convergence_threshold", -0.1, "0 or more"),
        ("n_latent_steps", 0, "at least 1"),
    ],
)
def test_settings_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        TRMRefinerConfig(**{"recursion_size": 16, "num_attention_heads": 4, field: value})


def test_defaults_for_an_8b_backbone():
    """A width of 512, and about a two-hundredth of its parameters."""
    config = TRMRefinerConfig(hidden_size=4096)
    assert (config.recursion_size, config.num_attention_heads, config.intermediate_size) == (512, 8, 1536)
    with torch.device("meta"):
        assert 5e6 < TRMRefiner(config).num_parameters() < 5e7

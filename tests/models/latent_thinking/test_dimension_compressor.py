"""The compressor against recorded numbers of the llm-trm project, an SVD, and plain loops."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from llada_trm_hf.hub import import_legacy
from llada_trm_hf.models import DimensionCompressor, DimensionCompressorConfig
from llada_trm_hf.training.reconstruction_metrics import reconstruction_metrics

WIDTH, RANK = 12, 5


def make_compressor(seed=0, dtype=torch.float64, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "compressed_size": RANK} | config
    return DimensionCompressor(DimensionCompressorConfig(**sizes)).to(dtype).eval()


@pytest.fixture
def states():
    """Hidden states `[6, 9, WIDTH]` with a mean and two large channels, as language models have."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    states = torch.randn(6, 9, WIDTH, generator=generator, dtype=torch.float64) @ mixing + 1
    states[..., 2:4] += torch.tensor([30.0, -20.0], dtype=torch.float64)
    return states


@pytest.fixture
def mask():
    return torch.arange(9) < torch.tensor([9, 4, 7, 1, 9, 5])[:, None]


def left_singular(rows, rank):
    """The best rank-`rank` approximation of `rows` `[N, D]` and the singular values."""
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], s


# --- Golden data ---


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request, llm_trm):
    facts = next(
        facts
        for facts in json.loads((llm_trm / "manifest.json").read_text())["compressors"]
        if facts["checkpoint"] == f"compressor_{request.param}_legacy.pt"
    )
    return import_legacy(llm_trm / facts["checkpoint"]), load_file(llm_trm / facts["golden"]), facts


@pytest.mark.parametrize("dtype, suffix, tolerance", [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-12)])
def test_golden_forward_and_gradient(golden, dtype, suffix, tolerance):
    model, recorded, facts = golden
    model = make_compressor(hidden_size=facts["d_model"], compressed_size=facts["d_compressed"], dtype=dtype)
    model.load_state_dict(golden[0].state_dict())
    outputs = model(recorded["input"].to(dtype))
    assert (outputs.compressed - recorded["compressed" + suffix]).abs().max() < tolerance
    assert (outputs.reconstructed - recorded["decompressed" + suffix]).abs().max() < tolerance
    assert outputs.loss.item() == pytest.approx(facts["loss" + (suffix or "_f32")], rel=tolerance)
    outputs.loss.backward()
    assert (model.weight.grad - recorded["grad_weight" + suffix]).abs().max() < min(tolerance, 1e-6)


@pytest.mark.parametrize("dtype, suffix, tolerance", [(torch.float32, "_f32", 1e-5), (torch.float64, "_f64", 1e-12)])
def test_golden_metrics(golden, dtype, suffix, tolerance):
    model, recorded, facts = golden
    target = recorded["input"].to(dtype)
    weight = model.weight.detach().to(dtype)
    metrics = reconstruction_metrics(target @ weight.T @ weight, target)
    for name, value in facts["metrics" + suffix].items():
        assert metrics[name] == pytest.approx(value, abs=tolerance), name


def test_golden_closed_form(golden):
    _, recorded, facts = golden
    rows, closed = recorded["sample_matrix"], facts["closed_form"]
    model = make_compressor(hidden_size=facts["d_model"], compressed_size=facts["d_compressed"], dtype=torch.float32)
    fit = model.fit_pca(rows.split(100))
    projector = model.weight.T @ model.weight
    assert (projector - recorded["optimal_projector_f32"]).abs().max() < 1e-4
    assert fit.num_samples == closed["rows"]
    torch.testing.assert_close(
        fit.eigenvalues * fit.num_samples, recorded["second_moment_eigenvalues"], rtol=1e-6, atol=1e-6
    )
    assert fit.mse == pytest.approx(closed["optimal_uncentred_mse"], rel=1e-6)
    metrics = reconstruction_metrics(model(rows).reconstructed, rows)
    assert metrics["mse"] == pytest.approx(closed["optimal_uncentred_mse"], rel=1e-6)
    assert metrics["cosine_similarity"] == pytest.approx(closed["optimal_uncentred_cosine"], rel=1e-6)
    golden_model = golden[0](rows)
    assert golden_model.loss.item() == pytest.approx(closed["checkpoint_mse_on_sample_matrix"], rel=1e-5)


# --- Forward ---


def test_loss_is_that_of_real_tokens_alone(states, mask):
    model = make_compressor()
    alone = model(states[mask])
    expected = (states[mask] @ model.weight.T @ model.weight - states[mask]).square().mean()
    for filling in (0.0, 1e6, float("nan")):
        model.zero_grad()
        outputs = model(states.masked_fill(~mask[..., None], filling), mask)
        torch.testing.assert_close(outputs.loss, expected)
        torch.testing.assert_close(outputs.reconstructed[mask], alone.reconstructed)
        assert not outputs.compressed[~mask].any() and outputs.compressed.shape == (6, 9, RANK)
        outputs.loss.backward()
        found = model.weight.grad.clone()
        model.zero_grad()
        model(states[mask]).loss.backward()
        torch.testing.assert_close(found, model.weight.grad)
    assert model(states, torch.zeros_like(mask)).loss == 0
    torch.testing.assert_close(model.decompress(model.compress(states)), model(states).reconstructed)


@pytest.mark.parametrize("build", [torch.float32, torch.bfloat16])
def test_initial_rows_are_orthonormal(build):
    model = AutoModel.from_config(DimensionCompressorConfig(hidden_size=40, compressed_size=16), dtype=build)
    assert type(model) is DimensionCompressor and model.weight.dtype == build
    product = model.weight.float() @ model.weight.float().T
    assert (product - torch.eye(16)).abs().max() < (1e-5 if build == torch.float32 else 2e-2)
    names = [name for name, _ in make_compressor().named_parameters()]
    assert names == ["weight"] and make_compressor(1).weight.ne(make_compressor(2).weight).any()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_any_mix_of_dtypes(states, mask, weights, dtype, autocast):
    expected = make_compressor()(states, mask)
    model = make_compressor(dtype=weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(states.to(dtype), mask)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32 and model.weight.grad.isfinite().all()
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)


# --- PCA ---


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rank", [1, RANK, WIDTH])
def test_pca_is_the_best_low_rank_approximation(states, mask, rank, masked):
    rows = states[mask] if masked else states.flatten(0, 1)
    best, singular = left_singular(rows, rank)
    model = make_compressor(compressed_size=rank)
    filled = states.masked_fill(~mask[..., None], float("nan"))
    fit = model.fit_pca(zip(filled.split(2), mask.split(2)) if masked else states.split(2))
    torch.testing.assert_close(model(rows).reconstructed, best)
    torch.testing.assert_close(model.weight @ model.weight.T, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(fit.eigenvalues, singular.square() / len(rows))
    error = (rows - best).square()
    assert fit.num_samples == len(rows)
    assert fit.mse == pytest.approx(error.mean().item(), abs=1e-10)
    assert fit.variance_kept == pytest.approx(1 - (error.sum() / rows.square().sum()).item(), abs=1e-12)


def test_pca_does_not_depend_on_how_the_data_arrive(states):
    rows = states.flatten(0, 1)
    weights, fits = [], []
    for batches in ([rows], rows.split(1), rows.split(7), states, (rows.flip(0),), iter(states.split(4))):
        model = make_compressor(seed=len(weights))
        fits.append(model.fit_pca(batches))
        weights.append(model.weight.detach())
    for weight, fit in zip(weights, fits):
        torch.testing.assert_close(weight, weights[0], rtol=0, atol=1e-10)
        assert fit.num_samples == 54 and fit.mse == pytest.approx(fits[0].mse)


def test_pca_accumulates_in_float64(states):
    """bfloat16 states, a float32 weight: as exact as their double-precision copies allow."""
    rounded = states.to(torch.bfloat16)
    model = make_compressor(dtype=torch.float32)
    fit = model.fit_pca(rounded)
    best, singular = left_singular(rounded.double().flatten(0, 1), RANK)
    torch.testing.assert_close(fit.eigenvalues, singular.square() / 54, rtol=1e-10, atol=1e-10)
    assert fit.eigenvalues.dtype == torch.float64 and model.weight.dtype == torch.float32
    torch.testing.assert_close(model(rounded).reconstructed.flatten(0, 1).double(), best, rtol=0, atol=1e-4)


def test_pca_is_where_training_ends(states):
    model = make_compressor()
    optimum = model.fit_pca(states).mse
    model(states).loss.backward()
    assert model.weight.grad.abs().max() < 1e-9
    trained = make_compressor(3)
    optimizer = torch.optim.LBFGS(trained.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = trained(states).loss
        loss.backward()
        return loss

    start = trained(states).loss.item()
    optimizer.step(closure)
    assert optimum <= trained(states).loss.item() < optimum + 1e-3 * (start - optimum)


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "needs at least compressed_size=5 hidden states, got none. Pass more data"),
        ([torch.ones(4, WIDTH)], "got only 4 of them. Pass more data, or choose a smaller compressed_size"),
        ([(torch.ones(2, 9, WIDTH), torch.zeros(2, 9))], "got none"),
        ([torch.ones(9, 13)], "13 wide, the compressor takes hidden_size=12: build it with hidden_size=13"),
        ([torch.ones(9, WIDTH), torch.full((9, WIDTH), float("nan"))], r"NaN or infinite values: batch 1 \(counted"),
        ([torch.full((9, WIDTH), float("inf"))], r"NaN or infinite values: batch 0"),
        ([(torch.ones(2, 9, WIDTH), torch.ones(2, 8))], r"mask has shape \(2, 8\), expected \(2, 9\)"),
    ],
)
def test_pca_refuses(batches, message):
    model = make_compressor()
    before = model.weight.clone()
    with pytest.raises(ValueError, match=message):
        model.fit_pca(batches)
    assert torch.equal(model.weight, before)


IN_EACH_PROCESS = """
import sys
import torch
from torch import distributed
from llada_trm_hf.models import DimensionCompressor, DimensionCompressorConfig

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
data = torch.load(f"{folder}/states.pt", weights_only=True)
torch.manual_seed(rank)
sizes = {"hidden_size": data.shape[-1], "compressed_size": 5}
model = DimensionCompressor(DimensionCompressorConfig(**sizes)).double()
outputs = {}
for name, shares in {"halves": (data[:2], data[2:]), "one": (data, data[:0])}.items():
    fit = model.fit_pca(shares[rank].split(1))
    outputs[name] = {"weight": model.weight.detach(), "values": fit.eigenvalues, "count": fit.num_samples}
torch.save(outputs, f"{folder}/{rank}.pt")
try:
    model.fit_pca([torch.full((9, data.shape[-1]), float("nan") if rank else 1.0)])
except ValueError as error:
    open(f"{folder}/{rank}.txt", "w").write(str(error))
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_processes_fit_what_one_does(states, tmp_path):
    torch.save(states, tmp_path / "states.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_EACH_PROCESS, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    model = make_compressor()
    fit = model.fit_pca([states])
    for rank in (0, 1):
        outputs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for case in outputs.values():
            torch.testing.assert_close(case["weight"], model.weight.detach(), rtol=0, atol=1e-10)
            torch.testing.assert_close(case["values"], fit.eigenvalues)
            assert case["count"] == 54
    # One process has broken data: both say so, neither waits for the other.
    assert "another process" in (tmp_path / "0.txt").read_text() and "batch 0" in (tmp_path / "1.txt").read_text()


# --- Metrics ---


def plain_metrics(prediction, target):
    """In the words of the definition, one number at a time."""
    rows, expected = prediction.tolist(), target.tolist()
    error = sum((p - t) ** 2 for row, want in zip(rows, expected) for p, t in zip(row, want))
    norm = sum(t**2 for want in expected for t in want)

    def cosine(row, want):
        lengths = [sum(x * x for x in v) ** 0.5 for v in (row, want)]
        return sum(p * t for p, t in zip(row, want)) / (lengths[0] * lengths[1]) if all(lengths) else 0.0

    def variance(values):
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / (len(values) - 1)

    ratios = [variance(p) / (variance(t) + 1e-8) for p, t in zip(zip(*rows), zip(*expected))]
    return {
        "mse": error / target.numel(),
        "relative_error": (error / norm) ** 0.5,
        "cosine_similarity": sum(map(cosine, rows, expected)) / len(rows),
        "variance_ratio": sum(ratios) / len(ratios),
    }


def test_metrics_equal_plain_loops(states, mask):
    target = states[mask]
    prediction = make_compressor()(target).reconstructed.detach()
    filled = make_compressor()(states).reconstructed.masked_fill(~mask[..., None], float("nan"))
    metrics = reconstruction_metrics(filled, states, mask)
    assert metrics == pytest.approx(reconstruction_metrics(prediction, target), rel=1e-9)
    mean, std = target.mean(0), target.std(0)
    constant = mean.expand_as(target)
    cases = {
        "": (prediction, target),
        "constant_": (constant, target),
        "standardised_": ((prediction - mean) / std, (target - mean) / std),
        "constant_standardised_": (constant - mean, (target - mean) / std),
    }
    expected = {prefix + name: v for prefix, pair in cases.items() for name, v in plain_metrics(*pair).items()}
    expected["r2"] = 1 - expected["mse"] / expected["constant_mse"]
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-10), name


def test_metrics_tell_a_constant_from_a_prediction(states):
    target = states.flatten(0, 1)
    constant = reconstruction_metrics(target.mean(0).expand_as(target), target)
    assert constant["cosine_similarity"] > 0.9  # looks good, knows nothing
    assert constant["standardised_cosine_similarity"] == pytest.approx(0, abs=1e-6)
    assert constant["r2"] == pytest.approx(0) and constant["variance_ratio"] == pytest.approx(0)
    perfect = reconstruction_metrics(target, target)
    assert perfect["r2"] == 1 and perfect["mse"] == 0 and perfect["standardised_relative_error"] == 0
    assert perfect["cosine_similarity"] == pytest.approx(1) and perfect["variance_ratio"] == pytest.approx(1)


def test_metrics_of_a_dead_channel(states):
    target = states.flatten(0, 1).clone()
    target[:, 0] = 3.0
    metrics = reconstruction_metrics(target + 0.1, target)
    assert all(abs(value) < 100 for value in metrics.values())


@pytest.mark.parametrize(
    "prediction, target, mask, message",
    [
        ((4, 3), (4, 2), None, "do not fit together"),
        ((4, 3), (4, 3), (3,), "do not fit together"),
        ((1, 3), (1, 3), None, "at least two rows, got 1"),
    ],
)
def test_metrics_refuse(prediction, target, mask, message):
    with pytest.raises(ValueError, match=message):
        reconstruction_metrics(torch.ones(prediction), torch.ones(target), None if mask is None else torch.ones(mask))


# --- Mistakes and checkpoints ---


@pytest.mark.parametrize("size", [0, 13])
def test_impossible_sizes(size):
    with pytest.raises(ValueError, match=rf"compressed_size.*hidden_size=12.* {size}\b"):
        DimensionCompressorConfig(hidden_size=WIDTH, compressed_size=size)


def test_wrong_shapes(states):
    with pytest.raises(ValueError, match=r"\b11\b.*hidden_size=12"):
        make_compressor()(states[..., :11])
    with pytest.raises(ValueError, match=r"mask.*\(6, 8\).*\(6, 9\)"):
        make_compressor()(states, torch.ones(6, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_alone(states, tmp_path, dtype):
    model = make_compressor(dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is DimensionCompressor and loaded.dtype == dtype
    assert torch.equal(loaded.weight, model.weight)
    assert torch.equal(loaded(states.to(dtype)).reconstructed, model(states.to(dtype)).reconstructed)

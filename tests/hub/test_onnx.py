"""ONNX graphs in onnxruntime against PyTorch's own forward, in which chunks really leave the batch."""

import os
import shutil
import sys
from functools import partial

import onnx
import onnxruntime
import pytest
import torch
from conftest import EOS, MASK, PAD, randomise
from latent_thinking_models import make_model
from run_programs import run_program

from llada_trm_hf.cli.main import main
from llada_trm_hf.hub import export_onnx
from llada_trm_hf.hub import onnx as exporting
from llada_trm_hf.models import (
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHead,
    RecursiveRefinementHeadConfig,
    SequenceTRM,
    SequenceTRMConfig,
    SlotTRMRefinerConfig,
    TRMRefinerConfig,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "mask_token_id": MASK,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
HEAD = {"chunk_size": 4, "head_hidden_size": 16, "convergence_threshold": 0.03, "max_recursive_steps": 4}
SLOT = {"chunk_size": 4, "num_hidden_layers": 1, "num_attention_heads": 4, "max_recursive_steps": 3}
SHAPES = [(1, 1), (1, 3), (2, 4), (3, 10), (1, 16), (2, 33), (5, 21)]


def new_backbone(seed=0):
    torch.manual_seed(seed)
    return LLaDAForMaskedDiffusion(LLaDAConfig(**SIZES, intermediate_size=64, num_key_value_heads=2)).eval()


def new_moe():
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 16}
    return LLaDAMoEForMaskedDiffusion(LLaDAMoEConfig(**SIZES, **experts, num_key_value_heads=4)).eval()


def new_hybrid(kind, seed=0, backbone=None):
    head = RecursiveRefinementHeadConfig(hidden_size=32, **HEAD)
    slot = SlotTRMRefinerConfig(hidden_size=32, **SLOT, convergence_threshold=0.001)
    tireless = RecursiveRefinementHeadConfig(hidden_size=32, **HEAD | {"convergence_threshold": 0.0})
    trm = TRMRefinerConfig(hidden_size=32, chunk_size=4, recursion_size=16, convergence_threshold=0.5)
    refiner = {"trm": trm, "head": head, "tireless head": tireless, "slot": slot}.get(kind, [head, slot])
    fields = {"min_confidence": 0.3, **({"integration": kind} if isinstance(refiner, list) else {})}
    backbone = new_backbone(seed) if backbone is None else backbone
    model = LLaDATRMForMaskedDiffusion.from_backbone(backbone, refiner=refiner, **fields).eval()
    randomise(model.refiner)
    return model


def new_inputs(batch, length, padding=None, seed=0):
    """Random tokens, half of them masks (in the last row of several none), the rows padded by more and more."""
    generator = torch.Generator().manual_seed(100 * length + seed)
    input_ids = torch.randint(2, MASK, (batch, length), generator=generator)
    masked = torch.rand(batch, length, generator=generator) < 0.5
    masked[1:][-1:] = False
    mask = torch.ones_like(input_ids)
    if padding is not None:
        for row in range(batch):
            width = min(2 * row, length - 1)
            mask[row, slice(width) if padding == "left" else slice(length - width, None)] = 0
    return {"input_ids": input_ids.masked_fill(masked, MASK), "attention_mask": mask}


def run_graph(path, inputs):
    """onnxruntime's results by name."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {output.name: torch.from_numpy(result) for output, result in zip(session.get_outputs(), results)}


@torch.no_grad()
def assert_equal_results(model, path, inputs, **settings):
    """Compares them with PyTorch's, and returns those."""
    expected = model(**inputs, **settings)
    results = run_graph(path, inputs)
    for name, result in results.items():
        assert result.dtype == expected[name].dtype, name
        near = {"atol": 1e-4, "rtol": 0, "equal_nan": True}
        torch.testing.assert_close(result, expected[name], **near, msg=lambda text, name=name: name + text)
    return expected


def assert_equal_in_all_shapes(model, path):
    """Also that the cases that matter are among them: chunks left alone, converged early, and given every step."""
    steps, undecided = [], []
    for batch, length in SHAPES:
        for padding in (None, "left", "right"):
            expected = assert_equal_results(model, path, new_inputs(batch, length, padding))
            steps.append(expected.refinement_steps.flatten())
            undecided.append(expected.chunk_confidence.flatten() < 1)
    steps, undecided = torch.cat(steps), torch.cat(undecided)
    assert (undecided & (steps == 0)).sum() > 10
    assert ((steps > 0) & (steps < steps.max())).sum() > 10
    assert (steps == steps.max()).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def head_graph(folder):
    model = new_hybrid("head")
    return model, folder / "head.onnx", export_onnx(model, folder / "head.onnx")


# --- Results ---


def test_hybrid_with_head(head_graph):
    model, path, export = head_graph
    assert_equal_in_all_shapes(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert export.files == (str(path),) and 0 < export.largest_difference < 1e-4 and export.refined_chunks > 5
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]
    names = [value.name for value in graph.output]
    assert names == ["logits", "refinement_steps", "chunk_confidence", "refiner_confidence"]
    batch, length = graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, length.dim_param) == ("batch", "length")


def test_batch_in_which_nothing_is_refined(head_graph):
    model, path, _ = head_graph
    batches = (new_inputs(1, length, seed=seed) for length in (1, 3, 7) for seed in range(30))
    with torch.no_grad():
        idle = next(inputs for inputs in batches if not model(**inputs).refinement_steps.any())
    assert_equal_results(model, path, idle)


def test_hybrid_with_slot_refiner(folder):
    model = new_hybrid("slot")
    export_onnx(model, folder / "slot.onnx")
    assert_equal_in_all_shapes(model, folder / "slot.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("integration", ["cascade", "mix"])
def test_hybrid_with_two_refiners(folder, integration):
    model = new_hybrid(integration, backbone=new_moe())
    export_onnx(model, folder / f"{integration}.onnx")
    assert_equal_in_all_shapes(model, folder / f"{integration}.onnx")


def test_experts(folder):
    model = new_moe().train()
    model.set_experts_implementation("grouped_mm")
    export = export_onnx(model, folder / "moe.onnx")
    assert model.training and model.config._experts_implementation == "grouped_mm" and export.refined_chunks == 0
    model.eval()
    for batch, length in SHAPES:
        assert_equal_results(model, folder / "moe.onnx", new_inputs(batch, length, "left"))


@pytest.mark.parametrize("kind", ["head", "tireless head", "slot", "trm", "cascade", "mix"])
@pytest.mark.parametrize("max_steps", [None, 0, 2])
def test_what_is_traced_computes_the_same(monkeypatch, kind, max_steps):
    """Everything a refiner returns, while exporting and not, without a graph in between."""
    model, refiner = new_hybrid(kind), new_hybrid(kind).refiner
    asked = {"max_steps": max_steps, "output_step_hidden_states": True, "output_statistics": True}
    for batch, length in SHAPES:
        inputs = new_inputs(batch, length, "left")
        states = torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(0))
        active = torch.rand(batch, -(-length // 4), generator=torch.Generator().manual_seed(1)) < 0.7
        ways = []
        for exporting_now in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda now=exporting_now: now)
            with torch.no_grad():
                refined = refiner(states, active, inputs["attention_mask"], **asked)
                ways.append((refined, model(**inputs, max_steps=max_steps)))
        for eager, traced in zip(*ways):
            for name in eager:
                if name not in ("step_hidden_states", "statistics"):
                    torch.testing.assert_close(traced[name], eager[name], atol=1e-5, rtol=1e-5)
        (eager, _), (traced, _) = ways
        steps = eager.step_hidden_states
        if kind != "cascade":  # in which the first refiner's further steps stand before the second's
            steps = [*steps, *[eager.hidden_states] * (len(traced.step_hidden_states) - len(steps))]
            for one, other in zip(steps, traced.step_hidden_states, strict=True):
                torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
        if active.any():
            both = traced.statistics["similarity"], eager.statistics["similarity"]
            torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5, equal_nan=True)


# --- The parts of a thinker ---

TRM = {
    "hidden_size": 16,
    "n_heads": 2,
    "n_layers": 1,
    "n_latent_steps": 1,
    "n_deep_recursions": 1,
}


def new_thinking():
    """Small, for every layer stands in the graph as often as it is applied."""
    return make_model(trm=SequenceTRMConfig(**TRM, n_supervision_steps=3), halt_threshold=5e-4)


def new_states(batch, length, width):
    """With NaN at padding: it is not read."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, torch.randperm(length, generator=generator)[: length // (row + 1)]] = 0
    states = torch.randn(batch, length, width, generator=generator)
    return states.masked_fill(mask[..., None] == 0, torch.nan), mask


def assert_same_thoughts(think, path, names, width):
    """`think` in PyTorch against the graph, on sizes other than the example's. Returns the steps taken."""
    steps = []
    for batch, length in ((1, 1), (1, 12), (3, 7), (9, 21)):
        inputs = dict(zip(names, new_states(batch, length, width)))
        with torch.no_grad():
            expected = think(**inputs)
        results = run_graph(path, inputs)
        assert len(results) == 3
        for name, result in results.items():
            torch.testing.assert_close(result, expected[name], atol=1e-4, rtol=1e-4)
        steps += expected.num_steps.tolist()
    return set(steps)


def test_thinker_from_a_whole_checkpoint(tmp_path, capsys):
    model = new_thinking()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "thinker.onnx"
    assert main(["export-onnx", "--checkpoint", str(tmp_path / "model"), "--output", str(path)]) == 0
    assert "Writing LatentThinker" in capsys.readouterr().out
    steps = assert_same_thoughts(model.thinker, path, ("hidden_states", "mask"), 32)
    assert len(steps) > 1  # they halt on their own


@pytest.mark.parametrize("style", ["trm", pytest.param("llm_trm", marks=pytest.mark.slow)])
def test_sequence_trm(tmp_path, style):
    """In the graph are as many supervision steps as asked for."""
    torch.manual_seed(0)
    model = SequenceTRM(SequenceTRMConfig(**TRM, block_style=style)).eval()
    with torch.no_grad():
        model.halt_head.weight.normal_()
    export_onnx(model, tmp_path / "trm.onnx", max_recursive_steps=2)
    names, width = ("context", "mask"), TRM["hidden_size"]
    steps = assert_same_thoughts(partial(model.reason, max_steps=2), tmp_path / "trm.onnx", names, width)
    assert max(steps) == 2


def test_compressor(tmp_path):
    compressor = new_thinking().thinker.compressor
    export_onnx(compressor, tmp_path / "compressor.onnx")
    for batch, length in ((1, 1), (4, 9)):
        inputs = dict(zip(("hidden_states", "attention_mask"), new_states(batch, length, 32)))
        assert_equal_results(compressor, tmp_path / "compressor.onnx", inputs)


# --- Files and the command ---


def test_command_exports_a_bf16_checkpoint_in_float32(tmp_path, capsys):
    new_hybrid("head").to(torch.bfloat16).save_pretrained(tmp_path / "hybrid")
    path = tmp_path / "hybrid.onnx"
    asked = ["--checkpoint", str(tmp_path / "hybrid"), "--output", str(path), "--max_recursive_steps", "2"]
    assert main(["export-onnx", *asked]) == 0
    printed = capsys.readouterr().out
    assert "largest difference from PyTorch:" in printed and f"{path.stat().st_size:,}  {path}" in printed
    model = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "hybrid", dtype="float32").eval()
    inputs = new_inputs(3, 21)
    assert assert_equal_results(model, path, inputs, max_steps=2).refinement_steps.max() == 2
    assert model(**inputs).refinement_steps.max() > 2


def test_large_weights_stand_in_a_file_beside_the_graph(monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "MOST_WEIGHTS_IN_GRAPH", 10_000)
    (tmp_path / "backbone.onnx").write_bytes(b"an older one")
    model = new_backbone()
    export = export_onnx(model, tmp_path / "backbone.onnx")
    assert export.files == (str(tmp_path / "backbone.onnx"), str(tmp_path / "backbone.onnx.data"))
    assert sorted(os.listdir(tmp_path)) == ["backbone.onnx", "backbone.onnx.data"]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert os.path.getsize(export.files[1]) > 0.9 * weights  # a few small ones stay in the graph
    elsewhere = shutil.copytree(tmp_path, tmp_path / "elsewhere")
    os.remove(export.files[1])
    assert_equal_results(model, elsewhere / "backbone.onnx", new_inputs(3, 9, "right"))


def test_differences_are_measured_by_the_size_of_the_outputs(tmp_path):
    """Logits a thousand times as large differ by a thousand times as much, and are as right."""
    model = new_backbone()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    export = export_onnx(model, tmp_path / "backbone.onnx")
    assert model(**new_inputs(3, 10)).logits.abs().max() > 1000
    assert 0 < export.largest_difference < 1e-5
    with pytest.raises(RuntimeError, match=r"--tolerance accepts more \(in Python, tolerance="):
        export_onnx(model, tmp_path / "backbone.onnx", tolerance=1e-12)


@pytest.fixture
def wrong_graph(monkeypatch, head_graph):
    """Whatever is exported, the graph written is that of another model."""
    monkeypatch.setattr(exporting, "_write_graph", lambda forward, path: shutil.copy(head_graph[1], path))


@pytest.mark.parametrize("there_before", [False, True])
def test_graph_that_differs_is_not_kept(wrong_graph, tmp_path, capsys, there_before):
    new_hybrid("head", seed=1).save_pretrained(tmp_path / "hybrid")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "hybrid.onnx"
    if there_before:
        path.write_bytes(b"an older one")
    capsys.readouterr()
    assert main(["export-onnx", "--checkpoint", str(tmp_path / "hybrid"), "--output", str(path)]) == 1
    error = capsys.readouterr().err
    message = error.splitlines()[-1]  # after progress bars
    assert message.startswith("llada-trm export-onnx: The graph's results differ from PyTorch's by ")
    assert "Traceback" not in error
    assert os.listdir(path.parent) == (["hybrid.onnx"] if there_before else [])
    assert not there_before or path.read_bytes() == b"an older one"


def test_refiner_of_ones_own_that_looks_at_values(monkeypatch, tmp_path):
    model = new_hybrid("head")
    refine = model.refiner.forward
    monkeypatch.setattr(model.refiner, "forward", lambda x, **asked: refine(x if x.sum() > 0 else -x, **asked))
    with pytest.raises(RuntimeError, match="This LLaDATRMForMaskedDiffusion cannot be written as a graph: ") as caught:
        export_onnx(model, tmp_path / "model.onnx")
    assert "data-dependent" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_nan_is_a_difference(tmp_path, head_graph, wrong_graph):
    model = new_hybrid("head")
    with torch.no_grad():
        model.backbone.lm_head.weight[3] = torch.nan
    with pytest.raises(RuntimeError, match="by nan"):
        export_onnx(model, tmp_path / "hybrid.onnx")
    assert os.listdir(tmp_path) == []


# --- What is refused ---


@pytest.mark.parametrize(
    "model, steps, message",
    [
        (lambda: RecursiveRefinementHead(RecursiveRefinementHeadConfig(hidden_size=8)), None, "RefinementHead"),
        (new_thinking, None, "pass model.thinker, model.thinker.compressor or model.thinker.trm"),
        (lambda: make_model(noise_std=0.5).thinker, None, "noise_std=0.5 no two runs are the same"),
        (lambda: new_hybrid("head").to(torch.bfloat16), None, "bfloat16 weights: load it with dtype='float32'"),
        (lambda: new_hybrid("head"), 0, "at least 1, got 0"),
        (new_backbone, 3, "LLaDAForMaskedDiffusion has no refiner"),
    ],
)
def test_models_that_are_refused(tmp_path, model, steps, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(model(), tmp_path / "model.onnx", max_recursive_steps=steps)
    assert os.listdir(tmp_path) == []


def command_error(capsys, *arguments):
    assert main(["export-onnx", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_places_that_are_refused_before_the_model_is_read(tmp_path, capsys):
    missing = tmp_path / "missing" / "model.onnx"
    assert "There is no folder" in command_error(capsys, "--checkpoint", "nowhere", "--output", missing)
    assert "is a folder: name a file" in command_error(capsys, "--checkpoint", "nowhere", "--output", tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_packages(monkeypatch, tmp_path, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    error = command_error(capsys, "--checkpoint", "nowhere", "--output", tmp_path / "model.onnx")
    assert error == f"llada-trm export-onnx: The export needs {package}: pip install 'llada-trm-hf[onnx]'.\n"


def test_package_imports_without_them():
    code = (
        "import sys; sys.modules.update(onnx=None, onnxruntime=None, onnxscript=None)\n"
        "import llada_trm_hf, llada_trm_hf.cli.publish as command\n"
        "assert callable(llada_trm_hf.hub.export_onnx) and callable(command.export_onnx)"
    )
    run_program([sys.executable, "-c", code], check=True)

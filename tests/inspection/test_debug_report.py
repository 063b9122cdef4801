"""Debug mode: the numbers it prints, that it changes none, and that it costs nothing while it is off."""

import os
import sys

import pytest
import torch
from conftest import MASK, HostCopies, randomise
from run_programs import run_program
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from llada_trm_hf.inspection.debug_report import MAX_CHUNK_LINES
from llada_trm_hf.models import (
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHead,
    RecursiveRefinementHeadConfig,
    SlotTRMRefinerConfig,
)

# What `@reported` decorates.
BARE_FORWARD = LLaDATRMForMaskedDiffusion.forward.__wrapped__.__wrapped__
ON = {"DEBUG": "True"}
PROMPT = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def debug_off(monkeypatch):
    for name in ("DEBUG", "LLADA_TRM_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def switch(monkeypatch):
    return lambda **values: [monkeypatch.setenv(*item) for item in values.items()]


@pytest.fixture
def batch():
    """Two rows of 18 tokens, the first padded by two; masks from column 6 on, and labels there."""
    tokens = torch.randint(3, MASK, (2, 18), generator=torch.Generator().manual_seed(0))
    input_ids = tokens.clone()
    input_ids[:, 6:] = MASK
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :2] = 0
    labels = tokens.clone()
    labels[:, :6] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def numbers(line):
    """The words of a line that are numbers."""
    return [float(word) for word in line.split() if word.replace(".", "").replace("-", "").replace("e", "").isdigit()]


def line_of(report, start):
    (line,) = [line for line in report.splitlines() if line.strip().startswith(start)]
    return line


def chunk_lines(report):
    """For each chunk with a line of its own, the words of that."""
    lines = report.splitlines()
    (header,) = [number for number, line in enumerate(lines) if line.startswith("row  chunk")]
    rows = {}
    for line in lines[header + 1 :]:
        words = line.split()
        if not words[0].isdigit():
            break
        rows[int(words[0]), int(words[1])] = words[2:]
    return rows


def plain_refinement(model, hidden_states, columns):
    """Updates, similarities, final confidence of one chunk, whose tokens are in `columns`."""
    head, config = model.refiner, model.refiner.config
    chunk, previous, curve = torch.zeros(config.chunk_size, hidden_states.shape[-1]), None, []
    chunk[: len(columns)] = hidden_states[columns]
    for step in range(config.max_recursive_steps):
        code = head.encoder(chunk.flatten())
        if previous is not None:
            curve.append(cosine_similarity(code, previous, dim=0).item())
            if curve[-1] > 1 - config.convergence_threshold:
                return step, curve, head.confidence(code).sigmoid().item()
        chunk = chunk + config.step_size * head.projector(head.layers(code)).view_as(chunk)
        previous = code
    return config.max_recursive_steps, curve, head.confidence(head.encoder(chunk.flatten())).sigmoid().item()


@pytest.mark.parametrize(
    "environment, shown",
    [
        ({"DEBUG": "True"}, True),
        ({"DEBUG": "1"}, True),
        ({"LLADA_TRM_DEBUG": "1"}, True),
        ({"LLADA_TRM_DEBUG": "0", "DEBUG": "True"}, False),
        ({"DEBUG": "False"}, False),
        ({"DEBUG": "0"}, False),
        ({"DEBUG": "app:*"}, False),
        ({}, False),
    ],
)
def test_environment_is_read_at_call_time(tiny_hybrid, switch, capsys, environment, shown):
    tiny_hybrid(PROMPT)
    assert not capsys.readouterr().out
    switch(**environment)
    tiny_hybrid(PROMPT)
    assert ("LLaDATRMForMaskedDiffusion.forward" in capsys.readouterr().out) == shown


@torch.no_grad()
def test_report_says_what_a_plain_computation_finds(tiny_hybrid, batch, switch, capsys):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = tiny_hybrid.backbone.model(**inputs).last_hidden_state
    base = tiny_hybrid.backbone(**inputs).logits
    switch(**ON)
    outputs = tiny_hybrid(**inputs)
    report = capsys.readouterr().out
    assert line_of(report, "input_ids").split() == ["input_ids", "[2,", "18]", "int64", "cpu", "24", "masks"]
    assert line_of(report, "attention_mask").split()[-2:] == ["2", "padding"]
    for name, tensor in (("hidden states", hidden), ("base logits", base), ("final logits", outputs.logits)):
        line = line_of(report, name)
        assert str(list(tensor.shape)) in line
        expected = [tensor.mean(), tensor.std(correction=0), tensor.min(), tensor.max(), 0]
        assert numbers(line.split("]")[1]) == pytest.approx([float(value) for value in expected], rel=1e-3, abs=1e-4)

    printed, refined = chunk_lines(report), []
    largest = base.softmax(-1).amax(-1)
    for row, padding in enumerate((2, 0)):
        real = list(range(padding, 18))
        for chunk in range(5):
            columns = real[4 * chunk : 4 * chunk + 4]
            masked = [column for column in columns if column >= 6]
            if not masked or largest[row, masked].mean() >= tiny_hybrid.config.min_confidence:
                assert (row, chunk) not in printed
                continue
            updates, curve, confidence = plain_refinement(tiny_hybrid, hidden[row], columns)
            words = printed[row, chunk]
            assert float(words[0]) == pytest.approx(largest[row, masked].mean().item(), abs=1e-4)
            assert float(words[1]) == pytest.approx(confidence, abs=1e-4)
            converged = updates < tiny_hybrid.refiner.config.max_recursive_steps
            end = ["converged", "at", "step", str(updates + 1)] if converged else ["all", "steps"]
            assert words[2 : 3 + len(end)] == [str(updates), *end]
            assert words[3 + len(end)] == "-"  # the first step has nothing to be compared with
            assert [float(word) for word in words[4 + len(end) :]] == pytest.approx(curve, abs=1e-4)
            refined.append(updates)
    assert len(refined) == len(printed) > 2 and len(set(refined)) > 1  # what makes this test worth something
    summary = line_of(report, "summary")
    assert f"{len(refined)} of 10 chunks refined, {sum(refined) / len(refined):.1f} updates" in summary
    assert "all values finite" in summary


def test_losses_are_those_of_the_output(tiny_hybrid, batch, switch, capsys):
    switch(**ON)
    outputs = tiny_hybrid.train()(**batch)
    line = line_of(capsys.readouterr().out, "loss ")
    assert numbers(line)[0] == pytest.approx(outputs.loss.item(), rel=1e-5)
    for name, value in outputs.loss_components.items():
        assert float(line.split(f"{name} ")[1].split(",")[0]) == pytest.approx(value.item(), rel=1e-5), name


def test_many_chunks_are_counted_not_listed(make_hybrid, switch, capsys):
    hybrid = make_hybrid(min_confidence=1.0)
    switch(**ON)
    hybrid(torch.full((2, 60), MASK))
    report = capsys.readouterr().out
    assert len(chunk_lines(report)) == MAX_CHUNK_LINES
    assert f"and {30 - MAX_CHUNK_LINES} more active chunks" in report
    assert "30 chunks: 30 active (confidence below 1.0), 0 left alone, 0 with nothing to decide" in report
    hybrid(torch.full((2, 60), MASK), enable_refinement=False)
    assert "summary: the backbone alone" in capsys.readouterr().out


def test_statistics_of_any_name_are_printed(tiny_hybrid, batch, switch, capsys):
    class OtherRefiner(RecursiveRefinementHead):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.statistics = {"norms": {"context": torch.tensor([1.0, 3.0])}, "gates": [torch.tensor(0.25)]}
            return outputs

    tiny_hybrid.refiner.__class__ = OtherRefiner
    switch(**ON)
    outputs = tiny_hybrid(batch["input_ids"], output_refinement_trace=True)
    report = capsys.readouterr().out
    assert numbers(line_of(report, "norms.context").split("]")[1]) == [2, 1, 1, 3, 0]
    assert numbers(line_of(report, "gates[0]").split("[]")[1]) == [0.25, 0, 0.25, 0.25, 0]
    assert outputs.refinement_trace.passes[0].similarity.isnan().all()  # traces do without similarities too


HEAD = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=4, head_hidden_size=16, convergence_threshold=0.02)
SLOTS = SlotTRMRefinerConfig(
    hidden_size=32, chunk_size=4, preset="tiny", convergence_threshold=0.05, delta_scale=1.0, max_recursive_steps=6
)
FAMILY = {
    "slots": {"refiner": SLOTS},
    "cascade": {"refiner": [HEAD, SLOTS], "integration": "cascade"},
    "mix": {"refiner": [SLOTS, HEAD], "integration": "mix"},
}


@pytest.fixture(params=FAMILY)
def family_member(request, make_backbone):
    backbone = make_backbone()
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(backbone, min_confidence=1.0, **FAMILY[request.param]).eval()
    randomise(hybrid.refiner)
    return request.param, hybrid


def test_every_refiner_has_a_report(family_member, batch, switch, capsys, tmp_path):
    pattern, hybrid = family_member
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected, loss = hybrid(**inputs), hybrid.train()(**batch).loss
    switch(**ON)
    assert torch.equal(hybrid(**batch).loss, loss) and "all values finite" in capsys.readouterr().out
    outputs = hybrid.eval()(**inputs, output_refinement_trace=True)
    assert torch.equal(outputs.logits, expected.logits)
    report = capsys.readouterr().out
    assert "all values finite" in report  # what was not run does not count
    printed, steps = chunk_lines(report), outputs.refinement_steps
    assert printed.keys() == {tuple(chunk) for chunk in (steps > 0).nonzero().tolist()} and len(printed) > 5
    for (row, chunk), words in printed.items():
        updates = int(steps[row, chunk])
        assert int(words[2]) == updates
        if pattern == "slots":  # it compares after an update, the head before one
            end = f"converged at step {updates}" if updates < SLOTS.max_recursive_steps else "all steps"
            assert " ".join(words[3:]).startswith(end)
        curve = outputs.refinement_trace.passes[0].similarity[row, chunk]
        shown = [float(word) for word in words[3:] if "." in word]
        assert shown == pytest.approx(curve[curve.isfinite()].tolist(), abs=1e-4)
    for name in ("slot_norm_context", "delta_norm", "gate_context", *(["mix_share_1"] if pattern == "mix" else [])):
        assert line_of(report, f"{name} ")
    outputs.refinement_trace.plot(tmp_path / "trace.png")
    outputs.refinement_trace.to_html(tmp_path / "trace.html")


def test_nan_in_every_refiner_is_named(family_member, batch, switch, capsys):
    hybrid = family_member[1]
    parts = [(name, part) for name, part in hybrid.refiner.named_modules(prefix="refiner") if ".slots." in name]
    name, broken = next((name, part) for name, part in parts if isinstance(part, torch.nn.Linear))
    torch.nn.init.constant_(broken.weight, torch.nan)
    switch(**ON)
    hybrid(batch["input_ids"])
    assert f"NaN or Inf first appeared in {name} (Linear)" in capsys.readouterr().out


def test_debug_mode_changes_no_number(make_hybrid, batch, switch):
    def everything():
        hybrid = make_hybrid()
        found = [hybrid(batch["input_ids"], attention_mask=batch["attention_mask"]).logits]
        for settings in ({}, {"kv_cache": "dual"}, {"cfg_scale": 1.0, "remasking": "refiner"}):
            found.append(hybrid.generate(PROMPT, max_new_tokens=8, block_length=4, **settings))
        outputs = hybrid.train()(**batch)
        outputs.loss.backward()
        return [*found, outputs.loss, *(parameter.grad for parameter in hybrid.refiner.parameters())]

    without = everything()
    switch(**ON)
    assert all(torch.equal(a, b) for a, b in zip(everything(), without, strict=True))


class Operations(TorchDispatchMode):
    """The names of all operations, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_free_when_off(tiny_hybrid, batch, switch):
    """Not one operation more than the forward without its decorator, and nothing read on the host."""

    def run(forward):
        with Operations() as operations, HostCopies() as copies:
            forward(tiny_hybrid, **batch)
        return operations.names, copies.count

    tiny_hybrid.train()
    bare = run(BARE_FORWARD)
    assert run(LLaDATRMForMaskedDiffusion.forward) == bare
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_hybrid.modules())
    switch(**ON)
    operations, copies = run(LLaDATRMForMaskedDiffusion.forward)
    assert len(operations) > len(bare[0]) and copies > bare[1]  # the counters count
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_hybrid.modules())


def test_compiled_models_still_run(tiny_hybrid, batch, switch, capsys):
    inputs = batch["input_ids"]
    expected = tiny_hybrid(inputs).logits
    switch(**ON)
    compiled = torch.compile(tiny_hybrid, backend="eager")
    torch.testing.assert_close(compiled(inputs).logits, expected)
    assert "forward" not in capsys.readouterr().out  # there is no printing from compiled code
    transformer = tiny_hybrid.backbone.model
    transformer.forward = torch.compile(transformer.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(tiny_hybrid(inputs).logits, expected)
    assert "all values finite" in capsys.readouterr().out


def test_remote_code_runs_without_a_report(tiny_hybrid, tmp_path):
    """A checkpoint's own code has the hook, and nothing that fills it: debug mode is the package's."""
    tiny_hybrid.save_pretrained(tmp_path / "hybrid")
    assert not [path.name for path in tmp_path.rglob("*.py") if path.stem in ("debug_report", "non_finite")]
    script = (
        "import sys; sys.modules['llada_trm_hf'] = None\n"
        "import torch; from transformers import AutoModelForMaskedLM\n"
        "model = AutoModelForMaskedLM.from_pretrained('hybrid', trust_remote_code=True)\n"
        "print(model(torch.tensor([[3, 4, 49, 49]])).logits.shape)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", **ON}
    done = run_program([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["torch.Size([1,", "4,", "50])"]

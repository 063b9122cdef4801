"""Refiners in a cascade and mixed against their plain composition, one's own refiners, and hybrids that hold them."""

import importlib
import json
import os
import sys

import pytest
import torch
from conftest import MASK, ROOT, forget_refiner, randomise
from hybrid_models import AUTO_CLASSES, assert_same_model, random_tokens
from run_programs import run_program
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from llada_trm_hf.models import (
    LLaDATRMConfig,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHead,
    RecursiveRefinementHeadConfig,
    RefinerCascade,
    RefinerCascadeConfig,
    RefinerMix,
    RefinerMixConfig,
    SlotTRMRefiner,
    SlotTRMRefinerConfig,
    register_refiner,
)
from llada_trm_hf.models.hub_model import REFINERS, module_name

WIDTH, CHUNK, LENGTH = 32, 4, 22
HEAD = RecursiveRefinementHeadConfig(
    hidden_size=WIDTH, chunk_size=CHUNK, head_hidden_size=16, convergence_threshold=0.02, max_recursive_steps=6
)
SLOTS = SlotTRMRefinerConfig(
    hidden_size=WIDTH, chunk_size=CHUNK, preset="tiny", convergence_threshold=0.05, delta_scale=1.0
)
PATTERNS = {
    "replace": {"refiner": SLOTS},
    "cascade": {"refiner": [HEAD, SLOTS], "integration": "cascade"},
    "mix": {"refiner": [SLOTS, HEAD], "integration": "mix"},
}


@pytest.fixture
def states():
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def active():
    return torch.rand(3, 6, generator=torch.Generator().manual_seed(3)) < 0.6


MASK_LEFT = (torch.arange(LENGTH) >= torch.tensor([[3], [0], [9]])).long()


def build(model_class, config_class, configs):
    model = model_class(config_class(refiner_configs=configs)).eval()
    randomise(model)
    return model.double()


def test_cascade_equals_one_after_the_other(states, active):
    model = build(RefinerCascade, RefinerCascadeConfig, [HEAD, SLOTS])
    arguments = {"output_step_hidden_states": True, "output_statistics": True}
    found = model(states, active, MASK_LEFT, **arguments)
    first = model.refiners[0](states, active, MASK_LEFT, **arguments)
    second = model.refiners[1](first.hidden_states, active, MASK_LEFT, **arguments)
    assert torch.equal(found.hidden_states, second.hidden_states)
    assert torch.equal(found.num_steps, first.num_steps + second.num_steps)
    torch.testing.assert_close(found.confidence, (first.confidence + second.confidence) / 2)
    expected = [*first.step_hidden_states, *second.step_hidden_states]
    assert len(expected) > 4
    torch.testing.assert_close(list(found.step_hidden_states), expected, rtol=0, atol=0)
    curves = torch.cat([first.statistics["similarity"], second.statistics["similarity"]], dim=-1)
    torch.testing.assert_close(found.statistics["similarity"], curves, equal_nan=True)
    torch.testing.assert_close(found.orthogonality_loss, second.orthogonality_loss)
    torch.testing.assert_close(
        found.statistics["delta_norm"], second.statistics["delta_norm"], equal_nan=True, rtol=0, atol=0
    )
    changed = (found.hidden_states != states).any(-1)
    chunk = ((MASK_LEFT.cumsum(-1) - 1) // CHUNK).clamp(min=0)
    assert torch.equal(changed, MASK_LEFT.bool() & active.gather(1, chunk))


def test_mix_equals_the_weighted_changes(states, active):
    model = build(RefinerMix, RefinerMixConfig, [SLOTS, HEAD])
    arguments = {"output_step_hidden_states": True, "output_statistics": True}
    found = model(states, active, MASK_LEFT, **arguments)
    outputs = [refiner(states, active, MASK_LEFT, **arguments) for refiner in model.refiners]
    steps = [output.step_hidden_states for output in outputs]
    assert len(steps[0]) != len(steps[1]) and len(found.step_hidden_states) == max(map(len, steps))
    sums, counts = torch.zeros(3, 6, 2), torch.zeros(3, 6)
    for b in range(3):
        columns = MASK_LEFT[b].nonzero().flatten().tolist()
        for rank, i in enumerate(columns):
            shares = (model.gate.weight @ states[b, i] + model.gate.bias).softmax(0)
            sums[b, rank // CHUNK] += shares
            counts[b, rank // CHUNK] += 1

            def mixed(each, i=i, b=b, shares=shares):
                return states[b, i] + sum(share * (x[b, i] - states[b, i]) for share, x in zip(shares, each))

            torch.testing.assert_close(found.hidden_states[b, i], mixed([output.hidden_states for output in outputs]))
            for k, after in enumerate(found.step_hidden_states):
                torch.testing.assert_close(after[b, i], mixed([own[min(k, len(own) - 1)] for own in steps]))
    weights = sums / counts.clamp(min=1)[..., None]
    confidence = sum(weights[..., i] * output.confidence for i, output in enumerate(outputs))
    refined = active & (counts > 0)
    torch.testing.assert_close(found.confidence[refined], confidence[refined])
    assert (found.confidence[~refined] == 1).all()
    assert torch.equal(found.num_steps, torch.maximum(outputs[0].num_steps, outputs[1].num_steps))
    of_refined = sums[refined].sum(0) / counts[refined].sum()
    for i in range(2):
        assert found.statistics[f"mix_share_{i + 1}"].item() == pytest.approx(of_refined[i].item(), rel=1e-5)
    assert found.statistics["similarity"].shape == (3, 6, 6)
    inactive = ~(active.gather(1, ((MASK_LEFT.cumsum(-1) - 1) // CHUNK).clamp(min=0)) & MASK_LEFT.bool())
    assert torch.equal(found.hidden_states[inactive], states[inactive])


def test_an_untrained_gate_gives_equal_shares(states):
    model = RefinerMix(RefinerMixConfig(refiner_configs=[SLOTS, HEAD])).double()
    for refiner in model.refiners:
        randomise(refiner)
    changes = [refiner(states).hidden_states - states for refiner in model.refiners]
    torch.testing.assert_close(model(states).hidden_states - states, (changes[0] + changes[1]) / 2)
    model(states).hidden_states.sum().backward()
    assert model.gate.weight.grad.abs().max() > 0


def test_statistics_of_two_of_a_kind_have_their_numbers(states):
    model = build(RefinerCascade, RefinerCascadeConfig, [SLOTS, SLOTS])
    statistics = model(states, output_statistics=True).statistics
    first = model.refiners[0](states, output_statistics=True).statistics
    assert set(statistics) == {*first, *(f"{name}_2" for name in first if name != "similarity")}
    torch.testing.assert_close(statistics["gate_context"], first["gate_context"])
    torch.testing.assert_close(statistics["gate_context_2"], model.refiners[1].slots.gates[0].detach().sigmoid())


@pytest.mark.parametrize(
    "model_class, config_class", [(RefinerCascade, RefinerCascadeConfig), (RefinerMix, RefinerMixConfig)]
)
def test_gradients_reach_every_parameter(states, active, model_class, config_class):
    model = build(model_class, config_class, [HEAD, SLOTS])
    outputs = model(states, active)
    (outputs.hidden_states.square().sum() + outputs.confidence.sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    model.zero_grad(set_to_none=True)
    outputs = model(states, torch.zeros_like(active))
    assert torch.equal(outputs.hidden_states, states)
    outputs.confidence.sum().backward()  # nothing is refined, and every parameter still gets a (zero) gradient
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


# --- In a hybrid ---


@pytest.fixture
def make(make_backbone):
    def make(pattern="cascade", **fields):
        fields = {"min_confidence": 0.25, **(pattern if isinstance(pattern, dict) else PATTERNS[pattern]), **fields}
        model = LLaDATRMForMaskedDiffusion.from_backbone(make_backbone(), **fields).eval()
        randomise(model.refiner)
        return model

    return make


@pytest.fixture
def batch():
    clean = random_tokens(3, LENGTH)
    masked = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.6
    return clean.masked_fill(masked, MASK), clean


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hybrid_refines_trains_and_generates(make, batch, pattern):
    model = make(pattern)
    base = model(batch[0], enable_refinement=False).logits
    outputs = model(batch[0], output_refinement_trace=True)
    refined = outputs.refinement_steps > 0
    assert refined.any() and not refined.all() and outputs.refinement_trace.passes[0].similarity.shape[:2] == (3, 6)
    in_active = refined.repeat_interleave(CHUNK, 1)[:, :LENGTH]
    assert torch.equal(outputs.logits[~in_active], base[~in_active])
    assert ((outputs.logits - base).abs().amax(-1)[in_active] > 1e-3).all()
    sequences = model.generate(batch[0][:, :5], max_new_tokens=9, block_length=3, remasking="refiner", kv_cache="dual")
    assert sequences.shape == (3, 14) and not (sequences == MASK).any()

    outputs = model.train()(batch[0], labels=batch[1])
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.refiner.parameters())
    assert {"gate_context", "slot_norm_reasoning", "delta_norm", "similarity"} <= set(outputs.refiner_statistics)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_orthogonality_is_part_of_the_loss(make, batch, pattern):
    losses, components = {}, {}
    for weight in (0.0, 0.5):
        outputs = make(pattern, orthogonality_weight=weight)(batch[0], labels=batch[1])
        losses[weight], components[weight] = outputs.loss, outputs.loss_components["orthogonality"]
    slots = next(module for module in make(pattern).refiner.modules() if isinstance(module, SlotTRMRefiner)).slots
    expected = torch.stack([*slots.overlaps().values()]).mean()
    torch.testing.assert_close(components[0.5], expected.detach())
    torch.testing.assert_close(losses[0.5] - losses[0.0], 0.5 * expected)
    with pytest.raises(ValueError, match=r"orthogonality_weight.*\b0\b"):
        make(pattern, orthogonality_weight=-1.0)


def test_a_head_without_slots_has_no_orthogonality(tiny_hybrid, batch):
    outputs = tiny_hybrid(batch[0], labels=batch[1])
    assert "orthogonality" not in outputs.loss_components and set(outputs.refiner_statistics) == {"similarity"}
    assert tiny_hybrid(batch[0]).refiner_statistics is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_checkpoint(make, batch, tmp_path, pattern, dtype):
    model = make(pattern).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model, batch[0])
    assert loaded.config.integration == pattern and type(loaded.refiner) is type(model.refiner)
    assert loaded.config.orthogonality_weight == 0.01
    if pattern != "replace":
        kinds = [type(refiner).__name__ for refiner in loaded.refiner.refiners]
        assert kinds == [type(refiner).__name__ for refiner in model.refiner.refiners]
        for config, expected in zip(loaded.config.refiner_config.refiner_configs, PATTERNS[pattern]["refiner"]):
            assert config.to_diff_dict().items() >= {"max_recursive_steps": expected.max_recursive_steps}.items()


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_refiner_only_checkpoint(make, make_backbone, batch, tmp_path, pattern, auto_class):
    make_backbone().save_pretrained(tmp_path / "backbone")
    model = make(pattern, backbone_name_or_path=str(tmp_path / "backbone"))
    model.save_pretrained(tmp_path / "refiner", save_backbone=False)
    with safe_open(tmp_path / "refiner/model.safetensors", "pt") as file:
        assert all(name.startswith("refiner.") for name in file.keys())  # noqa: SIM118
    assert_same_model(auto_class.from_pretrained(tmp_path / "refiner"), model, batch[0])


@pytest.mark.parametrize("pattern", ["cascade", "mix"])
def test_refiners_that_work_together_load_alone(make, states, tmp_path, pattern):
    refiner = make(pattern).refiner
    refiner.save_pretrained(tmp_path / "both")
    loaded = AutoModel.from_pretrained(tmp_path / "both")
    torch.testing.assert_close(loaded(states.float()).hidden_states, refiner(states.float()).hidden_states)
    again = make({"refiner": str(tmp_path / "both")})
    assert again.config.integration == pattern


def test_refiners_given_as_names_configs_models_and_folders(make_backbone, make, tmp_path):
    head = RecursiveRefinementHead(HEAD)
    head.save_pretrained(tmp_path / "head")
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(
        make_backbone(),
        ["slot_trm_refiner", SLOTS, head, str(tmp_path / "head")],
        integration="cascade",
        chunk_size=CHUNK,
    )
    members = hybrid.refiner.refiners
    assert [type(m) for m in members] == [SlotTRMRefiner] * 2 + [RecursiveRefinementHead] * 2
    assert members[2] is head and torch.equal(members[3].projector.weight, head.projector.weight)
    assert members[0].config.hidden_size == WIDTH and members[0].config.chunk_size == CHUNK
    assert members[1].config.preset == "tiny"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_implementation_reaches_every_refiner(make, batch, tmp_path, pattern):
    model = make(pattern)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
    slots = [module for module in loaded.modules() if isinstance(module, SlotTRMRefiner)]
    assert [module.config._attn_implementation for module in slots] == ["eager"]
    torch.testing.assert_close(loaded(batch[0]).logits, model(batch[0]).logits, atol=1e-4, rtol=1e-4)


def test_a_config_of_before_loads(tiny_hybrid, batch, tmp_path):
    """A single refiner_config, and none of the fields that came with integration."""
    tiny_hybrid.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["integration"], config["orthogonality_weight"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.integration == "replace"
    assert_same_model(loaded, tiny_hybrid, batch[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"refiner": [HEAD, SLOTS]}, "2 refiners, but integration=None: say how .* 'cascade' or 'mix'"),
        ({"refiner": [HEAD, SLOTS], "integration": "replace"}, "2 refiners, but integration='replace'"),
        ({"refiner": [HEAD, SLOTS], "integration": "stack"}, "must be one of replace, cascade, mix, got 'stack'"),
        ({"refiner": SLOTS, "integration": "mix"}, "'mix', but there is only one refiner, a slot_trm_refiner"),
        ({"refiner": [], "integration": "mix"}, "list of refiners is empty"),
        (
            {"refiner": [HEAD, SlotTRMRefinerConfig(hidden_size=WIDTH, chunk_size=8)], "integration": "mix"},
            r"same chunk_size, got \[4, 8\]",
        ),
        (
            {"refiner": [HEAD, SlotTRMRefinerConfig(hidden_size=64, chunk_size=4)], "integration": "mix"},
            r"same hidden_size, got \[32, 64\]",
        ),
        ({"refiner": "slot_refiner"}, r"did you mean 'slot_trm_refiner'"),
        ({"refiner": "refiner_mix"}, r"Unknown refiner 'refiner_mix'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value.get("integration")),
)
def test_mistakes_have_one_clear_error(make_backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        LLaDATRMForMaskedDiffusion.from_backbone(make_backbone(), **arguments)


@pytest.mark.parametrize("model_class", [RefinerCascade, RefinerMix])
def test_config_without_refiners(model_class):
    """transformers before 5.20 makes one to compare with when it saves; it is good for no model."""
    config = model_class.config_class()
    assert config.to_dict()["refiner_configs"] == [] and config.hidden_size is None and config.chunk_size is None
    with pytest.raises(ValueError, match="at least two refiners, got 0: pass refiner_configs"):
        model_class(config)
    with pytest.raises(ValueError, match="at least two refiners, got 1"):
        model_class.config_class(refiner_configs=[HEAD])


# --- One's own ---

OWN_REFINER = '''
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llada_trm_hf import LLaDATRMForMaskedDiffusion, RefinerOutput as Output  # a file may import anything
from llada_trm_hf.models.refiners.modeling_refiner import (
    ChunkLayout,
)

from .own_layers import Shift


class OwnConfig(PreTrainedConfig):
    model_type = "own_refiner"
    hidden_size: int = 8
    chunk_size: int = 4


class OwnRefiner(PreTrainedModel):
    """Needs nothing of the package's base class."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.shift = Shift(config.hidden_size)
        self.post_init()

    def forward(self, hidden_states, active_chunks=None, attention_mask=None, max_steps=None,
                output_step_hidden_states=False, output_statistics=False):
        batch, length, _ = hidden_states.shape
        layout = ChunkLayout(batch, length, self.config.chunk_size, attention_mask, hidden_states.device)
        active = layout.any_per_chunk(layout.is_real) if active_chunks is None else active_chunks
        states = torch.where(layout.to_tokens(active)[..., None], self.shift(hidden_states), hidden_states)
        return Output(hidden_states=states, confidence=1 - 0.5 * active.float(), num_steps=active.long(),
                      step_hidden_states=(states,) if output_step_hidden_states else None)
'''
OWN_LAYERS = """
import torch
from torch import nn


class Shift(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.offset = nn.Linear(1, size)

    def forward(self, states):
        return states + self.offset(torch.ones(1, dtype=states.dtype))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of a user's, with a refiner that is registered."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in (("__init__", ""), ("own_file", OWN_REFINER), ("own_layers", OWN_LAYERS)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("mine.own_file")
    register_refiner(module.OwnConfig, module.OwnRefiner)
    yield module
    forget_refiner("own_refiner")
    for name in ("mine", "mine.own_file", "mine.own_layers"):
        sys.modules.pop(name, None)


def own_hybrid(make, pattern="replace", **fields):
    refiner = "own_refiner" if pattern == "replace" else ["own_refiner", SLOTS]
    return make({"refiner": refiner, "integration": pattern}, chunk_size=CHUNK, **fields)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_own_refiner_like_any_other(own, make, make_backbone, batch, tmp_path, pattern):
    make_backbone().save_pretrained(tmp_path / "backbone")
    model = own_hybrid(make, pattern, backbone_name_or_path=str(tmp_path / "backbone"))
    base = model(batch[0], enable_refinement=False).logits
    assert (model(batch[0], output_refinement_trace=True).logits - base).abs().max() > 0.1
    model.train()(batch[0], labels=batch[1]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.refiner.parameters())
    model.eval().save_pretrained(tmp_path / "whole")
    assert_same_model(AutoModelForMaskedLM.from_pretrained(tmp_path / "whole"), model, batch[0])
    model.save_pretrained(tmp_path / "refiner only", save_backbone=False)
    assert_same_model(AutoModelForMaskedLM.from_pretrained(tmp_path / "refiner only"), model, batch[0])


def test_own_refiner_by_its_model_type(own, tmp_path):
    assert type(AutoConfig.for_model("own_refiner")) is own.OwnConfig
    refiner = AutoModel.from_config(own.OwnConfig())
    refiner.save_pretrained(tmp_path / "alone")
    assert type(AutoModel.from_pretrained(tmp_path / "alone")) is own.OwnRefiner
    config = LLaDATRMConfig(
        refiner_config={"model_type": "own_refiner", "hidden_size": 4096, "chunk_size": 16}, mask_token_id=1
    )
    assert type(config.refiner_config) is own.OwnConfig


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["llada_trm_hf"] = None
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

torch.set_num_threads(1)
logits, inputs = {}, torch.load("inputs.pt", weights_only=True)
for folder in sys.argv[1:]:
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    assert "llada_trm_hf" not in type(model).__module__.split(".")
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).integration == folder.split()[0]
    logits[folder] = model(inputs).logits.detach()
model.save_pretrained("again")
again = AutoModelForMaskedLM.from_pretrained("again", trust_remote_code=True)
assert torch.allclose(again(inputs).logits, logits[folder], atol=1e-5)
torch.save(logits, "logits.pt")
"""


def run(arguments, folder, **environment):
    """Python in a process of its own that runs in `folder`, with HF's cache of code there too."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = run_program([sys.executable, *arguments], cwd=folder, env=inherited | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_pattern_loads_where_the_package_is_not_installed(own, make, make_backbone, batch, tmp_path):
    """Among them the checkpoint that the example leaves, whose refiner stands in the script that was run."""
    root = ROOT
    example = str(root / "examples/custom_refiner.py")
    output = run([example, "cascade example"], tmp_path, PYTHONPATH=str(root))
    losses = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step")]
    assert len(losses) == 10 and losses[-1] < losses[0]

    make_backbone().save_pretrained(tmp_path / "backbone")
    models = {
        "replace": make("replace"),
        "mix own": own_hybrid(make, "mix"),
        "cascade own, refiner only": own_hybrid(make, "cascade", backbone_name_or_path=str(tmp_path / "backbone")),
    }
    for folder, model in models.items():
        model.save_pretrained(tmp_path / folder, save_backbone="only" not in folder)
    torch.save(batch[0], tmp_path / "inputs.pt")
    run(["-c", WITHOUT_THE_PACKAGE, "cascade example", *models], tmp_path)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert "cascade example" in found
    for folder, model in models.items():
        torch.testing.assert_close(found[folder], model(batch[0]).logits, atol=1e-5, rtol=1e-4)
    files = {file.name for file in (tmp_path / "replace").iterdir()}
    assert "own_file.py" not in files and "registered_models.py" in files
    assert "llada_trm_hf" not in (tmp_path / "mix own/own_file.py").read_text()


def test_a_checkpoint_whose_refiner_is_not_registered(own, make, tmp_path):
    own_hybrid(make).save_pretrained(tmp_path / "whole")
    forget_refiner("own_refiner")
    with pytest.raises(ValueError, match=r"'own_refiner'.*register_refiner"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "whole")


def test_registering_mistakes(own, tmp_path):
    class Taken(own.OwnConfig):
        model_type = "slot_trm_refiner"

    class Bert(own.OwnConfig):
        model_type = "bert"

    class Nameless(own.OwnConfig):
        model_type = ""

    for config, message in (
        (Taken, "Taken.model_type='slot_trm_refiner' is taken by SlotTRMRefinerConfig"),
        (Bert, "Bert.model_type='bert' is taken by BertConfig"),
        (Nameless, "Nameless needs a model_type of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            register_refiner(config, own.OwnRefiner)

    class Other(own.OwnConfig):
        model_type = "other_refiner"

    with pytest.raises(ValueError, match=r"OwnRefiner\.config_class.*Other"):
        register_refiner(Other, own.OwnRefiner)
    # A file whose name is taken would replace one of the package's in the checkpoint.
    (tmp_path / "mine/rotary.py").write_text(OWN_REFINER.replace("own_refiner", "third_refiner"))
    module = importlib.import_module("mine.rotary")
    with pytest.raises(ValueError, match=r"rotary\.py.*rename"):
        register_refiner(module.OwnConfig, module.OwnRefiner)
    assert "own_refiner" in REFINERS and not {"other_refiner", "third_refiner"} & set(REFINERS)


def test_a_class_of_a_notebook_is_registered_and_its_code_left_out(own, make, monkeypatch, tmp_path):
    own_classes = (own.OwnConfig, own.OwnRefiner)
    monkeypatch.setattr(
        "llada_trm_hf.models.hub_model.module_name", lambda cls: None if cls in own_classes else module_name(cls)
    )
    with pytest.warns(UserWarning, match=r"OwnRefiner.*code is not saved"):
        own_hybrid(make).save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole/modeling_llada_trm.py").exists() and not (tmp_path / "whole/own_file.py").exists()
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "whole").config.refiner_config.model_type == "own_refiner"

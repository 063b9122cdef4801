"""What `torch.compile` and `torch.export` make of the models, without a graph break, against the models themselves."""

import pytest
import torch
from conftest import MASK, HostCopies, randomise
from latent_thinking_models import make_model

from llada_trm_hf.models import (
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
    SequenceTRM,
    SequenceTRMConfig,
    SlotTRMRefinerConfig,
    TRMRefinerConfig,
)

CHUNK, LENGTH, WIDTH = 4, 14, 32
TRM = {
    "hidden_size": 16,
    "n_heads": 2,
    "n_latent_steps": 1,
    "n_deep_recursions": 2,
    "n_supervision_steps": 4,
}
LEFT = (torch.arange(LENGTH) >= torch.tensor([[5], [0], [10]])).long()
HOLES = torch.tensor([[1, 0] * 7, [1] * LENGTH, [0] * LENGTH])


def refiner_configs(kind, early_stopping):
    """The refiners' thresholds are such that chunks stop after different numbers of steps, or 0: never."""
    sizes = {"hidden_size": WIDTH, "chunk_size": CHUNK, "max_recursive_steps": 4}
    slots = {"num_hidden_layers": 1, "num_attention_heads": 2}
    head = RecursiveRefinementHeadConfig(
        **sizes, head_hidden_size=16, convergence_threshold=0.02 if early_stopping else 0.0
    )
    slot = SlotTRMRefinerConfig(**sizes, **slots, convergence_threshold=0.0013 if early_stopping else 0.0)
    trm = TRMRefinerConfig(**sizes, recursion_size=16, convergence_threshold=1.1 if early_stopping else 0.0)
    return {"head": head, "slot": slot, "trm": trm}.get(kind, [head, slot])


@pytest.fixture
def make_hybrid_of(make_backbone):
    def make(kind, early_stopping=True):
        backbone, configs = make_backbone(), refiner_configs(kind, early_stopping)
        together = {"integration": kind} if isinstance(configs, list) else {}
        model = LLaDATRMForMaskedDiffusion.from_backbone(backbone, refiner=configs, min_confidence=0.3, **together)
        randomise(model.refiner)
        return model.eval()

    return make


def compiled(function, backend="eager"):
    """Without a graph break: `fullgraph=True` refuses them."""
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


def assert_same_outputs(found, expected, names=None):
    assert found.keys() == expected.keys()
    for name in names or expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


def states_of(batch=3, length=LENGTH, width=WIDTH, seed=0):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


# --- Refiners ---


@pytest.mark.parametrize(
    "kind, early_stopping",
    [
        ("head", False),
        ("slot", False),
        ("trm", False),
        ("head", True),
        ("trm", True),
        ("cascade", True),
        ("mix", True),
    ],
)
def test_refiners(make_hybrid_of, kind, early_stopping):
    refiner = make_hybrid_of(kind, early_stopping).refiner
    active = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    with torch.no_grad():
        expected = refiner(states_of(), active, LEFT, max_steps=3)
        found = compiled(refiner)(states_of(), active, LEFT, max_steps=3)
    assert_same_outputs(found, expected, ["hidden_states", "confidence", "num_steps"])
    taken = expected.num_steps.unique().tolist()
    assert taken == [0, 3] if kind == "mix" or not early_stopping else len(taken) > 2


@pytest.mark.parametrize("kind", ["cascade", pytest.param("mix", marks=pytest.mark.slow)])
def test_gradients_of_refiners(make_hybrid_of, kind):
    refiner = make_hybrid_of(kind, early_stopping=False).refiner.double()
    active = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    gradients = []
    for forward in (refiner, compiled(refiner, "aot_eager")):
        outputs = forward(states_of().double(), active, LEFT, max_steps=2)
        refiner.zero_grad()
        (outputs.hidden_states.square().sum() + outputs.confidence.log().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in refiner.named_parameters()})
    eager, other = gradients
    assert all(gradient is not None and gradient.any() for gradient in eager.values())
    for name, gradient in eager.items():
        torch.testing.assert_close(other[name], gradient, atol=1e-8, rtol=1e-5)


# --- Hybrids ---


def tokens_of(batch=3, length=LENGTH):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, MASK, (batch, length), generator=generator)
    return input_ids.masked_fill(torch.rand(batch, length, generator=generator) < 0.5, MASK)


@pytest.mark.parametrize("kind", ["head", "slot", pytest.param("mix", marks=pytest.mark.slow)])
def test_hybrids(make_hybrid_of, kind):
    model = make_hybrid_of(kind)
    inputs = {"input_ids": tokens_of(), "attention_mask": LEFT, "max_steps": 3, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**inputs)
        assert_same_outputs(compiled(model)(**inputs), expected)
    steps = expected.refinement_steps
    assert (steps == 0).any() and len(steps.unique()) > 2


@pytest.mark.parametrize(
    "keep", [3, torch.tensor([2, 9]), torch.tensor([[9, 2], [1, 1], [13, 0]])], ids=["last", "columns", "positions"]
)
def test_logits_where_they_are_asked_for(make_hybrid_of, keep):
    """Also without padding, and with every chunk refined."""
    model = make_hybrid_of("head", early_stopping=False)
    model.config.refine_low_confidence_only = False
    relevant = torch.ones(3, LENGTH, dtype=torch.bool)
    with torch.no_grad():
        expected = model(tokens_of(), logits_to_keep=keep, relevant_tokens=relevant)
        found = compiled(model)(tokens_of(), logits_to_keep=keep, relevant_tokens=relevant)
    assert_same_outputs(found, expected)
    assert (expected.refinement_steps == 4).all()


# --- SequenceTRM and the thinker ---


def make_trm(style="trm"):
    """Whose samples halt after different numbers of steps."""
    torch.manual_seed(0)
    model = SequenceTRM(SequenceTRMConfig(**TRM, intermediate_size=24, block_style=style)).eval()
    randomise(model, seed=1)
    with torch.no_grad():
        model.halt_head.weight.mul_(8)
    return model.double()


def make_thinker():
    config = SequenceTRMConfig(**TRM | {"n_layers": 1, "n_supervision_steps": 2, "dropout": 0.0})
    return make_model(trm=config).thinker.double()


def contexts_of(batch=3, length=LENGTH, seed=0):
    return states_of(batch, length, TRM["hidden_size"], seed).double()


@pytest.mark.parametrize("style, mask", [("trm", None), ("trm", HOLES), ("llm_trm", HOLES)])
def test_supervision_steps(style, mask):
    """With padding that holds NaN."""
    model, context = make_trm(style), contexts_of()
    if mask is not None:
        context = context.masked_fill(mask[..., None] == 0, torch.nan)
    forward = compiled(model)
    with torch.no_grad():
        expected = model(context, mask)
        found = forward(context, mask)
        assert_same_outputs(found, expected)
        target = torch.ones(3, TRM["hidden_size"], dtype=torch.double)
        following = {"y": expected.y, "z": expected.z, "target": target}
        expected, found = model(context, mask, **following), forward(context, mask, **following)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.y, expected.y)


@pytest.mark.parametrize("threshold, convergence", [(0.5, 0.0), (1.0, 0.0), (0.9, 0.95), (1.0, 0.95)])
def test_reasoning(threshold, convergence):
    """With 1.0 and 0 no sample halts; else those that have halted keep their results in the compiled graph."""
    model, context = make_trm(), contexts_of(8)
    mask = torch.ones(8, LENGTH, dtype=torch.long)
    mask[2, 3:], mask[5, :9] = 0, 0

    def reason(context, mask):
        halting = {"halt_threshold": threshold, "convergence_threshold": convergence}
        return model.reason(context, mask, max_steps=4, output_steps=True, **halting)

    with torch.no_grad():
        expected, found = reason(context, mask), compiled(reason)(context, mask)
    for output in (found, expected):  # without halting there may be fewer steps than the graph takes
        output.step_predictions = output.step_predictions[:, : int(expected.num_steps.max())]
        output.step_halt_probability = output.step_halt_probability[:, : int(expected.num_steps.max())]
    assert_same_outputs(found, expected)
    taken = set(expected.num_steps.tolist())
    assert taken == {4} if (threshold, convergence) == (1.0, 0.0) else len(taken) > 1


def test_fixed_steps_do_not_wait_for_the_device():
    """Asking who has halted is a wait in every step. What is left is the lengths, once."""
    model, context, waits = make_trm(), contexts_of(), []
    for max_steps in (1, 4):
        with HostCopies() as copies, torch.no_grad():
            model.reason(context, LEFT, max_steps=max_steps, halt_threshold=1.0)
        waits.append(copies.count)
    assert waits[0] == waits[1]


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_thinker(mask):
    thinker, states, gradients = make_thinker(), states_of().double(), []
    with torch.no_grad():
        assert_same_outputs(compiled(thinker)(states, mask, max_steps=3), thinker(states, mask, max_steps=3))
    for forward in (thinker.train(), compiled(thinker, "aot_eager")):
        thinker.zero_grad()
        forward(states, mask).latents.square().sum().backward()
        gradients.append({name: p.grad for name, p in thinker.named_parameters() if p.grad is not None})
    assert {"compressor.weight", "projector.weight", "trm.reasoning_token"} <= gradients[0].keys()
    for name, gradient in gradients[1].items():  # a graph gives zeros to the halting head, which learns nothing here
        torch.testing.assert_close(gradient, gradients[0].get(name, torch.zeros_like(gradient)), atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("part", ["trm", "llm_trm", "thinker"])
@pytest.mark.parametrize("padded", [False, True])
def test_exported_with_dynamic_batch_and_length(part, padded):
    """On other sizes than the example's, single rows and tokens among them."""
    model = make_thinker() if part == "thinker" else make_trm(part)
    name, width = ("hidden_states", WIDTH) if part == "thinker" else ("context", TRM["hidden_size"])
    model.requires_grad_(False)

    def inputs(batch, length):
        states = {name: states_of(batch, length, width, seed=length).double()}
        mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.7
        return states | ({"mask": mask.long()} if padded else {})

    shapes = {key: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")} for key in inputs(3, 7)}
    program = torch.export.export(model, (), inputs(3, 7), dynamic_shapes=shapes)
    for batch, length in ((3, 7), (1, 1), (1, 9), (4, 1), (5, 20)):
        assert_same_outputs(program.module()(**inputs(batch, length)), model(**inputs(batch, length)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "slot"])
def test_with_inductor(make_hybrid_of, kind):
    model = make_hybrid_of(kind, early_stopping=False)
    inputs = {"input_ids": tokens_of(), "attention_mask": LEFT}
    thinker = make_model(halt_threshold=1.0).thinker
    with torch.no_grad():
        names = ["logits", "chunk_confidence", "refiner_confidence", "refinement_steps"]
        found, expected = compiled(model, "inductor")(**inputs), model(**inputs)
        for name in names:
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
        found, expected = compiled(thinker, "inductor")(states_of(), LEFT), thinker(states_of(), LEFT)
        torch.testing.assert_close(found.latents, expected.latents, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.num_steps, expected.num_steps)

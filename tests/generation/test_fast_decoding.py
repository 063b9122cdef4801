"""Block caches, parallel decoding and remasking, against a transformer and a sampler written plainly for one row."""

import itertools
import json

import pytest
import torch
from conftest import EOS, MASK, PAD, HostCopies
from transformers import DynamicCache

from llada_trm_hf.generation.block_kv_cache import BlockKVCache
from llada_trm_hf.generation.commit_rules import choose_positions
from llada_trm_hf.generation.configuration_masked_diffusion import MaskedDiffusionGenerationConfig
from llada_trm_hf.models import LLaDATRMForMaskedDiffusion

PROMPT = [5, 11, 23, 7, 42, 8]
# Prompts of several lengths; the last ones have masks to fill in.
RAGGED = [[5, 11, 23, 7, 42, 8], [30, 31], [17], [9, MASK, 40, MASK], [MASK, 3]]


# --- A plain reference: one row, one layer after the other, the keys and values of every column in a list ---


def norm(states, module):
    return states / (states.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def rotate(states, positions, base):
    """`states` [heads, W, head_dim] at `positions` [W]."""
    half = states.shape[-1] // 2
    angles = positions[:, None] * base ** (-torch.arange(half) / half)
    first, second = states[..., :half], states[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def plain_hidden_states(model, canvas, columns, stored):
    """
    The last hidden states of `columns`, a list of ints. `stored` maps (layer, column) to a key and a value: those of
    `columns` are replaced, those of all others read.
    """
    config, at = model.config, torch.tensor(columns)
    states = model.model.embed_tokens.weight[torch.tensor(canvas)[at]]
    groups = config.num_attention_heads // config.num_key_value_heads
    for number, layer in enumerate(model.model.layers):
        normed, attention = norm(states, layer.input_layernorm), layer.self_attn
        query, key, value = (
            (normed @ projection.weight.T).view(len(columns), -1, config.head_dim).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        base = config.rope_parameters["rope_theta"]
        query, key = rotate(query, at, base), rotate(key, at, base)
        stored.update({(number, c): (key[:, i], value[:, i]) for i, c in enumerate(columns)})
        keys, values = (
            torch.stack([stored[number, c][part] for c in range(len(canvas))], dim=1).repeat_interleave(groups, 0)
            for part in (0, 1)
        )
        weights = (query @ keys.transpose(1, 2) / config.head_dim**0.5).softmax(-1)
        states = states + (weights @ values).transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
        normed, mlp = norm(states, layer.post_attention_layernorm), layer.mlp
        gate = torch.nn.functional.silu(normed @ mlp.gate_proj.weight.T)
        states = states + (gate * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return norm(states, model.model.norm)


@torch.no_grad()
def reference(
    model,
    prompt,
    max_new_tokens,
    kv_cache,
    block_length,
    steps_per_block=None,
    threshold=None,
    factor=None,
    cfg_scale=0.0,
    remask=None,
    budget=1,
):
    """The canvas before the first and after each step; after the first step of a block only its columns move."""
    canvas = prompt + [MASK] * max_new_tokens
    given = {i for i, token in enumerate(canvas) if token != MASK}
    start, history = min(set(range(len(canvas))) - given), [list(canvas)]
    for end in range(len(prompt) + block_length, len(canvas) + block_length, block_length):
        end = min(end, len(canvas))
        stores, budgets = ({}, {}), {i: budget for i in range(start, end) if canvas[i] == MASK}
        num_masked = len(budgets)
        num_steps = steps_per_block or num_masked
        for step in itertools.count():
            undecided = [i for i in range(start, end) if canvas[i] == MASK]
            at_least = 2 if kv_cache != "none" and (threshold or factor) else 1
            if not undecided and step >= at_least:
                break
            stop = end if kv_cache == "dual" else len(canvas)
            columns = list(range(len(canvas)) if step == 0 or kv_cache == "none" else range(start, stop))
            logits = plain_hidden_states(model, canvas, columns, stores[0]) @ model.lm_head.weight.T
            if cfg_scale:
                blank = [MASK if i in given else token for i, token in enumerate(canvas)]
                other = plain_hidden_states(model, blank, columns, stores[1]) @ model.lm_head.weight.T
                logits = other + (cfg_scale + 1) * (logits - other)
            probabilities = dict(zip(columns, logits.double().softmax(-1)))
            best = {i: max((p, -t) for t, p in enumerate(probabilities[i].tolist()) if t != MASK) for i in undecided}
            ranked = sorted(undecided, key=lambda i: -best[i][0])
            if threshold is not None:
                chosen = ranked[:1] + [i for i in ranked[1:] if best[i][0] >= threshold]
            elif factor is not None:
                fits = [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - best[ranked[n - 1]][0]) < factor]
                chosen = ranked[: max([1, *fits])]
            else:
                quota = num_masked // num_steps + (step < num_masked % num_steps)
                if step >= num_steps:
                    quota = num_masked // num_steps
                chosen = ranked[: max(quota, 1) if remask is not None else quota]
            unsure = []
            if remask is not None:
                decided = [i for i in budgets if canvas[i] != MASK and budgets[i] > 0]
                unsure = [i for i in decided if probabilities[i][canvas[i]] < remask]
            for i in chosen:
                canvas[i] = -best[i][1]
            for i in unsure:
                canvas[i], budgets[i] = MASK, budgets[i] - 1
            history.append(list(canvas))
        start = end
    return history


def generate(model, prompt, **kwargs):
    """One row; the canvas before the first and after each step."""
    outputs = model.generate(torch.tensor([prompt]), output_history=True, return_dict_in_generate=True, **kwargs)
    assert outputs.num_forward_passes == len(outputs.history) - 1
    num_decided = sum(map(MASK.__eq__, outputs.history[0, 0].tolist()))
    assert outputs.tokens_per_forward.item() == pytest.approx(num_decided / outputs.num_forward_passes)
    return outputs.history[:, 0].tolist()


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


# --- Caches ---


@pytest.mark.parametrize("kv_cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("prompt", [PROMPT, [9, MASK, 40, MASK]], ids=["prompt", "masks in the prompt"])
@pytest.mark.parametrize(
    "settings, plain",
    [
        ({}, {}),
        ({"num_diffusion_steps": 6}, {"steps_per_block": 2}),  # in each of 3 blocks
        ({"cfg_scale": 0.7}, {"cfg_scale": 0.7}),
        ({"confidence_threshold": 0.15}, {"threshold": 0.15}),
        ({"confidence_factor": 2.3}, {"factor": 2.3}),
        ({"remask_committed": 0.08}, {"remask": 0.08}),
        ({"remask_committed": 0.2, "remask_budget": 2, "confidence_threshold": 0.2},
         {"remask": 0.2, "budget": 2, "threshold": 0.2}),
    ],
    ids=str,
)  # fmt: skip
def test_matches_plain_reference(tiny_backbone, prompt, kv_cache, settings, plain):
    expected = reference(tiny_backbone, prompt, 14, kv_cache, block_length=5, **plain)
    arguments = {"max_new_tokens": 14, "block_length": 5, "kv_cache": kv_cache, **settings}
    assert generate(tiny_backbone, prompt, **arguments) == expected
    assert MASK not in expected[-1]


def test_the_cases_above_differ(make_backbone):
    """Else the test above would hold for an implementation that ignores the setting."""
    model = make_backbone(num_hidden_layers=3)
    runs = [reference(model, PROMPT, 14, kv_cache, block_length=5) for kv_cache in ("none", "prefix", "dual")]
    assert all(one != other for one, other in itertools.combinations(runs, 2))
    by_factor = reference(model, PROMPT, 14, "none", block_length=5, factor=2.3)
    commits = {a.count(MASK) - b.count(MASK) for a, b in itertools.pairwise(by_factor)}
    assert 1 in commits and len(commits) > 1
    remasked = reference(model, PROMPT, 14, "none", block_length=5, remask=0.08)
    assert any(token == MASK != before for a, b in itertools.pairwise(remasked) for before, token in zip(a, b))


@pytest.mark.parametrize("kv_cache", ["prefix", "dual"])
def test_exact_where_it_should_be(make_backbone, kv_cache):
    """The keys of the first layer depend on their own token only: a single layer has nothing to approximate."""
    settings = {"max_new_tokens": 12, "block_length": 4}
    shallow, deep = make_backbone(num_hidden_layers=1), make_backbone(num_hidden_layers=3)
    assert generate(shallow, PROMPT, kv_cache=kv_cache, **settings) == generate(shallow, PROMPT, **settings)
    assert generate(deep, PROMPT, kv_cache=kv_cache, **settings) != generate(deep, PROMPT, **settings)
    # One step in each block: every pass computes everything.
    settings["num_diffusion_steps"] = 3
    assert generate(deep, PROMPT, kv_cache=kv_cache, **settings) == generate(deep, PROMPT, **settings)
    # One block that begins with the canvas: nothing stands before it, and after it.
    settings = {"max_new_tokens": 12}
    assert generate(deep, [MASK, 9], kv_cache=kv_cache, **settings) == generate(deep, [MASK, 9], **settings)


@pytest.mark.parametrize("kv_cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_diffusion_steps": 7},
        {"cfg_scale": 0.7, "confidence_threshold": 0.15},
        {"confidence_threshold": 0.15},
        {"confidence_factor": 2.3, "remask_committed": 0.1},
        {"remask_committed": 0.1, "cfg_scale": 0.4},
        {"confidence_threshold": 0.15, "stop_at_eos": True, "eos_token_id": [EOS, 33, 20, 36]},
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ragged_batch_gives_what_each_row_gives_alone(make_backbone, kv_cache, settings, attention):
    model = make_backbone(num_hidden_layers=3)
    model.set_attn_implementation(attention)
    settings = {"max_new_tokens": 14, "block_length": 5, "kv_cache": kv_cache, **settings}
    prompts = RAGGED
    if "num_diffusion_steps" in settings:  # a schedule is that of the row with most masks
        prompts = [prompt for prompt in RAGGED if MASK not in prompt]
    ids, mask = left_padded(prompts)
    together = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    alone = [model.generate(torch.tensor([p]), return_dict_in_generate=True, **settings) for p in prompts]
    for i, (prompt, single) in enumerate(zip(prompts, alone)):
        assert together.sequences[i, ids.shape[1] - len(prompt) :].tolist() == single.sequences[0].tolist(), i
        if "confidence_threshold" in settings and "remask_committed" not in settings:
            assert together.tokens_per_forward[i] == pytest.approx(single.tokens_per_forward.item()), i
    assert together.num_forward_passes >= max(single.num_forward_passes for single in alone)


def test_a_decided_row_leaves_the_batch(tiny_backbone):
    """Rows that have decided a block do not take part in what the others still need."""
    ids, mask = left_padded(RAGGED[:3])
    seen = []
    hook = tiny_backbone.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    settings = {"max_new_tokens": 12, "block_length": 6, "confidence_threshold": 0.12}
    outputs = tiny_backbone.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    hook.remove()
    assert {rows for rows, _ in seen} >= {1, 3}
    # A row's tokens over the passes it took part in.
    assert (12 / outputs.tokens_per_forward).sum().item() == pytest.approx(sum(rows for rows, _ in seen))


@pytest.mark.parametrize("kv_cache, width", [("none", 18), ("prefix", 12), ("dual", 6)])
def test_what_a_pass_computes(tiny_backbone, kv_cache, width):
    """The columns that enter the transformer, and the positions that enter the LM head."""
    columns, positions = [], []
    hooks = [
        tiny_backbone.model.embed_tokens.register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1])),
        tiny_backbone.lm_head.register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[:-1].numel())),
    ]
    tiny_backbone.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, block_length=6, num_diffusion_steps=6, kv_cache=kv_cache
    )
    for hook in hooks:
        hook.remove()
    assert columns[:3] == [18, width, width] and columns[3] == 18  # the second block is filled anew
    assert positions == [6, 4, 2] * 2


def test_no_synchronisation_in_a_fixed_schedule(tiny_backbone, monkeypatch):
    """Between two passes of a fixed schedule nothing is read on the host, nor does a shape depend on a value."""
    copies = []
    for method in ("tolist", "cpu"):
        original = getattr(torch.Tensor, method)
        monkeypatch.setattr(
            torch.Tensor, method, lambda self, _m=method, _original=original: copies.append(_m) or _original(self)
        )

    def run(prompts=(PROMPT,), **settings):
        copies.clear()
        ids, mask = left_padded(prompts)
        with HostCopies() as counted:
            tiny_backbone.generate(ids, attention_mask=mask, max_new_tokens=12, **settings)
        return counted.count, list(copies)

    for prompts in ([PROMPT], RAGGED[:3]):
        for settings in ({}, {"kv_cache": "dual"}, {"cfg_scale": 0.5, "suppress_tokens": [3], "defer_tokens": [4]}):
            few, many = (run(prompts, num_diffusion_steps=steps, **settings) for steps in (3, 12))
            assert few == many, settings
    assert many[0] > 0  # the counter counts: a block begins with a look at its masks
    # Where what is left decides when to stop, each step looks once, and once more finds nothing.
    assert run(confidence_threshold=1.0)[1].count("cpu") == 13


def test_transformers_cache_holds_what_stands_before(make_backbone):
    model = make_backbone(num_hidden_layers=1)
    ids = torch.tensor([PROMPT + [MASK] * 3])
    cache = DynamicCache()
    model(ids[:, :4], past_key_values=cache)
    outputs = model(ids[:, 4:], past_key_values=cache, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(outputs.logits, model(ids).logits[:, 4:])


def test_cached_pass_matches_full_pass(tiny_backbone):
    """With nothing changed, computing some columns again changes nothing, whatever the attention mask."""
    ids, mask = left_padded(RAGGED[:3])
    full = tiny_backbone(ids, attention_mask=mask).logits
    cache = BlockKVCache(2)
    tiny_backbone(ids, attention_mask=mask, past_key_values=cache)
    cache.columns = torch.tensor([2, 3, 4])
    again = tiny_backbone(ids[:, 2:5], attention_mask=mask, past_key_values=cache).logits
    real = mask[:, 2:5].bool()
    torch.testing.assert_close(again[real], full[:, 2:5][real])


# --- How many tokens a step commits ---


def test_factor_commits_as_many_as_the_paper_says():
    confidence = torch.tensor([[0.99, 0.6, 0.97, 0.9, 0.95], [0.3, 0.2, 0.1, 0.05, 0.01]])
    undecided = torch.tensor([[True] * 5, [True, True, True, False, False]])
    for factor in (0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 3.5, 10.0):
        config = MaskedDiffusionGenerationConfig(confidence_factor=factor)
        chosen = choose_positions(confidence, undecided, torch.zeros(2), config)
        for row in range(2):
            ranked = sorted(confidence[row][undecided[row]].tolist(), reverse=True)
            expected = max([1] + [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - ranked[n - 1]) < factor])
            assert chosen[row].sum() == expected
            assert sorted(confidence[row][chosen[row]].tolist(), reverse=True) == ranked[:expected]


# --- Remasking ---


@pytest.mark.parametrize("kv_cache", ["none", "dual"])
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_remasking_ends(tiny_backbone, budget, kv_cache):
    """Every committed token is below a threshold of 1: each is masked again until its budget is spent."""
    settings = {"max_new_tokens": 8, "block_length": 4, "remask_committed": 1.0, "remask_budget": budget}
    history = generate(tiny_backbone, PROMPT, kv_cache=kv_cache, **settings)
    again = [sum(b[i] == MASK != a[i] for a, b in itertools.pairwise(history)) for i in range(len(history[0]))]
    assert MASK not in history[-1] and history[-1][:6] == PROMPT
    assert max(again) == budget and not any(again[:6])
    assert len(history) - 1 <= 8 * (1 + budget)
    without = generate(tiny_backbone, PROMPT, max_new_tokens=8, block_length=4, kv_cache=kv_cache)
    assert (history == without) == (budget == 0)


def test_remask_true_is_one_half(tiny_backbone):
    settings = {"max_new_tokens": 8, "block_length": 4}
    half = generate(tiny_backbone, PROMPT, remask_committed=0.5, **settings)
    assert generate(tiny_backbone, PROMPT, remask_committed=True, **settings) == half
    off = generate(tiny_backbone, PROMPT, **settings)
    assert generate(tiny_backbone, PROMPT, remask_committed=False, **settings) == off != half


def test_deferred_tokens_are_not_masked_again_for_being_deferred(make_hybrid):
    """The refiner's confidence in their chunk decides, not that they come last."""
    model = make_hybrid(refine_low_confidence_only=False)
    settings = {"max_new_tokens": 8, "remasking": "refiner", "defer_tokens": list(range(MASK))}
    history = generate(model, PROMPT, remask_committed=1e-6, **settings)
    assert len(history) - 1 == 8


# --- The hybrid ---


@torch.no_grad()
def hybrid_reference(
    model, prompt, max_new_tokens, kv_cache, block_length, by_refiner=False, threshold=None, remask=None
):
    """The plain sampler for a hybrid; each chunk refined alone, by the head itself. Prompts start a chunk."""
    size, canvas = model.config.chunk_size, prompt + [MASK] * max_new_tokens
    history = [list(canvas)]
    hidden = {}
    for start in range(len(prompt), len(canvas), block_length):
        end, stored = min(start + block_length, len(canvas)), {}
        budgets = dict.fromkeys(range(start, end), 1)
        for step in itertools.count():
            undecided = [i for i in range(start, end) if canvas[i] == MASK]
            if not undecided and step >= (2 if threshold and kv_cache != "none" else 1):
                break
            stop = end if kv_cache == "dual" else len(canvas)
            columns = list(range(len(canvas)) if step == 0 or kv_cache == "none" else range(start, stop))
            hidden.update(zip(columns, plain_hidden_states(model.backbone, canvas, columns, stored)))
            states, head = torch.stack([hidden[i] for i in range(len(canvas))]), model.backbone.lm_head
            logits, chunk_confidence = states @ head.weight.T, {}
            for first in range(0, len(canvas), size):
                inside = [i for i in undecided if first <= i < first + size]
                if not inside:
                    continue
                largest = [logits[i].softmax(-1).max().item() for i in inside]
                chunk_confidence[first] = sum(largest) / len(largest)
                if chunk_confidence[first] < model.config.min_confidence:
                    refined = model.refiner(states[None, first : first + size])
                    logits[first : first + size] = refined.hidden_states[0] @ head.weight.T
                    chunk_confidence[first] = refined.confidence[0, 0].item()
            probabilities = logits.double().softmax(-1)
            best = {i: max((p, -t) for t, p in enumerate(probabilities[i].tolist()) if t != MASK) for i in undecided}

            sure = {i: best[i][:1] for i in undecided}
            if by_refiner:
                sure = {i: (chunk_confidence[i - i % size], best[i][0]) for i in undecided}
            ranked = sorted(undecided, key=sure.get, reverse=True)
            chosen = ranked[:1] + [i for i in ranked[1:] if threshold is not None and sure[i][0] >= threshold]
            unsure = []
            if remask is not None:
                decided = [i for i in budgets if canvas[i] != MASK and budgets[i] > 0]
                support = {
                    i: chunk_confidence.get(i - i % size, 1.0) if by_refiner else probabilities[i][canvas[i]]
                    for i in decided
                }
                unsure = [i for i in decided if support[i] < remask]
            for i in chosen:
                canvas[i] = -best[i][1]
            for i in unsure:
                canvas[i], budgets[i] = MASK, budgets[i] - 1
            history.append(list(canvas))
    return history


@pytest.mark.parametrize("kv_cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("by_refiner", [False, True])
@pytest.mark.parametrize("threshold, remask", [(None, None), (0.35, None), (None, 0.3)])
def test_hybrid_matches_plain_reference(make_hybrid, kv_cache, by_refiner, threshold, remask):
    # Chunks of 4, blocks of 5, a prompt of 6: chunks lie across the borders of blocks.
    model = make_hybrid(min_confidence=0.3)
    expected = hybrid_reference(model, PROMPT, 13, kv_cache, 5, by_refiner, threshold, remask)
    found = generate(
        model,
        PROMPT,
        max_new_tokens=13,
        block_length=5,
        kv_cache=kv_cache,
        remasking="refiner" if by_refiner else "low_confidence",
        confidence_threshold=threshold,
        remask_committed=remask,
    )
    assert found == expected


@pytest.mark.parametrize("kv_cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_hybrid_ragged(tiny_hybrid, kv_cache, cfg_scale):
    ids, mask = left_padded(RAGGED)
    settings = {"max_new_tokens": 13, "block_length": 5, "kv_cache": kv_cache, "cfg_scale": cfg_scale}
    settings |= {"remasking": "refiner", "confidence_threshold": 0.6, "remask_committed": 0.2}
    together = tiny_hybrid.generate(ids, attention_mask=mask, **settings)
    for i, prompt in enumerate(RAGGED):
        alone = tiny_hybrid.generate(torch.tensor([prompt]), **settings)[0].tolist()
        assert together[i, ids.shape[1] - len(prompt) :].tolist() == alone, i


@pytest.mark.parametrize("kv_cache", ["none", "prefix", "dual"])
def test_refiner_sees_only_undecided_chunks_of_the_block(make_hybrid, kv_cache):
    model = make_hybrid(refine_low_confidence_only=False)
    active = []
    hook = model.refiner.register_forward_pre_hook(
        lambda _, args, kwargs: active.append(kwargs["active_chunks"][0].nonzero().flatten().tolist()),
        with_kwargs=True,
    )
    history = generate(model, PROMPT, max_new_tokens=16, block_length=8, kv_cache=kv_cache)
    hook.remove()
    for before, chunks in zip(history, active):
        start = 6 if MASK in before[6:14] else 14
        assert chunks == sorted({i // 4 for i in range(start, start + 8) if before[i] == MASK})


@pytest.mark.parametrize("kv_cache", ["none", "prefix", "dual"])
def test_without_refinement_the_hybrid_is_the_backbone(tiny_hybrid, kv_cache):
    settings = {"max_new_tokens": 12, "block_length": 4, "kv_cache": kv_cache}
    bare = generate(tiny_hybrid, PROMPT, enable_refinement=False, **settings)
    assert bare == generate(tiny_hybrid.backbone, PROMPT, **settings)


# --- compile ---


@pytest.mark.parametrize("family", ["backbone", "hybrid"])
def test_compile_changes_nothing(tiny_backbone, tiny_hybrid, family, monkeypatch):
    """Static shapes and no graph break: one graph for the canvas, one for the block. (Without the C++ of inductor.)"""
    model = tiny_backbone if family == "backbone" else tiny_hybrid
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=backend, fullgraph=True, **kw))
    ids, mask = left_padded(RAGGED[:3])
    for settings in (
        {"kv_cache": "dual", "confidence_threshold": 0.15, "stop_at_eos": True, "eos_token_id": [EOS, 33, 20, 36]},
        {"kv_cache": "dual", "confidence_factor": 2.3, "remask_committed": 0.1},
        {"kv_cache": "dual"},
        {},
    ):
        settings |= {"max_new_tokens": 15, "block_length": 5}
        expected = model.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(model.generate(ids, attention_mask=mask, compile=True, **settings), expected), settings
    assert len(graphs) <= 4  # with a cache: empty, filled, narrow; and without
    assert "forward" not in model.__dict__ and "forward" not in model.base_model.__dict__


@pytest.mark.parametrize("kv_cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    "settings",
    [
        {"remask_committed": 0.1},
        {"remask_committed": 0.3},
        {"remask_committed": 0.2, "confidence_threshold": 0.15, "cfg_scale": 0.5},
        {"confidence_threshold": 0.15, "stop_at_eos": True, "eos_token_id": [EOS, 33, 20, 36]},
    ],
    ids=str,
)
def test_static_shapes_change_no_row(make_backbone, kv_cache, settings, monkeypatch):
    """Rows that are done stay in the batch then: they neither change nor count."""
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    model = make_backbone(num_hidden_layers=3)
    ids, mask = left_padded(RAGGED)
    settings = {"max_new_tokens": 14, "block_length": 5, "kv_cache": kv_cache, **settings}
    expected, static = (
        model.generate(ids, attention_mask=mask, compile=compile_, return_dict_in_generate=True, **settings)
        for compile_ in (False, True)
    )
    assert torch.equal(static.sequences, expected.sequences)
    assert torch.equal(static.tokens_per_forward, expected.tokens_per_forward)


def test_blocks_of_a_prefix_cache_share_a_graph(tiny_backbone, monkeypatch):
    """They differ in width; with a graph for each, dynamo would give up after eight."""
    graphs = []
    compile_ = torch.compile

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=backend, fullgraph=True, **kw))
    settings = {"max_new_tokens": 24, "block_length": 2, "kv_cache": "prefix"}
    expected = generate(tiny_backbone, PROMPT, **settings)
    assert generate(tiny_backbone, PROMPT, compile=True, **settings) == expected
    assert len(graphs) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", ["none", "dual"])
def test_compile_with_inductor(tiny_hybrid, kv_cache):
    torch._dynamo.reset()
    ids, mask = left_padded(RAGGED[:3])
    settings = {"max_new_tokens": 10, "block_length": 5, "kv_cache": kv_cache}
    expected = tiny_hybrid.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(tiny_hybrid.generate(ids, attention_mask=mask, compile=True, **settings), expected)


# --- What is reported ---


@pytest.mark.parametrize("compile_", [False, True])
def test_rows_that_end(tiny_backbone, compile_, monkeypatch):
    """The streamer, the history and the sequences agree on what follows the end token."""
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens.append(tokens)

        def end(self):
            self.ended = True

    settings = {"max_new_tokens": 14, "block_length": 7}
    plain = tiny_backbone.generate(torch.tensor([PROMPT]), **settings)[0, 6:].tolist()
    eos = plain[9]  # in the second block
    outputs = tiny_backbone.generate(
        torch.tensor([PROMPT]),
        streamer=(streamer := Streamer()),
        stop_at_eos=True,
        eos_token_id=eos,
        compile=compile_,
        output_history=True,
        return_dict_in_generate=True,
        **settings,
    )
    first = plain.index(eos)
    expected = plain[: first + 1] + [PAD] * (13 - first)
    assert outputs.sequences[0, 6:].tolist() == expected
    assert torch.equal(outputs.history[-1], outputs.sequences)
    prompt, *blocks = streamer.tokens  # of one row, as in transformers: the prompt [1, L], then tokens [n]
    assert prompt.tolist() == [PROMPT] and torch.cat(blocks).tolist() == plain[: first + 1] and streamer.ended


def test_other_integer_types(tiny_backbone):
    ids, mask = left_padded(RAGGED[:3])
    expected = tiny_backbone.generate(ids, attention_mask=mask, max_new_tokens=5)
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(
            tiny_backbone.generate(ids.int(), attention_mask=mask.to(dtype), max_new_tokens=5), expected
        )


# --- Settings ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kv_cache": "triple"}, "kv_cache must be one of .*'prefix'.*got 'triple'"),
        ({"confidence_factor": 0}, "confidence_factor must be above 0"),
        ({"confidence_factor": 1.0, "confidence_threshold": 0.9}, "or confidence_factor, not both"),
        ({"confidence_factor": 1.0, "remasking": "entropy"}, "remasking='entropy' has none"),
        ({"remask_committed": 1.5}, "remask_committed must be between 0 and 1"),
        ({"remask_budget": -1}, "remask_budget must be an integer of at least 0"),
        ({"remasking": "refiner"}, "this has no refiner"),
        ({"remasking": "entropy", "confidence_threshold": 0.9}, "must be 0 or less for an entropy"),
        ({"remasking": "random", "confidence_threshold": 0.9}, "'random' has no confidence"),
        ({"suppress_tokens": [999]}, "suppress_tokens=999 is outside the vocabulary"),
        ({"defer_tokens": [-1]}, "defer_tokens=-1 is outside the vocabulary"),
        ({"stop_at_eos": True, "eos_token_id": [1, 77]}, "eos_token_id=77 is outside the vocabulary"),
    ],
    ids=str,
)
def test_bad_settings(tiny_backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone.generate(torch.tensor([PROMPT]), max_new_tokens=4, **settings)


def test_refiner_remasking_needs_refinement(tiny_hybrid):
    with pytest.raises(ValueError, match="with its refinement enabled"):
        tiny_hybrid.generate(torch.tensor([PROMPT]), remasking="refiner", enable_refinement=False)


def test_settings_are_saved(tiny_backbone, tmp_path):
    settings = {
        "kv_cache": "dual",
        "confidence_factor": 0.5,
        "remask_committed": 0.3,
        "remask_budget": 2,
        "compile": True,
    }
    tiny_backbone.generation_config = MaskedDiffusionGenerationConfig(**settings, mask_token_id=MASK)
    tiny_backbone.save_pretrained(tmp_path)
    loaded = type(tiny_backbone).from_pretrained(tmp_path).generation_config
    assert {name: getattr(loaded, name) for name in settings} == settings


def test_published_generation_configs(tmp_path):
    """Settings of autoregressive decoding mean what they mean there, or nothing."""
    file = {"do_sample": False, "temperature": 0.6, "top_k": 0, "num_beams": 2, "alg": "origin", "kv_cache": "dual"}
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    config = MaskedDiffusionGenerationConfig.from_pretrained(tmp_path)
    assert (config.temperature, config.top_k, config.kv_cache) == (0.0, None, "dual")
    assert config.num_beams is None and not hasattr(config, "alg")
    assert not {"num_beams", "alg", "use_cache"} & config.to_dict().keys()


def test_other_backbones_have_no_cache():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(BertForMaskedLM(config), chunk_size=4, mask_token_id=3).eval()
    with pytest.raises(ValueError, match=r"BertForMaskedLM.*kv_cache='none'"):
        hybrid.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, kv_cache="dual")

"""LatentThinkingForCausalLM against a plain loop over one row without padding or cache, and what users do with it."""

import copy
import os
import sys

import pytest
import torch
from latent_thinking_models import (
    CLOSE,
    EOS,
    LATENT,
    NUM_LATENTS,
    OPEN,
    OPEN_2,
    PAD,
    THOUGHT,
    VOCABULARY,
    make_lm,
    make_model,
    pad_rows,
    plain_embeddings,
    plain_greedy,
    plain_logits,
    tokens,
)
from peft import LoraConfig, PeftModel, get_peft_model
from run_programs import run_program
from safetensors import safe_open
from tiny_training import new_hybrid
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from llada_trm_hf.data import byte_tokenizer, latent_thinking_prompt
from llada_trm_hf.models import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LatentThinkingConfig,
    LatentThinkingForCausalLM,
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    SequenceTRM,
    SequenceTRMConfig,
    thought_token_ids,
)

KINDS = ["smollm3", "gpt2", "qwen3"]
# Thoughts in different columns, at the end, with an answer after, none, and two.
ROWS = [
    tokens(9, 1) + THOUGHT,
    tokens(4, 2) + THOUGHT + tokens(3, 3),
    tokens(7, 4),
    tokens(5, 5) + THOUGHT + tokens(3, 6) + THOUGHT + tokens(2, 7),
]
# As for generation: the thought stands at the end.
PROMPTS = [tokens(length, seed) + THOUGHT for length, seed in ((9, 1), (4, 2), (6, 3))]
EXACT = {"atol": 1e-6, "rtol": 1e-6}  # in float64, in which some norms of transformers round to float32


@pytest.fixture(params=KINDS)
def any_model(request):
    return make_model(request.param).double()


@pytest.fixture
def model():
    return make_model().double()


# --- Forward ---


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_equals_the_plain_loop(any_model, side, use_cache):
    """And each row is what it is alone: the reference has no batch and no padding."""
    input_ids, mask = pad_rows(ROWS, side, value=LATENT)  # padding that looks like a thought
    with torch.no_grad():
        outputs = any_model(input_ids, attention_mask=mask, use_cache=use_cache)
    assert outputs.reasoning_steps.shape == outputs.halt_probability.shape == (4, 2)
    for b, row in enumerate(ROWS):
        torch.testing.assert_close(outputs.logits[b, mask[b].bool()], plain_logits(any_model, row), **EXACT)
        steps = plain_embeddings(any_model, row)[1]
        assert outputs.reasoning_steps[b].tolist() == steps + [0] * (2 - len(steps))
    assert (outputs.past_key_values is not None) == use_cache


def test_thoughts_matter_and_halt_on_their_own(model):
    input_ids, mask = pad_rows(ROWS)
    outputs = model(input_ids, attention_mask=mask)
    assert len(outputs.reasoning_steps[outputs.reasoning_steps > 0].unique()) > 1
    bare = model(input_ids, attention_mask=mask, enable_latent_thinking=False)
    after = torch.tensor([True, True, False, True])
    changed = (outputs.logits - bare.logits).abs().amax(-1)[:, -1]
    assert torch.equal(changed > 0.1, after)
    once = model(input_ids, attention_mask=mask, max_reasoning_steps=1)
    assert once.reasoning_steps.max() == 1 and (once.logits - outputs.logits).abs().max() > 0.1
    torch.testing.assert_close(once.logits[0, mask[0].bool()], plain_logits(model, ROWS[0], max_steps=1), **EXACT)
    # Two prompts that differ only in what stands before the thought get different thoughts.
    other = [*ROWS[0]]
    other[2] = ROWS[0][2] % 50 + 8
    assert (plain_logits(model, other)[-1] - plain_logits(model, ROWS[0])[-1]).abs().max() > 0.1


def test_the_opening_marker_is_not_read(model):
    """The context ends before the marker, as in hidden pairs."""
    seen = []
    model.thinker.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1])))
    input_ids, mask = pad_rows(PROMPTS)
    model(input_ids, attention_mask=mask)
    (states, readable) = seen[0]
    assert readable.sum(-1).tolist() == [9, 4, 6]
    for b, row in enumerate(PROMPTS):
        prompt = torch.tensor([row[: -len(THOUGHT)]])
        expected = model.backbone(prompt, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(states[b, readable[b]], expected, **EXACT)


@pytest.mark.parametrize("keep", [1, 3, 99, torch.tensor([0, 5, 2])])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_to_keep(model, keep, use_cache):
    input_ids, mask = pad_rows(ROWS)
    full = model(input_ids, attention_mask=mask).logits
    kept = model(input_ids, attention_mask=mask, logits_to_keep=keep, use_cache=use_cache).logits
    expected = full[:, keep] if isinstance(keep, torch.Tensor) else full[:, -keep:]
    torch.testing.assert_close(kept, expected, **EXACT)


def test_hidden_states_and_attentions():
    model = make_model(backbone=make_lm(attn_implementation="eager")).double()
    # (transformers' eager attention gives NaN in float64 for padding on the left.)
    input_ids, mask = pad_rows(ROWS, "right")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    cached, uncached = (model(input_ids, attention_mask=mask, use_cache=use, **wanted) for use in (True, False))
    for name in ("hidden_states", "attentions"):
        assert len(cached[name]) == len(uncached[name]) == (3 if name == "hidden_states" else 2)
        for found, expected in zip(cached[name], uncached[name], strict=True):
            real = mask.bool() if name == "hidden_states" else mask.bool()[:, None].expand(found.shape[:3])
            torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    states = model.base_model(input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states, cached.hidden_states[-1], **EXACT)


def test_without_thinking_it_is_the_backbone():
    model = make_model()
    input_ids, mask = pad_rows(ROWS)
    wanted = {"attention_mask": mask, "labels": input_ids, "output_hidden_states": True}
    ours, theirs = model(input_ids, enable_latent_thinking=False, **wanted), model.backbone(input_ids, **wanted)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    assert ours.reasoning_steps is None
    plain, plain_mask = pad_rows([tokens(5, 1), tokens(8, 2)])
    assert torch.equal(
        model(plain, attention_mask=plain_mask).logits, model.backbone(plain, attention_mask=plain_mask).logits
    )
    embeddings = model.get_input_embeddings()(plain)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model.backbone(inputs_embeds=embeddings).logits)
    for settings in ({"do_sample": True}, {"num_beams": 2}):
        results = []
        for each, switch in ((model, {"enable_latent_thinking": False}), (model.backbone, {})):
            torch.manual_seed(0)
            results.append(each.generate(input_ids, attention_mask=mask, max_new_tokens=8, **settings, **switch))
        assert torch.equal(*results)


# --- Training ---


def labelled(rows, side="right"):
    """Padded rows, and labels for what follows the last thought, or for the whole of a row without."""
    labels = []
    for row in rows:
        end = len(row) - row[::-1].index(CLOSE) if CLOSE in row else 0
        labels.append([-100] * end + row[end:])
    return *pad_rows(rows, side), pad_rows(labels, side, value=-100)[0]


@pytest.mark.parametrize("rows", [ROWS, [row for row in ROWS if row.count(CLOSE) < 2]])
def test_loss_and_gradients_equal_those_of_the_plain_loop(any_model, rows):
    """In training a thought takes all its steps and never halts; gradients reach all of the thinker but halting."""
    config = any_model.config
    config.halt_threshold = 1.0
    for module in any_model.thinker.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    input_ids, mask, labels = labelled(rows)
    losses, count = [], 0
    for b, row in enumerate(rows):
        embeddings, steps = plain_embeddings(any_model, row)
        assert steps == [4] * row.count(OPEN)
        logits = any_model.backbone(inputs_embeds=embeddings, use_cache=False).logits[0]
        own = labels[b, mask[b].bool()]
        losses.append(cross_entropy(logits[:-1], own[1:], ignore_index=-100, reduction="sum"))
        count += int((own[1:] != -100).sum())
    expected = sum(losses) / count
    parameters = dict(any_model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad and "halt_head" not in name}
    gradients = torch.autograd.grad(expected, list(trained.values()))

    config.halt_threshold = 0.5
    any_model.train()
    loss = any_model(input_ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)  # transformers' loss is in float32
    loss.backward()
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4, msg=name)
        assert gradient.abs().max() > 0, name
    assert set(trained) == {name for name in parameters if name.startswith("thinker.") and "halt_head" not in name}
    assert all(p.grad is None for name, p in parameters.items() if name not in trained)


def plain_latents(thinker, states, num_steps):
    """`[B, num_latents * D]` after so many supervision steps, every latent recursion written out."""
    trm, config = thinker.trm, thinker.config.trm_config
    inputs = trm.build_input(states @ thinker.compressor.weight.T)
    y = z = torch.zeros_like(inputs.x)
    recursions = num_steps * config.n_deep_recursions
    for recursion in range(recursions):
        if recursion <= recursions - config.n_trained_recursions:
            y, z = y.detach(), z.detach()
        y, z = trm.latent_recursion(inputs, y, z)
    prediction = trm.output_head(y[inputs.sequences.last])
    length = (prediction.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (prediction / length) @ thinker.projector.weight.T + thinker.projector.bias


@pytest.mark.parametrize("trained", [1, 2])
def test_thoughts_of_random_depth(trained):
    """In training, further steps without gradient; at inference, as many as asked for."""
    trm = SequenceTRMConfig(
        hidden_size=16,
        n_heads=2,
        n_latent_steps=2,
        n_deep_recursions=2,
        n_trained_recursions=trained,
        n_supervision_steps=2,
        max_free_steps=2,
        free_steps_probability=0.7,
        dropout=0.0,
    )
    thinker, depths = make_model(trm=trm, halt_threshold=1.0).thinker.double(), set()
    states = torch.randn(2, 5, 32, dtype=torch.float64)
    weight = torch.randn(2, NUM_LATENTS * 32, dtype=torch.float64)
    parameters = {name: p for name, p in thinker.named_parameters() if "halt_head" not in name}
    for seed in range(12):
        torch.manual_seed(seed)
        thought = thinker.train()(states)
        steps = set(thought.num_steps.tolist())
        assert len(steps) == 1
        depth = steps.pop()
        depths.add(depth)
        expected = plain_latents(thinker, states, depth)
        torch.testing.assert_close(thought.latents.flatten(1), expected)
        found = torch.autograd.grad((thought.latents.flatten(1) * weight).sum(), list(parameters.values()))
        gradients = torch.autograd.grad((expected * weight).sum(), list(parameters.values()))
        for name, one, other in zip(parameters, found, gradients):
            assert one.abs().max() > 0, name
            torch.testing.assert_close(one, other, msg=name)
    assert depths == {2, 3, 4}
    with torch.no_grad():
        thought = thinker.eval()(states, max_steps=7)
    assert thought.num_steps.tolist() == [7, 7]
    torch.testing.assert_close(thought.latents.flatten(1), plain_latents(thinker, states, 7))


@pytest.mark.parametrize("freeze_backbone", [True, False])
@pytest.mark.parametrize("headless", [True, False])
def test_a_batch_without_a_thought_gives_zero_gradients(freeze_backbone, headless):
    """Where the thinker has nothing to do, its weights get zeros, and everything else stays as it is."""
    model = make_model(freeze_backbone=freeze_backbone).train()
    with torch.no_grad():
        model.thinker.projector.weight[0, 0] = torch.nan  # it is not read
    model.thinker.compressor.requires_grad_(False)
    input_ids, mask = pad_rows([tokens(5, 1), tokens(8, 2)])

    def loss_of(each):
        if headless:
            return each.base_model(input_ids, attention_mask=mask).last_hidden_state.square().mean()
        return each(input_ids, attention_mask=mask, labels=input_ids).loss

    expected = loss_of(model.backbone if not headless else make_model(freeze_backbone=freeze_backbone).train())
    loss = loss_of(model)
    assert torch.equal(loss, expected)
    loss.backward()
    for name, parameter in model.thinker.named_parameters():
        if name.startswith("compressor"):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    if freeze_backbone:
        assert all(parameter.grad is None for parameter in model.backbone.parameters())
        assert not loss_of(model.eval()).requires_grad
        return
    found = [parameter.grad.clone() for parameter in model.backbone.parameters() if parameter.grad is not None]
    assert found
    model.zero_grad()
    loss_of(model.eval()).backward()
    for one, other in zip(found, (p.grad for p in model.backbone.parameters() if p.grad is not None), strict=True):
        assert torch.equal(one, other)


def test_loss_of_kept_positions_and_shares_of_a_batch(model):
    input_ids, mask, labels = labelled(ROWS, side="left")
    full = model(input_ids, attention_mask=mask, labels=labels, use_cache=False)
    few = input_ids.shape[1] - 2
    assert (labels[:, :3] == -100).all()
    kept = model(input_ids, attention_mask=mask, labels=labels[:, -few:], logits_to_keep=few)
    torch.testing.assert_close(kept.loss, full.loss, **EXACT)
    share = model(input_ids, attention_mask=mask, labels=labels, num_items_in_batch=100)
    torch.testing.assert_close(share.loss * 100, full.loss * (labels[:, 1:] != -100).sum(), **EXACT)
    log_probabilities = full.logits[:, :-1].float().log_softmax(-1)
    real = labels[:, 1:] != -100
    chosen = log_probabilities.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)[real]
    torch.testing.assert_close(full.loss.float(), -chosen.mean())


@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_gradient_checkpointing(freeze_backbone):
    rows = [tokens(6, 1) + THOUGHT + tokens(3, 2), tokens(6, 3) + THOUGHT + tokens(3, 4)]
    input_ids, mask, labels = labelled(rows)
    results = []
    for checkpointing in (False, True):
        model = make_model(freeze_backbone=freeze_backbone).double().train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_each_position_is_computed_once_where_thoughts_stand_in_one_column(model):
    """With the labels of an aligned batch, as the collator makes it, and in generation."""
    lengths = []
    model.backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(
            kwargs["inputs_embeds"].shape[1]
            if kwargs.get("inputs_embeds") is not None
            else kwargs["input_ids"].shape[1]
        ),
        with_kwargs=True,
    )
    input_ids, mask = pad_rows(PROMPTS)
    model.train()(input_ids, attention_mask=mask, labels=input_ids)
    assert sum(lengths) == input_ids.shape[1] and len(lengths) == 2
    lengths.clear()
    model.eval().generate(input_ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5)
    width = input_ids.shape[1]
    assert lengths == [width - NUM_LATENTS - 1, NUM_LATENTS + 1, 1, 1, 1, 1]


def test_lora_on_the_backbone(model, tmp_path):
    """Adapters of the backbone train together with the thinker, and come back from the disk."""
    model.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["thinker"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, adapter, autocast_adapter_dtype=False).train()
    input_ids, mask, labels = labelled(ROWS)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        peft_model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    with_gradient = {name for name, p in peft_model.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in with_gradient) and any("projector" in name for name in with_gradient)
    assert not any("backbone" in name and "lora" not in name for name in with_gradient)
    peft_model.eval().save_pretrained(tmp_path / "adapter")
    base = LatentThinkingForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    arguments = {"input_ids": input_ids, "attention_mask": mask}
    torch.testing.assert_close(loaded(**arguments).logits, peft_model(**arguments).logits, **EXACT)
    arguments = dict(zip(("input_ids", "attention_mask"), pad_rows(PROMPTS)))
    assert torch.equal(
        loaded.generate(**arguments, max_new_tokens=4), peft_model.generate(**arguments, max_new_tokens=4)
    )


# --- Generation ---


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_the_plain_loop(any_model, use_cache):
    rows = [*PROMPTS, *ROWS]
    input_ids, mask = pad_rows(rows)
    written = any_model.generate(input_ids, attention_mask=mask, max_new_tokens=5, use_cache=use_cache)
    for row, found in zip(rows, written[:, input_ids.shape[1] :].tolist(), strict=True):
        expected = plain_greedy(any_model, row, 5)
        assert found == expected + [PAD] * (5 - len(expected))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("cache", ["static", "static object", "dynamic object", "sliding"])
def test_any_cache(cache, padded):
    settings = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention"] * 2}
    model = make_model(backbone=make_lm(**(settings if cache == "sliding" else {}))).double()
    input_ids, mask = pad_rows(PROMPTS if padded else PROMPTS[:1])
    arguments = {}
    if cache == "static":
        arguments["cache_implementation"] = "static"
    elif cache.endswith("object"):
        config = model.config.get_text_config()
        given = DynamicCache(config=config) if cache.startswith("dynamic") else StaticCache(config, max_cache_len=40)
        arguments["past_key_values"] = given
    found = model.generate(input_ids, attention_mask=mask, max_new_tokens=5, **arguments)
    expected = model.generate(input_ids, attention_mask=mask, max_new_tokens=5, use_cache=False)
    assert torch.equal(found, expected)


def test_sampling_and_several_sequences(model):
    """The distribution each token is drawn from is that of the plain loop."""
    input_ids, mask = pad_rows(PROMPTS)
    output = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=True,
        top_k=20,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for b, row in enumerate(PROMPTS):
        for sequence in (2 * b, 2 * b + 1):
            written = output.sequences[sequence, input_ids.shape[1] :].tolist()
            for t, logits in enumerate(output.logits):
                if EOS in written[:t]:
                    break
                expected = plain_logits(model, row + written[:t])[-1]
                torch.testing.assert_close(logits[sequence], expected.float(), atol=1e-5, rtol=1e-5)


def test_beams(model):
    """The best of four beams has at least the score of greedy, and the score it says it has."""
    for row in PROMPTS:
        settings = {"max_new_tokens": 5, "return_dict_in_generate": True, "length_penalty": 0.0}
        beams = model.generate(torch.tensor([row]), num_beams=4, output_scores=True, **settings)

        def score(written, row=row):
            total = 0.0
            for t, token in enumerate(written):
                total += float(plain_logits(model, row + written[:t])[-1].float().log_softmax(-1)[token])
                if token == EOS:
                    break
            return total

        found = score(beams.sequences[0, len(row) :].tolist())
        assert found == pytest.approx(float(beams.sequences_scores), abs=1e-3)
        assert found >= score(plain_greedy(model, row, 5)) - 1e-6
    input_ids, mask = pad_rows(PROMPTS)
    together = model.generate(input_ids, attention_mask=mask, num_beams=4, max_new_tokens=5)
    for b, row in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([row]), num_beams=4, max_new_tokens=5)
        assert together[b, input_ids.shape[1] :].tolist()[: alone.shape[1] - len(row)] == alone[0, len(row) :].tolist()


def test_assisted_generation(model):
    """As main model the result is that of greedy decoding, whatever drafts; as assistant it thinks too."""
    row = torch.tensor([PROMPTS[0] + tokens(3, 8)])
    expected = model.generate(row, max_new_tokens=8)
    assert torch.equal(model.generate(row, max_new_tokens=8, assistant_model=make_lm().double()), expected)
    assert torch.equal(model.generate(row, max_new_tokens=8, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(model.generate(row, max_new_tokens=8, assistant_model=copy.deepcopy(model)), expected)


def test_a_conversation_goes_on_from_the_cache(model):
    """A turn without thought goes on; one with a new thought computes everything again, and is as exact."""
    first = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, return_dict_in_generate=True)
    for turn in (tokens(4, 9), tokens(4, 9) + THOUGHT):
        row = first.sequences[0].tolist() + turn
        cache = copy.deepcopy(first.past_key_values)
        found = model.generate(torch.tensor([row]), past_key_values=cache, max_new_tokens=4)
        expected = plain_greedy(model, row, 4)
        assert found[0, len(row) :].tolist() == expected
    with pytest.raises(ValueError, match=r"past_key_values.*input_ids"):
        model(torch.tensor([THOUGHT]), past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, prefill_chunk_size=4)


def test_latent_tokens_are_never_written(model):
    with torch.no_grad():
        model.backbone.lm_head.weight[LATENT] = 0
        model.backbone.lm_head.weight[LATENT] += 50 * torch.randn(32, dtype=torch.double).sign()
    input_ids, mask = pad_rows(PROMPTS)
    arguments = {"attention_mask": mask, "max_new_tokens": 20}
    assert (model.generate(input_ids, enable_latent_thinking=False, **arguments)[:, -20:] == LATENT).any()
    free = model.generate(input_ids, **arguments)
    assert not (free[:, input_ids.shape[1] :] == LATENT).any()
    banned = int(free[0, input_ids.shape[1]])
    found = model.generate(input_ids, suppress_tokens=[banned], **arguments)[:, input_ids.shape[1] :]
    assert not ((found == LATENT) | (found == banned)).any()


@pytest.mark.parametrize("select_by", ["halt", "residual"])
def test_several_noisy_trajectories(model, select_by):
    """The one kept is the surest of those drawn, or the one nearest to a fixed point."""
    model.config.num_trajectories, model.config.noise_std, model.config.select_by = 5, 0.5, select_by
    model.config.convergence_threshold = 0.01
    inputs = torch.tensor([PROMPTS[0]])
    states = model.backbone(inputs[:, : -len(THOUGHT)], output_hidden_states=True).hidden_states[-1]
    torch.manual_seed(0)
    context = states @ model.thinker.compressor.weight.T
    settings = {"num_trajectories": 5, "noise_std": 0.5, "select_by": select_by, "convergence_threshold": 0.01}
    expected = model.thinker.trm.reason(context, torch.ones(1, 9), **settings)
    torch.manual_seed(0)
    outputs = model(inputs)
    torch.testing.assert_close(outputs.halt_probability[0], expected.halt_probability.float(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="noise_std"):
        model.generate(inputs, max_new_tokens=2, use_cache=False)


class StopAfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= len(PROMPTS[0]) + 3)


def test_stopping_criteria(model):
    criteria = StoppingCriteriaList([StopAfterThree()])
    found = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=9, stopping_criteria=criteria)
    assert found[0, len(PROMPTS[0]) :].tolist() == plain_greedy(model, PROMPTS[0], 3)


# --- Text ---


@pytest.fixture
def speaking():
    """A model with a tokenizer: bytes, the markers, and a token for latents."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|latent|>"]})
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    backbone = make_lm(vocab_size=len(tokenizer), **{name: getattr(tokenizer, name) for name in names})
    return make_model(backbone=backbone, **thought_token_ids(tokenizer)), tokenizer


def test_pipeline_and_streamer(speaking):
    model, tokenizer = speaking
    prompts = [latent_thinking_prompt(text, tokenizer, model.config, tokenize=False) for text in ("1+2=", "30-11=")]
    assert prompts[0] == "1+2=<think><|latent|><|latent|><|latent|></think>"
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    found = generator(prompts, batch_size=2, **settings)
    for prompt, text, result in zip(prompts, ("1+2=", "30-11="), found, strict=True):
        ids = latent_thinking_prompt(text, tokenizer, model.config)
        assert ids == tokenizer(prompt)["input_ids"]
        written = model.generate(torch.tensor([ids]), max_new_tokens=6)[0, len(ids) :]
        assert result[0]["generated_text"] == tokenizer.decode(written, skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(torch.tensor([ids]), max_new_tokens=6, streamer=streamer)
    assert "".join(streamer) == found[1][0]["generated_text"]


CHAT = (
    "{{ 'Think.' if enable_thinking else '' }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("ending", ["", "<think>", "<think>\n"])
def test_prompts_with_chat_templates(speaking, ending):
    model, tokenizer = speaking
    tokenizer.chat_template = CHAT.replace("[assistant]", "[assistant]" + ending.replace("\n", "{{ '\\n' }}"))
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    expected = "Think.[system]S[user]Q[assistant]<think><|latent|><|latent|><|latent|></think>"
    assert latent_thinking_prompt(messages, tokenizer, model.config, tokenize=False) == expected
    ids = latent_thinking_prompt(messages, tokenizer, model.config)
    assert tokenizer.decode(ids) == expected and ids == tokenizer(expected)["input_ids"]
    assert latent_thinking_prompt("Q", tokenizer, model.config, tokenize=False).startswith("Think.[user]Q[assistant]")
    batch = tokenizer.pad({"input_ids": [ids, ids[3:]]}, padding_side="left", return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=2).shape == (2, len(ids) + 2)


def test_markers_of_several_tokens_and_spare_tokens():
    tokenizer = byte_tokenizer()
    ids = thought_token_ids(tokenizer)
    assert len(ids["think_start_token_ids"]) == 7 and ids["latent_token_id"] == tokenizer.mask_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_7|>", "<|reserved_8|>"]})
    assert thought_token_ids(tokenizer)["latent_token_id"] == tokenizer.convert_tokens_to_ids("<|reserved_7|>")
    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no token to spare"):
        thought_token_ids(tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        latent_thinking_prompt([{"role": "user", "content": "?"}], tokenizer, make_model().config)


# --- Checkpoints ---


@pytest.fixture
def on_disk_backbone(tmp_path):
    make_lm().save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, LatentThinkingForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["smollm3", "gpt2"])
def test_whole_checkpoint(tmp_path, auto_class, dtype, kind):
    model = make_model(kind).to(dtype)
    model.save_pretrained(tmp_path / "model")
    loaded = auto_class.from_pretrained(tmp_path / "model", dtype="auto")
    assert isinstance(loaded, LatentThinkingForCausalLM) and loaded.dtype == loaded.thinker.dtype == dtype
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    input_ids, mask = pad_rows(ROWS)
    assert loaded(input_ids, attention_mask=mask).logits.dtype == dtype
    # In float32: how half precision rounds depends on the CPU, and on where the weights lie in memory.
    reference = make_model(kind)
    reference.load_state_dict(ours)
    models = (loaded.float(), reference)
    found, expected = (each(input_ids, attention_mask=mask, max_reasoning_steps=2).logits for each in models)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert loaded.config.to_diff_dict().keys() >= {"backbone_config", "trm_config", "latent_token_id"}


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, LatentThinkingForCausalLM])
def test_checkpoint_without_backbone(on_disk_backbone, tmp_path, auto_class):
    model = make_model(backbone=on_disk_backbone, dtype=torch.bfloat16)
    assert model.thinker.dtype == torch.float32  # a new one, on a backbone in half precision
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "thinker", save_backbone=False)
    with safe_open(tmp_path / "thinker/model.safetensors", "pt") as file:
        assert all(name.startswith("thinker.") for name in file.keys())  # noqa: SIM118 (it is no dictionary)
    loaded = auto_class.from_pretrained(tmp_path / "thinker", dtype=torch.bfloat16)
    assert loaded.thinker.dtype == torch.float32 and loaded.backbone.dtype == torch.bfloat16
    assert loaded.generation_config.max_new_tokens == 3
    input_ids, mask = pad_rows(PROMPTS)
    found, expected = (each(input_ids, attention_mask=mask).logits.float() for each in (loaded, model))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    loaded.config.max_reasoning_steps, loaded.config.halt_threshold = 2, 1.0
    assert (loaded(input_ids, attention_mask=mask).reasoning_steps == 2).all()
    model.config.backbone_name_or_path = None
    with pytest.raises(ValueError, match=r"save_backbone=False.*backbone_name_or_path"):
        model.save_pretrained(tmp_path / "lost", save_backbone=False)
    make_lm(hidden_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"thinker.*hidden_size=32"):
        auto_class.from_pretrained(tmp_path / "thinker", backbone_name_or_path=str(tmp_path / "other"))


def test_parts_from_disk(on_disk_backbone, tmp_path):
    compressor = DimensionCompressor(DimensionCompressorConfig(hidden_size=32, compressed_size=8))
    trm = SequenceTRM(SequenceTRMConfig(hidden_size=8, n_heads=2))
    compressor.save_pretrained(tmp_path / "compressor")
    trm.save_pretrained(tmp_path / "trm")
    model = make_model(backbone=on_disk_backbone, compressor=str(tmp_path / "compressor"), trm=tmp_path / "trm")
    assert model.config.compressor_config.compressed_size == 8 and model.config.trm_config.hidden_size == 8
    fresh = LatentThinkingForCausalLM.from_backbone(
        make_lm(),
        compressor=compressor,
        trm=trm,
        think_start_token_ids=[OPEN],
        think_end_token_ids=[CLOSE],
        latent_token_id=LATENT,
    )
    assert fresh.thinker.compressor is compressor and fresh.thinker.trm is trm
    # Latents begin as decompressed predictions, as large as word embeddings.
    states = torch.randn(50, 6, 32)
    latents = fresh.thinker.eval()(states).latents
    prediction = trm.eval().reason(compressor.compress(states)).prediction
    cosine = torch.cosine_similarity(latents, compressor.decompress(prediction)[:, None], dim=-1)
    assert cosine.shape == (50, 4) and cosine.min() > 1 - 1e-5
    scale = fresh.get_input_embeddings().weight.square().mean().sqrt()
    assert latents.square().mean().sqrt().item() == pytest.approx(scale.item(), rel=0.3)
    assert not any(p.requires_grad for p in fresh.backbone.parameters())


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
sys.modules["llada_trm_hf"] = None
outputs = {}
for folder in ("whole", "thinker"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = torch.load("inputs.pt", weights_only=True)
    outputs[folder] = [model(**inputs).logits.detach(), model.generate(**inputs, max_new_tokens=4)]
    model.save_pretrained(folder + " again")
    again = AutoModelForCausalLM.from_pretrained(folder + " again", trust_remote_code=True)
    outputs[folder] += [again(**inputs).logits.detach()]
torch.save(outputs, "outputs.pt")
"""


def test_loads_where_the_package_is_not_installed(on_disk_backbone, tmp_path):
    model = make_model(backbone=on_disk_backbone)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "thinker", save_backbone=False)
    inputs = dict(zip(("input_ids", "attention_mask"), pad_rows(PROMPTS)))
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = run_program([sys.executable, "-c", REMOTE], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [model(**inputs).logits.detach(), model.generate(**inputs, max_new_tokens=4)]
    for found in torch.load(tmp_path / "outputs.pt", weights_only=True).values():
        for ours, theirs in zip([*expected, expected[0]], found, strict=True):
            torch.testing.assert_close(theirs, ours)


# --- Bad input ---


@pytest.mark.parametrize(
    "row, message",
    [
        ([*tokens(5, 1), OPEN, OPEN_2, LATENT, LATENT, CLOSE], "num_latents=3 latent tokens"),
        ([*tokens(5, 1), OPEN, OPEN_2, *([LATENT] * 4), CLOSE], "num_latents=3 latent tokens"),
        ([*tokens(5, 1), OPEN, *([LATENT] * 3), CLOSE], "must follow the opening marker"),
        ([LATENT] * 3 + tokens(5, 1), "must follow the opening marker"),
        (THOUGHT + tokens(5, 1), "needs a prompt before"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_malformed_thoughts(row, message, side):
    input_ids, mask = pad_rows([row, ROWS[3]], side)
    with pytest.raises(ValueError, match=message):
        make_model()(input_ids, attention_mask=mask)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"latent_token_id": EOS}, "latent_token_id=1 is the eos_token_id too"),
        ({"latent_token_id": PAD}, "is the pad_token_id too"),
        ({"latent_token_id": CLOSE}, "is the think_end_token_ids too"),
        ({"latent_token_id": VOCABULARY}, "outside the vocabulary"),
        ({"think_start_token_ids": []}, "at least one token"),
        ({"think_end_token_ids": [99]}, "outside the vocabulary"),
        ({"num_latents": 0}, "num_latents must be at least 1"),
        ({"max_reasoning_steps": 0}, "max_reasoning_steps must be at least 1"),
        ({"halt_threshold": 2.0}, "halt_threshold must be between"),
        ({"noise_std": -1.0}, "noise_std must not be negative"),
        ({"convergence_threshold": -1.0}, "convergence_threshold must not be negative"),
        ({"select_by": "mean"}, "select_by must be 'halt' or 'residual'"),
        ({"compressor": DimensionCompressorConfig(hidden_size=64, compressed_size=16)}, "hidden_size=64"),
        ({"compressor": DimensionCompressorConfig(hidden_size=32, compressed_size=8)}, "compressed_size=8"),
        ({"num_latent": 3}, "Unknown argument num_latent"),
    ],
)
def test_impossible_models(fields, message):
    with pytest.raises(ValueError, match=message):
        make_model(**fields)


def test_impossible_backbones():
    for backbone in (
        MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1)),
        LLaDAForMaskedDiffusion(LLaDAConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, mask_token_id=9)),
    ):
        with pytest.raises(ValueError, match="has to be a causal transformer"):
            make_model(backbone=backbone)
    with pytest.raises(ValueError, match="A LatentThinkingForCausalLM has a backbone already"):
        make_model(backbone=make_model())
    with pytest.raises(ValueError, match="A LLaDATRMForMaskedDiffusion has a backbone already"):
        LLaDATRMForMaskedDiffusion.from_backbone(new_hybrid())
    with pytest.raises(ValueError, match="Pass the backbone's tokenizer"):
        LatentThinkingForCausalLM.from_backbone(make_lm())
    with pytest.raises(ValueError, match="needs the backbone_config"):
        LatentThinkingConfig()
    with pytest.raises(FileNotFoundError, match="no folder"):
        make_model(backbone="/no/such/folder")

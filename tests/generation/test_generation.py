"""`generate` against a sampler written plainly for one row, and its settings, streamers and errors."""

import itertools
import json
import re

import pytest
import torch
from conftest import EOS, MASK, PAD
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextDiffusionStreamer,
    TextIteratorStreamer,
)

from llada_trm_hf.data import byte_tokenizer
from llada_trm_hf.generation import block_sampler
from llada_trm_hf.generation.commit_rules import sample_tokens
from llada_trm_hf.generation.configuration_masked_diffusion import MaskedDiffusionGenerationConfig
from llada_trm_hf.models import LLaDAForMaskedDiffusion, LLaDATRMForMaskedDiffusion

PROMPT = [5, 11, 23, 7, 42, 8]
# Prompts of several lengths; the last one has masks to fill in.
RAGGED = [[5, 11, 23, 7, 42, 8], [30, 31], [17], [9, MASK, 40, MASK]]


def reference(
    model,
    prompt,
    max_new_tokens,
    num_diffusion_steps=None,
    block_length=None,
    remasking="low_confidence",
    confidence_threshold=None,
    cfg_scale=0.0,
    choice=0,
    refine=False,
):
    """
    The sampler for one row, one forward over the whole canvas each step. Takes the most probable token, or the
    `choice`-th after it. Returns the canvas before the first and after each step. With `refine` the model is a hybrid
    and refines what this step may decide.
    """

    def predict(tokens, undecided):
        relevant = torch.tensor([[i in undecided for i in range(len(tokens))]])
        with torch.no_grad():
            return model(torch.tensor([tokens]), **({"relevant_tokens": relevant} if refine else {})).logits[0]

    canvas = prompt + [MASK] * max_new_tokens
    given = [i for i, token in enumerate(canvas) if token != MASK]
    block_length = block_length or max(max_new_tokens, 1)
    num_blocks = max(-(-max_new_tokens // block_length), 1)
    history = [list(canvas)]
    for block in range(num_blocks):
        end = min(len(prompt) + (block + 1) * block_length, len(canvas))
        num_masked = canvas[:end].count(MASK)
        if num_diffusion_steps is None or confidence_threshold is not None:
            num_steps = num_masked
        else:
            num_steps = num_diffusion_steps // num_blocks + (block < num_diffusion_steps % num_blocks)
        for step in range(num_steps):
            undecided = [i for i in range(end) if canvas[i] == MASK]
            quota = num_masked // num_steps + (step < num_masked % num_steps)
            if not undecided or (quota == 0 and confidence_threshold is None):
                break
            logits = predict(canvas, undecided)
            if cfg_scale > 0:
                blank = [MASK if i in given else token for i, token in enumerate(canvas)]
                unconditional = predict(blank, undecided)
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            confidence, tokens = {}, {}
            for i in undecided:
                probabilities = logits[i].double().softmax(-1)
                allowed = [token for token in range(len(probabilities)) if token != MASK]
                tokens[i] = sorted(allowed, key=lambda token: -probabilities[token])[choice]
                best, second = sorted(probabilities.tolist(), reverse=True)[:2]
                confidence[i] = {
                    "low_confidence": probabilities[tokens[i]].item(),
                    "entropy": sum(p * torch.log(p) for p in probabilities).item(),
                    "margin": best - second,
                }[remasking]
            ranked = sorted(undecided, key=lambda i: -confidence[i])
            if confidence_threshold is None:
                commit = ranked[:quota]
            else:
                commit = ranked[:1] + [i for i in ranked[1:] if confidence[i] >= confidence_threshold]
            for i in commit:
                canvas[i] = tokens[i]
            history.append(list(canvas))
    return history


def generate(model, prompt, **kwargs):
    """One row; the canvas before the first and after each step."""
    outputs = model.generate(torch.tensor([prompt]), output_history=True, return_dict_in_generate=True, **kwargs)
    assert outputs.num_forward_passes == len(outputs.history) - 1
    assert torch.equal(outputs.history[-1], outputs.sequences)
    return outputs.history[:, 0].tolist()


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "margin"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 12},
        {"max_new_tokens": 12, "num_diffusion_steps": 5},
        {"max_new_tokens": 12, "num_diffusion_steps": 8, "block_length": 4},
        {"max_new_tokens": 12, "num_diffusion_steps": 8, "block_length": 6, "cfg_scale": 0.7},
        {"max_new_tokens": 13, "num_diffusion_steps": 7, "block_length": 4},  # neither divides
        {"max_new_tokens": 6, "num_diffusion_steps": 20, "block_length": 3},  # more steps than tokens
    ],
    ids=str,
)
def test_matches_plain_sampler(tiny_backbone, remasking, settings):
    expected = reference(tiny_backbone, PROMPT, remasking=remasking, **settings)
    assert generate(tiny_backbone, PROMPT, remasking=remasking, **settings) == expected
    assert MASK not in expected[-1]


@pytest.mark.parametrize("remasking, threshold", [("low_confidence", 0.15), ("entropy", -2.7), ("margin", 0.04)])
def test_confidence_threshold(tiny_backbone, remasking, threshold):
    settings = {"max_new_tokens": 14, "block_length": 5, "remasking": remasking, "confidence_threshold": threshold}
    expected = reference(tiny_backbone, PROMPT, **settings)
    assert generate(tiny_backbone, PROMPT, **settings) == expected
    committed = {before.count(MASK) - after.count(MASK) for before, after in itertools.pairwise(expected)}
    assert 1 in committed and max(committed) > 1
    # The number of steps does not matter then.
    assert generate(tiny_backbone, PROMPT, num_diffusion_steps=3, **settings) == expected


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_hybrid_matches_plain_sampler(tiny_hybrid, cfg_scale):
    # Chunks of 4 and blocks of 5: a chunk has tokens that this step may decide, and masks of the next block.
    settings = {"max_new_tokens": 17, "num_diffusion_steps": 12, "block_length": 5, "cfg_scale": cfg_scale}
    other_answers = 0
    for seed in range(6):
        prompt = torch.randint(2, MASK, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        history = generate(tiny_hybrid, prompt, **settings)
        assert history == reference(tiny_hybrid, prompt, refine=True, **settings)
        bare = reference(tiny_hybrid.backbone, prompt, **settings)
        assert generate(tiny_hybrid, prompt, enable_refinement=False, **settings) == bare != history
        other_answers += history != reference(tiny_hybrid, prompt, **settings)
    assert other_answers  # counting every mask of the row, not those of the step, is something else


def test_guidance_of_zero_is_one_plain_forward(tiny_backbone):
    sizes = []
    tiny_backbone.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    plain = generate(tiny_backbone, PROMPT, max_new_tokens=4)
    assert generate(tiny_backbone, PROMPT, max_new_tokens=4, cfg_scale=0.0) == plain
    assert set(sizes) == {1}
    generate(tiny_backbone, PROMPT, max_new_tokens=4, cfg_scale=0.5)
    assert set(sizes[8:]) == {2}


@pytest.fixture(params=["backbone", "hybrid"])
def model(request, tiny_backbone, tiny_hybrid):
    return {"backbone": tiny_backbone, "hybrid": tiny_hybrid}[request.param]


@pytest.mark.parametrize("side, pad", [("left", 3), ("right", 3), ("left", MASK), ("right", MASK)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_diffusion_steps": 7, "block_length": 4},
        {"cfg_scale": 0.5, "num_diffusion_steps": 4},
        {"confidence_threshold": 0.15, "block_length": 5},
        {"remasking": "entropy", "num_diffusion_steps": 5},
        {"num_diffusion_steps": 3, "block_length": 3, "stop_at_eos": True, "eos_token_id": list(range(20))},
    ],
    ids=str,
)
def test_ragged_batch_gives_each_row_what_it_gives_alone(model, side, pad, settings):
    settings = dict(max_new_tokens=9, **settings)
    longest = max(map(len, RAGGED))
    padding = [[pad] * (longest - len(prompt)) for prompt in RAGGED]
    rows = [p + prompt if side == "left" else prompt + p for p, prompt in zip(padding, RAGGED)]
    real = [[0] * len(p) + [1] * len(prompt) for p, prompt in zip(padding, RAGGED)]
    real = torch.tensor(real if side == "left" else [list(reversed(row)) for row in real])
    batch = model.generate(torch.tensor(rows), attention_mask=real, **settings)
    for row, prompt, mask in zip(batch, RAGGED, real):
        keep = torch.cat([mask.bool(), torch.ones(9).bool()])
        alone = model.generate(torch.tensor([prompt]), **settings)[0]
        assert torch.equal(row[keep], alone)
        assert (row[~keep] == pad).all()


# --- Sampling ---


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all()
    inside = expected > 0
    return ((counts - expected)[inside] ** 2 / expected[inside]).sum().item()


@pytest.mark.parametrize("restriction", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature, restriction):
    torch.manual_seed(0)
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0, 0.9])
    kept = (logits / temperature).softmax(-1)
    if "top_k" in restriction:
        kept = torch.where(logits >= logits.sort(descending=True).values[restriction["top_k"] - 1], kept, 0)
        kept = kept / kept.sum()
    if "top_p" in restriction:
        # The smallest set of most probable tokens that reaches top_p.
        order = kept.argsort(descending=True)
        number = int((kept[order].cumsum(-1) < restriction["top_p"]).sum()) + 1
        kept[order[number:]] = 0
        kept = kept / kept.sum()
    samples = sample_tokens(logits.expand(2, 10_000, -1), temperature, **restriction)
    counts = samples.flatten().bincount(minlength=6)
    assert chi_square(counts, kept) < 25  # with 5 degrees of freedom, chance exceeds this once in 7000


def test_generated_tokens_follow_the_softmax(make_backbone):
    model = make_backbone(vocab_size=8, mask_token_id=7, initializer_range=0.1)
    prompt = torch.tensor([[3, 4, 5]])
    logits = model(torch.tensor([[3, 4, 5, 7]])).logits[0, -1, :7]
    torch.manual_seed(0)
    sequences = model.generate(prompt.expand(5_000, -1), max_new_tokens=1, temperature=0.7)
    assert chi_square(sequences[:, 3].bincount(minlength=7), (logits / 0.7).softmax(-1).detach()) < 30


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 1e-6}])
def test_confidence_is_that_of_the_clean_logits(tiny_backbone, restriction):
    """With a single token left to sample the order of commits stays that of greedy generation, whatever the heat."""
    settings = {"max_new_tokens": 12, "num_diffusion_steps": 6}
    greedy = generate(tiny_backbone, PROMPT, **settings)
    assert generate(tiny_backbone, PROMPT, temperature=5.0, **restriction, **settings) == greedy


def test_confidence_is_that_of_the_sampled_token(tiny_backbone, monkeypatch):
    second_best = reference(tiny_backbone, PROMPT, 12, 6, choice=1)
    monkeypatch.setattr(block_sampler, "sample_tokens", lambda logits, *args: logits.topk(2).indices[..., 1])
    assert generate(tiny_backbone, PROMPT, max_new_tokens=12, num_diffusion_steps=6) == second_best


def test_temperature_zero_is_deterministic_and_heat_is_not(tiny_backbone):
    greedy, again = (generate(tiny_backbone, PROMPT, max_new_tokens=8) for _ in range(2))
    assert greedy == again
    torch.manual_seed(0)
    assert generate(tiny_backbone, PROMPT, max_new_tokens=8, temperature=1.0) != greedy


def test_random_remasking(tiny_backbone):
    settings = {"max_new_tokens": 12, "num_diffusion_steps": 5, "block_length": 6, "remasking": "random"}
    histories = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        histories.append(generate(tiny_backbone, PROMPT, **settings))
    assert histories[0] == histories[1] != histories[2]
    for history in histories:
        assert MASK not in history[-1] and history[-1][:6] == PROMPT
        # 5 steps for 2 blocks of 6: 3 steps of 2 tokens, then 2 steps of 3; blocks from left to right.
        assert [canvas.count(MASK) for canvas in history] == [12, 10, 8, 6, 3, 0]
        assert MASK not in history[3][:12]


# --- What may be chosen ---


class Prefer(LogitsProcessor):
    """Makes one token by far the most probable, everywhere."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += 100
        return scores


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"confidence_threshold": 0.5}, {"remasking": "random"}]
)
def test_mask_token_is_never_chosen(tiny_backbone, settings):
    processors = LogitsProcessorList([Prefer(MASK)])
    settings = dict(max_new_tokens=10, block_length=5, logits_processor=processors, **settings)
    assert MASK not in generate(tiny_backbone, PROMPT, **settings)[-1]


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0}, {"cfg_scale": 0.5}])
def test_suppressed_tokens_never_appear(tiny_backbone, settings):
    settings = dict(max_new_tokens=12, **settings)
    torch.manual_seed(0)
    free = generate(tiny_backbone, PROMPT, **settings)[-1][6:]
    suppressed = sorted(set(free))
    torch.manual_seed(0)
    history = generate(tiny_backbone, PROMPT, suppress_tokens=suppressed, **settings)
    assert not set(history[-1][6:]) & set(suppressed)
    # The same as transformers' own processor.
    torch.manual_seed(0)
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(suppressed)])
    assert generate(tiny_backbone, PROMPT, logits_processor=processors, **settings) == history


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "margin"])
def test_deferred_tokens_come_last(tiny_backbone, remasking):
    settings = {"max_new_tokens": 12, "remasking": remasking}
    deferred = list(range(0, MASK, 2))
    history = generate(tiny_backbone, PROMPT, defer_tokens=deferred, **settings)
    assert history != generate(tiny_backbone, PROMPT, **settings)
    num_deferred = 0
    for before, after in itertools.pairwise(history):
        (position,) = (i for i in range(len(before)) if before[i] != after[i])
        logits = tiny_backbone(torch.tensor([before])).logits[0, :, :MASK]
        candidates = {i: int(logits[i].argmax()) for i in range(len(before)) if before[i] == MASK}
        assert after[position] == candidates[position]
        if after[position] in deferred:
            num_deferred += 1
            assert set(candidates.values()) <= set(deferred)
    assert 0 < num_deferred < 12


def test_processors_see_the_canvas_of_each_position(tiny_backbone):
    class RepeatFirstToken(LogitsProcessor):
        """Makes every position choose the first token of its own row."""

        def __call__(self, input_ids, scores):
            assert input_ids.shape == (len(scores), 14) and scores.shape[1] == 50
            return torch.zeros_like(scores).scatter(1, input_ids[:, :1], 1.0)

    prompts = torch.tensor([[7, 20, 21, 22], [9, 20, 21, 22], [11, 20, 21, 22]])
    sequences = tiny_backbone.generate(
        prompts, max_new_tokens=10, block_length=4, logits_processor=LogitsProcessorList([RepeatFirstToken()])
    )
    assert torch.equal(sequences[:, 4:], prompts[:, :1].expand(-1, 10))


# --- Infilling ---


@pytest.mark.parametrize("max_new_tokens", [0, 5])
@pytest.mark.parametrize("settings", [{}, {"num_diffusion_steps": 3}, {"confidence_threshold": 0.15}], ids=str)
def test_masks_in_the_prompt_are_filled(tiny_backbone, max_new_tokens, settings):
    prompt = [MASK, 11, 23, MASK, MASK, 42, 8, MASK, 30, MASK]
    history = generate(tiny_backbone, prompt, max_new_tokens=max_new_tokens, **settings)
    assert history == reference(tiny_backbone, prompt, max_new_tokens, **settings)
    assert MASK not in history[-1] and len(history[-1]) == 10 + max_new_tokens
    assert [new for new, old in zip(history[-1], prompt) if old != MASK] == [11, 23, 42, 8, 30]


def test_infilling_belongs_to_the_first_block(tiny_backbone):
    prompt = [5, MASK, MASK, MASK, 9]
    settings = {"max_new_tokens": 6, "block_length": 3, "num_diffusion_steps": 4}
    history = generate(tiny_backbone, prompt, **settings)
    assert history == reference(tiny_backbone, prompt, **settings)
    assert [canvas.count(MASK) for canvas in history] == [9, 6, 3, 1, 0]


@pytest.mark.parametrize("settings", [{}, {"num_diffusion_steps": 4}, {"confidence_threshold": 0.5}])
def test_nothing_to_do(tiny_backbone, settings):
    assert generate(tiny_backbone, PROMPT, max_new_tokens=0, **settings) == [PROMPT]


# --- Stopping ---


def test_stop_at_eos(model):
    prompts = torch.tensor([[5, 11, 23], [30, 31, 32], [17, 8, 9], [40, 21, 13]])
    settings = {"max_new_tokens": 16, "num_diffusion_steps": 8, "block_length": 4}
    free = model.generate(prompts, **settings)
    # An end token that some rows generate, in different blocks, and others never.
    first = {token: [(row[3:] == token).nonzero() for row in free] for token in free[:, 3:].flatten().tolist()}
    blocks = {token: {int(w[0]) // 4 for w in where if len(w)} for token, where in first.items()}
    eos = next(t for t, where in first.items() if len(blocks[t]) > 1 or 0 < sum(map(len, where)) < 3)
    stopped = model.generate(prompts, stop_at_eos=True, eos_token_id=eos, **settings)
    for row, (before, after) in enumerate(zip(free.tolist(), stopped.tolist())):
        if eos in before[3:]:
            end = before.index(eos, 3)
            before = before[: end + 1] + [PAD] * (len(before) - end - 1)
        assert after == before
        assert (
            model.generate(prompts[row : row + 1], stop_at_eos=True, eos_token_id=eos, **settings)[0].tolist() == after
        )
    assert not torch.equal(free, stopped) and any(eos not in row for row in free[:, 3:].tolist())
    # Any of several end tokens stops; a prompt that holds one does not.
    several = model.generate(prompts, stop_at_eos=True, eos_token_id=[eos, 5], suppress_tokens=[5], **settings)
    expected = model.generate(prompts, stop_at_eos=True, eos_token_id=eos, suppress_tokens=[5], **settings)
    assert torch.equal(several, expected)


def test_finished_rows_leave_the_batch(tiny_backbone):
    sizes = []
    tiny_backbone.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    class StopRowsStartingWith(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids.shape)
            return input_ids[:, 0] == 5

    seen = []
    prompts = torch.tensor([[5, 11, 23], [30, 31, 32]])
    settings = {"max_new_tokens": 8, "num_diffusion_steps": 4, "block_length": 4}
    free = tiny_backbone.generate(prompts, **settings)
    sizes.clear()
    outputs = tiny_backbone.generate(
        prompts,
        stopping_criteria=StoppingCriteriaList([StopRowsStartingWith()]),
        return_dict_in_generate=True,
        **settings,
    )
    assert sizes == [2, 2, 1, 1]
    assert seen == [(2, 7), (1, 11)]
    assert outputs.tokens_per_forward.tolist() == [2.0, 2.0]  # 4 tokens in 2 passes, 8 tokens in 4
    stopped = outputs.sequences
    assert stopped[0].tolist() == free[0, :7].tolist() + [PAD] * 4
    assert torch.equal(stopped[1], free[1])


def test_stopping_criteria_of_transformers(tiny_backbone):
    outputs = tiny_backbone.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=12,
        block_length=4,
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(max_length=9)]),
        return_dict_in_generate=True,
    )
    assert outputs.num_forward_passes == 4
    expected = reference(tiny_backbone, PROMPT, 12, block_length=4)[4]
    assert outputs.sequences[0].tolist() == [PAD if token == MASK else token for token in expected]


# --- Streaming and outputs ---


@pytest.fixture
def letters(make_backbone):
    """A model that writes lower-case letters and spaces, its tokenizer, a prompt, and the settings for that."""
    tokenizer = byte_tokenizer()
    model = make_backbone(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    allowed = set(tokenizer("abcdefghijklmnopqrstuvwxyz ").input_ids)
    settings = {
        "max_new_tokens": 12,
        "num_diffusion_steps": 6,
        "block_length": 4,
        "suppress_tokens": sorted(set(range(256)) - allowed | {256, 257}),
    }
    return model, tokenizer, settings


@pytest.mark.parametrize("text", ["say: ", "f<|mdm_mask|>ll <|mdm_mask|>n: "])
def test_iterator_streamer_gets_all_text(letters, text):
    model, tokenizer, settings = letters
    prompt = tokenizer(text, return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, timeout=10)
    sequences = model.generate(prompt, streamer=streamer, **settings)
    assert "".join(streamer) == tokenizer.decode(sequences[0])


def test_iterator_streamer_without_prompt(letters):
    model, tokenizer, settings = letters
    prompt = tokenizer("say: ", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    sequences = model.generate(prompt, streamer=streamer, **settings)
    assert "".join(streamer) == tokenizer.decode(sequences[0, prompt.shape[1] :])


def test_diffusion_streamer_gets_drafts_and_all_text(letters, capsys):
    model, tokenizer, settings = letters
    prompt = tokenizer("say: ", return_tensors="pt").input_ids
    sequences = model.generate(prompt, streamer=TextDiffusionStreamer(tokenizer), **settings)
    printed = capsys.readouterr().out
    draft = re.compile("\0337\033\\[33m(.*?)\033\\[0m\0338\033\\[J", re.DOTALL)
    drafts = draft.findall(printed)
    assert draft.sub("", printed) == tokenizer.decode(sequences[0]) + "\n"
    # One draft after each of the 6 steps, a guess at the whole block; the last of a block is its result.
    assert [len(text) for text in drafts] == [4] * 6
    assert "".join(drafts[1::2]) == tokenizer.decode(sequences[0, prompt.shape[1] :])


def test_outputs(model):
    prompts = torch.tensor([PROMPT, PROMPT[::-1]])
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(1))
    settings = {"max_new_tokens": 12, "num_diffusion_steps": 6, "block_length": 4}
    outputs = model.generate(prompts, output_history=True, return_dict_in_generate=True, **settings)
    assert outputs.num_forward_passes == 6
    assert len(calls) == (6 if isinstance(model, LLaDAForMaskedDiffusion) else 12)  # the hybrid reads them twice
    assert outputs.tokens_per_forward.tolist() == [2.0, 2.0]
    assert outputs.history.shape == (7, 2, 18) and outputs.refinement_trace is None
    assert torch.equal(outputs.history[0, :, :6], prompts) and (outputs.history[0, :, 6:] == MASK).all()
    assert torch.equal(outputs.history[-1], outputs.sequences)
    for before, after in zip(outputs.history, outputs.history[1:]):
        assert torch.equal(before[before != MASK], after[before != MASK])  # what is decided stays
        assert ((before == MASK) & (after != MASK)).sum(-1).tolist() == [2, 2]
    plain = model.generate(prompts, **settings)
    assert torch.equal(plain, outputs.sequences)
    assert model.generate(prompts, return_dict_in_generate=True, **settings).history is None


# --- Settings ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer of at least 0, got -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be"),
        ({"max_length": 0}, "max_length must be"),
        ({"num_diffusion_steps": 0}, "num_diffusion_steps must be an integer of at least 1, got 0"),
        ({"block_length": 0}, "block_length must be"),
        ({"temperature": -0.1}, "temperature must be 0 or more, and finite, got -0.1"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.2}, "top_p must be"),
        ({"cfg_scale": -1.0}, "cfg_scale must be"),
        ({"confidence_threshold": 1.5}, "confidence_threshold must be between 0 and 1"),
        ({"remasking": "lowest"}, "remasking must be one of .*low_confidence.*got 'lowest'"),
        ({"num_difusion_steps": 3}, "'num_difusion_steps'.*did you mean 'num_diffusion_steps'"),
    ],
    ids=str,
)
def test_bad_settings(tiny_backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionGenerationConfig(**settings)
    with pytest.raises(ValueError, match=message):
        tiny_backbone.generate(torch.tensor([PROMPT]), **settings)


def test_settings_override_each_other(tiny_backbone):
    prompt = torch.tensor([PROMPT])
    tiny_backbone.generation_config.max_new_tokens = 5
    assert tiny_backbone.generate(prompt).shape == (1, 11)
    config = MaskedDiffusionGenerationConfig(max_new_tokens=7, num_diffusion_steps=2)
    before = config.to_dict()
    outputs = tiny_backbone.generate(prompt, generation_config=config, return_dict_in_generate=True)
    assert outputs.sequences.shape == (1, 13) and outputs.num_forward_passes == 2
    assert tiny_backbone.generate(prompt, generation_config=config, max_new_tokens=3).shape == (1, 9)
    assert tiny_backbone.generate(prompt, max_length=10).shape == (1, 10)
    assert config.to_dict() == before and tiny_backbone.generation_config.max_new_tokens == 5
    tiny_backbone.generation_config.max_new_tokens = None
    assert tiny_backbone.generate(torch.tensor([[7]]), num_diffusion_steps=1, max_length=128).shape == (1, 128)
    tiny_backbone.config.max_position_embeddings = 200
    assert tiny_backbone.generate(prompt, num_diffusion_steps=1).shape == (1, 6 + 128)


def test_settings_are_saved_with_the_model(model, tmp_path):
    settings = {
        "max_new_tokens": 6,
        "num_diffusion_steps": 3,
        "remasking": "entropy",
        "suppress_tokens": [4],
        "temperature": 0.5,
    }
    model.generation_config.update(**settings)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved[name] for name in settings} == settings
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, MaskedDiffusionGenerationConfig)
    assert {name: getattr(loaded.generation_config, name) for name in settings} == settings
    torch.manual_seed(0)
    expected = model.generate(torch.tensor([PROMPT]))
    torch.manual_seed(0)
    assert torch.equal(loaded.generate(torch.tensor([PROMPT])), expected)


def test_settings_are_saved_with_the_head_alone(tiny_hybrid, tmp_path):
    tiny_hybrid.backbone.save_pretrained(tmp_path / "backbone")
    tiny_hybrid.config.backbone_name_or_path = str(tmp_path / "backbone")
    tiny_hybrid.generation_config.num_diffusion_steps = 3
    tiny_hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "head")
    assert loaded.generation_config.num_diffusion_steps == 3


def test_malformed_settings_file(model, tmp_path):
    """Not ignored in silence."""
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises((OSError, ValueError), match=r"generation_config\.json|[Gg]eneration config"):
        type(model).from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()  # without one the defaults hold
    assert type(model).from_pretrained(tmp_path).generation_config.num_diffusion_steps is None


def test_special_tokens_come_from_the_model(tiny_hybrid):
    config = tiny_hybrid.generation_config
    assert (config.mask_token_id, config.pad_token_id, config.eos_token_id) == (MASK, PAD, EOS)


# --- Mistakes ---

ONE_ROW = torch.tensor([PROMPT])


@pytest.mark.parametrize(
    "prompt, settings, message",
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "prompt is empty"),
        (torch.zeros(0, 3, dtype=torch.long), {}, "prompt is empty"),
        (ONE_ROW.repeat(2, 1), {"attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "prompt is empty"),
        (ONE_ROW[0], {}, r"shape \[batch, tokens\], got \(6,\)"),
        (ONE_ROW, {"attention_mask": torch.ones(1, 5)}, r"attention_mask has shape \(1, 5\)"),
        (ONE_ROW, {"max_length": 5}, "6 tokens, more than max_length=5"),
        (ONE_ROW, {"max_new_tokens": 123}, "more than the model's context of 128"),
        (ONE_ROW.repeat(1, 22), {"max_new_tokens": 0}, "has 132 tokens.*context of 128"),
        (ONE_ROW, {"mask_token_id": 50}, r"mask_token_id=50 is outside the vocabulary \(0 to 49\)"),
        (ONE_ROW, {"mask_token_id": -1}, "mask_token_id=-1 is outside the vocabulary"),
        (ONE_ROW, {"max_new_tokens": 9, "block_length": 3, "num_diffusion_steps": 2}, "fewer than the 3 blocks"),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, dict)) else "",
)
def test_mistakes_have_one_clear_error(tiny_backbone, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone.generate(prompt, **settings)


def test_missing_special_tokens(tiny_backbone):
    tiny_backbone.generation_config.eos_token_id = tiny_backbone.config.eos_token_id = None
    with pytest.raises(ValueError, match=r"stop_at_eos=True.*eos_token_id"):
        tiny_backbone.generate(ONE_ROW, stop_at_eos=True)
    tiny_backbone.generation_config.mask_token_id = tiny_backbone.config.mask_token_id = None
    with pytest.raises(ValueError, match="No mask token: pass mask_token_id"):
        tiny_backbone.generate(ONE_ROW)

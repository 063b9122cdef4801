"""Hidden pairs: thoughts in tokens, traces, states, shards and the dataset that reads them."""

import json
import pickle
import random

import pytest
import torch
from datagen_models import (
    CHAT_TEMPLATE,
    load_model,
    plain_greedy,
    plain_states,
    save_model,
    tokenizer_with_markers,
)
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import GenerationConfig
from transformers.trainer_pt_utils import LengthGroupedSampler

from llada_trm_hf import DimensionCompressor, DimensionCompressorConfig, SequenceTRM, SequenceTRMConfig
from llada_trm_hf.data.thoughts import ThoughtFormat, ThoughtTokens
from llada_trm_hf.hidden_pairs import (
    HiddenPairsCollator,
    HiddenPairsDataset,
    TraceSettings,
    export_legacy_hidden_pairs,
)
from llada_trm_hf.hidden_pairs.datagen import extract_states, load_language_model
from llada_trm_hf.hidden_pairs.dataset import write_shard
from llada_trm_hf.hidden_pairs.traces import write_traces
from llada_trm_hf.hub import read_legacy_hidden_pairs


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=False)


# --- Thoughts in tokens ---


@pytest.mark.parametrize("markers", [True, False])
def test_prompts(markers):
    tokenizer = tokenizer_with_markers(markers)
    thoughts = ThoughtFormat(tokenizer)
    assert (len(thoughts.start_ids), len(thoughts.end_ids)) == ((1, 1) if markers else (7, 8))
    assert [text_of(tokenizer, part) for part in thoughts.prompt("1+1?")] == ["1+1?", "<think>"]

    tokenizer.chat_template = CHAT_TEMPLATE
    context, opening = thoughts.prompt("1+1?")
    # The markers in the system prompt are no thought.
    expected = "Think between <think> and </think>.[user]1+1?[assistant]"
    assert (text_of(tokenizer, context), text_of(tokenizer, opening)) == (expected, "<think>")

    tokenizer.chat_template = CHAT_TEMPLATE.replace("[assistant]", "[assistant]<think>\n")
    context, opening = thoughts.prompt("1+1?")
    assert (text_of(tokenizer, context), text_of(tokenizer, opening)) == (expected, "<think>\n")


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("template_opens", [True, False])
def test_every_form_of_a_trace_is_the_same_thought(markers, template_opens):
    tokenizer = tokenizer_with_markers(markers, CHAT_TEMPLATE)
    if template_opens:
        tokenizer.chat_template = CHAT_TEMPLATE.replace("[assistant]", "[assistant]<think>\n")
    thoughts = ThoughtFormat(tokenizer)
    opening = "<think>\n" if template_opens else "<think>"
    full = text_of(tokenizer, thoughts.prompt("?")[0]) + f"{opening}one, two</think>"
    rows = [
        {"reasoning": "one, two"},
        {"completion": "one, two</think>three"},
        {"completion": f"\n{opening}one, two</think> three</think>"},
        {"completion_ids": tokenizer("one, two</think>three")["input_ids"], "completion": "not this"},
        {"completion_ids": tokenizer(f"{opening}one, two</think>")["input_ids"]},
        {"completion": None, "completion_ids": None, "reasoning": "one, two", "status": "complete"},
    ]
    for row in rows:
        trace, status = thoughts.trace({"prompt": "?", **row})
        assert status == "complete" and text_of(tokenizer, trace.input_ids) == full, row
        assert text_of(tokenizer, trace.opening) == opening and text_of(tokenizer, trace.thought) == "one, two"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "?", "completion": "one, two</thin"}, "no_end_of_thought"),
        ({"prompt": "?", "completion_ids": [1, 2, 3]}, "no_end_of_thought"),
        ({"prompt": "?", "reasoning": ""}, "no_thought"),
        ({"prompt": "?"}, "no_thought"),
        ({"prompt": " ", "reasoning": "x"}, "empty_prompt"),
        ({"prompt": None, "reasoning": "x"}, "empty_prompt"),
        ({"prompt": "?", "completion": "x</think>", "status": "too_long"}, "too_long"),
    ],
)
def test_traces_without_a_thought(row, reason):
    assert ThoughtFormat(tokenizer_with_markers()).trace(row) == (None, reason)


@pytest.mark.parametrize("start, end", [("<a>", "<a>"), ("", "</think>"), ("<think>", " "), ("", "")])
def test_bad_markers(start, end):
    with pytest.raises(ValueError, match="think_"):
        ThoughtFormat(tokenizer_with_markers(), start, end)


# --- Writing traces ---


@pytest.fixture(scope="module", params=["llama", "smollm3"])
def model_folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


def make_prompts(number, vocabulary=256, start_ids=(259,)):
    generator = random.Random(1)
    return [
        ([generator.randrange(vocabulary) for _ in range(generator.randrange(1, 20))], list(start_ids))
        for _ in range(number)
    ]


def write(model, prompts, end_ids, eos=(256,), numbers=None, keep_states=True, **settings):
    settings = TraceSettings(**{"max_new_tokens": 40, **settings})
    numbers = list(range(len(prompts))) if numbers is None else numbers
    return write_traces(model, prompts, numbers, list(end_ids), list(eos), 0, settings, keep_states)


def test_traces_and_states_against_plain_forward_passes(model_folder):
    model, eos = load_language_model(model_folder, "auto", "cpu")
    tokenizer = tokenizer_with_markers()
    assert eos == [tokenizer.eos_token_id]
    thoughts = ThoughtFormat(tokenizer)
    prompts = make_prompts(12, start_ids=thoughts.start_ids)
    written = write(model, prompts, thoughts.end_ids, eos)
    assert {"complete", "no_end_of_thought"} <= set(written.statuses)
    contexts = written.hidden_pre.split([len(context) for context, _ in prompts])
    for row, (context, opening) in enumerate(prompts):
        expected = plain_greedy(model, context + opening, thoughts.end_ids, eos[0], 40)
        assert written.completions[row] == expected
        complete = expected[-1] == thoughts.end_ids[-1]
        ended = len(expected) < 40 and not complete
        assert written.statuses[row] == ("complete" if complete else "ended_early" if ended else "no_end_of_thought")
        states = plain_states(model, context + opening + expected)
        torch.testing.assert_close(contexts[row], states[: len(context)], rtol=1e-4, atol=1e-5)
        if complete:
            torch.testing.assert_close(written.hidden_post[row], states[-1], rtol=1e-4, atol=1e-5)


def test_the_states_are_what_the_head_reads(model_folder):
    """The reference of these tests is after the final norm: the head's logits follow from it."""
    model = load_model(model_folder)
    states = plain_states(model, [5, 6, 7])
    torch.testing.assert_close(model.lm_head(states), model(torch.tensor([[5, 6, 7]])).logits[0])


def test_a_marker_of_several_tokens(tmp_path):
    """`ab` closes; neither `a` nor `b` alone does. The state is that of `b`."""
    folder = save_model(tmp_path, markers=False, favourites={"a": 2.2, "b": 2.2})
    model, _ = load_language_model(folder, "auto", "cpu")
    end = tokenizer_with_markers(False)("ab")["input_ids"]
    # A prompt that ends in half a marker, or a whole one, closes nothing.
    prompts = make_prompts(16, start_ids=(44,))
    prompts += [([7, 8], [end[0]]), ([7, 8], end)]
    written = write(model, prompts, end, max_new_tokens=60)
    assert written.statuses.count("complete") >= 3
    alone = 0
    for row, (context, opening) in enumerate(prompts):
        expected = plain_greedy(model, context + opening, end, 256, 60)
        assert written.completions[row] == expected
        thought = expected[:-2] if written.statuses[row] == "complete" else expected
        alone += len({*end} & set(thought))
        if written.statuses[row] == "complete":
            states = plain_states(model, context + opening + expected)
            torch.testing.assert_close(written.hidden_post[row], states[-1], rtol=1e-4, atol=1e-5)
    assert alone > 3


def test_the_last_token_may_close_the_thought(model_folder):
    """A marker that is the last of max_new_tokens counts, and its state exists; one token fewer, and it does not."""
    model, _ = load_language_model(model_folder, "auto", "cpu")
    end = tokenizer_with_markers()("</think>")["input_ids"]
    prompts = make_prompts(12)
    written = write(model, prompts, end)
    row = next(i for i, tokens in enumerate(written.completions) if written.statuses[i] == "complete")
    length = len(written.completions[row])
    just = write(model, [prompts[row]], end, max_new_tokens=length)
    assert just.statuses == ["complete"] and just.completions[0] == written.completions[row]
    states = plain_states(model, prompts[row][0] + prompts[row][1] + just.completions[0])
    torch.testing.assert_close(just.hidden_post[0], states[-1], rtol=1e-4, atol=1e-5)
    if length > 1:
        short = write(model, [prompts[row]], end, max_new_tokens=length - 1)
        assert short.statuses == ["no_end_of_thought"] and short.completions[0] == written.completions[row][:-1]


def test_a_text_that_ends_too_early(model_folder):
    """Every token ends the text but those the model does not choose first."""
    model, _ = load_language_model(model_folder, "auto", "cpu")
    prompts = make_prompts(6)
    free = write(model, prompts, [260], eos=())
    cut = write(model, prompts, [260], eos=[free.completions[0][2]])
    first = free.completions[0].index(free.completions[0][2])
    assert cut.statuses[0] == "ended_early" and cut.completions[0] == free.completions[0][:first]
    # A closing marker that is the end of the text too closes.
    both = write(model, prompts, [260], eos=[260])
    assert both.statuses == free.statuses and both.completions == free.completions
    torch.testing.assert_close(both.hidden_post, free.hidden_post)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9}])
def test_a_row_gives_what_it_gives_alone(model_folder, sampling):
    model, eos = load_language_model(model_folder, "auto", "cpu")
    prompts = make_prompts(7)
    numbers = [3, 14, 15, 92, 65, 35, 89]
    together = write(model, prompts, [260], eos, numbers, seed=5, **sampling)
    contexts = together.hidden_pre.split([len(context) for context, _ in prompts])
    for row, prompt in enumerate(prompts):
        alone = write(model, [prompt], [260], eos, [numbers[row]], seed=5, **sampling)
        assert alone.completions[0] == together.completions[row] and alone.statuses[0] == together.statuses[row]
        torch.testing.assert_close(alone.hidden_pre, contexts[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.hidden_post[0], together.hidden_post[row], rtol=1e-4, atol=1e-5)
    if sampling:
        other = write(model, prompts, [260], eos, numbers, seed=6, **sampling)
        assert other.completions != together.completions


def test_sampling_follows_the_distribution(model_folder):
    """First tokens of 3,000 problems with the same prompt, against the model's own probabilities."""
    model, eos = load_language_model(model_folder, "auto", "cpu")
    prompt = make_prompts(3)[2]
    written = write(model, [prompt] * 3000, [260], eos, max_new_tokens=1, temperature=0.7, top_k=5, keep_states=False)
    assert written.hidden_pre is None and written.hidden_post is None
    # An ended text has its end-of-sequence token cut off.
    tokens = torch.tensor([tokens[0] if tokens else eos[0] for tokens in written.completions])
    with torch.no_grad():
        logits = model(torch.tensor([prompt[0] + prompt[1]])).logits[0, -1]
    top = logits.topk(5)
    expected = (top.values / 0.7).softmax(-1)
    found = torch.stack([(tokens == token).float().mean() for token in top.indices])
    assert found.sum() == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0.035)


def test_the_generation_config_of_the_checkpoint_does_not_interfere(model_folder, tmp_path):
    model = load_model(model_folder)
    model.generation_config = GenerationConfig(repetition_penalty=3.0, do_sample=True, top_k=3, eos_token_id=[256, 9])
    model.save_pretrained(tmp_path)
    loud, eos = load_language_model(str(tmp_path), "auto", "cpu")
    assert eos == [256, 9]
    quiet, _ = load_language_model(model_folder, "auto", "cpu")
    prompts = make_prompts(4)
    assert write(loud, prompts, [260]).completions == write(quiet, prompts, [260]).completions


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_p": 0.5}, "need a temperature above 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_trace_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TraceSettings(**settings)


# --- Taking states ---


def make_traces(number):
    generator = random.Random(2)
    return [
        ThoughtTokens(*([generator.randrange(256) for _ in range(generator.randrange(1, 15))] for _ in range(4)))
        for _ in range(number)
    ]


@pytest.mark.parametrize("tokens_per_forward", [1, 60, 512])
def test_states_of_traces_against_plain_forward_passes(model_folder, tokens_per_forward):
    model, traces = load_model(model_folder), make_traces(9)
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    pre, post = extract_states(model, traces, tokens_per_forward=tokens_per_forward)
    assert all(rows == 1 or rows * length <= tokens_per_forward for rows, length in shapes)
    assert sum(rows for rows, _ in shapes) == 9 and len(shapes) == {1: 9, 60: len(shapes), 512: 1}[tokens_per_forward]
    for trace, context, end in zip(traces, pre.split([len(trace.context) for trace in traces]), post):
        states = plain_states(model, trace.input_ids)
        torch.testing.assert_close(context, states[: len(trace.context)], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(end, states[-1], rtol=1e-4, atol=1e-5)


def test_the_head_is_not_evaluated(model_folder):
    model, rows = load_model(model_folder), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.numel()))
    extract_states(model, make_traces(3))
    assert rows == [0]


def test_writing_evaluates_the_head_for_the_newest_token_only(model_folder):
    model, _ = load_language_model(model_folder, "auto", "cpu")
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    write(model, make_prompts(3), [260], max_new_tokens=4)
    assert set(shapes) == {(3, 1)}
    assert not model.lm_head._forward_pre_hooks


# --- The dataset ---


def write_folder(folder, lengths=((3, 1, 7), (), (2, 5)), width=6, dtype=torch.float32):
    """A finished run with a skipped problem after every pair; returns what the pairs are."""
    generator, expected, lines = torch.Generator().manual_seed(0), [], []
    for shard, sizes in enumerate(lengths):
        pre = torch.randn(sum(sizes), width, generator=generator).to(dtype)
        post = torch.randn(len(sizes), width, generator=generator).to(dtype)
        problems, offset = [], 0
        for row, size in enumerate(sizes):
            problem = {"id": f"{shard}/{row}", "status": "complete", "shard": shard, "row": row, "offset": offset}
            problem |= {"length": size, "num_prompt_tokens": size, "num_thought_tokens": row, "problem": f"π {row}"}
            skipped = {"id": f"{shard}/{row}?", "status": "too_long", "shard": shard, "row": None, "offset": None}
            problems += [problem, skipped]
            expected.append((problem["id"], pre[offset : offset + size], post[row]))
            offset += size
        write_shard(str(folder / f"pairs-{shard:05d}.safetensors"), pre, post, problems)
        lines += problems
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_items(tmp_path, dtype):
    expected = write_folder(tmp_path, dtype=dtype)
    pairs = HiddenPairsDataset(tmp_path)
    assert len(pairs) == 5 and pairs.lengths == [3, 1, 7, 2, 5] and pairs.num_skipped == 5 and pairs.hidden_size == 6
    assert pairs.ids == [name for name, _, _ in expected]
    for i in (4, 0, 3, 1, 2):  # in any order
        name, context, target = expected[i]
        assert pairs[i]["id"] == name and pairs[i]["context"].dtype == torch.float32
        assert torch.equal(pairs[i]["context"], context.float()) and torch.equal(pairs[i]["target"], target.float())
        # Nothing larger hangs on to an item.
        assert pairs[i]["context"].untyped_storage().nbytes() == context.numel() * 4
    again = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(again[2]["context"], pairs[2]["context"])
    with pytest.raises(IndexError):
        pairs[5]


def test_batches(tmp_path):
    expected = {name: (context, target) for name, context, target in write_folder(tmp_path)}
    pairs = HiddenPairsDataset(tmp_path)
    sampler = LengthGroupedSampler(2, lengths=pairs.lengths, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(pairs, batch_size=2, sampler=sampler, collate_fn=HiddenPairsCollator(), num_workers=1)
    seen = []
    for batch in loader:
        seen += batch["ids"]
        longest = max(len(expected[name][0]) for name in batch["ids"])
        assert batch["context"].shape == (len(batch["ids"]), longest, 6) and batch["mask"].dtype == torch.bool
        for row, name in enumerate(batch["ids"]):
            context, target = expected[name]
            assert torch.equal(batch["context"][row][batch["mask"][row]], context)
            assert batch["mask"][row].tolist() == [True] * len(context) + [False] * (longest - len(context))
            assert not batch["context"][row][~batch["mask"][row]].any()
            assert torch.equal(batch["target"][row], target)
    assert sorted(seen) == sorted(expected)
    trm = SequenceTRM(SequenceTRMConfig(hidden_size=6, n_heads=1)).eval()
    assert trm.reason(batch["context"], batch["mask"]).prediction.shape == batch["target"].shape


def test_compression_on_the_fly(tmp_path):
    expected = write_folder(tmp_path)
    compressor = DimensionCompressor(DimensionCompressorConfig(hidden_size=6, compressed_size=2))
    pairs = HiddenPairsDataset(tmp_path, compressor)
    assert pairs.hidden_size == 2 and not pairs[1]["context"].requires_grad
    for item, (_, context, target) in zip(pairs, expected):
        torch.testing.assert_close(item["context"], context @ compressor.weight.T)
        torch.testing.assert_close(item["target"], target @ compressor.weight.T)
    wide = DimensionCompressor(DimensionCompressorConfig(hidden_size=7, compressed_size=2))
    with pytest.raises(ValueError, match="are 6 wide, the compressor takes hidden_size=7"):
        HiddenPairsDataset(tmp_path, wide)


def test_more_shards_than_are_kept_open(tmp_path):
    expected = write_folder(tmp_path, lengths=((1,),) * 40)
    pairs = HiddenPairsDataset(tmp_path)
    for _ in range(2):
        for item, (_, context, _) in zip(pairs, expected):
            assert torch.equal(item["context"], context)
    assert len(pairs._shards) <= 16


def test_the_same_shard_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 4  # and no temporary file
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert load_file(tmp_path / "a/pairs-00001.safetensors")["hidden_pre"].shape == (0, 6)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        HiddenPairsDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no hidden pairs"):
        HiddenPairsDataset(tmp_path)
    (tmp_path / "datagen_config.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished run of datagen: start it again"):
        HiddenPairsDataset(tmp_path)
    write_folder(tmp_path)
    shard, metadata = tmp_path / "pairs-00000.safetensors", tmp_path / "metadata.jsonl"
    whole, lines = shard.read_bytes(), metadata.read_text()
    for cut in (b"", whole[:7], whole[:100], whole[:-1], whole + b"x"):
        shard.write_bytes(cut)
        with pytest.raises(ValueError, match=r"pairs-00000\.safetensors is damaged or cut short"):
            HiddenPairsDataset(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"pairs-00000\.safetensors is missing"):
        HiddenPairsDataset(tmp_path)
    shard.write_bytes((tmp_path / "pairs-00002.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"metadata\.jsonl says 3 of 11"):
        HiddenPairsDataset(tmp_path)
    shard.write_bytes(whole)
    metadata.write_text(lines[:-20])
    with pytest.raises(ValueError, match=r"metadata\.jsonl is damaged"):
        HiddenPairsDataset(tmp_path)
    metadata.write_text("".join(line + "\n" for line in lines.splitlines() if '"too_long"' in line))
    with pytest.raises(ValueError, match="none of 5 problems has a complete thought"):
        HiddenPairsDataset(tmp_path)


# --- The older form ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_and_import_of_the_older_form(tmp_path, dtype):
    expected = write_folder(tmp_path, dtype=dtype)
    assert export_legacy_hidden_pairs(tmp_path, tmp_path / "pairs.pt") == 5
    content = torch.load(tmp_path / "pairs.pt", weights_only=True)  # as the older scripts read it
    assert content["seq_lengths"] == [3, 1, 7, 2, 5] and content["hidden_size"] == 6
    assert content["problems"] == ["π 0", "π 1", "π 2", "π 0", "π 1"] and content["num_thinking_tokens"][2] == 2
    assert read_legacy_hidden_pairs(tmp_path / "pairs.pt").keys() == content.keys()
    older, newer = HiddenPairsDataset(tmp_path / "pairs.pt"), HiddenPairsDataset(tmp_path)
    assert older.lengths == newer.lengths and older.ids == ["0", "1", "2", "3", "4"] and older.num_skipped == 0
    for old, new, (_, context, _) in zip(older, newer, expected):
        assert torch.equal(old["context"], new["context"]) and torch.equal(old["target"], new["target"])
        assert torch.equal(old["context"], context.float())
    compressor = DimensionCompressor(DimensionCompressorConfig(hidden_size=6, compressed_size=2))
    assert HiddenPairsDataset(tmp_path / "pairs.pt", compressor)[0]["context"].shape == (3, 2)


def test_golden_pairs(llm_trm):
    facts = json.loads((llm_trm / "manifest.json").read_text())["hidden_pairs"]
    pairs = HiddenPairsDataset(llm_trm / facts["file"])
    assert pairs.lengths == facts["seq_lengths"] and pairs.hidden_size == 96
    total = sum(item["context"].double().sum().item() for item in pairs)
    assert total == pytest.approx(facts["checksum_pre_sum_f64"])


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"hidden_pre": Attack()}, tmp_path / "pairs.pt")
    with pytest.raises(ValueError, match="could run code"):
        HiddenPairsDataset(tmp_path / "pairs.pt")

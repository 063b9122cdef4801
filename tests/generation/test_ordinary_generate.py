"""`generate` as it is called elsewhere in the Hugging Face world: what settings mean, and what is refused by name."""

import asyncio
import json

import pytest
import torch
from conftest import EOS, MASK, PAD
from tiny_training import TOKENIZER, new_backbone
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from llada_trm_hf.generation.configuration_masked_diffusion import MaskedDiffusionGenerationConfig

PROMPT = torch.tensor([[5, 11, 23, 7, 42, 8]])
SHORT = {"max_new_tokens": 8, "num_diffusion_steps": 4}


def sampled(model, seed=0, **settings):
    torch.manual_seed(seed)
    return model.generate(PROMPT, **SHORT, **settings).tolist()


# --- Sampling ---


def test_do_sample(tiny_backbone):
    greedy, at_one, at_two = (sampled(tiny_backbone, temperature=t) for t in (0.0, 1.0, 2.0))
    assert greedy != at_one != at_two
    assert sampled(tiny_backbone, do_sample=True) == at_one
    assert sampled(tiny_backbone, do_sample=True, temperature=2.0) == at_two
    assert sampled(tiny_backbone, do_sample=False, temperature=2.0) == greedy
    assert sampled(tiny_backbone, do_sample=None, temperature=None, top_p=None) == greedy
    tiny_backbone.generation_config.temperature = 2.0  # with neither given, the model's own decides
    assert sampled(tiny_backbone) == sampled(tiny_backbone, do_sample=True) == at_two
    assert sampled(tiny_backbone, do_sample=False) == greedy
    tiny_backbone.generation_config.do_sample = False
    assert sampled(tiny_backbone) == greedy and sampled(tiny_backbone, temperature=2.0) == at_two
    with pytest.raises(ValueError, match="do_sample=True contradicts temperature=0"):
        sampled(tiny_backbone, do_sample=True, temperature=0.0)
    assert sampled(tiny_backbone, temperature=1.0, top_k=0) == at_one


def test_num_return_sequences(tiny_backbone):
    prompts = torch.tensor([[0, 0, 9, 12], [5, 11, 23, 7]])
    settings = {"attention_mask": (prompts != 0).long(), "temperature": 1.5, **SHORT}
    torch.manual_seed(0)
    several = tiny_backbone.generate(prompts, num_return_sequences=3, **settings)
    torch.manual_seed(0)
    settings["attention_mask"] = settings["attention_mask"][[0, 0, 0, 1, 1, 1]]
    assert torch.equal(several, tiny_backbone.generate(prompts[[0, 0, 0, 1, 1, 1]], **settings))
    assert len(several[:3].unique(dim=0)) > 1
    with pytest.raises(ValueError, match=r"num_return_sequences=2 .*do_sample=True"):
        tiny_backbone.generate(PROMPT, num_return_sequences=2, **SHORT)


# --- The prompt ---


def test_inputs_is_another_name_of_the_prompt(tiny_backbone):
    expected = tiny_backbone.generate(PROMPT, **SHORT)
    assert torch.equal(tiny_backbone.generate(inputs=PROMPT, **SHORT), expected)
    assert torch.equal(tiny_backbone.generate(input_ids=PROMPT, **SHORT), expected)
    with pytest.raises(ValueError, match="two names of the prompt"):
        tiny_backbone.generate(PROMPT, inputs=PROMPT, **SHORT)
    with pytest.raises(TypeError, match="generation_config by name"):
        tiny_backbone.generate(PROMPT, GenerationConfig(), **SHORT)


def test_without_a_prompt_it_begins_with_the_first_token(tiny_backbone):
    expected = tiny_backbone.generate(torch.tensor([[2]]), **SHORT)
    assert torch.equal(tiny_backbone.generate(**SHORT), expected)
    tiny_backbone.generation_config.bos_token_id = tiny_backbone.config.bos_token_id = None
    with pytest.raises(ValueError, match="no bos_token_id"):
        tiny_backbone.generate(**SHORT)


def test_default_length_ends_with_the_context(tiny_backbone):
    assert tiny_backbone.generate(PROMPT, num_diffusion_steps=1).shape == (1, 128)


# --- What asks for nothing, and what cannot be ---


def test_neutral_defaults(tiny_backbone):
    expected = tiny_backbone.generate(PROMPT, **SHORT)
    neutral = GenerationConfig._get_default_generation_params()
    neutral |= dict.fromkeys(vars(GenerationConfig()).keys() - neutral.keys())
    neutral = {name: value for name, value in neutral.items() if name[0] != "_" and "length" not in name}
    del neutral["max_new_tokens"], neutral["temperature"]  # 1.0 asks to sample here
    assert len(neutral) > 50
    for name, value in neutral.items():
        assert torch.equal(tiny_backbone.generate(PROMPT, **SHORT, **{name: value}), expected), name
    assert torch.equal(tiny_backbone.generate(PROMPT, **SHORT, **neutral, temperature=1.0), expected)  # not sampled
    arguments = {
        **{"num_beams": 1, "use_cache": True, "early_stopping": False, "length_penalty": 1.0, "disable_compile": True},
        **{"synced_gpus": False, "assistant_model": None, "prefix_allowed_tokens_fn": None, "min_p": 0.0},
        **{"negative_prompt_ids": None, "labels": PROMPT, "tokenizer": TOKENIZER, "repetition_penalty": 1},
    }
    assert torch.equal(tiny_backbone.generate(PROMPT, **SHORT, **arguments), expected)


CANNOT = [
    ({"num_beams": 4}, "num_beams=4 cannot be honoured: diffusion has no beams"),
    ({"early_stopping": True}, "early_stopping=True .*no beams"),
    ({"repetition_penalty": 1.3}, r"repetition_penalty=1\.3 .*logits_processor=\[RepetitionPenaltyLogitsProcessor"),
    ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 .*left to right"),
    ({"min_new_tokens": 5}, "min_new_tokens=5 .*suppress_tokens"),
    ({"min_p": 0.1}, "min_p=0.1 .*top_p"),
    ({"guidance_scale": 2.0}, "guidance_scale=2.0 .*cfg_scale"),
    ({"forced_eos_token_id": 0}, "forced_eos_token_id=0 cannot be honoured"),
    ({"cache_implementation": "static"}, "cache_implementation='static' .*kv_cache"),
    ({"output_attentions": True}, "output_attentions=True .*call the model itself"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 .*drafts"),
]


@pytest.mark.parametrize("settings, message", CANNOT, ids=str)
def test_what_cannot_be_is_refused_by_name(tiny_backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone.generate(PROMPT, **SHORT, **settings)
    with pytest.raises(ValueError, match=message):
        tiny_backbone.generate(PROMPT, generation_config=GenerationConfig(**SHORT, **settings))
    ((name, value),) = settings.items()
    setattr(tiny_backbone.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        tiny_backbone.generate(PROMPT, **SHORT)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"assistant_model": torch.nn.Linear(1, 1)}, "assistant_model=Linear .*drafts"),
        ({"synced_gpus": True}, "synced_gpus=True cannot be honoured"),
        ({"prefix_allowed_tokens_fn": print}, "prefix_allowed_tokens_fn=builtin_function.*left to right"),
        ({"negative_prompt_ids": PROMPT}, "negative_prompt_ids=Tensor .*cfg_scale"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds=Tensor .*input_ids"),
        ({"do_sampel": True}, "'do_sampel'.*did you mean 'do_sample'"),
        ({"stop_string": "x"}, "'stop_string'.*did you mean 'stop_strings'"),
        ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
        ({"stop_strings": []}, "stop_strings must be a string or a list of strings"),
        ({"stop_strings": "x"}, "pass tokenizer="),
        ({"num_return_sequences": 0}, "num_return_sequences must be an integer of at least 1"),
        ({"output_scores": True}, "output_scores=True needs return_dict_in_generate"),
        ({"max_time": 0}, "max_time must be above 0"),
        ({"max_time": 5.0}, "max_time .*only one: pass block_length"),
        ({"eos_token_id": 77}, "eos_token_id=77 is outside the vocabulary"),
    ],
    ids=str,
)
def test_bad_arguments(tiny_backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone.generate(PROMPT, **SHORT, **settings)


# --- Caches ---


def test_use_cache(tiny_backbone):
    """True does not turn on an approximation, False turns off the config's own."""
    columns = []
    tiny_backbone.model.register_forward_pre_hook(
        lambda _, args, kwargs: columns.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    def passes(**settings):
        columns.clear()
        return tiny_backbone.generate(PROMPT, **SHORT, **settings).tolist(), list(columns)

    exact = passes()
    assert exact[1] == [14] * 4 and passes(use_cache=True) == passes(use_cache=False) == exact
    tiny_backbone.generation_config.kv_cache = "dual"
    cached = passes()
    assert cached[1] == [14, 8, 8, 8] and passes(use_cache=True) == cached
    assert passes(use_cache=False) == exact
    assert passes(generation_config=GenerationConfig(use_cache=False)) == exact
    with pytest.raises(ValueError, match="use_cache=False contradicts kv_cache='dual'"):
        passes(use_cache=False, kv_cache="dual")


# --- Stopping ---


def test_end_tokens_of_a_call_end_rows(tiny_backbone):
    settings = {"max_new_tokens": 12, "num_diffusion_steps": 6, "block_length": 4}
    free = tiny_backbone.generate(PROMPT, **settings)[0].tolist()
    eos = free[8]
    end = free.index(eos, 6) + 1
    expected = free[:end] + [PAD] * (18 - end)
    for arguments in ({"eos_token_id": eos}, {"generation_config": GenerationConfig(eos_token_id=[eos])}):
        assert tiny_backbone.generate(PROMPT, **settings, **arguments)[0].tolist() == expected
    assert tiny_backbone.generate(PROMPT, eos_token_id=eos, stop_at_eos=False, **settings)[0].tolist() == free
    tiny_backbone.generation_config.eos_token_id = eos  # known to the model, as its official sampler goes on after it
    assert tiny_backbone.generate(PROMPT, **settings)[0].tolist() == free
    ended = tiny_backbone.generate(PROMPT, eos_token_id=eos, pad_token_id=33, **settings)[0].tolist()
    assert ended == free[:end] + [33] * (18 - end)


def merged_tokenizer():
    """Bytes, and tokens of several letters that a stop string may begin or end inside of."""
    letters = "abc "
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:100]
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    symbols = [space if letter == " " else letter for letter in letters]
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys([*symbols, *alphabet]))}
    merges = [(first, second) for first in symbols[:3] for second in symbols[:3]]
    for first, second in merges:
        vocab[first + second] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>")
    wrapped.clean_up_tokenization_spaces = False
    return wrapped


@pytest.fixture
def writer(make_backbone):
    """A model that writes a, b, c and pairs of them, and its tokenizer."""
    tokenizer = merged_tokenizer()
    ids = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_backbone(vocab_size=len(tokenizer), **ids)
    allowed = {i for token, i in tokenizer.get_vocab().items() if set(token) <= set("abc")}
    forbidden = sorted(set(range(len(tokenizer))) - allowed - {tokenizer.mask_token_id})
    model.generation_config.update(suppress_tokens=forbidden, max_new_tokens=12, temperature=3.0)
    return model, tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stop", ["b", "ca", [" ", "bbc"], "aabaab"], ids=str)
@pytest.mark.parametrize("block_length", [4, None])
def test_stop_strings(writer, stop, side, block_length):
    model, tokenizer = writer
    batch = tokenizer(["ab c", "c", "cab abc ab"] * 4, padding=True, padding_side=side, return_tensors="pt")
    width, stops = batch.input_ids.shape[1], [stop] if isinstance(stop, str) else stop
    settings = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"block_length": block_length}

    def expected(row, mask):
        """Tokens are added as long as they complete no stop string; a match may begin in the prompt."""
        prompt = row[:width][mask.bool()].tolist()
        for end in range(width + 1, len(row) + 1):
            before, text = (tokenizer.decode(prompt + row[width:i].tolist()) for i in (end - 1, end))
            if any(text.count(s) > before.count(s) for s in stops):
                return [*row[:end].tolist(), *[tokenizer.pad_token_id] * (len(row) - end)]
        return row.tolist()

    torch.manual_seed(0)
    outputs = model.generate(**settings, stop_strings=stop, tokenizer=tokenizer, return_dict_in_generate=True)
    stopped = outputs.sequences
    torch.manual_seed(0)
    free = model.generate(**settings)
    if block_length is None:  # one block: what is drawn is the same
        wanted = [expected(row, mask) for row, mask in zip(free, batch.attention_mask)]
        assert stopped.tolist() == wanted and outputs.num_forward_passes == 12
        cut = sum(row != whole for row, whole in zip(wanted, free.tolist()))
        assert stop == "aabaab" or cut
    else:  # rows that leave change what others draw: each is cut where it has to be, or whole
        for row, mask in zip(stopped, batch.attention_mask):
            assert expected(row, mask) == row.tolist()
            kept = (row != tokenizer.pad_token_id)[width:].sum()
            assert kept == 12 or expected(row[: width + kept], mask) == row[: width + kept].tolist()
            assert kept == 12 or any(s in tokenizer.decode(row, skip_special_tokens=True) for s in stops)


def test_blocks_after_a_stop_string_are_not_begun(writer):
    model, tokenizer = writer
    model.generation_config.temperature = 0.0
    prompt = tokenizer("ab c", return_tensors="pt").input_ids
    settings = {"block_length": 4, "return_dict_in_generate": True}
    free = model.generate(prompt, **settings)
    stop = tokenizer.decode(free.sequences[0, prompt.shape[1]])
    outputs = model.generate(prompt, stop_strings=stop, tokenizer=tokenizer, **settings)
    assert (free.num_forward_passes, outputs.num_forward_passes) == (12, 4)
    assert outputs.sequences[0].tolist() == [
        *free.sequences[0, : prompt.shape[1] + 1].tolist(),
        *[tokenizer.pad_token_id] * 11,
    ]


def test_max_time(tiny_backbone):
    settings = {"max_new_tokens": 12, "block_length": 4}
    free = tiny_backbone.generate(PROMPT, **settings)[0].tolist()
    assert tiny_backbone.generate(PROMPT, max_time=1e-9, **settings)[0].tolist() == free[:10] + [PAD] * 8
    assert tiny_backbone.generate(PROMPT, max_time=1e9, **settings)[0].tolist() == free


# --- Scores ---


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 5}, {"remask_committed": 0.05}], ids=str)
def test_scores_are_those_each_token_was_chosen_by(tiny_backbone, settings):
    prompts = torch.tensor([[5, MASK, 23, 7], [9, 12, 40, 8]])
    suppressed = [4, 17, 21]
    torch.manual_seed(0)
    outputs = tiny_backbone.generate(
        prompts,
        max_new_tokens=9,
        block_length=5,
        num_diffusion_steps=4,
        suppress_tokens=suppressed,
        output_scores=True,
        output_logits=True,
        output_history=True,
        return_dict_in_generate=True,
        **settings,
    )
    assert len(outputs.scores) == len(outputs.logits) == 9
    for row in range(2):
        for i in range(9):
            column = 4 + i
            was = outputs.history[:, row, column]
            step = int((was == MASK).nonzero().max())  # the last canvas in which it was open
            logits = tiny_backbone(outputs.history[step, row : row + 1]).logits[0, column]
            torch.testing.assert_close(outputs.logits[i][row], logits, atol=1e-4, rtol=1e-4)
            scores = logits.clone()
            scores[[*suppressed, MASK]] = -torch.inf
            if settings.get("temperature"):
                scores = scores / 0.7
                scores = scores.masked_fill(scores < scores.topk(5).values[-1], -torch.inf)
            found = outputs.scores[i][row]
            assert torch.equal(found.isinf(), scores.isinf())
            torch.testing.assert_close(found, scores, atol=1e-4, rtol=1e-4)
            token = outputs.sequences[row, column]
            assert found[token] > -torch.inf and (settings.get("temperature") or found.argmax() == token)


def test_scores_of_what_was_never_decided_are_zero(tiny_backbone):
    settings = {"block_length": 4, "max_new_tokens": 8, "max_time": 1e-9}
    outputs = tiny_backbone.generate(PROMPT, output_scores=True, return_dict_in_generate=True, **settings)
    assert [bool(scores.any()) for scores in outputs.scores] == [True] * 4 + [False] * 4 and outputs.logits is None


# --- Generation configs of transformers ---


def test_plain_generation_config(tiny_backbone):
    tiny_backbone.generation_config.update(num_diffusion_steps=2, block_length=4)
    plain = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=0.8, top_k=0, top_p=0.9, num_beams=1)
    torch.manual_seed(0)
    found = tiny_backbone.generate(PROMPT, generation_config=plain, return_dict_in_generate=True)
    torch.manual_seed(0)
    expected = tiny_backbone.generate(PROMPT, max_new_tokens=8, temperature=0.8, top_p=0.9)
    assert torch.equal(found.sequences, expected) and found.num_forward_passes == 2  # the rest is the model's own
    plain = GenerationConfig(max_length=10, num_diffusion_steps=4, block_length=2)
    outputs = tiny_backbone.generate(PROMPT, generation_config=plain, return_dict_in_generate=True)
    assert outputs.sequences.shape == (1, 10) and outputs.num_forward_passes == 4
    with pytest.raises(ValueError, match=r"'blok_length'.*did you mean 'block_length'"):
        tiny_backbone.generate(PROMPT, generation_config=GenerationConfig(blok_length=2))
    with pytest.raises(TypeError, match="must be a GenerationConfig, got dict"):
        tiny_backbone.generate(PROMPT, generation_config={"max_new_tokens": 2})
    tiny_backbone.generation_config = GenerationConfig(max_new_tokens=3)  # as Seq2SeqTrainer does
    assert tiny_backbone.generate(PROMPT).shape == (1, 9)


def test_a_model_is_loaded_with_a_plain_generation_config(tiny_backbone, tmp_path):
    tiny_backbone.save_pretrained(tmp_path)
    loaded = type(tiny_backbone).from_pretrained(tmp_path, generation_config=GenerationConfig(max_new_tokens=3))
    assert isinstance(loaded.generation_config, MaskedDiffusionGenerationConfig)
    assert torch.equal(loaded.generate(PROMPT), tiny_backbone.generate(PROMPT, max_new_tokens=3))


def test_attributes_that_others_read_and_set(tiny_backbone, tmp_path):
    config = tiny_backbone.generation_config
    unset = [name for name in vars(GenerationConfig()) if name[0] != "_" and name not in vars(config)]
    assert "min_new_tokens" in unset and "cache_implementation" in unset
    values = {name: getattr(config, name) for name in unset}
    assert values.pop("do_sample") is False and values.pop("use_cache") is False and set(values.values()) == {None}
    with pytest.raises(AttributeError, match="no attribute 'num_beam'"):
        config.num_beam  # noqa: B018
    config.num_beams, config.max_new_tokens, config.pad_token_id, config.do_sample = 1, 4, 3, True
    assert config.temperature == 1.0 and tiny_backbone.generate(PROMPT).shape == (1, 10)
    config.num_beam = 2
    with pytest.raises(ValueError, match="'num_beam'"):
        tiny_backbone.generate(PROMPT)
    with pytest.raises(ValueError, match="'num_beam'"):
        config.save_pretrained(tmp_path)
    del config.num_beam
    config.update(temperature=0.5, stop_strings=["x"], max_time=3.0, num_return_sequences=2)
    config.save_pretrained(tmp_path)
    loaded = MaskedDiffusionGenerationConfig.from_pretrained(tmp_path)
    assert loaded == config and json.loads((tmp_path / "generation_config.json").read_text())["do_sample"] is True
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.5


@pytest.mark.parametrize(
    "file, temperature",
    [
        ({"temperature": 0.5}, 0.5),  # as earlier versions saved it
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": False, "temperature": 0.5}, 0.0),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
        ({"use_cache": False, "num_beams": 4, "_from_model_config": True}, 0.0),
    ],
    ids=str,
)
def test_saved_generation_configs(file, temperature, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    config = MaskedDiffusionGenerationConfig.from_pretrained(tmp_path)
    assert config.temperature == temperature and config.kv_cache == "none"


# --- Who else calls generate ---


def test_seq2seq_trainer_predicts_with_generate(tmp_path):
    model = new_backbone(initializer_range=0.3).eval()
    model.generation_config.num_diffusion_steps = 3
    mask = TOKENIZER.mask_token_id
    rows = [{"input_ids": [*range(40, 40 + n), mask], "labels": [-100] * n + [60]} for n in (5, 9, 7)]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        per_device_eval_batch_size=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = Seq2SeqTrainer(
        model, arguments, data_collator=DataCollatorForSeq2Seq(TOKENIZER), processing_class=TOKENIZER
    )
    before = model.generation_config.to_dict()
    output = trainer.predict(rows, max_new_tokens=6, num_beams=1)
    for row, prediction in zip(rows, output.predictions):
        alone = model.generate(torch.tensor([row["input_ids"]]), max_new_tokens=6)[0].tolist()
        assert prediction[: len(alone)].tolist() == alone and mask not in alone
    pairs = [(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])) for row in rows]
    loss = sum(model(ids, labels=labels).loss for ids, labels in pairs)
    assert output.metrics["test_loss"] == pytest.approx(loss.item() / 3, rel=1e-4)
    # What the trainer fills in changes no later generation.
    after = model.generation_config.to_dict()
    assert {name for name in after if after[name] != before[name]} <= {"max_length", "max_new_tokens"}
    assert model.generate(PROMPT).shape == (1, 6 + 128)


def test_transformers_serve_calls_generate():
    serving = pytest.importorskip("transformers.cli.serving.utils")
    model = new_backbone(initializer_range=0.3).eval()
    letters = set(TOKENIZER("abcdefghijklmnopqrstuvwxyz ").input_ids)
    model.generation_config.update(
        block_length=4, suppress_tokens=sorted(set(range(len(TOKENIZER))) - letters - {TOKENIZER.mask_token_id})
    )
    inputs = TOKENIZER("say: ", return_tensors="pt")
    alone = model.generate(inputs.input_ids, max_new_tokens=12)[0, inputs.input_ids.shape[1] :]
    text = TOKENIZER.decode(alone)
    stop = text[6]
    cut = text[: text.index(stop) + 1]

    async def answers(config):
        manager = serving.GenerateManager()
        whole, length, _ = await manager.generate_non_streaming(model, TOKENIZER, dict(inputs), config, "1")
        queue, streamer = manager.generate_streaming(model, TOKENIZER, dict(inputs), config, "2")
        parts = []
        while (part := await queue.get()) is not None:
            assert isinstance(part, str), part
            parts.append(part)
        return whole, length, "".join(parts), streamer.total_tokens

    config = MaskedDiffusionGenerationConfig.from_transformers(model.generation_config)
    config.max_new_tokens = 12
    assert config.cache_implementation is None  # which a server asks first
    assert asyncio.run(answers(config)) == (text, 5, text, 12)
    config.stop_strings = [stop]
    assert asyncio.run(answers(config)) == (cut, 5, cut, len(cut))
    plain = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=EOS)
    assert asyncio.run(answers(plain)) == (text, 5, text, 12)

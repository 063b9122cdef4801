"""The chat template of a latent thinker: prompts that end with a thought, with transformers alone."""

import json
import os
import sys
import warnings

import pytest
import torch
from latent_thinking_models import backbone_for, make_model, new_tokenizer
from run_programs import run_program
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llada_trm_hf import latent_thinking_prompt, latent_thinking_tokenizer, thought_token_ids
from llada_trm_hf.data import byte_tokenizer
from llada_trm_hf.models.latent_thinking.thinking_chat_template import (
    latent_thinking_template_files,
    tokenizer_to_save,
)
from llada_trm_hf.models.latent_thinking.thought_tokens import find_thoughts

THOUGHT = "<think><|latent|><|latent|><|latent|></think>"
TURNS = (
    "{%- for m in messages %}{% if m.role == 'assistant' %}[assistant]{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}[assistant]BODY{% endif %}"
SWITCH = "{{ '' if enable_thinking | default(true) and '/no_think' not in messages[0].content else 'EMPTY' }}"
MACRO = (
    "{%- set close = ']' %}{% macro turn(m) %}[{{ m.role + close + m.content }}{% endmacro %}"
    "{% set state = namespace(turns=0) %}{% for m in messages %}{% set state.turns = state.turns + 1 %}"
    "{% if m.role == 'assistant' %}[assistant]{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "{{ turn(m) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and state.turns %}[assistant{{ close }}{% endif %}"
)
TEMPLATES = {
    "macro": MACRO,
    "plain": TURNS + PROMPT.replace("BODY", ""),
    "line break": TURNS + PROMPT.replace("BODY", "\n    ") + "\n",
    "opens a thought": TURNS + PROMPT.replace("BODY", "<think>{{ '\\n' }}"),
    "writes an empty thought": TURNS + PROMPT.replace("BODY", "<think>{{ '\\n\\n' }}</think>{{ '\\n' }}"),
    "has a switch": TURNS + PROMPT.replace("BODY", SWITCH.replace("EMPTY", "<think>\\n\\n</think>\\n")),
    "thinks on request": TURNS
    + PROMPT.replace("BODY", "{% if enable_thinking is undefined or not enable_thinking %}<think></think>{% endif %}"),
}
MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "1+2"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "4+5"},
]
TEXT = "[system]S[user]1+2[assistant]3[user]4+5[assistant]"


def new_model(tokenizer):
    return make_model(backbone=backbone_for(tokenizer), **thought_token_ids(tokenizer))


@pytest.fixture(scope="module")
def speaking():
    tokenizer = new_tokenizer()
    return new_model(tokenizer), tokenizer


@pytest.fixture
def templated(speaking, request):
    model, tokenizer = speaking
    tokenizer.chat_template = TEMPLATES[request.param]
    yield model, tokenizer
    tokenizer.chat_template = None


def written(tokenizer, **options):
    return tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)


@pytest.mark.parametrize("templated", TEMPLATES, indirect=True)
def test_prompts_end_with_a_thought(templated, tmp_path):
    """Here and after a round trip through files, with the tokens of `latent_thinking_prompt`; else nothing changes."""
    model, tokenizer = templated
    given = tokenizer.chat_template
    latent_thinking_tokenizer(tokenizer, model.config).save_pretrained(tmp_path)
    assert tokenizer.chat_template == given
    thinking = AutoTokenizer.from_pretrained(tmp_path)
    break_before = "\n" if given == TEMPLATES["line break"] else ""
    prompt = written(thinking, add_generation_prompt=True)
    assert prompt == TEXT + break_before + THOUGHT == written(thinking, add_generation_prompt=True, enable_thinking=1)
    ids = thinking.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids == thinking(prompt)["input_ids"]
    for each in (tokenizer, thinking):
        assert ids == latent_thinking_prompt(MESSAGES, each, model.config)
        assert prompt == latent_thinking_prompt(MESSAGES, each, model.config, tokenize=False)
    assert find_thoughts(torch.tensor([ids]), None, model.config).columns == [len(ids) - 4]

    off = {"add_generation_prompt": True, "enable_thinking": False}
    assert written(thinking, **off) == written(tokenizer, **off) and "latent" not in written(thinking, **off)
    assert written(thinking) == written(tokenizer) == TEXT.removesuffix("[assistant]")
    masks = [each.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True) for each in (thinking, tokenizer)]
    assert masks[0]["assistant_masks"] == masks[1]["assistant_masks"] and sum(masks[0]["assistant_masks"]) == 1


def test_a_conversation_may_ask_for_no_thought(speaking):
    """By the switch of its template, as SmolLM3's `/no_think` does."""
    model, tokenizer = speaking
    tokenizer.chat_template = TEMPLATES["has a switch"]
    thinking = latent_thinking_tokenizer(tokenizer, model.config)
    messages = [{"role": "system", "content": "/no_think"}, *MESSAGES[1:]]
    options = {"add_generation_prompt": True, "tokenize": False}
    expected = tokenizer.apply_chat_template(messages, **options)
    assert expected.endswith("[assistant]<think>\n\n</think>\n")
    assert thinking.apply_chat_template(messages, **options) == expected
    # A prompt that is to have a thought has one instead.
    asked = latent_thinking_prompt(messages, tokenizer, model.config, tokenize=False)
    assert asked == expected.removesuffix("<think>\n\n</think>\n") + THOUGHT


def test_again_for_another_number_of_latents(speaking):
    model, tokenizer = speaking
    tokenizer.chat_template = TEMPLATES["opens a thought"]
    once = latent_thinking_tokenizer(tokenizer, model.config)
    other = make_model(backbone=model.backbone, num_latents=5, **thought_token_ids(tokenizer))
    again = latent_thinking_tokenizer(once, other.config)
    assert again.chat_template == latent_thinking_tokenizer(tokenizer, other.config).chat_template
    assert written(again, add_generation_prompt=True) == TEXT + "<think>" + "<|latent|>" * 5 + "</think>"


def test_several_templates(speaking):
    model, tokenizer = speaking
    tokenizer.chat_template = {"default": TEMPLATES["plain"], "tool_use": "TOOLS" + TEMPLATES["plain"]}
    thinking = latent_thinking_tokenizer(tokenizer, model.config)
    assert written(thinking, add_generation_prompt=True) == TEXT + THOUGHT
    assert written(thinking, add_generation_prompt=True, chat_template="tool_use") == "TOOLS" + TEXT + THOUGHT


def test_without_a_chat_template(speaking):
    model, tokenizer = speaking
    tokenizer.chat_template = None
    assert latent_thinking_tokenizer(tokenizer, model.config) is tokenizer


@pytest.mark.parametrize("end, merged", [("\n", False), (":", True)])
def test_markers_of_several_tokens(end, merged):
    """`:<` is one token here: where it could come about, the template is refused, and the trainers leave it alone."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|latent|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([":< think"] * 9, BpeTrainer(initial_alphabet=alphabet, special_tokens=specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    model = new_model(tokenizer)
    assert len(model.config.think_start_token_ids) > 1
    tokenizer.chat_template = TEMPLATES["plain"].replace("[assistant]", "[assistant]" + end)
    if merged:
        with pytest.raises(ValueError, match=r"the tokenizer merges them. Add the markers"):
            latent_thinking_tokenizer(tokenizer, model.config)
        with pytest.warns(UserWarning, match="stays without a latent thought"):
            assert tokenizer_to_save(tokenizer, model.config) is tokenizer
        return
    thinking = latent_thinking_tokenizer(tokenizer, model.config)
    ids = thinking.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids == latent_thinking_prompt(MESSAGES, tokenizer, model.config)
    assert find_thoughts(torch.tensor([ids]), None, model.config).num_thoughts == 1


PIPELINE = """
import json, sys
sys.modules["llada_trm_hf"] = None
from transformers import AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained("model")
answer = pipeline("text-generation", model="model", tokenizer=tokenizer, trust_remote_code=True)
messages, settings = json.load(open("messages.json")), {"max_new_tokens": 6, "do_sample": False}
texts = [answer(messages, **settings)[0]["generated_text"][-1]["content"]]
batch = answer([messages, messages[:2]], batch_size=2, **settings)
texts += [row[0]["generated_text"][-1]["content"] for row in batch]
off = {"tokenizer_encode_kwargs": {"enable_thinking": False}}
texts.append(answer(messages, **settings, **off)[0]["generated_text"][-1]["content"])
texts.append(answer("1+2=", return_full_text=False, **settings)[0]["generated_text"])
json.dump(texts, open("texts.json", "w"))
"""


@pytest.mark.parametrize("templated", ["opens a thought"], indirect=True)
def test_pipeline_thinks_about_messages_where_the_package_is_not_installed(templated, tmp_path):
    model, tokenizer = templated
    model.save_pretrained(tmp_path / "model")
    latent_thinking_tokenizer(tokenizer, model.config).save_pretrained(tmp_path / "model")
    (tmp_path / "messages.json").write_text(json.dumps(MESSAGES))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", PIPELINE]
    done = run_program(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "texts.json").read_text())

    def answer(ids):
        output = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)

    thought = [answer(latent_thinking_prompt(m, tokenizer, model.config)) for m in (MESSAGES, MESSAGES[:2])]
    bare = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    expected = [thought[0], *thought, answer(bare), answer(tokenizer("1+2=")["input_ids"])]
    assert found == expected and len(set(expected)) == 4
    assert done.stderr.count("The prompt has no thought in it") == 1  # although two of the calls had none


def test_folders_of_other_models_have_no_template_of_ours(speaking, tmp_path):
    model, tokenizer = speaking
    tokenizer.chat_template = TEMPLATES["plain"]
    for name, each in (("whole", model), ("thinker", model.thinker), ("backbone", model.backbone)):
        each.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (template,) = latent_thinking_template_files(tmp_path / "whole").items()
    expected = latent_thinking_tokenizer(tokenizer, model.config).chat_template
    assert template == ("chat_template.jinja", expected.encode())
    for name in ("thinker", "backbone"):
        assert latent_thinking_template_files(tmp_path / name) == {}
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    os.remove(tmp_path / "whole/chat_template.jinja")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latent_thinking_template_files(tmp_path / "whole") == {}

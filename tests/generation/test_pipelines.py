"""`pipeline` on saved folders, in a process without the package, against `generate` and `forward` for a row alone."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT, randomise
from run_pipelines import CHAT, MASKED, PROMPTS
from run_programs import run_program
from tiny_training import SIZES, new_backbone, new_hybrid

from llada_trm_hf import LLaDAMoEConfig, LLaDAMoEForMaskedDiffusion
from llada_trm_hf.data import byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES = ("backbone", "moe", "hybrid")


def new_models(tokenizer):
    ids = {
        name: getattr(tokenizer, name) for name in ("mask_token_id", "pad_token_id", "eos_token_id", "bos_token_id")
    }
    sizes = {**SIZES, "initializer_range": 0.3, "vocab_size": len(tokenizer)}
    sizes["dense_intermediate_size"] = sizes.pop("intermediate_size")
    torch.manual_seed(1)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 16}
    moe = LLaDAMoEForMaskedDiffusion(LLaDAMoEConfig(**sizes, **experts, **ids))
    hybrid = new_hybrid(initializer_range=0.3)
    randomise(hybrid.refiner)
    models = dict(zip(NAMES, (new_backbone(initializer_range=0.3), moe, hybrid)))
    letters = set(tokenizer("abcdefghijklmnopqrstuvwxyz ").input_ids)
    for model in models.values():
        # Saved with the model, so it decides what a pipeline does.
        model.eval().generation_config.update(
            max_new_tokens=12,
            block_length=4,
            num_diffusion_steps=6,
            suppress_tokens=sorted(set(range(len(tokenizer))) - letters - {tokenizer.mask_token_id}),
        )
    return models


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def models(tokenizer):
    return new_models(tokenizer)


@pytest.fixture(scope="module")
def found(models, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "wishes.json").write_text(
        json.dumps([{name: str(folder / name) for name in NAMES}, str(folder / "out")])
    )
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = run_program(
        [sys.executable, str(ROOT / "tests/run_pipelines.py"), str(folder / "wishes.json")],
        cwd=folder,
        env=inherited | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "out").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_text_generation(name, found, models, tokenizer):
    model, outputs = models[name], found[name][0]

    def answer(text, **settings):
        ids = tokenizer(text, return_tensors="pt").input_ids if isinstance(text, str) else text
        return tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :], skip_special_tokens=True)

    alone = [answer(prompt) for prompt in PROMPTS]
    assert [len(text) for text in alone] == [12, 12, 12]  # of the model's own settings: greedy, 12 letters
    assert outputs["string"] == [PROMPTS[0] + alone[0]]
    assert outputs["batch, left"] == outputs["batch, right"] == [[text] for text in alone]
    assert outputs["empty"] == [answer(torch.tensor([[tokenizer.bos_token_id]]))]
    short = answer(PROMPTS[0], max_new_tokens=6)
    assert outputs["new text"] == [short] and outputs["config"] == [PROMPTS[0] + short] and len(short) == 6

    prompt = "<user>add two and three<assistant>"
    assert outputs["chat"] == [[*CHAT, {"role": "assistant", "content": answer(prompt)}]]
    begun = "it is " + answer(prompt + "it is ")
    assert [chat[0][-1]["content"] for chat in outputs["chats"]] == [answer(prompt), begun]

    assert outputs["streamed"] == [[alone[0]], alone[0]]
    torch.manual_seed(0)
    ids = tokenizer([PROMPTS[0]] * 3, return_tensors="pt").input_ids
    sampled = model.generate(ids, temperature=0.9)[:, ids.shape[1] :]
    assert outputs["sampled"] == [PROMPTS[0] + text for text in tokenizer.batch_decode(sampled)]
    assert len(set(outputs["sampled"])) > 1
    stop = alone[0][-3]
    assert outputs["stopped"] == [alone[0][: alone[0].index(stop) + 1]]
    assert tokenizer.decode(outputs["tokens"]) == PROMPTS[0] + alone[0]
    assert "text" in outputs["repr"]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_fill_mask(name, found, models, tokenizer):
    model, (one, two, batch) = models[name], found[name][1]

    def guesses(text, top_k):
        ids = tokenizer(text, return_tensors="pt").input_ids
        masks = ids[0] == tokenizer.mask_token_id
        return model(ids).logits[0, masks].softmax(-1).topk(top_k)

    for text, answers in zip(MASKED, ([one], two)):
        best = guesses(text, 4)
        for i, guess in enumerate(answers):
            assert [entry["token"] for entry in guess] == best.indices[i].tolist()
            torch.testing.assert_close(torch.tensor([entry["score"] for entry in guess]), best.values[i])
            filled_in = text.replace("<|mdm_mask|>", tokenizer.decode([guess[0]["token"]]), 1) if i == 0 else None
            assert filled_in is None or len(answers) > 1 or guess[0]["sequence"] == filled_in
    # In a batch every row has what it has alone.
    rows = [[batch[0]], batch[1]]
    for text, answers in zip(MASKED, rows):
        best = guesses(text, 2)
        scores = torch.tensor([[entry["score"] for entry in guess] for guess in answers])
        torch.testing.assert_close(scores, best.values, atol=1e-5, rtol=1e-4)

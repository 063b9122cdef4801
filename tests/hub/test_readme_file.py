"""`save_pretrained` writes the card, keeps it up to date, and leaves alone what a person wrote."""

import ast
import contextlib
import io
import os
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny_training import TOKENIZER, new_backbone, new_hybrid, trainer
from transformers import AutoConfig

from llada_trm_hf import DimensionCompressor, DimensionCompressorConfig, SequenceTRM, SequenceTRMConfig
from llada_trm_hf.models import hub_model


def new_compressor(**config):
    return DimensionCompressor(DimensionCompressorConfig(**{"hidden_size": 64, "compressed_size": 16, **config}))


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code


@pytest.mark.parametrize(
    "new_model", [new_compressor, new_hybrid, lambda: SequenceTRM(SequenceTRMConfig(hidden_size=16, n_heads=2))]
)
def test_card_beside_the_weights(tmp_path, monkeypatch, new_model):
    """Its code runs as printed, beside the folder."""
    model = new_model()
    model.add_model_tags(["arithmetic"])
    model.save_pretrained(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model/README.md")
    assert {"arithmetic", model.config.model_type, "llada-trm-hf"} < set(card.data.tags)
    assert card.data.library_name == "transformers" and "base_model" not in card.data.to_dict()
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code_of(card), "card", "exec"), {})
    assert printed.getvalue().strip()


def test_card_follows_the_model_until_a_person_changes_it(tmp_path):
    readme = tmp_path / "README.md"
    new_compressor().save_pretrained(tmp_path)
    assert "from 64 channels to 16" in readme.read_text()
    new_compressor(compressed_size=8).save_pretrained(tmp_path)
    assert "from 64 channels to 8" in readme.read_text()
    readme.write_bytes(readme.read_bytes().replace(b"\n", b"\r\n"))  # as some editors and git leave it
    new_compressor(compressed_size=4).save_pretrained(tmp_path)
    assert "from 64 channels to 4" in readme.read_text() and b"\r" not in readme.read_bytes()
    new_backbone().save_pretrained(tmp_path)
    assert "torch.tensor([[5, 6, 7]])" in readme.read_text()
    TOKENIZER.save_pretrained(tmp_path)
    new_backbone().save_pretrained(tmp_path)
    assert "AutoTokenizer.from_pretrained" in readme.read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "Mine.\n",
        lambda text: "",
        lambda text: text.replace("A linear", "Ä linear"),  # not even UTF-8
        lambda text: text.replace("A linear compressor", "My compressor"),
        lambda text: text.replace("tags:", "license: mit\ntags:"),
        lambda text: text + "More of mine.\n",
        lambda text: text.replace("# ", "## ", 1),
        lambda text: text[: text.index("<!--")],
    ],
)
def test_what_a_person_wrote_stays(tmp_path, change):
    new_compressor().save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(change(readme.read_text()), encoding="latin-1")
    before = readme.read_bytes()
    new_compressor(compressed_size=8).save_pretrained(tmp_path)
    assert readme.read_bytes() == before and AutoConfig.from_pretrained(tmp_path).compressed_size == 8


def test_no_card(tmp_path, monkeypatch):
    new_compressor().save_pretrained(tmp_path / "checkpoint-10")  # a Trainer's
    new_compressor().save_pretrained(tmp_path / "process", is_main_process=False)
    adapted = new_backbone()
    adapted.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda *_: 1)
        hub_model.HUB_HOOKS["save_card"](tmp_path / "checkpoint-10/../checkpoint-10")
        new_compressor().config.save_pretrained(tmp_path / "second")
        hub_model.HUB_HOOKS["save_card"](tmp_path / "second")
    with monkeypatch.context() as patch:
        patch.setattr(hub_model, "HUB_HOOKS", {})  # as in the code that travels, where the package is not
        new_compressor().save_pretrained(tmp_path / "without the package")
    assert list(tmp_path.glob("**/README.md")) == []
    hub_model.HUB_HOOKS["save_card"](tmp_path / "second")
    assert list(tmp_path.glob("**/README.md")) == [tmp_path / "second/README.md"]


def test_code_that_travels_has_no_hooks(tmp_path):
    new_compressor().save_pretrained(tmp_path)
    (assigned,) = (
        node
        for node in ast.walk(ast.parse((tmp_path / "hub_model.py").read_text()))
        if isinstance(node, ast.AnnAssign) and node.target.id == "HUB_HOOKS"
    )
    assert ast.literal_eval(assigned.value) == {} and set(hub_model.HUB_HOOKS) == {
        "save_card",
        "push_model",
        "push_folder",
        "replacing_files",
        "check_stored_weights",
        "backbone_fingerprint",
        "check_backbone",
    }


def test_strange_folder_names(tmp_path):
    for name in ('an "odd" näme', "back\\slash", "a: #{{ b }}"):
        folder = tmp_path / name
        new_compressor().save_pretrained(folder)
        card = ModelCard.load(folder / "README.md")
        loaded = [node for node in ast.walk(ast.parse(code_of(card))) if isinstance(node, ast.Call)]
        assert any(call.args and getattr(call.args[0], "value", None) == name for call in loaded)
        assert card.data.to_dict()["model_name"] == name


def test_trainer(samples, tmp_path):
    """No card in checkpoints; that of the output folder has the results as soon as they are written."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(new_hybrid(), tmp_path / "out", samples, **settings)
    run.model.add_model_tags("arithmetic")
    run.train()
    assert len(list(tmp_path.glob("out/checkpoint-*"))) == 2 and list(tmp_path.glob("**/README.md")) == []
    run.save_model()
    run.save_state()
    card = ModelCard.load(tmp_path / "out/README.md")
    (loss,) = [row["eval_loss"] for row in run.state.log_history if row["step"] == 2 and "eval_loss" in row]
    assert f"| loss | {loss:.4g} |" in card.text and "| steps | 2 |" in card.text
    assert "AutoTokenizer" in card.text and "arithmetic" in card.data.tags
    run.create_model_card(license="mit", tags="more")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "mit" and {"more", "arithmetic"} < set(card.data.tags)
    run.save_model()
    run.save_state()
    assert ModelCard.load(tmp_path / "out/README.md").data.license == "mit"
    (tmp_path / "out/README.md").write_text("Mine.\n")
    run.create_model_card()
    run.save_state()
    assert (tmp_path / "out/README.md").read_text() == "Mine.\n"
    assert not any(name.startswith(".README") for name in os.listdir(tmp_path / "out"))

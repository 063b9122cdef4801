"""What `llada-trm push` uploads, what it refuses, and what it does when the connection breaks."""

import json
import logging
import os
import re
import runpy
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import ROOT
from hub_http_server import TOKEN, Repository, sha256
from huggingface_hub import ModelCard, hf_hub_download
from latent_thinking_models import backbone_for, make_model, new_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from tiny_training import TOKENIZER, new_backbone, new_hybrid, trainer
from transformers import AutoModel, AutoModelForMaskedLM

from llada_trm_hf import (
    DimensionCompressor,
    DimensionCompressorConfig,
    latent_thinking_prompt,
    latent_thinking_tokenizer,
    thought_token_ids,
)
from llada_trm_hf.cli.main import main
from llada_trm_hf.hub import import_legacy, model_card, push_checkpoint
from llada_trm_hf.models import hub_model
from llada_trm_hf.recipes.run_setup import train_and_save


@pytest.fixture
def checkpoint(tmp_path):
    """A compressor's folder."""
    folder = tmp_path / "compressor"
    DimensionCompressor(DimensionCompressorConfig(hidden_size=64, compressed_size=16)).save_pretrained(folder)
    return folder


# Of two shards, of which one is missing.
INDEX = json.dumps({"weight_map": {"weight": "model.safetensors", "bias": "model-2.safetensors"}})


def push(folder, *more):
    return main(["push", "--checkpoint", str(folder), "--repo", "user/model", *more])


# --- What is uploaded ---


def test_dry_run_lists_what_is_uploaded_and_contacts_nobody(hub, checkpoint, capsys):
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "training_metrics.csv", "trainer_state.json"):
        (checkpoint / name).write_text("{}")
    (checkpoint / "checkpoint-10").mkdir()
    (checkpoint / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    (checkpoint / "ema_state.safetensors").write_bytes(b"")
    (checkpoint / "README.md").unlink()  # the rest does not need one
    before = {path: path.stat().st_mtime_ns for path in checkpoint.glob("**/*")}
    assert push(checkpoint, "--dry_run") == 0
    assert hub.requests == []
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in capsys.readouterr().out.splitlines()}
    code = {path.name for path in checkpoint.glob("*.py")}
    assert set(listed) == {"README.md", "config.json", "model.safetensors", *code} and code
    assert push(checkpoint) == 0
    files = hub.files("user/model")
    assert {path: len(contents) for path, contents in files.items() if path != ".gitattributes"} == listed
    assert {path: path.stat().st_mtime_ns for path in checkpoint.glob("**/*")} == before


def test_no_code_but_what_auto_map_reaches(hub, tmp_path, capsys):
    folder = tmp_path / "backbone"
    new_backbone().save_pretrained(folder)
    saved = {path.name for path in folder.glob("*.py")}
    for name in ("private.py", "custom_generate/generate.py", "templates/other.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("SECRET = 1\n")
    templates = {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
    for name in templates:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{{ messages }}")
    # The code of a tokenizer, and what it imports; that of another repository is not there.
    auto_map = {"AutoTokenizer": ["tokenization_mine.Mine", None], "AutoProcessor": "user/other--processing.Theirs"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "tokenization_mine.py").write_text("from .pieces import (\n    Pieces,\n)\n")
    (folder / "pieces.py").write_text("class Pieces: ...\n")
    assert push(folder) == 0
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "README.md"}
    expected |= {*saved, *templates, "tokenization_mine.py", "pieces.py", ".gitattributes"}
    assert set(hub.files("user/model")) == expected
    imported = folder / "block_sampler.py"
    imported.unlink()
    assert push(folder) == 2
    assert f"lacks {imported.name}" in capsys.readouterr().err


def test_chat_template_of_a_latent_thinker(hub, tmp_path, capsys):
    """A checkpoint with the language model's own tokenizer: the thought is written in what is uploaded, and its card's
    code thinks."""
    folder, tokenizer = tmp_path / "model", new_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    model = make_model(backbone=backbone_for(tokenizer), **thought_token_ids(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    assert push(folder) == 0
    assert (folder / "chat_template.jinja").read_text() == tokenizer.chat_template
    files = hub.files("user/model")
    template = files["chat_template.jinja"].decode()
    assert template == latent_thinking_tokenizer(tokenizer, model.config).chat_template
    (folder / "chat_template.jinja").write_text(template)
    (code,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert "enable_thinking=False" in files["README.md"].decode()
    capsys.readouterr()
    exec(compile(code.replace("user/model", str(folder)), "card", "exec"), {})
    ids = latent_thinking_prompt("What is 12 * 7?", tokenizer, model.config)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=64)[0]
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_custom_generate(hub, checkpoint, capsys):
    assert main(["push", "--custom_generate", "user/generate", "--dry_run"]) == 0
    listed = {line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert {"README.md", "custom_generate/generate.py"} < listed and hub.requests == []
    assert main(["push", "--custom_generate", "user/generate", "--private", "--revision", "v2"]) == 0
    assert set(hub.files("user/generate", "v2")) == listed | {".gitattributes"}
    assert hub.repositories["user/generate"].private and "/commit/" in capsys.readouterr().out
    assert main(["push", "--custom_generate", "user/generate", "--revision", "v2"]) == 0
    assert hub.num_commits("user/generate") == 1  # the same again
    commit_readme(hub, "Mine.\n", "user/generate")
    assert main(["push", "--custom_generate", "user/generate"]) == 0
    assert hub.files("user/generate")["README.md"] == b"Mine.\n" and len(hub.files("user/generate")) > 3
    capsys.readouterr()
    for arguments, found in (
        (["--custom_generate", "user/generate", "--checkpoint", str(checkpoint)], "--checkpoint"),
        (["--custom_generate", "user/generate", "--repo", "user/model"], "--repo"),
        (["--custom_generate", "generate"], "'generate'"),
        (["--checkpoint", str(checkpoint)], "--repo"),
        ([], "--checkpoint and --repo"),
    ):
        assert main(["push", *arguments]) == 2
        error = capsys.readouterr().err
        assert found in error and len(error.splitlines()) == 1


def test_pushing_the_same_again_makes_no_commit(hub, checkpoint):
    assert push(checkpoint) == push(checkpoint) == 0
    assert hub.num_commits("user/model") == 1


def test_a_card_of_ones_own_stays(hub, checkpoint, capsys):
    (checkpoint / "README.md").write_text("---\ntags: [mine]\n---\nMine.\n")
    assert push(checkpoint) == 0
    assert hub.files("user/model")["README.md"].endswith(b"Mine.\n")
    assert push(checkpoint, "--description", "More.") == 2
    assert "put the description there" in capsys.readouterr().err


def test_description_and_branch_are_in_the_card(hub, checkpoint):
    assert push(checkpoint, "--description", "Fitted on {{ text }}.", "--revision", "second") == 0
    assert "README.md" not in hub.files("user/model")
    card = hub.files("user/model", "second")["README.md"].decode()
    assert "Fitted on {{ text }}." in card and '"user/model", revision="second"' in card
    assert push(checkpoint, "--revision", "second") == 0  # another card
    assert hub.num_commits("user/model") == 2


def test_private(hub, checkpoint, capsys):
    assert push(checkpoint, "--private") == 0
    assert hub.repositories["user/model"].private
    hub.repositories["user/model"].private = False
    assert push(checkpoint, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err


def test_base_model_instead_of_a_folder(hub, tmp_path):
    """In the card and in the config, so that it is put together with the repository of that name."""
    backbone, hybrid = new_backbone(), new_hybrid()
    backbone.save_pretrained(tmp_path / "backbone")
    hybrid.config.backbone_name_or_path = str(tmp_path / "backbone")
    hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    assert push(tmp_path / "head", "--base_model", "user/backbone") == 0
    files = hub.files("user/model")
    assert json.loads(files["config.json"])["backbone_name_or_path"] == "user/backbone"
    assert ModelCard(files["README.md"].decode()).data.base_model == "user/backbone"
    assert all(str(tmp_path).encode() not in contents for contents in files.values())
    assert json.loads((tmp_path / "head/config.json").read_text())["backbone_name_or_path"] == str(
        tmp_path / "backbone"
    )
    assert main(["push", "--checkpoint", str(tmp_path / "backbone"), "--repo", "user/backbone"]) == 0
    loaded = AutoModelForMaskedLM.from_pretrained("user/model", cache_dir=tmp_path / "cache")
    tokens = torch.arange(10, 20)[None]
    torch.testing.assert_close(loaded(tokens).logits, hybrid.eval()(tokens).logits)


def test_script(hub, checkpoint, monkeypatch, capsys):
    script = ROOT / "scripts/push_to_hub.py"
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--repo",
        "user/model",
        "--private",
        "--description",
        "A compressor.",
    ]
    for more in (["--dry_run"], []):
        monkeypatch.setattr(sys, "argv", [str(script), *arguments, *more])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(script), run_name="__main__")
    *listed, address = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in listed} | {".gitattributes"} == set(hub.files("user/model"))
    assert address.startswith(f"{hub.url}/user/model/commit/") and hub.repositories["user/model"].private
    assert b"A compressor." in hub.files("user/model")["README.md"]


def test_trainer_with_push_to_hub(hub, samples, tmp_path):
    """One commit, at the end, of what loads the model: nothing pickled, no logs, no folder of this machine."""
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    arguments |= {"hub_model_id": "model", "hub_token": TOKEN, "hub_private_repo": True}
    run = trainer(new_hybrid(), tmp_path / "out", samples, **arguments)
    train_and_save(run, None)
    assert hub.num_commits("user/model") == 1 and hub.repositories["user/model"].private
    files = hub.files("user/model")
    assert {Path(path).suffix for path in files} == {".json", ".md", ".py", ".safetensors", ""}
    left_out = {"training_args.bin", "trainer_state.json", "training_metrics.csv"}
    assert not left_out & set(files) and all((tmp_path / "out" / name).exists() for name in left_out)
    assert all(str(tmp_path).encode() not in contents for contents in files.values())
    assert (tmp_path / "out/README.md").read_bytes() == files["README.md"]
    assert not (tmp_path / "out/checkpoint-2/README.md").exists()
    assert push(tmp_path / "out", "--revision", "again") == 0
    again = hub.files("user/model", "again")
    assert set(again) == set(files) and {path for path in files if files[path] != again[path]} == {"README.md"}

    run.create_model_card()
    run.push_to_hub(revision="v2")  # the card in the folder is for another branch
    assert b'revision="v2"' in hub.files("user/model", "v2")["README.md"]
    with pytest.raises(ValueError, match=r"The card is made from the checkpoint: leave out language"):
        run.push_to_hub(language="en")


def test_older_files_are_converted(hub, tmp_path):
    weight = torch.randn(3, 8)
    torch.save({"compressor": {"compress.weight": weight}, "config": None}, tmp_path / "compressor.pt")
    assert push(tmp_path / "compressor.pt") == 0
    files = hub.files("user/model")
    assert files["model.safetensors"] == save({"weight": weight}, {"format": "pt"})
    assert not any(path.endswith((".pt", ".bin")) for path in files)


class _Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_older_trm_is_converted(hub, llm_trm, tmp_path):
    path = llm_trm / "trm_a_legacy.pt"
    assert push(path, "--base_model", "user/lm") == 0
    files = hub.files("user/model")
    assert {Path(name).suffix for name in files} == {".json", ".md", ".py", ".safetensors", ""}
    assert ModelCard(files["README.md"].decode()).data.base_model == "user/lm"
    loaded = AutoModel.from_pretrained("user/model", cache_dir=tmp_path / "cache")
    context = torch.randn(2, 5, 32)
    torch.testing.assert_close(loaded.reason(context).prediction, import_legacy(path).reason(context).prediction)


@pytest.mark.parametrize("key", ["compressor", "trm_state_dict"])
def test_malicious_file_is_not_executed(hub, tmp_path, capsys, key):
    content = {key: {"compress.weight": torch.ones(2, 3)}, "config": _Attack(tmp_path / "executed")}
    torch.save(content, tmp_path / "old.pt")
    assert push(tmp_path / "old.pt") == 2
    assert "names posix.mkdir" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists() and hub.requests == []
    torch.load(tmp_path / "old.pt", weights_only=False)  # which shows that the attack works
    assert (tmp_path / "executed").exists()


# --- Models that push themselves ---


def test_models_and_the_command_line_upload_the_same(hub, tmp_path):
    model = new_hybrid()
    model.save_pretrained(tmp_path / "command")
    assert main(["push", "--checkpoint", str(tmp_path / "command"), "--repo", "user/command"]) == 0
    model.push_to_hub("user/method")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True)  # to a repository of the token's, named as the folder
    expected = hub.files("user/command")
    for name in ("method", "saved"):
        files = hub.files(f"user/{name}")
        card = files["README.md"].replace(name.encode(), b"command")
        assert hub.num_commits(f"user/{name}") == 1
        assert (
            ModelCard(card.decode()).text.split("<!--")[0]
            == (ModelCard(expected["README.md"].decode()).text.split("<!--")[0])
        )
        assert {**files, "README.md": b""} == {**expected, "README.md": b""}
    TOKENIZER.push_to_hub("user/method")
    after = hub.files("user/method")
    assert (
        after["README.md"]
        == hub.repositories["user/method"].commits[[*hub.repositories["user/method"].commits][1]]["README.md"]
    )
    assert "tokenizer.json" in after
    model.push_to_hub("user/method", description="Fitted.")  # still known as the package's
    assert b"Fitted." in hub.files("user/method")["README.md"]
    assert "tokenizer.json" in hub.files("user/method")


def test_what_push_to_hub_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    model = DimensionCompressor(DimensionCompressorConfig(hidden_size=64, compressed_size=16))
    model.add_model_tags("of the model")
    told = {"token": TOKEN, "private": True, "revision": "second", "tags": "more", "license": "mit"}
    told |= {"commit_message": "Compressor", "commit_description": "At length.", "base_model": "user/lm"}
    pushed = model.push_to_hub("model", description="My words.", **told)  # the owner is the token's
    repository = hub.repositories["user/model"]
    assert repository.private and repository.messages[pushed.oid] == ("Compressor", "At length.")
    assert "README.md" not in hub.files("user/model") and repository.branches["second"] == pushed.oid
    card = ModelCard(hub.files("user/model", "second")["README.md"].decode())
    assert card.data.license == "mit" and card.data.base_model == "user/lm"
    assert {"more", "of the model"} < set(card.data.tags)
    assert "My words." in card.text and '"user/model", revision="second", trust_remote_code' in card.text


def test_pull_request(hub, checkpoint, capsys):
    assert push(checkpoint) == 0
    before = dict(hub.repositories["user/model"].branches)
    model = DimensionCompressor(DimensionCompressorConfig(hidden_size=64, compressed_size=8))
    opened = model.push_to_hub("user/model", create_pr=True)
    assert opened.pr_url == f"{hub.url}/user/model/discussions/1"
    assert {**before, "refs/pr/1": opened.oid} == hub.repositories["user/model"].branches
    assert json.loads(hub.files("user/model", "refs/pr/1")["config.json"])["compressed_size"] == 8
    model.push_to_hub("user/model", revision="refs/pr/1", description="More.")  # onto it
    assert b"More." in hub.files("user/model", "refs/pr/1")["README.md"]
    capsys.readouterr()
    assert push(checkpoint, "--create_pr", "--description", "x", "--commit_message", "Mine") == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/user/model/discussions/2"
    repository = hub.repositories["user/model"]
    assert repository.messages[repository.branches["refs/pr/2"]] == ("Mine", "")
    assert repository.branches["main"] == before["main"]
    hub.cut_commits = ["after"]
    with pytest.raises(huggingface_hub.errors.HTTPError):
        push_checkpoint(checkpoint, "user/model", description="y", create_pr=True)
    assert "refs/pr/3" in repository.branches and "refs/pr/4" not in repository.branches


def test_trained_part_alone(hub, tmp_path):
    backbone, hybrid = new_backbone(), new_hybrid()
    backbone.push_to_hub("user/backbone")
    hybrid.config.backbone_name_or_path = "user/backbone"
    hybrid.push_to_hub("user/head", save_backbone=False)
    held = load_file(hf_hub_download("user/head", "model.safetensors", cache_dir=tmp_path))
    assert held and all(name.startswith("refiner.") for name in held)
    card = ModelCard(hub.files("user/head")["README.md"].decode())
    assert card.data.to_dict()["base_model_relation"] == "adapter" and card.data.base_model == "user/backbone"
    assert hybrid.config.backbone_in_checkpoint
    loaded = AutoModelForMaskedLM.from_pretrained("user/head", cache_dir=tmp_path)
    tokens = torch.arange(10, 20)[None]
    torch.testing.assert_close(loaded(tokens).logits, hybrid.eval()(tokens).logits)


def test_what_push_to_hub_refuses(hub, tmp_path, monkeypatch):
    """Before anything is sent, in one sentence."""
    model, hybrid = DimensionCompressor(DimensionCompressorConfig(hidden_size=64, compressed_size=16)), new_hybrid()
    hybrid.config.backbone_name_or_path = str(tmp_path)
    broken = new_hybrid()
    next(broken.refiner.parameters()).data[0] = torch.nan
    for pushed, arguments, error, message in (
        (model, {"privat": True}, TypeError, "privat"),
        (model, {"save_backbone": False}, ValueError, "needs a model with a backbone, got a DimensionCompressor"),
        (hybrid, {"save_backbone": False}, ValueError, "names a folder of this machine"),
        (broken, {}, ValueError, r"NaN or infinite numbers in 1 tensors: refiner\."),
        (model, {"token": False}, ValueError, "hf auth login"),
        (model, {"base_model": "nobody"}, ValueError, "owner/name"),
    ):
        with pytest.raises(error, match=message) as raised:
            pushed.push_to_hub("user/model", **arguments)
        assert "\n" not in str(raised.value)
    for name in ("us er/model", "a/b/c", "", "-/x--y"):
        with pytest.raises(ValueError):
            model.push_to_hub(name)
        if name:
            with pytest.raises(ValueError):
                model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=name)
    assert hub.requests == []


def test_one_process_of_several_uploads(hub, monkeypatch, tmp_path):
    model = DimensionCompressor(DimensionCompressorConfig(hidden_size=64, compressed_size=16))
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda *_: 1)
        assert model.push_to_hub("user/model") is None and hub.requests == []
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
        assert hub.requests == []
    assert model.push_to_hub("user/model").oid == hub.repositories["user/model"].branches["main"]


def test_without_the_package_transformers_pushes(hub, monkeypatch):
    """As the code that travels does."""
    monkeypatch.setattr(hub_model, "HUB_HOOKS", {})
    DimensionCompressor(DimensionCompressorConfig(hidden_size=64, compressed_size=16)).push_to_hub("user/model")
    files = hub.files("user/model")
    assert {"model.safetensors", "config.json", "README.md", "dimension_compressor.py"} < set(files)
    assert b"llada-trm-hf" not in files["README.md"]


# --- The card that is there ---


def commit_readme(hub, text, name="user/model"):
    repository = hub.repositories.setdefault(name, Repository(private=False))
    files = repository.commits.get(repository.branches.get("main"), {})
    repository.commit("main", {**files, "README.md": text.encode()})


def test_a_persons_card_on_the_hub_stays(hub, checkpoint, capsys):
    assert push(checkpoint) == 0
    changed = hub.files("user/model")["README.md"].decode().replace("A linear", "My linear")
    for text in ("---\ntags: [mine]\n---\nMine.\n", "Mine, without metadata.", changed, "---\ntags: [\n---\nMine."):
        commit_readme(hub, text)
        model = DimensionCompressor(DimensionCompressorConfig(hidden_size=64, compressed_size=8))
        model.push_to_hub("user/model", revision="new")
        assert hub.files("user/model", "new")["README.md"].decode() == text
        assert json.loads(hub.files("user/model", "new")["config.json"])["compressed_size"] == 8
        assert "it stays" in capsys.readouterr().err
        del hub.repositories["user/model"].branches["new"]
    (checkpoint / "README.md").write_text("---\ntags: [newer]\n---\nNewer.\n")  # meant for there
    assert push(checkpoint) == 0
    assert hub.files("user/model")["README.md"].endswith(b"Newer.\n")


def test_metadata_of_a_new_repository_stay(hub, checkpoint):
    """Which the page that makes one writes, without a text."""
    commit_readme(hub, "---\nlicense: cc-by-4.0\nlanguage: de\n---\n")
    assert push(checkpoint) == 0
    card = ModelCard(hub.files("user/model")["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.library_name) == ("cc-by-4.0", "de", "transformers")
    assert "A linear compressor" in card.text
    assert push(checkpoint) == 0 and hub.num_commits("user/model") == 1  # (`commit_readme` made the first)


def test_license(hub, tmp_path, monkeypatch):
    """Given, else of the card that is replaced, else of the base model, for which the Hub is asked; else none."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit_readme(hub, "---\nlicense: other\nlicense_name: x\nlicense_link: TERMS\n---\n# LM\n", "user/lm")
    commit_readme(hub, "---\nlicense: mit\n---\n# LM\n", "user/free")

    def pushed(base="user/lm", **arguments):
        torch.manual_seed(0)
        config = DimensionCompressorConfig(hidden_size=64, compressed_size=16, backbone_name_or_path=base)
        DimensionCompressor(config).push_to_hub("user/model", **arguments)
        data = ModelCard(hub.files("user/model")["README.md"].decode()).data.to_dict()
        return {name: value for name, value in data.items() if name.startswith("license")}

    assert pushed(base="user/private") == {}
    of_base = {"license": "other", "license_name": "x", "license_link": f"{hub.url}/user/lm/blob/main/TERMS"}
    assert pushed() == of_base
    commits, before = hub.num_commits("user/model"), hub.files("user/model")["README.md"].decode()
    assert pushed() == of_base  # now from the cache
    assert hub.files("user/model")["README.md"].decode() == before and hub.num_commits("user/model") == commits
    assert pushed(license="apache-2.0") == {"license": "apache-2.0"}
    assert pushed() == {"license": "apache-2.0"}
    assert pushed(base="user/free") == {"license": "mit"}  # what was said of another base model is not kept
    assert pushed(base=None) == {}
    assert pushed(base=None, license="cc-by-4.0") == pushed(base=None) == {"license": "cc-by-4.0"}
    hub.validate(ModelCard(hub.files("user/model")["README.md"].decode()))


def test_license_on_the_command_line(hub, checkpoint, capsys):
    assert push(checkpoint, "--license", "apache-2.0", "--tags", "one", "two") == 0
    card = ModelCard(hub.files("user/model")["README.md"].decode())
    assert card.data.license == "apache-2.0" and {"one", "two"} < set(card.data.tags)
    (checkpoint / "README.md").write_text("---\ntags: [mine]\n---\nMine.\n")
    assert push(checkpoint, "--license", "mit") == 2
    assert "put the license there" in capsys.readouterr().err


# --- Weights ---


def test_weights_of_an_earlier_upload_do_not_hide_the_new_ones(hub, tmp_path):
    """Of one file and several, in both orders; `from_pretrained` takes `model.safetensors` where there is one."""
    torch.manual_seed(0)
    for number, size in enumerate(("1GB", "20KB", "50KB", "1GB")):
        if size == "50KB":  # and the answer to the commit is lost
            hub.cut_commits = ["after"]
        model = new_backbone()
        model.push_to_hub("user/model", max_shard_size=size, description=str(number))
        loaded = AutoModelForMaskedLM.from_pretrained("user/model", cache_dir=tmp_path / str(number))
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        files = hub.files("user/model")
        index = json.loads(files.get("model.safetensors.index.json", b"{}")).get("weight_map")
        held = {path for path in files if path.endswith(".safetensors")}
        assert held == (set(index.values()) if index else {"model.safetensors"})
        assert (len(held) > 1) == (size != "1GB")
    assert hub.num_commits("user/model") == 4


def spoil_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.missing.weight"] = sorted(index["weight_map"].values())[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_number(folder, value):
    path = sorted(folder.glob("model-*.safetensors"))[1]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[3] = value
    path.write_bytes(save(tensors, {"format": "pt"}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: os.truncate(sorted(folder.glob("model-*"))[0], 5000), "is damaged"),
        (lambda folder: os.truncate(sorted(folder.glob("model-*"))[0], 0), "is damaged"),
        (spoil_index, "lacks model.missing.weight"),
        (lambda folder: spoil_number(folder, torch.nan), "holds NaN or infinite numbers in 1 tensors"),
        (lambda folder: spoil_number(folder, -torch.inf), "holds NaN or infinite numbers in 1 tensors"),
    ],
)
def test_damaged_weights(hub, tmp_path, capsys, spoil, message):
    new_backbone().save_pretrained(tmp_path, max_shard_size="50KB")
    assert push(tmp_path, "--dry_run") == 0
    capsys.readouterr()
    spoil(tmp_path)
    assert push(tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and hub.requests == []


# --- Trainers ---


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_uploads_while_training(hub, samples, tmp_path, strategy):
    """The model of each checkpoint by the same path; what it takes to resume only where that is asked for."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_total_limit": 1}
    pushing = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "model", "hub_token": TOKEN}
    pushing |= {"hub_private_repo": True, "hub_revision": "runs", "hub_always_push": True}
    run = trainer(new_hybrid(), tmp_path / "out", samples, **settings, **pushing)
    run.train()
    repository = hub.repositories["user/model"]
    assert repository.private and set(hub.files("user/model")) == {".gitattributes"}
    messages = [repository.messages[commit][0] for commit in repository.commits if commit in repository.messages]
    assert messages == ["Training in progress, step 2", "Training in progress, step 4"]
    files = hub.files("user/model", "runs")
    root = {path for path in files if "/" not in path}
    assert {Path(path).suffix for path in root} == {".json", ".md", ".py", ".safetensors", ""}
    assert not any(path.endswith("training_args.bin") for path in files)
    assert b'revision="runs"' in files["README.md"] and b"| steps | 4 |" in files["README.md"]
    folders = {path.split("/")[0] for path in files if "/" in path}
    expected = {"every_save": set(), "checkpoint": {"last-checkpoint"}}
    assert folders == expected.get(strategy, {"checkpoint-2", "checkpoint-4"})
    if strategy == "checkpoint":
        for path in (path for path in files if "/" in path):
            (tmp_path / "checkpoint-4" / path.split("/")[1]).parent.mkdir(exist_ok=True)
            (tmp_path / "checkpoint-4" / path.split("/")[1]).write_bytes(files[path])
        resumed = trainer(new_hybrid(), tmp_path / "again", samples, max_steps=6, resume_with_changes=True)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        straight = trainer(new_hybrid(), tmp_path / "straight", samples, max_steps=6, resume_with_changes=True)
        straight.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
        for name, tensor in straight.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name
    run.push_to_hub(tags="finished")
    assert repository.messages[repository.branches["runs"]][0] == "End of training"


def test_training_goes_on_without_the_hub(hub, samples, tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "hub_always_push": True}
    pushing = {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": "model", "hub_token": TOKEN}
    run = trainer(new_hybrid(), tmp_path / "out", samples, **settings, **pushing)
    hub.cut_commits = ["refuse", "refuse"]
    transformers.logging.enable_propagation()
    try:
        run.train()
        end = time.monotonic() + 30
        while caplog.text.count("A checkpoint could not be uploaded") < 2 and time.monotonic() < end:
            time.sleep(0.01)  # a failed upload reports itself, from its own thread
    finally:
        transformers.logging.disable_propagation()
    assert run.state.global_step == 2 and hub.num_commits("user/model") == 0
    assert caplog.text.count("A checkpoint could not be uploaded") == 2


def test_trainer_pushes_an_adapter(hub, samples, tmp_path):
    """With the card that PEFT writes; of a base that only this machine has, nothing is sent."""
    new_backbone().save_pretrained(tmp_path / "backbone")
    backbone = AutoModelForMaskedLM.from_pretrained(tmp_path / "backbone")
    adapted = get_peft_model(backbone, LoraConfig(target_modules=["q_proj"], r=2))
    run = trainer(adapted, tmp_path / "out", samples, max_steps=1, hub_model_id="model", hub_token=TOKEN)
    run.train()
    with pytest.raises(ValueError, match="names a folder of this machine"):
        run.push_to_hub()
    assert set(hub.files("user/model")) == {".gitattributes"}
    push_checkpoint(tmp_path / "out", "user/model", base_model="user/backbone")
    files = hub.files("user/model")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} < set(files)
    assert {Path(path).suffix for path in files} <= {".json", ".md", ".jinja", ".safetensors", ""}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "user/backbone")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/backbone"
    assert all(str(tmp_path).encode() not in contents for contents in files.values())
    with pytest.raises(ValueError, match=r"the card of an adapter is PEFT's"):
        push_checkpoint(tmp_path / "out", "user/model", base_model="user/backbone", license="mit")
    os.remove(tmp_path / "out/adapter_model.safetensors")
    assert push(tmp_path / "out") == 2


# --- What is refused ---


def test_without_a_token(hub, checkpoint, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(checkpoint / "none"))
    assert push(checkpoint) == 2
    assert "hf auth login" in capsys.readouterr().err and hub.requests == []


def test_wrong_token_is_not_repeated(hub, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "WrongTokenOfSomebody")
    assert push(checkpoint) != 0
    said = capsys.readouterr()
    assert "401" in said.err and "WrongToken" not in said.err + said.out and not hub.repositories


def test_repository_of_somebody_else(hub, checkpoint, capsys):
    assert main(["push", "--checkpoint", str(checkpoint), "--repo", "other/model"]) == 2
    assert "rights to create a model under other" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["create", "commit", "connection", "card"])
def test_no_token_in_what_a_failing_push_says(hub, checkpoint, monkeypatch, capsys, caplog, what):
    """With every log of the client on, its own debug mode included, and a traceback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_DEBUG", True)
    monkeypatch.setenv("DEBUG", "True")
    caplog.set_level(logging.DEBUG, logger="huggingface_hub")
    if what == "create":
        monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    elif what == "card":
        (checkpoint / "README.md").write_text("---\ntags: none\n---\nMine.\n")
    else:
        hub.cut_commits = ["refuse" if what == "commit" else "before"] * 4
    assert push(checkpoint) != 0
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert "Request" in caplog.text
    for text in (said.out, said.err, caplog.text):
        assert TOKEN not in text


@pytest.mark.parametrize("repo", ["model", "a/b/c", "user/", "us er/model", "-/x--y"])
def test_impossible_names(hub, checkpoint, capsys, repo):
    assert main(["push", "--checkpoint", str(checkpoint), f"--repo={repo}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and hub.requests == []


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "lacks model.safetensors",
        ),
        (lambda folder: (folder / "dimension_compressor.py").unlink(), "lacks dimension_compressor.py"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text(INDEX), "lacks model-2.safetensors"),
        (lambda folder: (folder / "training_settings.json").write_text("[]"), "must hold a JSON object"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_incomplete_checkpoints(hub, checkpoint, capsys, spoil, message, more):
    spoil(checkpoint)
    assert push(checkpoint, *more) == 2
    assert message in capsys.readouterr().err and hub.requests == []


def test_links_out_of_the_folder_are_not_followed(hub, checkpoint, tmp_path, capsys):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (checkpoint / "vocab.txt").symlink_to(secret)
    assert push(checkpoint) == 2
    error = capsys.readouterr().err
    assert "vocab.txt is a link" in error and len(error.splitlines()) == 1 and hub.requests == []
    (checkpoint / "vocab.txt").unlink()

    (checkpoint / "real.json").write_text("{}")
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    (checkpoint / "generation_config.json").symlink_to("real.json")  # within the folder
    assert push(checkpoint, "--dry_run") == 0
    cached = tmp_path / "models--user--model"
    (cached / "snapshots").mkdir(parents=True)
    checkpoint.rename(cached / "snapshots/0")
    (cached / "blobs").mkdir()
    (cached / "snapshots/0/model.safetensors").rename(cached / "blobs/abc")
    (cached / "snapshots/0/model.safetensors").symlink_to("../../blobs/abc")
    assert push(cached / "snapshots/0", "--dry_run") == 0


def test_an_index_stays_in_its_folder(hub, checkpoint, capsys):
    index = {"metadata": {}, "weight_map": {"weight": "../outside.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint.parent / "outside.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    assert push(checkpoint) == 2
    assert "names ../outside.safetensors" in capsys.readouterr().err and hub.requests == []


def test_what_a_checkpoint_says_means_nothing_in_its_card(hub, tmp_path):
    """Settings and names may be anybody's: no new lines, columns, tags or code."""
    folder = tmp_path / "model"
    new_hybrid().save_pretrained(folder)
    (folder / "README.md").unlink()
    evil = "a|b\n## Heading\n<script>x</script>`"
    (folder / "training_settings.json").write_text(
        json.dumps({"settings": {"optim": evil}, "data": {"name": evil, "split": evil}})
    )
    config = json.loads((folder / "config.json").read_text())
    config["refiner_config"]["chunk_size"] = "4); import os"
    (folder / "config.json").write_text(json.dumps(config))
    text = model_card(folder, "user/model").text
    assert "a\\|b ## Heading &lt;script&gt;" in text
    assert "\n## Heading" not in text and "<script>" not in text and "import os" not in text


def test_without_a_checkpoint(hub, tmp_path, capsys):
    assert push(tmp_path / "nothing") == 2
    assert "There is no checkpoint" in capsys.readouterr().err


def test_backbone_that_nobody_else_has(hub, tmp_path, capsys):
    new_backbone().save_pretrained(tmp_path / "backbone")
    hybrid = new_hybrid()
    hybrid.config.backbone_name_or_path = str(tmp_path / "backbone")
    hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    assert push(tmp_path / "head") == 2
    error = capsys.readouterr().err
    assert "names a folder of this machine" in error and "--base_model" in error and hub.requests == []
    assert push(tmp_path / "head", "--base_model", str(tmp_path)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and hub.requests == []


def test_model_without_code(hub, checkpoint, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["auto_map"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert push(checkpoint) == 2
    assert "names no code" in capsys.readouterr().err


# --- Broken connections ---


@pytest.mark.parametrize("cuts", [{"cut_uploads": [1000, 0]}, {"cut_commits": ["before"]}, {"cut_commits": ["after"]}])
def test_broken_connection(hub, checkpoint, cuts):
    for name, value in cuts.items():
        setattr(hub, name, list(value))
    commit = push_checkpoint(checkpoint, "user/model")
    assert not any(getattr(hub, name) for name in cuts)
    assert hub.num_commits("user/model") == 1
    assert commit.oid == hub.repositories["user/model"].branches["main"]
    assert hub.files("user/model")["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()


def test_connection_that_stays_broken(hub, checkpoint, capsys):
    hub.cut_commits = ["before"] * 10
    assert push(checkpoint) == 1
    assert hub.num_commits("user/model") == 0 and capsys.readouterr().err.count("trying again") == 3


@pytest.mark.slow
def test_200_megabytes_with_a_cut_in_the_middle(hub, tmp_path, monkeypatch):
    torch.manual_seed(0)
    folder = tmp_path / "large"
    model = DimensionCompressor(DimensionCompressorConfig(hidden_size=7168, compressed_size=7168))
    model.weight.data.normal_()
    model.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 200_000_000
    hub.cut_uploads, hub.cut_commits = [size // 2], ["after"]
    push_checkpoint(folder, "user/large")
    assert hub.num_commits("user/large") == 1 and not hub.cut_uploads and not hub.cut_commits
    stored = hub.files("user/large")["model.safetensors"]
    assert sha256(stored) == sha256((folder / "model.safetensors").read_bytes())
    path = hf_hub_download("user/large", "model.safetensors", cache_dir=tmp_path / "cache")
    assert torch.equal(load_file(path)["weight"], model.weight)

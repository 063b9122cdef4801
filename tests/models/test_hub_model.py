"""Models on their way to the Hub and back: over a real socket, with the real client, into a process of its own."""

import ast
import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT, forget_refiner, randomise
from hub_http_server import TOKEN, Repository, model_hub
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from latent_thinking_models import make_lm, make_model
from load_from_hub import PAUSE, outputs
from run_programs import talk_to
from tiny_training import TOKENIZER, new_backbone, new_hybrid
from transformers import GenerationMixin, ModernBertConfig, ModernBertForMaskedLM, PreTrainedModel, modeling_utils

import llada_trm_hf
from llada_trm_hf import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LLaDAForMaskedDiffusion,
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    PreTrainedRefiner,
    RecursiveRefinementHeadConfig,
    SequenceTRM,
    SequenceTRMConfig,
    SlotTRMRefinerConfig,
    TRMRefinerConfig,
)
from llada_trm_hf.hub import export_custom_generate

TRAINED_STEPS = 2
GPT2_SETTINGS = {"max_new_tokens": 6, "num_diffusion_steps": 6, "block_length": 3, "mask_token_id": 299}
MASKED_LM, CAUSAL_LM, MODEL = "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel"
# For each model the Auto classes that have to load it, and whether it is saved with a tokenizer.
CASES = {
    "backbone": ((MASKED_LM, CAUSAL_LM), True),
    "encoder": ((MODEL,), False),
    "moe": ((MASKED_LM, CAUSAL_LM), False),
    "moe-encoder": ((MODEL,), False),
    "hybrid": ((MASKED_LM, CAUSAL_LM, MODEL), True),
    "hybrid-slots": ((MASKED_LM,), False),
    "hybrid-trm": ((MASKED_LM,), False),
    "hybrid-moe": ((MASKED_LM,), False),
    "hybrid-cascade": ((CAUSAL_LM,), True),
    "hybrid-own": ((MASKED_LM,), True),  # mixes the slot refiner with one of a user's
    "head": ((MODEL,), False),
    "slots": ((MODEL,), False),
    "trm-refiner": ((MODEL,), False),
    "cascade": ((MODEL,), False),
    "mix": ((MODEL,), False),
    "own": ((MODEL,), False),
    "compressor": ((MODEL,), False),
    "trm": ((MODEL,), False),
    "latent": ((CAUSAL_LM,), True),
    "thinker": ((MODEL,), False),
}
# What holds its own part of another model, and names the repository of the rest.
PARTS = {
    "hybrid-head": ("hybrid", "user/backbone"),
    "hybrid-own-head": ("hybrid-own", "user/backbone"),
    "latent-thinker": ("latent", "user/lm"),
}
MISPLACED = {
    "wide-head": ("hybrid", "user/wide", "hidden_size", 32, 64),
    "wordy-head": ("hybrid", "user/wordy", "vocab_size", len(TOKENIZER), 300),
    "wordy-thinker": ("latent", "user/wordy-lm", "vocab_size", 300, 320),
}
NAMES = [*CASES, *PARTS]
GENERATE = "user/masked-diffusion"  # the repository of custom_generate
EXAMPLE_ENCODER = "answerdotai/ModernBERT-base"  # in its card

NEWER_HYBRID = """
_forward = LLaDATRMForMaskedDiffusion.forward


def _newer_forward(self, *args, **kwargs):
    outputs = _forward(self, *args, **kwargs)
    outputs.logits = outputs.logits + 1
    return outputs


LLaDATRMForMaskedDiffusion.forward = _newer_forward
"""

PUSH = """
import json, os, sys
from pathlib import Path
from llada_trm_hf.cli.main import main
for arguments in json.loads(sys.argv[1]):
    assert main(["push", *arguments]) == 0, arguments

from tiny_training import new_hybrid, new_samples, trainer
new_hybrid().push_to_hub("user/direct", private=False)
run = trainer(new_hybrid(), Path(sys.argv[2]), new_samples(), max_steps=2, eval_strategy="steps", eval_steps=1,
              hub_model_id="user/trained", hub_token=os.environ["HF_TOKEN"], hub_revision="runs")
run.data_description = {"name": "gsm8k", "hub_name": "openai/gsm8k", "split": "train", "eval_split": "test"}
run.train()
run.push_to_hub(blocking=False).result()
"""


def run_python(arguments, hub, home, in_pause=None, **environment):
    """`python ARGUMENTS` that takes `hub` for the Hub; what it says. `in_pause` is called when it says `PAUSE`."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_VERBOSITY": "debug",  # even then, no token
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    command, pipe, said = [sys.executable, *map(str, arguments)], subprocess.PIPE, ""
    with talk_to(
        command, cwd=home, env=inherited | settings, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            said += line
            if line.strip() == PAUSE:
                in_pause()
                process.stdin.write("\n")
                process.stdin.flush()
    assert process.returncode == 0, said[-3000:]
    return said


def new_models(own):
    """The models of `CASES`; `own` is the module of a user's refiner."""
    backbone, hybrid = new_backbone(), new_hybrid()
    ids = {name: getattr(TOKENIZER, name) for name in ("mask_token_id", "pad_token_id", "eos_token_id")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
    moe = LLaDAMoEForMaskedDiffusion(LLaDAMoEConfig(vocab_size=len(TOKENIZER), **experts, **sizes, **ids))
    head = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=5, head_hidden_size=24)
    slots = SlotTRMRefinerConfig(hidden_size=32, chunk_size=5)
    loop = TRMRefinerConfig(hidden_size=32, chunk_size=5, recursion_size=16)
    mine = own.ChunkMeanRefinerConfig(hidden_size=32, chunk_size=5)

    def put_on(backbone, *refiners, integration=None):
        model = LLaDATRMForMaskedDiffusion.from_backbone(
            backbone, list(refiners), integration=integration, min_confidence=0.9
        )
        randomise(model.refiner)
        return model

    randomise(hybrid.refiner)
    cascade = put_on(new_backbone(), head, slots, integration="cascade")
    latent = make_model(backbone=make_lm(vocab_size=300))
    own_hybrid = put_on(new_backbone(), slots, mine, integration="mix")
    compressor = DimensionCompressorConfig(hidden_size=32, compressed_size=16, backbone_name_or_path="user/lm")
    trm = SequenceTRMConfig(hidden_size=16, n_heads=2, n_latent_steps=2, backbone_name_or_path="user/lm")
    models = {
        "backbone": backbone,
        "encoder": new_backbone().model,
        "moe": moe,
        "moe-encoder": LLaDAMoEForMaskedDiffusion(moe.config).model,
        "hybrid": hybrid,
        "hybrid-slots": put_on(new_backbone(), slots),
        "hybrid-trm": put_on(new_backbone(), loop),
        "hybrid-moe": put_on(moe, head),
        "hybrid-cascade": cascade,
        "hybrid-own": own_hybrid,
        "head": new_hybrid().refiner,
        "slots": cascade.refiner.refiners[1],
        "trm-refiner": put_on(new_backbone(), loop).refiner,
        "cascade": put_on(new_backbone(), head, slots, integration="cascade").refiner,
        "mix": put_on(new_backbone(), head, slots, integration="mix").refiner,
        "own": put_on(new_backbone(), mine).refiner,
        "compressor": DimensionCompressor(compressor),
        "trm": SequenceTRM(trm),
        "latent": latent,
        "thinker": make_model(backbone=make_lm(vocab_size=300)).thinker,
    }
    assert models.keys() == CASES.keys()
    return {name: model.eval() for name, model in models.items()}


@pytest.fixture(scope="module")
def own():
    """A file of a user's with a refiner that is registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("custom_refiner")
    forget_refiner("chunk_mean_refiner")
    del sys.modules["custom_refiner"]


@pytest.fixture(scope="module")
def models(own):
    return new_models(own)


def new_encoder_lm():
    """An encoder with an LM head of another library, without `generate`."""
    ids = {f"{name}_token_id": TOKENIZER.eos_token_id for name in ("bos", "cls", "eos", "sep")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModernBertConfig(vocab_size=len(TOKENIZER), pad_token_id=TOKENIZER.pad_token_id, **sizes, **ids)
    return ModernBertForMaskedLM(config)


def save_models(folder, models):
    for name, model in models.items():
        model.save_pretrained(folder / name)
        if CASES[name][1]:
            TOKENIZER.save_pretrained(folder / name)
    for part, (name, base, *_) in {**PARTS, **MISPLACED}.items():
        whole = models[name]
        whole.config.backbone_name_or_path = base
        whole.save_pretrained(folder / part, save_backbone=False)
        whole.config.backbone_name_or_path = None


def put(hub, name, model, folder):
    """A repository of somebody else's."""
    path = folder / "others" / name
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    repository = hub.repositories[f"user/{name}"] = Repository(private=False)
    repository.commit("main", {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()})


def wishes(folder):
    """For `load_from_hub.py`: label -> repository or folder, Auto class, arguments; after a pause, the second part."""
    models = {
        name if number == 0 else f"{name} {auto_class}": (f"user/{name}", auto_class, {})
        for name, (auto_classes, _) in CASES.items()
        for number, auto_class in enumerate(auto_classes)
    }
    models |= {name: (f"user/{name}", CASES[whole][0][0], {}) for name, (whole, *_) in {**PARTS, **MISPLACED}.items()}
    models |= {
        "direct": ("user/direct", MASKED_LM, {}),
        "trained": ("user/trained", MASKED_LM, {"revision": "runs"}),
        "in a folder": (str(folder / "hybrid"), MASKED_LM, {}),
        "in a folder of that name": (str(folder / "others/hybrid"), MASKED_LM, {}),
    }
    later = {
        "newer": ("user/hybrid", MASKED_LM, {}),
        "older": ("user/hybrid", MASKED_LM, {"revision": "before"}),
        "own newer": ("user/own", MODEL, {}),
        "newer in a folder": (str(folder / "hybrid"), MASKED_LM, {}),
        "as before in a folder": (str(folder / "others/hybrid"), MASKED_LM, {}),
    }
    custom_generate = {
        "hybrid with the code of another": ("user/hybrid-slots", MASKED_LM, GENERATE, {"max_new_tokens": 8}),
        "gpt2": ("user/gpt2", CAUSAL_LM, GENERATE, GPT2_SETTINGS),
    }
    return {
        "phases": [models, later],
        "cards": [*NAMES, "direct"],
        "other cards": [GENERATE],
        "custom_generate": custom_generate,
        "inputs": str(folder / "inputs.pt"),
        "outputs": str(folder / "outputs.pt"),
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory, models):
    """All models pushed by one process, and what another one without the package made of them."""
    folder, gpt2 = tmp_path_factory.mktemp("published"), make_lm("gpt2", vocab_size=300)
    save_models(folder, models)
    models["hybrid-slots"].save_pretrained(folder / "others/hybrid")
    inputs = new_inputs()
    torch.save(inputs, folder / "inputs.pt")
    (folder / "wishes.json").write_text(json.dumps(wishes(folder)))
    with model_hub() as hub:
        put(hub, "lm", models["latent"].backbone, folder)
        put(hub, "wide", new_backbone(hidden_size=64), folder)
        put(hub, "wordy", new_backbone(vocab_size=300), folder)
        put(hub, "wordy-lm", make_lm(vocab_size=320), folder)
        put(hub, "gpt2", gpt2, folder)
        put(hub, "encoder-lm", new_encoder_lm(), folder)
        hub.repositories[EXAMPLE_ENCODER] = hub.repositories.pop("user/encoder-lm")
        pushes = [["--checkpoint", str(folder / name), "--repo", f"user/{name}"] for name in [*NAMES, *MISPLACED]]
        pushes.append(["--custom_generate", GENERATE])
        (folder / "home").mkdir()
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        arguments = ["-c", PUSH, json.dumps(pushes), folder / "trained"]
        said = run_python(arguments, hub, folder / "home", PYTHONPATH=path, HF_TOKEN=TOKEN)
        pushed = {name: dict(repository.branches) for name, repository in hub.repositories.items()}

        def renew():
            """Newer code: in the repository of the hybrid, of the refiner in it, in a folder that was loaded from."""
            hybrid, files = hub.repositories["user/hybrid"], hub.files("user/hybrid")
            hybrid.branches["before"] = hybrid.branches["main"]
            hybrid.commit("main", appended(files, "modeling_llada_trm.py", NEWER_HYBRID))
            newer = hub.files("user/own")["custom_refiner.py"].replace(
                b"chunks + self.update", b"chunks - self.update"
            )
            hub.repositories["user/own"].commit("main", {**hub.files("user/own"), "custom_refiner.py": newer})
            code = folder / "hybrid/modeling_llada_trm.py"
            code.write_text(code.read_text() + NEWER_HYBRID)

        (folder / "elsewhere").mkdir()
        loader = [ROOT / "tests/load_from_hub.py", folder / "wishes.json"]
        said += run_python(loader, hub, folder / "elsewhere", renew)
        for name, branches in pushed.items():
            hub.repositories[name].branches = branches
        yield {
            "hub": hub,
            "folder": folder,
            "gpt2": gpt2,
            "inputs": inputs,
            "said": said,
            "found": torch.load(folder / "outputs.pt", weights_only=True),
        }


def appended(files, name, code):
    return {**files, name: files[name] + code.encode()}


def new_inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(10, 250, (2, 9), generator=generator),
        "hidden_states": torch.randn(2, 10, 32, generator=generator),
        "context": torch.randn(2, 10, 16, generator=generator),
    }


def assert_same(found, model, inputs):
    assert "error" not in found, found["error"]
    for part, value in outputs(model, inputs).items():
        torch.testing.assert_close(found[part], value, atol=1e-5, rtol=1e-4)


def model_classes():
    """Every class of a model in the package that is not there to be derived from."""

    def below(cls):
        for derived in cls.__subclasses__():
            if derived.__module__.startswith("llada_trm_hf."):
                yield derived
                yield from below(derived)

    found = {*below(PreTrainedModel)} - {PreTrainedRefiner}
    return {cls for cls in found if cls.__name__ in llada_trm_hf.__all__ or not any(True for _ in below(cls))}


def test_every_model_class_is_published(models):
    assert len(model_classes()) >= 12
    assert {cls.__name__ for cls in model_classes() - {type(model) for model in models.values()}} == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(models, name, dtype, tmp_path):
    model, inputs = copy.deepcopy(models[name]).to(dtype), new_inputs()
    inputs |= {part: inputs[part].to(dtype) for part in ("hidden_states", "context")}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    found, tolerance = outputs(loaded, inputs), 1e-5 if dtype is torch.float32 else 0.03
    for part, value in outputs(model, inputs).items():
        if part != "sequences":  # tensors of a file lie elsewhere in memory, which changes the last bits
            difference = (found[part].double() - value.double()).norm()
            assert difference <= tolerance * value.double().norm(), part


@pytest.mark.parametrize("name", NAMES)
def test_loads_from_the_hub_without_the_package(published, models, name):
    found, case = published["found"], PARTS.get(name, (name,))[0]
    assert_same(found[name], models[case], published["inputs"])
    assert found[name]["printed"].strip()
    for auto_class in CASES[name][0][1:] if name in CASES else ():
        assert_same(found[f"{name} {auto_class}"], models[name], published["inputs"])


def test_one_commit_of_nothing_but_the_model(published):
    for name in NAMES:
        hub, repository = published["hub"], published["hub"].repositories[f"user/{name}"]
        first, pushed = (repository.commits[commit] for commit in [*repository.commits][:2])
        assert set(first) == {".gitattributes"} and hub.files(f"user/{name}") == pushed
        assert repository.large == {"model.safetensors"}, name
        folder, files = published["folder"] / name, hub.files(f"user/{name}")
        expected = {path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()}
        expected |= {"README.md", ".gitattributes"}
        assert set(files) == expected, name
        assert {Path(path).suffix for path in expected} <= {".json", ".md", ".py", ".safetensors", ""}, name


def test_models_and_trainers_push_themselves(published):
    hub, found = published["hub"], published["found"]
    assert hub.num_commits("user/direct") == hub.num_commits("user/trained") == 1
    for name, model, branch in (
        ("direct", new_hybrid(), "main"),
        ("trained", LLaDATRMForMaskedDiffusion.from_pretrained(published["folder"] / "trained"), "runs"),
    ):
        assert_same(found[name], model.eval(), published["inputs"])
        files = hub.files(f"user/{name}", branch)
        assert {Path(path).suffix for path in files} <= {".json", ".md", ".py", ".safetensors", ""}, name


def test_card_of_a_model_that_pushed_itself_runs(published):
    assert re.fullmatch(r"tensor\(\[\[.*\]\]\)\s*", published["found"]["direct"]["printed"], re.DOTALL)


def test_newer_code_and_the_older_again(published):
    """In one process: code is that of its commit, or of its folder as it is then, whatever was loaded before."""
    found = published["found"]
    logits, other = found["hybrid"]["logits"], found["hybrid-slots"]["logits"]
    assert (logits - other).abs().max() > 0.01
    for label, expected in {
        "newer": logits + 1,
        "older": logits,
        "in a folder": logits,
        "in a folder of that name": other,
        "newer in a folder": logits + 1,
        "as before in a folder": other,
    }.items():
        assert "error" not in found[label], found[label]["error"]
        torch.testing.assert_close(found[label]["logits"], expected)


def test_newer_code_of_a_refiner_that_was_loaded_within_a_hybrid(published):
    states, found = published["inputs"]["hidden_states"], published["found"]
    updates = [found[label]["hidden_states"] - states for label in ("own", "own newer")]
    assert updates[0].abs().max() > 0.1
    # What is written is `chunk + update`, then `chunk - update`.
    torch.testing.assert_close(updates[1], -updates[0], atol=1e-5, rtol=1e-4)


def test_custom_generate_is_a_repository_of_its_own(published):
    files = published["hub"].files(GENERATE)
    code = [path for path in files if path.endswith(".py")]
    assert "custom_generate/generate.py" in code and all(Path(path).parent == Path("custom_generate") for path in code)
    assert set(files) == {".gitattributes", "README.md", *code}
    assert published["hub"].num_commits(GENERATE) == 1
    assert "custom_generate" in ModelCard(files["README.md"].decode()).data.tags
    assert published["found"][f"card of {GENERATE}"]["printed"].strip()


def test_custom_generate_from_a_folder(models, tmp_path):
    export_custom_generate(tmp_path)
    arguments = {"input_ids": new_inputs()["input_ids"], "max_new_tokens": 8}
    found = models["backbone"].generate(**arguments, custom_generate=str(tmp_path), trust_remote_code=True)
    assert torch.equal(found, models["backbone"].generate(**arguments))
    generate = GenerationMixin().load_custom_generate(tmp_path, trust_remote_code=True)
    found = generate(new_encoder_lm().eval(), **arguments, mask_token_id=TOKENIZER.mask_token_id)
    assert found.shape == (2, 17) and not (found == TOKENIZER.mask_token_id).any()


def test_custom_generate_of_another_repository(published):
    found = published["found"]["hybrid with the code of another"]["sequences"]
    assert torch.equal(found, published["found"]["hybrid-slots"]["sequences"])


@torch.no_grad()
def test_custom_generate_for_a_model_of_another_kind(published):
    """Against masked diffusion written plainly: each step commits the surest token of the block."""
    model, mask = published["gpt2"], GPT2_SETTINGS["mask_token_id"]
    rows = []
    for row in published["inputs"]["input_ids"]:
        row = torch.cat([row, torch.full((6,), mask)])
        for start in (9, 12):
            for _ in range(3):
                logits = model(row[None]).logits[0]
                logits[:, mask] = -torch.inf
                confidence, tokens = logits.softmax(-1).max(-1)
                confidence[row != mask] = -1
                position = start + int(confidence[start : start + 3].argmax())
                row[position] = tokens[position]
        rows.append(row)
    assert torch.equal(published["found"]["gpt2"]["sequences"], torch.stack(rows))


@pytest.mark.parametrize("name", MISPLACED)
def test_another_base_is_refused(published, name):
    _, base, field, own, others = MISPLACED[name]
    error = " ".join(published["found"][name]["error"].split())
    assert re.search(
        rf"ValueError: user/{name} holds the \w+ of a backbone with {field}={own}, but {base} has {others}", error
    )


@pytest.mark.parametrize("name", [*NAMES, "trained", "direct"])
def test_card_is_valid(published, monkeypatch, name):
    """By what huggingface_hub checks: its own client-side round trip, and `validate` against the server."""
    hub = published["hub"]
    content = hub.files(f"user/{name}", "runs" if name == "trained" else "main")["README.md"].decode()
    card = ModelCard(content)
    data = card.data.to_dict()
    assert ModelCardData(**ModelCard(content).data.to_dict(), ignore_metadata_errors=False).to_dict() == data
    assert data["library_name"] == "transformers" and data["tags"][-1] == "llada-trm-hf"
    assert data["pipeline_tag"] in ("text-generation", "feature-extraction")
    assert not re.search(r"N/A|None|\{\{|\{%|nan", content), content
    assert "license" not in data
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.validate(card)
    card.data.tags = "not a list"
    with pytest.raises(ValueError, match="tags"):
        hub.validate(card)


def test_cards_name_the_base(published):
    bases = {name: base for name, (_, base) in PARTS.items()}
    for name, base in {**bases, "compressor": "user/lm", "trm": "user/lm", "hybrid": None}.items():
        card = ModelCard(published["hub"].files(f"user/{name}")["README.md"].decode())
        assert card.data.to_dict().get("base_model") == base
        assert card.data.to_dict().get("base_model_relation") == ("adapter" if name in PARTS else None)
        assert base is None or f"`{base}`" in card.text


def test_trainer_pushes_with_its_metrics(published):
    files = published["hub"].files("user/trained", "runs")
    state = json.loads((published["folder"] / "trained/trainer_state.json").read_text())
    last = next(row for row in reversed(state["log_history"]) if "eval_loss" in row)
    assert last["step"] == TRAINED_STEPS
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["openai/gsm8k"]
    metrics = {result.metric_type: result for result in card.data.eval_results}
    assert metrics["loss"].metric_value == last["eval_loss"] and metrics["loss"].dataset_type == "openai/gsm8k"
    assert "runtime" not in metrics and "samples_per_second" not in metrics
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "trained" and eval_results_to_model_index(name, results) == card.data.to_dict()["model-index"]
    assert "| data | openai/gsm8k, train |" in card.text and "| learning rate | 0.003 |" in card.text
    assert f"| steps | {TRAINED_STEPS} |" in card.text and f"| loss | {last['eval_loss']:.4g} |" in card.text
    assert 'from_pretrained("user/trained", revision="runs", trust_remote_code=True)' in card.text


def test_nothing_waits_for_a_person(published):
    """transformers asks, and waits 15 seconds for the answer, wherever code is found that nobody said to trust."""
    printed = [result.get("printed", "") for result in published["found"].values()]  # what the cards' code prints
    assert "wish to run the custom code" not in " ".join([published["said"], *printed])


def test_no_token_anywhere(published):
    assert "authenticated: True" in published["said"] and TOKEN not in published["said"]
    for repository in published["hub"].repositories.values():
        for files in repository.commits.values():
            assert all(TOKEN.encode() not in contents for contents in files.values())
    for path in published["folder"].glob("**/*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_exported_code_imports_torch_and_transformers_only(published):
    checked = 0
    export_custom_generate(published["folder"] / "generate")
    for name in [*NAMES, "generate"]:
        for path in (published["folder"] / name).glob("**/*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1 and (path.parent / f"{node.module}.py").exists(), (path, node.module)
                    continue
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                checked += len(names)
                assert {name.split(".")[0] for name in names} <= {"torch", "transformers", *sys.stdlib_module_names}
    assert checked > 100


class Killed(BaseException):
    """Stands for a kill: nothing that follows runs, not even what cleans up."""


def kill_at(number, monkeypatch):
    """After so many changes to the file system, none happens any more."""
    count = 0

    def until_killed(change):
        def changed(*arguments, **kwargs):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return change(*arguments, **kwargs)

        return changed

    monkeypatch.setattr(os, "replace", until_killed(os.replace))
    monkeypatch.setattr(os, "remove", until_killed(os.remove))
    monkeypatch.setattr(shutil, "rmtree", until_killed(shutil.rmtree))
    monkeypatch.setattr(modeling_utils, "safe_save_file", until_killed(modeling_utils.safe_save_file))


@pytest.mark.parametrize("sizes", [("40KB", "40KB"), ("40KB", "1GB"), ("1GB", "40KB")])
def test_a_save_that_is_killed_leaves_the_old_model_or_the_new_one(tmp_path, make_backbone, sizes):
    """Or one without weights, for stock transformers too; never parts of both."""
    old, new = make_backbone(seed=0), make_backbone(seed=1)
    weights = [
        {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        for model in (old, new)
    ]
    found = set()
    for number in range(200):
        folder = tmp_path / str(number)
        old.save_pretrained(folder, max_shard_size=sizes[0])
        with pytest.MonkeyPatch.context() as patch:
            kill_at(number, patch)
            try:
                new.save_pretrained(folder, max_shard_size=sizes[1])
                finished = True
            except Killed:
                finished = False
        try:
            loaded = LLaDAForMaskedDiffusion.from_pretrained(folder).state_dict()
        except OSError as error:
            assert "no file named model.safetensors" in str(error)
            found.add("none")
            continue
        same = [all(torch.equal(loaded[name], tensor) for name, tensor in state.items()) for state in weights]
        assert any(same), number
        found.add(("old", "new")[same.index(True)])
        if finished:
            assert same == [False, True]
            assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
            break
        shutil.rmtree(folder)
    assert finished and found == {"old", "none", "new"}


def test_a_finished_save_removes_what_killed_ones_left(tmp_path, make_backbone):
    (tmp_path / ".saving-1").mkdir()
    (tmp_path / ".saving-1" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "model.fp16.safetensors").write_bytes(b"another variant")
    make_backbone().save_pretrained(tmp_path, max_shard_size="10KB")
    make_backbone().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"mine.txt", "model.fp16.safetensors", "model.safetensors"} <= names
    assert not [name for name in names if name.startswith(".") or "-of-" in name or "index" in name]

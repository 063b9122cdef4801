"""
Random settings, command lines and damaged files: what cannot work is told in one line, nothing hangs, nothing is left
half-written. In the suite the same examples each time; `make slow` takes thousands of new ones, and prints on a
failure how to see it again.
"""

import json
import math
import os
import shutil
import struct

import datasets
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_training import TOKENIZER, new_backbone

from llada_trm_hf import (
    DimensionCompressorConfig,
    HiddenPairsDataset,
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMConfig,
    LLaDATRMForMaskedDiffusion,
    MaskedDiffusionGenerationConfig,
    RecursiveRefinementHeadConfig,
    SequenceTRMConfig,
    SlotTRMRefinerConfig,
    import_legacy,
)
from llada_trm_hf.cli.generate import _parser as generate_parser
from llada_trm_hf.cli.main import main
from llada_trm_hf.hidden_pairs.dataset import write_shard
from llada_trm_hf.models import DimensionCompressor, SequenceTRM
from llada_trm_hf.models.refiners.refiner_integration import build_refiner
from llada_trm_hf.recipes.masked_diffusion import METHOD

REFUSED = (ValueError, TypeError, StrictDataclassError)
SLOW = pytest.param(20, marks=pytest.mark.slow)
AMOUNTS = pytest.mark.parametrize("times", [1, SLOW])


def fuzz(check, examples, times, **strategies):
    """Calls `check` with `examples` draws, or `times` as many new ones."""
    new = {"print_blob": True} if times > 1 else {"derandomize": True, "database": None}
    checks = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples * times, **checks, **new)(given(**strategies)(check))()


# --- Settings ---

WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30]),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.5, 0.0, 1e-30, 0.3, 1.0, 1e30]),
    st.text(max_size=4),
    st.lists(st.integers(-2, 60), max_size=3),
    st.just({}),
)
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"mask_token_id": 49, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
BACKBONE = {**SIZES, **TOKENS, "intermediate_size": 16, "max_position_embeddings": 32}
EXPERTS = {"dense_intermediate_size": 16, "expert_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
HEAD = {"hidden_size": 16, "chunk_size": 4}
IDS = torch.tensor([[5, 6, 49, 49], [7, 49, 8, 3]])
STATES = torch.linspace(-1, 1, 2 * 4 * 16).view(2, 4, 16)


def hybrid_config(**fields):
    return LLaDATRMConfig(backbone_config={"model_type": "llada", **BACKBONE}, **fields)


# For each config, fields that make a tiny model, and what runs one.
CONFIGS = {
    LLaDAConfig: (BACKBONE, lambda config: LLaDAForMaskedDiffusion(config)(IDS)),
    LLaDAMoEConfig: (
        {**BACKBONE, **EXPERTS} | {"intermediate_size": 16},
        lambda config: LLaDAMoEForMaskedDiffusion(config)(IDS),
    ),
    RecursiveRefinementHeadConfig: ({**HEAD, "head_hidden_size": 8}, lambda config: build_refiner(config)(STATES)),
    SlotTRMRefinerConfig: ({**HEAD, "preset": "tiny"}, lambda config: build_refiner(config)(STATES)),
    hybrid_config: ({"chunk_size": 4}, lambda config: LLaDATRMForMaskedDiffusion(config)(IDS)),
    DimensionCompressorConfig: (
        {"hidden_size": 16, "compressed_size": 4},
        lambda config: DimensionCompressor(config)(STATES),
    ),
    SequenceTRMConfig: (
        {"hidden_size": 16, "n_heads": 2, "n_layers": 1, "n_latent_steps": 1, "n_deep_recursions": 1},
        lambda config: SequenceTRM(config)(STATES),
    ),
}


@st.composite
def config_settings(draw):
    make = draw(st.sampled_from(list(CONFIGS)))
    config_class = LLaDATRMConfig if make is hybrid_config else make
    own = config_class.__dataclass_fields__.keys() - {"backbone_config", "transformers_version"}
    # Those of this package more often than those of every model.
    names = sorted(name for name in own if config_class.__annotations__.get(name)) * 4 + ["dtype", "architectures"]
    return make, draw(st.dictionaries(st.sampled_from(names), WILD, min_size=1, max_size=3))


def is_large(config):
    numbers = [value for value in json.loads(config.to_json_string(use_diff=False)).values() if type(value) is int]
    return any(abs(number) > 1000 for number in numbers)


@AMOUNTS
def test_configs(times, tmp_path):
    def check(case):
        make, fields = case
        tiny, run = CONFIGS[make]
        try:
            config = make(**{**tiny, **fields})
        except REFUSED as error:
            assert str(error)
            return
        config.save_pretrained(tmp_path)
        again = type(config).from_pretrained(tmp_path)
        assert again.to_dict() == {**config.to_dict(), "transformers_version": again.transformers_version}
        # (The states that refiners and compressors get have one width.)
        if not is_large(config) and getattr(config, "hidden_size", 16) == 16:
            with torch.no_grad():
                run(config)

    fuzz(check, 150, times, case=config_settings())


# (Compiling takes a minute; the length is the test's.)
NOT_FUZZED = {"compile", "max_new_tokens", "transformers_version"}
GENERATION = st.dictionaries(
    st.sampled_from(sorted(MaskedDiffusionGenerationConfig.__annotations__.keys() - NOT_FUZZED)),
    WILD,
    min_size=1,
    max_size=3,
)


@AMOUNTS
def test_generation_settings(times, tmp_path):
    torch.manual_seed(0)
    model = LLaDATRMForMaskedDiffusion(hybrid_config(chunk_size=4)).eval()

    def check(fields):
        try:
            config = MaskedDiffusionGenerationConfig(**fields)
        except REFUSED as error:
            assert str(error)
            return
        config.save_pretrained(tmp_path)
        again = MaskedDiffusionGenerationConfig.from_pretrained(tmp_path)
        told = {"transformers_version": again.transformers_version}
        # (Without anything masked again, its budget says nothing and is not kept.)
        told |= {} if config.remask_threshold is not None else {"remask_budget": again.remask_budget}
        assert again.to_dict() == {**config.to_dict(), **told}
        if config.num_return_sequences > 100:
            return
        try:
            model.generate(IDS, generation_config=config, **({} if config.max_length else {"max_new_tokens": 4}))
        except REFUSED as error:
            assert str(error)

    fuzz(check, 150, times, fields=GENERATION)


# --- Command lines, files ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of small models, data and settings."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    backbone = new_backbone(num_hidden_layers=1, max_position_embeddings=64)
    backbone.save_pretrained(place / "backbone")
    head = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=4, head_hidden_size=8)
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(place / "backbone", head)
    hybrid.save_pretrained(place / "hybrid")
    hybrid.save_pretrained(place / "head", save_backbone=False)
    hybrid.save_pretrained(place / "shards", max_shard_size="20kB")
    for name in ("backbone", "hybrid", "head", "shards"):
        TOKENIZER.save_pretrained(place / name)
    rows = Dataset.from_list([{"prompt": f"{n}=", "reasoning": "so", "answer": str(n)} for n in range(8)])
    rows.to_json(place / "rows.jsonl")
    rows.to_csv(place / "rows.csv")
    rows.to_parquet(place / "rows.parquet")
    (place / "rows.json").write_text(json.dumps(rows.to_list()))
    (place / "recipe.yaml").write_text("learning_rate: 1e-3\nseed: 2\ncolumns: null\nchunk_size: 4\n")
    (place / "prompts.json").write_text('["1=", {"prompt": "2="}]')
    (place / "prompts.jsonl").write_text('"1="\n{"prompt": "2="}\n')
    (place / "prompts.txt").write_text("1=\n2=\n")
    compressor = {"compressor": {"compress.weight": torch.ones(2, 3)}, "config": None}
    torch.save(compressor, place / "compressor.pt")
    write_pairs(place / "pairs")
    return place


def write_pairs(folder):
    """A finished run of datagen with two shards."""
    folder.mkdir()
    lines = []
    for shard in range(2):
        problems = [
            {"id": f"{shard}/{row}", "status": "complete", "shard": shard, "row": row, "offset": 3 * row, "length": 3}
            for row in range(2)
        ]
        write_shard(str(folder / f"pairs-{shard:05d}.safetensors"), torch.ones(6, 4), torch.ones(2, 4), problems)
        lines += [json.dumps(problem) for problem in problems]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "datagen_config.json").write_text(json.dumps({"model": "lm", "hidden_size": 4}))


@pytest.fixture
def work(place, tmp_path, monkeypatch):
    """Where commands run: a folder with a copy of `place` in it, and the caches of libraries outside."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(place, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def snapshot(folder):
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}


def run_command(work, place, words, capfd):
    """Runs a command in `work`, which is as before afterwards; a mistake of the user's leaves it so itself."""
    before = snapshot(work)
    capfd.readouterr()
    code = main(words)
    error, after = capfd.readouterr().err, snapshot(work)
    shown = f"llada-trm {' '.join(words)!a} ended with {code}: {error[-3000:]}"
    assert code in (0, 1, 2) and "Traceback" not in error, shown
    if code:
        lines = [line for line in error.splitlines() if line.startswith("llada-trm ")]
        assert len(lines) == 1 and len(lines[0]) > 30, shown
    if code == 2:
        assert after == before, f"{set(after) ^ set(before)} {shown}"
    elif after != before:
        shutil.rmtree(work)
        shutil.copytree(place, work)
        os.chdir(work)


GENERATE = "generate --checkpoint hybrid --prompt 1= --device cpu --max_new_tokens 3 --dtype float32"
EVALUATE = "evaluate --model hybrid --device cpu --output_dir out --max_new_tokens 3 --split test[:2] --dataset_name "
TRAIN = "train --backbone backbone --output_dir out --use_cpu --report_to none --disable_tqdm true --split train[:4]"
TRAIN += " --max_steps 1 --max_length 48 --num_terms 4 --save_strategy no --recursion_size 8"
FLAGS = {
    GENERATE: sorted(
        flag
        for action in generate_parser()._actions
        for flag in action.option_strings[-1:]
        if flag not in ("--compile", "--import_module", "--help")
    ),
    TRAIN: sorted(
        f"--{name}"
        for name in (
            *METHOD.script_arguments.__dataclass_fields__,
            *("learning_rate", "weight_decay", "warmup_steps", "max_steps", "num_train_epochs", "seed", "data_seed"),
            *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "save_steps"),
            *("logging_steps", "save_strategy", "eval_strategy", "lr_scheduler_type", "optim", "adam_beta1"),
            *("use_ema", "ema_decay", "mask_epsilon", "random_length_probability", "use_muon", "save_backbone"),
            *("muon_learning_rate", "early_stopping_patience", "resume_from_checkpoint", "config", "recipe"),
            *("metric_for_best_model", "load_best_model_at_end", "gradient_checkpointing", "save_total_limit"),
        )
    ),
}
VALUES = [
    "nan",
    "inf",
    "-1",
    "0",
    "1",
    "7",
    "0.5",
    "-0.5",
    "1e400",
    "9" * 20,
    "",
    " ",
    "ü",
    "..",
    "true",
    "none",
    "{}",
]
VALUES += ["train[:2]", "train[2:1]", "train[", "hybrid", "backbone", "head", "pairs", "rows.jsonl", "rows.csv", "out"]
VALUES += ["nowhere", "nowhere.json", "recipe.yaml", "prompts.txt", "compressor.pt", "a=b", "prompt=answer", "--seed"]


@st.composite
def command_lines(draw):
    base = draw(st.sampled_from([GENERATE, GENERATE, TRAIN]))
    words = base.split()
    for _ in range(draw(st.integers(1, 2))):
        words.append(draw(st.sampled_from(FLAGS[base])))
        words += draw(st.lists(st.sampled_from(VALUES), max_size=2, min_size=draw(st.integers(0, 1))))
    return words


@AMOUNTS
def test_command_lines(times, place, work, capfd):
    for command in FLAGS:
        assert main(command.split()) == 0, capfd.readouterr().err
    fuzz(lambda words: run_command(work, place, words, capfd), 150, times, words=command_lines())


# A file, and the command that reads it.
READERS = {
    **dict.fromkeys(
        [f"hybrid/{name}" for name in ("config.json", "generation_config.json", "model.safetensors")], GENERATE
    ),
    **dict.fromkeys(["hybrid/tokenizer.json", "hybrid/tokenizer_config.json"], GENERATE),
    **dict.fromkeys(["head/config.json", "head/model.safetensors"], GENERATE.replace("hybrid", "head")),
    "shards/model.safetensors.index.json": GENERATE.replace("hybrid", "shards"),
    **{f"rows.{ending}": f"{EVALUATE}rows.{ending}" for ending in ("json", "jsonl", "csv", "parquet")},
    **{f"prompts.{e}": GENERATE.replace("--prompt 1=", f"--prompts_file prompts.{e}") for e in ("json", "jsonl")},
    "prompts.txt": GENERATE.replace("--prompt 1=", "--prompts_file prompts.txt"),
    "recipe.yaml": f"{TRAIN} --config recipe.yaml",
}
# On a damaged one of these, pyarrow's reader has crashed (a segmentation fault), and the tests with it.
LEFT_OUT = ("rows.json", "rows.jsonl")
JSON_VALUES = st.one_of(WILD, st.sampled_from(["llada", "slot_trm_refiner", [None], {"a": 1}, [[]], "x" * 50]))


@st.composite
def damages(draw, names):
    """A file's name, and a function from its bytes to others."""
    name = draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "replace", *["value"] * 4]))
    place, noise = draw(st.floats(0, 0.999)), draw(st.binary(min_size=1, max_size=12))
    if kind == "replace":
        return name, lambda content: noise * int(1 + 9 * place)
    if kind == "value" and name.endswith((".json", ".jsonl")):
        key, value = draw(st.integers(0, 10**6)), draw(JSON_VALUES)
        return name, lambda content: with_other_value(content, key, value, name.endswith(".jsonl"))
    if kind == "value" and name.endswith(".safetensors"):
        key, value = draw(st.integers(0, 10**6)), draw(JSON_VALUES)
        return name, lambda content: with_other_header(content, key, value)

    def damage(content):
        at = int(place * len(content))
        cut = {"cut": content[:at], "insert": content[:at] + noise + content[at:]}
        return cut.get(kind, content[:at] + noise + content[at + len(noise) :])

    return name, damage


def with_other_value(content, key, value, is_lines=False):
    """JSON (of JSON Lines, the first) in which one value, wherever it stands, is another, or gone."""
    head, separator, rest = content.partition(b"\n") if is_lines else (content, b"", b"")
    data = {"": json.loads(head)}  # which may be a text alone
    places, waiting = [], [data]
    while waiting:
        holder = waiting.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        places += [(holder, name) for name, _ in items]
        waiting += [inner for inner in (holder.values() if isinstance(holder, dict) else holder) if inner]
        waiting = [inner for inner in waiting if isinstance(inner, (dict, list))]
    holder, name = places[key % len(places)]
    if value is None and isinstance(holder, dict):
        del holder[name]
    else:
        holder[name] = value
    return json.dumps(data.get("", "")).encode() + separator + rest


def with_other_header(content, key, value):
    (length,) = struct.unpack("<Q", content[:8])
    header = with_other_value(content[8 : 8 + length], key, value)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


@AMOUNTS
def test_damaged_files(times, place, work, capfd):
    for command in {*READERS.values()}:
        assert main(command.replace("--output_dir out", f"--output_dir {len(os.listdir())}").split()) == 0

    def check(damage):
        name, change = damage
        if name in LEFT_OUT:
            return
        (work / name).write_bytes(change((place / name).read_bytes()))
        try:
            run_command(work, place, READERS[name].split(), capfd)
        finally:
            work.mkdir(exist_ok=True)
            shutil.copyfile(place / name, work / name)

    fuzz(check, 150, times, damage=damages(sorted(READERS)))


def read_pairs(folder):
    pairs = HiddenPairsDataset(folder)
    return [pairs[number] for number in range(len(pairs))]


@AMOUNTS
def test_damaged_pairs_and_older_files(times, place, work):
    """Read from Python: an error for the user, or all of it."""
    assert len(read_pairs(work / "pairs")) == 4 and import_legacy(work / "compressor.pt")
    names = ["compressor.pt", *[f"pairs/{path.name}" for path in sorted((place / "pairs").iterdir())]]

    def check(damage):
        name, change = damage
        (work / name).write_bytes(change((place / name).read_bytes()))
        try:
            import_legacy(work / name) if name == "compressor.pt" else read_pairs(work / "pairs")
        except (ValueError, FileNotFoundError) as error:
            assert name.partition("/")[0] in str(error)
        finally:
            shutil.copyfile(place / name, work / name)

    fuzz(check, 60, times, damage=damages(names))
